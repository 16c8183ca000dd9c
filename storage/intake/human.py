"""Captioned image folders: human pairs to train on, and held-out ones to evaluate on.

Understood: COCO's captions JSON, Karpathy's split JSON, and tables (Parquet, CSV, JSONL) with an
image and a caption column. Images are packed into shards as they are.
"""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from storage import ids, layout
from storage.errors import ConfigError, EmptyInput
from storage.fingerprint import Basis, basis_of
from storage.intake.caption_files import CaptionedFile, read_caption_file
from storage.intake.images import inspect_image
from storage.intake.purged import PurgedImages
from storage.intake.records import IntakeRecord, finished_intake, remember_intake
from storage.intake.seen import SeenImages
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
    file_sha256,
    rows_table,
)

logger = logging.getLogger(__name__)

STAGE_VERSION = 1

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSetConfig:
    """A set of captioned pictures."""

    captions: str
    """The captions file on this machine."""
    images: str
    """The folder that the file's image names are relative to."""
    pool: Literal["human", "heldout"]
    name: str
    """Names its shards and parts; letters, digits, - and _."""
    format: Literal["auto", "coco", "karpathy", "table"] = "auto"
    image_column: str = "image"
    caption_column: str = "caption"
    splits: tuple[str, ...] | None = None
    """Which splits of a Karpathy file to take; None takes all."""
    shard_images: int = 1000
    """Images of a shard."""
    min_image_side_px: int = 1
    max_image_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.pool not in ("human", "heldout"):
            raise ConfigError(f"pool must be human or heldout, got {self.pool!r}")
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"name must be letters, digits, - and _, got {self.name!r}")
        if self.shard_images < 1:
            raise ConfigError(f"shard_images must be 1 or more, got {self.shard_images}")


@dataclass(slots=True)
class _Rows:
    """The rows that one shard gives to each table."""

    pairs: list[dict[str, Any]] = field(default_factory=list)
    captions: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def ingest_captions(
    lake: Lake,
    config: CaptionSetConfig,
    *,
    on_stale: OnStale = "error",
    on_progress: Progress | None = None,
) -> list[PartRef]:
    """Bring a set of captioned pictures into the lake; the pairs parts, then the captions parts.

    One pairs row for every picture, one captions row for every distinct text of it. Raises
    EmptyInput when there is no pair, ConfigError when pictures are absent or a row is malformed.
    """
    files = _present_files(config)
    source = f"{config.pool}-{config.name}"
    basis = _basis(config, files)
    done = finished_intake(lake, 0, source, basis, on_stale)
    if done is not None:
        return list(done.parts)
    pairs, captions = [], []
    folder = lake.scratch("intake")
    with SeenImages(folder) as seen, PurgedImages(lake, folder) as purged:
        for index, chunk in enumerate(_chunks(files, config.shard_images)):
            name = layout.part_name(source, index)
            part_basis = basis | {"inputs": [*basis["inputs"], name]}
            made = _ingest_shard(lake, config, name, chunk, index, part_basis, seen, purged)
            pairs.append(made[0])
            captions.append(made[1])
            if on_progress is not None:
                on_progress(min((index + 1) * config.shard_images, len(files)), len(files))
    parts = (*pairs, *captions)
    if sum(ref.num_rows for ref in captions) == 0:
        raise EmptyInput(
            f"{config.captions}: none of its {len(files)} pictures could be read; SELECT status, "
            f"reason FROM pairs WHERE pool = '{config.pool}' tells why"
        )
    remember_intake(lake, 0, source, IntakeRecord(basis=basis, parts=parts))
    return list(parts)


