"""Our decoder against transformers, on the same random weights: same tokens, same logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from respike.checkpoint import open_checkpoint
from respike.errors import UnsupportedError
from respike.loading import load_decoder
from tiny import (
    LINEAR_ROPE,
    LLAMA3_ROPE,
    random_tokens,
    save_tiny,
    their_logits,
    write_gguf,
)
from tolerance import assert_close

B, T = 2, 61
LARGEST_DIFFERENCE = 1e-4  # of a logit, in float32: what the project promises

SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with llama3 rope": ("llama", {"rope": LLAMA3_ROPE}),
    "llama with linear rope": ("llama", {"rope": LINEAR_ROPE}),
    "llama of wide heads": ("llama", {"head_dim": 20}),
    "qwen2 tied": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, base 1e6": ("qwen3", {"tie_word_embeddings": True, "rope": {"rope_theta": 1e6}}),
}
FOLDERS_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("llama", {"attention_bias": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "qwen2 sliding in layers 2 and 3": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3 sliding everywhere": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            family, changes = (SOURCES | FOLDERS_ONLY)[name]
            made[name] = save_tiny(tmp_path_factory.mktemp("tiny"), family, **changes)
        return made[name]

    return make


def logits(path: Path, tokens: Tensor) -> Tensor:
    decoder = load_decoder(open_checkpoint(path), dtype="f32")
    with torch.no_grad():
        return decoder(tokens)[0]


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.5, "logits that differ too little would prove nothing"
    assert (ours - theirs).abs().max() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("name", [*SOURCES, *FOLDERS_ONLY])
def test_a_folder_gives_the_logits_of_transformers(source: Make, name: str) -> None:
    tokens = random_tokens(B, T)
    assert_same_logits(logits(source(name), tokens), their_logits(source(name), tokens))


@pytest.mark.parametrize("name", SOURCES)
def test_a_gguf_file_gives_the_logits_of_transformers(
    source: Make, name: str, tmp_path: Path
) -> None:
    tokens = random_tokens(B, T)
    path = write_gguf(tmp_path / "tiny.gguf", source(name))
    assert_same_logits(logits(path, tokens), their_logits(source(name), tokens))


def test_a_gguf_file_with_an_output_bias_is_refused(source: Make, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source("llama with biases"))
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_output\.bias"):
        open_checkpoint(path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_sharded_folder_gives_the_bits_of_a_single_file(family: str, tmp_path: Path) -> None:
    tokens = random_tokens(B, T)
    single = save_tiny(tmp_path / "single", family)
    sharded = save_tiny(tmp_path / "sharded", family, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(sharded, tokens), logits(single, tokens))


def test_decoding_token_by_token_gives_the_logits_of_transformers(source: Make) -> None:
    tokens = random_tokens(B, T)
    for name in ("llama with llama3 rope", "qwen2 sliding in layers 2 and 3", "qwen3"):
        decoder = load_decoder(open_checkpoint(source(name)), dtype="f32")
        state, steps = decoder.init_state(B), []
        with torch.no_grad():
            for t in range(T):
                out, state = decoder(tokens[:, t : t + 1], state)
                steps.append(out)
        assert_same_logits(torch.cat(steps, 1), their_logits(source(name), tokens))


def test_a_window_matters_in_the_sliding_sources(source: Make) -> None:
    """The sliding sources above would prove nothing if their windows held every token."""
    config = open_checkpoint(source("qwen2 sliding in layers 2 and 3")).config
    assert [part.mixer for _, part in config.mixers()] == ["full", "full", "window", "window"]
    assert all(part.window_tokens == 7 < T for _, part in config.mixers() if part.mixer == "window")


def test_sliding_layers_are_counted_when_an_older_config_does_not_list_them(
    source: Make, tmp_path: Path
) -> None:
    listed = source("qwen2 sliding in layers 2 and 3")
    raw = json.loads((listed / "config.json").read_text(encoding="utf-8"))
    assert raw.pop("layer_types")[1:3] == ["full_attention", "sliding_attention"]
    assert raw["max_window_layers"] == 2
    older = Path(shutil.copytree(listed, tmp_path / "older"))
    (older / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert open_checkpoint(older).config == open_checkpoint(listed).config


def test_a_bf16_folder_is_read_as_bf16(tmp_path: Path) -> None:
    import transformers

    folder = save_tiny(tmp_path / "f32", "qwen2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    tokens = random_tokens(B, T)
    decoder = load_decoder(open_checkpoint(tmp_path / "bf16"))
    with torch.no_grad():
        ours = decoder(tokens)[0]
        theirs = model.float()(tokens).logits
        widened = load_decoder(open_checkpoint(tmp_path / "bf16"), dtype="f32")(tokens)[0]
    assert ours.dtype == torch.bfloat16
    assert_same_logits(widened, theirs)
    assert_close(widened, theirs)
