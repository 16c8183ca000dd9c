"""The held-out pairs, and where each model found what belongs together: the ranks that the gate compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np

from blip_core import RetrievalRanks
from flows.errors import MissingInput
from flows.session import Run
from flows.steps.batches import rows_table
from flows.stream import ImageRow
from storage import ModelRef, PartRef, caption_id, commit_part, committed_part, connect
from storage.fingerprint import Basis

DATASET = "heldout"

HELDOUT_SQL = """
    SELECT p.image_id, any_value(p.shard), any_value(p."offset"), any_value(p.size),
           list(DISTINCT c.caption ORDER BY c.caption)
    FROM pairs p JOIN captions c USING (image_id)
    WHERE p.pool = 'heldout' AND p.status = 'ok' AND c.source = 'human' AND c.status = 'ok'
    GROUP BY p.image_id ORDER BY p.image_id
"""

# In the order of evaluation: images, and texts by image, in order of image_id.
RANKS_SQL = """
    SELECT direction, image_id, caption_id, rank FROM ranks
    WHERE round = ? AND model_id = ? AND dataset = ? ORDER BY image_id, caption_id
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The held-out images with their human captions, in order of image_id."""

    images: tuple[ImageRow, ...]
    captions: tuple[tuple[str, ...], ...]


def held_out(run: Run) -> HeldOut:
    """The held-out pairs of the lake. Raises MissingInput when there are none."""
    with connect(run.lake) as connection:
        found = held_out_of(connection, run.settings.evaluate.max_images)
    if not found.images:
        raise MissingInput(
            f"lake {run.lake.uri} has no held-out pairs to evaluate on; give `ingest.heldout` a "
            "captions file with its images and run `bootstrap ingest`"
        )
    return found


def held_out_of(connection: duckdb.DuckDBPyConnection, max_images: int | None) -> HeldOut:
    """The held-out pairs that a connection sees, those of the first images."""
    rows = connection.execute(HELDOUT_SQL).fetchall()[:max_images]
    images = tuple(
        ImageRow(image_id=image_id, shard=shard, offset=offset, size=size)
        for image_id, shard, offset, size, _ in rows
    )
    return HeldOut(images=images, captions=tuple(tuple(row[4]) for row in rows))


def committed_ranks(run: Run, ref: ModelRef, basis: Basis) -> PartRef | None:
    """The part of `ranks` that goes with a model's figures in this round, None when there is none."""
    return committed_part(
        run.lake, "ranks", _part_name(ref), round=run.round, basis=basis, on_stale=run.on_stale
    )


def commit_ranks(
    run: Run, ref: ModelRef, heldout: HeldOut, ranks: RetrievalRanks, basis: Basis
) -> PartRef:
    """Keep the ranks of a model on the held-out pairs; one row for each query."""
    about: dict[str, Any] = {"round": run.round, "model_id": ref.model_id, "dataset": DATASET}
    ids = [row.image_id for row in heldout.images]
    rows = [
        about | {"direction": "i2t", "image_id": image_id, "rank": rank}
        for image_id, rank in zip(ids, ranks.image_ranks.tolist(), strict=True)
    ]
    texts = [text for captions in heldout.captions for text in captions]
    of_text = [ids[image] for image in ranks.text_image_index.tolist()]
    for image_id, text, rank in zip(of_text, texts, ranks.text_ranks.tolist(), strict=True):
        name = caption_id(image_id, "human", text)
        rows.append(
            about | {"direction": "t2i", "image_id": image_id, "caption_id": name, "rank": rank}
        )
    table = rows_table("ranks", rows)
    return commit_part(run.lake, "ranks", _part_name(ref), table, round=run.round, basis=basis)


def ranks_of(run: Run, ref: ModelRef) -> tuple[RetrievalRanks, list[str]] | None:
    """The ranks of a model in this round with the ids of what was ranked; None when it has none."""
    with connect(run.lake) as connection:
        rows = connection.execute(RANKS_SQL, [run.round, ref.model_id, DATASET]).fetchall()
    images = [(image_id, rank) for direction, image_id, _, rank in rows if direction == "i2t"]
    texts = [row[1:] for row in rows if row[0] == "t2i"]
    if not images or not texts:
        return None
    place = {image_id: index for index, (image_id, _) in enumerate(images)}
    ranks = RetrievalRanks(
        image_ranks=np.array([rank for _, rank in images], dtype=np.int64),
        text_ranks=np.array([rank for _, _, rank in texts], dtype=np.int64),
        text_image_index=np.array([place[image_id] for image_id, _, _ in texts], dtype=np.int64),
    )
    return ranks, [*place, *(name for _, name, _ in texts)]


def _part_name(ref: ModelRef) -> str:
    return f"{DATASET}-{ref.model_id[:16]}"
