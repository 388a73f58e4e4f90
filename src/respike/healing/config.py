"""What a person asks of healing: data, stages, rates, as YAML, checked before anything runs."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from respike.device import compute_dtype
from respike.errors import UsageError, did_you_mean
from respike.overrides import set_value
from respike.schema import Frozen
from respike.tasks import FAMILIES

MAX_CONFIG_BYTES = 1 << 20
Rate = Annotated[float, Field(gt=0, le=1)]
Frac = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(gt=0, le=1 << 44)]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Norm = Literal["input_layernorm", "post_attention_layernorm"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
StageKind = Literal["transfer", "distil", "length", "finetune"]
KINDS_WITH: dict[str, tuple[StageKind, ...]] = {
    "silence": ("distil", "length", "finetune"),
    "sampled_frac": ("distil", "length"),
    "sample_weight": ("distil", "length"),
    "recompute": ("distil", "finetune"),
    "window_dropout": ("distil",),
    "memory_dropout": ("distil",),
}
"""Which stages look at a setting; in others it would mean nothing."""


def _switch(value: object) -> object:
    """YAML reads on and off without quotes as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _fastest(value: object) -> object:
    """A course says what it computes in, so that it goes on alike."""
    return compute_dtype() if value == "auto" else value


class RecallOptions(Frozen):
    """The recall samples of a mixture; see `respike.data.recall`."""

    frac: Frac = 0.2
    """Share of all tokens."""
    families: tuple[str, ...] = tuple(FAMILIES)
    least_tokens: int = Field(default=64, ge=16)
    first_tokens: int = Field(default=512, ge=16)
    last_tokens: int = Field(default=2048, ge=16)
    """Only `length` stages look further back than ``context_tokens``: elsewhere longer samples are
    cut, and answers behind the cut count as any other text."""
    doubling_samples: int = Field(default=200, ge=1)


class Dropout(Frozen):
    """How often something is left out, in a straight line from a stage's beginning to its end."""

    first_frac: Frac = 0.0
    """Share of the draws at the stage's first step."""
    last_frac: Frac = 0.0
    """Behind its last."""

    @property
    def happens(self) -> bool:
        """Whether anything is ever dropped."""
        return self.first_frac > 0 or self.last_frac > 0

    def frac(self, step: int, steps: int) -> float:
        """The share at a step of a stage."""
        return self.first_frac + (self.last_frac - self.first_frac) * step / steps


class WindowDropout(Dropout):
    """In some layers of some batches the window is short, so that the memory must work.

    Drawn for each layer and micro-batch of the steps whose memories are on. Beside a memory that
    has projections of its own the softmax is left out altogether.
    """

    window_tokens: int = Field(default=64, ge=1)


class MemoryDropout(Dropout):
    """Some steps are taken with all memories off, so that window and softmax do what they can.

    Drawn for each step. Beside a memory, which gives what text needs, V and O learn less recall
    than without (docs/log.md, 2026-11-29).
    """


class Silence(Frozen):
    """What a stage asks of the neurons of a model that spikes.

    The share of the weights behind neurons that is to be skipped goes from ``first_frac`` to
    ``silent_frac`` in a straight line, and stays. The loss adds ``price_nats`` for each share
    that is touched beyond it (and less for the first two hundredths).
    """

    silent_frac: Frac
    """Share of the weights that is to be skipped in the end."""
    first_frac: Frac = 0.0
    """At the stage's first step; what the model skips already is a good choice."""
    ramp_frac: Frac = 0.5
    """Share of the stage's steps after which all of it is asked."""
    price_nats: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    """For all weights, in the unit of the stage's loss; more than what silence costs in KL."""
    band_rate: Rate | None = 1e-2
    """Peak learning rate of the neurons' silent bands, which are in units of the mean magnitude.
    null: they stay as they are."""

    def asked_frac(self, step: int, steps: int) -> float:
        """What is to be skipped at a step of a stage."""
        ramp = self.ramp_frac * steps
        done = 1.0 if ramp <= 0 else min(1.0, step / ramp)
        return self.first_frac + (self.silent_frac - self.first_frac) * done


