"""Hard negatives for image-text matching (BLIP, section 3.2; ALBEF, section 3.2).

Dimension key: B batch of this rank, W ranks, G = W * B when negatives come from all ranks, else B.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blip_core.distributed import World

_SMALLEST_WEIGHT = 1e-4  # as in the reference: no admissible candidate is ever impossible


@dataclass(frozen=True, slots=True)
class Negatives:
    """For every image a text, and for every text an image, that do not match."""

    images: Tensor
    """(B,) int64: the image drawn for each text, of the G candidates."""
    has_image: Tensor
    """(B,) bool: False where a text has no admissible image, and its draw must be left out."""
    texts: Tensor
    """(B,) int64: the text drawn for each image."""
    has_text: Tensor
    """(B,) bool."""


def admissible_negatives(image_ids: Tensor, text_ids: Tensor) -> Tensor:
    """Return (B, B) bool: row i may take column j as its negative.

    Pairs of the same image or of the same text are no negatives. `image_ids` and `text_ids` are (B,) int64.
    """
    same_image = image_ids[:, None] == image_ids[None, :]
    same_text = text_ids[:, None] == text_ids[None, :]
    return ~(same_image | same_text)


def sample_hard_negatives(
    sim: Tensor, admissible: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one negative column for every row, likelier the more similar.

    `sim` (B, B) are scaled similarities, `admissible` (B, B) bool. Returns columns (B,) int64 and `has_one`
    (B,) bool: a row without an admissible column (a batch of one, or of one text) draws itself and must be
    left out. `generator` is torch's global one when not given.
    """
    finite = (
        sim.float().nan_to_num()
    )  # a broken batch is for the caller to skip, not for multinomial
    weights = (finite.softmax(dim=1) + _SMALLEST_WEIGHT) * admissible
    has_one = admissible.any(dim=1)
    own = torch.eye(len(sim), dtype=weights.dtype, device=sim.device)
    weights = torch.where(has_one[:, None], weights, own)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1), has_one


def draw_negatives(
    sim_i2t: Tensor,
    sim_t2i: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    hardness: float = 1.0,
    world: World,
    from_all_ranks: bool,
    generator: torch.Generator | None,
) -> Negatives:
    """Draw the negatives of this rank's rows; similarities are (B, W * B), ids (W * B,), in order of rank.

    `hardness` multiplies the similarities: with 0 every admissible column is as likely, 1 is the paper's.
    Draws from all ranks are made by every rank alike, over all rows, with a `generator` that is in the same
    state everywhere: they are those of one process with all the rows.
    """
    own = world.own_rows(len(sim_i2t))
    sim_i2t, sim_t2i = hardness * sim_i2t, hardness * sim_t2i
    if not from_all_ranks or world.size == 1:
        admissible = admissible_negatives(image_ids[own], text_ids[own])
        images, has_image = sample_hard_negatives(sim_t2i[:, own], admissible)
        texts, has_text = sample_hard_negatives(sim_i2t[:, own], admissible)
        return Negatives(images, has_image, texts, has_text)
    admissible = admissible_negatives(image_ids, text_ids)
    images, has_image = sample_hard_negatives(world.gather(sim_t2i), admissible, generator)
    texts, has_text = sample_hard_negatives(world.gather(sim_i2t), admissible, generator)
    return Negatives(images[own], has_image[own], texts[own], has_text[own])
