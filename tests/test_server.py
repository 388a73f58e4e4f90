"""The server, asked by the official client and by raw HTTP."""

import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from respike.documents import Source, read
from respike.documents.asking import NOT_FOUND, ask
from respike.documents.judging import Least
from respike.generation import Sampling, stream
from respike.loading import Model
from serving import Served, pico_model, serving

MESSAGES: list[Any] = [{"role": "user", "content": "the rain and the sea"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico_model(tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with serving(model) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    made = client_of(served)
    yield made
    made.close()


def client_of(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{served.address}/v1",
        api_key=key,
        max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=60),
    )


def expected(model: Model, prompt: list[int], **options: Any) -> str:
    text = stream(model, prompt, **options)
    return "".join(text)


# ---- the official client ---------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["pico"]
    assert client.models.retrieve("pico").owned_by == "respike"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_a_chat_is_what_generate_makes_of_its_template(client: openai.OpenAI, model: Model) -> None:
    found = client.chat.completions.create(
        model="pico", messages=MESSAGES, temperature=0, max_tokens=21
    )
    prompt = model.tokenizer.chat(MESSAGES)
    assert found.choices[0].message.content == expected(model, prompt, max_tokens=21)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.completion_tokens == 21


def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI, model: Model) -> None:
    chunks = list(
        client.chat.completions.create(
            model="pico", messages=MESSAGES, temperature=0, max_tokens=21, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected(model, model.tokenizer.chat(MESSAGES), max_tokens=21)
    assert len(chunks) > 9
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 21
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_seeds_choices_and_sampling(client: openai.OpenAI, model: Model) -> None:
    def ask_for(seed: int) -> list[str]:
        found = client.completions.create(
            model="pico", prompt="the rain", temperature=1, max_tokens=13, seed=seed, n=3
        )
        assert [c.index for c in found.choices] == [0, 1, 2]
        return [c.text for c in found.choices]

    first = ask_for(5)
    assert first == ask_for(5) != ask_for(6)
    assert len(set(first)) == 3
    prompt = model.tokenizer.encode("the rain")
    for index, text in enumerate(first):
        sampling = Sampling(temperature=1.0, seed=5 + index)
        assert text == expected(model, prompt, max_tokens=13, sampling=sampling)


def test_stop_strings_end_a_text_and_are_not_part_of_it(
    client: openai.OpenAI, model: Model
) -> None:
    whole = expected(model, model.tokenizer.encode("the rain"), max_tokens=40)
    stop = whole[11:13]
    for streamed in (False, True):
        found = client.completions.create(
            model="pico", prompt="the rain", temperature=0, max_tokens=40, stop=stop,
            stream=streamed,
        )  # fmt: skip
        chunks = list(found) if streamed else [found]
        assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_are_the_models(client: openai.OpenAI, model: Model) -> None:
    found = client.chat.completions.create(
        model="pico", messages=MESSAGES, temperature=0, max_tokens=7, logprobs=True, top_logprobs=4
    )
    prompt = model.tokenizer.chat(MESSAGES)
    text = stream(model, prompt, max_tokens=7)
    "".join(text)
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content or []
    assert [c.logprob for c in content] == pytest.approx(text.result.logprobs, abs=1e-3)
    assert all(len(c.top_logprobs) == 4 and c.top_logprobs[0].token == c.token for c in content)
    legacy = client.completions.create(
        model="pico", prompt="the rain", temperature=0, max_tokens=5, logprobs=2
    )
    logprobs = legacy.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == 5
    assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs or [])


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_demanded_call_fits_its_schema(
    client: openai.OpenAI, choice: Any, streamed: bool
) -> None:
    found: Any = client.chat.completions.create(
        model="pico", messages=MESSAGES, tools=[TOOL], tool_choice=choice, temperature=0,
        max_tokens=200, stream=streamed,
    )  # fmt: skip
    if streamed:
        choices = [chunk.choices[0] for chunk in found]
        calls = [call for c in choices for call in c.delta.tool_calls or []]
        reason = choices[-1].finish_reason
        assert not "".join(c.delta.content or "" for c in choices)
    else:
        calls, reason = found.choices[0].message.tool_calls, found.choices[0].finish_reason
    assert reason == "tool_calls"
    assert [call.function.name for call in calls] == ["weather"]
    assert 1 <= json.loads(calls[0].function.arguments)["days"] <= 9


def test_a_conversation_with_a_tool_s_result_goes_on(client: openai.OpenAI) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [*MESSAGES, {"role": "assistant", "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "c", "content": "wet"}]  # fmt: skip
    found = client.chat.completions.create(model="pico", messages=turns, tools=[TOOL], max_tokens=3)
    assert found.choices[0].finish_reason == "length"


def test_answers_fit_a_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"wet": {"type": "boolean"}, "town": {"enum": ["Oslo", "Rome"]}},
        "required": ["wet", "town"],
        "additionalProperties": False,
    }
    for temperature in (0, 1):
        found = client.chat.completions.create(
            model="pico", messages=MESSAGES, temperature=temperature, seed=1, max_tokens=300,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )  # fmt: skip
        value = json.loads(found.choices[0].message.content or "")
        assert value["town"] in ("Oslo", "Rome")
        assert isinstance(value["wet"], bool)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt-4o"}, "one model"),
    ({"temperature": -1}, "temperature"),
    ({"n": 99}, "n"),
    ({"stop": ""}, "stop"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"extra_body": {"florp": 1}}, "florp"),
    ({"extra_body": {"document": "../../etc/passwd"}}, "no such document"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "florp"}}}}, "schema"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_what_cannot_be_done_is_an_error_of_the_client(
    client: openai.OpenAI, change: dict[str, Any], words: str
) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.chat.completions.create(**{"model": "pico", "messages": MESSAGES} | change)
    assert words in caught.value.message
    assert caught.value.type == "invalid_request_error"


