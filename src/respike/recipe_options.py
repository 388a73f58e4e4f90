"""What a recipe may say: its schema, one class for each part, with the defaults.

The rules are read top to bottom and the first that matches a layer decides its mixer; then the
KV groups in ``softmax_groups`` keep softmax whatever their layer's rule says, but for ``keep``.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from respike.schema import (
    BlockCount,
    BlockTokens,
    ExpertCount,
    FeatureCount,
    Fraction,
    Frozen,
    GateNormalizer,
    GateRank,
    KeptCount,
    PartitionCount,
    ReachTokens,
    SinkTokens,
    TrueTokens,
    WindowTokens,
)

Place = Literal["all", "rest", "even", "odd"]
MemoryName = Literal["none", "far", "gla", "tied", "delta", "sse"]
LinearName = Literal["gla", "tied", "delta", "sse"]
HalfLife = Annotated[float, Field(ge=2**-10, le=1 << 32)]


MAX_NAME = 100
"""Characters of a recipe's name."""


class Evenly(Frozen):
    """``count`` layers spread evenly over the depth."""

    evenly: int = Field(gt=0)


class Scaled(Frozen):
    """Some layers of a model of ``of`` layers, or those at the same relative depth of another."""

    layers: tuple[Annotated[int, Field(ge=0)], ...]
    of: int = Field(gt=0, le=1024)

    @field_validator("of")
    @classmethod
    def _there(cls, of: int, info: Any) -> int:
        if any(index >= of for index in info.data.get("layers", ())):
            raise ValueError(f"layers has {max(info.data['layers'])}, expected less than of")
        return of


At = Place | Evenly | Scaled | tuple[int, ...]
"""all or rest, even or odd, {evenly: N}, {layers: [...], of: N}, or a list of indices (negative
from the end)."""


class Rule(Frozen):
    """Which mixer the layers at some places get."""

    at: At
    mixer: Literal["keep", "full", "blocks", "window", "linear"]
    """keep: what the source has there. linear: a memory without softmax."""
    memory: MemoryName | None = None
    """Of a window or linear rule: None is the recipe's. Of a full rule: None is none."""
    beside: LinearName | None = None
    """A memory beside the softmax, with projections of its own or not: see `BesideOptions`."""
    window_tokens: WindowTokens | None = None
    """Of a window or blocks rule. None: the recipe's."""
    sink_tokens: SinkTokens | Literal["learned"] | None = None
    """learned: as many as there are learned sinks. None: the recipe's."""

    @model_validator(mode="after")
    def _memory_has_a_home(self) -> "Rule":
        if self.memory is not None and self.mixer not in ("window", "linear", "full"):
            raise ValueError(f"memory means nothing to mixer {self.mixer}")
        near = [
            name for name in ("window_tokens", "sink_tokens") if getattr(self, name) is not None
        ]
        if near and self.mixer not in ("window", "blocks"):
            raise ValueError(f"{near[0]} means nothing to mixer {self.mixer}")
        if self.mixer == "full" and self.memory == "far":
            raise ValueError("nothing is far from full softmax, so memory far cannot be")
        if self.beside is not None and self.mixer not in ("window", "full", "blocks"):
            raise ValueError(f"beside means nothing to mixer {self.mixer}")
        return self


class FarOptions(Frozen):
    """How far memories are made; see `respike.ops.far`."""

    features: FeatureCount = 64
    """Prototypes of each KV group."""
    kept_tokens: KeptCount = 0
    """Tokens of each KV group that stay as they are beside them; see `respike.ops.keep`."""
    kept_by_group: dict[int, dict[int, KeptCount]] = Field(default_factory=dict)
    """By layer and KV group: another number of them. Some groups look at a few far tokens, some at
    many."""
    half_life_tokens: HalfLife = 8192.0
    """Tokens after which half of a memory is left."""
    calibration_tokens: int = Field(default=0, ge=0, le=1 << 24)
    """Text on which prototypes and gates are fitted; 0 leaves every gate shut."""


class GlaOptions(Frozen):
    """How gated linear attention is made."""

    feature: Literal["relu", "identity"] = "relu"
    gate_rank: GateRank = 16
    gate_normalizer: GateNormalizer = 16.0
    half_life_tokens: HalfLife = 4096.0
    """Of the memory before any training, the same for every channel."""


class DeltaOptions(Frozen):
    """How gated delta rules are made."""

    negative_eigenvalues: bool = False
    half_life_tokens: HalfLife = 4096.0
    """Of the memory before any training."""


class BlockOptions(Frozen):
    """How block-sparse softmax is made; see `respike.ops.blocks`."""

    block_tokens: BlockTokens = 16
    summary_tokens: BlockTokens = 16
    """Keys averaged in a summary; divides ``block_tokens``."""
    top_blocks: BlockCount = 64
    """Blocks outside the window that each token sees."""
    reach_tokens: ReachTokens | Literal["trained", "unbounded"] = "trained"
    """Largest distance at which those are seen. trained: the source's trained length; unbounded:
    their true one."""
    true_tokens: TrueTokens | Literal["trained"] = 0
    """Below this position of a text those are seen at their true distance nonetheless. trained: the
    source's trained length."""
    cache: Literal["model", "int8"] = "model"
    """model: keys and values are kept in the model's dtype."""
    by_head: bool = False
    """Each query head chooses its own blocks, as in MoBA; else all heads of a group together."""
    dense_decode: bool = False
    """Tokens that come one at a time see everything, as in MoBA's release."""

    @model_validator(mode="after")
    def _whole_summaries(self) -> "BlockOptions":
        if self.block_tokens % self.summary_tokens:
            raise ValueError(
                f"block_tokens {self.block_tokens} is not a multiple of summary_tokens "
                f"{self.summary_tokens}"
            )
        if self.true_tokens and self.reach_tokens == "unbounded":
            raise ValueError("true_tokens mean nothing beside reach_tokens unbounded")
        return self


