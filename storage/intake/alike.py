"""Pictures that are known by their looks: which of them does a new one show?

On disk, so that memory stays flat, and built anew by each intake from the committed parts, as `seen` is.
"""

import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np

from storage.intake.looks import (
    EDGE_BITS,
    NUM_BYTES,
    VIEWS,
    Looks,
    are_alike,
    looks_of_bytes,
)
from storage.intake.near import NearIndex

_ID_BYTES = 16


class KnownLooks:
    """Image ids by what the images look like; use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        """Files go below `folder` and away at the end."""
        self._dir = tempfile.TemporaryDirectory(dir=folder, prefix="_tmp-alike-")
        self._index = NearIndex(Path(self._dir.name), EDGE_BITS)
        self._records = (Path(self._dir.name) / "records").open("w+b")
        self._num = 0

    def __enter__(self) -> "KnownLooks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._records.close()
        self._index.__exit__(kind, err, trace)
        self._dir.cleanup()

    def __len__(self) -> int:
        return self._num

    def add(self, image_id: str, looks: Looks) -> None:
        """Remember an image."""
        self._records.seek(0, 2)
        self._records.write(bytes.fromhex(image_id) + looks.to_bytes())
        places = np.uint64(VIEWS * self._num) + np.arange(VIEWS, dtype=np.uint64)
        self._index.add(looks.edges, places)
        self._num += 1

    def find(self, looks: Looks) -> str | None:
        """The image_id of a known image that shows the same picture; the one added first if there are several."""
        asked, places, _ = self._index.within(looks.edges)
        for place, view in sorted(zip(places.tolist(), asked.tolist(), strict=True)):
            number, view_of_known = divmod(place, VIEWS)
            image_id, known = self._record(number)
            if are_alike(looks, view, known, view_of_known):
                return image_id
        return None

    def _record(self, number: int) -> tuple[str, Looks]:
        self._records.seek(number * (_ID_BYTES + NUM_BYTES))
        data = self._records.read(_ID_BYTES + NUM_BYTES)
        return data[:_ID_BYTES].hex(), looks_of_bytes(data[_ID_BYTES:])
