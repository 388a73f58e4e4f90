"""Our engine in a process of its own: see `respike.bench.child` for how it is talked to.

A job names a ``task``, the ``threads``, and a ``model``: the ``path`` of one, or the ``shape`` and
``recipe`` of one with random weights.
"""

import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WARM_UP_TOKENS = 512
"""The first call of a kernel, a thread or a buffer is slow once in the life of a process."""

Job = Mapping[str, Any]


def prepare(job: Job) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """What the model is, and the task."""
    marks = {"interpreter, imports": time.time()}
    from respike.device import set_threads

    set_threads(job["threads"])
    if job["task"] == "cold":
        import respike.generation  # noqa: F401 - what `respike generate` imports

        marks["interpreter, imports"] = time.time()
        model = load_model(job["model"])
        marks["load"] = time.time()
        return facts(model.decoder), lambda: cold(model, job, marks)
    if job["task"] == "quality":
        from respike.bench.quality import quality

        return {}, lambda: quality(job)
    decoder = load_decoder_of(job["model"])
    run = {"measure": measure, "logits": logits}[job["task"]]
    return facts(decoder), lambda: run(decoder, job)


def load_options(spec: Job) -> dict[str, Any]:
    """Of `respike.load`, as the command line gave them."""
    return {"dtype": spec.get("dtype"), "weights": spec.get("weights") or "stored"}


def load_model(spec: Job) -> Any:
    """The `respike.Model` at a path."""
    from respike.loading import load

    return load(spec["path"], **load_options(spec))


def load_decoder_of(spec: Job) -> Any:
    """Its decoder, or that of a shape with random weights."""
    if spec.get("shape") is None:
        return load_model(spec).decoder
    from respike.bench.shapes import random_checkpoint, shape_config
    from respike.loading import fast_decoder
    from respike.recipe import Recipe

    recipe = Recipe.model_validate(spec["recipe"])
    return fast_decoder(
        random_checkpoint(shape_config(spec["shape"]), recipe), **load_options(spec)
    )


def facts(decoder: Any) -> dict[str, Any]:
    """What the model is, and the bytes of weights that one decoding step reads."""
    from respike.account import num_parameters, state_parts
    from respike.device import dtype_name
    from respike.layers.linear import PackedLinear

    config = decoder.config
    dtype = dtype_name(decoder.embedding.dtype)
    packed = [m.packed.nbytes for m in decoder.modules() if isinstance(m, PackedLinear)]
    weights = sum(packed) or num_parameters(config) * decoder.embedding.element_size()
    looked_up = 0
    if not packed and not config.tie_word_embeddings:
        looked_up = decoder.embedding.nbytes
    return {
        "dtype": dtype,
        "engine": "torch" if decoder.engine is None else "native",
        "weight_bytes": weights,
        "step_weight_bytes": weights - looked_up,
        "memory_bytes": state_parts(config, 0)["memory"],
        "kv_groups": config.num_hidden_layers * config.num_key_value_heads,
        "softmax_groups": len(config.softmax_groups()),
        "trained_tokens": config.max_position_embeddings,
    }


def tokens_of(job: Job) -> Any:
    """The prompt (1, T)."""
    import torch

    ids = array("i", Path(job["tokens_file"]).read_bytes())
    return torch.tensor(ids, dtype=torch.int64)[None]


def measure(decoder: Any, job: Job) -> dict[str, Any]:
    """Prefill to the first chosen token, then decode at that depth.

    One decoding step before the timed ones is not counted: it is where a growing cache makes
    room, once in a quarter of its length.
    """
    import torch

    from respike.account import unseen_bytes

    tokens = tokens_of(job)
    with torch.inference_mode():
        warm = tokens[:, -WARM_UP_TOKENS:].flip(1)
        _, state = decoder(warm, logits="last")
        decoder(warm[:, :1], state, logits="last")
        del state
        start = time.perf_counter()
        scores, state = decoder(tokens, logits="last")
        token = scores[:, 0].argmax(-1, keepdim=True)
        first = time.perf_counter()
        state_bytes = state.nbytes()
        size = decoder.embedding.element_size()
        unseen = unseen_bytes(decoder.config, tokens.shape[1], size)
        begin = first
        for step in range(job["decode_tokens"] + 1):
            if step == 1:
                begin = time.perf_counter()
            scores, state = decoder(token, state, logits="last")
            token = scores[:, 0].argmax(-1, keepdim=True)
        end = time.perf_counter()
    return {
        "ttft_seconds": first - start,
        "decode_seconds": end - begin,
        "state_bytes": state_bytes,
        "step_state_bytes": state_bytes - unseen,
    }


def logits(decoder: Any, job: Job) -> dict[str, Any]:
    """Logits of every token of the prompt, float32, written to a file."""
    import torch

    with torch.inference_mode():
        found = decoder(tokens_of(job))[0][0].float().contiguous()
    Path(job["logits_file"]).write_bytes(found.numpy().tobytes())
    return {"vocab_size": found.shape[1]}


def cold(model: Any, job: Job, marks: dict[str, float]) -> dict[str, Any]:
    """Seconds of each step from the start of the process to the text of a first token."""
    import torch

    tokens = tokens_of(job)
    with torch.inference_mode():
        scores, state = model.decoder(tokens[:, :-1], logits="none")
        marks["prefill"] = time.time()
        scores, _ = model.decoder(tokens[:, -1:], state, logits="last")
        text = model.tokenizer.decode([int(scores[0, 0].argmax())])
    marks["first token"] = time.time()
    return {"marks": marks, "text": text}
