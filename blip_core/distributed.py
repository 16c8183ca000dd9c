"""Several processes training one model: who they are, and what they exchange (torch.distributed).

A `World` of one process exchanges nothing and copies nothing, so that the same code trains alone. Started by
`torchrun`, `join_world` makes the process group: gloo on CPUs, nccl on GPUs.

Dimension key: B rows of a rank, W ranks, L text tokens.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from blip_core.config import require

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others, a checkpoint being written included."""


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; backward sums what every rank asks of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return _all_gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.num_rows
        return grad[start : start + ctx.num_rows]


@dataclass(frozen=True, slots=True)
class World:
    """The ranks that train together. Every rank brings the same number of rows B."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0

    def own_rows(self, num_rows: int) -> slice:
        """Return where this rank's B rows lie among all W * B."""
        return slice(self.rank * num_rows, (self.rank + 1) * num_rows)

    def gather(self, rows: Tensor) -> Tensor:
        """(B, ...) -> (W * B, ...) in order of rank, without gradient."""
        return rows if self.size == 1 else _all_gather(rows.detach())

    def gather_with_grad(self, rows: Tensor) -> Tensor:
        """As `gather`; gradients of all ranks flow back, summed, to the rank the rows came from."""
        if self.size == 1:
            return rows
        gathered: Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
        return gathered

    def gather_padded(self, rows: Tensor, value: int) -> Tensor:
        """(B, L) -> (W * B, longest L), filled up with `value` at the right."""
        if self.size == 1:
            return rows
        longest = torch.tensor(rows.shape[1], device=rows.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return _all_gather(F.pad(rows, (0, int(longest) - rows.shape[1]), value=value))

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of all ranks' `value`, without gradient."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of all ranks' `value`, without gradient."""
        return self.sum(value) / self.size if self.size > 1 else value

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def from_first(self, value: int) -> int:
        """Return the first rank's `value`."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def _all_gather(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def current_world() -> World:
    """Return the world of this process: of one rank unless a process group is there."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(rank=dist.get_rank(), size=dist.get_world_size())


@contextmanager
def join_world(device: str = "auto") -> Iterator[tuple[World, torch.device]]:
    """Join the process group that `torchrun` describes, for the length of a `with`; gives world and device.

    `device` is auto, cpu or cuda; on GPUs each rank takes the one of its LOCAL_RANK. Without torchrun's
    variables the world has one rank, and `device` may be cuda:N. Raises ConfigError for cuda:N when several
    processes train, and for a rank without a GPU.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        num_processes == 1 or not device.startswith("cuda:"),
        f"device {device!r} is one GPU, but {num_processes} processes train together: give 'cuda', and "
        "each takes its own; CUDA_VISIBLE_DEVICES says which there are",
    )
    use_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_cuda and device in ("auto", "cuda"):
        require(
            local_rank < torch.cuda.device_count(),
            f"rank {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are here; "
            "start at most that many processes",
        )
        torch.cuda.set_device(local_rank)
    chosen = torch.device("cpu")
    if use_cuda:
        chosen = torch.device(device if ":" in device else f"cuda:{local_rank}")
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield World(), chosen
        return
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=TIMEOUT)
    try:
        yield current_world(), chosen
    finally:
        dist.destroy_process_group()
