"""Image sets into the lake: pictures in tars stay where they are, others are packed into shards; one row each.

A file of a set (or some rows of it) makes one part, as a shard of a URL list does. Pictures go through the same looks as
downloaded ones: what is no picture, a copy, purged or kept for evaluation has its row and its reason, and goes no further.
"""

import hashlib
import json
import logging
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from storage import ids, layout
from storage.adopted import ImageSetRecord, SetFile, read_record, write_record
from storage.catalog import disk_watched
from storage.errors import EmptyInput
from storage.fingerprint import Basis, basis_of, explain
from storage.intake.adopting.found import Found
from storage.intake.adopting.image_set import ImageSetConfig
from storage.intake.adopting.opened import Files, OpenedSet, open_set
from storage.intake.download_config import DownloadConfig
from storage.intake.judged import safe_rows
from storage.intake.known import KnownImages
from storage.intake.looking import OF_THE_IMAGE, Looked, Lookers
from storage.intake.purged import PurgedImages
from storage.intake.records import (
    IntakeRecord,
    finished_intake,
    num_ok_of,
    outcomes_of,
    remember_intake,
)
from storage.intake.seen import SeenImages
from storage.intake.texts import WebTexts, counts_of_texts
from storage.lake import Lake
from storage.schemas import OK
from storage.shards import Sample, write_shard
from storage.tables import (
    Clock,
    Counts,
    OnStale,
    PartRef,
    commit_part,
    committed_part,
    drop_part,
    iter_part,
    list_parts,
    part_manifest,
    rows_table,
)

logger = logging.getLogger(__name__)

STAGE_VERSION = 1

_NOT_PLANNED: dict[str, Any] = {
    "known_image": None,
    "first_row": None,
    "is_placeholder": False,
}
"""Nobody counted beforehand which addresses and texts would repeat."""
FILE_BYTES = 128 << 10
"""Taken for the size of a picture before it is read."""

Progress = Callable[[int, int], None]
"""Called with files done and files in all."""


def adopt_images(
    lake: Lake,
    config: ImageSetConfig,
    download: DownloadConfig,
    *,
    round: int,
    position: int = 0,
    on_stale: OnStale = "error",
    on_progress: Progress | None = None,
) -> list[PartRef]:
    """Bring an image set into the lake as this round's; its pairs parts, then its captions parts.

    `position` tells the sets of a round apart, from 0. Of `download` the settings of images and texts count. Files and rows
    that the lake has from an earlier round are left out; with nothing new the answer is [].
    Raises EmptyInput (no file, or no picture in the whole lake afterwards), ConfigError (a set of no known shape),
    StaleOutput (this round took in something else), CorruptData, StorageFull.
    """
    opened = open_set(config, shard_rows=download.shard_rows, max_bytes=download.max_image_bytes)
    prefix = layout.image_set(round, position, in_place=opened.in_place)
    web = [ref for ref in list_parts(lake, "pairs") if ref.name.startswith("web-")]
    # Names sort by round and place: what comes after this set is none of its business.
    earlier = [ref for ref in web if ref.name < prefix]
    basis = _basis(opened, download, earlier)
    record = f"images-{position:02d}"
    done = finished_intake(lake, round, record, basis, on_stale)
    if done is not None:
        return list(done.parts)
    own = [ref for ref in web if ref.name.startswith(f"{prefix}-")]
    _drop_outdated(lake, own, basis, on_stale)
    with (
        disk_watched(lake, layout.WORK),
        _Adoption(lake, opened, download, prefix, earlier, basis, on_stale) as adoption,
    ):
        parts = adoption.run(on_progress)
    shutil.rmtree(lake.scratch("adopt", prefix), ignore_errors=True)
    if not earlier and not num_ok_of(lake, parts):
        raise EmptyInput(
            f"image set {config.name}: none of the rows of {config.path} gave an image ({outcomes_of(lake, parts)}); check "
            "the path and the format, then run the same command again"
        )
    remember_intake(lake, round, record, IntakeRecord(basis=basis, parts=tuple(parts)))
    return parts


