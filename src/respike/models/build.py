"""From a config to the parts of a model that have settings of their own."""

import torch
from torch import Tensor

from respike import config as configs
from respike.config import LayerConfig, ModelConfig, RopeConfig
from respike.layers.memory import GatedDelta, GatedLinear, Memory, TiedGate
from respike.layers.mlp import GatedMLP
from respike.layers.moe import ExpertMLP
from respike.layers.sse import SparseDelta
from respike.ops.block_rule import BlockRule
from respike.ops.rotary import llama3_frequencies, rotary_frequencies


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Rotary frequencies with the source's scaling, radians per token, float64 (head_dim / 2,)."""
    base = rotary_frequencies(head_dim, rope.theta)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "factors":
        return base / torch.tensor(rope.factors, dtype=torch.float64)
    if rope.kind == "llama3":
        return llama3_frequencies(
            base,
            rope.factor,
            rope.low_freq_factor,
            rope.high_freq_factor,
            rope.original_max_position_embeddings,
        )
    return base


def block_rule(part: configs.BlockMixer) -> BlockRule:
    """What a block-sparse mixer sees."""
    return BlockRule(
        window_tokens=part.window_tokens,
        sink_tokens=part.sink_tokens,
        block_tokens=part.block_tokens,
        summary_tokens=part.summary_tokens,
        top_blocks=part.top_blocks,
        sink_reach_tokens=part.sink_reach_tokens,
        reach_tokens=part.reach_tokens,
        true_tokens=part.true_tokens,
    )


def build_memory(config: ModelConfig, memory: configs.LinearMemory, num_groups: int) -> Memory:
    """The memory of ``num_groups`` KV groups of ``config``."""
    if memory.kind == "tied":
        return TiedGate()
    if memory.kind == "delta":
        return GatedDelta(
            hidden_size=config.hidden_size,
            num_groups=num_groups,
            negative_eigenvalues=memory.negative_eigenvalues,
        )
    if memory.kind == "sse":
        return SparseDelta(
            hidden_size=config.hidden_size,
            num_heads=num_groups * config.heads_per_group,
            num_groups=num_groups,
            head_dim=config.head_dim,
            partitions=memory.partitions,
            chosen=memory.chosen,
            rank=memory.rank,
            corrected=memory.gate == "corrected",
        )
    return GatedLinear(
        hidden_size=config.hidden_size,
        num_groups=num_groups,
        head_dim=config.head_dim,
        gate_rank=memory.gate_rank,
        gate_normalizer=memory.gate_normalizer,
        rectify=memory.feature == "relu",
    )


def build_mlp(config: ModelConfig, layer: LayerConfig) -> GatedMLP | ExpertMLP:
    """The MLP of a layer, or its experts."""
    if layer.moe is None:
        return GatedMLP(config.hidden_size, config.intermediate_size)
    return ExpertMLP(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        experts=layer.moe.experts,
        chosen=layer.moe.chosen,
        shared=layer.moe.shared,
        router=layer.moe.router,
        normalised=layer.moe.normalised,
    )
