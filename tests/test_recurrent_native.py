"""Linear memories at every level of the processor, against numpy in float64, token by token.

Letters: B batch, T tokens, H query heads, G KV groups, R = H / G, F prototypes, K key dim, V value
dim.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import at_level, at_torch, each_level, levels, native
from recurrent import (
    DECAYS,
    Array,
    Op,
    Result,
    assert_same,
    assert_same_gradients,
    gradients,
    in_parts,
    normal,
    steps,
    uniform,
)
from respike.ops.delta import delta, delta_definition
from respike.ops.far import Prototypes, far
from respike.ops.gla import gla, gla_definition, tied_gate
from tolerance import assert_close

pytestmark = native

LENGTHS = (1, 2, 31, 33, 64, 65, 130)
SHAPES = (
    (1, 1, 1, 3, 5),
    (2, 2, 3, 10, 7),
    (1, 1, 3, 64, 64),
    (1, 2, 1, 33, 81),
    (1, 1, 5, 16, 96),
)
"""B, G, R, K, V."""
DTYPES = (torch.float32, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


# ---- inputs, and the words ----------------------------------------------------------------------


def memory_inputs(
    op: str, T: int, shape: tuple[int, ...], decay: str, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """What the op takes after the state, and the state."""
    B, G, R, K, V = shape
    q, k, v = (
        normal(B, T, heads, dim, seed=seed)
        for seed, (heads, dim) in enumerate(((G * R, K), (G, K), (G, V)))
    )
    state = normal(B, G, K, V, seed=3)
    if op == "delta":
        q, k = (x / (1e-3 + x.norm(dim=-1, keepdim=True)) for x in (q, k))
    given = [q.to(dtype), k.to(dtype), v.to(dtype)]
    if op == "delta":
        beta = (2.4 * uniform(B, T, G, seed=4) - 0.2).clamp(0, 2)
        return [*given, beta, DECAYS[decay]((B, T, G))], state
    return [*given, DECAYS[decay]((B, T, G, K if op == "per channel" else 1))], state


OPS: dict[str, Op] = {"one decay": gla, "per channel": gla, "delta": delta}
each_op = pytest.mark.parametrize("op", OPS)


def double(x: Tensor) -> Array:
    return x.detach().double().numpy()


def in_words(op: str, tensors: list[Tensor], state: Tensor) -> tuple[Array, Array]:
    """Outputs and last state; heads of a group side by side."""
    q, k, v, *gates = (double(x) for x in tensors)
    B, T, H, K = q.shape
    S, out = double(state).copy(), np.zeros((B, T, H, v.shape[-1]))
    heads = np.arange(H) // (H // k.shape[2])
    for t in range(T):
        key, value = k[:, t, :, :, None], v[:, t, :, None, :]
        if op == "delta":
            S = S * np.exp(gates[1][:, t, :, None, None])
            value = gates[0][:, t, :, None, None] * (value - (key * S).sum(2, keepdims=True))
        else:
            S = S * np.exp(gates[0][:, t, :, :, None])
        S = S + key * value
        out[:, t] = K**-0.5 * (q[:, t, :, :, None] * S[:, heads]).sum(2)
    return out, S


# ---- gla and the delta rule -----------------------------------------------------------------


@each_level
@each_op
@each_dtype
@pytest.mark.usefixtures("poison")
def test_every_length_and_shape(level: int, op: str, dtype: torch.dtype) -> None:
    """Their float32 holds whatever the inputs are: what bfloat16 lost was lost before."""
    for shape, T in itertools.product(SHAPES, LENGTHS):
        tensors, state = memory_inputs(op, T, shape, "mixture", dtype)
        given = [x.clone() for x in (*tensors, state)]
        with at_level(level):
            got = OPS[op](*tensors, state)
        assert_same(got, in_words(op, tensors, state))
        assert all(torch.equal(x, y) for x, y in zip(given, (*tensors, state), strict=True))


@each_level
@each_op
@pytest.mark.parametrize("decay", DECAYS)
def test_every_decay(level: int, op: str, decay: str) -> None:
    for T in (1, 75):
        tensors, state = memory_inputs(op, T, SHAPES[1], decay)
        with at_level(level):
            got = OPS[op](*tensors, state)
        assert_same(got, in_words(op, tensors, state))


@each_level
@each_op
def test_minus_infinity_forgets_everything(level: int, op: str) -> None:
    tensors, state = memory_inputs(op, 90, SHAPES[1], "to -0.1")
    tensors[-1][:, 41] = -torch.inf
    with at_level(level):
        out, last = OPS[op](*tensors, 1e30 * state)
    fresh = in_words(op, [x[:, 41:] for x in tensors], torch.zeros_like(state))
    assert_same((out[:, 41:], last), fresh)


@each_level
@each_op
@pytest.mark.parametrize("T", [2, 17, 33, 49])
def test_every_split_in_two(level: int, op: str, T: int) -> None:
    tensors, state = memory_inputs(op, T, SHAPES[1], "mixture")
    expected = in_words(op, tensors, state)
    with at_level(level):
        for cut in range(T + 1):
            assert_same(in_parts(OPS[op], tensors, state, [cut]), expected)


@each_level
@each_op
def test_512_steps_do_not_drift(level: int, op: str) -> None:
    tensors, state = memory_inputs(op, 512, SHAPES[1], "-1e-4", torch.bfloat16)
    expected = in_words(op, tensors, state)
    with at_level(level):
        out, states = steps(OPS[op], tensors, state)
        assert_same((out, states[-1]), expected)
        assert_same(OPS[op](*tensors, state), expected)


@each_level
@each_op
def test_an_empty_token_changes_nothing(level: int, op: str) -> None:
    for T in (1, 20):
        (q, *rest), state = memory_inputs(op, T, SHAPES[1], "mixture")
        with at_level(level):
            _, last = OPS[op](q, *(torch.zeros_like(x) for x in rest), state)
        assert torch.equal(last, state)


@each_level
@each_op
def test_views_are_read_where_they_are(level: int, op: str) -> None:
    """Packed projections, decays spread over channels, dims the other way round."""
    for T in (1, 40):
        tensors, state = memory_inputs(op, T, (2, 2, 3, 10, 7), "to -0.1")
        expected = in_words(op, tensors, state)
        packed = torch.full((2, T, 6 * 10 + 2 * 10 + 2 * 7 + 5), torch.nan)
        views = packed[..., :60], packed[..., 60:80], packed[..., 80:94]
        together = [
            x.unflatten(-1, (-1, y.shape[-1])) for x, y in zip(views, tensors, strict=False)
        ]
        for view, x in zip(together, tensors, strict=False):
            view.copy_(x)
        turned = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in tensors]
        with at_level(level):
            assert_same(OPS[op](*together, *tensors[3:], state), expected)
            assert_same(OPS[op](*turned, state.transpose(2, 3).contiguous().mT), expected)
        if op == "per channel":
            spread = tensors[3][:, :1, :, :1].expand(2, T, 2, 10)
            with at_level(level):
                got = gla(*together, spread, state)
            assert_same(got, in_words(op, [*tensors[:3], spread], state))


@each_level
def test_inputs_of_unlike_dtypes_are_taken_as_float32(level: int) -> None:
    """The tied gate's keys and decays are float32 beside values of the model's dtype."""
    (q, x, v, _), state = memory_inputs("per channel", 40, SHAPES[1], "none", torch.bfloat16)
    k, log_decay = tied_gate(x)
    with at_level(level):
        got = gla(q.float(), k, v, log_decay, state)
    assert_same(got, in_words("per channel", [q, k, v, log_decay], state))


@each_op
def test_no_tokens(op: str) -> None:
    tensors, state = memory_inputs(op, 0, SHAPES[1], "none")
    with at_level(levels()[-1]):
        out, last = OPS[op](*tensors, state)
    assert out.shape == (2, 0, 6, 7)
    assert torch.equal(last, state)


# ---- the far memory --------------------------------------------------------------------------

FAR_SHAPES = (
    (2, 2, 3, 10, 7, 6),
    (1, 1, 1, 33, 40, 17),
    (1, 2, 3, 64, 64, 64),
    (2, 1, 4, 6, 18, 96),
)
"""B, G, R, K, V, F."""


def far_inputs(
    T: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, size: float = 1.0
) -> dict[str, Tensor | Prototypes | tuple[Tensor, Tensor]]:
    B, G, R, K, V, F = shape
    H = G * R
    prototypes = Prototypes(
        normal(G, F, K, seed=10) * 0.3,
        normal(G, F, seed=11),
        normal(H, F, K, seed=12) * 0.3 * size,
        normal(H, seed=13),
        -torch.tensor([0.2, 0.01])[:G],
    )
    return {
        "q": normal(B, T, H, K, seed=0).to(dtype),
        "k": normal(B, T, G, K, seed=1).to(dtype),
        "v": normal(B, T, G, V, seed=2).to(dtype),
        "real": torch.tensor([[0, T], [3, T]])[:B],
        "prototypes": prototypes,
        "memory": torch.cat((normal(B, G, F, V, seed=4), uniform(B, G, F, 1, seed=5)), -1),
        "near": (normal(B, T, H, V, seed=6).to(dtype), 3 * normal(B, T, H, seed=7)),
    }


def far_in_words(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor,
    prototypes: Prototypes,
    memory: Tensor,
    near: tuple[Tensor, Tensor],
) -> tuple[Array, Array]:
    """One row, group, step and head after the other; outputs of padding are the window's."""
    key_weight, key_bias, query_weight, beta, log_decay = (double(x) for x in prototypes)
    (B, _, H, _), G = q.shape, k.shape[2]
    out, last = double(near[0]).copy(), double(memory).copy()
    for b, g in itertools.product(range(B), range(G)):
        M, (first, end) = last[b, g], real[b].tolist()
        for t in range(end):
            M *= math.exp(log_decay[g])
            if t >= first:
                scores = np.exp(key_weight[g] @ double(k[b, t, g]) + key_bias[g])
                M += np.outer(scores / scores.sum(), [*double(v[b, t, g]), 1.0])
            for h in range(g * H // G, (g + 1) * H // G):
                if beta[h] == -math.inf:
                    continue
                likes = query_weight[h] @ double(q[b, t, h]) + beta[h]
                mass = float(near[1][b, t, h])
                most = max(likes.max(), mass)
                own, read = math.exp(mass - most), np.exp(likes - most) @ M
                out[b, t, h] = (own * out[b, t, h] + read[:-1]) / (own + read[-1])
    return out, last


def assert_far(got: Result, given: dict) -> None:  # type: ignore[type-arg]
    out, memory = far_in_words(**given)
    real = given["real"]
    for b in range(len(real)):
        end = real[b, 1]
        assert_close(got[0][b, :end], torch.as_tensor(out[b, :end]).to(got[0].dtype))
    assert_close(got[1], torch.as_tensor(memory).float())


@each_level
@each_dtype
@pytest.mark.usefixtures("poison")
def test_far_at_every_length_and_shape(level: int, dtype: torch.dtype) -> None:
    for shape, T in itertools.product(FAR_SHAPES, LENGTHS):
        if T > 65 and shape != FAR_SHAPES[0]:
            continue
        given = far_inputs(T, shape, dtype)
        with at_level(level):
            assert_far(far(**given), given)  # type: ignore[arg-type]


@pytest.mark.parametrize("T", [1, 40])
def test_far_in_torch_is_the_same(T: int) -> None:
    given = far_inputs(T, FAR_SHAPES[0])
    with at_torch():
        assert_far(far(**given), given)  # type: ignore[arg-type]


@each_level
@pytest.mark.parametrize("real", [(0, 1), (1, 1), (5, 5), (2, 20), (17, 33), (-9, 40), (60, 40)])
def test_far_leaves_out_what_is_not_there(level: int, real: tuple[int, int]) -> None:
    """Keys and values where no token leaves, and all of padding, may be anything."""
    for T in (1, 40):
        given = far_inputs(T, FAR_SHAPES[0])
        given["real"] = torch.tensor([real, (0, T)]).clamp(max=T)
        expected = {name: given[name] for name in ("k", "v", "q")}
        step = torch.arange(T)
        outside = (step < real[0]) | (step >= real[1])
        for name, x in expected.items():
            assert isinstance(x, Tensor)
            given[name] = x.clone()
            given[name][0, outside if name != "q" else step >= real[1]] = torch.nan  # type: ignore[index]
        with at_level(level):
            got = far(**given)  # type: ignore[arg-type]
        assert_far(got, given | expected)


@each_level
@pytest.mark.parametrize("size", [0.0, 40.0, 400.0])
def test_far_likes_of_any_size(level: int, size: float) -> None:
    for T in (1, 33):
        given = far_inputs(T, FAR_SHAPES[0], size=size)
        mass = normal(2, T, 6, seed=7)
        given["near"] = given["near"][0], mass + 5 * size * mass.sign()  # type: ignore[index]
        with at_level(level):
            assert_far(far(**given), given)  # type: ignore[arg-type]


@each_level
@each_dtype
def test_far_shut_heads_are_the_window_bit_for_bit(level: int, dtype: torch.dtype) -> None:
    for T, shape in itertools.product((1, 33), FAR_SHAPES[:2]):
        given = far_inputs(T, shape, dtype)
        prototypes, near = given["prototypes"], given["near"]
        assert isinstance(prototypes, Prototypes)
        heads = len(prototypes.beta)
        prototypes.beta[::2] = -torch.inf
        before = near[0].clone()
        with at_level(level):
            out, memory = far(**given)  # type: ignore[arg-type]
        for h in range(heads):
            assert torch.equal(out[:, :, h], before[:, :, h]) == (h % 2 == 0)
        assert torch.equal(near[0], before)
        assert_close(memory, torch.as_tensor(far_in_words(**given)[1]).float())  # type: ignore[arg-type]


def far_in_parts(given: dict, bounds: list[int]) -> Result:  # type: ignore[type-arg]
    outs, memory = [], given["memory"]
    for start, stop in itertools.pairwise(bounds):
        part = {name: given[name][:, start:stop] for name in ("q", "k", "v")}
        near = tuple(x[:, start:stop] for x in given["near"])
        real = (given["real"] - start).clamp(max=stop - start)
        out, memory = far(
            **part, real=real, prototypes=given["prototypes"], memory=memory, near=near
        )  # type: ignore[arg-type]
        outs.append(out)
    return torch.cat(outs, 1), memory


@each_level
def test_far_in_every_split_in_two_and_step_by_step(level: int) -> None:
    given = far_inputs(35, FAR_SHAPES[0])
    with at_level(level):
        for cut in range(36):
            assert_far(far_in_parts(given, [0, cut, 35]), given)
        assert_far(far_in_parts(given, list(range(36))), given)


# ---- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("op", [*OPS, "far"])
def test_bits_do_not_depend_on_the_number_of_threads(op: str, rows: int) -> None:
    T, run = 450, _runs(op, 450, rows)
    results = []
    with at_level(levels()[-1]):
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            results.append(run())
    assert results[0][0].shape[1] == T
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(state, results[0][1])


def _runs(op: str, T: int, rows: int) -> Callable[[], Result]:
    if op == "far":
        given = far_inputs(T, (1, 1, 3, 20, 40, 33))
        q, k, v = (given[name].expand(rows, *given[name].shape[1:]) for name in ("q", "k", "v"))  # type: ignore[union-attr]
        real = torch.tensor([[7, T - 40], [0, T], [-3, 100], [T, T]])[:rows]
        memory = given["memory"].expand(rows, -1, -1, -1)  # type: ignore[union-attr]
        near = tuple(x.expand(rows, *x.shape[1:]) for x in given["near"])
        return lambda: far(q, k, v, real, given["prototypes"], memory, near)  # type: ignore[arg-type]
    tensors, state = memory_inputs(op, T, (rows, 1, 3, 20, 40), "to -0.1", torch.bfloat16)
    return lambda: OPS[op](*tensors, state)


# ---- gradients ----------------------------------------------------------------------------------

DEFINITIONS: dict[str, Op] = {
    "one decay": gla_definition, "per channel": gla_definition, "delta": delta_definition,
}  # fmt: skip


@each_level
@each_op
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_the_definition(
    op: str, decay: str, shape: tuple[int, ...], level: int
) -> None:
    tensors, state = memory_inputs(op, 50, shape, decay)
    with at_level(level):
        assert_same_gradients(OPS[op], DEFINITIONS[op], tensors, state)


@each_level
@each_op
def test_gradients_of_bfloat16_are_rounded_once(op: str, level: int) -> None:
    tensors, state = memory_inputs(op, 70, SHAPES[1], "to -0.1", torch.bfloat16)
    exact = [x.float() for x in tensors]
    with at_level(level):
        got, expected = gradients(OPS[op], tensors, state), gradients(OPS[op], exact, state)
    for grad, wanted, leaf in zip(got, expected, (*tensors, state), strict=True):
        assert torch.equal(grad, wanted.to(leaf.dtype))


@each_level
@each_op
def test_every_gradient_is_written_by_the_kernel(
    op: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, state = memory_inputs(op, 50, SHAPES[3], "to -0.1")
    with at_level(level):
        expected = gradients(OPS[op], tensors, state)
        empty = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", lambda x: empty(x).fill_(torch.nan))
        got = gradients(OPS[op], tensors, state)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@each_op
def test_threads_do_not_show_in_the_bits_of_gradients(op: str) -> None:
    tensors, state = memory_inputs(op, 90, SHAPES[1], "mixture")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(OPS[op], tensors, state))
    for some in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(some, found[0], strict=True))
