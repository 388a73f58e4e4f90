"""What a model is: the one schema for shapes, rotary scaling and the mixer of each KV group.

A converted folder's ``config.json`` is a `ModelConfig` written out. Foreign configs are turned
into one by `respike.checkpoint.families`. Layers never see these objects: only
`respike.models.decoder` reads them and hands numbers down.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

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
    Lean,
    PartitionCount,
    ReachTokens,
    SinkTokens,
    TrueTokens,
    WindowTokens,
)

FORMAT_VERSION: Literal[1] = 1
"""Version of ``config.json`` in a converted folder."""


class RopeConfig(Frozen):
    """Rotary embedding: base and, for long-context models, how frequencies are scaled."""

    theta: float = Field(gt=0)
    kind: Literal["default", "linear", "llama3", "factors"] = "default"
    factor: float = Field(default=1.0, gt=0)
    """linear, llama3: the length is stretched by this factor."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_max_position_embeddings: int = Field(default=8192, gt=0)
    factors: tuple[float, ...] = ()
    """factors: one divisor per frequency, as GGUF's ``rope_freqs.weight`` stores llama3's."""

    @model_validator(mode="after")
    def _divisors(self) -> "RopeConfig":
        if (self.kind == "factors") != bool(self.factors):
            raise ValueError(f"kind={self.kind!r} with {len(self.factors)} factors")
        if any(not 0 < factor < math.inf for factor in self.factors):
            raise ValueError("factors must be above 0")
        return self


class FarMemory(Lean):
    """Linear memory of what has left the window, under the window's softmax denominator."""

    later: ClassVar[frozenset[str]] = frozenset({"kept_tokens"})

    kind: Literal["far"] = "far"
    features: FeatureCount
    """Prototypes of keys, for each KV group."""
    kept_tokens: KeptCount = 0
    """Tokens of each KV group that stay as they are; see `respike.ops.keep`."""


class GlaMemory(Frozen):
    """Gated linear attention: a decay for each key channel, from a low-rank gate."""

    kind: Literal["gla"] = "gla"
    feature: Literal["relu", "identity"]
    gate_rank: GateRank | None
    """None: the gate is one full matrix."""
    gate_normalizer: GateNormalizer
    """The decay is ``sigmoid(gate) ** (1 / gate_normalizer)``."""


class TiedMemory(Frozen):
    """Gated linear attention whose decay is ``1 - k``: no weights of its own."""

    kind: Literal["tied"] = "tied"


class DeltaMemory(Frozen):
    """Gated delta rule: writes what is new about a key, with a decay for each KV group."""

    kind: Literal["delta"] = "delta"
    negative_eigenvalues: bool
    """Write strength up to 2 instead of 1."""


class SseMemory(Frozen):
    """Sparse state expansion: a gated delta rule for all tokens, and some that tokens choose."""

    kind: Literal["sse"] = "sse"
    partitions: PartitionCount
    """Memories to choose from, for each KV group."""
    chosen: PartitionCount
    """Of these, how many each token writes and reads."""
    rank: GateRank
    """Of what is added to queries and keys for these."""
    gate: Literal["released", "corrected"]
    """Where a token's share in a partition acts; see `respike.ops.sse`."""

    @model_validator(mode="after")
    def _enough(self) -> "SseMemory":
        if self.chosen > self.partitions:
            raise ValueError(f"chosen={self.chosen} of partitions={self.partitions}")
        return self


LinearMemory = Annotated[
    GlaMemory | TiedMemory | DeltaMemory | SseMemory, Field(discriminator="kind")
]
AnyMemory = Annotated[
    FarMemory | GlaMemory | TiedMemory | DeltaMemory | SseMemory, Field(discriminator="kind")
]


class FullMixer(Lean):
    """Causal softmax over everything before: exact, with a cache that grows."""

    later: ClassVar[frozenset[str]] = frozenset({"memory"})

    mixer: Literal["full"] = "full"
    groups: tuple[int, ...]
    """KV groups this mixer serves, ascending."""
    memory: LinearMemory | None = None
    """Normed and added beside the softmax."""


class WindowMixer(Frozen):
    """Causal softmax over the last ``window_tokens`` tokens (self included) and the sinks."""

    mixer: Literal["window"] = "window"
    groups: tuple[int, ...]
    window_tokens: WindowTokens
    sink_tokens: SinkTokens
    """First tokens of the sequence that are always attended."""
    sink_reach_tokens: ReachTokens
    """Largest distance at which a sink is seen; see `respike.layers.softmax`."""
    memory: AnyMemory | None = None
    """far shares the softmax's denominator; any other is normed and added beside the window."""


