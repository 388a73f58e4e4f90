"""What a step minimises: per-layer transfer, distillation of logits, or the data's own tokens.

Every objective adds the gradients of one micro-batch's share of the step's loss and returns that
share. Letters: B rows, T tokens, N = B * T, D model width, H query heads, K head dim.
"""

import random
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from respike.data import Batch
from respike.healing.config import Healing, Stage, WindowDropout
from respike.healing.losses import relative_error, summed_kl, summed_nats
from respike.healing.packed import Lanes, Packed, segments, short_windows, teacher_hidden
from respike.healing.penalties import Penalty
from respike.models.decoder import Decoder, DecoderLayer, Mix

Qkv = tuple[Tensor, Tensor, Tensor]


@dataclass
class Pair:
    """The model that is healed, and the original in the two forms it is needed in.

    Attributes:
        student: With gradients where something is trained.
        original: Layer by layer, for transfer; shares its weights' values with the student.
        teacher: Packed, for its hidden states.
        teacher_head: Output matrix of the original (V, D).
        recompute: See `Packed.hidden`.
    """

    student: Decoder
    original: Decoder
    teacher: Decoder
    teacher_head: Tensor
    recompute: bool = False

    @property
    def head(self) -> Tensor:
        """Output matrix of the student (V, D)."""
        head = self.student.lm_head
        return self.student.embedding if head is None else cast(Tensor, head.weight)


@dataclass
class Carried:
    """States that go on from batch to batch in a stage that carries them."""

    student: Lanes
    teacher: Lanes

    def at(self, first: int) -> "Carried":
        """The same for a micro-batch that begins at a row."""
        return Carried(self.student.at(first), self.teacher.at(first))


@dataclass(frozen=True)
class Asked:
    """What is asked of a micro-batch, and of the step that it is a part of.

    Attributes:
        weights: Of positions (B, T); those of weight 0 are not looked at.
        told: Positions where the data's next token is wanted in place of the original's
            distribution, likewise; None: nowhere.
        total: Sum of the weights of the whole step, on all processes.
        reads_only: Nothing counts here, and no process waits for gradients.
    """

    weights: Tensor
    told: Tensor | None
    total: float
    reads_only: bool = False


def predicting(mask: Tensor) -> Tensor:
    """Of tokens (B, T) to be predicted, the places whose logits predict them: one before each."""
    before = torch.roll(mask, -1, 1)
    before[:, -1] = False
    return before


def weigh_positions(batch: Batch, stage: Stage, seed: str) -> Tensor:
    """What a step's logits weigh (B, T): all answers, a share of the rest at 1, and others at 0.

    Logits at t - 1 predict token t, so a chosen position is followed by a token that counts. Where
    no states are carried, answers whose text began in the row before are as any other text.
    """
    counts, answers = predicting(batch.loss_mask), predicting(batch.answers)
    if stage.kind != "length":
        answers &= ~(batch.continues[:, None] & (batch.documents == 1))
    draw = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    some = torch.rand(counts.shape, generator=draw) < stage.sampled_frac
    weights = (counts & some).float()
    answers &= counts
    documents = batch.documents.long()
    found = torch.zeros(len(documents), int(documents.max()) + 1)
    found.scatter_add_(1, documents, answers.float())
    each = (stage.sample_weight / found.clamp(min=1)).clamp(min=1).gather(1, documents)
    return torch.where(answers, each, weights)


def beyond_original(batch: Batch, original_tokens: int, read_tokens: int) -> tuple[Tensor, Tensor]:
    """Where a stage that carries states cannot ask the original, and answers that the data tells.

    Args:
        batch: The whole step's.
        original_tokens: Length that the original was trained for.
        read_tokens: Tokens of each row that were read with the states as they are carried: a
            document that began before them has lost its beginning.

    Returns:
        Positions whose next token is further from where reading began than the original can look,
        and those among them that predict an answer in a document read from its beginning; bool
        (B, T) both.
    """
    cut = batch.continues & (batch.positions[:, 0] > read_tokens)
    cut_tokens = cut[:, None] & (batch.documents == 1)
    missed = torch.where(cut_tokens, batch.positions[:, :1] - read_tokens, 0)
    beyond = batch.positions - missed + 1 >= original_tokens
    return beyond, beyond & predicting(batch.answers) & ~cut_tokens


