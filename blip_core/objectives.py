"""What one training step computes: ITC, ITM and LM on one batch (BLIP, section 3.2).

The image is encoded once and its cross-attention keys and values are projected once; matching (positives and
negatives in one pass) and language modelling both read them.

Dimension key: B batch, P image tokens, L text tokens, S image side, N = 3 B matching pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from blip_core.losses import itc_loss, itc_targets, itm_loss, lm_labels, lm_loss
from blip_core.med import MED, select_images
from blip_core.momentum import MomentumEncoders
from blip_core.negatives import admissible_negatives, sample_hard_negatives
from blip_core.text import KeyValue
from blip_core.tokenizer import MEDTokenizer, TokenBatch, clean_caption

Objective = Literal["itc", "itm", "lm"]
OBJECTIVES: tuple[Objective, ...] = ("itc", "itm", "lm")


@dataclass(frozen=True, slots=True)
class Batch:
    """Images with one text each, as a batch source gives them."""

    pixel_values: Tensor
    """(B, 3, S, S), normalised."""
    captions: list[str]
    """B texts, not yet cleaned."""
    image_ids: list[str]
    """B ids; equal ids are the same image."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A batch, tokenised."""

    pixel_values: Tensor
    """(B, 3, S, S)."""
    tokens: TokenBatch
    encoder_input_ids: Tensor
    """(B, L) with [ENC] first."""
    lm_tokens: TokenBatch
    """Prompt and text; ids have [DEC] first."""
    num_prompt_tokens: int
    """Leading tokens that are not supervised."""
    image_ids: Tensor
    """(B,) int64."""
    text_ids: Tensor
    """(B,) int64, equal for equal texts."""

    @classmethod
    def from_batch(
        cls, batch: Batch, tokenizer: MEDTokenizer, prompt: str, max_text_tokens: int
    ) -> "StepInputs":
        """Clean and tokenise a batch."""
        texts = [clean_caption(caption) for caption in batch.captions]
        tokens = tokenizer.encode(texts, max_text_tokens)
        num_prompt_tokens, lm_tokens = 0, tokens
        if prompt:
            num_prompt_tokens = len(tokenizer.prompt_ids(prompt))
            prompted = [f"{prompt.strip()} {text}" for text in texts]
            lm_tokens = tokenizer.encode(prompted, max_text_tokens + num_prompt_tokens - 1)
        return cls(
            pixel_values=batch.pixel_values,
            tokens=tokens,
            encoder_input_ids=tokenizer.encoder_ids(tokens.input_ids),
            lm_tokens=replace(lm_tokens, input_ids=tokenizer.decoder_ids(lm_tokens.input_ids)),
            num_prompt_tokens=num_prompt_tokens,
            image_ids=hash_ids(batch.image_ids),
            text_ids=hash_ids(texts),
        )

    def to(self, device: torch.device) -> "StepInputs":
        """Return the inputs on `device`."""
        return StepInputs(
            pixel_values=self.pixel_values.to(device),
            tokens=self.tokens.to(device),
            encoder_input_ids=self.encoder_input_ids.to(device),
            lm_tokens=self.lm_tokens.to(device),
            num_prompt_tokens=self.num_prompt_tokens,
            image_ids=self.image_ids.to(device),
            text_ids=self.text_ids.to(device),
        )


@dataclass(slots=True)
class Losses:
    """The losses of one step, each (); None for an objective that is not trained."""

    total: Tensor
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_lm: Tensor | None = None
    itm_accuracy: Tensor | None = None
    enqueue: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    """Momentum image and text features (B, E) and ids (B,), for the queue once the step is accepted."""

    def numbers(self) -> dict[str, float]:
        """Return the values that there are, by name."""
        values = {
            "loss": self.total,
            "loss_itc": self.loss_itc,
            "loss_itm": self.loss_itm,
            "loss_lm": self.loss_lm,
            "itm_accuracy": self.itm_accuracy,
        }
        return {name: float(value.detach()) for name, value in values.items() if value is not None}


