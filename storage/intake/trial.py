"""What a list will give, from a few of its rows: they are taken in for real, into a lake that is thrown away."""

import json
import logging
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from storage.catalog import query
from storage.errors import EmptyInput
from storage.intake.download_config import DownloadConfig
from storage.intake.url_list import ListRow, UrlListConfig, open_list
from storage.intake.web import ingest_urls
from storage.lake import Lake
from storage.schemas import OK

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """The rows that were tried, and how large their list is."""

    num_listed: int
    """Rows of the whole list."""
    num_tried: int
    outcomes: Counter[str]
    """Rows tried, by status."""
    reasons: dict[str, str]
    """One reason for each status."""
    image_bytes: int
    """Of all images that were stored."""
    seconds: float

    @property
    def num_ok(self) -> int:
        """Rows that gave an image."""
        return self.outcomes[OK]


def try_list(url_list: UrlListConfig, config: DownloadConfig, rows: int, *, seed: int = 0) -> Trial:
    """Take in `rows` rows of a list, drawn evenly; nothing of it is kept.

    Repeats of an address are rarer among few rows than in the whole list. Raises as `ingest_urls` does, but not for
    rows that all fail.
    """
    drawn, num_listed = _drawn(url_list, rows, random.Random(seed))
    with tempfile.TemporaryDirectory(prefix="trial-") as folder:
        path = Path(folder) / "drawn.jsonl"
        with path.open("w", encoding="utf-8") as f:
            for row in drawn:
                f.write(json.dumps(row.values) + "\n")
        lake = Lake.open(str(Path(folder) / "lake"), create=True)
        began = time.monotonic()
        try:
            ingest_urls(lake, UrlListConfig(path=str(path), name=url_list.name), config, round=1)
        except EmptyInput as err:
            # Each row has its outcome all the same.
            logger.info("%s", err)
        seconds = time.monotonic() - began
        found = query(
            lake,
            "SELECT status, count(*) AS n, any_value(reason) AS reason, sum(size) AS bytes "
            "FROM pairs GROUP BY status",
        ).to_pylist()
    return Trial(
        num_listed=num_listed,
        num_tried=len(drawn),
        outcomes=Counter({row["status"]: row["n"] for row in found}),
        reasons={row["status"]: row["reason"] for row in found if row["reason"]},
        image_bytes=sum(int(row["bytes"] or 0) for row in found if row["status"] == OK),
        seconds=seconds,
    )


def _drawn(url_list: UrlListConfig, rows: int, draw: random.Random) -> tuple[list[ListRow], int]:
    """So many rows of a list, each equally likely, in the list's order; and how many it has."""
    kept: list[ListRow] = []
    num_listed = 0
    for batch in open_list(url_list):
        for row in batch:
            if len(kept) < rows:
                kept.append(row)
            elif (place := draw.randrange(num_listed + 1)) < rows:
                kept[place] = row
            num_listed += 1
    return sorted(kept, key=lambda row: row.position), num_listed
