"""Which token comes next: constraints on logits, the nucleus, and draws from it (BLIP, section 3.3; Holtzman et al. 2020).

The nucleus is found without sorting the vocabulary. Dimension key: N rows, L text tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blip_core.generation import CaptionConfig

_FIRST_LOOK = 256
"""Likeliest tokens that are looked at first; a trained captioner's nucleus is nearly always among them."""
_DIGITS = ((20, 11), (9, 11), (0, 9))
"""(lowest bit, number of bits) of the parts in which a float32 in [0, 1] is searched, highest first."""


def constrain(
    logits: Tensor,
    penalised: Tensor,
    config: CaptionConfig,
    *,
    blocked_ids: Sequence[int],
) -> Tensor:
    """Logits (N, V) with the repetition penalty on tokens `penalised` (N, L), and `blocked_ids` impossible.

    Works on logits and on log-probabilities; the input is left as it is.
    """
    if config.repetition_penalty != 1.0 and penalised.shape[1]:
        seen = logits.gather(1, penalised)
        penalty = config.repetition_penalty
        seen = torch.where(seen > 0, seen / penalty, seen * penalty)
        logits = logits.scatter(1, penalised, seen)
    if not blocked_ids:
        return logits
    columns = torch.tensor(blocked_ids, dtype=torch.int64, device=logits.device)
    return logits.index_fill(1, columns, float("-inf"))


def draw(logits: Tensor, draws: Tensor, config: CaptionConfig) -> Tensor:
    """Tokens (N,) of logits (N, V) under temperature, then top_k, then top_p, by `draws` (N,) in [0, 1)."""
    return sample(nucleus_probs(logits, config), draws)


def nucleus_probs(logits: Tensor, config: CaptionConfig) -> Tensor:
    """(N, V) logits -> float64 probabilities of temperature, then top_k, then top_p.

    The nucleus is the smallest set of likeliest tokens whose mass reaches top_p; at least one token. Of equally
    likely tokens the first ones are in.
    """
    logits = logits.float()
    highest = logits.amax(dim=-1, keepdim=True)  # taken off first: a low temperature would overflow
    probs = torch.softmax((logits - highest) / config.temperature, dim=-1)
    if config.top_k and config.top_k < probs.shape[1]:
        values, _ = probs.topk(config.top_k, dim=-1)
        # ties with the last of the k: the first tokens are in, whatever order topk has
        is_above, ties = probs > values[:, -1:], probs == values[:, -1:]
        room = config.top_k - is_above.sum(dim=-1, keepdim=True)
        probs = torch.where(is_above | (ties & (ties.cumsum(dim=-1) <= room)), probs, 0.0)
        probs = probs / values.double().sum(dim=-1, keepdim=True).float()
    if config.top_p < 1.0:
        probs = torch.where(_in_nucleus(probs, config.top_p), probs, 0.0)
    kept = probs.double()
    return kept / kept.sum(dim=-1, keepdim=True)


def _in_nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Whether a token is in the nucleus: (N, V) float32 -> (N, V) bool."""
    values = probs.topk(min(_FIRST_LOOK, probs.shape[1]), dim=-1).values.double()
    reached = values.cumsum(dim=-1)
    target = torch.full_like(reached[:, -1:], top_p)
    last = (reached < target).sum(dim=1, keepdim=True).clamp(max=values.shape[1] - 1)
    threshold = values.gather(1, last)
    missing = target - torch.where(values > threshold, values, 0.0).sum(dim=1, keepdim=True)
    is_wide = reached[:, -1] < top_p
    if values.shape[1] < probs.shape[1] and bool(is_wide.any()):
        threshold[is_wide], missing[is_wide] = _search(probs[is_wide], top_p)
    # of tokens with exactly the last probability the first ones fill up what is missing
    threshold32 = threshold.float()
    needed = torch.ceil(missing / threshold.clamp(min=torch.finfo(torch.float32).tiny))
    ties = probs == threshold32
    return (probs > threshold32) | (ties & (ties.cumsum(dim=-1) <= needed.clamp(min=1)))


def _search(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the smallest probability inside the nucleus (N, 1), and how much the larger ones leave missing.

    For flat distributions: the value is searched, not an order. Floats that are not negative are ordered as
    their bits are, so mass is added up by the highest bits of the probabilities, where it reaches top_p by the
    next lower ones, and so on.
    """
    bits, mass = probs.contiguous().view(torch.int32), probs.double()
    missing = top_p * mass.sum(dim=-1, keepdim=True)
    threshold = torch.zeros(len(probs), 1, dtype=torch.int32, device=probs.device)
    for shift, num_bits in _DIGITS:
        last = (1 << num_bits) - 1
        rank = last - ((bits >> shift) & last)  # 0 is the likeliest
        sums = mass.new_zeros(len(probs), last + 1).scatter_add_(1, rank.long(), mass)
        reached = sums.cumsum(dim=1)
        # rounding may leave all mass a hair below what is missing: then the last rank that has any
        found = (reached < torch.minimum(missing, reached[:, -1:])).sum(dim=1, keepdim=True)
        missing = missing - (reached.gather(1, found) - sums.gather(1, found))
        threshold |= (last - found).int() << shift
        mass = torch.where(rank == found, mass, 0.0)
    return threshold.view(torch.float32).double(), missing


def sample(probs: Tensor, draws: Tensor) -> Tensor:
    """Invert the cumulative distribution: (N, V) float64 and draws (N,) in [0, 1) -> tokens (N,)."""
    cumulative = probs.cumsum(dim=-1)
    # a draw beyond the rounded total, or on a token of no mass, goes to the last token that has mass
    total = cumulative[:, -1:]
    token = torch.searchsorted(cumulative, draws[:, None] * total, right=True).squeeze(1)
    last = probs.shape[1] - 1 - (probs > 0).flip(1).byte().argmax(dim=-1)
    return torch.minimum(token, last)
