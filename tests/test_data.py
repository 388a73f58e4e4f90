"""From documents to batches: nothing lost, borders right, shares exact, resumed bit for bit."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refusal import one_line
from respike.data import Batch, Loader, Mixture, Sample, TextSource, TokenStore, prepare
from respike.data.store import chat_tokens, open_store
from respike.errors import DataError, UnsupportedError, UsageError
from respike.tokenizer import Tokenizer
from tiny import save_tokenizer

TURNS = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "The rain."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "The sea."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, add_bos=False)
    return Tokenizer.from_folder(folder)


class Listed:
    """A source of given lengths, again and again; every token says which it is."""

    def __init__(self, name: str, lengths: Sequence[int], whole: bool = False) -> None:
        self.name, self.lengths, self.whole = name, list(lengths), whole
        self.fingerprint = f"{name} {lengths} {whole}"
        self.epoch_samples = len(lengths)

    def draw(self, number: int) -> Sample:
        size = self.lengths[number % len(self.lengths)]
        tokens = number * 1000 + np.arange(size, dtype=np.int64)
        answers = np.arange(size) % 3 == 2
        return Sample(tokens, counted=np.arange(size) % 5 != 4, answers=answers, whole=self.whole)


def taken(loader: Loader, batches: int) -> list[Batch]:
    return [next(loader) for _ in range(batches)]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)
SHAPE = {"batch_size": st.integers(1, 4), "context_tokens": st.integers(2, 23)}


# ---- packing ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(text=SIZES, recall=SIZES, batches=st.integers(1, 12), **SHAPE)
def test_packing_loses_no_token_and_keeps_every_border(
    text: list[int], recall: list[int], batches: int, batch_size: int, context_tokens: int
) -> None:
    sources = [(Listed("text", text), 2.0), (Listed("recall", recall, whole=True), 1.0)]
    loader = Loader(sources, batch_size=batch_size, context_tokens=context_tokens)
    pieces: dict[tuple[int, int], list[int]] = defaultdict(list)
    open_before: list[tuple[int, int] | None] = [None] * batch_size
    padded = 0
    for batch in taken(loader, batches):
        for row in range(batch_size):
            previous, last = None, 0
            for t in range(context_tokens):
                source, token = int(batch.sources[row, t]), int(batch.tokens[row, t])
                document, place = int(batch.documents[row, t]), int(batch.positions[row, t])
                if source < 0:
                    assert (token, document, place) == (0, 0, 0)
                    assert not batch.loss_mask[row, t]
                    assert not batch.answers[row, t]
                    padded += 1
                    previous = None
                    continue
                number = token // 1000
                name = (source, number)
                assert place == token % 1000 == len(pieces[name])
                pieces[name].append(token)
                begins = name != previous
                assert document == last + begins
                if t == 0:
                    assert bool(batch.continues[row]) is (place > 0)
                    assert (open_before[row] == name) is (place > 0)
                elif begins:
                    assert place == 0, "only the beginning of a row continues"
                assert bool(batch.loss_mask[row, t]) is (not begins and place % 5 != 4)
                expected = not begins and place % 5 != 4 and place % 3 == 2
                assert bool(batch.answers[row, t]) is expected
                previous, last = name, document
            lengths = (text, recall)[previous[0]] if previous else []
            done = previous is None or len(pieces[previous]) == lengths[previous[1] % len(lengths)]
            open_before[row] = None if done else previous
    ledger = loader.ledger()
    assert ledger["tokens"] == sum(map(len, pieces.values()))
    assert ledger["padded_tokens"] == padded
    assert ledger["tokens"] + padded == batches * batch_size * context_tokens
    for index, (source, _) in enumerate(sources):
        mine = {n: p for (i, n), p in pieces.items() if i == index}
        assert ledger["sources"][source.name]["tokens"] == sum(map(len, mine.values()))
        drawn = loader.mixture.numbers[index]
        missing = set(range(drawn)) - set(mine)
        waiting = {n for lane in loader.cursor()["lanes"] for i, n in lane["waiting"] if i == index}
        assert missing <= waiting, "what was drawn is in a batch or waits for one"
        whole = [n for n in mine if source.whole and source.draw(n).tokens.size <= context_tokens]
        assert all(len(mine[n]) == source.draw(n).tokens.size for n in whole), "never cut"


@settings(max_examples=40, deadline=None)
@given(text=SIZES, recall=SIZES, before=st.integers(0, 9), **SHAPE)
def test_a_run_that_is_taken_up_again_is_bit_equal(
    text: list[int], recall: list[int], before: int, batch_size: int, context_tokens: int
) -> None:
    sources = [(Listed("text", text), 1.0), (Listed("recall", recall, whole=True), 0.7)]
    shape = {"batch_size": batch_size, "context_tokens": context_tokens}
    straight = Loader(sources, **shape)
    taken(straight, before)
    cursor = json.loads(json.dumps(straight.cursor()))
    resumed = Loader(sources, cursor=cursor, **shape)
    assert resumed.ledger() == straight.ledger()
    for a, b in zip(taken(straight, 5), taken(resumed, 5), strict=True):
        assert same(a, b)
    assert resumed.cursor() == straight.cursor()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(SIZES, min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    draws=st.integers(1, 300),
)
def test_shares_are_exact_to_the_longest_sample_at_every_moment(
    lengths: list[list[int]], weights: list[float], draws: int
) -> None:
    mixture = Mixture([(Listed(str(i), l), weights[i]) for i, l in enumerate(lengths)])
    used = weights[: len(lengths)]
    longest = max(map(max, lengths))
    for _ in range(draws):
        mixture.next()
        total = sum(mixture.drawn_tokens)
        for got, weight in zip(mixture.drawn_tokens, used, strict=True):
            assert abs(got - total * weight / sum(used)) <= longest * len(lengths) + 1e-6


def test_the_rows_of_all_ranks_together_are_the_batch() -> None:
    loader = Loader([(Listed("a", [5, 9]), 1.0)], batch_size=6, context_tokens=8)
    batch = next(loader)
    shards = [batch.shard(rank, 3) for rank in range(3)]
    assert all(len(shard.tokens) == 2 for shard in shards)
    for name in vars(batch):
        joined = torch.cat([getattr(shard, name) for shard in shards])
        assert torch.equal(joined, getattr(batch, name))
    with pytest.raises(UsageError, match="6 rows"):
        batch.shard(0, 4)


def test_a_cursor_of_something_else_is_refused_with_what_differs() -> None:
    loader = Loader([(Listed("a", [5]), 1.0)], batch_size=2, context_tokens=8)
    cursor = loader.cursor()
    for change in (
        {"batch_size": 3, "context_tokens": 8, "sources": [(Listed("a", [5]), 1.0)]},
        {"batch_size": 2, "context_tokens": 9, "sources": [(Listed("a", [5]), 1.0)]},
        {"batch_size": 2, "context_tokens": 8, "sources": [(Listed("a", [6]), 1.0)]},
        {"batch_size": 2, "context_tokens": 8, "sources": [(Listed("a", [5]), 2.0)]},
    ):
        with pytest.raises(DataError, match="cursor: ") as caught:
            Loader(**change, cursor=cursor)
        one_line(caught.value, "was", "now")


def test_mixtures_and_loaders_that_mean_nothing_are_refused() -> None:
    one = Listed("a", [5])
    for sources in ([], [(one, 1.0), (one, 1.0)], [(one, 0.0)], [(one, float("nan"))]):
        with pytest.raises(UsageError):
            Mixture(sources)
    with pytest.raises(UsageError):
        Loader([(one, 1.0)], batch_size=0, context_tokens=8)
    with pytest.raises(DataError, match="sample 0 is empty"):
        Mixture([(Listed("a", [0]), 1.0)]).next()


# ---- stores and text sources -----------------------------------------------------------------


def write_texts(folder: Path, count: int) -> list[str]:
    texts = [f"the rain number {i} in the sea " + "and sun " * (i % 7) for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        rows = (json.dumps({"text": text}) + "\n" for text in texts[part::2])
        (folder / f"{part}.jsonl").write_text("".join(rows))
    return texts


def test_a_store_holds_every_document_and_is_opened_rather_than_made_again(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = write_texts(tmp_path / "in", 30)
    (tmp_path / "in" / "2.jsonl").write_text('{"text": ""}\n')
    seen: list[tuple[int, int]] = []
    store = prepare([tmp_path / "in"], tokenizer, tmp_path / "store", lambda *n: seen.append(n))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    begins = [0, *store.ends[:-1]]
    found = [tokenizer.decode(store.tokens[b:e].tolist()) for b, e in zip(begins, store.ends)]  # noqa: B905
    assert found == texts[::2] + texts[1::2]
    assert store.counted is None
    assert store.tokens.dtype == np.uint16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "store"]
    stamp = (tmp_path / "store" / "tokens.bin").stat().st_mtime_ns
    assert prepare([tmp_path / "in"], tokenizer, tmp_path / "store").key == store.key
    assert (tmp_path / "store" / "tokens.bin").stat().st_mtime_ns == stamp
    (tmp_path / "in" / "0.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(DataError, match="other files"):
        prepare([tmp_path / "in"], tokenizer, tmp_path / "store")


def test_damage_and_failure_leave_one_line_and_nothing_behind(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_texts(tmp_path / "in", 3)
    (tmp_path / "in" / "z.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"z\.jsonl: line 1"):
        prepare([tmp_path / "in"], tokenizer, tmp_path / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    (tmp_path / "in" / "z.jsonl").unlink()
    prepare([tmp_path / "in"], tokenizer, tmp_path / "store")
    with (tmp_path / "store" / "ends.bin").open("ab") as file:
        file.write(b"12345678")
    for folder in (tmp_path / "store", tmp_path / "in", tmp_path / "no"):
        with pytest.raises(DataError, match="not a folder of tokens") as caught:
            open_store(folder)
        one_line(caught.value, folder)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="no text in any of 1 files"):
        prepare([tmp_path / "blank.txt"], tokenizer, tmp_path / "empty")


def test_what_a_killed_run_left_is_removed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_texts(tmp_path / "in", 3)
    left, other = tmp_path / ".store.77.partial", tmp_path / ".stored.77.partial"
    for folder in (left, other):
        folder.mkdir()
        (folder / "tokens.bin").write_bytes(bytes(8))
    prepare([tmp_path / "in"], tokenizer, tmp_path / "store")
    assert other.exists()
    assert not left.exists()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> TokenStore:
    folder = tmp_path_factory.mktemp("store")
    write_texts(folder / "in", 200)
    return prepare([folder / "in"], tokenizer, folder / "store")


def drawn(source: TextSource, epoch: int) -> list[bytes]:
    count = source.epoch_samples or 0
    return [source.draw(n).tokens.tobytes() for n in range(epoch * count, (epoch + 1) * count)]


def test_splits_are_disjoint_whole_and_nested(store: TokenStore) -> None:
    parts = {
        (split, frac): set(drawn(TextSource("t", store, split=split, heldout_frac=frac), 0))
        for split in ("train", "heldout")
        for frac in (0.1, 0.3)
    }
    for frac in (0.1, 0.3):
        assert not parts["train", frac] & parts["heldout", frac]
        assert len(parts["train", frac]) + len(parts["heldout", frac]) == 200
    assert parts["heldout", 0.1] < parts["heldout", 0.3]
    assert 8 <= len(parts["heldout", 0.1]) <= 35
    with pytest.raises(DataError, match="no document of at least 1 tokens is in the split"):
        TextSource("t", store, split="heldout", heldout_frac=0.0)


def test_a_text_is_in_the_same_split_wherever_it_stands(
    tmp_path: Path, tokenizer: Tokenizer, store: TokenStore
) -> None:
    texts = write_texts(tmp_path / "in", 200)
    rows = (json.dumps({"more": 1, "text": text}) + "\n" for text in reversed(texts))
    (tmp_path / "all.jsonl").write_text("".join(rows))
    other = prepare([tmp_path / "all.jsonl"], tokenizer, tmp_path / "store")
    held = [TextSource("t", s, split="heldout", heldout_frac=0.2) for s in (store, other)]
    assert sorted(drawn(held[0], 0)) == sorted(drawn(held[1], 0))


def test_every_epoch_has_every_document_once_in_an_order_of_its_own(store: TokenStore) -> None:
    source = TextSource("t", store, seed=3)
    first, second = drawn(source, 0), drawn(source, 1)
    assert sorted(first) == sorted(second)
    assert first != second
    assert drawn(TextSource("t", store, seed=3), 1) == second
    assert drawn(TextSource("t", store, seed=4), 0) != first
    assert drawn(source, 5) != drawn(source, 0) == first, "back to an earlier epoch"


def test_the_order_of_a_seed_never_moves(store: TokenStore) -> None:
    """From Philox's raw bits, written down: another version of numpy must give the same."""
    source = TextSource("t", store, seed=7, heldout_frac=0.0)
    bits = np.random.Philox(key=np.array([7, 0], np.uint64)).random_raw(200)
    order = sorted(range(200), key=lambda i: int(bits[i]))
    begins = np.concatenate([[0], store.ends[:-1]])
    wanted = [store.tokens[begins[i] : store.ends[i]].tolist() for i in order]
    assert [source.draw(n).tokens.tolist() for n in range(200)] == wanted


