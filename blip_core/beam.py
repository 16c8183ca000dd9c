"""Beam search (BLIP, section 3.3: captions for evaluation, three beams).

Dimension key: B batch, K beams, L text tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blip_core.generation import CaptionConfig, FinishReason, NextLogits, Sequences, constrain
from blip_core.text import KVCache


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
    captions of which the best cannot be overtaken, or at max_new_tokens.
    """
    num_beams = config.num_beams
    search = _Search(num_rows, num_beams, sep_id)
    cache = KVCache()
    ids = torch.tensor([list(prompt_ids)] * (num_rows * num_beams), device=device)
    generated = ids[:, :0]
    sums = torch.full((num_rows, num_beams), float("-inf"), dtype=torch.float64, device=device)
    sums[:, 0] = 0.0  # all beams start equal: only one may speak first
    for position in range(config.max_new_tokens):
        logits = next_logits(ids, cache).float()
        logits = constrain(logits, generated, config, sep_id=sep_id, forbidden_ids=forbidden_ids)
        logprobs = logits.double().log_softmax(dim=-1).view(num_rows, num_beams, -1)
        vocab_size = logprobs.shape[-1]
        totals = (sums[:, :, None] + logprobs).view(num_rows, -1)
        values, flat = totals.topk(min(2 * num_beams, totals.shape[1]), dim=-1)
        is_last = position == config.max_new_tokens - 1
        sums, beams, tokens = search.advance(generated, values, flat, vocab_size, is_last)
        rows = (torch.arange(num_rows, device=device)[:, None] * num_beams + beams).flatten()
        cache.reorder(rows)
        ids = tokens.reshape(-1, 1)
        generated = torch.cat([generated[rows], ids], dim=1)
        if search.is_done(sums, position + 1):
            break
    return search.best()


class _Search:
    """Finished captions of every row."""

    def __init__(self, num_rows: int, num_beams: int, sep_id: int) -> None:
        self.num_beams, self.sep_id = num_beams, sep_id
        self.finished: list[list[tuple[float, float, list[int], FinishReason]]] = [
            [] for _ in range(num_rows)
        ]

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
                if token == self.sep_id:
                    if rank < self.num_beams:
                        finished.append((total / length, total, ids, "sep"))
                    continue
                if is_last:
                    finished.append((total / length, total, [*ids, token], "length"))
                kept_values[row, slot] = total
                kept_beams[row, slot] = beams[row, rank]
                kept_tokens[row, slot] = token
                slot += 1
        return kept_values, kept_beams, kept_tokens

    def is_done(self, sums: Tensor, length: int) -> bool:
        """Tell whether no living beam can overtake, every row having K finished captions."""
        best_living = (sums.amax(dim=-1) / length).tolist()
        return all(
            len(finished) >= self.num_beams and max(f[0] for f in finished) >= living
            for finished, living in zip(self.finished, best_living, strict=True)
        )

    def best(self) -> Sequences:
        """Return the best finished caption of every row."""
        chosen = [max(finished, key=lambda f: f[0]) for finished in self.finished]
        return Sequences(
            [ids for _, _, ids, _ in chosen],
            [total for _, total, _, _ in chosen],
            [reason for _, _, _, reason in chosen],
        )
