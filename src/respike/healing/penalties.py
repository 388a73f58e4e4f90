"""What joins a step's objective: the price of neurons that fire, and the balance of experts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from respike.healing.config import Stage
from respike.healing.parallel import World
from respike.models.balance import watch_balance
from respike.models.decoder import Decoder
from respike.models.silence import SeenFiring, silence_loss, watch_firing

Penalty = Callable[[], Tensor]
"""What a micro-batch adds to its share of the loss, after the forward pass."""
GOAL_WIDTH = 0.02
"""Excess over the share asked, beyond which all of the price is charged: in between what is charged
finds what silence costs in KL, so that weights are not driven harder than that."""


@dataclass
class Penalties:
    """Those of one step, and what it saw.

    Attributes:
        student: The model that is trained.
        stage: What is asked of it.
        step: Of the stage.
        balance: The balance loss, not weighted.
        skipped_frac: Share of the weights behind neurons that was skipped.
    """

    student: Decoder
    stage: Stage
    step: int
    balance: float = 0.0
    skipped_frac: float = 0.0

    @contextmanager
    def of(self, share: float) -> Iterator[Penalty]:
        """While the block runs: those of a micro-batch that is ``share`` of the step."""
        with ExitStack() as stack:
            balance = stack.enter_context(watch_balance(self.student))
            firing = None
            if self.student.config.spikes is not None:
                firing = stack.enter_context(watch_firing(self.student))

            def penalty() -> Tensor:
                found = balance() * share
                self.balance += float(found.detach())
                found = found * self.stage.balance
                return found if firing is None else found + self.price(firing, share)

            yield penalty

    def price(self, firing: SeenFiring, share: float) -> Tensor:
        """Of what a micro-batch's neurons touched, ()."""
        ask, touched = self.stage.silence, firing.touched_frac()
        self.skipped_frac += share * (1 - float(touched.detach()))
        if ask is None or not ask.price_nats:
            return torch.zeros_like(touched)
        asked = ask.asked_frac(self.step, self.stage.steps)
        return silence_loss(touched, asked, GOAL_WIDTH) * (ask.price_nats * share)

    def figures(self, world: World) -> dict[str, float]:
        """What the log says of the step, over all processes."""
        found = {}
        if self.balance:
            found["balance"] = world.total(self.balance)
        if self.student.config.spikes is not None and self.stage.kind != "transfer":
            ask = self.stage.silence
            found["skipped_frac"] = self.skipped_frac
            found["asked_frac"] = ask.asked_frac(self.step, self.stage.steps) if ask else 0.0
        return found