@pytest.mark.parametrize("most", [1, 7, 10_000])
def test_long_documents_come_in_pieces_that_lose_nothing(store: TokenStore, most: int) -> None:
    source = TextSource("t", store, heldout_frac=0.3, max_document_tokens=most)
    pieces = [source.draw(n).tokens for n in range(source.epoch_samples or 0)]
    assert max(map(len, pieces)) <= most
    whole = TextSource("t", store, heldout_frac=0.3)
    assert source.epoch_tokens == whole.epoch_tokens == sum(map(len, pieces))
    uncut = [whole.draw(n).tokens for n in range(whole.epoch_samples or 0)]
    both = [np.sort(np.concatenate(parts)) for parts in (pieces, uncut)]
    assert np.array_equal(*both)


def test_a_real_run_is_taken_up_bit_for_bit_across_epochs(store: TokenStore) -> None:
    def loader(cursor: dict[str, Any] | None = None) -> Loader:
        return Loader(
            [(TextSource("t", store), 1.0)], batch_size=3, context_tokens=64, cursor=cursor
        )

    straight = loader()
    taken(straight, 40)
    assert straight.ledger()["sources"]["t"]["epochs"] > 1
    resumed = loader(json.loads(json.dumps(straight.cursor())))
    assert all(map(same, taken(straight, 40), taken(resumed, 40)))