def distil(
    pair: Pair,
    batch: Batch,
    asked: Asked,
    short: tuple[set[int], int],
    carried: Carried | None,
    penalty: Penalty,
) -> float:
    """Share of the weighted mean KL(original || student) over the chosen positions, nats.

    Args:
        pair: The models.
        batch: A micro-batch.
        asked: Where.
        short: Layers whose window is short, and how short.
        carried: States to go on with; None starts each document afresh.
        penalty: What is added to the loss, and not to the share.
    """
    parts = segments(batch)
    reference = teacher_hidden(
        pair.teacher, batch.tokens, parts, None if carried is None else carried.teacher
    )
    packed = Packed(pair.student, batch.tokens, parts, None if carried is None else carried.student)
    if asked.reads_only:
        with torch.no_grad():
            packed.hidden()
        return 0.0
    chosen = asked.weights > 0
    taught = chosen if asked.told is None else chosen & ~asked.told
    with ExitStack() as stack:
        stack.enter_context(short_windows(pair.student, *short))
        hidden, norm = packed.hidden(recompute=pair.recompute), pair.student.model.norm
        weights = asked.weights.to(hidden.device)
        with torch.no_grad():
            wanted = pair.teacher.model.norm(reference[taught])
        loss = summed_kl(
            norm(hidden[taught]), pair.head, wanted, pair.teacher_head, weights[taught]
        )
        if asked.told is not None:
            told = chosen & asked.told
            target = torch.roll(batch.tokens, -1, 1)[told].to(hidden.device)
            loss = loss + summed_nats(norm(hidden[told]), pair.head, target, weights[told])
        loss = loss / max(asked.total, 1.0)
        (loss + penalty()).backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def finetune(pair: Pair, batch: Batch, total: float, penalty: Penalty) -> float:
    """Share of the mean negative log-likelihood of ``total`` tokens that count, nats."""
    parts = segments(batch)
    packed = Packed(pair.student, batch.tokens, parts, None)
    hidden = packed.hidden(recompute=pair.recompute)
    counts = predicting(batch.loss_mask)
    target = torch.roll(batch.tokens, -1, 1)[counts].to(hidden.device)
    alike = torch.ones(target.shape, device=target.device)
    loss = summed_nats(pair.student.model.norm(hidden[counts]), pair.head, target, alike)
    loss = loss / max(total, 1.0)
    (loss + penalty()).backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def transfer(pair: Pair, batch: Batch, share: float, *, whole: bool) -> float:
    """Share of the mean over layers of the attention's relative error on the original's own inputs.

    The backward pass goes through one layer at a time, so memory is one layer's, and gradients are
    those of the sum: each layer learns as fast however many there are.

    Args:
        pair: The models.
        batch: A micro-batch.
        share: Of the step that it is.
        whole: Compare what joins the residual, at every token, of layers to which conversion added
            something; else the heads that conversion changed, behind their document's window:
            before, both see the same.
    """
    original, student = pair.original, pair.student
    parts = segments(batch)
    theirs = Packed(original, batch.tokens, parts, None)
    mine = Packed(student, batch.tokens, parts, None)
    total, count = 0.0, 0
    with torch.no_grad():
        x = original.model.embed_tokens(batch.tokens.to(original.embedding.device))
        x = x.flatten(0, 1)[None]
    for index, layer in enumerate(original.layers):
        with torch.no_grad():
            normed = layer.input_layernorm(x)
            qkv = layer.self_attn.project(normed)
            mixed = layer.mix_with(normed, qkv, theirs.mix(index))
            attended = layer.self_attn.o_proj(mixed.flatten(2))
        if whole:
            loss = _whole_error(student.layers[index], normed, attended, batch, mine.mix(index))
        else:
            loss = _head_error(student, index, (normed, qkv, mixed), batch, mine.mix(index))
        if loss is not None:
            (loss * share).backward()  # type: ignore[no-untyped-call]
            total, count = total + float(loss.detach()) * share, count + 1
        with torch.no_grad():
            x = layer.add_mixed(x, attended)
    return total / max(count, 1)


def _whole_error(
    layer: DecoderLayer, normed: Tensor, attended: Tensor, batch: Batch, mix: Mix
) -> Tensor | None:
    """Relative error of what a layer's attention adds to the residual; None if it is the source's.

    A layer to which conversion added nothing would train on rounding alone.
    """
    if layer.beside is None and not list(layer.self_attn.mixers.parameters()):
        return None
    rows = (batch.documents > 0).flatten().to(normed.device)
    out = layer.attended_with(normed, mix)[0, rows]
    return relative_error(out[:, None], attended[0, rows][:, None])


def _head_error(
    student: Decoder, index: int, theirs: tuple[Tensor, Qkv, Tensor], batch: Batch, mix: Mix
) -> Tensor | None:
    """Relative error of a layer's changed heads behind their window; None if there are none."""
    heads, (normed, qkv, mixed) = _far_heads(student, index), theirs
    if not heads:
        return None
    far = (batch.positions >= _window(student, index)) & (batch.documents > 0)
    out = student.layers[index].mix_with(normed, qkv, mix)
    rows = far.flatten().to(out.device)
    return relative_error(out[0, rows][:, heads], mixed[0, rows][:, heads])


def _far_heads(decoder: Decoder, index: int) -> list[int]:
    """Query heads of a layer whose mixer conversion added something to."""
    rep = decoder.config.heads_per_group
    attention = decoder.layers[index].self_attn
    return [
        g * rep + r
        for groups, mixer in attention.arrangement()
        if any(p.requires_grad for p in mixer.parameters())
        for g in groups
        for r in range(rep)
    ]


def _window(decoder: Decoder, index: int) -> int:
    """The longest window of a layer."""
    parts = decoder.config.layers[index].mixers
    return max((getattr(part, "window_tokens", 0) for part in parts), default=0)


def short_layers(
    decoder: Decoder, healing: Healing, dropout: WindowDropout, step: int, of: int, micro: int
) -> tuple[set[int], int]:
    """Which layers have a short window in a micro-batch, and how short it is."""
    share = dropout.frac(step, of)
    draw = random.Random(f"window {healing.seed}/{step}/{micro}")
    chosen = {i for i in range(len(decoder.layers)) if draw.random() < share}
    return chosen, dropout.window_tokens


def memory_is_off(healing: Healing, stage: Stage, step: int) -> bool:
    """Whether a step is taken with memories off: the same answer in every process."""
    draw = random.Random(f"memory {healing.seed}/{step}")
    return draw.random() < stage.memory_dropout.frac(step, stage.steps)
