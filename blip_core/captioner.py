"""Captions for images, a batch at a time (BLIP, section 3.3: the captioner of CapFilt).

Dimension key: B batch, S image side, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip_core.beam import beam_search
from blip_core.config import require
from blip_core.generation import CaptionConfig, FinishReason, Sequences, decode_rows, draw_key
from blip_core.med import MED, select_images
from blip_core.text import KVCache
from blip_core.tokenizer import MEDTokenizer


@dataclass(frozen=True, slots=True)
class GeneratedCaption:
    """One caption and how it came about."""

    text: str
    num_tokens: int
    """Generated tokens, prompt and [SEP] excluded."""
    mean_logprob: float
    """Per generated token, [SEP] included."""
    finish_reason: FinishReason
    """`sep`, or `length` when max_new_tokens cut it."""


class Captioner:
    """Decodes captions with one model and one configuration."""

    def __init__(
        self,
        model: MED,
        tokenizer: MEDTokenizer,
        config: CaptionConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.tokenizer, self.config = model.to(device).eval(), tokenizer, config
        self.device = torch.device(device)
        self.prompt_ids = tokenizer.prompt_ids(config.prompt)
        longest = len(self.prompt_ids) + config.max_new_tokens
        limit = model.config.text.max_positions
        require(
            longest <= limit,
            f"prompt and max_new_tokens make {longest} tokens, but text.max_positions is {limit}",
        )
        # never generated: special tokens but [SEP], and ids that a larger model head has to spare
        special = [token for token in tokenizer.special_ids if token != tokenizer.sep_id]
        spare = range(tokenizer.vocab_size, model.config.text.vocab_size)
        self.forbidden_ids = [*special, *spare]

    @torch.inference_mode()
    def caption(
        self, pixel_values: Tensor, image_ids: Sequence[str]
    ) -> list[list[GeneratedCaption]]:
        """(B, 3, S, S) and B ids -> `num_captions` captions per image.

        Nucleus draws depend on (seed, image_id, index of the caption) alone.
        """
        config = self.config
        image_embeds = self.model.encode_image(pixel_values.to(self.device))
        image_kv = self.model.project_image(image_embeds)
        num_images = len(image_ids)
        per_image = config.num_beams if config.decoding == "beam" else config.num_captions
        rows = torch.arange(num_images, device=self.device).repeat_interleave(per_image)
        if per_image > 1:
            image_kv = select_images(image_kv, rows)

        def next_logits(ids: Tensor, cache: KVCache) -> Tensor:
            return self.model.lm_logits_from_kv(image_kv, ids, None, cache)[:, -1]

        if config.decoding == "beam":
            found = beam_search(
                next_logits,
                self.prompt_ids,
                num_images,
                config,
                sep_id=self.tokenizer.sep_id,
                forbidden_ids=self.forbidden_ids,
                device=self.device,
            )
            return [[caption] for caption in self._captions(found)]
        keys = [
            draw_key(config.seed, image_id, index)
            for image_id in image_ids
            for index in range(config.num_captions)
        ]
        found = decode_rows(
            next_logits,
            self.prompt_ids,
            len(keys),
            config,
            sep_id=self.tokenizer.sep_id,
            forbidden_ids=self.forbidden_ids,
            keys=np.array(keys, dtype=np.uint64),
            device=self.device,
        )
        captions, step = self._captions(found), config.num_captions
        return [captions[start : start + step] for start in range(0, len(captions), step)]

    def _captions(self, found: Sequences) -> list[GeneratedCaption]:
        captions = []
        triples = zip(found.ids, found.sum_logprobs, found.finish_reasons, strict=True)
        for ids, total, reason in triples:
            length = len(ids) + (reason == "sep")
            captions.append(
                GeneratedCaption(self.tokenizer.decode(ids), len(ids), total / length, reason)
            )
        return captions
