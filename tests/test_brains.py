"""The parts of SpikingBrain's own models, each against its words in float64.

Sparse state expansion as a layer, an attention beside another, experts, learned sinks.
Letters: B batch, T tokens, D model width, H query heads, G KV groups, K head dim.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import tiny
from mixers import CUTS, Array, double, in_spans, mixer_inputs, normal, randomise
from respike.config import LayerConfig, ModelConfig
from respike.layers.beside import Beside
from respike.layers.memory import Linear
from respike.layers.moe import ExpertMLP
from respike.layers.sse import SparseDelta
from respike.models.balance import watch_balance
from respike.models.decoder import Decoder
from respike.models.packing import pack_decoder
from respike.ops.backends import native_status
from tiny import full, model_config, random_decoder, random_tokens, window
from tolerance import assert_close

B, T, D, G, R, K = 2, 29, 14, 3, 2, 10  # B, D, G, K: of mixers.py
EPS = 1e-3


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def unit(x: Array) -> Array:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def normed(x: Array, weight: Tensor) -> Array:
    return double(weight) * x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


# ---- sparse state expansion ------------------------------------------------------------------

N, C = 4, 2


def sse_mixer(*, corrected: bool) -> Linear:
    memory = SparseDelta(
        hidden_size=D, num_heads=G * R, num_groups=G, head_dim=K, partitions=N, chosen=C, rank=4,
        corrected=corrected,
    )  # fmt: skip
    mixer = Linear(memory, K, EPS)
    randomise(mixer)
    return mixer


def sse_in_words(mixer: Linear, inputs: tuple[Array, ...], *, corrected: bool) -> Array:
    """One sequence, as the released forward is written, in heads and partitions one by one."""
    x, q, k, v = inputs
    w = {n: double(p) for n, p in mixer.memory.named_parameters()}
    S, out = np.zeros((1 + N, G, K, K)), np.zeros(q.shape)
    for t in range(len(x)):
        q2 = q[t] + (w["q_up.weight"] @ (w["q_down.weight"] @ x[t])).reshape(G * R, K)
        k2 = k[t] + (w["k_up.weight"] @ (w["k_down.weight"] @ x[t])).reshape(G, K)
        e = w["router.weight"] @ x[t]
        eta = np.exp(e) / np.exp(e).sum()
        step = np.log1p(np.exp(w["a_proj.weight"] @ x[t] + w["dt_bias"]))
        alpha, beta = np.exp(-np.exp(w["A_log"]) * step), sigmoid(w["b_proj.weight"] @ x[t])
        visits = [(0, silu(q[t]), silu(k[t]), 0)]
        visits += [(1 + n, silu(q2), silu(k2), G) for n in np.argsort(-eta)[:C]]
        for p, queries, keys, offset in visits:
            share = eta[p - 1] if p else 1.0
            queries, keys = (
                (share * unit(z) if corrected else unit(share * z)) for z in (queries, keys)
            )
            for g in range(G):
                M, key = alpha[offset + g] * S[p, g], keys[g]
                S[p, g] = M + np.outer(key, beta[offset + g] * (silu(v[t, g]) - M.T @ key))
                for h in range(g * R, (g + 1) * R):
                    out[t, h] += S[p, g].T @ queries[h] / math.sqrt(K)
    return normed(out, mixer.norm.weight)


@pytest.mark.parametrize("corrected", [False, True], ids=["released", "corrected"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_sparse_expansion_does_what_the_released_code_says(
    cuts: list[int], corrected: bool
) -> None:
    mixer, inputs = sse_mixer(corrected=corrected), mixer_inputs(T, G * R)
    got, state = in_spans(mixer, inputs, cuts)
    for b in range(B):
        words = sse_in_words(mixer, tuple(double(z[b]) for z in inputs), corrected=corrected)
        assert_close(got[b], torch.from_numpy(words).float())
    assert state.nbytes(T) == 4 * (1 + N) * G * K * K


# ---- an attention beside another -------------------------------------------------------------


def beside_layer(*, mean: bool, dropout: float = 0.0) -> tuple[Decoder, ModelConfig]:
    side = tiny.beside(
        tiny.linear(1, memory=tiny.TIED), tiny.linear(0, memory=tiny.SSE),
        merge="mean" if mean else "sum", dropout=dropout,
    )  # fmt: skip
    layer = LayerConfig(mixers=(window(0, 1, 2, sinks=0),), beside=side)
    config = model_config([layer], qkv_bias=True, rms_norm_eps=EPS)
    return random_decoder(config), config


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@torch.no_grad()
def test_outputs_are_normed_over_the_width_and_merged(mean: bool) -> None:
    decoder, _ = beside_layer(mean=mean)
    layer = decoder.layers[0]
    assert isinstance(layer.beside, Beside)
    x, state = normal(B, T, 48), decoder.init_state(B)
    span = decoder.span(state, T)
    own, other = layer.self_attn.init_state(B, x), layer.beside.init_state(B, x)
    near, _ = layer.self_attn(x, span, own)
    far, _ = layer.beside(x, span, other)
    got, _ = layer.beside.merged(layer.self_attn, x, span, layer.init_state(B, x))
    words = normed(double(near), layer.beside.softmax_norm.weight)
    words = words + normed(double(far), layer.beside.memory_norm.weight)
    assert_close(got, torch.from_numpy(words / 2 if mean else words).float())


def test_training_leaves_the_softmax_out_now_and_then_and_keeps_its_state() -> None:
    decoder, _ = beside_layer(mean=True, dropout=0.5)
    decoder.requires_grad_(True).train()
    layer = decoder.layers[0]
    assert isinstance(layer.beside, Beside)
    x, span = normal(B, T, 48), decoder.span(decoder.init_state(B), T)
    far, _ = layer.beside(x, span, layer.beside.init_state(B, x))
    alone, seen = layer.beside.memory_norm(far), set()
    for _ in range(16):
        got, after = layer.beside.merged(layer.self_attn, x, span, layer.init_state(B, x))
        left_out = torch.equal(got, alone)
        seen.add(left_out)
        grad = torch.autograd.grad(got.sum(), layer.self_attn.v_proj.weight, allow_unused=True)[0]
        assert (grad is None) == left_out
        assert after[0].tensors(T)["k"].abs().sum() > 0
    assert seen == {False, True}
    decoder.eval()
    got, _ = layer.beside.merged(layer.self_attn, x, span, layer.init_state(B, x))
    assert not torch.equal(got, alone)


# ---- experts ---------------------------------------------------------------------------------


def moe_in_words(mlp: ExpertMLP, x: Array, router: str, normalised: bool) -> Array:
    out = np.zeros_like(x)

    def expert(module: torch.nn.Module, row: Array) -> Array:
        w = {n: double(p) for n, p in module.named_parameters()}
        inner = silu(w["gate_proj.weight"] @ row) * (w["up_proj.weight"] @ row)
        return np.asarray(w["down_proj.weight"] @ inner)

    for t, row in enumerate(x):
        logits = double(mlp.gate.weight) @ row
        shares = sigmoid(logits)
        if router == "softmax":
            shares = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-shares)[: mlp.chosen]
        gates = shares[best] / (shares[best].sum() if normalised else 1)
        for e, gate in zip(best, gates, strict=True):
            out[t] += gate * expert(mlp.experts[int(e)], row)
        for shared in mlp.shared_experts:
            out[t] += expert(shared, row)
    return out


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("chosen", "shared"), [(1, 1), (3, 2), (2, 0)])
def test_experts_do_what_their_words_say(
    router: str, normalised: bool, chosen: int, shared: int
) -> None:
    mlp = ExpertMLP(
        hidden_size=D, intermediate_size=9, experts=5, chosen=chosen, shared=shared,
        router=router, normalised=normalised,
    )  # fmt: skip
    randomise(mlp)  # type: ignore[arg-type]
    x = normal(B, T, D, seed=3)
    words = [moe_in_words(mlp, double(row), router, normalised) for row in x]
    assert_close(mlp(x), torch.from_numpy(np.stack(words)).float())
    one = torch.stack([mlp(x[:, t]) for t in range(T)], 1)
    assert_close(one, mlp(x))
    used = mlp(x[:1, :1])  # most experts get nothing
    assert_close(used, mlp(x)[:1, :1])


def test_experts_and_their_router_have_gradients() -> None:
    mlp = ExpertMLP(
        hidden_size=D, intermediate_size=9, experts=3, chosen=1, shared=1, router="softmax",
        normalised=True,
    )  # fmt: skip
    randomise(mlp)  # type: ignore[arg-type]
    out = mlp(normal(40, D, seed=3))
    grads = torch.autograd.grad((out * normal(40, D, seed=4)).sum(), list(mlp.parameters()))
    for (name, _), grad in zip(mlp.named_parameters(), grads, strict=True):
        assert grad.abs().max() > 1e-4, name


def test_balance_is_summed_over_layers_and_only_while_watched() -> None:
    decoder = random_decoder(model_config(tiny.BRAINS)).requires_grad_(True)
    with watch_balance(decoder) as balance:
        decoder(random_tokens(B, T))
        value = balance()
        # 4 choosers: partitions in layers 0 and 1, experts in layers 1 and 2.
        assert 4 * 0.9 < float(value.detach()) < 4 * 3
        value.backward()
    grads = {n: p.grad for n, p in decoder.named_parameters() if n.endswith("mlp.gate.weight")}
    assert len(grads) == 2
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())
    assert not any(getattr(m, "balances", None) for m in decoder.modules())


# ---- learned sinks ---------------------------------------------------------------------------

SINKS = 3
WITH_SINKS = (
    (full(0, 1, 2),),
    (window(0, 1, 2, tokens=6, sinks=SINKS),),
    (window(0, 2, tokens=5, sinks=4, reach=16), full(1)),
)


def sunk(**changes: object) -> Decoder:
    return random_decoder(model_config(WITH_SINKS, learned_sinks=SINKS, **changes))


@torch.no_grad()
def logits_in_words(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The whole sequence under a table of who sees whom; sinks see each other, and are seen."""
    from respike.ops.attention import attention_definition

    x = torch.cat((decoder.model.learned_sinks.expand(len(tokens), -1, -1),
                   decoder.model.embed_tokens(tokens)), 1)  # fmt: skip
    total = x.shape[1]
    p, j = torch.arange(total)[:, None], torch.arange(total)
    span = decoder.span(decoder._empty_state(len(tokens)), total)
    for layer, mixers in zip(decoder.layers, decoder.config.layers, strict=True):
        q, k, v = layer.self_attn.project(layer.input_layernorm(x))
        q, k = span.rotate(q), span.rotate(k)
        mixed = torch.zeros_like(q)
        for part in mixers.mixers:
            seen = (j <= p) | ((j < SINKS) & (p < SINKS))
            if part.mixer == "window":
                near = (p - j < part.window_tokens) | (j < part.sink_tokens)
                seen = (seen & near) | ((j < SINKS) & (p < SINKS))
            groups = list(part.groups)
            heads = [h for h in range(6) if h // 2 in groups]
            table = seen.expand(len(tokens), total, total)
            mixed[:, :, heads] = attention_definition(
                q[:, :, heads], k[:, :, groups], v[:, :, groups], table
            )
        x = layer.add_mixed(x, layer.self_attn.o_proj(mixed.flatten(2)))
    return decoder.head(x[:, SINKS:])


@torch.no_grad()
def test_learned_sinks_see_each_other_and_all_see_them() -> None:
    decoder, ids = sunk(max_position_embeddings=256), random_tokens(B, 13)
    wanted = logits_in_words(decoder, ids)
    for cuts in ([], [1, 2, 7], list(range(13))):
        state, outs = decoder.init_state(B), []
        for begin, end in itertools.pairwise([0, *(c for c in cuts if c), 13]):
            out, state = decoder(ids[:, begin:end], state, chunk_tokens=5)
            outs.append(out)
        assert_close(torch.cat(outs, 1), wanted)
        assert state.tokens_seen.tolist() == [13 + SINKS] * B
    assert_close(decoder(ids)[0], wanted)
    decoder.model.learned_sinks[1] += 0.5
    assert not torch.allclose(decoder(ids)[0][:, 0], wanted[:, 0], atol=1e-3)


def test_learned_sinks_learn_and_training_sees_what_running_does() -> None:
    decoder, ids = sunk().requires_grad_(True), random_tokens(B, 13)
    lengths = torch.tensor([13, 8])
    out, state = decoder(ids, lengths=lengths)
    with torch.no_grad():
        wanted, same = decoder(ids, lengths=lengths)
    assert torch.equal(state.tokens_seen, same.tokens_seen)
    assert_close(out[0].detach(), wanted[0])
    assert_close(out[1, :8].detach(), wanted[1, :8])
    cross_entropy(out[0], ids[0]).backward()
    grad = decoder.model.learned_sinks.grad
    assert grad is not None
    assert grad.abs().amax(1).gt(0).all()


@pytest.mark.skipif(not native_status().available, reason=native_status().reason)
@torch.no_grad()
def test_learned_sinks_with_the_engine() -> None:
    decoder, ids = sunk(), random_tokens(B, 40)
    wanted, _ = decoder(ids)
    fast = pack_decoder(sunk())
    assert_close(fast(ids)[0], wanted)


@pytest.mark.parametrize(
    ("part", "words"),
    [(window(0, 1, 2, sinks=2), "hides some"), (tiny.blocks(0, 1, 2), "block-sparse")],
    ids=["too few sinks", "blocks"],
)
def test_sinks_that_could_not_be_seen_are_refused(part: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_config([(part,)], learned_sinks=SINKS)  # type: ignore[list-item]
