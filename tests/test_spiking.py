"""Spiking models: neurons in a decoder, budgets, the census against counting by hand, folders."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from respike.config import LayerConfig, ModelConfig, SpikeBands, SpikeConfig
from respike.errors import CheckpointError, UnsupportedError, UsageError
from respike.evaluation.distance import Reference
from respike.layers.spikes import SpikedLinear, SpikeLinear
from respike.loading import load
from respike.models.decoder import Decoder
from respike.models.spiking import (
    SITES,
    channel_weights,
    how_it_runs,
    install_spikes,
    remove_spikes,
    spike_sites,
    watch_sites,
)
from respike.ops.packed import pack, unpack
from respike.spiking import Census, Goal, Measure, calibrate, spike
from respike.spiking.calibrate import profiles, set_prices, share_out
from respike.spiking.energy import PICOJOULES, energy_estimate
from respike.spiking.probe import EVERY_TOKENS, Probe
from tiny import (
    BRAINS,
    MIXED,
    D,
    F,
    H,
    K,
    V,
    full,
    model_config,
    random_decoder,
    random_tokens,
    save_tiny,
)
from tolerance import assert_close

DEPTH = len(MIXED)
NUM_SITES = len(SITES) * DEPTH
MACS = {"qkv": D * (H + 6) * K, "o": H * K * D, "mlp": 2 * D * F, "down": F * D}


def bands(value: float = 0.6) -> tuple[SpikeBands, ...]:
    """Every site's is another."""
    return tuple(
        SpikeBands(qkv=value + 0.01 * i, o=value + 0.1, mlp=value - 0.02 * i, down=value + 0.03 * i)
        for i in range(DEPTH)
    )


def dead_zone(**changes: Any) -> SpikeConfig:
    fields: dict[str, Any] = {"neuron": "dead-zone", "layers": bands(), "weights": "float"}
    return SpikeConfig(**fields | changes)


def logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return decoder(tokens)[0]


# ---- in a decoder


def test_neurons_stand_before_every_layer_but_the_head_and_go_again() -> None:
    decoder = random_decoder(model_config(tie_word_embeddings=False))
    tokens = random_tokens(1, 20)
    before, names = logits(decoder, tokens), set(decoder.state_dict())
    install_spikes(decoder, dead_zone())
    spiked = {name for name, m in decoder.named_modules() if isinstance(m, SpikedLinear)}
    plain = {name for name, m in decoder.named_modules() if type(m) is nn.Linear}
    assert len(spiked) == 7 * DEPTH
    assert plain == {"lm_head"}
    assert (logits(decoder, tokens) - before).abs().max() > 0.1
    remove_spikes(decoder)
    assert set(decoder.state_dict()) == names
    assert torch.equal(logits(decoder, tokens), before)


def test_a_band_silences_what_the_config_says_where_it_says() -> None:
    decoder = random_decoder(model_config())
    config = dead_zone(by_channel=True)
    norms = [channel_weights(site) for site in spike_sites(decoder)]
    install_spikes(decoder, config)
    sites = list(spike_sites(decoder))
    seen = set()

    def see(index: int, x: Tensor) -> None:
        site = sites[index]
        assert site.neuron is not None
        counts, step = site.neuron.fire(x)
        band = getattr(config.layers[site.layer], site.name)
        mean = x.abs().mean(-1, keepdim=True)
        assert torch.equal(counts == 0, (x.abs() < band / norms[index] * mean))
        assert_close(step[..., 0], x.abs().amax(-1) / 127)
        seen.add(index)

    with watch_sites(decoder, see):
        logits(decoder, random_tokens(1, 9))
    assert seen == set(range(NUM_SITES))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integer_weights_give_what_their_emulation_gives(weights: str) -> None:
    packed, emulated = (random_decoder(model_config()) for _ in range(2))
    install_spikes(packed, dead_zone(weights=weights))
    for site in spike_sites(emulated):
        for linear in site.linears:
            assert isinstance(linear, nn.Linear)
            linear.weight = nn.Parameter(unpack(pack(linear.weight.detach(), weights, 32)))
    install_spikes(emulated.requires_grad_(False), dead_zone())
    assert sum(isinstance(m, SpikeLinear) for m in packed.modules()) == 7 * DEPTH
    tokens = random_tokens(2, 13)
    assert_close(logits(packed, tokens), logits(emulated, tokens), torch.bfloat16)
    whole, state = packed(tokens[:, :12])
    step, _ = packed(tokens[:, 12:], state)  # by events where kernels can run
    assert_close(torch.cat([whole, step], 1), logits(packed, tokens), torch.bfloat16)