class _Adoption:
    """One set on its way in, and what the lake has already."""

    def __init__(
        self,
        lake: Lake,
        opened: OpenedSet,
        config: DownloadConfig,
        prefix: str,
        earlier: list[PartRef],
        basis: Basis,
        on_stale: OnStale,
    ) -> None:
        """`earlier` are the web pairs that were taken in before."""
        self.lake, self.opened, self.config = lake, opened, config
        self.prefix, self.basis, self.on_stale = prefix, basis, on_stale
        folder = lake.scratch("adopt", prefix)
        self._num_rows = 0
        self._rows = SeenImages(folder)
        self._lookers = Lookers(config)
        self._known = KnownImages(lake, folder, config)
        self._texts = WebTexts(config, self._known.images)
        self._purged = PurgedImages(lake, folder)
        for ref in earlier:
            self._remember_rows(ref)
            texts = committed_part(lake, "captions", ref.name, round=0)
            self._known.remember(ref, texts, own=False)
        self.files = self._new_files(earlier)

    def __enter__(self) -> "_Adoption":
        return self

    def __exit__(self, *raised: Any) -> None:
        for each in (self._lookers, self._rows, self._known, self._purged):
            each.__exit__(*raised)

    def run(self, on_progress: Progress | None) -> list[PartRef]:
        """All parts, file by file; the pairs first, then the captions."""
        record = ImageSetRecord(
            name=self.opened.config.name,
            format=self.opened.format,
            root=self.opened.root.uri,
            files=tuple(self.files),
        )
        write_record(self.lake, self.prefix, record)
        pairs, captions = [], []
        for index, file in enumerate(self.files):
            made = self._part(index, file)
            pairs.append(made[0])
            captions.append(made[1])
            if on_progress is not None:
                on_progress(index + 1, len(self.files))
        return [*pairs, *captions]

    def _new_files(self, earlier: list[PartRef]) -> list[SetFile]:
        """The files that no earlier intake of this set had."""
        if isinstance(self.opened, Files):
            self.opened.leave_out(lambda name: self._rows.place(self._key(name)) is not None)
            return self.opened.files()
        known: set[SetFile] = set()
        for prefix in sorted({ref.name.rpartition("-")[0] for ref in earlier}):
            if not self.lake.root.exists(layout.image_set_record(prefix)):
                continue
            record = read_record(self.lake, prefix)
            if record.name == self.opened.config.name:
                known |= set(record.files)
        return [file for file in self.opened.files() if file not in known]

    def _part(self, index: int, file: SetFile) -> tuple[PartRef, PartRef]:
        """One file's pairs and captions, unless they are committed; its shard where pictures are packed."""
        name = layout.part_name(self.prefix, index)
        basis = self.basis | {"intake": self.basis, "part": index}
        stale = self.on_stale
        made = committed_part(self.lake, "pairs", name, basis=basis, on_stale=stale)
        texts = committed_part(self.lake, "captions", name, round=0, basis=basis, on_stale=stale)
        if made is not None and texts is not None:
            self._known.remember(made, texts, own=True)
            self._remember_rows(made)
            self._num_rows += made.num_rows
            return made, texts
        clock = Clock()
        rows: list[tuple[dict[str, Any], Found]] = []
        samples = self._samples(file, rows, name)
        if self.opened.in_place:
            for _ in samples:
                pass
        else:
            _, ranges = write_shard(self.lake, name, samples)
            where = {each.key: each.offset for each in ranges}
            for pair, _ in rows:
                if pair["status"] == OK:
                    pair["offset"] = where[pair["key"]]
        self._num_rows += len(rows)
        return self._commit(name, basis, rows, clock)

    def _samples(
        self, file: SetFile, rows: list[tuple[dict[str, Any], Found]], shard: str
    ) -> Iterator[Sample]:
        """The pictures of a file that are kept; a pair for each row is put into `rows`, with what was found."""
        coming: deque[Found] = deque()

        def in_order() -> Iterator[Looked]:
            found_rows = self._unknown(self.opened.rows(file))
            for found, looked in self._lookers.looked_at(found_rows, self._read, _num_bytes):
                coming.append(found)
                yield looked

        for looked in safe_rows(in_order(), self.config.safety):
            found = coming.popleft()
            pair = looked.pair | {"row": self._num_rows + len(rows)}
            gone = self._purged.outcome_of_address(pair["url"])
            if gone is not None:
                pair |= dict.fromkeys(OF_THE_IMAGE) | gone
            rows.append((pair, found))
            if gone or looked.image is None or looked.looks is None:
                continue
            gone = self._purged.outcome(pair["image_id"])
            if gone is not None:
                pair |= dict.fromkeys(OF_THE_IMAGE) | gone
                continue
            refused = self._known.refusal(pair["image_id"], pair["key"], looked.looks)
            if refused is not None:
                pair |= {"status": refused[0], "reason": refused[1]}
                continue
            pair |= {"shard": shard, "offset": found.offset, "size": len(looked.image)}
            meta = {name: pair[name] for name in ("url", "alt_text", "source_name", "image_id")}
            yield Sample(key=pair["key"], image=looked.image, ext=looked.ext, meta=meta)

    def _unknown(self, found: Iterator[Found]) -> Iterator[Found]:
        """Rows that neither an earlier intake nor this one had."""
        for each in found:
            if self._rows.add(self._key(each.name), each.name) is None:
                yield each

    def _key(self, name: str) -> str:
        """The key of a row: of its place in the set, which texts do not change."""
        return ids.pair_key(self.opened.config.name, name, None)

    def _pair(self, found: Found) -> dict[str, Any]:
        url = found.url or found.name
        extra = {"name": found.name, **found.extra}
        pair: dict[str, Any] = {
            "key": self._key(found.name),
            "pool": "web",
            "source_name": self.opened.config.name,
            "url": url,
            "alt_text": found.texts[0] if found.texts else None,
            "status": found.status,
            "reason": found.reason,
            "attempts": 0,
            "licence": found.licence,
            "extra": json.dumps(extra, sort_keys=True, default=str, ensure_ascii=False),
        }
        return pair

    def _read(self, found: Found) -> tuple[dict[str, Any], bytes | None]:
        """The pair of a row, and its picture when there is one; called from several threads."""
        pair = self._pair(found)
        if pair["status"] is not None or found.image is not None:
            return pair, found.image
        assert found.file is not None
        try:
            return pair, self.opened.root.read_bytes(found.file)
        except FileNotFoundError:
            return pair | {"status": "lost", "reason": "its file went while the set was read"}, None

    def _commit(
        self, name: str, basis: Basis, rows: list[tuple[dict[str, Any], Found]], clock: Clock
    ) -> tuple[PartRef, PartRef]:
        """The captions first: a shard counts as done when its pairs are committed too."""
        pairs = [pair for pair, _ in rows]
        given, planned = [found.texts for _, found in rows], [_NOT_PLANNED] * len(pairs)
        self._texts.unite(pairs, planned)
        captions = self._texts.captions(pairs, planned, given)
        num_ok = sum(pair["status"] == OK for pair in pairs)
        texts = commit_part(
            self.lake,
            "captions",
            name,
            rows_table("captions", captions),
            round=0,
            basis=basis,
            counts=counts_of_texts(pairs, captions, given),
            clock=clock,
        )
        reasons = Counter(pair["status"] for pair in pairs if pair["status"] != OK)
        counts = Counts(num_in=len(pairs), num_ok=num_ok, reasons=dict(sorted(reasons.items())))
        table = rows_table("pairs", pairs)
        made = commit_part(self.lake, "pairs", name, table, basis=basis, counts=counts, clock=clock)
        self._known.made(pairs, captions)
        return made, texts

    def _remember_rows(self, pairs: PartRef) -> None:
        for batch in iter_part(self.lake, pairs, ["key", "source_name"]):
            rows = batch.to_pylist()
            own = self.opened.config.name
            self._rows.add_all(
                (row["key"] for row in rows if row["source_name"] == own), pairs.name
            )