class LinearMixer(Frozen):
    """A memory alone: linear time, constant state, no window."""

    mixer: Literal["linear"] = "linear"
    groups: tuple[int, ...]
    memory: LinearMemory


class BlockMixer(Lean):
    """Softmax over sinks, a window, and the best blocks of what is older: `respike.ops.blocks`."""

    later: ClassVar[frozenset[str]] = frozenset({"by_head", "dense_decode", "true_tokens"})

    mixer: Literal["blocks"] = "blocks"
    groups: tuple[int, ...]
    window_tokens: WindowTokens
    sink_tokens: SinkTokens
    sink_reach_tokens: ReachTokens
    """Largest distance at which a sink is seen."""
    block_tokens: BlockTokens
    summary_tokens: BlockTokens
    """Keys averaged in a summary, by which blocks are chosen; divides ``block_tokens``."""
    top_blocks: BlockCount
    """Blocks outside the window that a token sees."""
    reach_tokens: ReachTokens | None
    """Largest distance at which a block outside the window is seen; None: all at their true one."""
    true_tokens: TrueTokens = 0
    """Below this position all are seen at their true distance nonetheless."""
    cache: Literal["model", "int8"]
    """model: keys and values are kept in the model's dtype."""
    by_head: bool = False
    """Each query head chooses its own blocks, as in MoBA; else all heads of a group together."""
    dense_decode: bool = False
    """Tokens that come one at a time see everything, as in MoBA's release."""

    @model_validator(mode="after")
    def _whole_summaries(self) -> "BlockMixer":
        if self.block_tokens % self.summary_tokens:
            raise ValueError(
                f"block_tokens={self.block_tokens} is not a multiple of "
                f"summary_tokens={self.summary_tokens}"
            )
        return self


Mixer = Annotated[FullMixer | WindowMixer | LinearMixer | BlockMixer, Field(discriminator="mixer")]


class BesideConfig(Frozen):
    """A linear attention with projections of its own that reads what the layer's attention reads.

    The outputs of both are normed over the model's width and merged.
    """

    num_key_value_heads: int = Field(gt=0, le=4096)
    mixers: tuple[LinearMixer, ...]
    """Their groups partition this attention's KV groups, not the model's."""
    merge: Literal["sum", "mean"]
    softmax_dropout: Fraction
    """In training, how often the layer's own attention is left out, and the memory stands alone."""


class MoeConfig(Frozen):
    """A mixture of experts in place of the MLP; each expert is as wide as the model's MLP."""

    experts: ExpertCount
    chosen: ExpertCount
    """Experts of each token."""
    shared: int = Field(ge=0, le=64)
    """Experts that every token passes."""
    router: Literal["softmax", "sigmoid"]
    normalised: bool
    """The gates of a token's experts sum to one."""

    @model_validator(mode="after")
    def _enough(self) -> "MoeConfig":
        if self.chosen > self.experts:
            raise ValueError(f"chosen={self.chosen} of experts={self.experts}")
        return self


class LayerConfig(Lean):
    """The mixers of one layer; their groups partition the layer's KV groups."""

    later: ClassVar[frozenset[str]] = frozenset({"beside", "moe"})

    mixers: tuple[Mixer, ...]
    beside: BesideConfig | None = None
    moe: MoeConfig | None = None
    """None: one MLP."""


Band = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SpikeBands(Frozen):
    """Silent bands of one layer's neurons, one for all layers that share an input.

    In units of the token's mean magnitude (teal: of the input itself). The adaptive neuron's is
    half its threshold, so its k is 1 / (2 band); absmax has none. None: no neurons stand there.
    """

    qkv: Band | None
    """Input of q_proj, k_proj and v_proj."""
    o: Band | None
    """Input of o_proj."""
    mlp: Band | None
    """Input of gate_proj and up_proj."""
    down: Band | None
    """Input of down_proj."""


class SpikeConfig(Frozen):
    """Neurons in front of every linear layer but the output head; see `respike.ops.spikes`."""

    neuron: Literal["adaptive", "absmax", "dead-zone", "teal"]
    step: Literal["absmax", "mean"] = "absmax"
    """dead-zone: its threshold is max|x| / 127, or mean|x| / k."""
    k: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    by_channel: bool = False
    """A channel's band is the layer's, divided by the channel's relative weight norm."""
    weights: Literal["float", "int8", "int4"] = "int8"
    """How the layers behind the neurons run: integer events, or float products that emulate."""
    group_size: Literal[32, 64, 128] = 32
    """Inputs that share a weight scale."""
    layers: tuple[SpikeBands, ...]

    @model_validator(mode="after")
    def _possible(self) -> "SpikeConfig":
        if self.neuron == "teal" and self.weights != "float":
            raise ValueError(f"teal has no spike counts, so weights={self.weights!r} cannot be")
        bands = [band for layer in self.layers for band in layer.model_dump().values()]
        if self.neuron == "adaptive" and 0 in bands:
            raise ValueError("the adaptive neuron's bands are half thresholds, above 0")
        if None in bands and self.weights != "float":
            raise ValueError(f"a site without neurons needs weights='float', not {self.weights!r}")
        return self


