"""One process or many: what `torchrun` starts shares rows and shards the student (FSDP2).

The same command runs on one machine (gloo) and on a cluster: torch picks the backend
of the device (`docs/concepts/healing.md`). Each process keeps the original whole, for its engine.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from respike.models.decoder import Decoder


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: Of this one.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """This process writes files and talks."""
        return self.rank == 0

    def shard(self, student: Decoder) -> None:
        """Spread the student's layers over the processes; nothing for one process."""
        if self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for layer in student.layers:
            fully_shard(layer)
            for method in ("forward_with", "mix_with", "attended_with"):
                register_fsdp_forward_method(layer, method)

    def total(self, value: float) -> float:
        """Sum over processes."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(held)
        return float(held)

    @staticmethod
    def full(tensor: Tensor) -> Tensor:
        """A tensor in one piece, on every process."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @staticmethod
    def put(target: Tensor | nn.Parameter, value: Tensor) -> None:
        """Copy ``value``, in one piece on every process, into a tensor that may be sharded."""
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()


def join_world() -> World:
    """The processes that `torchrun` started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        dist.init_process_group("gloo" if not torch.accelerator.is_available() else None)
    return World(dist.get_rank(), size)
