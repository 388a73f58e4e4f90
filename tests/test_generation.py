"""Generation: how a token is chosen, when the text ends, and that the state can be continued."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from torch import Tensor

from respike.cli.main import program
from respike.errors import UsageError
from respike.generation import (
    NUCLEUS_TOKENS,
    Generation,
    Sampling,
    _likeliest,
    choose,
    generate,
    stream,
)
from respike.loading import Model
from respike.models.decoder import Decoder
from respike.models.state import DecoderState
from respike.tokenizer import Tokenizer
from tiny import MIXED, V, model_config, random_decoder, save_tokenizer, token_id

CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
END = token_id("<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, add_bos=False)
    return Tokenizer.from_folder(folder)


def model_of(decoder: Decoder, tokenizer: Tokenizer) -> Model:
    return Model(decoder, tokenizer, decoder.config, Path("nowhere"), [])


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    """Random weights that write capitals only: one token a letter, whatever is around them."""
    decoder = random_decoder(model_config(MIXED))
    mask = torch.full((V,), -1e4)
    mask[tokenizer.encode(CAPITALS)] = 0
    head = decoder.head
    decoder.head = lambda x: head(x) + mask  # type: ignore[method-assign]
    return model_of(decoder, tokenizer)


def scripted(tokenizer: Tokenizer, tokens: Sequence[int]) -> Model:
    """A model that writes ``tokens``, whatever it reads."""
    decoder = random_decoder(model_config(MIXED))
    script = iter(tokens)

    def forward(
        new: Tensor, state: DecoderState | None = None, **_: str
    ) -> tuple[Tensor, DecoderState]:
        state = decoder.init_state() if state is None else state
        logits = torch.nn.functional.one_hot(torch.tensor([[next(script)]]), V).float()
        return logits, DecoderState(state.layers, state.tokens_seen + new.shape[1])

    decoder.forward = forward  # type: ignore[method-assign]
    return model_of(decoder, tokenizer)


def finish(model: Model, prompt: Sequence[int], **options: Any) -> Generation:
    text = stream(model, prompt, **options)
    "".join(text)
    return text.result


PROMPT = [40, 41, 42, 43, 44]


# ---- determinism -----------------------------------------------------------------------------


def test_greedy_text_is_the_same_every_time(model: Model) -> None:
    first = finish(model, PROMPT, max_tokens=23)
    assert len(first.tokens) == 23
    assert len(set(first.tokens)) > 3
    assert finish(model, PROMPT, max_tokens=23).tokens == first.tokens


def test_greedy_takes_the_likeliest_token_of_one_pass_over_everything(model: Model) -> None:
    tokens = finish(model, PROMPT, max_tokens=19).tokens
    whole = torch.tensor([PROMPT + tokens])
    with torch.inference_mode():
        logits = model.decoder(whole)[0][0]
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens


def test_equal_seeds_give_equal_text_and_other_seeds_other_text(model: Model) -> None:
    texts = [
        finish(model, PROMPT, max_tokens=29, sampling=Sampling(temperature=1.0, seed=s)).text
        for s in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_does_not_touch_the_global_random_state(model: Model) -> None:
    before = torch.get_rng_state()
    finish(model, PROMPT, max_tokens=5, sampling=Sampling(temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1e-3),
        Sampling(temperature=1e-40),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1.0, min_p=1.0),
    ],
    ids=["cold", "coldest", "top-k 1", "top-p 0", "min-p 1"],
)
def test_every_narrow_setting_is_greedy_in_the_limit(model: Model, sampling: Sampling) -> None:
    greedy = finish(model, PROMPT, max_tokens=17).tokens
    assert finish(model, PROMPT, max_tokens=17, sampling=sampling).tokens == greedy


def test_generate_is_the_text_of_the_stream(model: Model) -> None:
    text = generate(model, "over", max_tokens=9)
    assert text == finish(model, model.tokenizer.encode("over"), max_tokens=9).text
    assert len(text) == 9


# ---- choosing --------------------------------------------------------------------------------

LOGITS = np.array([0.3, -1.2, 2.1, 1.7, -0.4, 2.0, 0.9, -3.0, 1.1])


def expected_probabilities(sampling: Sampling, seen: Sequence[int]) -> NDArray[np.float64]:
    """What the docstring of `Sampling` says, in numpy and one token at a time."""
    logits = LOGITS.copy()
    for token in set(seen):
        p = sampling.repetition_penalty
        logits[token] = logits[token] / p if logits[token] > 0 else logits[token] * p
    logits /= sampling.temperature
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    weight = {i: float(np.exp(logits[i])) for i in ranked}
    total, reached, kept = sum(weight.values()), 0.0, []
    for i in ranked:
        kept.append(i)
        reached += weight[i] / total
        if reached >= sampling.top_p:
            break
    kept = [i for i in kept if weight[i] >= sampling.min_p * weight[ranked[0]]]
    result = np.zeros(len(logits))
    result[kept] = [weight[i] for i in kept]
    return result / result.sum()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), 9),
        (Sampling(temperature=0.4), 9),
        (Sampling(temperature=2.5, top_k=4), 4),
        (Sampling(temperature=1.0, top_p=0.7), 3),
        (Sampling(temperature=1.0, top_k=5, top_p=0.55), 2),
        (Sampling(temperature=1.0, min_p=0.35), 4),
        (Sampling(temperature=1.0, repetition_penalty=1.9), 9),
        (Sampling(temperature=0.8, top_k=6, top_p=0.9, min_p=0.2, repetition_penalty=1.3), 5),
    ],
    ids=["plain", "cold", "top-k", "top-p", "top-k, top-p", "min-p", "penalty", "all"],
)
def test_tokens_are_drawn_as_often_as_an_independent_computation_says(
    sampling: Sampling, kept: int
) -> None:
    seen, draws = [2, 7, 2], 3000
    expected = expected_probabilities(sampling, seen)
    assert (expected > 0).sum() == kept
    draw = torch.Generator().manual_seed(0)
    logits = torch.from_numpy(LOGITS)
    counts = np.bincount(
        [choose(logits, seen, sampling, draw) for _ in range(draws)], minlength=len(LOGITS)
    )
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    spread = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) <= 4.5 * spread + 1e-9).all()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=0.2),
        Sampling(temperature=1.0, top_p=0.999),
        Sampling(temperature=1.0, top_k=700),
        Sampling(temperature=1.0, top_k=10**6, top_p=0.9),
    ],
    ids=["nucleus", "flat", "top-k", "top-k of all"],
)
def test_only_those_that_can_be_kept_are_ranked_and_as_all_would_be(sampling: Sampling) -> None:
    logits = torch.randn(3001, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert len(logits.unique()) < len(logits) / 2, "equal ones are what can go wrong"
    scaled = logits.double()
    values, order = _likeliest(scaled, sampling)
    assert order is not None
    every, ranked = scaled.sort(descending=True, stable=True)
    assert torch.equal(order, ranked[: len(order)])
    assert torch.equal(values, every[: len(order)])
    if sampling.top_k:
        assert len(order) == min(sampling.top_k, len(scaled))
    else:
        assert every[: len(order)].exp().sum() / scaled.exp().sum() >= sampling.top_p
        assert len(order) == (len(scaled) if sampling.top_p > 0.9 else NUCLEUS_TOKENS)


def test_the_repetition_penalty_also_bends_greedy_choices() -> None:
    logits = torch.from_numpy(LOGITS)
    draw = torch.Generator()
    assert choose(logits, [], Sampling(), draw) == 2
    assert choose(logits, [2], Sampling(repetition_penalty=1.1), draw) == 5
    assert choose(logits, [2, 5], Sampling(repetition_penalty=1.5), draw) == 3
    assert choose(logits, [3, 5], Sampling(repetition_penalty=0.5), draw) == 5


def test_choosing_does_not_change_the_logits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.from_numpy(LOGITS).to(dtype)
        before = logits.clone()
        choose(logits, [2], Sampling(temperature=1.0, repetition_penalty=3.0), torch.Generator())
        assert torch.equal(logits, before)


def test_the_penalty_sees_the_prompt_and_what_was_written(tokenizer: Tokenizer) -> None:
    """Constant logits: a penalised model moves on to the next best token each time."""
    decoder = random_decoder(model_config(MIXED))
    ranking = torch.zeros(V)
    ranking[[50, 51, 52, 53]] = torch.tensor([4.0, 3.9, 3.8, 3.7])
    head = decoder.head
    decoder.head = lambda x: 0 * head(x) + ranking  # type: ignore[method-assign]
    sampling = Sampling(repetition_penalty=2.0)
    found = finish(model_of(decoder, tokenizer), [51], max_tokens=3, sampling=sampling)
    assert found.tokens == [50, 52, 53]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -2.0),
        ("seed", -1),
        ("seed", 1 << 63),
    ],
)
def test_sampling_values_that_mean_nothing_are_refused_by_name(name: str, bad: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {bad}, expected "):
        Sampling(**{name: bad})  # type: ignore[arg-type]


# ---- ending ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 13])
def test_no_more_tokens_than_asked_for(model: Model, count: int) -> None:
    found = finish(model, PROMPT, max_tokens=count)
    assert len(found.tokens) == len(found.text) == count
    assert found.finish_reason == "length"


def test_an_end_token_stops_and_is_not_part_of_the_text(tokenizer: Tokenizer) -> None:
    words = tokenizer.encode("the rain")
    found = finish(scripted(tokenizer, [*words, END, 99]), PROMPT)
    assert found.tokens == words
    assert found.text == "the rain"
    assert found.finish_reason == "stop"


def test_the_end_tokens_of_the_config_count_too(tokenizer: Tokenizer) -> None:
    model = scripted(tokenizer, [60, 61, 62])
    model.config = model.config.model_copy(update={"eos_token_ids": (61,)})
    assert finish(model, PROMPT).tokens == [60]


TEXT = "one STOP two"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("STOP",), "one "),
        (("S",), "one "),
        ((" S",), "one"),
        (("STOPS",), TEXT),
        (("two",), "one STOP "),
        (("o",), ""),
        (("never", "TOP"), "one S"),
        (("two", "OP"), "one ST"),
        (("STOP!", "P "), "one STO"),
        ((), TEXT),
    ],
)
def test_a_stop_string_ends_the_text_before_it(
    tokenizer: Tokenizer, stop: tuple[str, ...], text: str
) -> None:
    model = scripted(tokenizer, [*tokenizer.encode(TEXT), END])
    pieces = []
    run = stream(model, PROMPT, stop=stop)
    for piece in run:
        pieces.append(piece)
        assert text.startswith("".join(pieces)), "a piece of the stop string leaked"
    assert "".join(pieces) == text == run.result.text
    assert run.result.finish_reason == "stop"


def test_what_might_have_become_a_stop_string_is_shown_in_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("one STO")
    found = finish(scripted(tokenizer, tokens), PROMPT, max_tokens=len(tokens), stop=("STOP",))
    assert found.text == "one STO"
    assert found.finish_reason == "length"


def test_a_stop_string_is_found_in_front_of_an_unfinished_character(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token may hold the stop string and the first byte of what follows."""

    class Late:
        def push(self, _: int) -> str:
            return ""

        def flush(self) -> str:
            return "a STOP\ufffd"

    monkeypatch.setattr(tokenizer, "stream", Late)
    found = finish(scripted(tokenizer, [60]), PROMPT, max_tokens=1, stop=("STOP",))
    assert found.text == "a "
    assert found.finish_reason == "stop"


