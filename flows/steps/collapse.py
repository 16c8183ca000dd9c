"""The collapse monitor: how varied a round's captions are, and what its filter says of them, on the same images in
every round.

The panel is a part of the images that the first round captioned. Later rounds caption those again, so that the
figures of any two rounds are of as many texts and of the same pictures; the variety of texts depends on both.
"""

from __future__ import annotations

import logging
from typing import Any

import duckdb
import numpy as np

from blip_core import Metric, caption_diversity
from blip_core.intervals import mean_metric
from flows.session import Run
from flows.steps.batches import rows_table
from storage import (
    Clock,
    PartRef,
    basis_of,
    commit_part,
    committed_part,
    connect,
    list_parts,
    rounds,
)

logger = logging.getLogger(__name__)

STAGE_VERSION = 1
DATASET = "captions"
PEOPLE = "human-captions"
"""Dataset of the same figures of human captions, on other pictures; `people` stands for their model."""
OF_PEOPLE = ("distinct", "vocabulary", "length")
"""What may be compared with people: figures of single texts and of words, whose names begin so."""
MIN_PANEL = 100
"""Fewer images than this are not compared: a share of them is chance."""
MATCHED = 0.5
"""itm_prob of a text that the filter calls a match (paper: the ITM head's own verdict)."""
PART = "captions"

# Images in an order that has to do with nothing else, and that others which come or go do not change.
PANEL_SQL = """
CREATE TEMP TABLE panel AS
SELECT DISTINCT image_id FROM captions
WHERE source = 'synthetic' AND round = $first ORDER BY md5(image_id) LIMIT $images
"""
TEXTS_SQL = """
SELECT c.model_id, c.status = 'ok' AS ok, c.caption, c.mean_logprob, s.itm_prob, s.itc_sim
FROM captions c SEMI JOIN panel USING (image_id)
LEFT JOIN scores s ON s.caption_id = c.caption_id AND s.round = c.round AND c.status = 'ok'
WHERE c.source = 'synthetic' AND c.round = $round AND coalesce(c.index, 0) = 0
ORDER BY md5(c.image_id)
"""
PEOPLE_SQL = """
SELECT min_by(caption, md5(caption)) AS caption FROM human
WHERE caption IS NOT NULL GROUP BY image_id ORDER BY md5(image_id) LIMIT $images
"""


def measure_captions(run: Run) -> list[PartRef]:
    """Measure the captions of this round and of those before it, or find them measured.

    Earlier ones too: a lake may come from a version that did not measure them.
    """
    numbers = [record.round for record in rounds.list_rounds(run.lake) if record.round <= run.round]
    parts = (measure_round(run, number) for number in numbers)
    return [part for part in parts if part is not None]


def measure_round(run: Run, round: int) -> PartRef | None:
    """One part of `metrics`; None when the round captioned fewer images than are worth comparing."""
    with connect(run.lake) as connection:
        first = first_captioned(connection)
        if first is None or not list_parts(run.lake, "captions", round):
            return None
        basis = _basis(run, round, first)
        existing = committed_part(
            run.lake, "metrics", PART, round=round, basis=basis, on_stale="rebuild"
        )
        if existing is not None:
            return existing
        clock = Clock()
        images = _panel_images(run, connection, first)
        connection.execute(PANEL_SQL, {"first": first, "images": images})
        records = _records(connection, round)
        if round == first and records:
            records += _of_people(connection, round, images)
    if not records:
        logger.info("round %d: fewer than %d captions, not compared", round, MIN_PANEL)
        return None
    table = rows_table("metrics", records)
    return commit_part(run.lake, "metrics", PART, table, round=round, basis=basis, clock=clock)


def first_captioned(connection: duckdb.DuckDBPyConnection) -> int | None:
    """The first round that captioned anything."""
    sql = "SELECT min(round) FROM captions WHERE source = 'synthetic'"
    first = connection.execute(sql).fetchall()[0][0]
    return None if first is None else int(first)


def _basis(run: Run, round: int, first: int) -> dict[str, Any]:
    inputs = sorted(
        part.fingerprint
        for table, number in (("captions", first), ("captions", round), ("scores", round))
        for part in list_parts(run.lake, table, number)
    )
    config = {"panel_images": run.settings.gate.panel_images}
    return basis_of("collapse", STAGE_VERSION, config, inputs)


def _panel_images(run: Run, connection: duckdb.DuckDBPyConnection, first: int) -> int:
    """How many images are compared: no more than people captioned when the first round was measured."""
    known = connection.execute(
        "SELECT max(n) FROM metrics WHERE dataset = ? AND round = ?", [PEOPLE, first]
    ).fetchall()[0][0]
    wanted = run.settings.gate.panel_images
    if known is None:
        sql = "SELECT count(DISTINCT image_id) FROM human"
        known = connection.execute(sql).fetchall()[0][0]
    return min(wanted, known) if known >= MIN_PANEL else wanted


def _records(connection: duckdb.DuckDBPyConnection, round: int) -> list[dict[str, Any]]:
    rows = connection.execute(TEXTS_SQL, {"round": round}).fetchall()
    good = [row for row in rows if row[1]]
    if len(rows) < MIN_PANEL:
        return []
    metrics = caption_diversity([row[2] for row in good]) if good else []
    metrics.append(mean_metric("failed_share", np.array([float(not row[1]) for row in rows])))
    probs = [row[4] for row in good if row[4] is not None]
    for name, values in (
        ("mean_logprob", [row[3] for row in good if row[3] is not None]),
        ("mean_itm_prob", probs),
        ("matched_share", [float(prob >= MATCHED) for prob in probs]),
        ("mean_itc_sim", [row[5] for row in good if row[5] is not None]),
    ):
        finite = np.array([value for value in values if np.isfinite(value)])
        if len(finite):
            metrics.append(mean_metric(name, finite))
    return [_row(round, rows[0][0], DATASET, metric) for metric in metrics]


def _of_people(
    connection: duckdb.DuckDBPyConnection, round: int, images: int
) -> list[dict[str, Any]]:
    """The figures of human captions, one for each of as many other pictures."""
    texts = [row[0] for row in connection.execute(PEOPLE_SQL, {"images": images}).fetchall()]
    if len(texts) < MIN_PANEL or len(texts) < images:
        return []
    metrics = [m for m in caption_diversity(texts) if m.name.startswith(OF_PEOPLE)]
    return [_row(round, "people", PEOPLE, metric) for metric in metrics]


def _row(round: int, model_id: str, dataset: str, metric: Metric) -> dict[str, Any]:
    return {
        "round": round,
        "model_id": model_id,
        "dataset": dataset,
        "metric": metric.name,
        "value": metric.value,
        "low": metric.low,
        "high": metric.high,
        "n": metric.n,
    }
