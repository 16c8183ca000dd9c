"""Captions for images, a batch at a time (BLIP, section 3.3: the captioner of CapFilt).

Dimension key: B batch, S image side, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip_core.generation import CaptionConfig, FinishReason, Sequences
from blip_core.med import MED, require_room
from blip_core.packed import DType, for_inference
from blip_core.tokenizer import MEDTokenizer, require_vocabulary
from blip_core.transforms import EvalTransform


@dataclass(frozen=True, slots=True)
class GeneratedCaption:
    """One caption and how it came about."""

    text: str
    num_tokens: int
    """Generated tokens, prompt and [SEP] excluded."""
    mean_logprob: float
    """Per generated token, [SEP] included. See `Sequences.sum_logprobs` for what it is the probability of."""
    finish_reason: FinishReason
    """`sep`, or `length` when max_new_tokens cut it; `nan` when the model gave no number: there is no text."""


class MEDCaptioner:
    """Decodes captions with one model and one configuration."""

    def __init__(
        self,
        model: MED,
        tokenizer: MEDTokenizer,
        config: CaptionConfig,
        device: torch.device | str = "cpu",
        transform: EvalTransform | None = None,
        *,
        dtype: DType = "float32",
        compile: bool = False,
    ) -> None:
        """`transform` defaults to the paper's, at the model's image size.

        `model` is left as it is, and is copied (see `for_inference`): what trains it further is not seen here.
        """
        self.tokenizer, self.config = tokenizer, config
        self.transform = transform or EvalTransform(model.config.vision.image_size_px)
        self.prompt_ids = tokenizer.prompt_ids(config.prompt)
        model.require_head("lm", "a captioner")
        require_room(model.config, len(self.prompt_ids), config)
        require_vocabulary(model.config.text, tokenizer)
        # never generated: special tokens but [SEP], and ids that a larger model head has to spare
        special = [token for token in tokenizer.special_ids if token != tokenizer.sep_id]
        spare = range(tokenizer.vocab_size, model.config.text.vocab_size)
        # the released code forbids none, and leaves them out of the text
        self.forbidden_ids = [*([] if config.decoding == "official" else special), *spare]
        self.model = for_inference(model, device=device, dtype=dtype, compile=compile)

    @torch.inference_mode()
    def caption(
        self, pixel_values: Tensor, image_ids: Sequence[str]
    ) -> list[list[GeneratedCaption]]:
        """(B, 3, S, S) and B ids -> `num_captions` captions per image.

        Nucleus draws depend on (seed, image_id, index of the caption) alone.
        """
        if not len(pixel_values) and not image_ids:
            return []
        found = self.model.generate(
            pixel_values,
            self.prompt_ids,
            config=replace(self.config, prompt=""),
            sep_id=self.tokenizer.sep_id,
            forbidden_ids=self.forbidden_ids,
            image_ids=image_ids,
        )
        captions, step = self._captions(found), self.config.num_captions
        return [captions[start : start + step] for start in range(0, len(captions), step)]

    def _captions(self, found: Sequences) -> list[GeneratedCaption]:
        captions = []
        triples = zip(found.ids, found.sum_logprobs, found.finish_reasons, strict=True)
        for ids, total, reason in triples:
            length = max(1, len(ids) + (reason == "sep"))
            captions.append(
                GeneratedCaption(self.tokenizer.decode(ids), len(ids), total / length, reason)
            )
        return captions
