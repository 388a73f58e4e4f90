"""The loop: steps of a course of healing, from where a checkpoint left it to the next one."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from respike.data import Batch, Curriculum, Loader, RecallSource, TextSource, TokenStore
from respike.errors import DataError, RespikeError, UnsupportedError, UsageError
from respike.healing.config import Healing, Stage
from respike.healing.objectives import (
    Asked,
    Carried,
    Pair,
    beyond_original,
    distil,
    finetune,
    memory_is_off,
    predicting,
    short_layers,
    transfer,
    weigh_positions,
)
from respike.healing.optimiser import Average, Optimiser
from respike.healing.packed import Lanes
from respike.healing.parallel import World
from respike.healing.penalties import Penalties, Penalty
from respike.healing.trainable import all_trained, trained_names
from respike.models.ablation import has_part, without
from respike.tokenizer import Tokenizer


@dataclass
class Where:
    """How far a course has come.

    Attributes:
        stage: Index of the stage.
        step: Steps of that stage that are done.
        total_steps: Steps of all stages that are done.
        seconds: Time spent training.
        ledger: What each finished or current stage has read, see `Loader.ledger`.
    """

    stage: int = 0
    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    ledger: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens trained on, padding left out."""
        return sum(int(entry["tokens"]) for entry in self.ledger)


