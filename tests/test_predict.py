"""How long reading will take: what is timed, where, and what is made of it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from respike.bench import machine, predict
from tiny import FAR, blocks, full, model_config, random_decoder, random_tokens, window

MIX = model_config(((full(0), window(1, 2, tokens=16, sinks=2)),))


def test_a_cost_runs_straight_between_what_was_measured() -> None:
    cost = predict.Cost(((100.0, 1.0), (1124.0, 3.0), (2148.0, 2.0)))
    assert [cost.at(n) for n in (0, 100, 612, 1124, 1636)] == [1, 1, 2, 3, 2.5]
    assert cost.at(9000) == 2  # beyond what was measured never down
    rising = predict.Cost(((0.0, 1.0), (1024.0, 3.0)))
    assert rising.at(4096) == 9
    assert rising.of(2048) == 1 + 2 + 3 + 4
    assert rising.of(2048 + 128) == pytest.approx(10 + 5 / 4)
    assert predict.Cost(((700.0, 0.5),)).of(256) == 0.25


def test_shares_of_mixers_are_added_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 16)
    costs = {"full": [(0.0, 0.1), (512.0, 0.3)], "window": [(600.0, 0.2)]}
    counts = {}

    def measured(self: Any) -> list[tuple[float, float]]:
        counts[self.layer.mixers[0].mixer] = self.count
        return costs[self.layer.mixers[0].mixer]

    monkeypatch.setattr(predict._Measure, "__call__", measured)
    found = predict.predict(MIX, [1024], 1, {}, tmp_path)["seconds"]["1024"]
    assert found == pytest.approx((0.1 + 0.3) / 3 + 2 * 2 * 0.2 / 3)
    assert counts == {"full": 1, "window": 1}


@pytest.mark.parametrize("by_int8", [False, True])
def test_a_state_can_be_taken_deep_without_reading(by_int8: bool) -> None:
    cache = "int8" if by_int8 else "model"
    config = model_config(((blocks(0, cache=cache), full(2), window(1, memory=FAR)),))
    decoder, tokens = random_decoder(config), random_tokens(1, 40)
    with torch.inference_mode():
        _, read = decoder(tokens, logits="none")
        window_before = read.layers[0][2].tensors(40)["k"].clone()
        deep = predict.at_depth(read, 1000)
        assert deep.num_tokens == 1000
        assert torch.equal(deep.layers[0][2].tensors(1000)["k"], window_before)
        for part in deep.layers[0][:2]:
            for name, tensor in part.tensors(1000).items():
                assert tensor.shape[2] == 1000
                assert tensor.float().std() > 0.1
                assert not name.endswith("scale") or tensor.min() >= 0
        slots = deep.layers[0][1].tensors(1 << 20)["k"].shape[2]
        out, after = decoder(tokens, deep)
        assert out.isfinite().all()
        assert after.num_tokens == 1040
        assert after.layers[0][1].tensors(1 << 20)["k"].shape[2] == slots >= 1040


def test_a_small_layer_is_timed_in_a_pile_and_where_its_cost_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predict, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(predict, "DEEP_TOKENS", {"full": 2048})
    seen = []

    def timed(decoder: Any, tokens: Any, state: Any) -> Any:
        seen.append((len(decoder.layers), state.num_tokens, tokens.shape[1]))
        return [(state.num_tokens + 512 * i, 2.0 * len(decoder.layers)) for i in range(3)]

    monkeypatch.setattr(predict, "_timed", timed)
    layers = model_config(((full(0, 1, 2),), (window(0, 1, 2, tokens=70),))).layers
    for most, layer, pile in ((1 << 20, 0, 5), (1, 0, 1), (1 << 20, 1, 5)):
        monkeypatch.setattr(predict, "MOST_PARAMETERS", most)
        found = predict._Measure(MIX, layers[layer], 5, {"weights": "stored"})()
        starts = (0, 2048) if layer == 0 else (582,)
        assert found == [(start + 512, 2.0) for start in starts]
        assert seen == [(pile, start, 512) for start in starts]
        seen.clear()


def test_measurements_are_kept_an_hour_whatever_else_was_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 16)
    made: list[str] = []

    def measured(self: Any) -> list[tuple[float, float]]:
        made.append(self.layer.mixers[0].mixer)
        return [(0.0, 0.25)]

    monkeypatch.setattr(predict._Measure, "__call__", measured)
    for options in ({}, {"append": True, "weights": "stored"}, {"files": ["a"], "weights": None}):
        predict.predict(MIX, [512], 1, options, tmp_path)
    assert made == ["full", "window"]
    predict.predict(MIX, [512], 1, {"weights": "int8"}, tmp_path)
    assert len(made) == 4
    now = time.time()
    monkeypatch.setattr(predict.time, "time", lambda: now + predict.KEPT_SECONDS + 60)
    predict.predict(MIX, [512], 1, {}, tmp_path)
    assert len(made) == 6
    (tmp_path / predict.CACHE_FILE).write_text('{"of another version": {"read": [1.0]}}')
    predict.predict(MIX, [512], 1, {}, tmp_path)
    assert len(made) == 8