# ---- streaming -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["the rain and the sea", "Grüße, 世界! 🌍🌏", "☃", "a\n\n b  c "])
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    run = stream(scripted(tokenizer, [*tokens, END]), PROMPT)
    pieces = [piece for piece in run if piece]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == run.result.text == text
    assert len(pieces) >= len(text.split())


def test_pieces_come_while_the_model_is_writing(tokenizer: Tokenizer) -> None:
    run = iter(stream(scripted(tokenizer, tokenizer.encode("xyz")), PROMPT))
    assert next(run) == "x"
    assert next(run) == "y"


def test_a_character_cut_off_by_the_limit_is_shown_as_unknown(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("ab☃")
    found = finish(scripted(tokenizer, tokens[:-1]), PROMPT, max_tokens=len(tokens) - 1)
    assert found.text == "ab\ufffd"


# ---- refusals --------------------------------------------------------------------------------


def test_an_empty_prompt_is_refused_before_anything_runs(model: Model) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        stream(model, [])


def test_an_empty_stop_string_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="empty stop string"):
        stream(model, PROMPT, stop=("x", ""))


def test_the_prompt_of_the_caller_is_left_alone(model: Model) -> None:
    prompt = list(PROMPT)
    finish(model, prompt, max_tokens=3)
    assert prompt == PROMPT


