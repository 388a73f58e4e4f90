"""Kept tokens shared out among KV groups: what is missed, who gets more, and the recipe of it."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from respike.account import kept_tokens
from respike.conversion.worth import KEPT_HALF_LIVES, FarAttention, fit_weight
from respike.errors import UsageError
from respike.models.decoder import Decoder
from respike.recipe import Recipe, apply_recipe, dump_recipe, load_recipe
from respike.selection import KeptShares, recipe_with_shares, share_kept_tokens
from respike.selection.kept import shared_out
from tiny import full, model_config, random_decoder, random_tokens

WINDOW, SINKS, T, MEAN = 9, 2, 240, 40
LAYERS, SOFTMAX = 2, "softmax_groups={1: [0]}"
GROUPS = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]


def original() -> Decoder:
    decoder = random_decoder(model_config(((full(0, 1, 2),),) * LAYERS))
    for layer in decoder.layers:  # some keys are looked at far more than others
        layer.self_attn.k_proj.weight.data *= 6
    return decoder


def recipe(*changes: str) -> Recipe:
    near = (f"window_tokens={WINDOW}", f"sink_tokens={SINKS}")
    return load_recipe("constant", (*near, "far.features=4", SOFTMAX, *changes))


def share(mean_tokens: int = MEAN, tokens: int = T) -> KeptShares:
    decoder = original()
    config = apply_recipe(recipe(f"far.kept_tokens={mean_tokens}"), decoder.config)
    return share_kept_tokens(decoder, config, random_tokens(3, tokens, seed=5))


@pytest.fixture(scope="module")
def shares() -> KeptShares:
    return share()


def attention(decoder: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first layer: rotated queries (T, G, R, K), keys (T, G, K) as they are and rotated."""
    layer = decoder.layers[0]
    x = layer.input_layernorm(decoder.model.embed_tokens(tokens[None]))
    q, k, _ = layer.self_attn.project(x)
    span = decoder.span(decoder.init_state(), len(tokens))
    return span.rotate(q)[0].unflatten(1, (3, 2)), k[0], span.rotate(k)[0]


@torch.no_grad()
def test_what_is_missed_is_the_far_attention_to_all_but_the_worthiest(shares: KeptShares) -> None:
    decoder, group = original(), 1
    seen = [
        FarAttention.of(*attention(decoder, text), WINDOW, SINKS)
        for text in random_tokens(3, T, seed=5)
    ]
    weight = fit_weight(seen, group)
    asked = range(WINDOW + SINKS, T, 64)
    for at, count in enumerate(shares.counts):
        best = math.inf
        for half_life in KEPT_HALF_LIVES:
            missed = []
            for text in random_tokens(3, T, seed=5):
                q, k, turned_k = attention(decoder, text)
                worth = k[:, group] @ weight + torch.arange(T) * math.log(2) / half_life
                for p in asked:
                    weights = (q[p, group] @ turned_k[: p + 1, group].T / math.sqrt(8)).softmax(-1)
                    far = torch.arange(SINKS, p - WINDOW + 1)
                    lost = far[worth[far].argsort(descending=True)[count:]]
                    missed.append(float(weights[:, lost].sum(-1).mean()))
            best = min(best, sum(missed) / len(missed))
        assert shares.missed[0, group][at] == pytest.approx(best, rel=1e-3, abs=1e-6)


def test_all_far_groups_and_only_they_are_measured(shares: KeptShares) -> None:
    assert sorted(shares.missed) == sorted(shares.kept) == GROUPS
    assert shares.counts[:5] == (0, 16, 24, 32, MEAN)
    assert shares.counts[-1] <= T - WINDOW - SINKS
    for row in shares.missed.values():
        assert len(row) == len(shares.counts)
        assert row == sorted(row, reverse=True)
        assert 0.01 < row[0] < 1


def test_what_is_shared_out_is_what_there_is_and_is_worth_more_than_even(
    shares: KeptShares,
) -> None:
    assert len(set(shares.kept.values())) > 1
    assert MEAN * 5 - 16 < sum(shares.kept.values()) <= MEAN * 5

    def cost(kept: dict[tuple[int, int], int]) -> float:
        return sum(
            row[shares.counts.index(kept[group])] ** 2 for group, row in shares.missed.items()
        )

    even = dict.fromkeys(GROUPS, MEAN)
    assert cost(shares.kept) < cost(even)
    scores = shares.as_dict()
    assert scores["kept"]["1.2"] == shares.kept[1, 2]
    assert scores["missed_frac"]["0.1"] == pytest.approx(shares.missed[0, 1], abs=1e-6)
    missed = [row[shares.counts.index(MEAN)] for row in shares.missed.values()]
    assert scores["missed_even_frac"] == pytest.approx(sum(missed) / 5)


def test_tokens_go_where_they_take_away_most() -> None:
    counts = (0, 10, 20, 40)
    missed = {
        (0, 0): [0.4, 0.1, 0.0, 0.0],
        (0, 1): [0.0, 0.0, 0.0, 0.0],
        (0, 2): [0.3, 0.3, 0.3, 0.0],  # of use only together
    }
    assert shared_out(missed, counts, 20) == {(0, 0): 20, (0, 1): 0, (0, 2): 40}
    assert shared_out(missed, counts, 10) == {(0, 0): 20, (0, 1): 0, (0, 2): 0}
    assert shared_out(missed, counts, 40) == {(0, 0): 20, (0, 1): 0, (0, 2): 40}
    assert shared_out(missed, counts, 4) == {(0, 0): 10, (0, 1): 0, (0, 2): 0}


def test_the_recipe_gives_every_group_its_number(shares: KeptShares, tmp_path: Path) -> None:
    source = original().config
    made = recipe_with_shares(shares, recipe(), source, "mine", "tiny")
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(made), encoding="utf-8")
    assert load_recipe(str(path)) == made
    assert made.measured_on == "tiny"
    assert "'constant'" in made.about
    found = {
        (layer, group): kept_tokens(part)
        for layer, part in apply_recipe(made, source).mixers()
        if part.mixer == "window"
        for group in part.groups
    }
    assert found == shares.kept


@pytest.mark.parametrize(("mean_tokens", "tokens"), [(0, T), (230, T), (40, 100)])
def test_what_cannot_be_measured_is_refused(mean_tokens: int, tokens: int) -> None:
    words = "--kept-tokens" if tokens == T else "at least 150"
    with pytest.raises(UsageError, match=words):
        share(mean_tokens, tokens)


def test_a_recipe_without_far_memories_is_refused() -> None:
    config = apply_recipe(load_recipe("window"), original().config)
    with pytest.raises(UsageError, match="no far memories"):
        share_kept_tokens(original(), config, random_tokens(1, T))
