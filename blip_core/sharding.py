"""Weights, gradients and optimizer state split over the ranks (FSDP2, `torch.distributed.fsdp.fully_shard`).

A rank holds its part of every tensor, cut along the first axis. A part of the model is put together where it
computes and taken apart again after it, in forward and in backward. Texts pass the same layers three times a
step; every pass puts together what it uses alone, so the other role's self-attention stays in parts.

The logit scale is one number, which FSDP2 does not cut: it stays whole on every rank.
"""

import warnings
from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from blip_core.med import MED
from blip_core.momentum import MomentumEncoders
from blip_core.text import TextLayer

Sharding = Literal["none", "full"]
SHARDINGS: tuple[Sharding, ...] = ("none", "full")


def shard(
    step: nn.Module, model: MED, momentum: MomentumEncoders | None, device: torch.device
) -> None:
    """Split `model`, which `step` holds and calls, and its twins over the ranks, on `device`.

    Parameters become DTensors under their old names. Backward then leaves each rank its part of the mean
    gradient; that of parameters which stay whole is the rank's own (see `average_whole`).
    """
    # nothing here writes in place into what a part of the model gave
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {parameter for parameter in step.parameters() if parameter.ndim == 0}
    parts: list[nn.Module] = [*model.vision.blocks, *_text_parts(model.text)]
    if momentum is not None:
        # the last block is entered piece by piece (see `encode_cls`), so the twins as a whole hold it
        parts += [*momentum.vision.blocks[:-1], *_text_parts(momentum.text)]
    for part in [*parts, step, *([momentum] if momentum is not None else [])]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for layer in model.text.stack():
        if hasattr(layer, "cross_attention"):
            register_fsdp_forward_method(layer.cross_attention, "project")
    if momentum is not None:
        register_fsdp_forward_method(momentum, "features")
    for parameter in whole:
        parameter.data = parameter.data.to(device)


def _text_parts(text: nn.Module) -> Iterator[nn.Module]:
    """Self-attention of each role, cross-attention and feed-forward of all layers."""
    for module in text.modules():
        if isinstance(module, TextLayer):
            yield from module.children()