def compute_losses(
    model: MED,
    momentum: MomentumEncoders | None,
    inputs: StepInputs,
    *,
    objectives: Sequence[Objective],
    distill_alpha: float,
    label_smoothing: float,
    vision_frozen: bool = False,
) -> Losses:
    """Return the losses of `objectives` on one batch; "itc" needs `momentum`."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not vision_frozen):
        image_embeds = model.encode_image(inputs.pixel_values)
    losses = Losses(total=torch.zeros((), device=image_embeds.device))
    if "itc" in objectives or "itm" in objectives:
        sim_i2t, sim_t2i = _contrast(
            model, momentum, inputs, image_embeds, losses, distill_alpha, vision_frozen
        )
    if "itm" in objectives or "lm" in objectives:
        image_kv = model.project_image(image_embeds)
    if "itm" in objectives:
        _match(model, inputs, image_kv, sim_i2t, sim_t2i, losses)
    if "lm" in objectives:
        tokens = inputs.lm_tokens
        logits = model.lm_logits_from_kv(image_kv, tokens.input_ids, tokens.attention_mask)
        labels = lm_labels(tokens.input_ids, tokens.attention_mask, inputs.num_prompt_tokens)
        losses.loss_lm = lm_loss(logits.float(), labels, label_smoothing=label_smoothing)
    for loss in (losses.loss_itc, losses.loss_itm, losses.loss_lm):
        losses.total = losses.total if loss is None else losses.total + loss
    return losses


def _contrast(
    model: MED,
    momentum: MomentumEncoders | None,
    inputs: StepInputs,
    image_embeds: Tensor,
    losses: Losses,
    distill_alpha: float,
    vision_frozen: bool,
) -> tuple[Tensor, Tensor]:
    """Fill in `loss_itc`; returns similarities (B, B) of the batch, image-to-text and text-to-image."""
    tokens = inputs.tokens
    if momentum is None:  # matching alone: similarities only choose the negatives
        with torch.no_grad():
            image_features = model.image_features(image_embeds)
            text_features = model.text_features(tokens.input_ids, tokens.attention_mask)
            sim = (model.scale * image_features @ text_features.T).float()
        return sim, sim.T
    image_features = model.image_features(image_embeds).float()
    text_features = model.text_features(tokens.input_ids, tokens.attention_mask).float()
    image_momentum, text_momentum = momentum.features(
        inputs.pixel_values,
        tokens.input_ids,
        tokens.attention_mask,
        image_embeds if vision_frozen else None,
    )
    queue = momentum.queue
    text_candidates = queue.candidates(text_momentum.float(), "text")  # (E, B + Q)
    image_candidates = queue.candidates(image_momentum.float(), "image")
    scale = model.scale
    sim_i2t, sim_t2i = (
        scale * image_features @ text_candidates,
        scale * text_features @ image_candidates,
    )
    with torch.no_grad():
        is_positive = queue.is_positive(inputs.image_ids, inputs.text_ids)
        targets_i2t = itc_targets(
            scale * image_momentum.float() @ text_candidates, is_positive, distill_alpha
        )
        targets_t2i = itc_targets(
            scale * text_momentum.float() @ image_candidates, is_positive, distill_alpha
        )
    losses.loss_itc = (itc_loss(sim_i2t, targets_i2t) + itc_loss(sim_t2i, targets_t2i)) / 2
    losses.enqueue = (image_momentum, text_momentum, inputs.image_ids, inputs.text_ids)
    batch_size = len(inputs.image_ids)
    return sim_i2t[:, :batch_size].detach(), sim_t2i[:, :batch_size].detach()


def _match(
    model: MED,
    inputs: StepInputs,
    image_kv: list[KeyValue],
    sim_i2t: Tensor,
    sim_t2i: Tensor,
    losses: Losses,
) -> None:
    """Fill in `loss_itm`: every true pair, every text with a hard image, every image with a hard text."""
    admissible = admissible_negatives(inputs.image_ids, inputs.text_ids)
    negative_images, has_image = sample_hard_negatives(sim_t2i, admissible)
    negative_texts, has_text = sample_hard_negatives(sim_i2t, admissible)
    own = torch.arange(len(admissible), device=admissible.device)
    image_rows = torch.cat([own, negative_images[has_image], own[has_text]])
    text_rows = torch.cat([own, own[has_image], negative_texts[has_text]])
    labels = (torch.arange(len(image_rows), device=own.device) < len(own)).long()
    logits = model.itm_logits_from_kv(
        select_images(image_kv, image_rows),
        inputs.encoder_input_ids[text_rows],
        inputs.tokens.attention_mask[text_rows],
    ).float()
    losses.loss_itm = itm_loss(logits, labels)
    losses.itm_accuracy = (logits.argmax(dim=1) == labels).float().mean()


def hash_ids(names: Sequence[str]) -> Tensor:
    """Return (B,) int64: equal names get equal numbers, in every process."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])
