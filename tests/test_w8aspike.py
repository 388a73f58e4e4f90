"""SpikingBrain-7B-W8ASpike: a generated folder in the released layout, loaded and run.

What must come out is computed here from the released code's description: weights rounded by their
scales, counts of mean|x| / 3 before every linear layer but down_proj and the head.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from respike.checkpoint import open_checkpoint, w8aspike
from respike.errors import CheckpointError
from respike.layers.memory import GatedLinear
from respike.layers.mlp import GatedMLP
from respike.layers.spikes import SpikedLinear
from respike.loading import load, load_decoder
from respike.models.spiking import spike_sites
from respike.spiking import Census
from tiny import GROUPS, D, F, H, K, L, random_tokens, save_spikingbrain, spikingbrain_weights
from tolerance import assert_close

KV = GROUPS["qwen2"] * K
FILE = "model.safetensors"


def released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain release's tensors as W8ASpike has them: one gate, float32, scales."""
    r = torch.Generator().manual_seed(1)
    found = {n: w.float() for n, w in weights.items() if ".gk_proj." not in n}
    for i in (0, 2):
        found[f"model.layers.{i}.attn.gk_proj.weight"] = torch.randn(KV, D, generator=r)
        found[f"model.layers.{i}.attn.gk_proj.bias"] = torch.randn(KV, generator=r)
    for name in [n for n in found if n.endswith("_proj.weight")]:
        outputs, inputs = found[name].shape
        scales = 0.002 + 0.01 * torch.rand(outputs, -(-inputs // 128), 1, generator=r)
        found[name.removesuffix(".weight") + w8aspike.SCALES] = scales
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_spikingbrain(tmp_path)
    for file in tmp_path.glob("pytorch_model*"):
        file.unlink()
    save_file(released(spikingbrain_weights()), tmp_path / FILE)
    return tmp_path


def stored(folder: Path, name: str) -> Tensor:
    return load_file(folder / FILE)[name]


def by_hand(folder: Path, module: str) -> Tensor:
    """A weight as the released layer runs it."""
    weight, scales = stored(folder, f"{module}.weight"), stored(folder, module + w8aspike.SCALES)
    return (weight / scales[:, 0]).round() * scales[:, 0]


def spikes(x: Tensor) -> Tensor:
    step = x.abs().mean(-1, keepdim=True) / 3
    return (x / step).round() * step


def test_weights_are_those_that_run(folder: Path) -> None:
    source = open_checkpoint(folder)
    for ours, theirs in (
        ("model.layers.1.self_attn.q_proj", "model.layers.1.attn.q_proj"),
        ("model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj"),
        ("model.layers.2.self_attn.mixers.0.memory.gate_down", "model.layers.2.attn.gk_proj"),
    ):
        got = source.read(f"{ours}.weight")
        assert_close(got, by_hand(folder, theirs))
        assert (got - stored(folder, f"{theirs}.weight")).abs().max() > 1e-4
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(source.read(down), stored(folder, down))


def test_integers_beyond_eight_bits_stay() -> None:
    weight, scales = torch.full((2, 300), 3.0), torch.full((2, 3), 0.01)
    scales[1, 2] = 0.5
    got = w8aspike.rounded(weight + 0.003, scales)
    assert_close(got[0], torch.full((300,), 3.0))
    assert_close(got[1, 256:], torch.full((44,), 3.0))
    assert int((got[0, 0] / 0.01).round()) == 300


def test_the_gate_is_one_matrix(folder: Path) -> None:
    memory = load_decoder(open_checkpoint(folder)).layers[0].self_attn.mixers[0].memory
    assert isinstance(memory, GatedLinear)
    x = torch.randn(5, D)
    expected = linear(x, by_hand(folder, "model.layers.0.attn.gk_proj"))
    expected = expected + stored(folder, "model.layers.0.attn.gk_proj.bias")
    assert_close(memory.gate_up(memory.gate_down(x)), expected)


def test_neurons_stand_where_the_released_code_has_them(folder: Path) -> None:
    decoder = load(folder).decoder
    assert sum(isinstance(m, SpikedLinear) for m in decoder.modules()) == 6 * L
    assert not any(type(m) is nn.Linear and m.in_features == F for m in decoder.modules()) or all(
        site.neuron is None for site in spike_sites(decoder) if site.name == "down"
    )
    x, where = torch.randn(2, 3, D), "model.layers.1.mlp"
    mlp = decoder.layers[1].mlp
    assert isinstance(mlp, GatedMLP)
    gate, up = (linear(spikes(x), by_hand(folder, f"{where}.{n}_proj")) for n in ("gate", "up"))
    hidden = nn.functional.silu(gate) * up
    with torch.no_grad():
        assert_close(mlp(x), linear(hidden, stored(folder, f"{where}.down_proj.weight")))


def test_it_runs_and_its_silence_is_counted(folder: Path) -> None:
    model = load(folder)
    census = Census(model.decoder)
    with torch.inference_mode(), census.watching():
        logits, _ = model.decoder(random_tokens(1, 12))
    assert logits.isfinite().all()
    figures = census.figures()
    assert {row["site"] for row in figures["sites"]} == {"qkv", "o", "mlp"}
    assert 0 < figures["total"]["silent_frac"] < 0.5
    down = next(row for row in figures["not_spiked"] if row["what"] == "layers behind down")
    assert down["multiply_accumulates"] == L * D * F
    assert model.config.spikes is not None
    assert H * K == D


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("model.layers.1.attn.q_proj", torch.ones(3, 1, 1), "its weight asks for"),
        ("model.layers.1.attn.nothing", torch.ones(3, 1, 1), "no such weight"),
    ],
)
def test_scales_that_fit_nothing_are_named(
    folder: Path, name: str, bad: Tensor, message: str
) -> None:
    tensors = load_file(folder / FILE) | {name + w8aspike.SCALES: bad}
    save_file(tensors, folder / FILE)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_scales_of_zero_are_refused(folder: Path) -> None:
    name = "model.layers.3.attn.o_proj" + w8aspike.SCALES
    tensors = load_file(folder / FILE)
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / FILE)
    with pytest.raises(CheckpointError, match="above 0"):
        load(folder)


def test_a_missing_gate_is_named(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    del tensors["model.layers.2.attn.gk_proj.weight"]
    save_file(tensors, folder / FILE)
    with pytest.raises(CheckpointError, match=r"gk_proj\.weight"):
        open_checkpoint(folder)


def test_a_config_that_spikes_in_part_needs_float_weights(folder: Path) -> None:
    config = json.loads(open_checkpoint(folder).config.model_dump_json())
    config["spikes"]["weights"] = "int8"
    with pytest.raises(ValueError, match="down without neurons"):
        type(open_checkpoint(folder).config).model_validate(config)