# ---- documents -------------------------------------------------------------------------------

TEXT = "\n".join(f"The rain of day {i} falls on stone {i * 7}." for i in range(120))


def upload(http: httpx.Client, text: str | bytes, **params: str) -> dict[str, Any]:
    sent = http.post("/v1/documents", content=text, params=params)
    assert sent.status_code == 201, sent.text
    id = sent.json()["id"]
    for _ in range(400):
        found = http.get(f"/v1/documents/{id}").json()
        if found["status"] != "reading":
            return dict(found)
        time.sleep(0.05)
    raise AssertionError("still reading")


def test_a_chat_about_a_document_is_what_ask_answers(
    served: Served, client: openai.OpenAI, model: Model
) -> None:
    reading = read(model, [Source("x", stream=io.BytesIO(TEXT.encode()))])
    asking = ask(model, reading, "Which stone?", max_tokens=15, least=None)
    wanted = "".join(asking)
    with served.client() as http:
        document = upload(http, TEXT, name="rain.txt")
        assert document["status"] == "ready"
        assert document["tokens"] == reading.num_tokens - reading.begin_token
        found = client.chat.completions.create(
            model="pico", temperature=0, max_tokens=15,
            messages=[{"role": "user", "content": "Which stone?"}],
            extra_body={"document": document["id"], "abstain": False},
        )  # fmt: skip
        assert found.choices[0].message.content == wanted
        told = found.model_extra or {}
        assert told["respike"]["passages"][0]["source"] == "rain.txt"
        assert told["respike"]["kv_bytes"] >= told["respike"]["state_bytes"]
        assert [d["id"] for d in http.get("/v1/documents").json()["data"]] == [document["id"]]
        activity = http.get("/v1/activity").json()
        assert len(activity["layer_shares"]) == model.config.num_hidden_layers
        assert http.delete(f"/v1/documents/{document['id']}").json()["deleted"]
        assert http.delete(f"/v1/documents/{document['id']}").status_code == 404
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(
            model="pico", messages=MESSAGES, extra_body={"document": document["id"]}
        )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("max_tokens", [30, 9, 1])