class ModelConfig(Lean):
    """Everything needed to build the decoder. Shapes use Hugging Face's words."""

    later: ClassVar[frozenset[str]] = frozenset({"spikes", "learned_sinks"})

    model_type: Literal["respike"] = "respike"
    format_version: Literal[1] = FORMAT_VERSION
    family: Literal["llama", "qwen2", "qwen3", "gla_swa", "sse_swa_moba"]
    # Upper bounds refuse hostile files before any memory is spent; each is >= 8x of what exists.
    vocab_size: int = Field(gt=0, le=1 << 22)
    hidden_size: int = Field(gt=0, le=1 << 18)
    intermediate_size: int = Field(gt=0, le=1 << 20)
    num_hidden_layers: int = Field(gt=0, le=1024)
    num_attention_heads: int = Field(gt=0, le=4096)
    num_key_value_heads: int = Field(gt=0, le=4096)
    head_dim: int = Field(gt=0, le=4096)
    rms_norm_eps: float = Field(gt=0, lt=1)
    rope: RopeConfig
    max_position_embeddings: int = Field(gt=0, le=1 << 32)
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    layers: tuple[LayerConfig, ...]
    learned_sinks: int = Field(default=0, ge=0, le=1 << 12)
    """Trained embeddings that stand before every sequence, visible to all of it and each other."""
    spikes: SpikeConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding needs pairs")
        if self.rope.factors and len(self.rope.factors) != self.head_dim // 2:
            raise ValueError(
                f"rope.factors has {len(self.rope.factors)} entries, expected {self.head_dim // 2}"
            )
        spiking = {"spikes.layers": len(self.spikes.layers)} if self.spikes else {}
        for name, rows in ({"layers": len(self.layers)} | spiking).items():
            if rows != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {rows} entries, num_hidden_layers={self.num_hidden_layers}"
                )
        for index, layer in enumerate(self.layers):
            _check_groups(f"layers.{index}", layer.mixers, self.num_key_value_heads)
            if layer.beside is not None:
                groups = layer.beside.num_key_value_heads
                _check_groups(f"layers.{index}.beside", layer.beside.mixers, groups)
                if self.num_attention_heads % groups:
                    raise ValueError(f"layers.{index}.beside: {groups} groups do not share heads")
            for part in layer.mixers:
                self._check_sinks(index, part)
        return self

    def _check_sinks(self, index: int, part: Mixer) -> None:
        if not self.learned_sinks:
            return
        if part.mixer == "blocks":
            raise ValueError(f"layers.{index}: learned sinks do not go with block-sparse softmax")
        if part.mixer == "window" and part.sink_tokens < self.learned_sinks:
            raise ValueError(
                f"layers.{index}: sink_tokens={part.sink_tokens} hides some of "
                f"learned_sinks={self.learned_sinks}"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV group."""
        return self.num_attention_heads // self.num_key_value_heads

    def mixers(self) -> Iterator[tuple[int, Mixer]]:
        """Every (layer index, mixer) of the model, in order; those beside an attention after it."""
        for index, layer in enumerate(self.layers):
            for part in layer.mixers:
                yield index, part
            for part in layer.beside.mixers if layer.beside else ():
                yield index, part

    def beside(self, layer: LayerConfig) -> "ModelConfig":
        """This config as the attention beside a layer's sees it: its own KV groups, no norms."""
        assert layer.beside is not None
        groups = layer.beside.num_key_value_heads
        return self.model_copy(update={"num_key_value_heads": groups, "qk_norm": False})

    def softmax_groups(self) -> tuple[tuple[int, int], ...]:
        """(layer, KV group) pairs whose cache grows with the sequence."""
        return tuple(
            (i, g)
            for i, part in self.mixers()
            if part.mixer in ("full", "blocks")
            for g in part.groups
        )


def _check_groups(where: str, mixers: Iterable[Mixer], num_groups: int) -> None:
    served, everyone = sorted(g for part in mixers for g in part.groups), list(range(num_groups))
    if served != everyone:
        raise ValueError(f"{where}: mixers serve KV groups {served}, not {everyone}")


def full_layers(num_layers: int, num_groups: int) -> tuple[LayerConfig, ...]:
    """Full causal softmax everywhere: what every source model is."""
    layer = LayerConfig(mixers=(FullMixer(groups=tuple(range(num_groups))),))
    return (layer,) * num_layers
