"""GGUF files: every quantisation, the config they describe, and what a hostile one may not do."""

import re
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from respike.checkpoint.gguf import GgufFile, gguf_config, gguf_tensor_map, read_as
from respike.errors import CheckpointError, RespikeError, UnsupportedError
from tiny import GGUF_NAMES

LAYERS, HEADS, GROUPS, HEAD, WIDTH, MLP, VOCAB = 2, 4, 2, 6, 32, 96, 11
WRITABLE = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.BF16, Type.F16, Type.F32]
READABLE = [
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.TQ1_0, Type.TQ2_0, Type.MXFP4),
    *(Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ1_S, Type.IQ1_M),
    *(Type.IQ4_NL, Type.IQ4_XS),
]
U32, F32, STRING, ARRAY = 4, 6, 8, 9


def model_tensors(arch):
    """Random weights under Hugging Face's names."""
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows * HEAD, WIDTH)
            if arch == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows * HEAD,)
            if arch == "qwen3" and name != "v":
                shapes[f"{layer}.self_attn.{name}_norm.weight"] = (HEAD,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (WIDTH, HEADS * HEAD)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (MLP, WIDTH)
        shapes[f"{layer}.mlp.up_proj.weight"] = (MLP, WIDTH)
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, MLP)
        shapes[f"{layer}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (WIDTH,)
    return {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def interleave(weight, heads):
    """What llama.cpp's converter does to q and k of llama models (its `permute`)."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_model(path, arch="llama", *, keys=(), drop=(), extra=()):
    """A tiny model file by `gguf`'s own writer; ``keys`` override, ``drop`` leaves out."""
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "vocab_size": VOCAB,
    } | dict(keys)
    for key, value in values.items():
        if key in drop:
            continue
        kind = {int: "add_uint32", float: "add_float32", str: "add_string"}[type(value)]
        getattr(writer, kind)(f"{arch}.{key}", value)
    writer.add_token_list(
        [f"t{i}" for i in range(VOCAB - 3)] + ["<|end|>", "<|im_end|>", "<|eot_id|>"]
    )
    writer.add_token_types([1] * (VOCAB - 3) + [3, 3, 3])
    writer.add_eos_token_id(VOCAB - 3)
    writer.add_chat_template("{{ messages }}")
    truth = model_tensors(arch)
    config_names = _names(arch)
    for name, weight in truth.items():
        stored = weight
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            stored = interleave(weight, HEADS if "q_proj" in name else GROUPS)
        writer.add_tensor(config_names[name], stored)
    for name, weight in extra:
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


def _names(arch):
    # Written out here and not taken from the code under test: llama.cpp's own names.
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for name in model_tensors(arch):
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            names[name] = f"blk.{index}.{GGUF_NAMES[part]}.{kind}"
    return names


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, payload):
    return text(name) + struct.pack("<I", kind) + payload


def info(name="w", dims=(32,), kind=0, offset=0):
    dims_bytes = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + dims_bytes + struct.pack("<IQ", kind, offset)


def raw(keys=(), tensors=(), *, version=3, counts=None, data=b"\0" * 256, align=32):
    """A file byte by byte, for what no writer would write."""
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % align) + data


