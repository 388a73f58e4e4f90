"""Parts of the server without HTTP: the prefix cache, batches, calls, limits of a prompt."""

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from respike.documents.sources import TokenizedSource, UploadedSource
from respike.errors import UsageError
from respike.generation import Sampling, stream
from respike.loading import Model
from respike.models.state import DecoderState
from respike.server.batch import Batches
from respike.server.grammar import Grammars
from respike.server.heap import return_freed_memory
from respike.server.jobs import End, Event, Job, Piece
from respike.server.library import Document
from respike.server.metrics import Metrics
from respike.server.prefix_cache import PrefixCache
from respike.server.run import check_host, is_loopback
from respike.server.scheduler import Prefill, Scheduler
from respike.server.settings import Settings
from respike.server.tools import Calls
from respike.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder, add_bos=True)
    decoder = tiny.random_decoder(tiny.model_config(tiny.MIXED))
    return Model(decoder, Tokenizer.from_folder(folder), decoder.config, Path("nowhere"), [])


def state_after(model: Model, ids: list[int]) -> DecoderState:
    with torch.inference_mode():
        return model.decoder(torch.tensor([ids]), logits="none")[1]


# ---- the prefix cache --------------------------------------------------------------------------


def test_the_longest_known_beginning_is_found_and_is_a_copy(model: Model) -> None:
    cache = PrefixCache(1 << 30)
    ids = tiny.random_tokens(90).tolist()
    for length in (20, 50, 90):
        cache.put("a", ids[:length], state_after(model, ids[:length]))
    found = cache.find("a", ids)
    assert found is not None
    assert found[0] == 50, "one token must be left to be read"
    assert found[1].num_tokens == 50
    found[1].layers[0][0].k.zero_()  # type: ignore[attr-defined]
    again = cache.find("a", [*ids[:50], 1, 2])
    assert again is not None
    assert again[1].layers[0][0].k.any()  # type: ignore[attr-defined]
    other = [*ids[:19], (ids[19] + 1) % tiny.V, *ids[20:]]
    assert cache.find("a", other) is None
    assert cache.find("b", ids) is None
    assert (cache.hits, cache.misses) == (2, 2)


def test_what_was_not_used_for_longest_leaves_first(model: Model) -> None:
    states = [state_after(model, tiny.random_tokens(30, seed=s).tolist()) for s in range(4)]
    prompts = [tiny.random_tokens(30, seed=s).tolist() for s in range(4)]
    size = states[0].nbytes()
    cache = PrefixCache(3 * size)
    for prompt, state in list(zip(prompts, states, strict=True))[:3]:
        cache.put("", prompt, state)
    assert cache.find("", [*prompts[0], 1])
    cache.put("", prompts[3], states[3])
    assert len(cache) == 3
    assert cache.held_bytes == 3 * size
    assert cache.find("", [*prompts[1], 1]) is None
    assert cache.find("", [*prompts[0], 1])
    cache.forget("")
    assert (len(cache), cache.held_bytes) == (0, 0)
    PrefixCache(size).put("", prompts[0], states[0])  # larger than half of all: not kept
    small = PrefixCache(size)
    small.put("", prompts[0], states[0])
    assert len(small) == 0


def test_the_heap_gives_back_where_glibc_is() -> None:
    import platform

    assert return_freed_memory() == (platform.libc_ver()[0] == "glibc")


# ---- batches -----------------------------------------------------------------------------------


def make_job(prompt: list[int], count: int, events: list[Event], **changes: Any) -> Job:
    fields: dict[str, Any] = {"samplings": [Sampling()], "deadline": time.monotonic() + 60}
    return Job(prompt, max_tokens=count, deliver=events.append, **fields | changes)


def text_of(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Piece))


def alone(model: Model, prompt: list[int], count: int) -> str:
    return "".join(stream(model, prompt, max_tokens=count))


def test_sequences_join_and_leave_at_any_step_and_stay_what_they_are(model: Model) -> None:
    batches, cache = Batches(model), PrefixCache(1)
    prompts = [tiny.random_tokens(5 + 40 * i, seed=i).tolist() for i in range(6)]
    counts = [17, 3, 9, 25, 1, 12]
    heard: list[list[Event]] = [[] for _ in prompts]
    for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        prefill = Prefill(make_job(prompt, count, heard[index]), model, cache)
        while (going := prefill.advance()) is None:
            pass
        for row, state in going:
            batches.add(row, state)
        for batch in batches:  # the others go on meanwhile
            batch.step()
    while len(batches):
        for batch in batches:
            batch.step()
    for index, events in enumerate(heard):
        assert text_of(events) == alone(model, prompts[index], counts[index]), index
        assert isinstance(events[-1], End)
        assert events[-1].tokens == counts[index]


def test_a_cancelled_sequence_leaves_without_a_word(model: Model) -> None:
    scheduler = Scheduler(model, Settings(), Metrics())
    events: list[Event] = []
    job = make_job([5, 6, 7], 100_000, events)
    assert scheduler.submit(job) is None
    scheduler.start()
    for _ in range(400):
        if len(events) > 3:
            break
        time.sleep(0.02)
    job.cancelled = True
    scheduler.stop()
    scheduler.join(30)
    assert not scheduler.is_alive()
    assert not any(isinstance(event, End) for event in events)
    refused = scheduler.submit(job)
    assert refused is not None
    assert refused.status == 503


