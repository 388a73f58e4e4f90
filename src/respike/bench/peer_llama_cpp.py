"""llama.cpp in a process of its own, through llama-cpp-python: see `respike.bench.child`.

The package's plain bindings reach what a fair comparison needs: batches, flash attention, cache
types, logits, requantising. (The wheel of xllamacpp has a server only, compiled for AVX2.)
Nothing of respike is imported here: the peer may live in another environment.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
"""Their numbers in ggml."""
FILE_TYPES = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_m": 12,
    "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
WARM_UP_TOKENS = 512

Job = Mapping[str, Any]


def prepare(job: Job) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """What the model is, and the task."""
    import llama_cpp as api

    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    keep = {"quiet": quiet}  # ctypes frees what nobody holds
    about = {
        "version": version("llama-cpp-python"),
        "system": api.llama_print_system_info().decode(),
    }
    if job["task"] == "version":
        return about, lambda: keep and {}
    if job["task"] == "quantize":
        return about, lambda: keep and quantize(api, job)
    model = api.llama_model_load_from_file(job["path"].encode(), api.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {job['path']}")
    about |= {
        "weight_bytes": api.llama_model_size(model),
        "parameters": api.llama_model_n_params(model),
    }
    run = {"measure": measure, "logits": logits}[job["task"]]
    return about, lambda: keep and run(api, model, job)


def context_of(api: Any, model: Any, job: Job, num_tokens: int) -> Any:
    """A context with the job's settings and room for ``num_tokens``."""
    params = api.llama_context_default_params()
    params.n_ctx = num_tokens
    params.n_batch = min(num_tokens, 2048)
    params.n_ubatch = min(num_tokens, 512)
    params.n_threads = params.n_threads_batch = job["threads"]
    params.flash_attn_type = int(job["flash"])
    params.type_k = params.type_v = CACHE_TYPES[job["cache"]]
    context = api.llama_init_from_model(model, params)
    if not context:
        flash = "on" if job["flash"] else "off"
        raise RuntimeError(
            f"llama.cpp makes no context with flash attention {flash} and a {job['cache']} cache"
        )
    return context


def feed(api: Any, context: Any, ids: array[int], *, begin: int, every: bool = False) -> None:
    """Run a batch; logits of its last token, or of every one."""
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i] = token
        batch.pos[i] = begin + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = every or i == len(ids) - 1
    code = api.llama_decode(context, batch)
    api.llama_batch_free(batch)
    if code:
        raise RuntimeError(f"llama_decode failed with code {code}")


def best(api: Any, context: Any, vocab_size: int) -> int:
    """The most likely next token."""
    import numpy

    row = api.llama_get_logits_ith(context, -1)
    return int(numpy.ctypeslib.as_array(row, shape=(vocab_size,)).argmax())


def measure(api: Any, model: Any, job: Job) -> dict[str, Any]:
    """The same as `respike.bench.ours.measure`."""
    tokens = array("i", Path(job["tokens_file"]).read_bytes())
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    context = context_of(api, model, job, len(tokens) + job["decode_tokens"] + 2)
    warm = tokens[-WARM_UP_TOKENS:][::-1]
    feed(api, context, warm, begin=0)
    feed(api, context, warm[:1], begin=len(warm))
    api.llama_memory_clear(api.llama_get_memory(context), True)
    start = time.perf_counter()
    for begin in range(0, len(tokens), 2048):
        feed(api, context, tokens[begin : begin + 2048], begin=begin)
    token = best(api, context, size)
    first = time.perf_counter()
    state_bytes = api.llama_state_get_size(context)
    timed = first
    for step in range(job["decode_tokens"] + 1):
        if step == 1:
            timed = time.perf_counter()
        feed(api, context, array("i", [token]), begin=len(tokens) + step)
        token = best(api, context, size)
    end = time.perf_counter()
    return {
        "ttft_seconds": first - start,
        "decode_seconds": end - timed,
        "state_bytes": state_bytes,
    }


def logits(api: Any, model: Any, job: Job) -> dict[str, Any]:
    """Logits of every token of the prompt, float32, written to a file."""
    import numpy

    tokens = array("i", Path(job["tokens_file"]).read_bytes())
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    context = context_of(api, model, job, len(tokens))
    feed(api, context, tokens, begin=0, every=True)
    found = numpy.ctypeslib.as_array(api.llama_get_logits(context), shape=(len(tokens), size))
    Path(job["logits_file"]).write_bytes(found.astype(numpy.float32).tobytes())
    return {"vocab_size": size}


def quantize(api: Any, job: Job) -> dict[str, Any]:
    """Write the model with other weights; those that are quantised already are rounded again."""
    params = api.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[job["kind"]]
    params.nthread = job["threads"]
    params.allow_requantize = True
    params.pure = True
    code = api.llama_model_quantize(job["path"].encode(), job["out"].encode(), ctypes.byref(params))
    if code:
        raise RuntimeError(f"llama.cpp cannot write {job['path']} as {job['kind']}")
    return {}
