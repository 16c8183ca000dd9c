"""What one training step computes: ITC, ITM and LM on one batch (BLIP, section 3.2).

The image is encoded once and its cross-attention keys and values are projected once; matching (positives and
negatives in one pass) and language modelling both read them.

Dimension key: B batch, P image tokens, L text tokens, S image side.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.config import require
from blip_core.distributed import World
from blip_core.losses import IGNORED, itc_loss, itc_targets, itm_loss, lm_labels, token_loss
from blip_core.med import MED, select_images
from blip_core.momentum import MomentumEncoders
from blip_core.negatives import Negatives, draw_negatives
from blip_core.text import KeyValue
from blip_core.tokenizer import MEDTokenizer, TokenBatch, clean_caption
from blip_core.watch import mean_cosine

Objective = Literal["itc", "itm", "lm"]
OBJECTIVES: tuple[Objective, ...] = ("itc", "itm", "lm")
_NUMBERS = (
    "loss_itc",
    "loss_itm",
    "loss_lm",
    "itm_accuracy",
    "itm_accuracy_positive",
    "itm_accuracy_negative",
    "image_cosine",
    "text_cosine",
    "queue_alignment",
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Images with one text each, as a batch source gives them."""

    captions: list[str]
    """B texts, not yet cleaned."""
    image_ids: list[str]
    """B ids; equal ids are the same image."""
    pixel_values: Tensor | None = None
    """(B, 3, S, S), normalised."""
    image_embeds: Tensor | None = None
    """(B, P, D) of a vision encoder that is not trained, in place of pixels."""

    def __post_init__(self) -> None:
        require(
            (self.pixel_values is None) != (self.image_embeds is None),
            "a batch holds either pixel_values or image_embeds",
        )


