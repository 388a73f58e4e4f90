"""Folders that are broken or want to do harm: refused in one line, before they cost memory."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from refusal import cheap, edit_config, one_line, refused
from respike.checkpoint import families, open_checkpoint
from respike.errors import CheckpointError, UnsupportedError
from respike.loading import load_decoder
from tiny import D, F, V, random_tokens, save_tiny

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("pristine"), "llama")


@pytest.fixture(scope="module")
def pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("shards"), "llama", max_shard_size="100KB")


@pytest.fixture(autouse=True)
def _no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is not kept fails the test, instead of taking the machine's memory."""
    build = families.full_layers

    def bounded(num_layers: int, num_groups: int) -> Any:
        assert num_layers <= 1024
        assert num_groups <= 4096
        return build(num_layers, num_groups)

    monkeypatch.setattr(families, "full_layers", bounded)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A good folder, to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def shards(pristine_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_shards, tmp_path / "model"))


def edit_weights(folder: Path, change: Callable[[Weights], Any], file: str = WEIGHTS) -> Path:
    path = folder / file
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    return path


def write_header(path: Path, header: dict[str, Any], data: bytes) -> Path:
    """A safetensors file byte by byte."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_index(folder: Path, weight_map: Any) -> Path:
    path = folder / INDEX
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return path


# ---- good ones, so that the rest means something -----------------------------------------------


def test_a_good_folder_is_read(pristine: Path, pristine_shards: Path) -> None:
    for folder, one_file in ((pristine, True), (pristine_shards, False)):
        with cheap():
            source = open_checkpoint(folder)
        assert (len(source.files) == 1) == one_file
        with torch.no_grad():
            assert load_decoder(source)(random_tokens(2, 9))[0].isfinite().all()


def test_a_tied_matrix_that_is_stored_twice_is_allowed(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    source = open_checkpoint(folder)
    assert load_decoder(source).lm_head is None


def test_a_stored_rotary_table_is_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda w: w.update({name: torch.ones(4)}))
    load_decoder(open_checkpoint(folder))


def test_weights_that_are_nan_are_the_models_own_affair(folder: Path) -> None:
    edit_weights(folder, lambda w: w[NORM].fill_(torch.nan))
    decoder = load_decoder(open_checkpoint(folder))
    with torch.no_grad():
        assert decoder(random_tokens(1, 3))[0].isnan().all()


# ---- nothing there -----------------------------------------------------------------------------


def test_a_path_that_is_not_there_is_refused_with_a_hint(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere", tmp_path / "nowhere", "no such")
    assert "safetensors" in str(error.hint)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "config.json")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert refused(folder, folder, WEIGHTS).hint is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_opened(folder: Path, name: str) -> None:
    trap = folder / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    error = refused(folder, folder)
    assert name in str(error.hint)
    assert "pickle" in str(error.hint)
    write_index(folder, {NORM: name})
    refused(folder, folder / name)
    shutil.copy(folder / name, folder / WEIGHTS)
    (folder / INDEX).unlink()
    refused(folder, folder / WEIGHTS)
    assert not trap.exists()
    pickle.loads((folder / name).read_bytes())
    assert trap.exists(), "the trap does not work, so the test proves nothing"


# ---- config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{'model_type': 'llama'}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, got a list"),
        (b"3", "expected a JSON object, got a int"),
        (b"null", "expected a JSON object, got a NoneType"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_config_that_is_no_json_object_is_refused(
    folder: Path, content: bytes, words: str
) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, folder / "config.json", words)


def test_a_huge_config_is_refused_unread(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(65 << 20)
    refused(folder, folder / "config.json", "larger than 64 MiB")


def test_a_config_that_is_a_folder_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, folder / "config.json")


REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(folder: Path, key: str) -> None:
    refused(edit_config(folder, **{key: None}).parent, folder / "config.json", key)


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize(
    "value", [-1, 0, 10**9, 10**30, "many", [1], {}, 1e400, float("nan"), 2.5], ids=str
)
def test_a_number_that_cannot_be_is_refused(folder: Path, key: str, value: Any) -> None:
    if key == "max_position_embeddings" and value == 10**9:
        value = 10**10  # 10 ** 9 tokens are many, but not impossible
    refused(edit_config(folder, **{key: value}).parent, folder / "config.json")


def test_a_thousand_million_layers_are_refused_at_once(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=10**9, layer_types=None)
    refused(folder, folder / "config.json", "num_hidden_layers 1000000000")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 7, "head_dim": 8}, "num_attention_heads=7 is not a multiple"),
        ({"num_key_value_heads": 10**9}, "num_key_value_heads 1000000000"),
        ({"num_key_value_heads": -3}, "num_key_value_heads -3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"head_dim": -8}, "head_dim"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"eos_token_id": "end"}, "eos_token_ids"),
        ({"eos_token_id": [None]}, "eos_token_ids"),
        ({"bos_token_id": [1]}, "bos_token_id"),
        ({"rope_parameters": [1]}, "config.json"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'factor' is missing"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "theta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"use_sliding_window": True, "sliding_window": -7}, "window_tokens"),
        ({"use_sliding_window": True, "sliding_window": "x"}, "config.json"),
        ({"use_sliding_window": True, "sliding_window": 7, "layer_types": ["x"]}, "config.json"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_contradiction_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    refused(edit_config(folder, **changes).parent, folder / "config.json", words)


@pytest.mark.parametrize(
    ("changes", "words", "hint"),
    [
        ({"model_type": "lama"}, "'lama' is not one of llama, qwen2, qwen3", "`llama`"),
        ({"model_type": "qwen2_moe"}, "'qwen2_moe'", "`qwen2`"),
        ({"model_type": "zzz"}, "'zzz'", None),
        ({"model_type": None}, "model_type", None),
        ({"model_type": "a\nb"}, "a\\nb", None),
        ({"model_type": "y" * 9999}, "model_type", None),
        ({"model_type": [[]]}, "model_type", None),
        ({"mlp_bias": True}, "mlp_bias", None),
        ({"hidden_act": "gelu"}, "'gelu'", None),
        ({"hidden_act": "y" * 9999}, "hidden_act", None),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "'yarn'", None),
        ({"rope_parameters": {"rope_type": "y" * 9999}}, "rotary scaling", None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_respike_does_not_know_is_unsupported(
    folder: Path, changes: dict[str, Any], words: str, hint: str | None
) -> None:
    edit_config(folder, **changes)
    error = refused(folder, folder / "config.json", words, error=UnsupportedError)
    assert hint is None or hint in str(error.hint)


# ---- tensors against the config ----------------------------------------------------------------


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_weights(folder, lambda w: w.pop("model.layers.3.mlp.up_proj.weight"))
    refused(folder, folder, "'model.layers.3.mlp.up_proj.weight' is missing", "4 layers")


def test_an_extra_tensor_is_named(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"model.layers.3.mlp.up_proj.bias": torch.ones(F)}))
    refused(folder, folder, "'model.layers.3.mlp.up_proj.bias'")


def test_an_extra_layer_is_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    refused(folder, folder, "'model.layers.3.")


@pytest.mark.parametrize("shape", [(D, F), (F, D + 1), (F * D,), (1, F, D), (), (0, D)], ids=str)
def test_a_wrong_shape_is_named(folder: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.2.mlp.gate_proj.weight"
    edit_weights(folder, lambda w: w.update({name: torch.zeros(shape)}))
    refused(folder, folder, repr(name), str(shape), str((F, D)))


def test_a_tensor_with_a_nasty_name_stays_on_one_line(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"a\nb\x1b[31m": torch.ones(1)}))
    assert "\x1b" not in str(refused(folder, folder))
    weights = {"y" * 9999: torch.ones(1)}
    edit_weights(folder, lambda w: (w.pop("a\nb\x1b[31m"), w.update(weights)))
    refused(folder, folder)


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.float64],
    ids=str,
)
def test_a_tensor_that_is_no_plain_weight_is_refused_and_named(
    folder: Path, dtype: torch.dtype
) -> None:
    """Eight-bit floats among them: without their scales they would be read as wrong numbers."""
    name = "model.layers.2.mlp.gate_proj.weight"
    edit_weights(folder, lambda w: w.update({name: torch.ones(F, D).to(dtype)}))
    with cheap(), pytest.raises((CheckpointError, UnsupportedError)) as caught:
        load_decoder(open_checkpoint(folder))
    one_line(caught.value, folder / WEIGHTS, repr(name))


# ---- safetensors bytes -------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 500, -1, -4096], ids="{} bytes".format)
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, path)


def test_a_file_with_bytes_to_spare_is_refused(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    refused(folder, folder / WEIGHTS)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**63, 200_000_000], ids=str)
def test_a_header_that_claims_to_be_huge_is_refused(folder: Path, length: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(folder, path)


def entry(*offsets: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(4, 12)},
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(0, 8), "b": entry(12, 20)},
        {"a": entry(8, 0)},
        {"a": entry(0, 12)},
        {"a": entry(0, 2**62)},
        {"a": entry(2**63, 2**63 + 8)},
        {"a": entry(0, 8, shape=(2**32, 2**32))},
        {"a": entry(0, 8, shape=(2**62, 2**62, 2**62))},
        {"a": entry(0, 8, dtype="F33")},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        {"__metadata__": {"x": 1}},
    ],
    ids=lambda header: str(header)[:80],
)
def test_offsets_that_overlap_or_lead_astray_are_refused(
    folder: Path, header: dict[str, Any]
) -> None:
    refused(folder, write_header(folder / WEIGHTS, header, bytes(12)))


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff" * 8, b'{"a":' * 9000, b""], ids=len)
def test_a_header_that_is_no_json_is_refused(folder: Path, text: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    refused(folder, folder / WEIGHTS)


def test_a_file_of_only_a_header_cannot_claim_weights(folder: Path) -> None:
    """All the right shapes, and no bytes behind them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == V
    header = {"model.embed_tokens.weight": entry(0, V * D * 4, shape=(V, D))}
    refused(folder, write_header(folder / WEIGHTS, header, b""))


