"""Decoding of captions: nucleus sampling, greedy and beam search (BLIP, section 3.3; Holtzman et al. 2020).

Sampling draws are a function of (seed, image_id, index, position) only, so neither the order, nor the size, nor
the company of a batch changes a caption.

Dimension key: B batch, L text tokens, V vocabulary, K beams.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from blip_core.config import require, require_positive
from blip_core.text import KVCache

FinishReason = Literal["sep", "length"]
NextLogits = Callable[[Tensor, KVCache], Tensor]
"""(B, L) new ids and the cache of all before them -> logits (B, V) after the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """How captions are decoded."""

    decoding: Literal["nucleus", "greedy", "beam"] = "nucleus"
    """The paper samples synthetic captions (nucleus) and searches for evaluation (beam)."""
    top_p: float = 0.9
    """Nucleus mass, of the distribution that top_k left."""
    top_k: int = 0
    """Candidates a token is drawn from; 0 is off. The reference silently uses 50."""
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of generated tokens; the reference uses 1.1."""
    num_beams: int = 3
    max_new_tokens: int = 20
    """Upper bound on generated tokens, [SEP] counted, prompt not."""
    min_new_tokens: int = 1
    """[SEP] is forbidden before that many tokens."""
    prompt: str = ""
    """What every caption starts from, such as `a picture of`; not part of the caption."""
    num_captions: int = 1
    """Samples per image."""
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("nucleus", "greedy", "beam")
        require(
            self.decoding in known,
            f"decoding must be one of {', '.join(known)}, got {self.decoding!r}",
        )
        require(0.0 < self.top_p <= 1.0, f"top_p must be in (0, 1], got {self.top_p}")
        require(self.top_k >= 0, f"top_k must be 0 (off) or more, got {self.top_k}")
        require_positive(self, "temperature", "repetition_penalty", "num_beams", "max_new_tokens")
        require_positive(self, "num_captions")
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be in [0, max_new_tokens], got {self.min_new_tokens}",
        )
        require(
            self.decoding == "nucleus" or self.num_captions == 1,
            f"{self.decoding} decoding gives one caption, num_captions is {self.num_captions}",
        )


@dataclass(frozen=True, slots=True)
class Sequences:
    """Decoded ids of a batch of rows, prompt excluded."""

    ids: list[list[int]]
    """Per row, without [SEP]."""
    sum_logprobs: list[float]
    """Log-probability under the model, [SEP] included where there is one."""
    finish_reasons: list[FinishReason]


def draw_key(seed: int, image_id: str, index: int) -> int:
    """Return the 64-bit key of all draws of one caption."""
    digest = hashlib.sha256(f"{seed}\0{image_id}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def uniforms(keys: np.ndarray, position: int) -> np.ndarray:
    """Return one draw in [0, 1) per key (B,) uint64 for token `position` (splitmix64)."""
    offset = np.uint64((position + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    mixed = keys + offset
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def nucleus_probs(logits: Tensor, config: CaptionConfig) -> Tensor:
    """(B, V) logits -> float64 probabilities of temperature, then top_k, then top_p.

    The nucleus is the smallest set of likeliest tokens whose mass reaches top_p; at least one token.
    """
    probs = torch.softmax(logits.double() / config.temperature, dim=-1)
    ordered, indices = probs.sort(dim=-1, descending=True, stable=True)
    if config.top_k:
        ordered[:, config.top_k :] = 0.0
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(mass_before >= config.top_p, 0.0)
    kept = torch.zeros_like(probs).scatter(1, indices, ordered)
    return kept / kept.sum(dim=-1, keepdim=True)


def sample(probs: Tensor, draws: Tensor) -> Tensor:
    """Invert the cumulative distribution: (B, V) float64 and draws (B,) in [0, 1) -> tokens (B,)."""
    cumulative = probs.cumsum(dim=-1)
    # a draw beyond the rounded total, or on a token of no mass, goes to the last token that has mass
    total = cumulative[:, -1:]
    token = torch.searchsorted(cumulative, draws[:, None] * total, right=True).squeeze(1)
    positions = torch.arange(probs.shape[1], device=probs.device)
    last = torch.where(probs > 0, positions, -1).amax(dim=-1)
    return torch.minimum(token, last)


def decode_rows(
    next_logits: NextLogits,
    prompt_ids: Sequence[int],
    num_rows: int,
    config: CaptionConfig,
    *,
    sep_id: int,
    forbidden_ids: Sequence[int],
    keys: np.ndarray | None,
    device: torch.device,
) -> Sequences:
    """Decode rows in lockstep, greedily or by nucleus sampling; `keys` (B,) uint64 seed the draws.

    `forbidden_ids` are never generated ([PAD], [CLS], ...).
    """
    cache = KVCache()
    ids = torch.tensor([list(prompt_ids)] * num_rows, device=device)
    generated = ids[:, :0]
    is_open = torch.ones(num_rows, dtype=torch.bool, device=device)
    sums = torch.zeros(num_rows, dtype=torch.float64, device=device)
    for position in range(config.max_new_tokens):
        logits = next_logits(ids, cache).float()
        logits = constrain(logits, generated, config, sep_id=sep_id, forbidden_ids=forbidden_ids)
        if config.decoding == "greedy" or keys is None:
            token = logits.argmax(dim=-1)
        else:
            draws = torch.from_numpy(uniforms(keys, position)).to(device)
            token = sample(nucleus_probs(logits, config), draws)
        logprobs = logits.double().log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)
        sums += torch.where(is_open, logprobs, 0.0)
        token = torch.where(is_open, token, sep_id)
        generated = torch.cat([generated, token[:, None]], dim=1)
        is_open = is_open & (token != sep_id)
        ids = token[:, None]
        if not bool(is_open.any()):
            break
    rows = [_until(row, sep_id) for row in generated.tolist()]
    reasons: list[FinishReason] = ["length" if open_ else "sep" for open_ in is_open.tolist()]
    return Sequences(rows, sums.tolist(), reasons)


def constrain(
    logits: Tensor,
    generated: Tensor,
    config: CaptionConfig,
    *,
    sep_id: int,
    forbidden_ids: Sequence[int],
) -> Tensor:
    """Apply repetition penalty, forbidden tokens and the minimum length to logits (B, V)."""
    if config.repetition_penalty != 1.0 and generated.shape[1]:
        seen = logits.gather(1, generated)
        penalty = config.repetition_penalty
        logits = logits.scatter(1, generated, torch.where(seen > 0, seen / penalty, seen * penalty))
    blocked = list(forbidden_ids)
    if generated.shape[1] < config.min_new_tokens:
        blocked.append(sep_id)
    columns = torch.tensor(blocked, dtype=torch.int64, device=logits.device)
    return logits.index_fill(1, columns, float("-inf"))


def _until(ids: list[int], sep_id: int) -> list[int]:
    return ids[: ids.index(sep_id)] if sep_id in ids else ids
