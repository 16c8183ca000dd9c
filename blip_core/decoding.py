"""Rows of tokens decoded in lockstep, greedily or by sampling (BLIP, section 3.3).

Dimension key: B images, N rows (captions being written), L text tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from blip_core.generation import (
    CaptionConfig,
    FinishReason,
    Sequences,
    Vocabulary,
    as_nucleus,
    draw_key,
    uniforms,
)
from blip_core.sampling import constrain, draw


class RowDecoder(Protocol):
    """A model at work on rows that are all of one length so far."""

    def step(self, ids: Tensor) -> Tensor:
        """(N, L) next ids of every row -> logits (N, V) after the last of them."""

    def select(self, rows: Tensor) -> None:
        """Go on with `rows` (M,) of the present ones, in this order; repeats allowed."""


def decode_rows(
    decoder: RowDecoder,
    prompt_ids: Sequence[int],
    image_ids: Sequence[str],
    config: CaptionConfig,
    vocabulary: Vocabulary,
    device: torch.device,
) -> Sequences:
    """Decode `num_captions` rows an image, an image's together, greedily or by sampling.

    The prompt is read once an image. A row that has ended leaves the batch at once, and its place is taken by
    the last open row.
    """
    num_images, per_image = len(image_ids), config.num_captions
    penalises_prompt = config.decoding == "official"
    config = as_nucleus(config, len(prompt_ids))
    rows = torch.arange(num_images, device=device).repeat_interleave(per_image)
    prompt = torch.tensor([list(prompt_ids)], device=device)
    logits = decoder.step(prompt.expand(num_images, -1))
    if per_image > 1:
        decoder.select(rows)
        logits = logits[rows]
    found = _Found(len(rows), config.max_new_tokens, vocabulary.sep_id, device)
    draws = _draws(image_ids, config).to(device) if config.is_sampled else None
    open_rows = torch.arange(len(rows), device=device)
    for position in range(config.max_new_tokens):
        seen = found.ids[open_rows, :position]
        if penalises_prompt:
            seen = torch.cat([prompt.expand(len(seen), -1), seen], dim=1)
        logits = logits.float()
        blocked = vocabulary.blocked(position, config)
        logits = constrain(logits, seen, config, blocked_ids=blocked)
        if draws is None:
            tokens = logits.argmax(dim=-1)
        else:
            tokens = draw(logits, draws[open_rows, position], config)
        goes_on = found.add(open_rows, position, tokens, logits)
        if position == config.max_new_tokens - 1:
            break
        kept = close_ranks(goes_on)
        if not len(kept):
            break
        if len(kept) < len(open_rows):
            decoder.select(kept)
            open_rows, tokens = open_rows[kept], tokens[kept]
        logits = decoder.step(tokens[:, None])
    return found.sequences()


class _Found:
    """What has been generated of every row."""

    def __init__(self, num_rows: int, max_tokens: int, sep_id: int, device: torch.device) -> None:
        self.sep_id = sep_id
        self.ids = torch.full((num_rows, max_tokens), sep_id, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.sums = torch.zeros(num_rows, dtype=torch.float64, device=device)
        self.is_open = torch.ones(num_rows, dtype=torch.bool, device=device)

    def add(self, rows: Tensor, position: int, tokens: Tensor, logits: Tensor) -> Tensor:
        """Note the next token of each of `rows`; returns which of them go on (N,)."""
        # log_softmax works row by row; logsumexp adds up in an order that depends on the number of rows
        logprobs = logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1).double()
        is_number = torch.isfinite(logprobs)
        self.sums[rows] += logprobs
        ends = (tokens == self.sep_id) | ~is_number
        tokens = torch.where(ends, self.sep_id, tokens)
        self.ids[rows, position] = tokens
        self.lengths[rows] = position + (~ends).long()
        self.is_open[rows] = ~ends
        return ~ends

    def sequences(self) -> Sequences:
        """Return everything, as Python's own types."""
        sums, lengths = self.sums.tolist(), self.lengths.tolist()
        reasons: list[FinishReason] = [
            "nan" if not math.isfinite(total) else "length" if is_open else "sep"
            for total, is_open in zip(sums, self.is_open.tolist(), strict=True)
        ]
        rows = zip(self.ids.tolist(), lengths, reasons, strict=True)
        ids = [[] if reason == "nan" else row[:length] for row, length, reason in rows]
        return Sequences(ids, sums, reasons)


def _draws(image_ids: Sequence[str], config: CaptionConfig) -> Tensor:
    """All draws of all captions: (N, max_new_tokens) float64."""
    keys = [
        draw_key(config.seed, image_id, index)
        for image_id in image_ids
        for index in range(config.num_captions)
    ]
    array = np.array(keys, dtype=np.uint64)
    columns = [uniforms(array, position) for position in range(config.max_new_tokens)]
    return torch.from_numpy(np.stack(columns, axis=1))


def close_ranks(is_kept: Tensor) -> Tensor:
    """Order (M,) in which the M kept rows stand when each gap is filled by one from the end.

    Rows before the M-th that are kept stay where they are, so little is moved.
    """
    num_kept = int(is_kept.sum())
    order = torch.arange(num_kept, device=is_kept.device)
    order[~is_kept[:num_kept]] = num_kept + is_kept[num_kept:].nonzero().squeeze(1)
    return order
