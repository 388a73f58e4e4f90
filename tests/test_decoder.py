"""The decoder and its state: however the tokens arrive, the logits are the same."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

import tiny
from respike import config as configs
from respike.account import state_bytes
from respike.config import ModelConfig
from respike.errors import DataError, UnsupportedError
from respike.layers.far import FarSoftmax
from respike.layers.memory import Linear, WindowBesideMemory
from respike.layers.mixer import Mixer
from respike.layers.softmax import FullSoftmax, WindowSoftmax
from respike.layers.span import Span
from respike.layers.state import KVState, MemoryState, PairState
from respike.models.decoder import Decoder
from respike.models.packing import pack_decoder
from respike.models.state import DecoderState
from respike.ops.attention import attention_definition, visible
from respike.ops.backends import native_status
from respike.ops.far import far_definition
from tiny import D, V, full, model_config, random_decoder, random_tokens, window
from tolerance import TOLERANCES, assert_close, differences

B, T, G = 2, 45, 3
LAYERS: dict[str, Any] = {
    "softmax": tiny.MIXED,
    "memories": tiny.MEMORIES,
    "blocks": tiny.BLOCKS,
    "brains": tiny.BRAINS,
}
EPS = {"softmax": 1e-5, "memories": 1e-2, "blocks": 1e-5, "brains": 1e-2}
"""Of the norms. Heads of a memory that hold almost nothing must not make rounding errors large."""
MODELS = {
    name: random_decoder(model_config(layers, rms_norm_eps=EPS[name]))
    for name, layers in LAYERS.items()
}
if native_status().available:
    MODELS |= {
        f"{name}, packed": pack_decoder(
            random_decoder(model_config(layers, rms_norm_eps=EPS[name]))
        )
        for name, layers in LAYERS.items()
    }
MIXED = MODELS["softmax"]
FINGERPRINT = "f1" * 32


@pytest.fixture(scope="module", params=MODELS)
def mixed(request: pytest.FixtureRequest) -> Decoder:
    return MODELS[request.param]


def run(decoder: Decoder, tokens: Tensor, cuts: list[int], **options: Any) -> Tensor:
    """Logits of ``tokens`` given in several calls, which end at ``cuts`` and at the end."""
    state, outputs = decoder.init_state(len(tokens)), []
    edges = [0, *sorted({c for c in cuts if 0 < c < tokens.shape[1]}), tokens.shape[1]]
    with torch.no_grad():
        for begin, end in itertools.pairwise(edges):
            out, state = decoder(tokens[:, begin:end], state, **options)
            outputs.append(out)
    assert state.tokens_seen.tolist() == [tokens.shape[1]] * len(tokens)
    return torch.cat(outputs, 1)


def ran(decoder: Decoder, *tokens: Tensor, lengths: list[int] | None = None) -> DecoderState:
    """The state after some calls."""
    state = decoder.init_state(len(tokens[0]))
    with torch.no_grad():
        for call in tokens:
            counts = torch.tensor(lengths) if lengths is not None else None
            state = decoder(call, state, lengths=counts)[1]
    return state


def continued(decoder: Decoder, tokens: Tensor, state: DecoderState) -> Tensor:
    with torch.no_grad():
        return decoder(tokens, state)[0]


def allocated(state: DecoderState) -> int:
    """Bytes of all tensors of a state, whatever is in them."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list | tuple):
            list(map(look, value))
        elif isinstance(value, dict):
            list(map(look, value.values()))
        elif type(value).__module__.startswith("respike."):
            look(vars(value))

    look(state.layers)
    return sum(found.values())


def test_a_compact_copy_takes_what_is_counted(mixed: Decoder) -> None:
    """A row of a batch has room for the longest of it; what is kept of it has not."""
    states = [ran(mixed, random_tokens(1, n)) for n in (9, 700)]
    batch = DecoderState.join(states)
    for index, alone in enumerate(states):
        for copy in (batch.row(index), alone.compact()):
            assert copy.nbytes() <= allocated(copy) <= copy.nbytes() + 90 * tiny.K * 4 * G * 2 * 4
            more = random_tokens(1, 6, seed=3)
            assert torch.equal(continued(mixed, more, copy), continued(mixed, more, alone.clone()))
    grows = allocated(states[1]) > 2 * allocated(states[0])
    short = DecoderState.join(batch.keep([True, False]))
    assert not grows or allocated(short) < allocated(batch) / 4, "room of one that has left"


# ---- splits ----------------------------------------------------------------------------------


@given(
    tokens=st.integers(1, 60),
    cuts=st.lists(st.integers(1, 59), max_size=4),
    chunk=st.integers(1, 64),
    batch=st.integers(1, 3),
)
@settings(max_examples=14, deadline=None)
def test_any_split_of_a_prompt_gives_the_logits_of_one_pass(
    mixed: Decoder, tokens: int, cuts: list[int], chunk: int, batch: int
) -> None:
    ids = random_tokens(batch, tokens)
    assert_close(run(mixed, ids, cuts, chunk_tokens=chunk), run(mixed, ids, []))


