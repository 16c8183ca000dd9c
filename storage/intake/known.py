"""Which pictures a lake knows already, by their bytes and by their looks, and which must never be trained on."""

from pathlib import Path
from types import TracebackType
from typing import Any

from storage.catalog import connect
from storage.intake.alike import KnownLooks
from storage.intake.download_config import DownloadConfig
from storage.intake.looks import Looks, looks_of_bytes
from storage.intake.stored import StoredImages
from storage.intake.texts import texts_by_image
from storage.lake import Lake
from storage.schemas import OK
from storage.tables import PartRef, iter_part, read_part

_RESERVED = """
SELECT DISTINCT image_id, looks FROM pairs
WHERE pool <> 'web' AND status = 'ok' AND looks IS NOT NULL AND image_id IN (SELECT image_id FROM reserved)
ORDER BY image_id
"""


class KnownImages:
    """Built anew by each intake from the committed parts; use it in a `with`."""

    def __init__(self, lake: Lake, folder: Path, config: DownloadConfig) -> None:
        """Files go below `folder`. What models are evaluated on, and filters audited with, is known from the start."""
        self._lake = lake
        self._finds_near = config.near_duplicates == "drop"
        self.images = StoredImages(folder)
        self._unites = config.texts_per_image > 1
        self._web = KnownLooks(folder)
        self._reserved = KnownLooks(folder)
        if config.eval_overlap == "drop":
            with connect(lake) as con:
                for image_id, looks in con.execute(_RESERVED).fetchall():
                    self._reserved.add(image_id, looks_of_bytes(looks))

    def __enter__(self) -> "KnownImages":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in (self.images, self._web, self._reserved):
            each.__exit__(kind, err, trace)

    def refusal(self, image_id: str, key: str, looks: Looks) -> tuple[str, str] | None:
        """Status and reason of a picture that is not to be stored; None for a new one, which is known from now on."""
        first = self.images.first_key(image_id, key)
        if first is not None:
            return "duplicate_image", f"same picture as key {first}"
        found = self._reserved.find(looks)
        if found is not None:
            return "eval_overlap", f"shows what image {found} shows, which is kept for evaluation"
        if self._finds_near:
            found = self._web.find(looks)
            if found is not None:
                return "near_duplicate", f"shows what image {found} shows"
            self._web.add(image_id, looks)
        return None

    def remember(self, pairs: PartRef, texts: PartRef | None, *, own: bool) -> None:
        """Add the images of a committed part of pairs, with the captions that it gave; `own` if it is of this list."""
        columns = ["image_id", "status", "key", "row", "shard", "offset", "size"]
        columns += ["looks"] if self._finds_near else []
        captions: dict[str, list[str]] = {}
        if self._unites and texts is not None:
            rows = read_part(self._lake, texts, ["caption_id", "image_id", "status"])
            captions = texts_by_image(rows.to_pylist())
        for batch in iter_part(self._lake, pairs, columns):
            rows_of_batch = batch.to_pylist()
            self.images.add(rows_of_batch, captions, own=own)
            for row in rows_of_batch:
                if row["status"] == OK and row.get("looks"):
                    self._web.add(row["image_id"], looks_of_bytes(row["looks"]))
        self.images.add_texts(captions)

    def made(self, pairs: list[dict[str, Any]], captions: list[dict[str, Any]]) -> None:
        """Add what a part that was just committed holds; its looks are known already."""
        texts = texts_by_image(captions)
        self.images.add(pairs, texts, own=True)
        self.images.add_texts(texts)