def test_the_released_neuron_has_its_k() -> None:
    decoder = random_decoder(model_config())
    layer = SpikeBands(**dict.fromkeys(SITES, 1 / 6))
    install_spikes(decoder, SpikeConfig(neuron="adaptive", weights="float", layers=(layer,) * 4))
    for site in spike_sites(decoder):
        assert site.neuron is not None
        assert site.neuron.k == pytest.approx(3.0, abs=1e-12)
        counts, step = site.neuron.fire(x := torch.randn(5, site.in_features))
        assert_close(step, x.abs().mean(-1, keepdim=True) / 3)
        assert_close(counts.float(), (x / step).round())


def test_sites_without_neurons_are_listed_and_not_counted() -> None:
    config = dead_zone(layers=tuple(b.model_copy(update={"down": None}) for b in bands()))
    decoder = random_decoder(model_config(spikes=config))
    down = decoder.layers[0].get_submodule("mlp.down_proj")
    install_spikes(decoder, config)
    assert decoder.layers[0].get_submodule("mlp.down_proj") is down
    census = Census(decoder)
    with torch.inference_mode(), census.watching():
        decoder(random_tokens(1, 12))
    figures = census.figures()
    assert {row["site"] for row in figures["sites"]} == {"qkv", "o", "mlp"}
    assert figures["tokens"] == 12
    plain = {row["what"]: row["multiply_accumulates"] for row in figures["not_spiked"]}
    assert plain["layers behind down"] == DEPTH * MACS["down"]
    assert "layers behind o" not in plain


@pytest.mark.parametrize(
    ("layer", "words"),
    [(BRAINS[0], "layer 1, which has an attention beside"), (BRAINS[1], "layer 1.*experts")],
    ids=["beside", "experts"],
)
def test_layers_with_what_no_site_names_do_not_spike(layer: LayerConfig, words: str) -> None:
    decoder = random_decoder(model_config((MIXED[0], layer)))
    with pytest.raises(UnsupportedError, match=words):
        install_spikes(decoder, dead_zone(layers=bands()[:2]))


def test_configs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="teal has no spike counts"):
        SpikeConfig(neuron="teal", layers=bands())
    with pytest.raises(ValueError, match="above 0"):
        SpikeConfig(neuron="adaptive", layers=(SpikeBands(qkv=0, o=1, mlp=1, down=1),))
    with pytest.raises(ValueError, match="without neurons needs weights='float'"):
        SpikeConfig(neuron="absmax", layers=(SpikeBands(qkv=1, o=None, mlp=1, down=1),))
    with pytest.raises(ValueError, match=r"spikes\.layers has 3 entries"):
        ModelConfig(**dict(model_config()) | {"spikes": dead_zone(layers=bands()[:3])})
    assert "spikes" not in model_config().model_dump()
    spiking = model_config(spikes=dead_zone())
    assert ModelConfig.model_validate(spiking.model_dump(mode="json")) == spiking


def test_what_is_emulated_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "emulated" in how_it_runs(dead_zone())
    assert "no spikes" in how_it_runs(dead_zone(neuron="teal"))
    monkeypatch.setattr("respike.ops.backends.kernels", lambda: None)
    assert "emulated" in how_it_runs(dead_zone(weights="int8"))


# ---- calibration


@pytest.mark.parametrize("neuron", ["dead-zone", "teal", "adaptive"])
@pytest.mark.parametrize("by_channel", [False, True])
def test_a_uniform_budget_silences_that_share_of_every_site(neuron: Any, by_channel: bool) -> None:
    if by_channel and neuron == "adaptive":
        return
    decoder = random_decoder(model_config(((full(0, 1, 2),),)))
    tokens = random_tokens(4, 64)
    goal = Goal(neuron, by_channel=by_channel, weights="float", silent_frac=0.4, budget="uniform")
    config, _ = calibrate(decoder, tokens, goal)
    install_spikes(decoder, config)
    silent: list[list[float]] = [[] for _ in SITES]
    sites = list(spike_sites(decoder))

    def see(index: int, x: Tensor) -> None:
        neuron = sites[index].neuron
        assert neuron is not None
        silent[index].append(float((neuron(x) == 0).float().mean()))

    with torch.inference_mode(), watch_sites(decoder, see):
        decoder(tokens)
    # The first site sees what it was calibrated on; later ones what silence has changed.
    assert silent[0][0] == pytest.approx(0.4, abs=0.02)
    assert all(s[0] == pytest.approx(0.4, abs=0.12) for s in silent)


