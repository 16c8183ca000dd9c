"""Tensors of which every rank holds a part (DTensor), and tensors as they always were, handled alike.

A model trained with `sharding` "full" has the first kind; everywhere else all this does nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from blip_core.distributed import World


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is split, sharing memory; another as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a split tensor put together, on all ranks, which all call this; another as it is."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return whole tensors, those put together on the CPU; all ranks call this, and get {} without `keep`.

    One tensor at a time is put together, so no device ever holds all.
    """
    whole = {}
    for name, tensor in tensors.items():
        full = whole_tensor(tensor)
        if keep:
            whole[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return whole


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy whole `values` into `tensor`, or this rank's part of them when it is split."""
    own_part(tensor).copy_(own_part(split_like(tensor, values)))


def split_like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return whole `values` on the device of `tensor`, split as it is; nothing is sent."""
    if not isinstance(tensor, DTensor) or tensor.shape != values.shape:
        return values.to(tensor.device)
    mesh, placements = tensor.device_mesh, tensor.placements
    return distribute_tensor(values.to(tensor.device), mesh, placements, src_data_rank=None)


def separated(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups of an optimizer that hold split parameters or whole ones, not both."""
    found = []
    for group in groups:
        for is_split in (True, False):
            chosen = [each for each in group["params"] if isinstance(each, DTensor) == is_split]
            if chosen:
                found.append({**group, "params": chosen})
    return found


def average_whole(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Give the gradients of parameters that stay whole the mean over the ranks."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            parameter.grad = world.mean(parameter.grad)


def total_norm(tensors: list[Tensor], world: World) -> Tensor:
    """Return the norm () of all tensors; of those that are split, over all ranks."""
    split = [own_part(each) for each in tensors if isinstance(each, DTensor)]
    norm = nn.utils.get_total_norm([each for each in tensors if not isinstance(each, DTensor)])
    if not split:
        return norm
    of_split = world.sum(nn.utils.get_total_norm(split).square())
    return (norm.to(of_split.device).square() + of_split).sqrt()
