"""New tensors that are made of the source's: projections and experts begin as copies.

How experts are scaled (``moe.upcycling``), with S shared experts, k chosen ones of N:

exact
    ``down_proj`` by 1 / (1 + S). The gates of a token sum to one, so the layer is the MLP it was,
    whatever the router says; with S = 1 to the last bit, as halves are exact.
cube-root
    All three matrices by ``(S + k / N) ** (-1/3)``, as SpikingBrain-76B's report can be read
    (arXiv:2509.05276, section on upcycling). It presumes gates of k / N in all (``normalised:
    false`` and an even router), and is not exact even then: the gate's scale is inside SiLU.
literal
    ``down_proj`` by the same number, as that report writes it.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from respike.checkpoint.families import LEARNED_SINKS
from respike.config import ModelConfig
from respike.recipe import Recipe
from respike.recipe_apply import first_token
from respike.recipe_options import MoeOptions

BESIDE = re.compile(r"(model\.layers\.\d+\.)beside\.([qkvo]_proj\.(?:weight|bias))")
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.)(?:shared_)?experts\.\d+\.(\w+_proj\.weight)")


@dataclass(frozen=True)
class Origin:
    """What a new tensor is made of.

    Attributes:
        name: The source's tensor.
        scale: What it is multiplied by.
        repeats: How often each KV group's rows are repeated.
        row: The row that is taken, for each of ``count`` rows; None takes all.
        count: Rows to make of the one.
    """

    name: str
    scale: float = 1.0
    repeats: int = 1
    row: int | None = None
    count: int = 1

    @property
    def words(self) -> str:
        """For plans."""
        scaled = "" if self.scale == 1 else f" times {self.scale:.6g}"
        repeated = "" if self.repeats == 1 else f", each KV group {self.repeats} times"
        what = self.name if self.row is None else f"row {self.row} of {self.name}"
        return f"{what}{scaled}{repeated}"

    def make(self, source: Tensor, head_dim: int) -> Tensor:
        """The new tensor from the source's, in its dtype."""
        if self.row is not None:
            return source[self.row].expand(self.count, -1)
        if self.repeats > 1:
            rows = source.view(-1, head_dim, *source.shape[1:])
            source = rows.repeat_interleave(self.repeats, 0).flatten(0, 1)
        return source if self.scale == 1 else (source.float() * self.scale).to(source.dtype)


def origin(name: str, recipe: Recipe, before: ModelConfig, after: ModelConfig) -> Origin | None:
    """What the tensor called ``name`` of the converted model is made of; None of any other.

    Args:
        name: A tensor that the source does not have.
        recipe: Of the conversion.
        before: The source.
        after: The converted model.
    """
    if name == LEARNED_SINKS and recipe.learned_sinks.start == "bos":
        row = first_token(before)
        return Origin("model.embed_tokens.weight", row=row, count=after.learned_sinks)
    if match := BESIDE.fullmatch(name):
        beside = after.layers[int(name.split(".")[2])].beside
        assert beside is not None
        whole = beside.num_key_value_heads // before.num_key_value_heads
        repeats = whole if match[2][0] in "kv" else 1
        return Origin(f"{match[1]}self_attn.{match[2]}", repeats=repeats)
    if match := EXPERT.fullmatch(name):
        assert recipe.moe is not None
        return Origin(match[1] + match[2], scale=expert_scale(recipe.moe, match[2]))
    return None


def expert_scale(options: MoeOptions, matrix: str) -> float:
    """Factor on an expert's ``matrix``, such as ``down_proj.weight``; see the module's text."""
    is_down = matrix.startswith("down")
    if options.upcycling == "exact":
        return 1 / (1 + options.shared) if is_down else 1.0
    alpha = (options.shared + options.chosen / options.experts) ** (-1 / 3)
    return alpha if is_down or options.upcycling == "cube-root" else 1.0
