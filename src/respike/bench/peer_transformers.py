"""transformers in a process of its own (bf16, sdpa): see `respike.bench.child`.

Nothing of respike is imported here: the peer may live in another environment.
"""

import logging
import time
from array import array
from collections.abc import Callable, Mapping
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

WARM_UP_TOKENS = 512

Job = Mapping[str, Any]


def prepare(job: Job) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """What the model is, and the task."""
    import torch
    import transformers

    about: dict[str, Any] = {"version": version("transformers")}
    if job["path"].endswith(".gguf"):
        about["accelerate"] = version("accelerate")  # without it transformers reads no GGUF
    if job["task"] == "version":
        return about, dict
    logging.disable(logging.WARNING)
    torch.set_num_threads(job["threads"])
    path = Path(job["path"])
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )
    model.eval()
    weights = {p.data_ptr(): p.nbytes for p in model.parameters()}
    about["weight_bytes"] = sum(weights.values())
    run = {"measure": measure, "logits": logits}[job["task"]]
    return about, lambda: run(model, job)


def tokens_of(job: Job) -> Any:
    """The prompt (1, T)."""
    import torch

    ids = array("i", Path(job["tokens_file"]).read_bytes())
    return torch.tensor(ids, dtype=torch.int64)[None]


def step(model: Any, tokens: Any, cache: Any) -> tuple[Any, Any]:
    """The most likely next token (1, 1), and the cache."""
    # transformers 5.24 has another word for it, and warns of the old one.
    word = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    out = model(tokens, **{word: cache}, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


def measure(model: Any, job: Job) -> dict[str, Any]:
    """The same as `respike.bench.ours.measure`."""
    import torch

    tokens = tokens_of(job)
    with torch.inference_mode():
        warm = tokens[:, -WARM_UP_TOKENS:].flip(1)
        _, warmed = step(model, warm, None)
        step(model, warm[:, :1], warmed)
        del warmed
        start = time.perf_counter()
        token, cache = step(model, tokens, None)  # in one pass: its fastest way
        first = time.perf_counter()
        config, length = model.config, tokens.shape[1]
        head = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        pairs = 2 * config.num_hidden_layers * config.num_key_value_heads
        state_bytes = pairs * head * length * next(model.parameters()).element_size()
        begin = first
        for number in range(job["decode_tokens"] + 1):
            if number == 1:
                begin = time.perf_counter()
            token, cache = step(model, token, cache)
        end = time.perf_counter()
    return {
        "ttft_seconds": first - start,
        "decode_seconds": end - begin,
        "state_bytes": state_bytes,
    }


def logits(model: Any, job: Job) -> dict[str, Any]:
    """Logits of every token of the prompt, float32, written to a file."""
    import torch

    with torch.inference_mode():
        found = model(tokens_of(job)).logits[0].float().contiguous()
    Path(job["logits_file"]).write_bytes(found.numpy().tobytes())
    return {"vocab_size": found.shape[1]}
