"""What a model is: the one schema for shapes, rotary scaling and the mixer of each KV group.

A converted folder's ``config.json`` is a `ModelConfig` written out. Foreign configs are turned
into one by `respike.checkpoint.families`. Layers never see these objects: only
`respike.models.decoder` reads them and hands numbers down.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

FORMAT_VERSION: Literal[1] = 1
"""Version of ``config.json`` in a converted folder."""

MEMORIES = ("far", "gla", "tied", "delta")
"""Names a recipe may give to a memory."""


# The bounds of a recipe and of a model; the upper ones are far above what makes sense.
WindowTokens = Annotated[int, Field(gt=0, le=1 << 24)]
SinkTokens = Annotated[int, Field(ge=0, le=1 << 16)]
ReachTokens = Annotated[int, Field(gt=0, le=1 << 32)]
BlockTokens = Annotated[int, Field(gt=0, le=1 << 12)]
BlockCount = Annotated[int, Field(gt=0, le=1 << 16)]
FeatureCount = Annotated[int, Field(gt=0, le=1 << 12)]
GateRank = Annotated[int, Field(gt=0, le=1 << 12)]
GateNormalizer = Annotated[float, Field(ge=2**-10, le=1 << 10)]


class Frozen(BaseModel):
    """Base of all our schemas: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class FullMixer(Frozen):
    """Causal softmax over everything before: exact, with a cache that grows."""

    mixer: Literal["full"] = "full"
    groups: tuple[int, ...]
    """KV groups this mixer serves, ascending."""


class FarMemory(Frozen):
    """Linear memory of what has left the window, under the window's softmax denominator."""

    kind: Literal["far"] = "far"
    features: FeatureCount
    """Prototypes of keys, for each KV group."""


class GlaMemory(Frozen):
    """Gated linear attention: a decay for each key channel, from a low-rank gate."""

    kind: Literal["gla"] = "gla"
    feature: Literal["relu", "identity"]
    gate_rank: GateRank
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


LinearMemory = Annotated[GlaMemory | TiedMemory | DeltaMemory, Field(discriminator="kind")]
AnyMemory = Annotated[FarMemory | GlaMemory | TiedMemory | DeltaMemory, Field(discriminator="kind")]


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


class BlockMixer(Frozen):
    """Softmax over sinks, a window, and the best blocks of what is older: `respike.ops.blocks`."""

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
    cache: Literal["model", "int8"]
    """model: keys and values are kept in the model's dtype."""

    @model_validator(mode="after")
    def _whole_summaries(self) -> "BlockMixer":
        if self.block_tokens % self.summary_tokens:
            raise ValueError(
                f"block_tokens={self.block_tokens} is not a multiple of "
                f"summary_tokens={self.summary_tokens}"
            )
        return self


Mixer = Annotated[FullMixer | WindowMixer | LinearMixer | BlockMixer, Field(discriminator="mixer")]


class LayerConfig(Frozen):
    """The mixers of one layer; their groups partition the layer's KV groups."""

    mixers: tuple[Mixer, ...]


Band = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SpikeBands(Frozen):
    """Silent bands of one layer's neurons, one for all layers that share an input.

    In units of the token's mean magnitude (teal: of the input itself). The adaptive neuron's is
    half its threshold, so its k is 1 / (2 band); absmax has none.
    """

    qkv: Band
    """Input of q_proj, k_proj and v_proj."""
    o: Band
    """Input of o_proj."""
    mlp: Band
    """Input of gate_proj and up_proj."""
    down: Band | None
    """Input of down_proj. None: no neurons there, as in SpikingBrain-7B-W8ASpike."""


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
        found = [band for bands in self.layers for band in bands.model_dump().values()]
        if self.neuron == "adaptive" and not all(band is None or band > 0 for band in found):
            raise ValueError("the adaptive neuron's bands are half thresholds, above 0")
        if None in found and self.weights != "float":
            raise ValueError(f"down without neurons needs weights='float', not {self.weights!r}")
        return self


class ModelConfig(Frozen):
    """Everything needed to build the decoder. Shapes use Hugging Face's words."""

    model_type: Literal["respike"] = "respike"
    format_version: Literal[1] = FORMAT_VERSION
    family: Literal["llama", "qwen2", "qwen3", "gla_swa"]
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
    spikes: SpikeConfig | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """A model that does not spike is written as before there were spikes."""
        fields: dict[str, Any] = handler(self)
        return fields if self.spikes else {k: v for k, v in fields.items() if k != "spikes"}

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding needs pairs")
        if len(self.layers) != self.num_hidden_layers:
            raise ValueError(
                f"layers has {len(self.layers)} entries, num_hidden_layers={self.num_hidden_layers}"
            )
        if self.spikes and len(self.spikes.layers) != self.num_hidden_layers:
            raise ValueError(
                f"spikes.layers has {len(self.spikes.layers)} entries, "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        everyone = list(range(self.num_key_value_heads))
        for index, layer in enumerate(self.layers):
            served = sorted(g for part in layer.mixers for g in part.groups)
            if served != everyone:
                raise ValueError(f"layers.{index}: mixers serve KV groups {served}, not {everyone}")
        return self

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV group."""
        return self.num_attention_heads // self.num_key_value_heads

    def mixers(self) -> Iterator[tuple[int, Mixer]]:
        """Every (layer index, mixer) of the model, in order."""
        for index, layer in enumerate(self.layers):
            for part in layer.mixers:
                yield index, part

    def softmax_groups(self) -> tuple[tuple[int, int], ...]:
        """(layer, KV group) pairs whose cache grows with the sequence."""
        return tuple(
            (i, g)
            for i, part in self.mixers()
            if part.mixer in ("full", "blocks")
            for g in part.groups
        )


def full_layers(num_layers: int, num_groups: int) -> tuple[LayerConfig, ...]:
    """Full causal softmax everywhere: what every source model is."""
    layer = LayerConfig(mixers=(FullMixer(groups=tuple(range(num_groups))),))
    return (layer,) * num_layers
