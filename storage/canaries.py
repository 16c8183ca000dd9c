"""Canaries: human images that nothing is trained on, kept to audit filters with.

An image is drawn once, in the round in which it comes in, and stays what it was drawn as: one that a model has
seen can never become a canary.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import pyarrow as pa

from storage import layout
from storage.catalog import connect
from storage.errors import ConfigError
from storage.fingerprint import basis_of, fingerprint
from storage.lake import Lake
from storage.tables import OnStale, PartRef, commit_part, committed_part, list_parts, read_part

STAGE_VERSION = 1
PART = "draw"

_NEW_HUMAN = """
SELECT DISTINCT p.image_id
FROM pairs p
WHERE p.pool = 'human' AND p.status = 'ok'
  AND NOT EXISTS (
      SELECT 1 FROM pairs o WHERE o.image_id = p.image_id
      AND (o.pool = 'heldout' OR (o.pool = 'web' AND o.shard < $web_shards)))
ORDER BY p.image_id
"""
"""Not images that the web showed in an earlier round: models were trained on them then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryDraw:
    """How images are set aside."""

    share: float
    """Of the human images that come in; 0 sets none aside."""
    max_images: int
    """Most canaries of a lake."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"canary share must be in [0, 1), got {self.share}")
        if self.max_images < 0:
            raise ConfigError(f"max_images must be 0 or more, got {self.max_images}")


def draw_canaries(
    lake: Lake, round: int, draw: CanaryDraw, *, on_stale: OnStale = "error"
) -> PartRef | None:
    """Set aside a share of the human images that are new in this round; None when there is none to draw from.

    Images are drawn by a hash of seed and image_id: others that come or go change nothing. Images that an earlier
    model may have been trained on are recorded as no canaries.
    """
    earlier = _drawn_before(lake, round)
    with connect(lake) as con:
        found = con.execute(_NEW_HUMAN, {"web_shards": layout.web_shards(round)}).fetchall()
    new = [row[0] for row in found if row[0] not in earlier]
    if not new:
        return None
    basis = basis_of(
        "canary-draw",
        STAGE_VERSION,
        {"share": draw.share, "max_images": draw.max_images, "seed": draw.seed},
        [human_images_input(new)],
    )
    known = committed_part(lake, "canary_draws", PART, round=round, basis=basis, on_stale=on_stale)
    if known is not None:
        return known
    # A lake that has models and never drew: they may have been trained on any of these images.
    seen = not list_parts(lake, "canary_draws") and bool(list_parts(lake, "models"))
    room = draw.max_images - sum(earlier.values())
    chosen = set() if seen else set(_drawn(new, draw, max(0, room)))
    rows = pa.table(
        {
            "image_id": pa.array(new, pa.string()),
            "is_canary": pa.array([image_id in chosen for image_id in new], pa.bool_()),
            "round": pa.array([round] * len(new), pa.int32()),
        }
    )
    return commit_part(lake, "canary_draws", PART, rows, round=round, basis=basis)


def human_images_input(image_ids: list[str]) -> str:
    """What a draw from some images is made of."""
    return fingerprint("human-images", 1, {"image_ids": image_ids}, [])


def images_needed(half_width: float, share: float = 0.5) -> int:
    """Canary images for a 95 % interval of +- `half_width` around a share."""
    return math.ceil(share * (1 - share) * (1.96 / half_width) ** 2)


def _drawn(image_ids: list[str], draw: CanaryDraw, room: int) -> list[str]:
    hashes = {image_id: _place(draw.seed, image_id) for image_id in image_ids}
    below = [image_id for image_id in image_ids if hashes[image_id] < draw.share]
    return sorted(below, key=lambda image_id: hashes[image_id])[:room]


def _place(seed: int, image_id: str) -> float:
    """A number in [0, 1) of an image."""
    digest = hashlib.sha256(f"canary {seed} {image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _drawn_before(lake: Lake, round: int) -> dict[str, bool]:
    """image_id -> whether it is a canary, of the draws of earlier rounds."""
    drawn: dict[str, bool] = {}
    for ref in list_parts(lake, "canary_draws"):
        if (ref.round or 0) < round:
            table = read_part(lake, ref, ["image_id", "is_canary"])
            columns = (table.column(name).to_pylist() for name in ("image_id", "is_canary"))
            drawn.update(zip(*columns, strict=True))
    return drawn
