"""Which KV groups keep full softmax: greedy addition to the model without any, by two measures.

kl_gain      Nats of KL per token, beyond the window, that adding the group removes.
recall_gain  Nats per answer token of recall beyond the window that adding it gives back.
recall_damage  Nats that recall loses when only this group of the original is exchanged.

Recall is copying random tokens plus finding a passkey: two circuits; a group may serve only one.

The student starts as a window with sinks in every group, or as a conversion that has no softmax
groups: with its memories, what they already do is no reason to keep a group.

Picks alternate between the largest kl_gain and the largest recall_gain + recall_damage: a group
that recall cannot do without may show no gain until the others of its circuit are there. Gains are
measured anew after every few picks, for the groups that stood high enough the time before to be
picked at all; recall_damage does not depend on the picks. Why addition and not
removal, and why recall has a say of its own: docs/concepts/selection.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from respike.config import ModelConfig
from respike.errors import UsageError
from respike.layers.far import FarSoftmax
from respike.layers.mixer import Mixer
from respike.layers.softmax import WindowSoftmax
from respike.material import Vocabulary
from respike.models.decoder import Decoder
from respike.recipe import Recipe, SourceShape
from respike.selection.student import (
    Group,
    Probe,
    RecallProbe,
    Student,
    TextProbe,
    check_original,
)
from respike.tasks import Task, make_trials
from respike.tokenizer import Tokenizer

POSITION_STRIDE = 4
"""KL is measured at every fourth position: a quarter of the memory for the reference's logits."""


@dataclass(frozen=True)
class Budget:
    """How much to keep, and how carefully to look.

    Attributes:
        softmax_groups: KV groups that keep full softmax.
        window_tokens: Window of all others.
        sink_tokens: Sinks of all others.
        picks_per_round: Picks between two measurements of the gains.
        copy_trials: Sequences of the copying probe.
        passkey_trials: Sequences of the passkey probe; 0 leaves it out.
        seed: Of both.
    """

    softmax_groups: int
    window_tokens: int = 256
    sink_tokens: int = 4
    picks_per_round: int = 6
    copy_trials: int = 4
    passkey_trials: int = 4
    seed: int = 0


