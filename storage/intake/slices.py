"""A plan fetched slice by slice, the next one while the caller packs the one before."""

import math
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from storage.intake.download_config import DownloadConfig
from storage.intake.passes import Passes, fetch_slice
from storage.intake.plan import Plan

PROGRESS_S = 0.5
"""How often progress is told while a slice is fetched."""

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


class SliceFetching:
    """Slices of a plan, each a number of whole parts that one run of img2dataset fetches."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        config: DownloadConfig,
        hosts: str,
        is_missing: Callable[[int], bool],
    ) -> None:
        """`is_missing` tells of a part's number whether it still has to be made; it is asked from another thread."""
        self._plan, self._folder, self._config, self._hosts = plan, folder, config, hosts
        self._is_missing = is_missing
        self._stop = threading.Event()

    def slices(
        self, on_progress: Progress | None
    ) -> Generator[tuple[range, Passes | None], None, None]:
        """Part numbers of each slice with what was fetched, None where all its parts are made already.

        Close it: that ends what is being fetched. A slice's files are removed when the next one is asked for.
        """
        size, num_rows = self._config.shard_rows, self._plan.num_rows
        num_parts = math.ceil(num_rows / size)
        step = max(self._config.slice_rows // size, 1)
        waiting = deque(
            range(first, min(first + step, num_parts)) for first in range(0, num_parts, step)
        )
        with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
            try:
                coming = self._begin(pool, waiting)
                while coming is not None:
                    while not coming.passes.done():
                        # Told from this thread: what shows the progress may belong to it.
                        wait([coming.passes], timeout=PROGRESS_S)
                        if on_progress is not None:
                            on_progress(coming.num_done(size, num_rows), num_rows)
                    indices, passes = coming.indices, coming.passes.result()
                    coming = self._begin(pool, waiting)
                    yield indices, passes
                    shutil.rmtree(self._folder_of(indices), ignore_errors=True)
            finally:
                self._stop.set()

    def _begin(self, pool: ThreadPoolExecutor, waiting: deque[range]) -> "_Coming | None":
        """Begin to fetch the next slice; None when there is none."""
        if not waiting:
            return None
        coming = _Coming(waiting.popleft())
        coming.passes = pool.submit(self._fetch, coming)
        return coming

    def _fetch(self, coming: "_Coming") -> Passes | None:
        """Fetch a slice, or go on fetching it; None when all its parts are made."""
        missing = [index for index in coming.indices if self._is_missing(index)]
        if not missing:
            return None
        size = self._config.shard_rows
        folder = self._folder_of(coming.indices)
        fetch_list = folder / "fetch.parquet"
        ranges = _joined([(i * size, (i + 1) * size) for i in missing])
        if not (fetch_list.exists() and self._plan.is_listed(fetch_list, ranges)):
            # Also when a part was dropped since the list was written, as a repair does.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            self._plan.write_fetch_list(fetch_list, ranges, size)
        return fetch_slice(fetch_list, folder, self._config, self._hosts, coming.tell, self._stop)

    def _folder_of(self, indices: range) -> Path:
        """Named by both ends: a resume with other slices must not take this one's list for its own."""
        return self._folder / f"slice-{indices.start:05d}-{indices.stop:05d}"


class _Coming:
    """A slice that is being fetched."""

    def __init__(self, indices: range) -> None:
        self.indices = indices
        self.passes: Future[Passes | None]
        self._share = 0.0

    def tell(self, done: int, num: int) -> None:
        """How far it is; called by the thread that fetches."""
        self._share = done / num if num else 1.0

    def num_done(self, shard_rows: int, num_rows: int) -> int:
        """Rows of the plan up to here."""
        before = self.indices.start * shard_rows
        return before + int(self._share * min(len(self.indices) * shard_rows, num_rows - before))


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges with those that touch made one."""
    joined: list[tuple[int, int]] = []
    for begin, end in ranges:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