def test_reading_gives_way_after_its_time_whatever_a_chunk_takes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer at a time, and not one more when its time is over: a prompt cannot stall streams."""
    scheduler = Scheduler(model, Settings(), Metrics())
    clock = 0.0
    monkeypatch.setattr("respike.server.scheduler.time.monotonic", lambda: clock)
    prefill = Prefill(make_job([5] * 5000, 3, []), model, scheduler.cache)
    scheduler._prefills.append(prefill)
    layers, ran = len(model.decoder.layers), 0
    advance = prefill.advance

    def slow() -> Any:
        nonlocal clock, ran
        clock, ran = clock + 0.03, ran + 1
        return advance()

    monkeypatch.setattr(prefill, "advance", slow)
    for count in (2, 4, 6):  # of layers of 0.03 s in 0.05 s
        scheduler._read_for(0.05)
        assert ran == count
    assert prefill.between_chunks == (ran % layers == 0)
    assert scheduler._prefills[0] is prefill
    scheduler._read_for(0.0)
    assert ran == 6


def test_a_long_prompt_does_not_stall_what_runs(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between tokens of one, another's prompt is read as long as a token takes, and a layer."""
    monkeypatch.setattr("respike.server.scheduler.READ_SECONDS", 0.001)
    scheduler = Scheduler(model, Settings(), Metrics())
    turns: list[tuple[str, float, float]] = []

    def timed(name: str, work: Any) -> Any:
        def call(*arguments: Any) -> None:
            began = time.monotonic()
            work(*arguments)
            if len(scheduler.batches):
                turns.append((name, began, time.monotonic()))

        return call

    for method, name in (("_decode", "token"), ("_read_prompt", "layer")):
        monkeypatch.setattr(scheduler, method, timed(name, getattr(scheduler, method)))
    runs: list[Event] = []
    job = make_job([5, 6, 7], 100_000, runs)
    assert scheduler.submit(job) is None
    read: list[Event] = []
    assert scheduler.submit(make_job(tiny.random_tokens(6000).tolist(), 1, read)) is None
    scheduler.start()
    for _ in range(3000):
        if read and isinstance(read[-1], End):
            break
        time.sleep(0.02)
    job.cancelled = True
    scheduler.stop()
    scheduler.join(30)
    groups = [list(g) for _, g in itertools.groupby(turns, key=lambda turn: turn[0])]
    pauses = [
        (layers[-1][1] - layers[0][1], tokens[-1][2] - tokens[-1][1])
        for tokens, layers in itertools.pairwise(groups)
        if layers[0][0] == "layer"
    ]
    assert len(pauses) > 5
    late = [pause for pause, token in pauses if pause > max(0.001, token) + 0.002]
    assert len(late) <= len(pauses) / 5, "the machine may pause us in between"


def test_a_large_job_is_read_layer_by_layer_beside_a_document(model: Model) -> None:
    """What a chunk's pauses leave half done is nobody's state."""
    prompt = tiny.random_tokens(700, seed=3).tolist()
    events: list[Event] = []
    scheduler = Scheduler(model, Settings(), Metrics())
    document = Document("a", 3)
    text = "rain on the stone bridge " * 90
    scheduler.read(
        document, TokenizedSource(UploadedSource("a", text.encode(), "text"), model.tokenizer)
    )
    assert scheduler.submit(make_job(prompt, 5, events)) is None
    scheduler.start()
    scheduler.stop()
    scheduler.join(60)
    assert text_of(events) == alone(model, prompt, 5)


def test_what_runs_is_finished_before_the_scheduler_stops(model: Model) -> None:
    scheduler = Scheduler(model, Settings(), Metrics())
    heard: list[list[Event]] = [[], []]
    for events in heard:
        assert scheduler.submit(make_job([5, 6, 7], 30, events)) is None
    scheduler.start()
    scheduler.stop()
    scheduler.join(60)
    assert all(isinstance(events[-1], End) for events in heard)
    assert threading.active_count() < 20


# ---- schemas and calls -------------------------------------------------------------------------


def test_a_grammar_allows_what_fits_and_nothing_else(model: Model) -> None:
    grammar = Grammars(model.tokenizer).of_schema({"enum": ["ab"]})
    text = ""
    while not grammar.ended:
        allowed = torch.nonzero(grammar.mask(torch.zeros(tiny.V)) > -1)[:, 0].tolist()
        ends = [t for t in allowed if t in model.tokenizer.eos_token_ids]
        token = (ends or allowed)[0]
        grammar.copy().take(token)  # a copy goes its own way
        grammar.take(token)
        text += model.tokenizer.decode([token])
        assert len(text) < 20
    assert json.loads(text) == "ab"
    with pytest.raises(UsageError, match="JSON schema"):
        Grammars(model.tokenizer).of_schema({"type": "florp"})


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "names"),
    [
        ("plain <b> text", "plain <b> text", []),
        (CALL, "", ["f"]),
        (f"Let me see. {CALL}{CALL}", "Let me see. ", ["f", "f"]),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
        ('<tool_call>["name"]</tool_call>', '<tool_call>["name"]</tool_call>', []),
        ("ends with <tool", "ends with <tool", []),
    ],
)
def test_calls_are_taken_out_of_the_text(
    text: str, shown: str, names: list[str], step: int
) -> None:
    calls = Calls(demanded=False)
    said = "".join(calls.push(text[i : i + step]) for i in range(0, len(text), step))
    rest, found = calls.finish()
    assert said + rest == shown
    assert [call["function"]["name"] for call in found] == names
    assert all(json.loads(call["function"]["arguments"]) == {"a": 1} for call in found)
    assert "<tool_call>{" not in said


def test_hosts_that_others_can_reach_need_a_key() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    for host in ("0.0.0.0", "192.168.1.5", "example.org", "::"):
        with pytest.raises(UsageError, match="API key"):
            check_host(host, None)
        check_host(host, "k")