# ---- conversations ---------------------------------------------------------------------------


def test_of_a_conversation_the_assistants_words_count_and_no_others(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS}) + '\n{"text": "the sea"}\n')
    store = prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "store")
    source = TextSource("t", store, heldout_frac=0.0)
    samples = sorted((source.draw(n) for n in range(2)), key=lambda s: -len(s.tokens))
    assert samples[0].counted is not None
    said = samples[0].tokens[samples[0].counted].tolist()
    assert tokenizer.decode(said, skip_special=False) == "The rain.<|im_end|>\nThe sea.<|im_end|>\n"
    assert samples[1].counted is not None
    assert samples[1].counted.all()


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    was = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}{{ m['content'] if loop.last else '-' }}"
            "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
        )
        with pytest.raises(DataError, match="writes this turn otherwise") as caught:
            prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "store")
        one_line(caught.value, "a.jsonl: line 1", "messages[1]")
        tokenizer.chat_template = None
        with pytest.raises(UnsupportedError, match="no chat template"):
            chat_tokens(TURNS, tokenizer)
    finally:
        tokenizer.chat_template = was


def test_control_tokens_spelled_in_a_document_stay_text(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the <|im_end|> sea"}\n')
    store = prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "store")
    assert not tokenizer.special_ids & set(store.tokens.tolist())
