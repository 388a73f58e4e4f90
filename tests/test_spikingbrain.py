"""Released SpikingBrain-7B folders: the same numbers as the released forward, or one line."""

import itertools
import json
import math
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from refusal import edit_config, one_line, refused
from respike.account import num_parameters, state_bytes
from respike.checkpoint import open_checkpoint
from respike.checkpoint.families import config_from_json
from respike.conversion import convert, plan
from respike.errors import CheckpointError, UnsupportedError
from respike.generation import generate
from respike.loading import load, load_decoder
from respike.models.decoder import Decoder
from respike.recipe import load_recipe
from tiny import (
    CONTEXT,
    D,
    F,
    H,
    K,
    L,
    V,
    random_tokens,
    save_spikingbrain,
    spikingbrain_weights,
)

B, T = 2, 61
LARGEST_DIFFERENCE = 1e-4  # of a logit, in float32: what the project promises
INDEX = "pytorch_model.bin.index.json"
SHARD = "pytorch_model-00002-of-00003.bin"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_spikingbrain(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A good folder, to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def edit_shard(folder: Path, change: Callable[[Weights], Any], name: str = SHARD) -> Path:
    path = folder / name
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)
    return path


def shard_of(folder: Path, tensor: str) -> str:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return str(index["weight_map"][tensor])


# ---- the released forward, whole sequence, float64 ---------------------------------------------