class Trainer:
    """Runs the steps of a course.

    Args:
        pair: The models; the student already prepared by `trainable.prepare`.
        healing: The course.
        store: Its text.
        tokenizer: Of the models.
        world: The processes that share the work.
    """

    def __init__(
        self, pair: Pair, healing: Healing, store: TokenStore, tokenizer: Tokenizer, world: World
    ) -> None:
        self.pair, self.healing, self.world = pair, healing, world
        self.store, self.tokenizer = store, tokenizer
        self.has_memory = has_part(pair.student, "memory")
        self._check_stages()
        world.shard(pair.student)
        self.trained = all_trained(pair.student, healing)
        self.average = Average(self.trained, healing.ema_decay, healing.interpolation_frac)
        self.where = Where()
        self.begin_stage()

    def _check_stages(self) -> None:
        """Find what is wrong with a later stage before the first is trained."""
        for number, stage in enumerate(self.healing.stages):
            if not any(trained_names(self.pair.student, self.healing, stage)):
                raise UnsupportedError(
                    f"stages.{number} ({stage.kind}) trains nothing of this model",
                    hint="give it `train`, or leave it out",
                )
            try:
                self._loader(number)
            except (DataError, UsageError) as error:
                raise type(error)(f"stages.{number}: {error}", hint=error.hint) from None

    def begin_stage(self, cursor: Mapping[str, Any] | None = None) -> None:
        """Data, optimiser and gradients of the current stage."""
        stage = self.stage
        names = dict(trained_names(self.pair.student, self.healing, stage))
        chosen = [t for t in self.trained if t.name in names]
        for tensor in self.trained:
            tensor.tensor.requires_grad_(tensor.name in names)
        self.pair.recompute = stage.recompute
        self.optimiser = Optimiser(chosen, stage, self.healing.clip)
        self.loader = self._loader(self.where.stage, cursor)
        self.carried = self._fresh_lanes()

    def _fresh_lanes(self) -> Carried | None:
        return Carried(Lanes({}), Lanes({})) if self.stage.kind == "length" else None

    def _loader(self, number: int, cursor: Mapping[str, Any] | None = None) -> Loader:
        """Batches of a stage."""
        healing, stage = self.healing, self.healing.stages[number]
        options, seed = stage.recall, healing.seed * 101 + number
        text = TextSource(
            "text", self.store, seed=seed, heldout_frac=healing.heldout_frac,
            min_document_tokens=stage.least_document_tokens,
        )  # fmt: skip
        sources: list[tuple[Any, float]] = []
        if options.frac < 1:
            sources.append((text, 1 - options.frac))
        if options.frac > 0:
            curriculum = Curriculum(
                options.least_tokens, options.first_tokens, options.last_tokens,
                options.doubling_samples,
            )  # fmt: skip
            recall = RecallSource(
                "recall", self.tokenizer, seed=seed, curriculum=curriculum,
                families=options.families, filler=text,
            )  # fmt: skip
            sources.append((recall, options.frac))
        return Loader(
            sources, batch_size=stage.rows, context_tokens=stage.context_tokens, cursor=cursor
        )

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.healing.stages[self.where.stage]

    @property
    def all_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.healing.stages)

    @property
    def done(self) -> bool:
        """Nothing is left to do."""
        return self.where.total_steps >= self.all_steps

    @property
    def may_stop(self) -> bool:
        """The run can go on from here with the same bits."""
        return self.done or self.where.step % self.stage.checkpoint_steps == 0

    def step(self) -> dict[str, Any]:
        """One step; what the log says of it."""
        begun = time.perf_counter()
        where, stage = self.where, self.stage
        batch = next(self.loader)
        penalties = Penalties(self.pair.student, stage, where.step)
        memory_off = self.has_memory and memory_is_off(self.healing, stage, where.step)
        with without(self.pair.student, "memory") if memory_off else nullcontext():
            loss = self._gradients(batch, penalties, memory_off)
        norm = 0.0
        if loss is None:  # moments would go on moving what nothing was said about
            self.optimiser.forget()
        else:
            norm = self.optimiser.clip_gradients()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise RespikeError(
                    f"step {where.total_steps + 1} (stages.{where.stage}): loss {loss}, norm of "
                    f"the gradient {norm}: expected numbers; nothing of this step is kept",
                    hint="the newest checkpoint is whole; a new OUT with a lower rate, or "
                    "--set compute=f32, may get past it",
                )
            self.optimiser.step(where.step, stage.steps)
            self.average.update()
        seconds = time.perf_counter() - begun
        where.step += 1
        where.total_steps += 1
        where.seconds += seconds
        where.ledger[where.stage :] = [self.loader.ledger()]
        tokens = int((batch.documents > 0).sum())
        line = {
            "step": where.total_steps,
            "stage": f"{where.stage + 1} {stage.kind}",
            "tokens": where.tokens,
            "loss": loss,
            "gradient_norm": norm,
            "tokens_per_second": tokens / seconds,
            **({"memory": "off"} if memory_off or self.healing.memory == "off" else {}),
            **penalties.figures(self.world),
        }
        if where.step == stage.steps and where.stage + 1 < len(self.healing.stages):
            where.stage, where.step = where.stage + 1, 0
            self.begin_stage()
        return line

    def _gradients(self, batch: Batch, penalties: Penalties, memory_off: bool) -> float | None:
        """The whole step's loss and gradients, micro-batch by micro-batch, over all processes.

        None: the step only read what later steps ask about.
        """
        stage, where, healing = self.stage, self.where, self.healing
        key = f"positions {healing.seed}/{where.stage}/{where.step}"
        weights, beyond = weigh_positions(batch, stage, key), None
        if self.carried is not None:
            read_tokens = where.step % stage.checkpoint_steps * stage.context_tokens
            trained_tokens = self.pair.teacher.config.max_position_embeddings
            beyond, answers = beyond_original(batch, trained_tokens, read_tokens)
            weights *= ~beyond | answers
        counted = weights
        if stage.kind == "transfer":
            counted = batch.documents > 0
        elif stage.kind == "finetune":
            counted = predicting(batch.loss_mask)
        total = float(counted.sum())
        world = self.world
        mine = batch.shard(world.rank, world.size)
        first = world.rank * len(mine.tokens)
        loss = 0.0
        for begin in range(0, len(mine.tokens), stage.micro_rows):
            micro = mine.rows(slice(begin, begin + stage.micro_rows))
            number = (first + begin) // stage.micro_rows
            share = stage.micro_rows / stage.rows
            if stage.kind == "transfer":
                loss += transfer(self.pair, micro, share, whole=bool(stage.train))
            else:
                with penalties.of(share) as penalty:
                    if stage.kind == "finetune":
                        loss += finetune(self.pair, micro, total, penalty)
                    else:
                        rows = slice(first + begin, first + begin + stage.micro_rows)
                        some, told = weights[rows], None if beyond is None else beyond[rows]
                        alone = world.size == 1 or not total
                        asked = Asked(some, told, total, alone and not some.any())
                        short = (set(), 0) if memory_off else self._short(number)
                        loss += self._distil(micro, asked, short, begin, penalty)
            for tensor in self.optimiser.trained:
                tensor.collect(world.size)  # FSDP averages over processes; losses are shares
        return world.total(loss) if total else None

    def _short(self, micro: int) -> tuple[set[int], int]:
        """Layers with short windows in a micro-batch of the step, and how short."""
        stage, step = self.stage, self.where.step
        return short_layers(
            self.pair.student, self.healing, stage.window_dropout, step, stage.steps, micro
        )

    def _distil(
        self, micro: Batch, asked: Asked, short: tuple[set[int], int], begin: int, penalty: Penalty
    ) -> float:
        """`distil` on a micro-batch of the step, whose first row is ``begin``."""
        lanes = None if self.carried is None else self.carried.at(begin)
        return distil(self.pair, micro, asked, short, lanes, penalty)

    def renew_lanes(self) -> None:
        """Forget carried states: to be called at every place where a run may stop."""
        self.carried = self._fresh_lanes()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later process needs to go on, beside `facts`."""
        found: dict[str, Tensor] = {}
        averages = self.average.tensors()
        for tensor in self.trained:
            found[f"master/{tensor.name}"] = self.world.full(tensor.master.detach())
            found[f"average/{tensor.name}"] = self.world.full(averages[tensor.name])
        for tensor in self.optimiser.trained:
            for name, value in self.optimiser.adam.state.get(tensor.master, {}).items():
                found[f"{name}/{tensor.name}"] = self.world.full(value)
        return found

    def facts(self) -> dict[str, Any]:
        """The rest of it, as JSON."""
        return {
            "where": vars(self.where),
            "cursor": self.loader.cursor(),
            "average_steps": self.average.steps,
        }

    def take_up(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `tensors` and `facts` gave."""
        self.where = Where(**facts["where"])
        self.begin_stage(facts["cursor"])
        self.average.steps = facts["average_steps"]
        with torch.no_grad():
            for tensor, value in zip(self.trained, self.average.values, strict=True):
                self.world.put(tensor.master, tensors[f"master/{tensor.name}"])
                self.world.put(value, tensors[f"average/{tensor.name}"])
                tensor.publish()
            for tensor in self.optimiser.trained:
                state = self.optimiser.adam.state[tensor.master]
                for name in ("step", "exp_avg", "exp_avg_sq"):
                    stored = tensors.get(f"{name}/{tensor.name}")
                    if stored is None:
                        continue
                    like = torch.zeros_like(tensor.master) if stored.ndim else stored.clone()
                    self.world.put(like, stored)
                    state[name] = like