# ---- continuing ------------------------------------------------------------------------------


def test_continuing_from_the_state_equals_one_uninterrupted_run(model: Model) -> None:
    whole = finish(model, PROMPT, max_tokens=31).tokens
    first = finish(model, PROMPT, max_tokens=12)
    assert first.state is not None
    assert first.state.num_tokens == len(PROMPT) + 11
    rest = finish(model, first.tokens[-1:], max_tokens=19, state=first.state)
    assert first.tokens + rest.tokens == whole


def test_a_prompt_in_two_parts_equals_the_prompt(model: Model) -> None:
    whole = finish(model, PROMPT, max_tokens=9).tokens
    with torch.inference_mode():
        _, state = model.decoder(torch.tensor([PROMPT[:3]]), logits="none")
    assert finish(model, PROMPT[3:], max_tokens=9, state=state).tokens == whole


# ---- chat ------------------------------------------------------------------------------------


@pytest.fixture
def fed(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens the model is given in each of its prompts."""
    counts: list[int] = []
    forward = model.decoder.forward

    def counted(tokens: Tensor, state: Any = None, **options: Any) -> Any:
        if tokens.shape[1] > 1:
            counts.append(tokens.shape[1])
        return forward(tokens, state, **options)

    monkeypatch.setattr(model.decoder, "forward", counted)
    monkeypatch.setattr("respike.loading.load", lambda *_, **__: model)
    yield counts
    torch.set_num_threads(1)


def talk(*lines: str, options: Sequence[str] = ()) -> list[str]:
    arguments = ["chat", "tiny", "--threads", "1", "--max-tokens", "7", *options]
    said = "".join(f"{line}\n" for line in lines)
    result = CliRunner().invoke(program, arguments, input=said)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def conversation(model: Model, turns: Sequence[str], system: str | None = None) -> list[str]:
    """The same answers, with everything read again in each turn."""
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answers.append(finish(model, model.tokenizer.chat(messages), max_tokens=7).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


TURNS = ("hello there", "and the sea?", "one more")


def test_a_chat_reads_only_what_is_new_and_answers_as_if_it_had_read_everything(
    model: Model, fed: list[int]
) -> None:
    assert talk(*TURNS) == conversation(model, TURNS)
    mine, theirs = fed[:3], fed[3:]
    assert mine[0] == theirs[0]
    for turn in (1, 2):
        # Its last token of the turn before, the end of that turn, and the new question.
        assert mine[turn] == theirs[turn] - theirs[turn - 1] - 6


def test_a_new_chat_forgets_all_but_the_system_message(model: Model, fed: list[int]) -> None:
    system = "be brief"
    answers = talk(TURNS[0], "/new", TURNS[1], options=["--system", system])
    assert answers[0] == conversation(model, TURNS[:1], system)[0]
    assert answers[1] == conversation(model, TURNS[1:2], system)[0]
    assert fed[1] == fed[3]


def test_a_template_that_rewrites_the_past_makes_the_chat_read_it_again(
    model: Model, fed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some templates drop what was said before; the state then no longer fits."""
    template = "{{ messages|length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    assert talk(*TURNS) == conversation(model, TURNS)
    assert fed[:3] == fed[3:]


def test_an_empty_line_ends_the_chat(model: Model, fed: list[int]) -> None:
    assert len(talk("hello", "", "not read")) == 1
    assert len(fed) == 1
    assert model.tokenizer.chat_template is not None
