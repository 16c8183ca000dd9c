"""Hard negatives for image-text matching (BLIP, section 3.2; ALBEF, section 3.2).

Dimension key: B batch.
"""

import torch
from torch import Tensor

_SMALLEST_WEIGHT = 1e-4  # as in the reference: no admissible candidate is ever impossible


def admissible_negatives(image_ids: Tensor, text_ids: Tensor) -> Tensor:
    """Return (B, B) bool: row i may take column j as its negative.

    Pairs of the same image or of the same text are no negatives. `image_ids` and `text_ids` are (B,) int64.
    """
    same_image = image_ids[:, None] == image_ids[None, :]
    same_text = text_ids[:, None] == text_ids[None, :]
    return ~(same_image | same_text)


def sample_hard_negatives(sim: Tensor, admissible: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one negative column for every row, likelier the more similar.

    `sim` (B, B) are scaled similarities, `admissible` (B, B) bool. Returns columns (B,) int64 and `has_one`
    (B,) bool: a row without an admissible column (a batch of one, or of one text) draws itself and must be
    left out.
    """
    finite = (
        sim.float().nan_to_num()
    )  # a broken batch is for the caller to skip, not for multinomial
    weights = (finite.softmax(dim=1) + _SMALLEST_WEIGHT) * admissible
    has_one = admissible.any(dim=1)
    own = torch.eye(len(sim), dtype=weights.dtype, device=sim.device)
    weights = torch.where(has_one[:, None], weights, own)
    return torch.multinomial(weights, 1).squeeze(1), has_one