def test_what_is_not_in_a_document_is_said_not_to_be(
    model: Model, stream: bool, max_tokens: int
) -> None:
    """As `ask` does: the same verdict, for answers longer and shorter than what is judged."""
    reading = read(model, [Source("x", stream=io.BytesIO(TEXT.encode()))])
    question = "Which stone?"
    free = ask(model, reading, question, max_tokens=max_tokens, least=Least(-99.0, -99.0))
    said = "".join(free)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0, "max_tokens": max_tokens, "stream": stream,
    }  # fmt: skip

    def answer(http: httpx.Client, body: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
        found = http.post("/v1/chat/completions", json=body)
        assert found.status_code == 200, found.text
        if not stream:
            choice = found.json()["choices"][0]
            return choice["message"]["content"], choice["finish_reason"], found.json()["respike"]
        parts = [json.loads(line[6:]) for line in found.text.split("\n\n") if line[6:7] == "{"]
        text = "".join(p["choices"][0]["delta"].get("content") or "" for p in parts)
        return text, parts[-1]["choices"][0]["finish_reason"], parts[-1]["respike"]

    evidence, confidence = free.answer.evidence, free.answer.confidence
    for least, found in (
        (Least(evidence - 1e-2, confidence - 1e-2), True),
        (Least(evidence + 1e-2, confidence - 1e-2), False),
        (Least(evidence - 1e-2, confidence + 1e-2), False),
    ):
        with serving(model, hosts=("127.0.0.1",), least=least) as running, running.client() as http:
            id = upload(http, TEXT)["id"]
            text, reason, told = answer(http, body | {"document": id})
            assert told["found"] is found
            assert told["evidence"] == pytest.approx(evidence, abs=1e-3)
            assert told["confidence"] == pytest.approx(confidence, abs=1e-3)
            assert text == (said if found else NOT_FOUND)
            assert told["withheld"] == ("" if found else told["withheld"])
            assert bool(told["withheld"]) == (not found)
            assert (told["tokens_per_second"] > 0) == (max_tokens > 1)
            assert told["tokens_per_second"] < 5000, "when it was made, not when it was let go"
            # The first token comes from the prompt, which is not looked at.
            assert bool(told["passages"]) == (found and max_tokens > 1)
            assert reason == ("length" if found else "stop")
            text, _, told = answer(http, body | {"document": id, "abstain": False})
            assert (text, told["found"]) == (said, None)
            assert running.idle()


def test_who_asks_for_abstention_where_there_is_none_is_told(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "abstain": True, "max_tokens": 1}
    with served.client() as http:
        id = upload(http, TEXT)["id"]
        for more in (
            {},
            {"document": id, "n": 2},
            {"document": id, "response_format": {"type": "json_object"}},
        ):
            found = http.post("/v1/chat/completions", json=body | more)
            assert found.status_code == 400
            assert "abstain" in found.json()["error"]["message"]
        http.delete(f"/v1/documents/{id}")


def test_documents_come_as_they_are_or_in_a_form(served: Served) -> None:
    with served.client() as http:
        for text in (TEXT, "a\r\n--b\r\n\r\n", " \r\rx\n"):
            plain = upload(http, text, name="rain.txt")
            files = {"file": ("../../etc/ra\u00edn.txt", text.encode(), "text/plain")}
            sent = http.post("/v1/documents", files=files, data={"purpose": "assistants"})
            assert sent.status_code == 201, sent.text
            form = sent.json()
            assert form["name"] == ".._.._etc_ra\u00edn.txt"
            assert (form["bytes"], form["tokens"]) == (plain["bytes"], plain["tokens"])
            for document in (plain, form):
                http.delete(f"/v1/documents/{document['id']}")
        page = {"file": ("page.html", b"<p>rain</p><script>x</script>", "application/octet-stream")}
        found = http.post("/v1/documents", files=page, params={"name": "other.html"}).json()
        assert found["name"] == "other.html"
        assert found["tokens"] < 8, "the script is not text"
        http.delete(f"/v1/documents/{found['id']}")
        described = http.get("/openapi.json").json()["paths"]["/v1/documents"]["post"]
        assert "multipart/form-data" in described["requestBody"]["content"]


HEAD = b'--q\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (HEAD + b"x\r\n--q--", "multipart/form-data", "boundary is missing"),
        (HEAD + b"x\r\n--q--", "multipart/form-data; boundary=" + "q" * 71, "boundary is missing"),
        (b"", "multipart/form-data; boundary=q", "does not stand in it"),
        (HEAD + b"x", "multipart/form-data; boundary=q", "end is missing"),
        (HEAD + b"x\r\n" + HEAD + b"y\r\n--q--", "multipart/form-data; boundary=q", "2 files"),
        (HEAD.replace(b"file", b"x") + b"x\r\n--q--", "multipart/form-data; boundary=q", "0 files"),
        (b"--q\r\nx\r\n--q--", "multipart/form-data; boundary=q", "no header"),
        (b"--q\r\nA: b\r\n\r\nx\r\n--q--", "multipart/form-data; boundary=q", "form-data"),
        (b"--q" + b"\r\n--q" * 40 + b"--", "multipart/form-data; boundary=q", "more than 32"),
        (HEAD + b"\r\n--q--", "multipart/form-data; boundary=q", "no text"),
        (HEAD + b"caf\xe9\r\n--q--", "multipart/form-data; boundary=q", "not UTF-8"),
    ],
)  # fmt: skip
def test_forms_that_are_none_are_refused_in_one_line(
    served: Served, body: bytes, kind: str, words: str
) -> None:
    with served.client() as http:
        found = http.post("/v1/documents", content=body, headers={"content-type": kind})
        assert found.status_code == 400
        error = found.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert words in error["message"]
        assert "\n" not in error["message"]
        assert http.get("/v1/documents").json()["data"] == []