def released_logits(
    weights: Weights, tokens: Tensor, attn_layers: tuple[int, ...], sliding_window: int
) -> Tensor:
    """SpikingBrain-7B's forward (arXiv:2509.05276, section 2) in plain PyTorch; tokens (T,)."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["model.embeddings.weight"][tokens]
    for i in range(L):
        layer = {n.split(".", 3)[3]: t for n, t in w.items() if n.startswith(f"model.layers.{i}.")}
        h = rms(x, layer["attn_norm.weight"])
        mix = window_attention if i in attn_layers else gated_linear_attention
        x = x + mix(layer, h, sliding_window) @ layer["attn.o_proj.weight"].T
        h = rms(x, layer["mlp_norm.weight"])
        gate, up = h @ layer["mlp.gate_proj.weight"].T, h @ layer["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down_proj.weight"].T
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def heads(layer: Weights, name: str, x: Tensor) -> Tensor:
    """One of q, k, v of all query heads, (H, T, K): head h reads KV head h // (heads a group)."""
    y = x @ layer[f"attn.{name}_proj.weight"].T + layer[f"attn.{name}_proj.bias"]
    y = y.view(len(x), -1, K).transpose(0, 1)
    return y.repeat_interleave(H // len(y), 0)


def window_attention(layer: Weights, x: Tensor, sliding_window: int) -> Tensor:
    """A query sees itself and ``sliding_window`` tokens before it."""
    angle = torch.outer(
        torch.arange(len(x)).double(), 1e6 ** -(torch.arange(0, K, 2).double() / K)
    ).repeat(1, 2)

    def rotated(y: Tensor) -> Tensor:
        turned = torch.cat([-y[..., K // 2 :], y[..., : K // 2]], -1)
        return y * angle.cos() + turned * angle.sin()

    q, k = rotated(heads(layer, "q", x)), rotated(heads(layer, "k", x))
    back = torch.arange(len(x))[:, None] - torch.arange(len(x))
    hidden = (back < 0) | (back > sliding_window)
    scores = (q @ k.transpose(1, 2) / math.sqrt(K)).masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ heads(layer, "v", x)).transpose(0, 1).flatten(1)


def gated_linear_attention(layer: Weights, x: Tensor, _: int) -> Tensor:
    """No rotation, no denominator, a state for every query head."""
    q, k, v = (
        heads(layer, "q", x).clamp(min=0),
        heads(layer, "k", x).clamp(min=0),
        heads(layer, "v", x),
    )
    a = x @ layer["attn.gk_proj.0.weight"].T @ layer["attn.gk_proj.1.weight"].T
    a = (a + layer["attn.gk_proj.1.bias"]).view(len(x), -1, K).transpose(0, 1)
    decay = torch.sigmoid(a).pow(1 / 16).repeat_interleave(H // len(a), 0)
    outputs = []
    memory = torch.zeros(H, K, K, dtype=torch.float64)
    for t in range(len(x)):
        memory = decay[:, t, :, None] * memory + k[:, t, :, None] * v[:, t, None, :]
        outputs.append((q[:, t, None, :] @ memory)[:, 0] / math.sqrt(K))
    return rms(torch.stack(outputs), layer["attn.g_norm.weight"]).flatten(1)


@pytest.mark.parametrize("attn_layers", [None, (0, 2, 3)], ids=["odd", "listed"])
def test_logits_are_those_of_the_released_forward(
    tmp_path: Path, attn_layers: tuple[int, ...] | None
) -> None:
    changes = {} if attn_layers is None else {"attn_layers": attn_layers}
    at = attn_layers or (1, 3)
    tokens = random_tokens(B, T)
    decoder = load_decoder(open_checkpoint(save_spikingbrain(tmp_path, **changes)), dtype="f32")
    weights = spikingbrain_weights(at)
    theirs = torch.stack([released_logits(weights, row, at, 5) for row in tokens])
    assert theirs.std() > 0.5, "logits that differ too little would prove nothing"

    def in_pieces(*lengths: int) -> Tensor:
        state, outputs = None, []
        for piece in tokens.split(list(lengths), 1):
            logits, state = decoder(piece, state)
            outputs.append(logits)
        return torch.cat(outputs, 1)

    with torch.no_grad():
        for lengths in ((T,), (7, 33, 1, 20), (T - 9, *[1] * 9), (1,) * T):
            assert (in_pieces(*lengths) - theirs).abs().max() <= LARGEST_DIFFERENCE
    for other in (4, 6):
        shifted = released_logits(weights, tokens[0], at, other)
        assert (shifted - theirs[0]).abs().max() > 100 * LARGEST_DIFFERENCE, (
            "the window is not seen"
        )


# ---- the full size -----------------------------------------------------------------------------


def full_size(**changes: Any) -> dict[str, Any]:
    """What is left of the released config when everything with a default is left out."""
    return {"model_type": "gla_swa", **changes}


def test_the_full_size_has_the_released_parameters_and_state() -> None:
    config = config_from_json(full_size(), "config.json")
    assert num_parameters(config) == 7_616_542_976
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == 7_616_542_976
    memory, ring = 4 * 128 * 128 * 4, 4 * 2 * 128 * 4097 * 2
    for tokens in (0, 10**6):
        assert state_bytes(config, tokens) == 14 * memory + 14 * ring


def test_missing_fields_take_the_released_defaults() -> None:
    config = config_from_json(full_size(), "config.json")
    assert (config.vocab_size, config.max_position_embeddings) == (152_064, 131_072)
    assert (config.rms_norm_eps, config.rope.theta, config.rope.kind) == (1e-6, 1e6, "default")
    assert (config.qkv_bias, config.o_bias, config.tie_word_embeddings) == (True, False, False)
    for i, part in config.mixers():
        if i % 2:
            assert part.mixer == "window"
            assert (part.window_tokens, part.sink_tokens, part.memory) == (4097, 0, None)
        else:
            assert part.mixer == "linear"
            assert part.memory.kind == "gla"
            memory = part.memory
            assert (memory.feature, memory.gate_rank, memory.gate_normalizer) == ("relu", 16, 16)


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, {151_643, 151_645}),
        ({"eos_token_id": 151_643}, {151_643, 151_645}),
        ({"eos_token_id": None}, {151_643, 151_645}),
        ({"eos_token_id": [7, 151_645]}, {7, 151_643, 151_645}),
        ({"vocab_size": 151_644}, {151_643}),
        ({"vocab_size": V, "eos_token_id": 2}, {2}),
        ({"vocab_size": V}, set()),
    ],
    ids=str,
)
def test_a_text_and_a_turn_end_where_the_vocabulary_has_the_tokens(
    changes: dict[str, Any], ends: set[int]
) -> None:
    assert set(config_from_json(full_size(**changes), "x").eos_token_ids) == ends


# ---- what works on it --------------------------------------------------------------------------


def test_one_file_and_safetensors_are_read_too(pristine: Path, tmp_path: Path) -> None:
    tokens = random_tokens(1, 20)
    weights = spikingbrain_weights()
    expected = load_decoder(open_checkpoint(pristine))(tokens)[0]
    for write in (
        lambda folder: torch.save(weights, folder / "pytorch_model.bin"),
        lambda folder: save_file(weights, folder / "model.safetensors"),
    ):
        folder = tmp_path / "one"
        shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("pytorch_model*"))
        write(folder)
        source = open_checkpoint(folder)
        assert len(source.files) == 1
        assert torch.equal(load_decoder(source)(tokens)[0], expected)
        shutil.rmtree(folder)