@pytest.mark.parametrize("layers", [1, 3, 99])
def test_pauses_between_layers_change_no_bit(mixed: Decoder, layers: int) -> None:
    first, then = random_tokens(2, 11), random_tokens(2, 23, seed=1)
    whole = ran(mixed, first)
    with torch.no_grad():
        expected, whole = mixed(then, whole)
        turns = list(mixed.turns(then, ran(mixed, first), layers))
    assert len(turns) == -(-len(mixed.layers) // layers)
    assert [state is None for _, state in turns] == [True] * (len(turns) - 1) + [False]
    hidden, state = turns[-1]
    assert state is not None
    assert torch.equal(mixed.head(hidden), expected)
    again = random_tokens(2, 5, seed=2)
    assert torch.equal(continued(mixed, again, state), continued(mixed, again, whole))


@given(
    chunk=st.integers(2, 20),
    which=st.sets(st.integers(1, 12), min_size=1),
    first=st.integers(0, 19),
)
@settings(max_examples=8, deadline=None)
def test_splits_at_chunk_boundaries_change_no_bit(
    mixed: Decoder, chunk: int, which: set[int], first: int
) -> None:
    """Boundaries count from the start of the sequence, not of the call: ``first`` may be any."""
    ids = random_tokens(B, T)
    cuts = [first, *(chunk * n for n in which if chunk * n > first)]
    expected = run(mixed, ids, [first], chunk_tokens=chunk)
    assert torch.equal(run(mixed, ids, cuts, chunk_tokens=chunk), expected)


def test_chunks_end_at_multiples_of_their_size_in_every_call(
    mixed: Decoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends, span = [], Decoder.span

    def recorded(self: Decoder, state: DecoderState, num_tokens: int, *rest: Any) -> Span:
        ends.append(int(state.tokens_seen[0]) + num_tokens)
        return span(self, state, num_tokens, *rest)

    monkeypatch.setattr(Decoder, "span", recorded)
    run(mixed, random_tokens(B, T), [5, 30], chunk_tokens=8)
    assert ends == [5, 8, 16, 24, 30, 32, 40, 45]


def test_step_by_step_gives_the_logits_of_one_pass(mixed: Decoder) -> None:
    ids = random_tokens(B, T)
    assert_close(run(mixed, ids, list(range(T))), run(mixed, ids, []))


@given(
    parts=st.lists(st.integers(1, 9), min_size=2, max_size=9),
    stepped=st.lists(st.booleans(), min_size=9, max_size=9),
)
@settings(max_examples=8, deadline=None)
def test_prompts_may_follow_generation_and_the_other_way_round(
    mixed: Decoder, parts: list[int], stepped: list[bool]
) -> None:
    ids, cuts, begin = random_tokens(B, sum(parts)), [], 0
    for length, by_steps in zip(parts, stepped, strict=False):
        cuts += range(begin, begin + length) if by_steps else [begin]
        begin += length
    assert_close(run(mixed, ids, cuts), run(mixed, ids, []))


def test_an_empty_call_changes_nothing(mixed: Decoder) -> None:
    ids = random_tokens(B, T)
    state = ran(mixed, ids[:, :20], ids[:, :0], ids[:, 20:30])
    assert state.tokens_seen.tolist() == [30, 30]
    assert_close(continued(mixed, ids[:, 30:], state), run(mixed, ids, [])[:, 30:])
    out, _ = mixed(ids[:, :0])
    assert out.shape == (B, 0, V)


# ---- ragged batches --------------------------------------------------------------------------


@given(
    first=st.lists(st.integers(0, 30), min_size=3, max_size=3),
    second=st.lists(st.integers(0, 30), min_size=3, max_size=3),
    chunk=st.integers(1, 40),
)
@settings(max_examples=7, deadline=None)
def test_ragged_rows_give_what_each_gives_alone(
    mixed: Decoder, first: list[int], second: list[int], chunk: int
) -> None:
    sequences = [
        random_tokens(1, a + b + 1, seed=i)
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    state, begin = mixed.init_state(3), [0, 0, 0]
    for lengths in (first, second, [1, 1, 1]):
        batch = torch.full((3, max(lengths)), 5)
        for row, count in enumerate(lengths):
            batch[row, :count] = sequences[row][0, begin[row] : begin[row] + count]
        with torch.no_grad():
            out, state = mixed(batch, state, lengths=torch.tensor(lengths), chunk_tokens=chunk)
        for row, count in enumerate(lengths):
            alone = run(mixed, sequences[row], [])[0, begin[row] : begin[row] + count]
            assert_close(out[row, :count], alone)
            begin[row] += count
    assert state.tokens_seen.tolist() == [a + b + 1 for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("chunk", [7, 64], ids="chunks of {}".format)
def test_the_content_of_padding_never_matters(mixed: Decoder, chunk: int) -> None:
    lengths, ids = torch.tensor([T, 11]), random_tokens(B, T)
    results = []
    for padding in (0, V - 1):
        ids[1, 11:] = padding
        with torch.no_grad():
            out, state = mixed(ids, lengths=lengths, chunk_tokens=chunk)
            more, state = mixed(random_tokens(B, 9, seed=1), state)
        results.append((out[0], out[1, :11], more, *stored(state)))
    for ours, other in zip(*results, strict=True):
        assert_same_bits(mixed, ours, other)


def assert_same_bits(decoder: Decoder, ours: Tensor, other: Tensor) -> None:
    """Where tokens choose, products have as many rows as chose alike: rounding may differ."""
    layers = decoder.config.layers
    if any(layer.moe or layer.beside for layer in layers):
        assert_close(ours, other)
    else:
        assert torch.equal(ours, other)


def stored_names(state: DecoderState) -> list[str]:
    return [
        f"layers.{i}.{j}.{name}"
        for i, layer in enumerate(state.layers)
        for j, part in enumerate(layer)
        for name in part.tensors(state.num_tokens)
    ]


def stored(state: DecoderState) -> list[Tensor]:
    """Every tensor of a state, empty slots included."""
    parts = [part for layer in state.layers for part in layer]
    return [t for part in parts for t in part.tensors(state.num_tokens).values()]


def test_a_row_of_a_batch_gives_what_it_gives_alone(mixed: Decoder) -> None:
    ids = random_tokens(3, T)
    batched = run(mixed, ids, [13])
    for row in range(3):
        assert_close(batched[row : row + 1], run(mixed, ids[row : row + 1], [13]))


# ---- what may be seen ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cuts", [[], [20, 21, 22, 30], list(range(T))], ids=["one", "some", "steps"]
)
def test_the_future_does_not_reach_back_through_the_model(mixed: Decoder, cuts: list[int]) -> None:
    ids = random_tokens(B, T)
    before = run(mixed, ids, cuts)
    ids[:, 23:] = (ids[:, 23:] + 1) % V
    after = run(mixed, ids, cuts)
    assert_same_bits(mixed, after[:, :23], before[:, :23])
    assert not torch.isclose(after[:, 23:], before[:, 23:]).all(-1).any()


def test_a_window_forgets_what_no_layer_can_see() -> None:
    """Two layers of 7 tokens reach back 12 tokens, and no sink is in the way."""
    decoder = random_decoder(model_config(((window(0, 1, 2, sinks=0),),) * 2))
    ids = random_tokens(B, T)
    before = run(decoder, ids, [])
    ids[:, 10] = (ids[:, 10] + 1) % V
    after = run(decoder, ids, [])
    assert torch.equal(after[:, 23:], before[:, 23:])
    assert not torch.isclose(after[:, 22], before[:, 22]).all()


def test_sinks_are_never_forgotten() -> None:
    decoder = random_decoder(model_config(((window(0, 1, 2, tokens=3, sinks=2),),)))
    ids = random_tokens(B, T)
    before = run(decoder, ids, [20])
    ids[:, 1] = (ids[:, 1] + 1) % V
    after = run(decoder, ids, [20])
    assert not torch.isclose(after[:, 1:], before[:, 1:]).all(-1).any()
    assert torch.equal(after[:, 0], before[:, 0])


@pytest.mark.parametrize("extra", [0, 3, 100], ids="{} spare tokens".format)
def test_a_window_as_long_as_the_context_is_full_softmax(extra: int) -> None:
    everyone = (0, 1, 2)
    source = random_decoder(model_config(((full(*everyone),),) * 3))
    wide = model_config(((window(*everyone, tokens=T + extra, sinks=4),),) * 3)
    ids = random_tokens(B, T)
    expected = run(source, ids, [])
    for cuts in ([], [13, 14], list(range(T))):
        assert_close(run(random_decoder(wide), ids, cuts), expected)


@pytest.mark.parametrize(
    "one",
    [full(0, 1, 2), window(0, 1, 2), window(0, 1, 2, reach=9)],
    ids=["full", "window", "window past reach"],
)
@pytest.mark.parametrize(
    "cut", [((0,), (1, 2)), ((1,), (0, 2)), ((2, 0), (1,)), ((2,), (1,), (0,))], ids=str
)
def test_how_groups_are_shared_out_among_equal_mixers_does_not_matter(
    one: configs.Mixer, cut: tuple[tuple[int, ...], ...]
) -> None:
    parts = tuple(one.model_copy(update={"groups": groups}) for groups in cut)
    ids = random_tokens(B, T)
    expected = run(random_decoder(model_config(((one,),) * 2)), ids, [])
    shared_out = random_decoder(model_config((parts,) * 2))
    for cuts in ([], [13, 14], list(range(T))):
        assert_close(run(shared_out, ids, cuts), expected)


def test_each_group_follows_its_own_mixer() -> None:
    """Group 1 sees everything and the others a window: its heads, and only they, change."""
    heads = {}
    for name, mixers in {
        "full": (full(0, 1, 2),),
        "window": (window(0, 1, 2),),
        "mixed": (full(1), window(0, 2)),
    }.items():
        decoder = random_decoder(model_config((mixers,)))
        layer, state = decoder.model.layers[0].self_attn, decoder.init_state(B)
        layer.o_proj = torch.nn.Identity()
        x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))
        heads[name] = layer(x, decoder.span(state, T), state.layers[0])[0].view(B, T, 3, -1)
    for group, same in enumerate(["window", "full", "window"]):
        assert_close(heads["mixed"][:, :, group], heads[same][:, :, group])
        other = "full" if same == "window" else "window"
        assert not torch.allclose(heads["mixed"][:, 20:, group], heads[other][:, 20:, group])


# ---- state -----------------------------------------------------------------------------------


def test_a_clone_goes_its_own_way(mixed: Decoder) -> None:
    """Two futures of one past, told in turns, so that neither may write where the other reads."""
    past = random_tokens(B, 20)
    futures = [random_tokens(B, 21, seed=seed) for seed in (1, 2)]
    state = ran(mixed, past)
    states, outputs = [state, state.clone()], [[], []]
    for begin, end in itertools.pairwise((0, 1, 9, 10, 11, 21)):
        for which, future in enumerate(futures):
            with torch.no_grad():
                out, states[which] = mixed(future[:, begin:end], states[which])
            outputs[which].append(out)
    for future, parts in zip(futures, outputs, strict=True):
        assert_close(torch.cat(parts, 1), run(mixed, torch.cat([past, future], 1), [])[:, 20:])
    copy = states[0].clone()
    copy.tokens_seen += 1
    assert states[0].tokens_seen.tolist() == [41, 41]


@pytest.mark.parametrize("lengths", [(30, 30, 30), (30, 4, 17), (30, 0, 1)], ids=str)
def test_split_and_joined_states_continue_as_if_nothing_happened(
    mixed: Decoder, lengths: tuple[int, ...]
) -> None:
    ids, more = random_tokens(3, 30), random_tokens(3, 14, seed=1)
    state = ran(mixed, ids, lengths=list(lengths))
    expected = continued(mixed, more, state.clone())
    rows = state.split()
    assert [int(row.tokens_seen) for row in rows] == list(lengths)
    rejoined = DecoderState.join([row.clone() for row in rows])
    assert torch.equal(continued(mixed, more, rejoined), expected)
    for row, part in enumerate(rows):
        assert_close(continued(mixed, more[row : row + 1], part), expected[row : row + 1])


def test_states_of_unlike_length_can_be_joined(mixed: Decoder) -> None:
    lengths, more = (70, 1, 33), random_tokens(3, 14, seed=1)
    alone = [random_tokens(1, n, seed=n) for n in lengths]
    joined = DecoderState.join([ran(mixed, ids) for ids in alone])
    assert joined.tokens_seen.tolist() == list(lengths)
    for by_steps in (False, True):
        state, outputs = joined.clone(), []
        for part in more.split(1 if by_steps else 14, dim=1):
            with torch.no_grad():
                out, state = mixed(part, state)
            outputs.append(out)
        got = torch.cat(outputs, 1)
        for row, ids in enumerate(alone):
            whole = run(mixed, torch.cat([ids, more[row : row + 1]], 1), [])
            assert_close(got[row], whole[0, lengths[row] :])


def test_state_bytes_are_what_the_account_says_and_what_a_file_holds(
    mixed: Decoder, tmp_path: Path
) -> None:
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (0, 1, 8, 100)):
        decoder = random_decoder(mixed.config, dtype)
        state = ran(decoder, random_tokens(B, tokens))
        state.save(tmp_path / "state", FINGERPRINT)
        held = load_file(tmp_path / "state")
        del held["tokens_seen"]
        # Summaries of blocks follow from the keys, so no file holds them.
        blocks = [part for _, part in decoder.config.mixers() if part.mixer == "blocks"]
        summaries = sum(len(part.groups) * (tokens // part.summary_tokens) for part in blocks)
        written = sum(t.nbytes for t in held.values()) + B * summaries * tiny.K * dtype.itemsize
        assert state.nbytes() == written
        assert state.nbytes() == B * state_bytes(decoder.config, tokens, dtype.itemsize)


def test_a_ragged_state_counts_each_row_alone(mixed: Decoder) -> None:
    state = ran(mixed, random_tokens(3, 30), lengths=[30, 4, 17])
    assert state.nbytes() == sum(state_bytes(mixed.config, n, 4) for n in (30, 4, 17))


def test_a_window_state_does_not_grow() -> None:
    decoder = random_decoder(model_config(((window(0, 1, 2),),) * 2))
    state, sizes = decoder.init_state(B), set()
    for tokens in (1, 5, 200, 1):
        with torch.no_grad():
            state = decoder(random_tokens(B, tokens), state)[1]
        sizes.add((state.nbytes(), sum(t.untyped_storage().nbytes() for t in stored(state))))
    assert sizes == {(state.nbytes(), B * state_bytes(decoder.config, 207, 4))}


def test_a_growing_state_keeps_little_to_spare() -> None:
    decoder = random_decoder(model_config(((full(0, 1, 2),),)))
    state, copies, capacity = decoder.init_state(1), 0, 0
    for token in random_tokens(1, 400)[0]:
        with torch.no_grad():
            state = decoder(token.view(1, 1), state)[1]
        have = state.layers[0][0].k.shape[2]
        copies += have != capacity
        capacity = have
    assert copies < 12
    assert capacity <= 400 * 1.25 + 64


# ---- state files -----------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[30, 30], [30, 9]], ids=["even", "ragged"])
def test_a_saved_state_continues_with_the_same_bits(
    mixed: Decoder, tmp_path: Path, lengths: list[int]
) -> None:
    ids, more = random_tokens(B, 30), random_tokens(B, 14, seed=1)
    state = ran(mixed, ids, lengths=lengths)
    state.save(tmp_path / "state", FINGERPRINT)
    loaded = mixed.init_state().load(tmp_path / "state", FINGERPRINT)
    assert loaded.tokens_seen.tolist() == lengths
    assert torch.equal(continued(mixed, more, loaded), continued(mixed, more, state))


def test_a_state_file_is_private_and_leaves_nothing_else_behind(
    mixed: Decoder, tmp_path: Path
) -> None:
    state = ran(mixed, random_tokens(B, 9))
    (tmp_path / "state").write_text("an older one", encoding="utf-8")
    state.save(tmp_path / "state", FINGERPRINT)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


def test_a_failed_save_keeps_the_older_file(
    mixed: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    state = ran(mixed, random_tokens(B, 9))
    (tmp_path / "state").write_text("an older one", encoding="utf-8")
    monkeypatch.setattr("respike.models.state_file._blocks", full_disk)
    with pytest.raises(OSError, match="no space left"):
        state.save(tmp_path / "state", FINGERPRINT)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_text(encoding="utf-8") == "an older one"


Change = Callable[[dict[str, Tensor], dict[str, str]], Any]

ALTERED: dict[str, tuple[str, Change]] = {
    "another model's": ("belongs to model 0000", lambda _, m: m.update(model="00" * 32)),
    "a later version's": ("version 2, expected 1", lambda _, m: m.update(version="2")),
    "not a state": ("not a respike state", lambda _, m: m.clear()),
    "without counts": ("tokens_seen", lambda t, _: t.pop("tokens_seen")),
    "with float counts": ("tokens_seen", lambda t, _: t.update(tokens_seen=torch.ones(B))),
    "with negative counts": ("tokens_seen", lambda t, _: t["tokens_seen"].neg_()),
    "with no rows": ("tokens_seen", lambda t, _: t.update({n: x[:0] for n, x in t.items()})),
    "with scalar counts": ("tokens_seen", lambda t, _: t.update(tokens_seen=torch.tensor(3))),
    "with more rows": ("layers.0.0.k", lambda t, _: t.update(tokens_seen=torch.ones(3).long())),
    "with too many tokens": ("layers.0.0.k", lambda t, _: t["tokens_seen"].fill_(31)),
    "without a tensor": ("'layers.1.1.v' is missing", lambda t, _: t.pop("layers.1.1.v")),
    "with an extra tensor": ("unexpected tensor 'x'", lambda t, _: t.update(x=torch.ones(1))),
    "with a narrow window": (
        "layers.1.1.k",
        lambda t, _: t.update({"layers.1.1.k": t["layers.1.1.k"][:, :, 1:].contiguous()}),
    ),
    "with a missing axis": ("layers.0.0.v", lambda t, _: t["layers.0.0.v"].squeeze_().resize_(3)),
    "of another dtype": (
        "layers.0.0.k",
        lambda t, _: t.update({"layers.0.0.k": t["layers.0.0.k"].bfloat16()}),
    ),
    "with another value": ("checksum", lambda t, _: t["layers.0.0.k"].neg_()),
    "without a checksum": ("checksum", lambda _, m: m.pop("sha256")),
    "with another note": ("checksum", lambda _, m: m.update(more="words")),
}


MEMORY = "layers.0.0.memory"


def memory(change: Callable[[Tensor], Tensor]) -> tuple[str, Change]:
    return MEMORY, lambda t, _: t.update({MEMORY: change(t[MEMORY]).contiguous()})


ALTERED_MEMORY: dict[str, tuple[str, Change]] = {
    "missing": (f"{MEMORY!r} is missing", lambda t, _: t.pop(MEMORY)),
    "in bf16": memory(lambda x: x.bfloat16()),
    "in f64": memory(lambda x: x.double()),
    "with a feature less": memory(lambda x: x[:, :, 1:]),
    "without masses": memory(lambda x: x[..., :-1]),
    "of a group less": memory(lambda x: x[:, 1:]),
    "of a row less": memory(lambda x: x[1:]),
    "turned": memory(lambda x: x.transpose(2, 3)),
    "with a missing axis": memory(lambda x: x[..., 0]),
    "with an axis more": memory(lambda x: x[..., None]),
    "of no memory": (
        "unexpected tensor 'layers.3.2.memory'",
        lambda t, _: t.update({"layers.3.2.memory": torch.zeros(B, 1, 8, 8)}),
    ),
}


def save_state(path: Path, decoder: Decoder = MIXED) -> None:
    ran(decoder, random_tokens(B, 30)).save(path, FINGERPRINT)


def write_altered(path: Path, change: Change, decoder: Decoder = MIXED) -> None:
    save_state(path, decoder)
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    change(tensors, meta)
    save_file(tensors, path, metadata=meta)


def refused(path: Path, words: str, decoder: Decoder = MIXED) -> None:
    with pytest.raises(DataError) as caught:
        decoder.init_state().load(path, FINGERPRINT)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_state_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    words, change = ALTERED[name]
    write_altered(tmp_path / "state", change)
    refused(tmp_path / "state", words)


@pytest.mark.parametrize("name", ALTERED_MEMORY)
def test_an_altered_memory_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    words, change = ALTERED_MEMORY[name]
    write_altered(tmp_path / "state", change, MODELS["memories"])
    refused(tmp_path / "state", words, MODELS["memories"])


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids="{} bytes".format)
def test_a_truncated_state_file_is_refused_in_one_line(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "state"
    save_state(path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "not a readable state file")


def test_equal_states_give_equal_bytes_that_safetensors_reads(tmp_path: Path) -> None:
    state = ran(MIXED, random_tokens(B, 30))
    for name in ("a", "b"):
        state.save(tmp_path / name, FINGERPRINT, more={"document.x": torch.ones(3).long()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    held = load_file(tmp_path / "a")
    assert held.pop("document.x").tolist() == [1, 1, 1]
    wanted = {*stored_names(state), "tokens_seen"}
    assert set(held) == wanted
    more, _ = MIXED.init_state().load_with_more(tmp_path / "a", FINGERPRINT)
    assert list(more) == ["document.x"]


@pytest.mark.parametrize("at_frac", [0.001, 0.2, 0.5, 0.9, 0.9999])
def test_one_changed_bit_anywhere_is_refused_in_one_line(tmp_path: Path, at_frac: float) -> None:
    path = tmp_path / "state"
    save_state(path)
    raw = bytearray(path.read_bytes())
    raw[int(at_frac * len(raw))] ^= 1
    path.write_bytes(raw)
    refused(path, str(path))


def test_a_missing_state_file_is_refused_in_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "state", "not a readable state file")
    refused(tmp_path, "not a readable state file")


@pytest.mark.parametrize("name", ["another model's", "with an extra tensor"])
def test_a_refused_state_file_leaves_the_state_as_it_was(tmp_path: Path, name: str) -> None:
    path = tmp_path / "state"
    write_altered(path, ALTERED[name][1])
    ids, state = random_tokens(3, T), MIXED.init_state(3)
    with pytest.raises(DataError):
        state.load(path, FINGERPRINT)
    assert torch.equal(continued(MIXED, ids, state), run(MIXED, ids, []))


def test_the_state_of_another_dtype_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    ran(random_decoder(model_config(), torch.bfloat16), random_tokens(B, 9)).save(path, FINGERPRINT)
    refused(path, "torch.bfloat16")


# ---- gradients -------------------------------------------------------------------------------


class Dense(Mixer):
    """A mixer from the definition that keeps every key; gradients are autograd's."""

    def __init__(self, window_tokens: int | None = None, sink_tokens: int = 0) -> None:
        super().__init__()
        self.window_tokens, self.sink_tokens = window_tokens, sink_tokens

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> KVState:
        return KVState.empty(batch, groups, head_dim, like)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: KVState
    ) -> tuple[Tensor, KVState]:
        del x
        k = torch.cat([state.k.transpose(1, 2), span.rotate(k)], 1)
        v = torch.cat([state.v.transpose(1, 2), v], 1)
        keys = torch.arange(k.shape[1]).expand(len(k), -1)
        seen = visible(span.positions, keys, self.window_tokens, self.sink_tokens)
        after = KVState(k.detach().transpose(1, 2), v.detach().transpose(1, 2))
        return self.attend(q, k, v, seen, span), after

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, span: Span) -> Tensor:
        return attention_definition(span.rotate(q), k, v, seen)


class DensePastReach(Dense):
    """The same, but sinks have scores of their own, from queries held at ``reach - 1``."""

    def __init__(self, window_tokens: int, sink_tokens: int, reach_tokens: int) -> None:
        super().__init__(window_tokens, sink_tokens)
        self.reach_tokens = reach_tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, span: Span) -> Tensor:
        k, v = (z.repeat_interleave(q.shape[2] // z.shape[2], 2) for z in (k, v))
        near = torch.einsum("bthk,bshk->bhts", span.rotate(q), k)
        far = torch.einsum("bthk,bshk->bhts", span.rotate(q, self.reach_tokens), k)
        is_sink = torch.arange(k.shape[1]) < self.sink_tokens
        scores = torch.where(is_sink, far, near) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshk->bthk", weights, v)


class DenseFar(FarSoftmax):
    """`far_definition` over keys all of which are kept, unrotated."""

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> KVState:  # type: ignore[override]
        return KVState.empty(batch, groups, head_dim, like)

    def forward(  # type: ignore[override]
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: KVState
    ) -> tuple[Tensor, KVState]:
        del x
        k = torch.cat([state.k.transpose(1, 2), k], 1)
        v = torch.cat([state.v.transpose(1, 2), v], 1)
        T = k.shape[1]
        # The definition wants all queries; those of earlier calls do not matter.
        q = pad(q, (0, 0, 0, 0, T - q.shape[1], 0))
        everything = torch.zeros_like(span.start), torch.full_like(span.start, T)
        whole = Span(*everything, T, MIXED.frequencies, q.dtype, q.device)
        phi = (torch.einsum("btgk,gfk->btgf", k, self.key_weight) + self.key_bias).softmax(-1)
        likes = torch.einsum("bthk,hfk->bthf", q, self.query_weight) + self.beta[:, None]
        log_decay = -math.log(2) / 2**self.log2_half_life
        rotated, window = (whole.rotate(q), whole.rotate(k)), self.window
        rule = window.window_tokens, window.sink_tokens
        # What left before this call, and its decay up to here, comes without gradient.
        age = T - span.num_tokens - 1 - window.window_tokens - torch.arange(T)[:, None, None]
        undone = age.clamp(min=0) * (log_decay.detach() - log_decay)[:, None]
        phi = torch.where(age >= 0, phi.detach(), phi) * undone.exp()
        out = far_definition(*rotated, v, likes, phi, log_decay, *rule)
        after = KVState(k.detach().transpose(1, 2), v.detach().transpose(1, 2))
        return out[:, -span.num_tokens :], after


class Stepped(Linear):
    """Token by token, the memory's graph kept from one to the next."""

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        outputs, memory = [q[:, :0]], state.memory
        for t in range(span.num_tokens):
            one = Span(span.start + t, torch.ones_like(span.valid), 1, MIXED.frequencies, q.dtype,
                       q.device)  # fmt: skip
            out, memory = self.memory(*(z[:, t : t + 1] for z in (x, q, k, v)), one, memory)
            outputs.append(out)
        return self.norm(torch.cat(outputs, 1)), MemoryState(memory)


class Both(PairState):
    def __init__(self, window: KVState, memory: MemoryState) -> None:
        self.window, self.memory = window, memory  # type: ignore[assignment]


class DensePair(Mixer):
    """A dense window beside a stepped memory, each with its norm; the state is both's."""

    def __init__(self, window: Dense, mixer: WindowBesideMemory) -> None:
        super().__init__()
        self.window, self.memory = window, mixer.memory
        self.window_norm, self.memory_norm = mixer.window_norm, mixer.memory_norm

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> Any:
        return Both(
            self.window.init_state(batch, groups, head_dim, like),
            MemoryState.empty(batch, groups, head_dim, head_dim, like),
        )

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, Any]:
        near, window = self.window(x, q, k, v, span, state.window)
        stepped = Stepped(self.memory, q.shape[-1], 0.0)
        stepped.norm = self.memory_norm
        read, memory = stepped(x, q, k, v, span, state.memory)
        return self.window_norm(near) + read, Both(window, memory)


def dense_mixer(mixer: Mixer) -> Mixer:
    """The same mixer, of the same parameters, by definitions that keep every key."""
    if isinstance(mixer, FullSoftmax):
        return Dense()
    if isinstance(mixer, WindowSoftmax):
        rule = mixer.window_tokens, mixer.sink_tokens
        beyond = mixer.sink_tokens and mixer.sink_reach_tokens < T
        return DensePastReach(*rule, mixer.sink_reach_tokens) if beyond else Dense(*rule)
    if isinstance(mixer, WindowBesideMemory):
        return DensePair(dense_mixer(mixer.window), mixer)  # type: ignore[arg-type]
    mixer.__class__ = DenseFar if isinstance(mixer, FarSoftmax) else Stepped
    return mixer


def within_reach(part: configs.Mixer) -> configs.Mixer:
    """The far definition knows no reach."""
    far = part.mixer == "window" and part.memory == tiny.FAR
    return part.model_copy(update={"sink_reach_tokens": 256}) if far else part


# Two layers at a time: through more, rounding alone comes to what the table allows.
LEARNERS = {
    "softmax": tiny.MIXED,
    "lower memories": tiny.MEMORIES[:2],
    "upper memories": tiny.MEMORIES[2:],
}


@pytest.fixture(scope="module", params=LEARNERS)
def learner(request: pytest.FixtureRequest) -> ModelConfig:
    layers = tuple(tuple(map(within_reach, layer)) for layer in LEARNERS[request.param])
    return model_config(layers, rms_norm_eps=EPS[request.param.split()[-1]])


def trainable(config: ModelConfig) -> Decoder:
    return random_decoder(config).requires_grad_(True)


def dense(config: ModelConfig) -> Decoder:
    decoder = trainable(config)
    for layer in decoder.layers:
        mixers = [(groups, dense_mixer(m)) for groups, m in layer.self_attn.arrangement()]
        layer.self_attn.set_mixers(mixers)
    return decoder


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gradients(decoder: Decoder, value: Tensor) -> dict[str, Tensor]:
    """By kind of weight, those of all layers in one row; single numbers of a group are one kind."""
    named, kinds = dict(decoder.named_parameters()), {}
    for name, found in zip(named, torch.autograd.grad(value, list(named.values())), strict=True):
        kind = "one a group" if named[name].numel() <= G else name.split(".", 3)[-1]
        kinds.setdefault(kind, []).append(found.flatten())
    return {kind: torch.cat(found) for kind, found in kinds.items()}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for kind, gradient in want.items():
        assert_close(got[kind], gradient)


def draws(tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids to predict ``tokens`` targets from, a few times."""
    for seed in range(0, 8, 2):
        yield random_tokens(B, T, seed=seed), random_tokens(B, tokens, seed=seed + 1)


def pooled(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of all draws at once: where the terms of one cancel, rounding is all that is left of it."""
    return {kind: torch.cat([one[kind] for one in found]) for kind in found[0]}


def test_gradients_are_those_of_a_dense_model(learner: ModelConfig) -> None:
    ours, other = trainable(learner), dense(learner)
    got, want = [], []
    for ids, targets in draws(T):
        mine, expected = ours(ids)[0], other(ids)[0]
        assert_close(mine, expected)
        got.append(gradients(ours, loss(mine, targets)))
        want.append(gradients(other, loss(expected, targets)))
    assert_same_gradients(pooled(got), pooled(want))


@pytest.mark.parametrize("tokens", [1, 2, 15], ids="{} tokens".format)
def test_gradients_of_a_later_call_are_those_of_a_dense_model(
    learner: ModelConfig, tokens: int
) -> None:
    """They flow through all of the call, its own keys too, and not into the call before."""
    assert not any(t.requires_grad for t in stored(trainable(learner)(random_tokens(B, 20))[1]))
    found = []
    for decoder in (trainable(learner), dense(learner)):
        each = []
        for ids, targets in draws(tokens):
            _, state = decoder(ids[:, :20])
            logits, _ = decoder(ids[:, 20 : 20 + tokens], state)
            each.append(gradients(decoder, loss(logits, targets)))
        found.append(pooled(each))
    assert_same_gradients(*found)


def test_a_call_with_gradients_is_one_span_whatever_the_chunk(learner: ModelConfig) -> None:
    ids, targets = random_tokens(B, T), random_tokens(B, T, seed=1)
    whole, chunked = trainable(learner), trainable(learner)
    got = gradients(chunked, loss(chunked(ids, chunk_tokens=7)[0], targets))
    for kind, gradient in gradients(whole, loss(whole(ids)[0], targets)).items():
        assert torch.equal(got[kind], gradient)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("tokens", [1, 5], ids="{} tokens".format)
def test_training_one_projection_alone_gives_its_gradient(
    learner: ModelConfig, part: str, tokens: int
) -> None:
    ids, targets = random_tokens(B, 20 + tokens), random_tokens(B, tokens, seed=1)
    found = []
    for alone in (False, True):
        decoder = trainable(learner).requires_grad_(not alone)
        weights = [getattr(layer.self_attn, part).weight for layer in decoder.model.layers]
        for weight in weights:
            weight.requires_grad_(True)
        _, state = decoder(ids[:, :20])
        value = loss(decoder(ids[:, 20:], state)[0], targets)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)]))
    assert_close(found[1], found[0])


