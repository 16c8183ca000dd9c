"""The report of a round, from lake to file."""

import dataclasses
import logging
from functools import partial

from flows.comparison.table import compared
from flows.report.gather import gather_facts
from flows.report.render import render_report
from storage import layout
from storage.catalog import connect
from storage.lake import Lake
from storage.shards import read_image

logger = logging.getLogger(__name__)


def build_report(lake: Lake, round: int, *, gallery_pairs: int = 12) -> str:
    """Write the round's page into the lake; returns its path there.

    A single HTML file below 5 MB that needs no network. Equal tables give equal bytes, and what
    later rounds take in or measure changes nothing; a comparison of policies on the round's texts is added.

    Raises:
        LookupError: the round has no record.
    """
    with connect(lake, as_of=round) as connection:
        facts = gather_facts(
            connection,
            round,
            partial(read_image, lake),
            lake=lake.uri,
            gallery_pairs=gallery_pairs,
        )
    facts = dataclasses.replace(facts, comparison=compared(lake, round))
    path = layout.report(round)
    lake.root.write_bytes(path, render_report(facts).encode("utf-8"))
    logger.info("round %d: report at %s/%s", round, lake.uri, path)
    return path