def test_a_state_dict_of_parameters_is_read_as_plain_tensors(folder: Path) -> None:
    def as_module_saves(weights: Weights) -> None:
        for name, tensor in list(weights.items()):
            weights[name] = torch.nn.Parameter(tensor)
        assert isinstance(weights, OrderedDict)
        weights._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]

    edit_shard(folder, as_module_saves)
    source = open_checkpoint(folder)
    tensor = source.read("model.norm.weight")
    assert type(tensor) is Tensor
    assert not tensor.requires_grad
    assert torch.equal(tensor, spikingbrain_weights()["model.norm.weight"])


def test_a_tensor_outlives_its_file(folder: Path) -> None:
    tensor = open_checkpoint(folder).read("model.norm.weight")
    for file in folder.glob("*.bin"):
        with file.open("r+b") as handle:
            handle.truncate(0)
    assert torch.equal(tensor, spikingbrain_weights()["model.norm.weight"])


def test_identity_keeps_every_bit_and_both_models_generate(pristine: Path, tmp_path: Path) -> None:
    report = convert(plan(pristine, load_recipe("identity")), tmp_path / "out")
    count = len(spikingbrain_weights())
    assert report["tensors"] == {"copy": count, "cast": 0, "derive": 0, "new": 0, "drop": 0}
    assert report["source"]["stored_as"] == {"BF16": count}
    before, after = load(pristine), load(tmp_path / "out")
    assert before.config == after.config
    assert before.config.max_position_embeddings == CONTEXT
    with torch.no_grad():
        tokens = random_tokens(1, 20)
        assert torch.equal(before.decoder(tokens)[0], after.decoder(tokens)[0])
    assert generate(before, "the sea", max_tokens=9) == generate(after, "the sea", max_tokens=9)