def test_gradients_of_ragged_continuations_are_refused_not_wrong() -> None:
    decoder = trainable(MIXED.config)
    _, state = decoder(random_tokens(B, 20), lengths=torch.tensor([20, 11]))
    with pytest.raises(UnsupportedError, match="unlike lengths"):
        decoder(random_tokens(B, 5), state)


def test_gradients_of_a_ragged_batch_are_those_of_its_rows(learner: ModelConfig) -> None:
    ids, lengths = random_tokens(B, T), [T, 11]
    rows = [(slice(row, row + 1), n) for row, n in enumerate(lengths)]
    batched, alone = trainable(learner), trainable(learner)
    out, _ = batched(ids, lengths=torch.tensor(lengths))
    together = sum(loss(out[row, :n], ids[row, :n]) for row, n in rows)
    apart = sum(loss(alone(ids[row, :n])[0], ids[row, :n]) for row, n in rows)
    assert_same_gradients(gradients(batched, together), gradients(alone, apart))


# ---- numbers ---------------------------------------------------------------------------------


def test_decoding_512_steps_in_bf16_does_not_drift() -> None:
    """Steps are as near to float32 as one pass is, and as near at the end as at the start.

    Two ways to round are farther from each other than from the truth they both miss, so it is
    their errors that are compared.
    """
    narrow = random_decoder(model_config(), torch.bfloat16)
    exact = random_decoder(model_config())
    exact.load_state_dict({n: w.float() for n, w in narrow.state_dict().items()}, assign=True)
    ids = random_tokens(B, 512)
    truth = run(exact, ids, [])
    one_pass, steps = (run(narrow, ids, cuts).float() for cuts in ([], list(range(512))))
    allowed, expected = TOLERANCES[torch.bfloat16], differences(one_pass, truth)
    for part in (slice(None), slice(-64, None)):
        got = differences(steps[:, part], truth[:, part])
        assert got.rms <= expected.rms + allowed.rms
        assert got.max <= expected.max + allowed.max


