"""Dropout that costs little on a CPU: PyTorch's draws one number per element there, slower than a matrix product.

Dimension key: any shape.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16
"""Sixteen random bits decide an element: p is exact to 1 / 65,536."""


def dropout(hidden: Tensor, p: float, training: bool) -> Tensor:
    """Zero elements with probability `p` and scale the rest by 1 / (1 - p), when `training`.

    Draws from the global generator of the tensor's device, so that `torch.manual_seed` repeats it.
    """
    if not training or p == 0.0:
        return hidden
    if hidden.device.type != "cpu":
        return F.dropout(hidden, p, training=True)
    dropped: Tensor = _CpuDropout.apply(hidden, p)  # type: ignore[no-untyped-call]
    return dropped


class _CpuDropout(torch.autograd.Function):
    """Keeps one byte per element for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, p: float) -> Tensor:
        ctx.keep, ctx.scale = _keep_mask(hidden, p), 1.0 / (1.0 - p)
        return torch.mul(hidden, ctx.keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.mul(grads[0], ctx.keep).mul_(ctx.scale), None


def _keep_mask(hidden: Tensor, p: float) -> Tensor:
    """True with probability 1 - p; four elements from every 64 random bits."""
    num_words = -(-hidden.numel() // 4)
    words = torch.empty(num_words, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: hidden.numel()]
    return (bits >= round(p * _LEVELS) - _LEVELS // 2).view(hidden.shape)