def test_the_dear_site_is_spared() -> None:
    decoder = random_decoder(model_config())
    goal = Goal(weights="float", silent_frac=0.5)
    found = profiles(decoder, random_tokens(2, 64), goal)
    weights = [1.0] * len(found)
    found[3].price = 1000.0
    shares = share_out(found, weights, 0.5)
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.02)
    assert shares[3] == min(shares)
    assert shares[3] < 0.15


def test_prices_see_what_a_site_does_to_the_model() -> None:
    decoder = random_decoder(model_config())
    tokens = random_tokens(1, 48)
    goal = Goal(weights="float", silent_frac=0.5)
    with torch.no_grad():
        decoder.layers[1].mlp.down_proj.weight.zero_()
    found = profiles(decoder, tokens, goal)
    set_prices(decoder, found, tokens, goal, None)
    prices = [p.price for p in found]
    assert min(prices) == prices[4 + 2]  # nothing that layer's MLP does reaches the output
    assert prices[4 + 2] < 1e-3 * sorted(prices)[1]
    assert share_out(found, [1.0] * len(found), 0.5)[4 + 2] > 0.9
    assert not any(isinstance(m, SpikedLinear) for m in decoder.modules())


@pytest.mark.parametrize("index", [0, 6, NUM_SITES - 1])
def test_a_probe_is_the_model_with_one_site_spiking(index: int) -> None:
    decoder = random_decoder(model_config())
    tokens = random_tokens(1, 40)
    p = logits(decoder, tokens)[0, EVERY_TOKENS - 1 :: EVERY_TOKENS].log_softmax(-1)
    probe = Probe(decoder, tokens)
    install_spikes(decoder, dead_zone())
    got = probe.kl_of_site(index)
    for other, site in enumerate(spike_sites(decoder)):
        for linear in site.linears:
            assert isinstance(linear, SpikedLinear)
            assert linear.heeds_neuron
            linear.heeds_neuron = other == index
    q = logits(decoder, tokens)[0, EVERY_TOKENS - 1 :: EVERY_TOKENS].log_softmax(-1)
    assert got == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert got > 1e-4