@pytest.mark.usefixtures("poison")
def test_memory_is_written_before_it_is_read(mixed: Decoder) -> None:
    decoder = random_decoder(mixed.config)
    assert torch.empty(3).isnan().all(), "the fixture does not bite"
    assert not run(decoder, random_tokens(B, T), [13, 14, 15]).isnan().any()
    state = ran(decoder, random_tokens(3, 30), lengths=[30, 4, 17])
    rejoined = DecoderState.join(state.split())
    assert not continued(decoder, random_tokens(3, 9), rejoined).isnan().any()


def test_logits_stay_finite_far_beyond_the_trained_length() -> None:
    decoder = random_decoder(model_config(((window(0, 1, 2, reach=16),),) * 2))
    state = ran(decoder, random_tokens(B, 30))
    state.tokens_seen += 4_000_000
    out = continued(decoder, random_tokens(B, T), state)
    assert out.isfinite().all()


# ---- which logits ----------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    chunk=st.integers(1, 33),
    before=st.integers(0, 9),
)
@settings(max_examples=8, deadline=None)
def test_last_logits_are_those_of_each_rows_last_token(
    mixed: Decoder, lengths: list[int], chunk: int, before: int
) -> None:
    rows = len(lengths)
    ids, count = random_tokens(rows, max(lengths)), torch.tensor(lengths)
    state = ran(mixed, random_tokens(rows, before, seed=1))
    options: dict[str, Any] = {"lengths": count, "chunk_tokens": chunk}
    with torch.no_grad():
        every, after_every = mixed(ids, state.clone(), **options)
        last, after_last = mixed(ids, state.clone(), logits="last", **options)
        none, after_none = mixed(ids, state, logits="none", **options)
    assert last.shape == (rows, 1, V)
    assert none.shape == (rows, 0, V)
    assert_close(last[:, 0], every[torch.arange(rows), count - 1])
    for other in (after_last, after_none):
        assert other.tokens_seen.tolist() == after_every.tokens_seen.tolist()
        for a, b in zip(stored(other), stored(after_every), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [7, 64], ids="chunks of {}".format)
def test_the_head_turns_hidden_into_logits(mixed: Decoder, chunk: int) -> None:
    ids = random_tokens(B, T)
    with torch.no_grad():
        _, state = mixed.hidden(ids[:, :20], chunk_tokens=chunk)
        hidden, state = mixed.hidden(ids[:, 20:], state, chunk_tokens=chunk)
        assert_close(mixed.head(hidden), run(mixed, ids, [])[:, 20:])
        assert mixed.hidden(ids[:, :0])[0].shape == (B, 0, D)
    assert state.tokens_seen.tolist() == [T, T]


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_embedding_only_when_tied(tied: bool) -> None:
    decoder = random_decoder(model_config(tie_word_embeddings=tied))
    x = torch.randn(B, 3, D)
    normed = decoder.model.norm(x)
    assert_close(
        decoder.head(x), normed @ (decoder.embedding if tied else decoder.lm_head.weight).T
    )
    assert (decoder.lm_head is None) == tied


def test_random_logits_tell_tokens_apart(mixed: Decoder) -> None:
    """The tests above would prove little on a model whose logits hardly differ."""
    logits = run(mixed, random_tokens(B, T), [])
    assert logits.std() > 0.5
    assert len(logits.argmax(-1).unique()) > 20
