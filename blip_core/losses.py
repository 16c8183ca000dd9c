"""The three objectives as pure functions of tensors (BLIP, section 3.2).

Dimension key: B batch, E shared width, Q queue length, M = B + Q candidates, L text tokens, V vocabulary, N pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position that the language-modelling loss leaves out."""


def itc_targets(sim_momentum: Tensor, is_positive: Tensor, distill_alpha: float) -> Tensor:
    """Mix momentum similarities with the known matches to soft targets (B, M).

    `sim_momentum` (B, M) is scaled; `is_positive` (B, M) is True where row and column match, at least once
    in a row. Rows sum to 1.
    """
    known = is_positive.to(sim_momentum.dtype)
    known = known / known.sum(dim=1, keepdim=True)
    return distill_alpha * F.softmax(sim_momentum, dim=1) + (1.0 - distill_alpha) * known


def itc_loss(sim: Tensor, soft_targets: Tensor) -> Tensor:
    """Image-text contrastive loss () of scaled similarities (B, M), in one direction."""
    return -(soft_targets * F.log_softmax(sim, dim=1)).sum(dim=1).mean()


def itm_loss(itm_logits: Tensor, itm_labels: Tensor) -> Tensor:
    """Image-text matching loss () of logits (N, 2) and labels (N,), 1 = match.

    With one positive to two negatives a constant predictor reaches 0.6365 nats: a loss that stays there has
    learned nothing.
    """
    return F.cross_entropy(itm_logits, itm_labels)


def lm_loss(lm_logits: Tensor, lm_labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Language-modelling loss (), the mean over labels that are not -100.

    `lm_logits` (B, L, V) at position t predict `lm_labels` (B, L) at t + 1: the shift happens here and
    nowhere else. With smoothing 0.1 and 30,524 pieces the loss cannot fall below 1.358 nats, so that no
    perplexity follows from it. 0 when every label is ignored.
    """
    return token_loss(
        lm_logits[:, :-1].flatten(0, 1), lm_labels[:, 1:].flatten(), label_smoothing=label_smoothing
    )


def token_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """As `lm_loss`, of logits (T, V) and the labels (T,) that they predict, already shifted."""
    total = F.cross_entropy(
        logits,
        labels,
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


def lm_labels(input_ids: Tensor, attention_mask: Tensor, num_prompt_tokens: int = 0) -> Tensor:
    """Return labels (B, L) of ids (B, L): padding and the first `num_prompt_tokens` become -100."""
    labels = torch.where(attention_mask.bool(), input_ids, IGNORED)
    labels[:, :num_prompt_tokens] = IGNORED
    return labels