def test_documents_that_are_none_are_refused(served: Served) -> None:
    with served.client() as http:
        for content, kind, status in (
            (b"", "text/plain", 400),
            (b"caf\xe9", "text/plain", 400),
            (b"%PDF-1.4 no", "application/pdf", 400),
            (b"<head></head>", "text/html", 400),
        ):
            found = http.post("/v1/documents", content=content, headers={"content-type": kind})
            assert found.status_code == status, found.text
            assert found.json()["error"]["type"] == "invalid_request_error"
        assert http.get("/v1/documents").json()["data"] == []


# ---- batches and the cache ---------------------------------------------------------------------


def test_many_at_once_are_what_each_is_alone(served: Served, model: Model) -> None:
    prompts = [f"the rain {'and the sea ' * i}" for i in range(12)]
    lengths = [3 + 5 * (i % 4) for i in range(12)]
    alone = [
        expected(model, model.tokenizer.encode(p), max_tokens=n)
        for p, n in zip(prompts, lengths, strict=True)
    ]
    found: list[str] = [""] * len(prompts)

    def one(index: int) -> None:
        with served.client() as http:
            body = {"prompt": prompts[index], "max_tokens": lengths[index], "temperature": 0}
            found[index] = http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone


def test_a_prompt_that_was_read_before_is_not_read_again(served: Served) -> None:
    prompt = "the rain and the sea " * 60
    with served.client() as http:

        def ask_for(text: str) -> tuple[str, int]:
            body = {"prompt": text, "max_tokens": 9, "temperature": 0}
            found = http.post("/v1/completions", json=body).json()
            return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"][
                "cached_tokens"
            ]

        text, cached = ask_for(prompt)
        again, cached_again = ask_for(prompt)
        other, cached_other = ask_for(prompt[:-30] + "or the stone")
    assert cached == 0
    assert again == text
    assert cached_again >= 256
    assert cached_other >= 256
    assert other