def test_a_file_that_changes_after_it_was_opened_is_refused_when_read(folder: Path) -> None:
    source = open_checkpoint(folder)
    edit_weights(folder, lambda w: w.pop(NORM))
    with pytest.raises(CheckpointError) as caught:
        source.read(NORM)
    one_line(caught.value, folder / WEIGHTS, repr(NORM))
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError) as caught:
        source.read(NORM)
    one_line(caught.value, folder / WEIGHTS, repr(NORM))


# ---- the index ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/x.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\0b",
        "x" * 5000,
    ],
    ids=lambda name: name[:30] or "empty",
)
def test_an_index_that_names_a_file_outside_the_folder_is_refused(shards: Path, name: str) -> None:
    shutil.copy(next(shards.glob("*.safetensors")), shards.parent / "outside.safetensors")
    (shards / "sub").mkdir()
    shutil.copy(next(shards.glob("*.safetensors")), shards / "sub" / "x.safetensors")
    weight_map = json.loads((shards / INDEX).read_text(encoding="utf-8"))["weight_map"]
    write_index(shards, weight_map | {NORM: name})
    refused(shards, shards)


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], "x", 3, {NORM: 3}, {NORM: None}, {NORM: ["x"]}, {"a": 3, "b": "x"}, {NORM: {}}],
    ids=str,
)
def test_an_index_that_is_no_map_to_names_is_refused(shards: Path, weight_map: Any) -> None:
    refused(shards, write_index(shards, weight_map))


