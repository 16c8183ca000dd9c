"""Choosing tokens inside the `generate` of transformers, so that a caption depends on its own seed alone.

transformers draws from the global generator, in the order of the batch. Here a logits processor that runs last makes
each choice itself, by the keys of `blip_core.generation`, and leaves one token possible.

Dimension key: N rows (images times captions), V vocabulary, T generated tokens.
"""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from blip_core.generation import CaptionConfig, uniforms
from blip_core.sampling import draw


class SeededDraw:
    """A logits processor: the likeliest token, or the one that a caption's own draw names."""

    def __init__(
        self, config: CaptionConfig, keys: np.ndarray | None, eos_ids: Collection[int]
    ) -> None:
        """`keys` (N,) uint64 seed the rows' draws; None is greedy. A row without numbers ends with `eos_ids`."""
        self.config, self.keys, self.eos_id = config, keys, min(eos_ids)
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(N, L) ids so far and (N, V) logits -> (N, V), 0 at the chosen token and -inf elsewhere."""
        logits = scores.double()
        is_sound = torch.isfinite(logits.amax(dim=-1))
        logits = torch.where(is_sound[:, None], logits, 0.0)
        if self.keys is None:
            token = logits.argmax(dim=-1)
        else:
            draws = torch.from_numpy(uniforms(self.keys, len(self._tokens))).to(scores.device)
            token = draw(logits, draws, self.config)
        token = torch.where(is_sound, token, self.eos_id)
        logprob = logits.log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)
        self._tokens.append(token)
        self._logprobs.append(torch.where(is_sound, logprob, torch.nan))
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

    def rows(self) -> tuple[list[list[int]], list[list[float]]]:
        """Chosen tokens and their log-probabilities, N lists of T; what follows a row's end is of no meaning."""
        tokens, logprobs = torch.stack(self._tokens, 1), torch.stack(self._logprobs, 1)
        return tokens.tolist(), logprobs.tolist()


class PromptLength:
    """A logits processor that changes nothing and notes how long the sequences were at the first step."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(N, L) ids so far and (N, V) logits -> the logits."""
        self.num_tokens = self.num_tokens or input_ids.shape[1]
        return scores