def test_a_client_that_goes_away_frees_its_place(served: Served) -> None:
    with served.client() as http:
        body = {"prompt": "the sea", "max_tokens": 16_000, "stream": True, "temperature": 0}
        with http.stream("POST", "/v1/completions", json=body) as running:
            next(running.iter_lines())
        assert served.idle()
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body | {"stream": False}, timeout=0.7)
        assert served.idle()


# ---- limits ------------------------------------------------------------------------------------


def test_a_key_is_asked_for_and_never_shown(model: Model) -> None:
    with serving(model, api_key="sésame") as running, running.client() as http:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "sesame"}):
            found = http.get("/v1/models", headers=headers)
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").status_code == 200
        good = {"Authorization": "Bearer sésame".encode()}
        assert http.get("/v1/models", headers=good).status_code == 200
        assert http.get("/metrics").status_code == 401


def test_limits_are_kept(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(
        model, hosts=("127.0.0.1",), max_body_bytes=3000, max_document_bytes=9000,
        max_prompt_tokens=500, max_output_tokens=2000, timeout_seconds=2.0, max_streams=1,
        max_waiting=1, max_documents_bytes=1,
    ) as running, running.client() as http:  # fmt: skip
        assert http.get("/health", headers={"Host": "evil.example"}).status_code == 421
        secret = "secret words " * 400
        found = http.post("/v1/completions", json={"prompt": secret})
        assert found.status_code == 413

        def parts() -> Iterator[bytes]:
            yield b'{"prompt": "'
            for _ in range(100):
                yield b"secret words "
                time.sleep(0.001)
            yield b"a" * 3000

        kind = {"content-type": "application/json"}
        assert http.post("/v1/completions", content=parts(), headers=kind).status_code == 413
        assert http.post("/v1/documents", content=b"x" * 9001).status_code == 413
        large = http.post("/v1/documents", files={"file": ("a.txt", b"x" * 9001)})
        assert large.status_code == 413
        assert set(large.json()["error"]) == {"message", "type", "param", "code"}
        full = http.post("/v1/documents", content=b"secret words")
        assert full.json()["error"]["code"] == "documents_full"
        long = http.post("/v1/completions", json={"prompt": "x" * 600})
        assert long.json()["error"]["code"] == "context_length_exceeded"
        slow = {"prompt": "secret", "max_tokens": 2000, "temperature": 0, "stream": True}
        codes: list[str] = []

        def one() -> None:
            with running.client() as mine:
                codes.append(mine.post("/v1/completions", json=slow).text)

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        text = "".join(codes)
        assert "overloaded" in text or "timeout" in text
    assert "secret" not in "".join(capfd.readouterr())


def test_health_and_metrics(served: Served) -> None:
    with served.client() as http:
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
        assert http.get("/health").json()["status"] == "ok"
        text = http.get("/metrics").text
        assert 'respike_requests_total{route="/v1/completions",status="200"}' in text
        assert "respike_output_tokens_total" in text
        for path in ("/v1/nothing", "/docs", "/../etc/passwd", "/%2e%2e/etc/passwd"):
            assert http.get(path).status_code == 404
        assert http.put("/v1/models").status_code == 405
        assert http.put("/v1/models").json()["error"]["type"] == "invalid_request_error"


def test_a_failure_of_the_model_ends_its_requests_and_nothing_else(
    served: Served, model: Model, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    turns = model.decoder.turns

    def failing(tokens: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if tokens.shape[1] == 5:
            raise RuntimeError("secret words")
        return turns(tokens, *rest, **options)

    monkeypatch.setattr(model.decoder, "turns", failing)
    with served.client() as http:
        bad = http.post("/v1/completions", json={"prompt": [7, 8, 9, 10, 11], "max_tokens": 2})
        assert bad.status_code == 500
        assert bad.json()["error"]["type"] == "server_error"
        good = http.post("/v1/completions", json={"prompt": [7, 8], "max_tokens": 2})
        assert good.status_code == 200
    shown = "".join(capfd.readouterr())
    assert "RuntimeError at" in shown
    assert "secret" not in shown