@dataclass(frozen=True, slots=True)
class Ranks:
    """How several ranks share one step."""

    world: World = field(default_factory=World)
    negatives_from_all: bool = False
    """Whether hard negatives come from all ranks."""
    generator: torch.Generator | None = None
    """In the same state on every rank, for draws that all make alike."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A batch, tokenised."""

    pixel_values: Tensor | None
    """(B, 3, S, S); None where `image_embeds` are given."""
    image_embeds: Tensor | None
    """(B, P, D) of a frozen vision encoder; None where pixels are given."""
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
            image_embeds=batch.image_embeds,
            tokens=tokens,
            encoder_input_ids=tokenizer.encoder_ids(tokens.input_ids),
            lm_tokens=replace(lm_tokens, input_ids=tokenizer.decoder_ids(lm_tokens.input_ids)),
            num_prompt_tokens=num_prompt_tokens,
            image_ids=hash_ids(batch.image_ids),
            text_ids=hash_ids(texts),
        )

    def to(self, device: torch.device) -> "StepInputs":
        """Return the inputs on `device`."""
        pixels, embeds = self.pixel_values, self.image_embeds
        return StepInputs(
            pixel_values=None if pixels is None else pixels.to(device),
            image_embeds=None if embeds is None else embeds.to(device),
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
    itm_accuracy_positive: Tensor | None = None
    itm_accuracy_negative: Tensor | None = None
    image_cosine: Tensor | None = None
    text_cosine: Tensor | None = None
    queue_alignment: Tensor | None = None
    enqueue: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    """Momentum image and text features (B, E) and ids (B,), for the queue once the step is accepted."""

    def numbers(self) -> dict[str, float]:
        """Return the values that there are, by name."""
        values = {"loss": self.total} | {name: getattr(self, name) for name in _NUMBERS}
        known = {name: value.detach() for name, value in values.items() if value is not None}
        together = torch.stack(list(known.values())).tolist()  # one transfer from the device
        return dict(zip(known, together, strict=True))


def compute_losses(
    model: MED,
    momentum: MomentumEncoders | None,
    inputs: StepInputs,
    *,
    objectives: Sequence[Objective],
    distill_alpha: float,
    label_smoothing: float,
    vision_frozen: bool = False,
    negative_hardness: float = 1.0,
    lm_weight: float = 1.0,
    ranks: Ranks | None = None,
) -> Losses:
    """Return the losses of `objectives` on one batch; "itc" needs `momentum`.

    `negative_hardness` multiplies the similarities by which negatives are drawn: 0 draws evenly, 1 as the paper.
    `lm_weight` multiplies loss_lm, for a batch that is part of a larger one. With several `ranks` every rank
    brings as many rows; averaged over them, losses and gradients are those of one batch of all rows, but for
    ITM with negatives of the own rank.
    """
    ranks = ranks or Ranks()
    image_embeds = _encode(model, inputs, vision_frozen)
    losses = Losses(total=torch.zeros((), device=image_embeds.device))
    if "itc" in objectives or "itm" in objectives:
        sim_i2t, sim_t2i = _contrast(
            model, momentum, inputs, image_embeds, losses, distill_alpha, vision_frozen, ranks.world
        )
    if "itm" in objectives or "lm" in objectives:
        image_kv = model.project_image(image_embeds)
    if "itm" in objectives:
        negatives = draw_negatives(
            sim_i2t,
            sim_t2i,
            ranks.world.gather(inputs.image_ids),
            ranks.world.gather(inputs.text_ids),
            hardness=negative_hardness,
            world=ranks.world,
            from_all_ranks=ranks.negatives_from_all,
            generator=ranks.generator,
        )
        pairs = _pairs(model, inputs, image_embeds, image_kv, negatives, ranks)
        _match(model, image_kv, pairs, losses)
    if "lm" in objectives:
        losses.loss_lm = lm_weight * _language(model, inputs, image_kv, label_smoothing)
    for loss in (losses.loss_itc, losses.loss_itm, losses.loss_lm):
        losses.total = losses.total if loss is None else losses.total + loss
    return losses


def _encode(model: MED, inputs: StepInputs, vision_frozen: bool) -> Tensor:
    """Return image_embeds (B, P, D): the batch's own, or the vision encoder's."""
    if inputs.image_embeds is not None:
        require(vision_frozen, "a batch of image_embeds needs a vision encoder that is not trained")
        return inputs.image_embeds
    assert inputs.pixel_values is not None
    with torch.set_grad_enabled(torch.is_grad_enabled() and not vision_frozen):
        return model.encode_image(inputs.pixel_values)


def _contrast(
    model: MED,
    momentum: MomentumEncoders | None,
    inputs: StepInputs,
    image_embeds: Tensor,
    losses: Losses,
    distill_alpha: float,
    vision_frozen: bool,
    world: World,
) -> tuple[Tensor, Tensor]:
    """Fill in `loss_itc`; returns similarities (B, W * B) of the batch, image-to-text and text-to-image."""
    tokens = inputs.tokens
    if momentum is None:  # matching alone: similarities only choose the negatives
        with torch.no_grad():
            image_features = model.image_features(image_embeds)
            text_features = model.text_features(tokens.input_ids, tokens.attention_mask)
            sim_i2t = (model.scale * image_features @ world.gather(text_features).T).float()
            if world.size == 1:
                return sim_i2t, sim_i2t.T
            return sim_i2t, (model.scale * text_features @ world.gather(image_features).T).float()
    image_features = model.image_features(image_embeds)
    text_features = model.text_features(tokens.input_ids, tokens.attention_mask)
    image_momentum, text_momentum = momentum.features(
        inputs.pixel_values,
        tokens.input_ids,
        tokens.attention_mask,
        image_embeds if vision_frozen else None,
    )
    queue, scale = momentum.queue, model.scale
    all_images, all_texts = world.gather(image_momentum), world.gather(text_momentum)
    image_ids, text_ids = world.gather(inputs.image_ids), world.gather(inputs.text_ids)
    sim_i2t = scale * queue.similarities(image_features, all_texts, "text")
    sim_t2i = scale * queue.similarities(text_features, all_images, "image")
    with torch.no_grad():
        is_positive = queue.is_positive(image_ids, text_ids)[world.own_rows(len(image_features))]
        momentum_i2t = scale * queue.similarities(image_momentum, all_texts, "text")
        momentum_t2i = scale * queue.similarities(text_momentum, all_images, "image")
        targets_i2t = itc_targets(momentum_i2t, is_positive, distill_alpha)
        targets_t2i = itc_targets(momentum_t2i, is_positive, distill_alpha)
    losses.loss_itc = (itc_loss(sim_i2t, targets_i2t) + itc_loss(sim_t2i, targets_t2i)) / 2
    losses.enqueue = (all_images, all_texts, image_ids, text_ids)
    with torch.no_grad():
        own = (image_features.float(), text_features.float())
        aligned = own[0] * image_momentum + own[1] * text_momentum
        losses.queue_alignment = aligned.sum(dim=1).mean() / 2
        losses.image_cosine = mean_cosine(own[0])
        losses.text_cosine = mean_cosine(own[1])
    num_rows = len(image_ids)
    return sim_i2t[:, :num_rows].detach(), sim_t2i[:, :num_rows].detach()


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What the matching head judges: each image with its own text and a hard one, then each text's hard image."""

    extra_kv: list[KeyValue]
    """Keys and values of the hard images, B rows."""
    encoder_input_ids: Tensor
    """(3 B, L): own, hard, own, hard, ...; then the own texts again."""
    attention_mask: Tensor
    """(3 B, L)."""
    labels: Tensor
    """(3 B,): 1 = match; IGNORED where an image has no hard text, or a text no hard image."""


def _pairs(
    model: MED,
    inputs: StepInputs,
    image_embeds: Tensor,
    image_kv: list[KeyValue],
    negatives: Negatives,
    ranks: Ranks,
) -> _Pairs:
    """Put every text with its image, every image with a hard text and every text with a hard image together."""
    ids, mask = inputs.encoder_input_ids, inputs.tokens.attention_mask
    if ranks.world.size == 1 or not ranks.negatives_from_all:
        extra_kv = select_images(image_kv, negatives.images)
        all_ids, all_masks = ids, mask
    else:  # keys and values of the drawn images alone, from embeddings of all ranks
        everywhere = ranks.world.gather_with_grad(image_embeds)
        extra_kv = model.project_image(everywhere[negatives.images])
        all_ids = ranks.world.gather_padded(ids, 0)
        all_masks = ranks.world.gather_padded(mask, 0)
        ids, mask = (F.pad(each, (0, all_ids.shape[1] - each.shape[1])) for each in (ids, mask))
    hard_ids, hard_masks = all_ids[negatives.texts], all_masks[negatives.texts]
    match = torch.ones_like(negatives.texts)
    no_match = torch.where(negatives.has_text, 0, IGNORED)
    return _Pairs(
        extra_kv=extra_kv,
        encoder_input_ids=torch.cat([torch.stack([ids, hard_ids], dim=1).flatten(0, 1), ids]),
        attention_mask=torch.cat([torch.stack([mask, hard_masks], dim=1).flatten(0, 1), mask]),
        labels=torch.cat(
            [
                torch.stack([match, no_match], dim=1).flatten(),
                torch.where(negatives.has_image, 0, IGNORED),
            ]
        ),
    )


def _match(model: MED, image_kv: list[KeyValue], pairs: _Pairs, losses: Losses) -> None:
    """Fill in `loss_itm` and how often the head is right."""
    logits = model.itm_logits_from_kv(
        image_kv, pairs.encoder_input_ids, pairs.attention_mask, extra_kv=pairs.extra_kv
    ).float()
    labels = pairs.labels
    losses.loss_itm = itm_loss(logits, labels)
    is_right = (logits.argmax(dim=1) == labels).float()
    is_positive, is_negative = (labels == 1).float(), (labels == 0).float()
    num_positive, num_negative = is_positive.sum(), is_negative.sum()
    losses.itm_accuracy = is_right.sum() / (num_positive + num_negative)
    losses.itm_accuracy_positive = (is_right * is_positive).sum() / num_positive
    negative_right = (is_right * is_negative).sum()
    losses.itm_accuracy_negative = negative_right / num_negative.clamp(min=1)  # 0 right of 0 is 0


def _language(
    model: MED, inputs: StepInputs, image_kv: list[KeyValue], label_smoothing: float
) -> Tensor:
    """Return `loss_lm` (). Only supervised positions pass the head: the vocabulary is its whole cost."""
    tokens = inputs.lm_tokens
    labels = lm_labels(tokens.input_ids, tokens.attention_mask, inputs.num_prompt_tokens)[:, 1:]
    seen, mask = (
        tokens.input_ids[:, :-1],
        tokens.attention_mask[:, :-1],
    )  # the last predicts nothing
    hidden = model.text(seen, mask, mode="causal", image_kv=image_kv)
    is_supervised = labels != IGNORED
    logits = model.lm_head(hidden[is_supervised], model.text.word_embeddings.weight)
    return token_loss(logits.float(), labels[is_supervised], label_smoothing=label_smoothing)


def hash_ids(names: Sequence[str]) -> Tensor:
    """Return (B,) int64: equal names get equal numbers, in every process."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])
