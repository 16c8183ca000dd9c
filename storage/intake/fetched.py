"""What img2dataset left behind, by row: status, words and bytes."""

import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.intake.fetching.errors import is_transient
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
    """A download, read one shard at a time."""

    def __init__(self, fetch_list: Path, folder: Path, shard_rows: int) -> None:
        self.folder = folder
        self.shard_rows = shard_rows
        self._rows = np.sort(pq.read_table(fetch_list, columns=["row"]).column("row").to_numpy())
        self._to_ask_again: set[tuple[int, int]] = set()

    def results(self, begin: int, end: int) -> "Results":
        """The results for row numbers begin to end - 1 of a finished download."""
        return Results(self.folder, self._shards(*self._places(begin, end)))

    def settled(self, begin: int, end: int) -> "Results | None":
        """The same while it may still be going on: None until all is there, and for ever when a failure may pass.

        What is settled stays as it is: a download writes none of its shards again that has all its rows.
        """
        first, last = self._places(begin, end)
        shards = self._shards(first, last)
        if (begin, end) in self._to_ask_again:
            return None
        if not all(shard_paths(self.folder, shard)[2].exists() for shard in shards):
            return None
        try:
            results = Results(self.folder, shards)
        except (ValueError, OSError, pa.ArrowException, tarfile.TarError):
            return None  # not whole yet, or torn: then it is fetched again
        until = min(shards.stop * self.shard_rows, len(self._rows))
        if not all(
            results.is_there(int(row)) for row in self._rows[shards.start * self.shard_rows : until]
        ):
            return None
        if any(results.may_pass(int(row)) for row in self._rows[first:last]):
            self._to_ask_again.add((begin, end))
            return None
        return results

    def _places(self, begin: int, end: int) -> tuple[int, int]:
        first, last = np.searchsorted(self._rows, [begin, end])
        return int(first), int(last)

    def _shards(self, first: int, last: int) -> range:
        """img2dataset's shards that hold the list's places first to last - 1."""
        if first == last:
            return range(0)
        return range(first // self.shard_rows, math.ceil(last / self.shard_rows))

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

    def is_there(self, row: int) -> bool:
        """Whether there is word of a row, and its image when there is to be one."""
        if row not in self._found:
            return False
        status, _, _, where, _ = self._found[row]
        return status != "success" or where is not None

    def may_pass(self, row: int) -> bool:
        """Whether a row, which is there, failed in a way that may be another one the next time."""
        status, error, *_ = self._found[row]
        return status != "success" and is_transient(*outcome_of(error or NO_REASON))

    def num_bytes(self, row: int) -> int:
        """Of the image of a row that is there; 0 when there is none."""
        where = self._found[row][3]
        return where[1] if where is not None else 0

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