def _basis(opened: OpenedSet, download: DownloadConfig, earlier: list[PartRef]) -> Basis:
    config = opened.config
    settings = download.data_settings() | {
        "name": config.name,
        "format": opened.format,
        "fields": [config.image_column, config.caption_column, config.url_column],
        "licence_column": config.licence_column,
        "splits": None if config.splits is None else list(config.splits),
    }
    listing = hashlib.sha256(json.dumps(opened.listing()).encode()).hexdigest()[:32]
    inputs = [f"files {listing}", *(ref.fingerprint for ref in earlier)]
    return basis_of("adopt_images", STAGE_VERSION, settings, inputs)


def _drop_outdated(lake: Lake, own: list[PartRef], basis: Basis, on_stale: OnStale) -> None:
    """Forget what this round took in of the set before, when it gave nothing or is to be taken in anew."""
    changed = any(explain(part_manifest(lake, ref).basis.get("intake", {}), basis) for ref in own)
    gave_nothing = not num_ok_of(lake, own)
    if not changed or not (gave_nothing or on_stale == "rebuild"):
        return
    names = {ref.name for ref in own}
    for ref in [*own, *(t for t in list_parts(lake, "captions", 0) if t.name in names)]:
        drop_part(lake, ref)


def _num_bytes(found: Found) -> int:
    """Of the picture; a file, which is still to be read, counts as one of usual size."""
    return len(found.image or b"") if found.file is None else FILE_BYTES
