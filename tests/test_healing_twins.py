"""Healing of SpikingBrain's twins: sinks, routers, merges and linear layers are trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from refusal import one_line
from respike.checkpoint import open_checkpoint
from respike.checkpoint.families import is_new
from respike.conversion import convert, plan
from respike.data import Batch
from respike.errors import UnsupportedError
from respike.healing import Healing, Request, apply, heal
from respike.healing.config import Stage
from respike.healing.models import converted_folder, models
from respike.healing.objectives import transfer
from respike.healing.packed import Packed, segments, short_windows
from respike.healing.parallel import World
from respike.healing.trainable import prepare, trained_names
from respike.loading import load_decoder
from respike.models.balance import watch_balance
from respike.recipe import load_recipe
from test_brain_recipes import F32, TWINS
from tiny import (
    full,
    model_config,
    random_decoder,
    random_tokens,
    save_documents,
    save_tiny,
    window,
)
from tolerance import assert_close

SINKS = 3
SUNK = ((full(0, 1, 2),), (window(0, 2, tokens=5, sinks=4, reach=16), full(1)))
RECALL = {"families": ["copy"], "least_tokens": 16, "first_tokens": 24, "last_tokens": 32}
JUDGE = {
    "every_tokens": 100_000, "contexts": 2, "context_tokens": 48, "recall": ["copy:12"],
    "trials": 3, "recall_slack_frac": 1.0,
}  # fmt: skip
ATTENTION = {"q_proj": "full", "k_proj": "full", "v_proj": 3, "o_proj": "full"}
TRANSFER = {
    "kind": "transfer", "tokens": 12 * 96, "context_tokens": 48, "rows": 2, "train": ATTENTION,
    "rate": 3e-3, "memory_rate": 1e-2, "recall": RECALL,
}  # fmt: skip
DISTIL = TRANSFER | {"kind": "distil", "balance": 0.1, "sampled_frac": 1.0}
EXPERTS = DISTIL | {"train": {"q_proj": 2, "up_proj": 2, "down_proj": 3}}


def course(*stages: dict[str, Any], **changes: Any) -> Healing:
    fields = {"heal": 1, "name": "twin", "stages": stages, "judge": JUDGE, "heldout_frac": 0.3}
    return Healing.model_validate({**fields, "compute": "f32", **changes})


COURSES = {
    "spikingbrain-7b": course(TRANSFER, DISTIL),
    "spikingbrain-76b": course(EXPERTS),
    "spikingbrain-2-5b": course(DISTIL),
}


def batch_of(tokens: Tensor, documents: list[list[int]]) -> Batch:
    owner = torch.tensor(documents)
    none = torch.zeros_like(owner)
    continues = torch.zeros(len(owner), dtype=torch.bool)
    return Batch(tokens, owner, none, owner > 0, none.bool(), none, continues)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_documents(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "model")


def twin(name: str, source: Path, out: Path) -> Path:
    convert(plan(source, load_recipe(name, TWINS[name])), out)
    return out


# ---- packed rows


@pytest.mark.parametrize("layers", [SUNK, tiny.BRAINS], ids=["sinks", "merged"])
def test_a_packed_row_is_its_documents_one_by_one(layers: Any) -> None:
    sinks = SINKS if layers is SUNK else 0
    decoder = random_decoder(model_config(layers, learned_sinks=sinks))
    tokens = random_tokens(2, 40)
    batch = batch_of(tokens, [[1] * 13 + [2] * 27, [1] * 33 + [0] * 7])
    hidden = Packed(decoder, tokens, segments(batch), None).hidden()
    assert hidden.shape[:2] == (2, 40)
    for row, begin, end in ((0, 0, 13), (0, 13, 40), (1, 0, 33)):
        alone, _ = decoder.hidden(tokens[row : row + 1, begin:end])
        assert_close(hidden[row, begin:end], alone[0])


def test_learned_sinks_learn_from_every_document_of_a_row() -> None:
    decoder = random_decoder(model_config(SUNK, learned_sinks=SINKS)).requires_grad_(True)
    tokens, sinks = random_tokens(1, 30), decoder.model.learned_sinks
    found = []
    for documents, rows in (([1] * 11 + [2] * 19, [(0, 30)]), ([1] * 30, [(0, 11), (11, 30)])):
        total = torch.zeros_like(sinks)
        for begin, end in rows:
            piece = tokens[:, begin:end]
            parts = segments(batch_of(piece, [documents[begin:end]]))
            out = Packed(decoder, piece, parts, None).hidden().square().sum()
            total += torch.autograd.grad(out, sinks)[0]
        found.append(total)
    assert_close(found[0], found[1])
    assert found[0].abs().amax(1).gt(1e-3).all()


def test_balance_of_a_packed_row_is_the_mean_over_its_tokens() -> None:
    decoder = random_decoder(model_config(tiny.BRAINS[:1]))
    tokens, values = random_tokens(1, 24), []
    for documents in ([1] * 7 + [2] * 17, [1] * 7 + [0] * 17, [0] * 7 + [1] * 17):
        begin = documents.index(1)
        piece = tokens[:, begin:]
        batch = batch_of(piece, [documents[begin:]])
        with watch_balance(decoder) as balance:
            Packed(decoder, piece, segments(batch), None).hidden()
            values.append(float(balance()))
    assert values[0] == pytest.approx((7 * values[1] + 17 * values[2]) / 24, rel=1e-5)
    assert values[1] != pytest.approx(values[2], rel=1e-3)


@pytest.mark.parametrize("layers", [SUNK, tiny.BRAINS], ids=["sinks", "merged"])
def test_layers_that_are_computed_again_have_the_same_gradients_and_balance(layers: Any) -> None:
    decoder = random_decoder(model_config(layers, learned_sinks=SINKS if layers is SUNK else 0))
    names = dict(decoder.requires_grad_(True).named_parameters())
    tokens, found = random_tokens(1, 24), []
    parts = segments(batch_of(tokens, [[1] * 7 + [2] * 17]))
    for recompute in (False, True):
        with watch_balance(decoder) as balance:
            out = Packed(decoder, tokens, parts, None).hidden(recompute=recompute)
            loss = out.square().mean() + balance()
            grads = torch.autograd.grad(loss, names.values(), allow_unused=True)
        found.append((loss, dict(zip(names, grads, strict=True))))
    assert found[0][0].equal(found[1][0])
    for name, grad in found[0][1].items():
        other = found[1][1][name]
        assert (other is None) if grad is None else (grad.equal(other) and grad.any()), name


def test_a_softmax_beside_a_memory_is_left_out_only_where_and_while_asked() -> None:
    decoder, tokens = random_decoder(model_config(tiny.BRAINS)), random_tokens(1, 12)
    before, _ = decoder.hidden(tokens)
    parts = segments(batch_of(tokens, [[1] * 12]))
    with short_windows(decoder, {0}, 4):
        inside = Packed(decoder, tokens, parts, None).hidden()
        with torch.no_grad():
            decoder.layers[0].self_attn.o_proj.weight.mul_(3)
        assert_close(Packed(decoder, tokens, parts, None).hidden(), inside)
        decoder.layers[0].self_attn.o_proj.weight.div_(3)
    assert (inside - before).abs().max() > 1e-3
    assert_close(Packed(decoder, tokens, parts, None).hidden(), before)


# ---- courses


@pytest.mark.parametrize("name", sorted(TWINS))
def test_a_twin_is_healed_and_all_that_is_new_learns(
    name: str, source: Path, text: Path, tmp_path: Path
) -> None:
    model, out = twin(name, source, tmp_path / "model"), tmp_path / "healed"
    asked = Request(model, out, (str(text),), original=str(source))
    report = heal(asked, COURSES[name])
    assert report["best"]["kl_nats"] < 0.95 * report["start"]["kl_nats"]
    before, after = open_checkpoint(model), open_checkpoint(out)
    still = {
        tensor
        for tensor in before.stored_as
        if is_new(before.config, tensor) and torch.equal(before.read(tensor), after.read(tensor))
    }
    assert not still
    lines = [json.loads(line) for line in (out / "healing.jsonl").read_text().splitlines()]
    routed = [line for line in lines if "distil" in line.get("stage", "")]
    assert all(("balance" in line) == (name != "spikingbrain-7b") for line in routed)
    again = tmp_path / "again"
    apply(Request(model, again), Path(report["difference"]))
    for file in sorted(out.glob("*.safetensors")):
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_transfer_trains_the_whole_attention_of_layers_that_changed(
    source: Path, tmp_path: Path
) -> None:
    model = twin("spikingbrain-7b", source, tmp_path / "model")
    healing = course(TRANSFER)
    pair = models(converted_folder(model), None, healing)
    names = [name for name, _ in trained_names(pair.student, healing, healing.stages[0])]
    trained = {name: pair.student.get_parameter(name).requires_grad_(True) for name in names}
    adam = torch.optim.Adam(trained.values(), lr=3e-3)
    batch, losses = batch_of(random_tokens(1, 40), [[1] * 17 + [2] * 23]), []
    for _ in range(25):
        losses.append(transfer(pair, batch, 1.0, whole=True))
        adam.step()
        grads = {name: parameter.grad is not None for name, parameter in trained.items()}
        adam.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    # Linear layers are 0 and 2; the windows of the others are what the source has, but short.
    assert all(there == (name.split(".")[2] in "02") for name, there in grads.items())


def test_every_projection_of_a_layer_is_trained_experts_apart() -> None:
    decoder = random_decoder(model_config(tiny.BRAINS))
    healing = course(EXPERTS | {"train": {"q_proj": 2, "down_proj": 3}})
    prepare(decoder, healing, decoder.config.max_position_embeddings)
    names = dict(trained_names(decoder, healing, healing.stages[0]))
    assert names["model.layers.0.beside.q_proj.down"] == "source"
    assert names["model.layers.0.beside.softmax_norm.weight"] == "new"
    assert names["model.layers.1.mlp.gate.weight"] == "new"
    downs = [
        decoder.get_parameter(f"model.layers.1.mlp.{part}.down_proj.down")
        for part in ("experts.0", "experts.1", "shared_experts.0")
    ]
    assert not any(torch.equal(a, b) for n, a in enumerate(downs) for b in downs[:n])


def test_what_twins_cannot_do_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    model = twin("spikingbrain-76b", source, tmp_path / "model")
    asked = Request(model, tmp_path / "out", (str(text),))
    with pytest.raises(UnsupportedError) as error:
        heal(asked, COURSES["spikingbrain-76b"])
    one_line(error.value, "experts")
    with pytest.raises(UnsupportedError) as error:
        models(converted_folder(model), source, course(TRANSFER))
    one_line(error.value, "learned sinks")
    with pytest.raises(UnsupportedError) as error:
        models(converted_folder(model), source, course(DISTIL, memory="off"))
    one_line(error.value, "control")
    with pytest.raises(UnsupportedError) as error:
        models(converted_folder(model), source, course(DISTIL | {"kind": "length"}))
    one_line(error.value, "kind length")
    with pytest.raises(ValueError, match="trains attention and nothing else"):
        Stage.model_validate(TRANSFER | {"train": {"up_proj": 2}})


def test_the_original_of_a_folder_with_sinks_has_none(source: Path, tmp_path: Path) -> None:
    options = (
        F32,
        "learned_sinks.count=2",
        "layers=[{at: all, mixer: window, sink_tokens: learned}]",
    )
    convert(plan(source, load_recipe("identity", options)), tmp_path / "model")
    pair = models(converted_folder(tmp_path / "model"), None, course(DISTIL))
    tokens = random_tokens(1, 9)
    assert_close(pair.original(tokens)[0], load_decoder(open_checkpoint(source))(tokens)[0])
    assert pair.student.config.layers[0].mixers[0].sink_tokens == 2  # type: ignore[union-attr]


def test_learned_sinks_are_trained_in_one_process(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("respike.healing.run.join_world", lambda: World(0, 2))
    twin("spikingbrain-76b", source, tmp_path / "model")
    with pytest.raises(UnsupportedError) as error:
        heal(Request(tmp_path / "model", tmp_path / "out", ("text",)), course(DISTIL))
    one_line(error.value, "learned sinks")
    assert not (tmp_path / "out.healing").exists()