class Stage(Frozen):
    """One stretch of training with one objective.

    transfer   Each layer's attention, on the original's own inputs, gives the original's output:
               without ``train`` head by head behind the window, else as it joins the residual.
    distil     The whole model gives the original's next-token distribution.
    length     As distil, with states carried from row to row of a long document. Beyond the length
               that the original was trained for it has nothing to teach: there only the answers of
               recall tasks are learnt, from the data.
    finetune   The data's own next token (of conversations: what the assistant says).
    """

    kind: StageKind
    tokens: Tokens
    context_tokens: int = Field(default=2048, ge=16, le=1 << 20)
    rows: int = Field(default=4, ge=1)
    """Rows of ``context_tokens`` in one step."""
    micro_rows: int = Field(default=1, ge=1)
    """Rows worked on at a time; divides ``rows``. Bounds the memory. The gradients are the same but
    for what is drawn, or measured, for each micro-batch: short windows, a transfer's errors."""
    recompute: bool = False
    """Layers are computed again in the backward pass, not held from the forward pass (activation
    checkpointing): less memory, more time, the same bits. For distil and finetune stages."""
    least_document_tokens: int = Field(default=1, ge=1)
    """Shorter documents are left out: what fits the window teaches a memory nothing."""
    recall: RecallOptions = RecallOptions()
    train: dict[Projection | Norm, Literal["full"] | Annotated[int, Field(ge=1, le=1024)]] = Field(
        default_factory=dict
    )
    """Source weights that are trained: all of a matrix, or a product of this rank beside it. What
    conversion added is always trained. Norms are trained in full; where neurons follow, they give
    each channel a band of its own."""
    silence: Silence | None = None
    """Of models that spike; null asks nothing of their neurons and leaves their bands."""
    rate: Rate = 1e-4
    """Peak learning rate of the source's weights."""
    memory_rate: Rate = 1e-3
    """Peak learning rate of what conversion added."""
    warmup_frac: Frac = 0.05
    final_frac: Frac = 0.1
    """Of the peak rates, at the end of a cosine."""
    sampled_frac: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of positions whose logits are compared; answers of recall tasks always are."""
    sample_weight: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Answers of one recall sample weigh together at least as much as this many positions: a
    passkey is five tokens among thousands. 0: each answer weighs as much as any position."""
    balance: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Weight of the balance loss, summed over layers, of models whose tokens choose experts or
    partitions: see `respike.models.balance`. SpikingBrain2.0's."""
    window_dropout: WindowDropout = WindowDropout()
    memory_dropout: MemoryDropout = MemoryDropout()

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two places at which a run can stop and go on.

        Carried states are dropped there, so that a run that stopped and one that did not do the
        same. Other stages carry nothing.
        """
        return 64 if self.kind == "length" else 1

    @property
    def steps(self) -> int:
        """Steps of ``rows * context_tokens`` tokens."""
        return max(1, round(self.tokens / (self.rows * self.context_tokens)))

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        for name, kinds in KINDS_WITH.items():
            asked = getattr(self, name) != type(self).model_fields[name].default
            if asked and self.kind not in kinds:
                raise ValueError(
                    f"{name} is for {' and '.join(kinds)} stages, this one is {self.kind}"
                )
        if self.rows % self.micro_rows:
            raise ValueError(f"rows {self.rows} is not a multiple of micro_rows {self.micro_rows}")
        if self.kind == "transfer" and any(name not in ATTENTION for name in self.train):
            raise ValueError("a transfer stage trains attention and nothing else of the source")
        if self.memory_dropout.happens and not self.train:
            raise ValueError("memory_dropout needs train: with memories off nothing else learns")
        for name, how in self.train.items():
            if name.endswith("norm") and how != "full":
                raise ValueError(f"{name} is a vector: train it in full")
        return self


class Judging(Frozen):
    """What decides which weights are kept, on data that is not trained on."""

    every_tokens: Tokens = 250_000
    contexts: int = Field(default=8, ge=1)
    context_tokens: int = Field(default=2048, ge=16)
    recall: tuple[str, ...] = ("copy:512", "passkey:1024:0.25", "multi-query:32")
    trials: int = Field(default=16, ge=1)
    recall_slack_frac: Frac = 0.02
    """Weights whose recall is lower than at the start by more than this are not kept."""
    silent_frac: Frac = 0.0
    """Of models that spike: weights that skip less than this on the first contexts are kept only
    until others do, or skip more."""
    silence_contexts: int = Field(default=2, ge=1)
    """Contexts on which that is measured."""


class Healing(Frozen):
    """A whole course of healing."""

    heal: Literal[1]
    """Version of this schema."""
    name: str = Field(min_length=1, max_length=100)
    about: str = ""
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    memory: Annotated[Literal["on", "off"], BeforeValidator(_switch)] = "on"
    """off: the control. Memories are shut while training, everything else is alike."""
    compute: Annotated[Literal["bf16", "f32"], BeforeValidator(_fastest)] = Field(
        default="auto", validate_default=True
    )
    """What the models compute in; auto: what this machine trains in fastest. Masters, moments and
    averages are float32 in any case."""
    heldout_frac: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the documents that is never trained on."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Of the running average of the weights, a step; the average is what is kept."""
    interpolation_frac: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Kept are weights so far on the way from the converted model's to that average (WiSE-FT,
    Wortsman et al. 2022, section 3: alpha): nearer to the original, with less of what was
    learnt."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of a step's gradient."""
    judge: Judging = Judging()
    pretraining_tokens: float | None = Field(default=None, gt=0)
    """What the original was trained on, for the ledger: healing's share of it."""
    stages: tuple[Stage, ...] = Field(min_length=1)

    @property
    def tokens(self) -> int:
        """Training tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)


def builtin_healings() -> list[str]:
    """Names of the courses that come with respike."""
    folder = resources.files("respike.healing") / "configs"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def load_healing(name: str, overrides: tuple[str, ...] = ()) -> Healing:
    """A built-in course by its name, or one from a YAML file.

    Args:
        name: Of a built-in course, or a path.
        overrides: ``KEY=VALUE``, such as ``seed=1`` or ``stages.1.tokens=300000``.

    Raises:
        UsageError: There is no such course, or it is malformed; says where.
    """
    known = builtin_healings()
    if name in known:
        text = (resources.files("respike.healing") / "configs" / f"{name}.yaml").read_text("utf-8")
    else:
        text = _read(Path(name), known)
    try:
        raw = yaml.safe_load(text)
    except RecursionError:
        raise UsageError(f"{name}: not a course: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise UsageError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{name}: expected keys and values, got a {type(raw).__name__}")
    for override in overrides:
        set_value(raw, override, UsageError, "stages.0.tokens=1000")
    try:
        return Healing.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message, hint = first["msg"], None
        if first["type"] == "extra_forbidden":
            schemas = (Healing, Stage, Silence, Judging, RecallOptions, WindowDropout)
            known = [name for schema in schemas for name in schema.model_fields]
            message = "no such key"
            hint = did_you_mean(str(first["loc"][-1]), known)
        raise UsageError(f"{name}: {where}: {message}", hint=hint) from None


def _read(path: Path, known: list[str]) -> str:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UsageError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB, refused")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(
            f"{path}: {reason}; expected a YAML file or one of {', '.join(known)}",
            hint=did_you_mean(path.name, known),
        ) from None
