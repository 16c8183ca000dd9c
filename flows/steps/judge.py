"""The frozen judge: a scorer outside the loop looks at a sample of each round's texts.

A loop whose filter likes its own captioner ever better is no proof of better captions; a judge that does not change
with the rounds can tell (Recursive training, docs/rounds.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb

from flows import models
from flows.foreign_models import basis_fields
from flows.session import Run
from flows.settings import curate_basis
from flows.steps.batches import image_batches, rows_table
from flows.stream import ImageRow
from storage import (
    Clock,
    PartRef,
    basis_of,
    commit_part,
    committed_part,
    connect,
    fingerprint,
    layout,
)

STAGE_VERSION = 1
PART = "judgements"
BATCH_IMAGES = 64

# A hash of the id alone picks the texts, so that web texts are the same ones in every round.
_SAMPLE = """
SELECT c.caption_id, c.image_id, c.source, c.caption, i.shard, i."offset", i.size
FROM captions c
JOIN images i USING (image_id)
WHERE c.status = 'ok' AND i.shard < $next_round AND NOT i.heldout
  AND ((c.source = 'web' AND c.round = 0 AND EXISTS (
          SELECT 1 FROM pairs p WHERE p.image_id = c.image_id AND p.pool = 'web'))
       OR (c.source = 'synthetic' AND c.round = $round))
QUALIFY row_number() OVER (PARTITION BY c.source ORDER BY md5(c.caption_id)) <= $each
ORDER BY c.image_id, c.caption_id
"""


def judge_sample(run: Run) -> PartRef | None:
    """Score a sample of the round's texts with the judge, or find it scored; None when no sample is asked for."""
    size = run.settings.audit.judge_sample
    if not size:
        return None
    judge = models.judge_ref(run)
    with connect(run.lake, as_of=run.round) as connection:
        sample = sample_of(connection, run.round, size)
    texts: dict[ImageRow, list[tuple[str, str, str]]] = {}
    for caption_id, image_id, source, caption, shard, offset, num_bytes in sample:
        row = ImageRow(image_id=image_id, shard=shard, offset=offset, size=num_bytes)
        texts.setdefault(row, []).append((caption_id, source, caption))
    basis = basis_of(
        "judge",
        STAGE_VERSION,
        curate_basis(run.settings.score) | basis_fields(judge),
        [sample_input(sample)],
        judge.model_id,
    )
    known = committed_part(
        run.lake, "judgements", PART, round=run.round, basis=basis, on_stale=run.on_stale
    )
    if known is not None:
        return known
    clock, scorer, records = Clock(), models.scorer_of(run, judge), []
    for batch in image_batches(run, list(texts), scorer.transform, BATCH_IMAGES):
        if batch.pixel_values is None:
            continue
        found = scorer.score(
            batch.pixel_values, [[text for _, _, text in texts[row]] for row in batch.rows]
        )
        for row, scores in zip(batch.rows, found, strict=True):
            for (caption_id, source, _), score in zip(texts[row], scores, strict=True):
                records.append(
                    {
                        "caption_id": caption_id,
                        "image_id": row.image_id,
                        "source": source,
                        "model_id": judge.model_id,
                        "itm_prob": score.itm_prob,
                        "itc_sim": score.itc_sim,
                        "round": run.round,
                    }
                )
    records.sort(key=lambda record: str(record["caption_id"]))
    table = rows_table("judgements", records)
    return commit_part(
        run.lake, "judgements", PART, table, round=run.round, basis=basis, clock=clock
    )


def sample_of(
    connection: duckdb.DuckDBPyConnection, round: int, size: int
) -> list[tuple[str, str, str, str, str, int, int]]:
    """The texts of a round that the judge sees: caption_id, image_id, source, text, and where the image lies."""
    about = {
        "round": round,
        "next_round": layout.web_shards(round + 1),
        "each": max(1, size // 2),
    }
    return connection.execute(_SAMPLE, about).fetchall()


def sample_input(sample: Sequence[Sequence[Any]]) -> str:
    """The texts of a sample, in any order."""
    return fingerprint("sample", 1, {"caption_ids": sorted(row[0] for row in sample)}, [])