# ---- config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"attn_layers": [1, L]},
            f"attn_layers names layer {L}, the model has layers 0 to {L - 1}",
        ),
        ({"attn_layers": [-1]}, "attn_layers names layer -1"),
        ({"attn_layers": ["one"]}, "attn_layers names layer one"),
        ({"attn_layers": [True]}, "attn_layers names layer True"),
        ({"attn_layers": 3}, "attn_layers is '3', expected a list"),
        ({"attn_layers": "y" * 9999}, "attn_layers"),
        ({"sliding_window": -1}, "sliding_window is '-1'"),
        ({"sliding_window": 0}, "sliding_window is '0'"),
        ({"sliding_window": 2.5}, "sliding_window is '2.5'"),
        ({"sliding_window": "x" * 9999}, "sliding_window"),
        ({"sliding_window": 10**9}, "window_tokens"),
        ({"gate_low_rank_dim": 0}, "gate_rank"),
        ({"gate_logit_normalizer": -3}, "gate_normalizer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_key_value_heads": 10**9}, "num_key_value_heads 1000000000"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"norm_eps": -1}, "rms_norm_eps"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_config_that_cannot_be_is_refused(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    refused(edit_config(folder, **changes).parent, folder / "config.json", words)


def test_short_convolutions_are_unsupported(folder: Path) -> None:
    edit_config(folder, use_short_conv=True)
    refused(folder, folder / "config.json", "use_short_conv", error=UnsupportedError)


# ---- tensors -----------------------------------------------------------------------------------


def test_a_missing_tensor_is_named_as_the_folder_names_it(folder: Path) -> None:
    name = "model.layers.2.attn.gk_proj.1.bias"
    edit_shard(folder, lambda w: w.pop(name), shard_of(folder, name))
    refused(folder, folder, f"'{name}' is missing", "(1 missing, 0 extra")


@pytest.mark.parametrize(
    "name", ["model.layers.1.attn.g_norm.weight", "model.layers.0.input_layernorm.weight"]
)
def test_an_extra_tensor_is_named(folder: Path, name: str) -> None:
    """The second is what we call a tensor that is there under its own name."""
    edit_shard(folder, lambda w: w.update({name: torch.ones(K)}))
    refused(folder, folder, repr(name), "1 such")


def test_a_wrong_shape_is_named(folder: Path) -> None:
    name = "model.layers.0.attn.gk_proj.0.weight"
    wrong = {name: torch.ones(D, 16, dtype=torch.bfloat16)}
    edit_shard(folder, lambda w: w.update(wrong), shard_of(folder, name))
    refused(folder, folder, repr(name), str((D, 16)), str((16, D)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float64], ids=str)
def test_a_tensor_that_is_no_plain_weight_is_named(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.2.mlp.gate_proj.weight"
    shard = shard_of(folder, name)
    edit_shard(folder, lambda w: w.update({name: torch.ones(F, D).to(dtype)}), shard)
    refused(folder, folder / shard, repr(name), "BF16")


# ---- W8ASpike ----------------------------------------------------------------------------------

GROUPS = 2
"""Of inputs that share a scale; the release has groups of 128."""


def quantise(weights: dict[str, torch.Tensor]) -> None:
    """Make the tensors of a base release into those of W8ASpike, as its code would hold them."""
    r = torch.Generator().manual_seed(5)
    for name in list(weights):
        if ".gk_proj.0" in name:
            up = weights.pop(name.replace("gk_proj.0.weight", "gk_proj.1.weight"))
            merged = up.float() @ weights.pop(name).float()
            weights[name.replace("gk_proj.0", "gk_proj")] = merged.bfloat16()
            bias = name.replace("gk_proj.0.weight", "gk_proj.1.bias")
            weights[bias.replace("gk_proj.1", "gk_proj")] = weights.pop(bias)
    for name in list(weights):
        module = name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            rows = len(weights[name])
            scales = 0.01 + 0.02 * torch.rand(rows, GROUPS, 1, generator=r)
            weights[module + ".weight_quantizer.scales"] = scales.bfloat16()


def test_the_quantised_release_is_read_with_its_rounding_and_its_neurons(folder: Path) -> None:
    plain = {n: open_checkpoint(folder).read(n) for n in ("model.layers.1.self_attn.q_proj.weight",
             "model.layers.1.mlp.down_proj.weight")}  # fmt: skip
    for shard in sorted(folder.glob("*.bin")):
        shard.unlink()
    weights = spikingbrain_weights()
    quantise(weights)
    index = folder / "pytorch_model.bin.index.json"
    torch.save(weights, folder / "pytorch_model.bin")
    index.unlink()
    source = open_checkpoint(folder)
    for name, weight in plain.items():
        got = source.read(name).float()
        theirs = name.replace("self_attn", "attn")
        scales = weights[theirs.removesuffix(".weight") + ".weight_quantizer.scales"].float()
        words = weight.float().clone()
        if "down_proj" not in name:
            for o, group in itertools.product(range(len(words)), range(GROUPS)):
                part = slice(
                    group * words.shape[1] // GROUPS, (group + 1) * words.shape[1] // GROUPS
                )
                codes = np.round(words[o, part].numpy() / float(scales[o, group]))
                words[o, part] = torch.from_numpy(codes * float(scales[o, group]))
            assert not torch.equal(got, weight.float())
        torch.testing.assert_close(got, words.bfloat16().float(), rtol=1e-2, atol=0)
    assert source.config.spikes is not None
    assert {bands.down for bands in source.config.spikes.layers} == {None}
    decoder = load_decoder(source, dtype="f32")
    layer = decoder.layers[1]
    assert layer.self_attn.q_proj.neuron.k == pytest.approx(3.0)
    assert not hasattr(layer.mlp.down_proj, "neuron")
    x = torch.randn(3, 48)
    step = x.abs().mean(-1, keepdim=True) / 3
    spiked = (x / step).round() * step
    q = layer.self_attn.q_proj
    torch.testing.assert_close(q(x), spiked @ q.weight.T + q.bias)
    assert decoder(random_tokens(1, 12))[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("model.layers.1.attn.q_proj.weight_quantizer.scales"), "is missing"),
        (
            lambda w: w.update({"model.norm.weight_quantizer.scales": torch.ones(3)}),
            "is of nothing",
        ),
        (
            lambda w: w.update(
                {"model.layers.1.attn.q_proj.weight_quantizer.scales": torch.ones(3)}
            ),
            "does not fit",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_scales_that_do_not_fit_are_refused(folder: Path, change: Any, words: str) -> None:
    for path in (*folder.glob("*.bin"), folder / "pytorch_model.bin.index.json"):
        path.unlink()
    weights = spikingbrain_weights()
    quantise(weights)
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder, folder, "weight_quantizer.scales", words)


@pytest.mark.parametrize("scale", [0.0, -0.5, math.nan, math.inf], ids=str)
def test_scales_that_scale_nothing_are_refused(folder: Path, scale: float) -> None:
    for path in (*folder.glob("*.bin"), folder / "pytorch_model.bin.index.json"):
        path.unlink()
    weights = spikingbrain_weights()
    quantise(weights)
    name = "model.layers.3.attn.o_proj.weight_quantizer.scales"
    weights[name][5, 1, 0] = scale
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="above 0") as caught:
        load(folder)
    one_line(caught.value, folder, name)


# ---- .bin files --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 100, 2000, -1, -4096], ids="{} bytes".format)
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, path, "cut short")


class Trap:
    """A pickle of it makes a file when it runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Bomb:
    """A pickle of it takes a gigabyte."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 30,)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "bare"])
