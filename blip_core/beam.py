"""Beam search (BLIP, section 3.3: captions for evaluation, three beams), and the choice of a decoding.

Candidates, scores and the moment to stop are those of transformers' beam search with its defaults.

Dimension key: B images still searched, K beams, N = B * K rows, L text tokens, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blip_core.decoding import RowDecoder, decode_rows
from blip_core.generation import CaptionConfig, FinishReason, Sequences, Vocabulary
from blip_core.sampling import constrain


def decode(
    decoder: RowDecoder,
    prompt_ids: Sequence[int],
    image_ids: Sequence[str],
    config: CaptionConfig,
    vocabulary: Vocabulary,
    device: torch.device,
) -> Sequences:
    """Decode as `config` says: `num_captions` rows per image, an image's together.

    `decoder` begins with one row for each image.
    """
    if config.decoding == "beam":
        return beam_search(decoder, prompt_ids, len(image_ids), config, vocabulary, device)
    return decode_rows(decoder, prompt_ids, image_ids, config, vocabulary, device)


def beam_search(
    decoder: RowDecoder,
    prompt_ids: Sequence[int],
    num_images: int,
    config: CaptionConfig,
    vocabulary: Vocabulary,
    device: torch.device,
) -> Sequences:
    """Return the best caption of every image by log-probability over length ** length_penalty, [SEP] counted.

    The prompt is read once an image. An image is done, and leaves the batch, when it has K finished captions and
    no living beam is better than the worst of them, or at max_new_tokens.
    """
    num_beams = config.num_beams
    search = _Search(num_images, config, vocabulary.sep_id)
    prompt = torch.tensor([list(prompt_ids)], device=device)
    logits = decoder.step(prompt.expand(num_images, -1))
    rows = torch.arange(num_images, device=device).repeat_interleave(num_beams)
    decoder.select(rows)
    logits = logits[rows]
    generated = torch.empty((len(rows), 0), dtype=torch.int64, device=device)
    sums = torch.full((num_images, num_beams), float("-inf"), dtype=torch.float64, device=device)
    sums[:, 0] = 0.0  # all beams start equal: only one may speak first
    for position in range(config.max_new_tokens):
        blocked = vocabulary.blocked(position, config)
        values, beams, tokens = _candidates(logits, generated, sums, config, blocked)
        chosen = search.advance(generated.tolist(), values, beams, tokens)
        if not chosen.images:
            break
        ids = torch.tensor(chosen.tokens, device=device)
        rows = torch.tensor(chosen.rows, device=device)
        sums = torch.tensor(chosen.sums, dtype=torch.float64, device=device)
        decoder.select(rows)
        generated = torch.cat([generated[rows], ids[:, None]], dim=1)
        logits = decoder.step(ids[:, None])
    return search.best()


def _candidates(
    logits: Tensor, generated: Tensor, sums: Tensor, config: CaptionConfig, blocked: list[int]
) -> tuple[list[list[float]], list[list[int]], list[list[int]]]:
    """Return the 2 K best continuations of each image: sums of log-probabilities, beams and tokens (B, 2 K).

    Constrained after the softmax: what is forbidden does not make the rest likelier. A continuation among the best
    of an image is among the best of its beam, so no more than those are compared.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    logprobs = constrain(logprobs, generated, config, blocked_ids=blocked)
    num_images, num_beams = sums.shape
    width = min(2 * num_beams, logprobs.shape[1])
    best, tokens = logprobs.topk(width, dim=-1)  # (N, 2 K)
    totals = sums.view(-1, 1) + best.double()
    # no number at all is no candidate: an image without candidates ends
    totals = torch.where(totals.isnan(), float("-inf"), totals).view(num_images, -1)
    values, places = totals.topk(min(2 * num_beams, totals.shape[1]), dim=-1)
    chosen = tokens.view(num_images, -1).gather(1, places)
    return values.tolist(), (places // width).tolist(), chosen.tolist()


class _Chosen:
    """The beams that live on: K for each image that is not done."""

    def __init__(self) -> None:
        self.images: list[int] = []
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.sums: list[list[float]] = []


class _Search:
    """The K best finished captions of every image."""

    def __init__(self, num_images: int, config: CaptionConfig, sep_id: int) -> None:
        self.config, self.sep_id = config, sep_id
        self.finished: list[list[tuple[float, float, list[int], FinishReason]]] = [
            [] for _ in range(num_images)
        ]
        self.open = list(range(num_images))
        """Images that are still searched, in the order of the rows."""

    def advance(
        self,
        history: list[list[int]],
        values: list[list[float]],
        beams: list[list[int]],
        tokens: list[list[int]],
    ) -> _Chosen:
        """Take finished candidates out, close the images that are done; returns the beams that live on."""
        num_beams, length = self.config.num_beams, len(history[0]) + 1
        is_last, chosen = length == self.config.max_new_tokens, _Chosen()
        for place, image in enumerate(self.open):
            living: list[tuple[float, int, int]] = []
            candidates = zip(values[place], beams[place], tokens[place], strict=True)
            for rank, (total, beam, token) in enumerate(candidates):
                if total == float("-inf") or len(living) == num_beams:
                    break
                row = place * num_beams + beam
                ends = token == self.sep_id
                if rank < num_beams and (ends or is_last):
                    self._finish(image, total, length, history[row], None if ends else token)
                if not ends:
                    living.append((total, row, token))
            if not living or is_last or self._is_done(image, living[0][0], length):
                continue
            living += [(float("-inf"), living[0][1], self.sep_id)] * (num_beams - len(living))
            chosen.images.append(image)
            chosen.sums.append([total for total, _, _ in living])
            chosen.rows += [row for _, row, _ in living]
            chosen.tokens += [token for _, _, token in living]
        self.open = chosen.images
        return chosen

    def _finish(
        self, image: int, total: float, length: int, ids: list[int], token: int | None
    ) -> None:
        """Note a caption, of K at most the worst of which goes; `token` is its last where it did not end."""
        score = total / length**self.config.length_penalty
        finished = self.finished[image]
        if token is None:
            finished.append((score, total, ids, "sep"))
        else:
            finished.append((score, total, [*ids, token], "length"))
        finished.sort(key=lambda found: found[0], reverse=True)
        del finished[self.config.num_beams :]

    def _is_done(self, image: int, best_living: float, length: int) -> bool:
        finished = self.finished[image]
        is_full = len(finished) == self.config.num_beams
        return is_full and finished[-1][0] >= best_living / length**self.config.length_penalty

    def best(self) -> Sequences:
        """Return the best finished caption of every image."""
        nothing: tuple[float, float, list[int], FinishReason] = (0.0, math.nan, [], "nan")
        chosen = [max(found, key=lambda f: f[0]) if found else nothing for found in self.finished]
        return Sequences(
            [ids for _, _, ids, _ in chosen],
            [total for _, total, _, _ in chosen],
            [reason for _, _, _, reason in chosen],
        )
