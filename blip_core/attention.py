"""Attention by the fastest exact way for the device, the number type and whether gradients are wanted.

Dimension key: B batch, H heads, L query tokens, M key tokens, K head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.dropout import dropout

_LONG_PRODUCT = 96 * 96
"""Query tokens times key tokens above which the fused kernel wins in float32."""
_FEW_QUERIES = 16
"""Up to here plain products take about the same time in float32. They are taken, since with several threads the fused
kernel's last bits depend on the size of the batch, and a caption must not."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout_p: float = 0.0
) -> Tensor:
    """(B, H, L, K) x (B, H, M, K) -> (B, H, L, K): softmax(q k / sqrt(K)) v.

    `mask` is boolean and broadcasts to (B, H, L, M), True = attend. `dropout_p` drops attention weights.
    On a CPU a training pass mostly multiplies matrices outright, which took 0.4 to 0.9 of the time of PyTorch's
    fused kernel there; so does inference in bfloat16 (0.13 to 0.7), and by few tokens. The fused kernel wins in
    float32 where many tokens meet many and nothing is dropped. The rule is fixed: a choice by a stopwatch would
    change the last bits of a result from run to run.
    """
    if not _is_plain_faster(query, key, dropout_p):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout_p)
    with torch.autocast("cpu", enabled=False):
        scores = torch.matmul(query * (1.0 / math.sqrt(query.shape[-1])), key.transpose(-2, -1))
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = dropout(scores.softmax(dim=-1), dropout_p, training=True)
        return torch.matmul(weights, value)


def _is_plain_faster(query: Tensor, key: Tensor, dropout_p: float) -> bool:
    if query.device.type != "cpu":
        return False
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if dropout_p > 0.0:
        return True
    if not needs_grad:
        return query.dtype == torch.bfloat16 or query.shape[-2] <= _FEW_QUERIES
    is_long = query.shape[-2] * key.shape[-2] > _LONG_PRODUCT
    return query.dtype != torch.float32 or not is_long
