"""A slice is fetched, and what may come another time is asked for again, some passes in all.

Each pass is a run of img2dataset on a list and in a folder of its own. What is on disk says where a killed slice is to
be gone on with: the rows of a further pass follow from the outcomes of the one before.
"""

import logging
import random
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.intake.download_config import DownloadConfig
from storage.intake.fetched import Download, Fetched, Results
from storage.intake.fetching.errors import is_transient
from storage.intake.img2dataset import Progress, download

logger = logging.getLogger(__name__)


class Passes:
    """The finished passes of a slice, the first one first."""

    def __init__(self, downloads: list[Download]) -> None:
        self._downloads = downloads

    def results(self, begin: int, end: int) -> "PassResults":
        """The results for row numbers begin to end - 1."""
        return PassResults([each.results(begin, end) for each in self._downloads])


class PassResults:
    """Results of some rows over all passes."""

    def __init__(self, passes: list[Results]) -> None:
        self._passes = passes

    def get(self, row: int) -> Fetched | None:
        """What the last pass that has the row left of it; None when none has."""
        return next((found for p in reversed(self._passes) if (found := p.get(row))), None)

    def num_bytes(self, row: int) -> int:
        """Of a row's image; 0 when there is none."""
        return next((p.num_bytes(row) for p in reversed(self._passes) if row in p), 0)

    def attempts(self, row: int) -> int:
        """How often a row was asked for: by the first pass, and by each later one that has a word of it."""
        return 1 + sum(row in each for each in self._passes[1:])


def first_pass(fetch_list: Path, folder: Path, config: DownloadConfig) -> Download:
    """The first pass of a slice that is to be fetched, or is being fetched, into `folder`."""
    return Download(fetch_list, folder / "img2dataset", config.shard_rows)


def fetch_slice(
    fetch_list: Path,
    folder: Path,
    config: DownloadConfig,
    hosts: str | None,
    on_progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Passes:
    """Fetch every row (columns row, url) of a list, and again those whose failure may pass.

    Killed anywhere, the same call goes on. Raises as `download` does.
    """
    stop = stop or threading.Event()
    passes = [first_pass(fetch_list, folder, config)]
    download(fetch_list, passes[0].folder, config, hosts, on_progress, stop)
    for number in range(1, config.retry_passes + 1):
        again = folder / f"again-{number}"
        listed = again / "fetch.parquet"
        if not listed.exists():
            rows = _may_pass(fetch_list, passes[-1])
            if not rows.num_rows:
                break
            wait_s = config.retry_wait_s * 2 ** (number - 1) * random.uniform(1.0, 1.25)
            logger.info("%d rows are asked for again in %.0f s", rows.num_rows, wait_s)
            stop.wait(wait_s)
            again.mkdir(parents=True, exist_ok=True)
            tmp = again / "_tmp-fetch.parquet"
            pq.write_table(rows, tmp)
            tmp.replace(listed)
        download(listed, again / "img2dataset", config, hosts, None, stop)
        passes.append(Download(listed, again / "img2dataset", config.shard_rows))
        fetch_list = listed
    return Passes(passes)


def _may_pass(fetch_list: Path, fetched: Download) -> pa.Table:
    """The rows of a finished pass, as a list, whose outcome may be another one the next time."""
    listed = pq.read_table(fetch_list)
    settled = (row for row, *outcome in fetched.outcomes() if not is_transient(*outcome))
    # Rows of which there is no word are lost, which may pass as well.
    wanted = np.isin(listed.column("row").to_numpy(), np.fromiter(settled, np.int64), invert=True)
    return listed.filter(pa.array(wanted, pa.bool_()))
