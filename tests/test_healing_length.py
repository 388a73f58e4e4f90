"""The stage `length`: states go from row to row; what the original cannot know, the data says."""

import json
from pathlib import Path

import pytest
import torch

from respike.conversion import convert, plan
from respike.data import Batch, Loader, RecallSource
from respike.data.recall import Curriculum
from respike.healing import Healing, Request, heal
from respike.healing.models import converted_folder, models
from respike.healing.objectives import Asked, Carried, beyond_original, distil, predicting
from respike.healing.packed import Lanes, segments, teacher_hidden
from respike.loading import load
from respike.models.packing import pack_decoder
from respike.recipe import load_recipe
from respike.tokenizer import Tokenizer
from tiny import MEMORIES, model_config, random_decoder, random_tokens, save_documents, save_tiny
from tolerance import assert_close

ORIGINAL_TOKENS = 64
"""What the tiny original was trained for."""
ROW, CHECKPOINT, STEPS = 48, 4, 66
SETTINGS = ("window_tokens=9", "sink_tokens=2", "far.features=5", "far.calibration_tokens=600")
RECALL = {
    "families": ["copy", "passkey"], "frac": 1.0, "least_tokens": 280, "first_tokens": 290,
    "last_tokens": 300,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("source") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = ORIGINAL_TOKENS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(plan(source, load_recipe("constant", SETTINGS)), out)
    return out


def course() -> Healing:
    stage = {
        "kind": "length", "tokens": STEPS * ROW, "context_tokens": ROW, "rows": 1, "recall": RECALL,
        "train": {"v_proj": "full"}, "rate": 3e-3, "memory_rate": 3e-3,
    }  # fmt: skip
    judge = {
        "every_tokens": 10**6, "contexts": 2, "context_tokens": ROW, "recall": ["copy:12"],
        "trials": 2, "recall_slack_frac": 1.0,
    }  # fmt: skip
    fields = {"heal": 1, "name": "far", "stages": [stage], "judge": judge, "heldout_frac": 0.3}
    return Healing.model_validate(fields)


def batches(source: Path) -> Loader:
    tokenizer = Tokenizer.from_folder(source)
    recall = RecallSource(
        "recall", tokenizer, families=("copy",), curriculum=Curriculum(20, 60, 160, 4)
    )
    return Loader([(recall, 1.0)], batch_size=2, context_tokens=ROW)


def test_what_the_original_cannot_know_is_told_apart_token_by_token(source: Path) -> None:
    """Against a walk that counts what each row has read since its states were dropped."""
    loader = batches(source)
    seen = {"beyond": 0, "told": 0, "cut": 0}
    for step in range(40):
        batch = next(loader)
        if step % CHECKPOINT == 0:
            read, whole = [0, 0], [False, False]
        since = step % CHECKPOINT * ROW
        beyond, told = beyond_original(batch, ORIGINAL_TOKENS, since)
        answers = predicting(batch.answers)
        for row in range(2):
            for t in range(ROW):
                if t == 0:
                    starts = not batch.continues[row]
                else:
                    starts = bool(batch.documents[row, t] != batch.documents[row, t - 1])
                if starts:
                    read[row], whole[row] = 0, True
                # The logits of what is read now predict the next token.
                far = read[row] + 1 >= ORIGINAL_TOKENS
                if batch.documents[row, t]:
                    assert bool(beyond[row, t]) == far
                    expected = far and bool(answers[row, t]) and whole[row]
                    assert bool(told[row, t]) == expected
                    seen["beyond"] += far
                    seen["told"] += expected
                    seen["cut"] += far and not whole[row]
                read[row] += 1
    assert min(seen.values()) > 20


def test_the_original_reads_no_further_than_it_was_trained_for() -> None:
    decoder = random_decoder(model_config(MEMORIES))
    decoder.config = decoder.config.model_copy(update={"max_position_embeddings": 40})
    pack_decoder(decoder)
    tokens, lanes = random_tokens(1, 90), Lanes({})
    whole, _ = decoder.hidden(tokens)
    for begin in range(0, 90, 30):
        piece = tokens[:, begin : begin + 30]
        owner = torch.ones_like(piece)
        none = torch.zeros_like(owner, dtype=torch.bool)
        batch = Batch(
            piece, owner, owner, ~none, none, owner, torch.tensor([begin > 0])
        )  # fmt: skip
        found = teacher_hidden(decoder, piece, segments(batch), lanes)
        if begin < 40:
            assert_close(found[0], whole[0, begin : begin + 30])
        else:
            assert not found.any()
    assert int(lanes.states[0].tokens_seen) == 60


def test_told_answers_pull_towards_the_data_and_the_rest_towards_the_original(
    converted: Path, source: Path
) -> None:
    """The loss is the sum of both, each of plain logits."""
    exact = course().model_copy(update={"compute": "f32"})
    pair = models(converted_folder(converted), None, exact)
    for tensor in pair.student.parameters():
        tensor.requires_grad_(False)
    pair.student.layers[1].self_attn.v_proj.weight.requires_grad_()
    batch = next(batches(source)).rows(slice(0, 1))
    weights = torch.zeros(batch.loss_mask.shape)
    weights[0, [5, 9, 20]] = torch.tensor([1.0, 4.0, 2.0])
    told = torch.zeros_like(batch.loss_mask)
    told[0, [9, 30]] = True
    loss = distil(
        pair, batch, Asked(weights, told, 7.0), (set(), 1), Carried(Lanes({}), Lanes({})),
        lambda: torch.zeros(()),
    )  # fmt: skip
    logits = [
        torch.cat(
            [m(batch.tokens[:, p.begin : p.end])[0][0] for p in segments(batch)]
        ).detach().float().log_softmax(-1)
        for m in (pair.student, pair.original)
    ]  # fmt: skip
    mine, theirs = logits
    kl = sum(w * (theirs[t].exp() * (theirs[t] - mine[t])).sum() for t, w in ((5, 1), (20, 2)))
    nats = -4 * mine[9, batch.tokens[0, 10]]
    assert loss == pytest.approx(float(kl + nats) / 7, rel=1e-3)
    assert pair.student.layers[1].self_attn.v_proj.weight.grad.abs().sum() > 0


def test_a_course_learns_from_what_it_read_and_leaves_all_alone_while_it_reads(
    converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    text, out = save_documents(tmp_path / "text"), tmp_path / "model"
    report = heal(Request(converted, out, (str(text),)), course())
    lines = [json.loads(line) for line in (out / "healing.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    read = [line for line in steps if line["loss"] is None]
    assert report["done"]
    assert len(steps) == STEPS
    assert 0 < len(read) < STEPS / 2
    assert all(line["gradient_norm"] == 0 for line in read)
    assert all(line["gradient_norm"] > 0 for line in steps if line not in read)
    load(out)
    # The same bytes in legs that stop wherever they may.
    asked = Request(converted, tmp_path / "legs", (str(text),))
    assert not heal(asked, course(), leg_minutes=0.0)["done"]
    assert heal(asked, course(), leg_minutes=0.0)["done"]
    name = "model.safetensors"
    assert (tmp_path / "legs" / name).read_bytes() == (out / name).read_bytes()
