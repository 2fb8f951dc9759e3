"""The processes of a run: one, or several that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class Processes:
    """This process among the others of the run. All do the same steps on parts of the same batch."""

    rank: int = 0
    size: int = 1
    is_launched: bool = False
    """Whether torchrun has started it, which gives the same command again when a process has failed."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and tells the user."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of the tensor over all processes; without gradient."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return self.add_up(tensor) / self.size

    def gather(self, tensor_BC: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks, and so the same in each of them."""
        return torch.cat(self._gathered(tensor_BC)) if self.size > 1 else tensor_BC

    def others(self, tensor_GBC: Tensor) -> Tensor | None:
        """The same tensor of all other processes, along the second dimension; None where there are none."""
        if self.size == 1:
            return None
        parts = self._gathered(tensor_GBC)
        return torch.cat([part for rank, part in enumerate(parts) if rank != self.rank], dim=1)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.size == 1 else bool(self.add_up(torch.tensor(float(flag), device=device)).item())

    def from_first(self, find: Callable[[], str]) -> str:
        """What `find` gives the first process, which alone calls it."""
        found = [find() if self.is_first else ""]
        if self.size > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts


ALONE = Processes()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun has started (it sets RANK and WORLD_SIZE), connected; otherwise this one alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(rendezvous("env://"))
    # After a restart, torchrun may hand out the store with the addresses of processes that are gone, which would be
    # waited for.
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield Processes(rank, size, is_launched=True)
    finally:
        dist.destroy_process_group()