def _ingest_shard(
    lake: Lake,
    config: CaptionSetConfig,
    name: str,
    files: list[CaptionedFile],
    index: int,
    basis: Basis,
    seen: SeenImages,
    purged: PurgedImages,
) -> tuple[PartRef, PartRef]:
    """One shard with its two parts; the captions come first, so that pairs commits all."""
    clock = Clock()
    rows = _Rows()
    for i, file in enumerate(files):
        _add_file(config, name, index * config.shard_images + i, file, rows, seen, purged)
    made = committed_part(lake, "pairs", name, basis=basis, on_stale="rebuild")
    texts = committed_part(lake, "captions", name, round=0, basis=basis, on_stale="rebuild")
    if made is not None and texts is not None:
        return made, texts
    _, ranges = write_shard(lake, name, rows.samples)
    where = {r.key: r for r in ranges}
    for row in rows.pairs:
        if row["status"] == OK:
            row |= {"shard": name, "offset": where[row["key"]].offset}
    texts = commit_part(
        lake,
        "captions",
        name,
        rows_table("captions", rows.captions),
        round=0,
        basis=basis,
        clock=clock,
    )
    reasons = Counter(row["status"] for row in rows.pairs if row["status"] != OK)
    counts = Counts(
        num_in=len(files),
        num_ok=len(files) - reasons.total(),
        reasons=dict(sorted(reasons.items())),
    )
    made = commit_part(
        lake,
        "pairs",
        name,
        rows_table("pairs", rows.pairs),
        basis=basis,
        counts=counts,
        clock=clock,
    )
    return made, texts


def _add_file(
    config: CaptionSetConfig,
    shard: str,
    row: int,
    file: CaptionedFile,
    rows: _Rows,
    seen: SeenImages,
    purged: PurgedImages,
) -> None:
    """The rows of one picture."""
    data = Path(config.images, file.image).read_bytes()
    found = inspect_image(data, config.min_image_side_px, config.max_image_pixels)
    pair: dict[str, Any] = {
        "key": ids.pair_key(config.name, file.image, None),
        "pool": config.pool,
        "row": row,
        "source_name": config.name,
        "url": file.image,
        "status": found.status,
        "reason": found.reason,
        "attempts": 1,
    }
    rows.pairs.append(pair)
    if found.status != OK:
        return
    image_id = ids.image_id(data)
    gone = purged.outcome(image_id)
    if gone is not None:
        pair |= gone
        return
    pair |= {"image_id": image_id, "width": found.width, "height": found.height}
    assert found.looks is not None
    pair |= {"phash": found.looks.phash, "looks": found.looks.to_bytes(), "size": len(data)}
    first = seen.add(image_id, file.image)
    if first is not None:
        pair |= {"status": "duplicate_image", "reason": f"same picture as {first}", "size": None}
    else:
        meta = {"file": file.image, "captions": list(file.captions)}
        rows.samples.append(Sample(key=pair["key"], image=data, ext=found.ext, meta=meta))
    for text in dict.fromkeys(file.captions):
        caption_id = ids.caption_id(image_id, "human", text)
        # A copy of a picture often repeats the texts of the first.
        if first is None or seen.add(caption_id, file.image) is None:
            rows.captions.append(_caption(caption_id, image_id, text))
            seen.add(caption_id, file.image)


def _caption(caption_id: str, image_id: str, text: str) -> dict[str, Any]:
    return {
        "caption_id": caption_id,
        "image_id": image_id,
        "source": "human",
        "caption": text,
        "status": OK,
        "round": 0,
    }


def _present_files(config: CaptionSetConfig) -> list[CaptionedFile]:
    """What the captions file lists; every picture of it must be there.

    A human set is small (COCO: 120,000 pictures) and its JSON is read whole in any case.
    """
    path = Path(config.captions)
    files = read_caption_file(
        path, config.format, config.image_column, config.caption_column, config.splits
    )
    if not files:
        raise EmptyInput(
            f"{path} holds no pair of a picture and a caption; name a captions file that has some"
        )
    absent = [f.image for f in files if not Path(config.images, f.image).is_file()]
    if absent:
        shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise ConfigError(
            f"{path} names {len(absent)} of {len(files)} pictures that are not in {config.images}: "
            f"{shown}; name the folder that its paths are relative to, or remove those entries"
        )
    return files


def _basis(config: CaptionSetConfig, files: list[CaptionedFile]) -> Basis:
    """Settings without paths, the file's hash, and the sizes of the pictures."""
    settings = asdict(config)
    del settings["captions"], settings["images"]
    sizes = hashlib.sha256()
    for file in files:
        size = Path(config.images, file.image).stat().st_size
        sizes.update(f"{file.image} {size}\n".encode("utf-8", "surrogateescape"))
    captions = f"captions {file_sha256(Path(config.captions))[:32]}"
    return basis_of(
        "ingest_captions",
        STAGE_VERSION,
        settings,
        [captions, f"images {sizes.hexdigest()[:32]}"],
    )


def _chunks(files: Iterable[CaptionedFile], size: int) -> Iterator[list[CaptionedFile]]:
    rest = iter(files)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk
