"""Recall samples to train on: the evaluation's makers, and none of what it asks for."""

import json
import re
from pathlib import Path

import pytest

from respike.data import Curriculum, Loader, RecallSource, TextSource, prepare
from respike.data.recall import DIGITS, MATERIAL, TRAINING_FACTS, TRAINING_SENTENCES
from respike.errors import UsageError
from respike.material import SENTENCES, Material, Vocabulary
from respike.tasks import FAMILIES, Task, make_trials
from respike.tokenizer import Tokenizer
from tiny import save_tokenizer

EVALUATED = Material()
NAMES = ("Rain", "Sea", "Sun", "Mill", "Dog", "Road", "Lamp", "Bell", "Reed", "Boat")
PLAIN = ("rain", "wind", "moon", "stone", "glass", "horse", "table", "river", "paper", "bread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The toy vocabulary with words in it, capitalised and not, as a real one has."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, add_bos=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [
        f"\u0120{a}{b}" for a in NAMES + PLAIN for b in ("", "ton", "ford", "ly", "s", "er", "en")
    ]
    merges, vocab = [], {t: i for i, t in enumerate(letters)}
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    return Tokenizer.from_folder(folder)


FIXED = Curriculum(least_tokens=300, first_tokens=900, last_tokens=900)


def test_words_numbers_and_sentences_are_none_of_the_evaluations(tokenizer: Tokenizer) -> None:
    mine, theirs = Vocabulary(tokenizer, MATERIAL), Vocabulary(tokenizer)
    assert min(len(mine.words), len(theirs.words)) >= 16, "or every token would serve as a word"
    assert not set(mine.words) & set(theirs.words)
    assert EVALUATED.digits not in DIGITS
    assert not set(TRAINING_SENTENCES) & set(SENTENCES)
    assert MATERIAL.number(7) == "0007"
    assert len(MATERIAL.numbers) == 10**4


def evaluated(tokenizer: Tokenizer, family: str, seeds: int = 40) -> list[tuple[list[int], str]]:
    tasks = {
        "copy": Task("copy", 64),
        "multi-query": Task("multi-query", 16),
        "variables": Task("variables", 900, hops=2),
    }
    task = tasks.get(family, Task(family, 600))
    vocabulary = Vocabulary(tokenizer)
    trials = [t for seed in range(seeds) for t in make_trials(vocabulary, task, 2, seed)]
    return [(t.tokens, tokenizer.decode([t.tokens[a] for a in t.answers])) for t in trials]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_of_the_evaluation_is_an_answer_in_training(
    tokenizer: Tokenizer, family: str
) -> None:
    source = RecallSource("r", tokenizer, families=[family], curriculum=FIXED)
    samples = [source.draw(n) for n in range(80)]
    trained = set()
    for sample in samples:
        assert sample.answers is not None
        said = tokenizer.decode(sample.tokens[sample.answers].tolist())
        if family == "multi-query":
            trained |= set(said.split())
        elif family == "questions":
            trained |= set(said.split())
            assert trained <= {v for r in TRAINING_FACTS.relations for v in r.values}
        elif family == "multi-needle":
            numbers = re.findall("=([0-9]+)", tokenizer.decode(sample.tokens.tolist()))
            assert {len(number) for number in numbers} <= set(DIGITS)
            trained |= set(numbers)
        elif family == "copy":
            trained |= {tuple(sample.tokens[i : i + 6]) for i in range(len(sample.tokens) - 6)}
        else:
            number = said.strip()
            assert number.isdigit()
            assert len(number) in DIGITS
            trained.add(number)
    for tokens, said in evaluated(tokenizer, family):
        if family == "copy":
            assert not trained & {tuple(tokens[i : i + 6]) for i in range(len(tokens) - 6)}
        else:
            assert not trained & set(said.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_what_the_text_before_them_says(tokenizer: Tokenizer, family: str) -> None:
    source = RecallSource("r", tokenizer, families=[family], curriculum=FIXED)
    for number in range(6):
        sample = source.draw(number)
        assert sample.whole
        assert sample.answers is not None
        answers = sample.answers.nonzero()[0].tolist()
        text = tokenizer.decode(sample.tokens.tolist())
        if family == "copy":
            half = len(sample.tokens) // 2
            assert (sample.tokens[:half] == sample.tokens[half:]).all()
            assert answers == list(range(half + 1, 2 * half))
        elif family in ("multi-needle", "questions"):
            asked = re.findall(
                r"=([0-9]+)$" if family == "multi-needle" else r"^Answer: .* (\w+)$", text, re.M
            )[-4:]
            said = tokenizer.decode([int(sample.tokens[a]) for a in answers])
            assert "".join(asked) == said.replace(" ", "")
            sign = " " if family == "questions" else "="
            assert all(len(re.findall(rf"{sign}{answer}\b", text)) == 2 for answer in asked)
            assert any(s.strip() in text for s in TRAINING_SENTENCES)
        elif family == "multi-query":
            first, again = {}, 0
            for key, value in re.findall(r" (\w+) = (\w+)\n", text):
                again += key in first and first[key] == value
                first.setdefault(key, value)
            assert again == len(answers) > 1
        else:
            said = tokenizer.decode([int(sample.tokens[a]) for a in answers]).strip()
            assert text.rstrip().endswith(said)
            assert said in text[: -len(said) - 1]
            assert any(s.strip() in text for s in TRAINING_SENTENCES)
            assert not any(s.strip() in text for s in SENTENCES)


def test_samples_depend_on_seed_and_number_only(tokenizer: Tokenizer) -> None:
    first, second = (RecallSource("r", tokenizer, seed=s) for s in (0, 1))
    assert first.fingerprint != second.fingerprint
    later = RecallSource("r", tokenizer).draw(31)
    assert (first.draw(31).tokens == later.tokens).all()
    assert first.draw(31).tokens.tobytes() != second.draw(31).tokens.tobytes()
    assert len({first.draw(n).tokens.tobytes() for n in range(50)}) == 50


def test_the_range_grows_from_the_first_to_the_last(tokenizer: Tokenizer) -> None:
    curriculum = Curriculum(
        least_tokens=64, first_tokens=128, last_tokens=1000, doubling_samples=100
    )
    assert [curriculum.reach(n) for n in (0, 100, 200, 300, 10**9)] == [128, 256, 512, 1000, 1000]
    source = RecallSource("r", tokenizer, curriculum=curriculum, families=["copy", "multi-query"])
    for begin in (0, 100, 400):
        sizes = [len(source.draw(n).tokens) for n in range(begin, begin + 40)]
        assert max(sizes) <= curriculum.reach(begin + 40)
        assert max(sizes) > curriculum.reach(begin) / 2
    assert min(sizes) < 200, "short ones stay in"
    for sizes in ((8, 64, 64), (64, 32, 64), (64, 128, 100)):
        with pytest.raises(UsageError, match="recall curriculum"):
            Curriculum(*sizes)


def test_a_family_that_needs_more_room_takes_it_and_unknown_ones_are_refused(
    tokenizer: Tokenizer,
) -> None:
    tight = Curriculum(least_tokens=16, first_tokens=16, last_tokens=16)
    for family in FAMILIES:
        sample = RecallSource("r", tokenizer, families=[family], curriculum=tight).draw(0)
        assert sample.answers is not None
        assert sample.answers.any()
    with pytest.raises(UsageError, match="passkey"):
        RecallSource("r", tokenizer, families=["magic"])


def test_filler_is_sentences_of_the_text_that_is_given(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    made = [f"The number {i} is held by a tall grey keeper of the gate." for i in range(60)]
    banned = SENTENCES[0].strip()
    (tmp_path / "a.txt").write_text(" ".join([*made[:30], banned, *made[30:]]))
    store = prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "store")
    filler = TextSource("t", store, heldout_frac=0.0)
    source = RecallSource(
        "r", tokenizer, families=["passkey", "needles"], curriculum=FIXED, filler=filler
    )
    texts = [tokenizer.decode(source.draw(n).tokens.tolist()) for n in range(30)]
    real = sum("tall grey keeper" in text for text in texts)
    assert 5 < real < 25, "about every second"
    assert not any(banned in text for text in texts)


def test_batches_mark_every_answer(tokenizer: Tokenizer) -> None:
    curriculum = Curriculum(least_tokens=64, first_tokens=200, last_tokens=200)
    source = RecallSource("r", tokenizer, curriculum=curriculum, families=["copy", "multi-query"])
    loader = Loader([(source, 1.0)], batch_size=2, context_tokens=256)
    batches = [next(loader) for _ in range(4)]
    handed = sum(int(batch.answers.sum()) for batch in batches)
    waiting = [n for lane in loader.cursor()["lanes"] for _, n in lane["waiting"]]
    whole = [n for n in range(loader.mixture.numbers[0]) if n not in waiting]
    expected = sum(int(s.answers.sum()) for n in whole if (s := source.draw(n)).answers is not None)
    assert handed == expected > 0
