"""AdamW on the masters, a cosine for the rates, and a running average of the weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from respike.healing.config import Stage
from respike.healing.trainable import Kind, Trained

BETAS = (0.9, 0.95)


def rate_at(stage: Stage, step: int, steps: int) -> float:
    """Factor on the peak rates: a linear warm-up, then a cosine down to ``final_frac``."""
    warmup = max(1, round(stage.warmup_frac * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return stage.final_frac + (1 - stage.final_frac) * (1 + math.cos(math.pi * done)) / 2


class Optimiser:
    """Steps the masters of some tensors and rounds them into the model.

    Args:
        trained: What the stage trains.
        stage: Its rates.
        clip: Largest norm of a gradient.
    """

    def __init__(self, trained: Sequence[Trained], stage: Stage, clip: float) -> None:
        self.trained, self.stage, self.clip = list(trained), stage, clip
        rates: dict[Kind, float] = {"new": stage.memory_rate, "source": stage.rate}
        if stage.silence and stage.silence.band_rate is not None:
            rates["band"] = stage.silence.band_rate
        groups = [
            {"params": [t.master for t in self.trained if t.kind == kind], "peak": peak, "lr": peak}
            for kind, peak in rates.items()
        ]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=BETAS, weight_decay=0.0
        )

    def clip_gradients(self) -> float:
        """Shorten the gradients collected so far; returns their norm before."""
        norm = torch.nn.utils.clip_grad_norm_([t.master for t in self.trained], self.clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def forget(self) -> None:
        """Drop the gradients collected so far."""
        self.adam.zero_grad(set_to_none=True)

    def step(self, step: int, steps: int) -> None:
        """One step with the gradients collected so far, at the rates of ``step`` of ``steps``."""
        factor = rate_at(self.stage, step, steps)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        self.adam.step()
        self.forget()
        for tensor in self.trained:
            tensor.publish()


class Average:
    """A running average of masters; young ones weigh what is there evenly.

    Args:
        trained: Whose masters, as they are before the first step.
        decay: Of the average, a step.
        interpolation_frac: How far from there to the average the weights are that are kept.
    """

    def __init__(self, trained: Sequence[Trained], decay: float, interpolation_frac: float) -> None:
        self.trained, self.decay, self.steps = list(trained), decay, 0
        self.values = [t.master.detach().clone() for t in self.trained]
        self.interpolation_frac = interpolation_frac
        self.start = None if interpolation_frac == 1 else [v.clone() for v in self.values]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the masters as they are now."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        masters: list[Tensor] = [t.master for t in self.trained]
        torch._foreach_lerp_(self.values, masters, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """The average, by name, float32."""
        return {t.name: value for t, value in zip(self.trained, self.values, strict=True)}

    @torch.no_grad()
    def interpolated(self) -> dict[str, Tensor]:
        """What is kept: `interpolation_frac` of the way from the start to the average, float32.

        Of a low-rank product the second factor alone goes that way: it begins at zero.
        """
        found = self.tensors()
        if self.start is None:
            return found
        for (name, value), start in zip(found.items(), self.start, strict=True):
            if not name.endswith(".down"):
                found[name] = start + self.interpolation_frac * (value - start)
        return found