@dataclass
class Selection:
    """The groups in the order they were picked, and every score on the way."""

    picked: list[Group] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    recall_damage: dict[Group, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def recall_worth(self, recall_gain: dict[Group, float]) -> dict[Group, float]:
        """The measure of a group's worth to recall."""
        return {group: gain + self.recall_damage[group] for group, gain in recall_gain.items()}

    def as_dict(self) -> dict[str, Any]:
        """For the scores file."""

        def named(scores: dict[Group, float]) -> dict[str, float]:
            return {f"{layer}.{group}": round(x, 6) for (layer, group), x in scores.items()}

        rounds = [
            {
                "kept": len(r["kept"]),
                "kl_nats": round(r["kl"], 6),
                "recall_nats": round(r["recall"], 6),
                "kl_gain_nats": named(r["kl_gain"]),
                "recall_gain_nats": named(r["recall_gain"]),
            }
            for r in self.rounds
        ]
        return {
            "picked": [[*g, why] for g, why in zip(self.picked, self.reasons, strict=True)],
            "recall_damage_nats": named(self.recall_damage),
            "rounds": rounds,
        }


def select(
    decoder: Decoder,
    tokenizer: Tokenizer,
    contexts: Tensor,
    budget: Budget,
    progress: Callable[[int, int], None] | None = None,
    rest: Decoder | None = None,
) -> Selection:
    """Pick the KV groups that keep full softmax.

    Args:
        decoder: The original model. Its mixers are exchanged while measuring and put back after.
        tokenizer: Its tokenizer.
        contexts: Text as token ids (N, T) with T at least twice the window.
        budget: How many to pick.
        progress: Called with (measurements done, measurements in all).
        rest: A conversion of ``decoder`` in which all groups of a layer share one window, such as
            by the recipe ``constant``: what groups that are not kept become, memories too. The
            budget's window and sinks are its own. None: windows alone.

    Raises:
        UsageError: The budget, the contexts or ``rest`` cannot work.
    """
    config = decoder.config
    every = [
        (i, g) for i in range(config.num_hidden_layers) for g in range(config.num_key_value_heads)
    ]
    check_original(config)
    if not 0 < budget.softmax_groups <= len(every):
        raise UsageError(
            f"--softmax-groups {budget.softmax_groups}: expected 1 to {len(every)}, the number of "
            "KV groups of the model"
        )
    if contexts.shape[1] < 2 * budget.window_tokens:
        raise UsageError(
            f"contexts of {contexts.shape[1]} tokens are too short to see beyond a window of "
            f"{budget.window_tokens}: at least {2 * budget.window_tokens} are needed"
        )
    rounds = -(-budget.softmax_groups // budget.picks_per_round)
    total, done = len(every) * (rounds + 1), 0
    kept_mixers = [layer.self_attn.arrangement() for layer in decoder.layers]

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    try:
        with torch.inference_mode():
            others = _rest_mixers(decoder.config, budget, rest)
            student, result = _prepare(decoder, tokenizer, contexts, budget, others), Selection()
            recall_probes = list(range(1, len(student.probes)))
            intact = sum(student.values()[1:])
            for group in every:
                damaged = sum(student.values_with(group, recall_probes))
                result.recall_damage[group] = damaged - intact
                tick()
            while len(result.picked) < budget.softmax_groups:
                promising = _promising(every, budget, result)
                _round(student, promising, budget, result, tick)
                done = len(every) * (len(result.rounds) + 1)
            student.arrange(set(result.picked))
            kl, *lost = student.values()
            last = {"kept": list(result.picked), "kl": kl, "recall": sum(lost)}
            result.rounds.append({**last, "kl_gain": {}, "recall_gain": {}})
    finally:
        for layer, mixers in zip(decoder.layers, kept_mixers, strict=True):
            layer.self_attn.set_mixers(mixers)
    return result


def _rest_mixers(config: ModelConfig, budget: Budget, rest: Decoder | None) -> list[Mixer]:
    """For each layer the mixer of groups that are not kept."""
    if rest is None:
        reach = config.max_position_embeddings
        window = WindowSoftmax(budget.window_tokens, budget.sink_tokens, reach)
        return [window] * config.num_hidden_layers
    shape = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    if any(getattr(rest.config, name) != getattr(config, name) for name in shape):
        raise UsageError(
            "the conversion has other layers or heads than the model",
            hint="give a conversion of this very model, by the recipe constant",
        )
    mixers = [layer.self_attn.mixers for layer in rest.layers]
    for number, parts in enumerate(mixers):
        if len(parts) > 1 or not isinstance(parts[0], WindowSoftmax | FarSoftmax):
            raise UsageError(
                f"the conversion's layer {number} is not one window, with or without a far memory, "
                "of all its KV groups",
                hint="make it by the recipe constant",
            )
    return [cast(Mixer, parts[0]) for parts in mixers]


def _prepare(
    decoder: Decoder,
    tokenizer: Tokenizer,
    contexts: Tensor,
    budget: Budget,
    rest: Sequence[Mixer],
) -> Student:
    """Probes, and the student arranged as the original."""
    device = decoder.embedding.device
    lag = budget.window_tokens + 64
    vocabulary = Vocabulary(tokenizer)
    tasks = [(Task("copy", lag), budget.copy_trials)]
    # Early in a text of the same length, so that the number is well outside the window.
    tasks.append((Task("passkey", 2 * lag, 0.1), budget.passkey_trials))
    recalls: list[Probe] = [
        RecallProbe(decoder, make_trials(vocabulary, task, trials, seed=budget.seed))
        for task, trials in tasks
        if trials
    ]
    beyond = torch.arange(
        budget.window_tokens, contexts.shape[1] - 1, POSITION_STRIDE, device=device
    )
    text = TextProbe(decoder, contexts.to(device), beyond)
    student = Student(decoder, rest, [text, *recalls])
    depth, groups = decoder.config.num_hidden_layers, decoder.config.num_key_value_heads
    student.arrange({(i, g) for i in range(depth) for g in range(groups)})
    text.remember(student.inputs[0][1][-1])
    return student


def _promising(every: list[Group], budget: Budget, result: Selection) -> list[Group]:
    """The groups worth measuring again: by either measure among the best for what is left."""
    if not result.rounds:
        return every
    last = result.rounds[-1]
    number = 2 * (budget.softmax_groups - len(result.picked))
    best: set[Group] = set()
    for scores in (last["kl_gain"], result.recall_worth(last["recall_gain"])):
        left = [g for g in scores if g not in result.picked]
        best |= set(sorted(left, key=lambda g: -scores[g])[:number])
    return sorted(best)


def _round(
    student: Student,
    groups: list[Group],
    budget: Budget,
    result: Selection,
    tick: Callable[[], None],
) -> None:
    """Measure all gains, then pick a few groups, alternating between the two measures."""
    student.arrange(set(result.picked))
    kl, *lost = student.values()
    recall = sum(lost)
    kl_gain, recall_gain = {}, {}
    for group in groups:
        with_kl, *with_recall = student.values_with(group, list(range(len(student.probes))))
        kl_gain[group], recall_gain[group] = kl - with_kl, recall - sum(with_recall)
        tick()
    result.rounds.append(
        {
            "kept": list(result.picked),
            "kl": kl,
            "recall": recall,
            "kl_gain": kl_gain,
            "recall_gain": recall_gain,
        }
    )
    worth = result.recall_worth(recall_gain)
    for _ in range(min(budget.picks_per_round, budget.softmax_groups - len(result.picked))):
        by_recall = len(result.picked) % 2 == 0
        scores = worth if by_recall else kl_gain
        best = max((g for g in scores if g not in result.picked), key=lambda g: scores[g])
        result.picked.append(best)
        result.reasons.append("recall" if by_recall else "kl")


def selected_recipe(
    selection: Selection,
    budget: Budget,
    source: ModelConfig,
    name: str,
    measured_on: str,
    rest: Recipe | None = None,
) -> Recipe:
    """The recipe that keeps what was selected, all else as ``rest`` says, or as a window."""
    groups: dict[int, tuple[int, ...]] = {}
    for layer, group in sorted(selection.picked):
        groups[layer] = (*groups.get(layer, ()), group)
    total = source.num_hidden_layers * source.num_key_value_heads
    if rest is None:
        window, sinks = budget.window_tokens, budget.sink_tokens
        others = {
            "layers": ({"at": "all", "mixer": "window"},),
            "window_tokens": window, "sink_tokens": sinks,
        }  # fmt: skip
        known = f"see {window} tokens and {sinks} sinks"
    else:
        others = rest.model_dump(exclude_defaults=True)
        known = f"are as in {rest.name!r}"
    shape = SourceShape.model_validate(source, from_attributes=True)
    told = {
        "recipe": 1, "name": name, "measured_on": measured_on, "source": shape,
        "softmax_groups": groups,
        "about": f"{len(selection.picked)} of {total} KV groups keep full softmax, chosen by "
        f"measurement (`respike select`); the rest {known}.",
    }  # fmt: skip
    return Recipe.model_validate({**others, **told})