def test_a_kl_budget_is_kept() -> None:
    decoder = random_decoder(model_config())
    tokens = random_tokens(2, 48)
    reference = Reference(decoder, tokens)
    kl = {}
    for budget in (0.05, 0.5):
        goal = Goal(weights="float", kl_nats=budget, budget="uniform")
        config, facts = calibrate(decoder, tokens, goal)
        install_spikes(decoder, config)
        kl[budget] = float(reference.compare(decoder).kl.mean())
        remove_spikes(decoder)
        assert 0.2 * budget < kl[budget] <= budget
        assert isinstance(facts["aimed_silent_frac"], float)
    with pytest.raises(UsageError, match="no silence found"):
        calibrate(decoder, tokens, Goal(weights="float", kl_nats=1e-9, budget="uniform"))


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Goal("absmax", silent_frac=0.5), "no band"),
        (Goal("dead-zone"), "needs a silent fraction"),
        (Goal("dead-zone", silent_frac=0.5, kl_nats=0.1), "one of the two"),
        (Goal("dead-zone", silent_frac=1.5), "at most 0.95"),
        (Goal("adaptive", by_channel=True), "band for each channel"),
        (Goal("teal", silent_frac=0.5), "no spike counts"),
    ],
)
def test_goals_that_cannot_be_are_refused(goal: Goal, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        goal.check()


# ---- census


def census_of(config: SpikeConfig, tokens: Tensor) -> tuple[Census, list[list[Tensor]]]:
    """A census, and the counts (T, I) that were seen at each site."""
    decoder = random_decoder(model_config())
    install_spikes(decoder, config)
    census, sites = Census(decoder), list(spike_sites(decoder))
    seen: list[list[Tensor]] = [[] for _ in sites]

    def see(index: int, x: Tensor) -> None:
        neuron = sites[index].neuron
        assert neuron is not None
        seen[index].append(neuron.fire(x)[0].flatten(0, -2))

    with torch.inference_mode(), census.watching(), watch_sites(decoder, see):
        decoder(tokens, chunk_tokens=8)
    return census, seen


def test_the_census_counts_what_is_there() -> None:
    census, seen = census_of(dead_zone(weights="int8", step="mean"), random_tokens(2, 20))
    figures = census.figures()
    counts = [torch.cat(parts) for parts in seen]
    everything = torch.cat([c.flatten() for c in counts])
    total = figures["total"]
    assert figures["tokens"] == 40
    assert total["silent_frac"] == pytest.approx(float((everything == 0).float().mean()))
    assert total["mean_abs_count"] == pytest.approx(float(everything.abs().double().mean()))
    assert total["above_7_frac"] == pytest.approx(float((everything.abs() > 7).float().mean()))
    macs = DEPTH * sum(MACS.values())
    assert total["multiply_accumulates"] == macs
    events = touched = 0
    for site, c in zip(census.sites, counts, strict=True):
        per_site = MACS[site.site.name]
        outputs = per_site // c.shape[1]
        events += int(c.ne(0).sum()) * outputs
        tiles = [-(-linear.out_features // 64) for linear in site.site.linears]
        groups = sum(int(g.ne(0).any(1).sum()) for g in c.split(32, 1))
        touched += sum(tiles) * (int(c.ne(0).sum()) * 64 + groups * 128)
    assert total["events"] == pytest.approx(events / 40)
    assert total["skipped_frac"] == pytest.approx(1 - events / 40 / macs)
    assert total["weight_bytes_touched"] == pytest.approx(touched / 40)
    stored = sum(
        -(-linear.out_features // 64) * (c.shape[1] * 64 + -(-c.shape[1] // 32) * 128)
        for site, c in zip(census.sites, counts, strict=True)
        for linear in site.site.linears
    )
    assert total["weight_bytes"] == stored
    assert [row["layer"] for row in figures["layers"]] == list(range(DEPTH))
    assert len(figures["sites"]) == NUM_SITES


def test_bit_sparsity_is_counted_in_the_stated_steps() -> None:
    census, seen = census_of(dead_zone(weights="int8"), random_tokens(1, 24))
    figures = census.figures()
    everything = torch.cat([c.flatten() for parts in seen for c in parts]).tolist()
    least = min(everything)
    codings = figures["codings"]
    assert {
        coding: code["zero_point"] for coding, code in codings.items() if code["zero_point"]
    } == {
        "binary": least,
        "bitwise": least,
    }
    assert {coding: code["steps"] for coding, code in codings.items()} == {
        "binary": max(everything) - least,
        "ternary": 127,
        "bitwise": 8,
        "signed-bitwise": 7,
        "twos-complement": 8,
    }
    ones = {
        "binary": sum(c - least for c in everything),
        "ternary": sum(abs(c) for c in everything),
        "bitwise": sum((c - least).bit_count() for c in everything),
        "signed-bitwise": sum(abs(c).bit_count() for c in everything),
        "twos-complement": sum((c & 255).bit_count() for c in everything),
    }
    for coding, found in figures["total"]["bit_sparsity"].items():
        expected = 1 - ones[coding] / (len(everything) * found["steps"])
        assert found["zero_frac"] == pytest.approx(expected)
    windows = [abs(c) >> shift & 7 for c in everything for shift in (0, 3, 6)]
    expected = [sum(w.bit_count() == n for w in windows) / len(windows) for n in range(4)]
    got = figures["total"]["three_step_windows"]["with_0_1_2_3_spikes_frac"]
    assert got == pytest.approx(expected)
    assert sum(got) == pytest.approx(1)


def test_a_layer_without_spikes_is_named() -> None:
    silent = (*bands()[:2], SpikeBands(qkv=1, o=1, mlp=1e9, down=1), *bands()[3:])
    census, _ = census_of(dead_zone(layers=silent), random_tokens(1, 9))
    assert census.figures()["without_spikes"] == ["layer 2, mlp", "layer 2, down"]
    census, _ = census_of(dead_zone(), random_tokens(1, 9))
    assert census.figures()["without_spikes"] == []


def test_what_does_not_spike_is_listed() -> None:
    census, _ = census_of(dead_zone(), random_tokens(1, 4))
    head, *_ = census.figures()["not_spiked"]
    assert head == {"what": "output head", "multiply_accumulates": V * D}


def test_energy_is_the_table_times_the_counts() -> None:
    total = {
        "multiply_accumulates": 1000,
        "events": 300.0,
        "weight_bytes": 1100,
        "weight_bytes_touched": 400.0,
        "additions": {"ternary": 900.0, "binary": 5000.0},
        "bit_sparsity": {"ternary": {"zero_point": 0}, "binary": {"zero_point": -9}},
    }
    estimate = energy_estimate(total)
    ways = estimate["nanojoules_a_token"]
    assert estimate["what"].startswith("estimate")
    assert estimate["picojoules"] == PICOJOULES
    assert ways["dense fp16"]["arithmetic"] == pytest.approx(1.5)
    assert ways["dense fp16"]["weights_from_dram"] == pytest.approx(2000 * 0.1625)
    assert ways["events, multiplied by their count"]["arithmetic"] == pytest.approx(0.069)
    assert ways["spikes, ternary"] == pytest.approx(
        {"arithmetic": 0.027, "weights_from_dram": 65.0}
    )
    assert ways["spikes, binary"] == pytest.approx(
        {"arithmetic": 0.15, "weights_from_dram": 1100 * 0.1625}
    )


# ---- folders


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"the rain in the sea and the sun on {i}\n" for i in range(120)))
    return path


def measure(text: Path) -> Measure:
    return Measure((text,), context_tokens=32, calibration_tokens=64, held_out_tokens=96)


def test_a_spiking_folder_loads_and_spikes(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "spiking"
    report = spike(source, out, Goal(silent_frac=0.4), measure(text))
    assert report["total"]["skipped_frac"] == pytest.approx(0.4, abs=0.1)
    assert report["text"]["held_out_tokens"] == 96
    assert report["without_spikes"] == []
    stored = json.loads((out / "report.json").read_text())["spikes"]
    assert stored == json.loads(json.dumps(report))
    assert {p.name for p in out.glob("*.png")} == {"raster_tokens.png", "raster_steps.png"}
    assert "dead-zone neurons" in (out / "README.md").read_text()
    model, original = load(out), load(source)
    assert model.config.spikes is not None
    assert sum(isinstance(m, SpikeLinear) for m in model.decoder.modules()) == 7 * 4
    assert model.fingerprint != original.fingerprint
    tokens = random_tokens(1, 30)
    census = Census(model.decoder)
    with census.watching():
        got = logits(model.decoder, tokens)
    assert 0.2 < census.figures()["total"]["silent_frac"] < 0.6
    assert (got - logits(original.decoder, tokens)).abs().max() > 0
    with pytest.raises(UsageError, match="spikes already"):
        spike(out, tmp_path / "again", Goal(silent_frac=0.4), measure(text))
    spike(source, out, Goal(silent_frac=0.2), measure(text), force=True)
    with pytest.raises(UsageError, match="already exists"):
        spike(source, out, Goal(silent_frac=0.2), measure(text))


def test_the_rival_and_the_released_neuron(source: Path, text: Path, tmp_path: Path) -> None:
    teal = spike(
        source,
        tmp_path / "teal",
        Goal("teal", weights="float", silent_frac=0.3, budget="uniform"),
        measure(text),
    )
    assert "mean_abs_count" not in teal["total"]
    assert "energy" not in teal
    assert teal["total"]["silent_frac"] == pytest.approx(0.3, abs=0.1)
    released = spike(source, tmp_path / "k3", Goal("adaptive"), measure(text), rasters=False)
    assert released["neuron"]["weights"] == "int8"
    assert 0.05 < released["total"]["silent_frac"] < 0.4
    assert math.isfinite(released["distance"]["kl_nats"])
    bands = json.loads((tmp_path / "k3" / "config.json").read_text())["spikes"]["layers"]
    assert bands[0]["down"] == pytest.approx(1 / 6)


def test_a_config_with_impossible_spikes_is_refused(
    source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "spiking"
    spike(source, out, Goal("absmax"), measure(text), rasters=False)
    config = json.loads((out / "config.json").read_text())
    for change in (
        {"neuron": "leaky"},
        {"group_size": 7},
        {"layers": config["spikes"]["layers"][1:]},
    ):
        (out / "config.json").write_text(json.dumps(config | {"spikes": config["spikes"] | change}))
        with pytest.raises(CheckpointError, match="spikes"):
            load(out)