# ---- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
def test_what_gguf_can_write_is_read_as_gguf_reads_it(kind, tmp_path):
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, kind)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("before", np.ones(5, np.float32))
    writer.add_tensor("w", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert file.tensors["w"].shape == (3, 64)
    assert file.tensors["w"].type is kind
    got = file.read("w")
    assert got.dtype == torch.float32
    want = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
    assert_close(got, want, rtol=0, atol=0)
    assert_close(got, torch.from_numpy(values), rtol=0, atol=0.6)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_what_gguf_can_only_read_is_read_the_same_from_random_blocks(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = 3, 2
    packed = np.random.default_rng(1).integers(0, 256, (rows, blocks * size), np.uint8)
    path = tmp_path / "x.gguf"
    path.write_bytes(
        raw(tensors=[info(dims=(blocks * block, rows), kind=int(kind))], data=packed.tobytes())
    )
    got = GgufFile(path).read("w")
    with np.errstate(all="ignore"):
        want = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
    assert got.shape == (rows, blocks * block)
    assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [Type.I8, Type.I16, Type.I32, Type.I64, Type.F64])
def test_plain_numbers_are_cast(kind, tmp_path):
    form = {"I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "F64": "f8"}[kind.name]
    values = np.array([[1, -2, 3], [4, 5, -6]], f"<{form}")
    path = tmp_path / "x.gguf"
    path.write_bytes(raw(tensors=[info(dims=(3, 2), kind=int(kind))], data=values.tobytes()))
    assert GgufFile(path).read("w").tolist() == values.tolist()


def test_a_tensor_owns_its_memory(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw(tensors=[info()], data=b"\0" * 128))
    file = GgufFile(path)
    file.read("w").fill_(7)
    assert file.read("w").sum() == 0


def test_every_kind_of_key_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a", 200)
    writer.add_int8("b", -3)
    writer.add_uint64("c", 1 << 40)
    writer.add_int64("d", -(1 << 40))
    writer.add_float64("e", 0.1)
    writer.add_bool("f", True)
    writer.add_string("g", "Grüße 你好")
    writer.add_array("h", [1, 2, 3])
    writer.add_array("i", ["x", "", "é"])
    writer.add_array("j", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    keys = GgufFile(path).metadata
    assert [keys[k] for k in "abcdefg"] == [200, -3, 1 << 40, -(1 << 40), 0.1, True, "Grüße 你好"]
    assert keys["h"].tolist() == [1, 2, 3]
    assert keys["i"] == ["x", "", "é"]
    assert keys["j"].tolist() == [True, False]


# ---- config and names ------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_model_comes_back_tensor_by_tensor_under_its_own_names(arch, tmp_path):
    truth = write_model(tmp_path / "x.gguf", arch)
    file = GgufFile(tmp_path / "x.gguf")
    config = gguf_config(file)
    assert config.family == arch
    assert (config.qkv_bias, config.qk_norm) == (arch == "qwen2", arch == "qwen3")
    assert set(gguf_tensor_map(config)) == set(truth)
    for name, weight in truth.items():
        assert_close(read_as(file, config, name), torch.from_numpy(weight), rtol=0, atol=0)


def test_the_config_says_what_the_keys_say(tmp_path):
    write_model(tmp_path / "x.gguf")
    config = gguf_config(GgufFile(tmp_path / "x.gguf"))
    assert (config.num_hidden_layers, config.num_attention_heads) == (LAYERS, HEADS)
    assert (config.num_key_value_heads, config.head_dim) == (GROUPS, HEAD)
    assert (config.hidden_size, config.intermediate_size) == (WIDTH, MLP)
    assert (config.vocab_size, config.max_position_embeddings) == (VOCAB, 64)
    assert config.rms_norm_eps == 1e-5  # not 9.999999747378752e-06
    assert config.tie_word_embeddings
    assert config.rope.kind == "default"
    assert config.eos_token_ids == (VOCAB - 3, VOCAB - 2, VOCAB - 1)
    assert config.softmax_groups() == tuple((i, g) for i in range(LAYERS) for g in range(GROUPS))


def test_a_separate_head_is_not_tied(tmp_path):
    head = np.ones((VOCAB, WIDTH), np.float32)
    write_model(tmp_path / "x.gguf", extra=[("output.weight", head)])
    file = GgufFile(tmp_path / "x.gguf")
    config = gguf_config(file)
    assert not config.tie_word_embeddings
    assert_close(read_as(file, config, "lm_head.weight"), torch.from_numpy(head))


def test_rope_scaling_is_kept(tmp_path):
    write_model(
        tmp_path / "x.gguf", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    )
    rope = gguf_config(GgufFile(tmp_path / "x.gguf")).rope
    assert (rope.kind, rope.factor) == ("linear", 4.0)
    for keys, factor in (
        ({"rope.scaling.factor": 4.0}, 4.0),  # linear, if nothing is said
        ({"rope.scale_linear": 4.0}, 4.0),  # the key of 2023
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.factor": 0.0}, 1.0),
    ):
        write_model(tmp_path / "z.gguf", keys=keys)
        assert gguf_config(GgufFile(tmp_path / "z.gguf")).rope.factor == factor, keys
    factors = np.array([1, 2, 8], np.float32)
    write_model(tmp_path / "y.gguf", extra=[("rope_freqs.weight", factors)])
    rope = gguf_config(GgufFile(tmp_path / "y.gguf")).rope
    assert (rope.kind, rope.factors) == ("factors", (1, 2, 8))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"drop": ["block_count"]}, CheckpointError, "llama.block_count"),
        ({"drop": ["attention.layer_norm_rms_epsilon"]}, CheckpointError, "rms_epsilon"),
        ({"keys": {"block_count": 10**9}}, CheckpointError, "expected 1 to 1024"),
        ({"keys": {"attention.head_count_kv": 10**9}}, CheckpointError, "head_count_kv"),
        ({"keys": {"attention.head_count": 0}}, CheckpointError, "head_count"),
        ({"keys": {"block_count": "many"}}, CheckpointError, "expected a number"),
        ({"keys": {"attention.head_count_kv": 3}}, CheckpointError, "not a multiple"),
        ({"keys": {"rope.freq_base": float("nan")}}, CheckpointError, "rope.freq_base"),
        ({"keys": {"rope.freq_base": -1.0}}, CheckpointError, "rope.freq_base"),
        ({"keys": {"rope.scaling.type": "yarn"}}, UnsupportedError, "'yarn'"),
        ({"keys": {"expert_count": 8}}, UnsupportedError, "expert_count"),
        ({"keys": {"rope.dimension_count": 4}}, UnsupportedError, "dimension_count"),
        (
            {"extra": [("rope_freqs.weight", np.ones(5, np.float32))]},
            CheckpointError,
            "rope_freqs.weight",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, error, words, tmp_path):
    path = tmp_path / "x.gguf"
    write_model(path, **changes)
    with pytest.raises(error) as caught:
        gguf_config(GgufFile(path))
    assert_plain(caught.value, path, words)


def test_an_unknown_architecture_names_the_known_ones(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw([key("general.architecture", STRING, text("qwen22"))]))
    with pytest.raises(UnsupportedError) as caught:
        gguf_config(GgufFile(path))
    assert_plain(caught.value, path, "llama, qwen2, qwen3")
    assert "qwen2" in caught.value.hint


def test_a_missing_tensor_is_named(tmp_path):
    path = tmp_path / "x.gguf"
    write_model(path, keys={"block_count": LAYERS + 1})
    file = GgufFile(path)
    config = gguf_config(file)
    with pytest.raises(CheckpointError, match=r"blk\.2\.attn_norm\.weight"):
        read_as(file, config, "model.layers.2.input_layernorm.weight")
    with pytest.raises(CheckpointError, match=r"no tensor `model\.layers\.9\."):
        read_as(file, config, "model.layers.9.input_layernorm.weight")
    wrong = config.model_copy(update={"num_attention_heads": 2 * HEADS})
    with pytest.raises(CheckpointError, match=r"attn_q\.weight` has 24 rows, expected 8 heads"):
        read_as(file, wrong, "model.layers.0.self_attn.q_proj.weight")


# ---- hostile files ---------------------------------------------------------------------------

HUGE = (1 << 64) - 1
HOSTILE = {
    "empty": (b"", "empty"),
    "not gguf": (b"PK\3\4" + b"\0" * 60, "not a GGUF"),
    "pickle": (b"\x80\x04cos\nsystem\n", "not a GGUF"),
    "magic alone": (b"GGUF", "truncated"),
    "version 1": (raw(version=1), "version 1"),
    "version 4": (raw(version=4), "version 4"),
    "big endian": (raw(version=3 << 24), "big endian"),
    "header cut": (raw()[:20], "truncated"),
    "1e9 tensors": (raw(counts=(10**9, 0)), "number of tensors"),
    "1e9 keys": (raw(counts=(0, 10**9)), "number of keys"),
    "more tensors than bytes": (raw(counts=(200_000, 0)), "truncated|dimension"),
    "key of 2^64 bytes": (raw([struct.pack("<Q", HUGE)]), "length of the name"),
    "key past the end": (raw([struct.pack("<Q", 4000)]), "truncated"),
    "key not UTF-8": (raw([key(b"\xff\xfe", U32, b"\0" * 4)]), "UTF-8"),
    "key twice": (raw([key("a", U32, b"\0" * 4)] * 2), "twice"),
    "key type": (raw([key("a", 77, b"")]), "value type 77"),
    "bool of 2": (raw([key("a", 7, b"\2")]), "bool of value 2"),
    "string of 2^40": (raw([key("a", STRING, struct.pack("<Q", 1 << 40))]), "length of key 'a'"),
    "array of 2^60": (raw([key("a", ARRAY, struct.pack("<IQ", U32, 1 << 60))]), "length of key"),
    "array past the end": (raw([key("a", ARRAY, struct.pack("<IQ", U32, 9999))]), "truncated"),
    "strings past the end": (
        raw([key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 20))]),
        "claims 1048576 strings",
    ),
    "one string too long": (
        raw([key("a", ARRAY, struct.pack("<IQQ", STRING, 1, HUGE))]),
        "past the end",
    ),
    "string array not UTF-8": (
        raw([key("a", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff"))]),
        "item 0 of key 'a' is not UTF-8",
    ),
    "array of arrays": (raw([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "array of arrays"),
    "alignment 0": (raw([key("general.alignment", U32, struct.pack("<I", 0))]), "alignment"),
    "alignment 48": (raw([key("general.alignment", U32, struct.pack("<I", 48))]), "alignment"),
    "alignment is text": (raw([key("general.alignment", STRING, text("32"))]), "alignment"),
    "name not UTF-8": (raw(tensors=[info(b"\xff")]), "UTF-8"),
    "name twice": (raw(tensors=[info(offset=0), info(offset=128)]), "'w' appears twice"),
    "9 dimensions": (raw(tensors=[info(dims=(1,) * 9)]), "dimensions of tensor 'w'"),
    "no dimensions": (raw(tensors=[info(dims=())]), "'w' has dimensions"),
    "dimension 0": (raw(tensors=[info(dims=(32, 0))]), "'w' has dimensions"),
    "dimensions overflow": (raw(tensors=[info(dims=(1 << 33, 1 << 33))]), "'w' has dimensions"),
    "data cut": (raw(tensors=[info(dims=(32, 1000))]), "'w' ends at byte"),
    "offset far away": (raw(tensors=[info(offset=1 << 62)]), "'w' ends at byte"),
    "offset unaligned": (raw(tensors=[info(offset=8)]), "'w' has offset 8"),
    "overlap": (raw(tensors=[info("a", offset=0), info("b", offset=64)]), "'b' overlaps .*'a'"),
    "half a block": (raw(tensors=[info(dims=(33,), kind=int(Type.Q4_0))]), "block of 32"),
    "unknown type": (raw(tensors=[info(kind=999)]), "'w' has type 999"),
    "retired type": (raw(tensors=[info(kind=4)]), "'w' has type 4"),
}


def assert_plain(error, path, words):
    """One line that names the file and says what is wrong."""
    message = str(error)
    assert "\n" not in message
    assert len(message) < 500
    assert str(path) in message
    assert re.search(words, message), message


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_at_once_and_cheaply(name, tmp_path):
    data, words = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        GgufFile(path)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_plain(caught.value, path, words)
    assert seconds < 1
    assert peak < 4 << 20


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.gguf: No such file"):
        GgufFile(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError, match="directory"):
        GgufFile(tmp_path)


def test_a_type_that_cannot_be_dequantised_is_named_when_it_is_read(tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[Type.Q8_K]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw(tensors=[info(dims=(block,), kind=int(Type.Q8_K))], data=b"\0" * size))
    with pytest.raises(UnsupportedError) as caught:
        GgufFile(path).read("w")
    assert_plain(caught.value, path, "`w` has type Q8_K")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path)
    return path.read_bytes()


def complaint(path: Path):
    """What is said of a file when everything in it is read; nothing if it is sound."""
    try:
        file = GgufFile(path)
        for name in file.tensors:
            file.read(name)
        config = gguf_config(file)
        for name in gguf_tensor_map(config):
            read_as(file, config, name)
    except RespikeError as error:
        return str(error)
    return ""


FUZZ = settings(
    max_examples=150,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(cut=st.integers(0, 3000), flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 7))))
def test_flipped_bits_and_cuts_never_raise_anything_but_our_errors(cut, flips, tiny, tmp_path):
    data = bytearray(tiny if cut % 2 else tiny[:cut])
    for at, bit in flips:
        if at < len(data):
            data[at] ^= 1 << bit
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert "\n" not in complaint(path)


@FUZZ
@given(at=st.integers(4, 3000), value=st.integers(0, HUGE), width=st.sampled_from(["<I", "<Q"]))
def test_any_number_in_the_header_may_be_anything(at, value, width, tiny, tmp_path):
    data = bytearray(tiny)
    struct.pack_into(width, data, at, value % (1 << (8 * struct.calcsize(width))))
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert "\n" not in complaint(path)


REAL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.gguf"


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not in models/; run make demo")
def test_the_real_smollm2_opens_at_once():
    began = time.perf_counter()
    file = GgufFile(REAL)
    assert time.perf_counter() - began < 0.5
    config = gguf_config(file)
    assert set(gguf_tensor_map(config).values()) == set(file.tensors)
    assert read_as(file, config, "model.norm.weight").shape == (576,)