class SseOptions(Frozen):
    """How sparse state expansion is made; see `respike.ops.sse`."""

    partitions: PartitionCount = 4
    chosen: PartitionCount = 2
    rank: GateRank | Literal["head"] = "head"
    """Of the low-rank terms of queries and keys; head: the head dim."""
    gate: Literal["released", "corrected"] = "corrected"
    """released: a token's share in a partition cancels, its router learns from balance alone."""
    half_life_tokens: HalfLife = 4096.0
    """Of all memories before any training."""


class LinearOptions(Frozen):
    """How a memory stands alone, without softmax."""

    start: Literal["ones", "measured"] = "ones"
    """Unit of the next; measured: the size of the source's heads on text, layer by layer."""
    scale: Annotated[float, Field(ge=0, le=1024)] = 1.0
    """Weight of its norm before any training."""


class BesideOptions(Frozen):
    """How a memory stands beside the softmax of a layer."""

    projections: Literal["separate", "shared"] = "separate"
    """separate: it has q, k, v and o of its own, copied from the layer's."""
    groups: Literal["source", "heads"] = "source"
    """separate: as many KV groups as the source has, or one for every query head."""
    merge: Literal["sum", "mean"] = "sum"
    """separate: of the two normed outputs."""
    softmax_dropout: Fraction = 0.0
    """separate: how often training leaves the softmax out."""
    start: Literal["ones", "measured"] = "measured"
    """separate: unit of the next two; measured: the size of the source's attention outputs on text,
    layer by layer, such that the softmax alone is as large as the source's was."""
    softmax_scale: Annotated[float, Field(ge=0, le=1024)] = 1.0
    """separate: weight of the softmax's norm before any training."""
    memory_scale: Annotated[float, Field(ge=0, le=1024)] = 0.05
    """separate: weight of the memory's norm before any training."""


class MoeOptions(Frozen):
    """How MLPs are made into mixtures of experts: every expert begins as the MLP."""

    at: At = "all"
    """Layers that get experts."""
    experts: ExpertCount = 16
    chosen: ExpertCount = 1
    shared: int = Field(default=1, ge=0, le=64)
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    """The gates of a token's experts sum to one."""
    upcycling: Literal["exact", "cube-root", "literal"] = "exact"
    """How experts are scaled, see `respike.conversion.derive`."""
    router_spread: Annotated[float, Field(gt=0, le=16)] = 0.02
    """Standard deviation of the router's weights before any training."""

    @model_validator(mode="after")
    def _exact_needs_gates(self) -> "MoeOptions":
        if self.upcycling == "exact" and not self.normalised:
            raise ValueError("upcycling exact needs gates that sum to one: set normalised: true")
        return self


class SinkOptions(Frozen):
    """Trained embeddings that stand before every sequence."""

    count: int = Field(default=0, ge=0, le=1 << 12)
    start: Literal["bos", "random"] = "bos"
    """bos: all are the embedding of the token that begins a text, which is a sink already."""


class SourceShape(Frozen):
    """The shape of the model a recipe was made for; any other is refused."""

    family: str
    num_hidden_layers: int
    num_key_value_heads: int
    hidden_size: int


class Recipe(Frozen):
    """A conversion, complete but for the weights."""

    recipe: Literal[1]
    """Version of this schema."""
    name: str = Field(min_length=1, max_length=MAX_NAME)
    about: str = ""
    measured_on: str = ""
    """The model whose figures the recipe's text quotes."""
    source: SourceShape | None = None
    """None: fits every model."""
    layers: tuple[Rule, ...]
    window_tokens: WindowTokens = 256
    """Sliding window, self included, of every window rule without its own."""
    sink_tokens: SinkTokens = 4
    sink_reach_tokens: ReachTokens | Literal["trained"] = "trained"
    """Largest distance at which sinks are seen; trained: the source's trained length."""
    softmax_groups: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    """Layer -> KV groups that keep softmax over all that came before: the retrieval groups."""
    softmax: Literal["full", "blocks"] = "full"
    """How those see it: all of it, or sinks, window and the best blocks of the rest."""
    blocks: BlockOptions = BlockOptions()
    memory: MemoryName = "none"
    """What window and linear rules without their own remember beyond the window."""
    far: FarOptions = FarOptions()
    gla: GlaOptions = GlaOptions()
    delta: DeltaOptions = DeltaOptions()
    sse: SseOptions = SseOptions()
    linear: LinearOptions = LinearOptions()
    beside: BesideOptions = BesideOptions()
    moe: MoeOptions | None = None
    """None: MLPs stay as they are."""
    learned_sinks: SinkOptions = SinkOptions()
    choices: dict[str, str] = Field(default_factory=dict)
    """What the recipe's own source leaves open, and why it is here as it is."""
    weights: Literal["f32", "bf16", "f16"] = "bf16"
    """Dtype in which the converted weights are stored."""
    retie: bool = False
    """Drop a separately stored output matrix and use the embedding instead."""
