"""No speed of a wrong result: what must hold before any figure is printed.

Every native kernel against its definition on small odd shapes, here and now; a small model with
the mixers of the one to be measured, native against torch, prefill and decode; and, for a peer, our
engine on the very weights the peer runs.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from respike.bench.shapes import RandomCheckpoint
from respike.config import ModelConfig
from respike.errors import BackendError
from respike.loading import fast_decoder
from respike.models.decoder import Decoder
from respike.ops import backends
from respike.ops.gated import swiglu, swiglu_definition
from respike.ops.linear import packed_linear, packed_linear_definition
from respike.ops.norm import add_rms_norm, add_rms_norm_definition, rms_norm, rms_norm_definition
from respike.ops.packed import pack
from respike.ops.rotary import rotary_tables, rotate, rotate_definition
from respike.ops.tolerance import TOLERANCES, differences
from respike.recipe import load_recipe

Pair = tuple[Tensor, Tensor]

MAX_MODEL_RMS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative RMS of a small model's logits: rounding in many layers adds up to less, a wrong kernel
to much more. (The tests hold each kernel to the tolerance table.)"""
MAX_KL_NATS = 0.05
"""Between our engine and a peer on the same weights; peers round activations to 8 bits."""
SURE_NATS = 1.0
"""Where our first choice leads by more than this, a peer must choose the same."""
LAYERS = 6
DECODED = 3


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _norm(dtype: torch.dtype) -> Pair:
    x, weight = _random(5, 75).to(dtype), _random(75).to(dtype)
    return rms_norm(x, weight, 1e-5), rms_norm_definition(x, weight, 1e-5)


def _add_norm(dtype: torch.dtype) -> Pair:
    x, before, weight = _random(5, 75).to(dtype), _random(1, 5, 75)[0].to(dtype), _random(75)
    weight = weight.to(dtype)
    got = add_rms_norm(x, before, weight, 1e-5)
    return torch.cat(got), torch.cat(add_rms_norm_definition(x, before, weight, 1e-5))


def _swiglu(dtype: torch.dtype) -> Pair:
    gate, up = _random(5, 75).to(dtype), _random(1, 5, 75)[0].to(dtype)
    return swiglu(gate, up), swiglu_definition(gate, up)


def _rotate(dtype: torch.dtype) -> Pair:
    x = _random(1, 5, 3, 14).to(dtype)
    tables = rotary_tables(torch.arange(1000, 1005)[None], torch.linspace(0.01, 1, 7).double())
    return rotate(x, *tables), rotate_definition(x, *tables)


def _packed_linear(dtype: torch.dtype) -> Pair:
    weight, outputs = _random(75, 70), []
    for kind in ("bf16", "int8", "int4"):
        packed = pack(weight, kind, search=False)
        for rows in (1, 9):
            x = _random(rows, 70).to(dtype)
            outputs.append((packed_linear(x, packed), packed_linear_definition(x, packed)))
    got, expected = (torch.cat(part) for part in zip(*outputs, strict=True))
    return got, expected


CHECKS: dict[str, Callable[[torch.dtype], Pair]] = {
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "swiglu": _swiglu,
    "rotate": _rotate,
    "packed_linear": _packed_linear,
}
"""Native op -> (what it gives, what its definition gives). Others are covered by `check_model`."""


def check_kernels() -> list[str]:
    """Compare every kernel with its definition; returns the ops compared.

    Raises:
        BackendError: One differs by more than the tolerance table allows.
    """
    if backends.kernels() is None:
        return []
    for op, check in CHECKS.items():
        for dtype in backends.NATIVE_OPS[op]:
            allowed, got = TOLERANCES[dtype], differences(*check(dtype))
            if not (got.rms <= allowed.rms and got.max <= allowed.max):  # also if NaN
                raise BackendError(
                    f"no speed is printed: kernel {op} ({dtype}) differs from its definition by "
                    f"{got.rms:.2g} relative RMS, {allowed.rms:g} allowed",
                    hint="RESPIKE_BACKEND=torch runs without kernels; please report this",
                )
    return list(CHECKS)


def check_model(config: ModelConfig) -> float | None:
    """Compare native with torch on a small model with ``config``'s mixers.

    Returns:
        The largest relative RMS of logits, or None if there are no native kernels.

    Raises:
        BackendError: They differ.
    """
    if backends.kernels() is None:
        return None
    small = narrowed(config)
    largest = 0.0
    for dtype, most in MAX_MODEL_RMS.items():
        found = _logits(small, dtype)
        with torch_only():
            expected = _logits(small, dtype)
        rms = differences(found, expected).rms
        if not rms <= most:
            raise BackendError(
                f"no speed is printed: native kernels and torch differ by {rms:.2g} relative RMS "
                f"in the logits of a small model of this kind ({dtype}), {most:g} allowed",
                hint="RESPIKE_BACKEND=torch runs without kernels; please report this",
            )
        largest = max(largest, rms)
    return largest


def narrowed(config: ModelConfig) -> ModelConfig:
    """A few layers, each with other mixers, of the same heads, narrow everywhere else."""
    layers = tuple(dict.fromkeys(config.layers))[:LAYERS]
    return config.model_copy(
        update={
            "layers": layers,
            "num_hidden_layers": len(layers),
            "vocab_size": 101,
            "hidden_size": min(config.hidden_size, 96),
            "intermediate_size": min(config.intermediate_size, 120),
        }
    )


def _logits(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Of a prompt longer than any window but huge ones, and of a few steps after it."""
    source = RandomCheckpoint(config, load_recipe("constant"), dtype, spread=0.1)
    decoder = fast_decoder(source)
    windows = [part.window_tokens for _, part in config.mixers() if part.mixer == "window"]
    length = min(2 * max(windows, default=64) + 37, 1100)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (1, length), generator=draw)
    return _run(decoder, tokens)


def _run(decoder: Decoder, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits, state = decoder(tokens[:, :-DECODED])
        found = [logits[0]]
        for token in tokens[0, -DECODED:]:
            logits, state = decoder(token.view(1, 1), state)
            found.append(logits[0])
    return torch.cat(found)


@contextmanager
def torch_only() -> Iterator[None]:
    """Every op runs as torch until the end of the block."""
    before = os.environ.get("RESPIKE_BACKEND")
    os.environ["RESPIKE_BACKEND"] = "torch"
    backends.kernels.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ["RESPIKE_BACKEND"]
        else:
            os.environ["RESPIKE_BACKEND"] = before
        backends.kernels.cache_clear()


def check_peer(peer: str, ours: Tensor, theirs: Tensor) -> Mapping[str, float]:
    """Compare logits (T, V) of a prompt by our engine and by a peer, on the same weights.

    Returns:
        Mean KL in nats, and the share of tokens that both rank first.

    Raises:
        BackendError: They are not the same model.
    """
    if ours.shape != theirs.shape:
        raise BackendError(
            f"no speed is printed: {peer} has {theirs.shape[1]} tokens in its vocabulary, "
            f"we have {ours.shape[1]}"
        )
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    first, second = p.topk(2, -1).values.unbind(-1)
    same = p.argmax(-1) == q.argmax(-1)
    wrong = int((~same & (first - second > SURE_NATS)).sum())
    if not kl <= MAX_KL_NATS or wrong:
        raise BackendError(
            f"no speed is printed: on the original weights {peer} is {kl:.3g} nats from our engine "
            f"({MAX_KL_NATS:g} allowed) and chooses otherwise at {wrong} of {len(p)} sure tokens",
            hint="either one is wrong: compare greedy outputs before any speed",
        )
    return {"kl_nats": kl, "agreement_frac": float(same.double().mean())}
