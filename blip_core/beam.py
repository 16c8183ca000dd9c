"""Beam search (BLIP, section 3.3: captions for evaluation, three beams), and the choice of a decoding.

Candidates, scores and the moment to stop are those of transformers' beam search with its defaults.

Dimension key: B batch, K beams, L text tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blip_core.generation import (
    CaptionConfig,
    FinishReason,
    NextLogits,
    Sequences,
    constrain,
    decode_rows,
    draw_key,
)
from blip_core.text import KVCache


def decode(
    next_logits: NextLogits,
    prompt_ids: Sequence[int],
    image_ids: Sequence[str],
    config: CaptionConfig,
    *,
    sep_id: int,
    forbidden_ids: Sequence[int],
    device: torch.device,
) -> Sequences:
    """Decode as `config` says: `num_captions` rows per image, an image's together.

    `next_logits` sees that many rows per image, or `num_beams` of them in a beam search.
    """
    if config.decoding == "beam":
        return beam_search(
            next_logits,
            prompt_ids,
            len(image_ids),
            config,
            sep_id=sep_id,
            forbidden_ids=forbidden_ids,
            device=device,
        )
    keys = [
        draw_key(config.seed, image_id, index)
        for image_id in image_ids
        for index in range(config.num_captions)
    ]
    return decode_rows(
        next_logits,
        prompt_ids,
        len(keys),
        config,
        sep_id=sep_id,
        forbidden_ids=forbidden_ids,
        keys=np.array(keys, dtype=np.uint64),
        device=device,
    )


def beam_search(
    next_logits: NextLogits,
    prompt_ids: Sequence[int],
    num_rows: int,
    config: CaptionConfig,
    *,
    sep_id: int,
    forbidden_ids: Sequence[int],
    device: torch.device,
) -> Sequences:
    """Return the best caption of every row by mean log-probability per token, [SEP] counted.

    `next_logits` sees B * K rows, the beams of a row together. A row is done when it has K finished
    captions and no living beam is better than the worst of them, or at max_new_tokens.
    """
    num_beams = config.num_beams
    search = _Search(num_rows, num_beams, sep_id)
    cache = KVCache()
    ids = torch.tensor([list(prompt_ids)] * (num_rows * num_beams), device=device)
    generated = ids[:, :0]
    sums = torch.full((num_rows, num_beams), float("-inf"), dtype=torch.float64, device=device)
    sums[:, 0] = 0.0  # all beams start equal: only one may speak first
    for position in range(config.max_new_tokens):
        logprobs = next_logits(ids, cache).double().log_softmax(dim=-1)
        # constrained after the softmax: what is forbidden does not make the rest likelier
        logprobs = constrain(
            logprobs, generated, config, sep_id=sep_id, forbidden_ids=forbidden_ids
        )
        vocab_size = logprobs.shape[-1]
        totals = (sums.view(-1, 1) + logprobs).view(num_rows, -1)
        values, flat = totals.topk(min(2 * num_beams, totals.shape[1]), dim=-1)
        is_last = position == config.max_new_tokens - 1
        sums, beams, tokens = search.advance(generated, values, flat, vocab_size, is_last)
        rows = (torch.arange(num_rows, device=device)[:, None] * num_beams + beams).flatten()
        cache.reorder(rows)
        ids = tokens.reshape(-1, 1)
        generated = torch.cat([generated[rows], ids], dim=1)
        search.close(sums, position + 1)
        if all(search.is_closed):
            break
    return search.best()


class _Search:
    """The K best finished captions of every row."""

    def __init__(self, num_rows: int, num_beams: int, sep_id: int) -> None:
        self.num_beams, self.sep_id = num_beams, sep_id
        self.finished: list[list[tuple[float, float, list[int], FinishReason]]] = [
            [] for _ in range(num_rows)
        ]
        self.is_closed = [False] * num_rows
        """Rows that are done: what others still need must not change them."""

    def advance(
        self, generated: Tensor, values: Tensor, flat: Tensor, vocab_size: int, is_last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take finished candidates out; returns sums, source beams and tokens (B, K) of those that live."""
        beams, tokens = flat // vocab_size, flat % vocab_size
        length = generated.shape[1] + 1
        history = generated.tolist()
        kept_values = torch.full_like(values[:, : self.num_beams], float("-inf"))
        kept_beams = torch.zeros_like(beams[:, : self.num_beams])
        kept_tokens = torch.full_like(kept_beams, self.sep_id)
        for row, finished in enumerate(self.finished):
            slot = 0
            for rank in range(values.shape[1]):
                total, token = float(values[row, rank]), int(tokens[row, rank])
                ids = history[row * self.num_beams + int(beams[row, rank])]
                if total == float("-inf") or slot == self.num_beams:
                    break
                may_finish = rank < self.num_beams and not self.is_closed[row]
                if token == self.sep_id:
                    if may_finish:
                        finished.append((total / length, total, ids, "sep"))
                    continue
                if is_last and may_finish:
                    finished.append((total / length, total, [*ids, token], "length"))
                kept_values[row, slot] = total
                kept_beams[row, slot] = beams[row, rank]
                kept_tokens[row, slot] = token
                slot += 1
        return kept_values, kept_beams, kept_tokens

    def close(self, sums: Tensor, length: int) -> None:
        """Close rows that have K finished captions, all at least as good as every living beam."""
        best_living = (sums.amax(dim=-1) / length).tolist()
        for row, finished in enumerate(self.finished):
            finished.sort(key=lambda found: found[0], reverse=True)
            del finished[self.num_beams :]
            is_full = len(finished) == self.num_beams
            if is_full and finished[-1][0] >= best_living[row]:
                self.is_closed[row] = True

    def best(self) -> Sequences:
        """Return the best finished caption of every row."""
        chosen = [max(finished, key=lambda f: f[0]) for finished in self.finished]
        return Sequences(
            [ids for _, _, ids, _ in chosen],
            [total for _, total, _, _ in chosen],
            [reason for _, _, _, reason in chosen],
        )
