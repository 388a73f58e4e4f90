"""Healing: packed rows, losses, courses that stop and go on, differences, and what is refused."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from courses import (
    DISTIL,
    JUDGE,
    RECALL,
    SETTINGS,
    TRANSFER,
    course,
    request,
    steps,
    weights,
)
from refusal import one_line
from respike.checkpoint import open_checkpoint
from respike.checkpoint.families import is_new
from respike.conversion import convert, plan
from respike.data import Batch
from respike.errors import DataError, UnsupportedError, UsageError
from respike.healing import Request, apply, heal, load_healing
from respike.healing.config import Judging, Stage, builtin_healings
from respike.healing.judge import Verdict, is_better
from respike.healing.losses import summed_kl, summed_nats
from respike.healing.models import converted_folder, models
from respike.healing.objectives import memory_is_off, weigh_positions
from respike.healing.optimiser import rate_at
from respike.healing.packed import Lanes, Packed, segments, short_windows, teacher_hidden
from respike.healing.trainable import CHOSEN, FITTED, OPENED_BETA, prepare
from respike.layers.blocks import BlockState
from respike.layers.far import FarSoftmax
from respike.layers.low_rank import LowRank, merged
from respike.layers.state import KVState, MemoryState, WindowState
from respike.loading import load, load_decoder
from respike.models.packing import pack_decoder
from respike.recipe import load_recipe
from tiny import (
    BLOCKS,
    CONTEXT,
    MEMORIES,
    model_config,
    random_decoder,
    random_tokens,
    save_documents,
    save_tiny,
)
from tolerance import assert_close

LAYERS = MEMORIES + BLOCKS


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_documents(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    source = save_tiny(folder / "source")
    convert(plan(source, load_recipe("constant", SETTINGS)), folder / "model")
    return folder / "model"


def packed_batch(tokens: Tensor, documents: list[list[int]], continues: list[bool]) -> Batch:
    owner = torch.tensor(documents)
    mask = owner > 0
    return Batch(
        tokens, owner, torch.zeros_like(owner), mask, torch.zeros_like(mask),
        torch.zeros_like(owner), torch.tensor(continues),
    )  # fmt: skip


# ---- tokens that memories keep


def test_a_course_leaves_what_is_kept_to_conversion(text: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    keeping = load_recipe("constant", (*SETTINGS, "far.kept_tokens=6"))
    convert(plan(source, keeping), tmp_path / "model")
    once = course(stages=[DISTIL | {"tokens": 8 * 96}])
    done = heal(request(tmp_path / "model", text, tmp_path / "healed"), once)
    before, after = (load_decoder(converted_folder(tmp_path / n)) for n in ("model", "healed"))
    same = {n for n, p in after.named_parameters() if p.equal(before.get_parameter(n))}
    chosen = {n for n, _ in after.named_parameters() if n.endswith((CHOSEN, *FITTED))}
    assert sum(n.endswith("keep_weight") for n in chosen) >= 1
    assert chosen <= same
    other = load_recipe("constant", (*SETTINGS, "far.kept_tokens=6", "far.calibration_tokens=400"))
    convert(plan(source, other), tmp_path / "other")
    apply(Request(tmp_path / "other", tmp_path / "applied"), Path(done["difference"]))
    applied = load_decoder(converted_folder(tmp_path / "applied"))
    assert all(p.equal(applied.get_parameter(n)) for n, p in after.named_parameters())
    assert any(n.endswith("query_weight") for n, _ in after.named_parameters() if n not in same)
    control = course(stages=[DISTIL], memory="off")
    with pytest.raises(UnsupportedError, match="a model that keeps tokens"):
        heal(request(tmp_path / "model", text, tmp_path / "control"), control)


# ---- packed rows


def test_a_packed_row_is_its_documents_one_by_one() -> None:
    decoder = random_decoder(model_config(LAYERS))
    tokens = random_tokens(2, 40)
    documents = [[1] * 13 + [2] * 27, [1] * 33 + [0] * 7]
    batch = packed_batch(tokens, documents, [False, False])
    hidden = Packed(decoder, tokens, segments(batch), None).hidden()
    for row, begin, end in ((0, 0, 13), (0, 13, 40), (1, 0, 33)):
        alone, _ = decoder.hidden(tokens[row : row + 1, begin:end])
        assert_close(hidden[row, begin:end], alone[0])


@pytest.mark.parametrize("packed", [False, True], ids=["student", "teacher"])
def test_states_are_carried_from_row_to_row_and_a_border_drops_them(packed: bool) -> None:
    decoder = random_decoder(model_config(LAYERS))
    tokens = random_tokens(2, 60)
    whole, _ = decoder.hidden(tokens)
    fresh, _ = decoder.hidden(tokens[1:, 30:])
    if packed:
        pack_decoder(decoder)
    lanes = Lanes({})
    halves = []
    for begin, continues in ((0, [False, False]), (30, [True, False])):
        half = tokens[:, begin : begin + 30]
        parts = segments(packed_batch(half, [[1] * 30, [1] * 30], continues))
        with torch.no_grad():
            halves.append(
                teacher_hidden(decoder, half, parts, lanes)
                if packed
                else Packed(decoder, half, parts, lanes).hidden()
            )
    assert_close(halves[1][0], whole[0, 30:])
    assert_close(halves[1][1], fresh[0])


def test_windows_are_short_only_where_and_while_asked() -> None:
    decoder = random_decoder(model_config(LAYERS))
    far = [
        (i, m)
        for i, part in enumerate(decoder.layers)
        for m in part.self_attn.mixers
        if isinstance(m, FarSoftmax)
    ]
    index, mixer = far[0]
    before = mixer.window.window_tokens
    with short_windows(decoder, {index}, 2):
        assert mixer.window.window_tokens == min(2, before)
    assert mixer.window.window_tokens == before


# ---- losses


@pytest.mark.parametrize("kind", ["kl", "nats"])
def test_losses_and_their_gradients_are_those_of_plain_logits(kind: str) -> None:
    r = torch.Generator().manual_seed(0)
    head, their_head = (torch.randn(19, 7, generator=r) for _ in range(2))
    hidden, theirs = (torch.randn(11, 7, generator=r) for _ in range(2))
    target = torch.randint(19, (11,), generator=r)
    weights = torch.rand(11, generator=r)
    mine = hidden.clone().requires_grad_()
    plain = hidden.clone().requires_grad_()
    log_q = (plain @ head.T).log_softmax(-1)
    if kind == "kl":
        found = summed_kl(mine, head, theirs, their_head, weights)
        log_p = (theirs @ their_head.T).log_softmax(-1)
        expected = (weights[:, None] * log_p.exp() * (log_p - log_q)).sum()
    else:
        found = summed_nats(mine, head, target, weights)
        expected = -(weights * log_q.gather(1, target[:, None])[:, 0]).sum()
    found.backward()
    expected.backward()
    assert_close(found, expected)
    assert_close(mine.grad, plain.grad)


def test_all_answers_are_looked_at_and_nothing_that_does_not_count() -> None:
    tokens = random_tokens(3, 50)
    batch = packed_batch(tokens, [[1] * 20 + [2] * 30] * 3, [False] * 3)
    batch.loss_mask[:, [0, 20]] = False
    batch.answers[1, 30:35] = True
    stage = Stage(kind="distil", tokens=1, sampled_frac=0.2)
    weights = weigh_positions(batch, stage, "a")
    chosen = weights > 0
    assert chosen[1, 29:34].all()
    assert not chosen[:, 19].any()
    assert not chosen[:, 49].any()
    assert 10 < int(chosen.sum()) < 60
    assert (weights[chosen] == 1).all()
    assert torch.equal(weights, weigh_positions(batch, stage, "a"))
    assert not torch.equal(weights, weigh_positions(batch, stage, "b"))


def test_a_sample_of_few_answers_weighs_as_much_as_one_of_many() -> None:
    batch = packed_batch(random_tokens(2, 50), [[1] * 20 + [2] * 30] * 2, [False] * 2)
    batch.answers[0, 10:12] = True
    batch.answers[0, 30:40] = True
    batch.answers[1, 21:50] = True
    stage = Stage(kind="distil", tokens=1, sampled_frac=1.0, sample_weight=16)
    weights = weigh_positions(batch, stage, "a")
    assert (weights[0, 9:11] == 8).all()
    assert (weights[0, 29:39] == 1.6).all()
    assert (weights[1, 20:49] == 1).all()
    weights[0, 9:11] = weights[0, 29:39] = 1
    assert ((weights == 1) | (weights == 0)).all()


def test_answers_whose_text_was_cut_away_count_as_any_other_text() -> None:
    batch = packed_batch(random_tokens(2, 50), [[1] * 20 + [2] * 30] * 2, [True, False])
    batch.answers[:, 10:14] = True
    batch.answers[:, 40:44] = True
    stage = Stage(kind="distil", tokens=1, sampled_frac=1e-9, sample_weight=16)
    weights = weigh_positions(batch, stage, "a")
    assert (weights > 0).nonzero().tolist() == [
        *([0, t] for t in range(39, 43)), *([1, t] for t in (*range(9, 13), *range(39, 43))),
    ]  # fmt: skip
    carried = stage.model_copy(update={"kind": "length"})
    assert (weigh_positions(batch, carried, "a")[0, 9:13] == 4).all()


def test_rates_rise_then_fall_to_their_share() -> None:
    stage = Stage(kind="distil", tokens=1, warmup_frac=0.1, final_frac=0.2)
    rates = [rate_at(stage, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, abs=0.01)


# ---- what is trained


def test_a_low_rank_layer_begins_as_its_base_and_merges_into_what_it_does() -> None:
    base = nn.Linear(7, 5, bias=True)
    layer, x = LowRank(base, 2, seed=3), torch.randn(4, 7)
    assert torch.equal(layer(x), base(x))
    layer.up.data.normal_()
    plain = nn.Linear(7, 5, bias=True)
    plain.load_state_dict({"weight": merged(base.weight, layer.down, layer.up), "bias": base.bias})
    assert_close(layer(x), plain(x))


def test_shut_heads_are_opened_to_learn_and_a_control_has_none() -> None:
    decoder = random_decoder(model_config(LAYERS))
    far = [m for m in decoder.modules() if isinstance(m, FarSoftmax)]
    far[0].beta.data[0] = -torch.inf
    memories = course(stages=[course().stages[0].model_dump()])
    prepare(decoder, memories, decoder.config.max_position_embeddings)
    assert far[0].beta.isfinite().all()
    prepare(
        decoder,
        memories.model_copy(update={"memory": "off"}),
        decoder.config.max_position_embeddings,
    )
    assert all((m.beta == -torch.inf).all() for m in far)


def test_weights_are_kept_only_if_recall_did_not_suffer() -> None:
    start, good, forgetful = (
        Verdict(kl, (0.0, 1.0), 0.0, right, 1.0, {})
        for kl, right in ((0.03, 0.60), (0.02, 0.59), (0.01, 0.50))
    )
    strict, lax = Judging(), Judging(recall_slack_frac=0.2)
    assert is_better(good, None, start, strict)
    assert not is_better(forgetful, good, start, strict)
    assert is_better(forgetful, good, start, lax)


def test_before_the_first_step_the_student_is_the_converted_model(converted: Path) -> None:
    plain = load_decoder(open_checkpoint(converted), dtype="f32")
    pair = models(converted_folder(converted), None, course(compute="f32"))
    tokens = random_tokens(2, 48)
    batch = packed_batch(tokens, [[1] * 48, [1] * 48], [False, False])
    with torch.no_grad():
        hidden = Packed(pair.student, tokens, segments(batch), None).hidden()
        for row in range(2):
            expected, _ = plain.hidden(tokens[row : row + 1])
            assert_close(hidden[row], expected[0])
            teacher, _ = pair.teacher.hidden(tokens[row : row + 1])
            original, _ = pair.original.hidden(tokens[row : row + 1])
            assert_close(teacher, original)
            assert (original - expected).abs().max() > 0.01


# ---- courses


@pytest.fixture(scope="module")
def healed(
    converted: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("healed") / "model"
    return out, heal(request(converted, text, out), course())


def test_healing_brings_the_model_nearer_to_its_original(
    healed: tuple[Path, dict[str, Any]], converted: Path
) -> None:
    out, report = healed
    assert report["done"]
    assert report["best"]["kl_nats"] < 0.9 * report["start"]["kl_nats"]
    assert report["tokens"] == sum(entry["tokens"] for entry in report["ledger"])
    written = json.loads((out / "report.json").read_text())
    assert written["healing"]["best"] == report["best"]
    assert written["converted_fingerprint"] == load(converted).fingerprint
    assert yaml.safe_load((out / "healing.yaml").read_text())["name"] == "tiny"
    assert "healed" in (out / "README.md").read_text()
    assert len(steps(out)) == 40
    load(out)


def test_a_course_in_legs_gives_the_same_bytes_as_one_without_a_stop(
    healed: tuple[Path, dict[str, Any]], converted: Path, text: Path, tmp_path: Path
) -> None:
    out, report = healed
    asked = request(converted, text, tmp_path / "model")
    legs = [heal(asked, course(), leg_minutes=0.0)]
    # A kill in the middle: what the log has beyond the checkpoint is done again.
    log = tmp_path / "model.healing" / "log.jsonl"
    with log.open("a") as file:
        file.write('{"kind": "step", "step": 2, "tokens": 1}\n{"kind": "st')
    while not legs[-1]["done"]:
        legs.append(heal(asked, course(), leg_minutes=0.0))
    assert len(legs) == 40  # a stop after every step
    assert weights(tmp_path / "model") == weights(out)
    assert legs[-1]["best"] == report["best"]
    assert legs[-1]["ledger"] == report["ledger"]


def test_weights_between_start_and_average_are_kept_if_asked(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    once = JUDGE | {"every_tokens": 10**6}  # at the end alone, so that both keep the same step
    found, courses = {}, {"all": 1.0, "part": 0.25}
    for name, frac in courses.items():
        asked = request(converted, text, tmp_path / name)
        some = course(judge=once, interpolation_frac=frac)
        while not heal(asked, some, leg_minutes=0.0 if frac < 1 else None)["done"]:
            pass
        found[name] = load_decoder(converted_folder(tmp_path / name), dtype="f32")
    start = load_decoder(converted_folder(converted), dtype="f32")
    moved = {}
    for name, before in start.named_parameters():
        far, near = (found[n].get_parameter(name) for n in courses)
        if not near.equal(before):
            # A shut head's beta is -inf before, and opened to learn.
            base = before.masked_fill(before == -torch.inf, OPENED_BETA)
            moved[name] = ((near - base) * (far - base)).sum() / (far - base).square().sum()
            assert_close(near, base + 0.25 * (far - base), torch.bfloat16)
    kinds = {name.rpartition("layers.")[2].split(".", 1)[-1] for name in moved}
    assert {"self_attn.v_proj.weight", "self_attn.o_proj.weight"} <= kinds
    assert len(kinds) > 4
    assert all(0.2 < frac < 0.3 for frac in moved.values()), moved
    assert len(list((tmp_path / "part.healing").glob("*.safetensors"))) == 1


def test_a_difference_gives_the_healed_weights_bit_for_bit(
    healed: tuple[Path, dict[str, Any]], converted: Path, tmp_path: Path
) -> None:
    out, report = healed
    apply(Request(converted, tmp_path / "model"), Path(report["difference"]))
    assert weights(tmp_path / "model") == weights(out)


def test_half_lives_are_those_of_the_folder_and_not_trained(
    healed: tuple[Path, dict[str, Any]], converted: Path, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source")
    recipe = load_recipe("constant", (*SETTINGS, "far.half_life_tokens=64"))
    convert(plan(source, recipe), tmp_path / "short")
    apply(Request(tmp_path / "short", tmp_path / "model"), Path(healed[1]["difference"]))
    folders = healed[0], tmp_path / "model", converted
    kept, given, began = (load_decoder(converted_folder(folder)) for folder in folders)
    other = {name for name, p in kept.named_parameters() if not p.equal(given.get_parameter(name))}
    assert other
    for name in other:
        assert name.endswith("log2_half_life")
        assert (given.get_parameter(name) == 6).all()
        assert kept.get_parameter(name).equal(began.get_parameter(name))


def test_carried_states_and_conversations_train(converted: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"},
                      {"role": "assistant", "content": "the sand and the ring " * (2 + n % 5)}]}
        for n in range(60)
    ]  # fmt: skip
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"tokens": 4 * 96, "context_tokens": 48, "rows": 2, "recall": {"frac": 0.0}}
    stages = [
        {"kind": "length", "memory_rate": 3e-3, **common, "recall": RECALL},
        {"kind": "finetune", "train": {"v_proj": "full"}, "rate": 3e-3, **common},
    ]
    report = heal(request(converted, chats, tmp_path / "out"), course(stages=stages))
    losses = [line["loss"] for line in steps(tmp_path / "out")]
    assert len(losses) == 8
    assert losses[-1] < losses[4]
    assert report["done"]


def test_a_control_is_trained_alike_and_its_memories_stay_shut(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    heal(request(converted, text, tmp_path / "out"), course(memory="off", stages=[DISTIL]))
    assert {line["memory"] for line in steps(tmp_path / "out")} == {"off"}
    decoder = load(tmp_path / "out").decoder
    far = [m for m in decoder.modules() if isinstance(m, FarSoftmax)]
    assert all((m.beta == -torch.inf).all() for m in far)


def test_steps_without_memories_leave_what_they_have_learnt_alone(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    stage = DISTIL | {"memory_dropout": {"first_frac": 1, "last_frac": 1}}
    asked = request(converted, text, tmp_path / "out")
    while not heal(asked, course(stages=[stage]), leg_minutes=0.0)["done"]:
        pass  # also a checkpoint knows no moments of theirs
    assert {line["memory"] for line in steps(tmp_path / "out")} == {"off"}
    before, after = (load(folder).decoder for folder in (converted, tmp_path / "out"))
    changed = {
        is_new(before.config, name)
        for name, tensor in before.state_dict().items()
        if not torch.equal(tensor, after.state_dict()[name])
    }
    assert changed == {False}


def test_a_model_without_memories_is_trained_as_if_all_steps_were_without(
    text: Path, tmp_path: Path
) -> None:
    recipe = load_recipe("constant", (*SETTINGS, "memory=none"))
    convert(plan(save_tiny(tmp_path / "source"), recipe), tmp_path / "bare")
    heal(request(tmp_path / "bare", text, tmp_path / "out"), course(stages=[DISTIL]))
    assert not any("memory" in line for line in steps(tmp_path / "out"))


def test_memories_are_left_out_as_often_as_asked_at_each_step() -> None:
    dropout = {"first_frac": 1.0, "last_frac": 0.0}
    healing = course(stages=[DISTIL | {"tokens": 96 * 1000, "memory_dropout": dropout}])
    stage = healing.stages[0]
    out = [memory_is_off(healing, stage, step) for step in range(1000)]
    assert sum(out[:200]) == pytest.approx(180, abs=15)
    assert sum(out[-200:]) == pytest.approx(20, abs=15)
    assert out == [memory_is_off(healing, stage, step) for step in range(1000)]
    assert not memory_is_off(healing, Stage(kind="distil", tokens=1), 0)


def test_layers_that_are_computed_again_give_the_same_bytes(
    healed: tuple[Path, dict[str, Any]], converted: Path, text: Path, tmp_path: Path
) -> None:
    again = course(stages=[TRANSFER, DISTIL | {"recompute": True}])
    heal(request(converted, text, tmp_path / "out"), again)
    assert weights(tmp_path / "out") == weights(healed[0])


def living_states() -> int:
    gc.collect()
    kinds = (KVState, WindowState, BlockState, MemoryState)
    return sum(type(thing) in kinds for thing in gc.get_objects())


def test_layers_that_are_computed_again_are_not_held() -> None:
    decoder = random_decoder(model_config(LAYERS)).requires_grad_(True)
    tokens = random_tokens(1, 64)
    batch = packed_batch(tokens, [[1] * 64], [False])
    held, before = [], living_states()
    for recompute in (False, True):
        bytes_held = 0

        def hold(x: Tensor) -> Tensor:
            nonlocal bytes_held
            bytes_held += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            out = Packed(decoder, tokens, segments(batch), None).hidden(recompute=recompute)
        held.append(bytes_held)
    assert held[1] < 0.2 * held[0]
    assert living_states() <= before
    assert out.requires_grad


def test_two_processes_give_the_losses_and_weights_of_one(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    """In float32: in bfloat16 their products round otherwise, and so would their losses."""
    half = DISTIL | {"tokens": 12 * 96}
    stages = [TRANSFER, half, half | {"recompute": True}]
    settings, asked = tmp_path / "course.yaml", course(compute="f32", stages=stages)
    settings.write_text(yaml.safe_dump(asked.model_dump(mode="json")))
    one = heal(request(converted, text, tmp_path / "one"), asked)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "-m", "respike", "heal", str(converted), str(tmp_path / "two"), "--no-plot",
        "--config", str(settings), "--data", str(text), "--threads", "1", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert two["processes"] == 2
    assert two["ledger"] == one["ledger"]
    pairs = zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True)
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 1e-4
    first, second = (load(tmp_path / name).decoder.state_dict() for name in ("one", "two"))
    for name, tensor in first.items():
        if tensor.is_floating_point():
            assert_close(second[name].float(), tensor.float(), dtype=torch.bfloat16)


# ---- what is refused


def test_a_course_goes_on_only_with_what_it_began_with(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    asked = request(converted, text, tmp_path / "model")
    heal(asked, course(), leg_minutes=0.0)
    with pytest.raises(UsageError) as error:
        heal(asked, course(seed=1), leg_minutes=0.0)
    one_line(error.value, "model.healing", "another healing")
    assert "--set" not in str(error.value.hint)
    with pytest.raises(UsageError) as error:
        heal(asked, course(compute="f32"), leg_minutes=0.0)
    assert "--set compute=bf16" in str(error.value.hint)


def test_what_cannot_be_healed_is_refused(
    healed: tuple[Path, dict[str, Any]], converted: Path, text: Path, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source", seed=1)
    with pytest.raises(UsageError) as error:
        heal(Request(source, tmp_path / "a", (str(text),)), course())
    one_line(error.value, "not a converted model")
    with pytest.raises(UsageError) as error:
        heal(Request(converted, tmp_path / "b"), course())
    one_line(error.value, "no data")
    with pytest.raises(UnsupportedError) as refused:
        heal(Request(healed[0], tmp_path / "c", (str(text),)), course())
    one_line(refused.value, "source")
    with pytest.raises(UsageError) as error:
        heal(Request(converted, healed[0], (str(text),)), course())
    one_line(error.value, "already exists")
    other = tmp_path / "other"
    convert(plan(source, load_recipe("constant", SETTINGS)), other)
    with pytest.raises(DataError) as data_error:
        apply(Request(other, tmp_path / "d"), Path(healed[1]["difference"]))
    one_line(data_error.value, "belongs to another converted model")
    alone = tmp_path / "alone"
    convert(plan(save_tiny(tmp_path / "like"), load_recipe("spikingbrain-7b")), alone)
    with pytest.raises(UnsupportedError) as refused:
        heal(Request(alone, tmp_path / "e", (str(text),)), course())
    one_line(refused.value, "memory_dropout")
    assert "stages.1.memory_dropout" in str(refused.value.hint)
    longer = DISTIL["recall"] | {"last_tokens": CONTEXT + 1}
    long = course(stages=[TRANSFER, DISTIL | {"context_tokens": CONTEXT + 1, "recall": longer}])
    with pytest.raises(UnsupportedError) as refused:
        heal(request(converted, text, tmp_path / "f"), long)
    one_line(refused.value, "rows of 257 tokens", "trained for 256")
    sets = [f"--set stages.1.{it}={CONTEXT}" for it in ("context_tokens", "recall.last_tokens")]
    assert refused.value.hint == " ".join(sets)
    assert not any((tmp_path / name).exists() for name in "abcdef")


def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    asked = request(converted, text, tmp_path / "model")
    heal(asked, course(), leg_minutes=0.0)
    folder = next((tmp_path / "model.healing" / "checkpoint").glob("step-*"))
    shutil.copytree(folder, tmp_path / "kept")
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError) as error:
        heal(asked, course(), leg_minutes=0.0)
    one_line(error.value, "not a checkpoint")
    assert (folder / "state.safetensors").read_bytes() == (
        tmp_path / "kept" / "state.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.0.tokns=3", ("tokns", "did you mean `tokens`")),
        ("stages.0.rows=3", ("micro_rows",)),
        ("stages.0.kind=distill", ("kind", "distil")),
        ("stages.0.sample_weight=9", ("sample_weight", "transfer")),
        ("stages.0.memory_dropout={last_frac: 1}", ("memory_dropout", "transfer")),
        ("stages.0.window_dropout={last_frac: 1}", ("window_dropout", "transfer")),
        ("stages.0.sampled_frac=0.1", ("sampled_frac", "transfer")),
        ("stages.1={kind: length, tokens: 9, window_dropout: {last_frac: 1}}", ("length",)),
        ("stages.0.recompute=true", ("recompute", "transfer")),
        ("stages.0={kind: distil, tokens: 9, memory_dropout: {last_frac: 1}}", ("train",)),
        ("stages.0.window_dropout={last_frc: 1}", ("last_frc", "did you mean `last_frac`")),
        ("stages.9.rows=3", ("--set", "no such place")),
        ("seed", ("--set", "KEY=VALUE")),
    ],
)
def test_a_malformed_course_says_where(change: str, words: tuple[str, ...]) -> None:
    more = ("stages.0.micro_rows=2",) if "rows=3" in change else ()
    with pytest.raises(UsageError) as error:
        load_healing("quick", (*more, change))
    one_line(error.value, words[0])
    assert all(word in f"{error.value} {error.value.hint}" for word in words)


def test_a_switch_is_one_with_and_without_quotes() -> None:
    for value in ("off", "'off'", "on"):
        assert load_healing("quick", (f"memory={value}",)).memory == value.strip("'")


@pytest.mark.parametrize(
    ("able", "dtype"),
    [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("bf16", "bf16"), ("avx512_vnni", "f32")],
)
def test_a_course_computes_in_what_the_processor_multiplies(
    able: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True, "avx512_f": True})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert load_healing("quick").compute == dtype
    assert load_healing("quick", ("compute=bf16",)).compute == "bf16"
    assert load_healing("quick", ("compute=f32",)).compute == "f32"


def test_every_built_in_course_is_one() -> None:
    assert "default" in builtin_healings()
    for name in builtin_healings():
        assert load_healing(name).name == name
    with pytest.raises(UsageError) as error:
        load_healing("defualt")
    one_line(error.value, "default")