def test_a_pickle_with_code_is_refused_unrun(folder: Path, archive: bool) -> None:
    path, trap = folder / SHARD, folder / "opened"
    if archive:
        edit_shard(folder, lambda w: w.update({"x": Trap(trap)}))
    else:
        path.write_bytes(pickle.dumps(Trap(trap)))
    refused(folder, path)
    assert not trap.exists()
    if archive:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trap.exists(), "the trap does not work, so the test proves nothing"


def test_a_file_that_turns_into_a_trap_is_refused_when_read(folder: Path) -> None:
    source, trap = open_checkpoint(folder), folder / "opened"
    name = "model.norm.weight"
    shard = shard_of(folder, name)
    edit_shard(folder, lambda w: w.update({"x": Trap(trap)}), shard)
    with pytest.raises(CheckpointError) as caught:
        source.read(name)
    one_line(caught.value, folder / shard, repr(name))
    assert not trap.exists()
    (folder / shard).unlink()
    with pytest.raises(CheckpointError) as caught:
        source.read(name)
    one_line(caught.value, folder / shard, repr(name))


def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_any(folder: Path) -> None:
    """What torch itself allows includes bytearray."""
    edit_shard(folder, lambda w: w.update({"x": Bomb()}))
    refused(folder, folder / SHARD, "bytearray")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([torch.ones(3)], "holds a list"),
        ({"state_dict": {"a": torch.ones(3)}}, "'state_dict' is a dict"),
        ({"step": 3}, "'step' is a int"),
        ({3: torch.ones(3)}, "'3' is no tensor name"),
        ({"y" * 9999: 3}, "expected a tensor"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_of_something_else_is_refused(folder: Path, value: Any, words: str) -> None:
    torch.save(value, folder / SHARD)
    refused(folder, folder / SHARD, words)


def test_a_file_in_the_form_before_zip_is_refused(folder: Path) -> None:
    torch.save({"a": torch.ones(3)}, folder / SHARD, _use_new_zipfile_serialization=False)
    refused(folder, folder / SHARD, "1.6")


def test_a_damaged_pickle_is_refused(folder: Path) -> None:
    path = folder / SHARD
    raw = path.read_bytes()
    at = raw.index(b"_rebuild_tensor_v2")
    path.write_bytes(raw[: at + 40] + b"\xff" * 20 + raw[at + 60 :])
    refused(folder, path)


def test_a_file_that_claims_more_than_it_holds_is_refused(folder: Path) -> None:
    """Mapped, such a tensor would read its neighbours' bytes."""
    path = folder / SHARD
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    victim = next(name for name in parts if name.endswith("/data/3"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data[2:] if name == victim else data)
    refused(folder, path, "bytes, it holds")


def test_an_archive_of_two_pickles_is_refused(folder: Path) -> None:
    with zipfile.ZipFile(folder / SHARD, "a") as archive:
        archive.writestr("x/DATA.pkl", pickle.dumps(3))
    refused(folder, folder / SHARD, "holds 2 pickles")


# ---- the index ---------------------------------------------------------------------------------


def test_an_index_that_names_a_missing_file_is_refused(folder: Path) -> None:
    (folder / SHARD).unlink()
    refused(folder, folder / SHARD, "not there")


@pytest.mark.parametrize("name", ["../outside.bin", "sub/x.bin", "/etc/passwd", "..", "", "a\0b"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(folder: Path, name: str) -> None:
    shutil.copy(folder / SHARD, folder.parent / "outside.bin")
    (folder / "sub").mkdir()
    shutil.copy(folder / SHARD, folder / "sub" / "x.bin")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    refused(folder, folder)


def test_a_folder_without_weights_names_every_form(folder: Path) -> None:
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    (folder / "training_args.bin").write_bytes(b"never opened")
    refused(folder, folder, "model.safetensors", "pytorch_model.bin", INDEX)


def test_other_families_still_refuse_pickles(folder: Path) -> None:
    """The same weights under another model_type."""
    edit_config(folder, model_type="qwen2", rms_norm_eps=1e-6)
    error = refused(folder, folder, "no model.safetensors")
    assert error.hint == (
        "pytorch_model-00001-of-00003.bin is a pickle, which can run code: "
        "ask its maker for safetensors"
    )


def test_a_tokenizer_in_two_files_is_refused_with_what_is_missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}", encoding="utf-8")
    (folder / "merges.txt").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    one_line(caught.value, folder / "tokenizer.json", "no such file")
    one_line(caught.value, "vocab.json, merges.txt alone")
    assert "AutoTokenizer" in str(caught.value.hint)
