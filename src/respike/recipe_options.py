"""What a recipe may say: its schema, one class for each part, with the defaults.

The rules are read top to bottom and the first that matches a layer decides its mixer; then the
KV groups in ``softmax_groups`` keep softmax whatever their layer's rule says.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from respike.config import (
    BlockCount,
    BlockTokens,
    FeatureCount,
    Frozen,
    GateNormalizer,
    GateRank,
    ReachTokens,
    SinkTokens,
    WindowTokens,
)

Place = Literal["all", "rest", "even", "odd"]
MemoryName = Literal["none", "far", "gla", "tied", "delta"]
HalfLife = Annotated[float, Field(ge=2**-10, le=1 << 32)]


class Evenly(Frozen):
    """``count`` layers spread evenly over the depth."""

    evenly: int = Field(gt=0)


class Rule(Frozen):
    """Which mixer the layers at some places get."""

    at: Place | Evenly | tuple[int, ...]
    """all or rest, even or odd, {evenly: N}, or a list of indices (negative from the end)."""
    mixer: Literal["keep", "full", "blocks", "window", "linear"]
    """keep: what the source has there. linear: a memory without softmax."""
    memory: MemoryName | None = None
    """Of a window or linear rule. None: the recipe's."""
    window_tokens: WindowTokens | None = None
    """Of a window or blocks rule. None: the recipe's."""
    sink_tokens: SinkTokens | None = None
    """None: the recipe's."""

    @model_validator(mode="after")
    def _memory_has_a_home(self) -> "Rule":
        if self.memory is not None and self.mixer not in ("window", "linear"):
            raise ValueError(f"memory means nothing to mixer {self.mixer}")
        return self


class FarOptions(Frozen):
    """How far memories are made; see `respike.ops.far`."""

    features: FeatureCount = 64
    """Prototypes of each KV group."""
    half_life_lengths: HalfLife = 4.0
    """Tokens after which half of a memory is left, in trained lengths of the source."""
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
    cache: Literal["model", "int8"] = "model"
    """model: keys and values are kept in the model's dtype."""

    @model_validator(mode="after")
    def _whole_summaries(self) -> "BlockOptions":
        if self.block_tokens % self.summary_tokens:
            raise ValueError(
                f"block_tokens {self.block_tokens} is not a multiple of summary_tokens "
                f"{self.summary_tokens}"
            )
        return self


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
    name: str = Field(min_length=1, max_length=100)
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
    weights: Literal["f32", "bf16", "f16"] = "bf16"
    """Dtype in which the converted weights are stored."""
    retie: bool = False
    """Drop a separately stored output matrix and use the embedding instead."""