def test_an_index_that_is_no_json_is_refused(shards: Path) -> None:
    (shards / INDEX).write_text("{", encoding="utf-8")
    refused(shards, shards / INDEX)


def test_an_index_that_names_a_missing_file_is_refused(shards: Path) -> None:
    victim = sorted(shards.glob("*.safetensors"))[1]
    victim.unlink()
    refused(shards, victim, "not there")


def test_a_shard_that_the_index_forgets_is_missed(shards: Path) -> None:
    weight_map = json.loads((shards / INDEX).read_text(encoding="utf-8"))["weight_map"]
    gone = weight_map[NORM]
    write_index(shards, {tensor: file for tensor, file in weight_map.items() if file != gone})
    refused(shards, shards, "is missing")


def test_a_tensor_in_two_shards_is_refused_and_both_are_named(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    twice, tensor = next(iter(load_file(first).items()))
    edit_weights(shards, lambda w: w.update({twice: tensor}), second.name)
    refused(shards, second, first, repr(twice))


def test_a_broken_shard_is_named(shards: Path) -> None:
    victim = sorted(shards.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    refused(shards, victim)


# ---- the model card ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\nlicense: mit\nother: [1\n---\n", "not stated"),
        ("---\nlicense: 2024-13-45\n---\n", "not stated"),
        ("---\nlicense: !!python/object:os.system {}\n---\n", "not stated"),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", "not stated"),
        ("---\nlicense: [mit, gpl]\n---\n", "not stated"),
        ('---\nlicense: "a\\nb"\n---\n', "a b"),
        ("---\n- 1\n---\n", "not stated"),
        ("no front matter", "not stated"),
        ("", "not stated"),
        (None, "not stated"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_licence_is_what_the_card_says_if_it_says_it_plainly(
    folder: Path, card: str | None, licence: str
) -> None:
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    assert open_checkpoint(folder).license == licence


def test_a_huge_card_is_not_read_whole(folder: Path) -> None:
    with (folder / "README.md").open("wb") as file:
        file.truncate(200 << 20)
    with cheap():
        assert open_checkpoint(folder).license == "not stated"


def test_keys_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", "qwen2")
    assert open_checkpoint(folder).unknown_keys == ()
    edit_config(folder, logit_scale=0.5, use_cache=False)
    assert open_checkpoint(folder).unknown_keys == ("logit_scale",)
    edit_config(folder, partial_rotary_factor=0.5)
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor 0\.5 is not 1"):
        open_checkpoint(folder)
