"""A plan fetched slice by slice, while the caller packs what is there."""

import math
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from storage.intake.download_config import DownloadConfig
from storage.intake.fetched import Download
from storage.intake.passes import Passes, PassResults, fetch_slice, first_pass
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

    def parts(
        self, on_progress: Progress | None
    ) -> Generator[tuple[int, PassResults | None], None, None]:
        """Each part's number with what was fetched for its rows, in order; None where its slice has nothing to fetch.

        A part comes as soon as nothing of it, or of those before it, is to be asked again. Close it: that ends what is
        being fetched. A slice's files are removed when the next one's parts are asked for.
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
                    # Begun when this one is fetched, whether it is packed by then or not.
                    after = self._begin(pool, waiting)
                    for index in coming.indices:
                        yield index, self._fetched(coming, index, on_progress)
                    coming.passes.result()
                    shutil.rmtree(self._folder_of(coming.indices), ignore_errors=True)
                    coming = after
            finally:
                self._stop.set()

    def _begin(self, pool: ThreadPoolExecutor, waiting: deque[range]) -> "_Coming | None":
        """Let the next slice be fetched after those before it; None when there is none."""
        if not waiting:
            return None
        coming = _Coming(waiting.popleft())
        coming.passes = pool.submit(self._fetch, coming)
        return coming

    def _fetched(
        self, coming: "_Coming", index: int, on_progress: Progress | None
    ) -> PassResults | None:
        """What was fetched for a part, as soon as no more of it will be."""
        size, num_rows = self._config.shard_rows, self._plan.num_rows
        begin, end = index * size, (index + 1) * size

        def tell(done: int) -> None:
            # From this thread: what shows the progress may belong to it.
            if on_progress is not None:
                on_progress(min(done, num_rows), num_rows)

        while not coming.passes.done():
            settled = coming.first_pass.settled(begin, end) if coming.first_pass else None
            if settled is not None:
                tell(max(end, coming.num_done(size, num_rows)))
                return PassResults([settled])
            tell(max(begin, coming.num_done(size, num_rows)))
            wait([coming.passes], timeout=PROGRESS_S)
        passes = coming.passes.result()
        tell(max(end, coming.num_done(size, num_rows)))
        return None if passes is None else passes.results(begin, end)

    def _fetch(self, coming: "_Coming") -> Passes | None:
        """Fetch a slice, or go on fetching it; None when all its parts are made."""
        try:
            missing = [index for index in coming.indices if self._is_missing(index)]
            if not missing or self._stop.is_set():
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
            coming.first_pass = first_pass(fetch_list, folder, self._config)
            return fetch_slice(
                fetch_list, folder, self._config, self._hosts, coming.tell, self._stop
            )
        except BaseException:
            self._stop.set()  # nor is the slice after it to be begun
            raise

    def _folder_of(self, indices: range) -> Path:
        """Named by both ends: a resume with other slices must not take this one's list for its own."""
        return self._folder / f"slice-{indices.start:05d}-{indices.stop:05d}"


class _Coming:
    """A slice that is being fetched."""

    def __init__(self, indices: range) -> None:
        self.indices = indices
        self.passes: Future[Passes | None]
        self.first_pass: Download | None = None
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
