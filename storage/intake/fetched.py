"""What img2dataset left behind, by row: status, words and bytes."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from storage.intake.img2dataset import shard_paths, tar_index
from storage.intake.outcomes import outcome_of
from storage.schemas import OK

NO_REASON = "img2dataset gave no reason"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """The result for one row; `image` is None when there is an error."""

    image: bytes | None
    error: str | None
    status: str | None
    fetched_at: datetime


class Download:
    """A finished download, read one shard at a time."""

    def __init__(self, fetch_list: Path, folder: Path, shard_rows: int) -> None:
        self.folder = folder
        self.shard_rows = shard_rows
        self._rows = np.sort(pq.read_table(fetch_list, columns=["row"]).column("row").to_numpy())

    def results(self, begin: int, end: int) -> "Results":
        """The results for row numbers begin to end - 1."""
        first, last = np.searchsorted(self._rows, [begin, end])
        shards = range(int(first) // self.shard_rows, math.ceil(int(last) / self.shard_rows))
        return Results(self.folder, shards if last > first else range(0))

    def outcomes(self) -> Iterator[tuple[int, str, str]]:
        """Row, status and reason of every row that the download has a word of, a shard in memory at a time."""
        for shard in range(math.ceil(len(self._rows) / self.shard_rows)):
            parquet = shard_paths(self.folder, shard)[1]
            table = pq.read_table(parquet, columns=["row", "status", "error_message"])
            for row, status, error in zip(*table.to_pydict().values(), strict=True):
                is_image = status == "success"
                yield (row, *((OK, "") if is_image else outcome_of(error or NO_REASON)))


class Results:
    """Results of a few of img2dataset's shards; images stay on disk until asked for."""

    def __init__(self, folder: Path, shards: range) -> None:
        self._found: dict[int, tuple[str, str | None, Path, tuple[int, int] | None, datetime]] = {}
        for shard in shards:
            self._load(folder, shard)

    def __contains__(self, row: int) -> bool:
        return row in self._found

    def get(self, row: int) -> Fetched | None:
        """The result for a row, None when img2dataset left no word of it."""
        if row not in self._found:
            return None
        status, error, tar, where, fetched_at = self._found[row]
        if status != "success" or where is None:
            status, reason = outcome_of(error or NO_REASON)
            return Fetched(image=None, error=reason, status=status, fetched_at=fetched_at)
        with tar.open("rb") as f:
            f.seek(where[0])
            image = f.read(where[1])
        return Fetched(image=image, error=None, status=None, fetched_at=fetched_at)

    def _load(self, folder: Path, shard: int) -> None:
        tar, parquet, stats = shard_paths(folder, shard)
        fetched_at = datetime.fromtimestamp(json.loads(stats.read_bytes())["start_time"], UTC)
        stored = tar_index(tar)
        table = pq.read_table(parquet, columns=["row", "key", "status", "error_message"])
        for row, key, status, error in zip(*table.to_pydict().values(), strict=True):
            self._found[row] = (status, error, tar, stored.get(key), fetched_at)
