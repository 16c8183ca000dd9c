"""A lake: a root, its schema version, its lock, and scratch space on this machine."""

import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage import layout
from storage.errors import (
    CorruptData,
    LakeNotFound,
    NotWritable,
    PurgeUnfinished,
    SchemaVersionError,
)
from storage.fs import Root, explained_at
from storage.lock import hold_local, hold_remote
from storage.schemas import SCHEMA_VERSION

logger = logging.getLogger(__name__)


class Lake:
    """An opened lake; make one with `Lake.open`."""

    def __init__(
        self, root: Root, lake_id: str, read_only: bool, scratch_root: Path | None = None
    ) -> None:
        self.root = root
        self.scratch_root = scratch_root
        self.lake_id = lake_id
        self.read_only = read_only
        self.lock_fd: int | None = None
        """Descriptor of the lock while this process holds it on a local disk; processes that share its work inherit it."""

    def __repr__(self) -> str:
        return f"Lake({self.root.uri!r})"

    @classmethod
    def open(
        cls,
        uri: str,
        create: bool = False,
        read_only: bool = False,
        storage_options: dict[str, Any] | None = None,
        scratch_root: Path | None = None,
    ) -> "Lake":
        """Open the lake at a local path or fsspec URI; unfinished work goes below `scratch_root`.

        Raises LakeNotFound when there is none and `create` is false, SchemaVersionError when it
        was written by another version, NotWritable when it cannot be made.
        """
        root = Root(str(uri), storage_options)
        if not root.exists(layout.LAKE):
            if not create:
                raise LakeNotFound(
                    f"no lake at {root.uri}: it has no {layout.LAKE}; check the address (--lake), "
                    "or run the ingest stage to make one there"
                )
            _create(root)
        return cls(root, _read_identity(root), read_only, scratch_root)

    @property
    def uri(self) -> str:
        """Its address: an absolute path when local, else the URI."""
        return self.root.uri

    @contextmanager
    def lock(self, purpose: str, *, half_purged: bool = False) -> Iterator[None]:
        """Hold the lake for one run; LakeBusy names whoever holds it already.

        On a local disk the operating system frees the lock with the process, however it ends.
        On an object store the holder renews it, and a lock not renewed for ten minutes is free.

        Raises PurgeUnfinished where a purge was begun and not finished, unless that is no obstacle (`half_purged`).
        """
        if self.read_only:
            raise NotWritable(f"lake {self.uri} was opened read-only; open it for writing")
        hold = hold_local if self.root.is_local else hold_remote
        with hold(self.root, layout.LOCK, purpose) as self.lock_fd:
            try:
                if not half_purged and self.root.exists(layout.PURGE_BEGUN):
                    raise PurgeUnfinished(
                        f"a purge of {self.uri} was begun and not finished: run `bootstrap purge --resume` (the same "
                        "purge again does it too), then this command"
                    )
                yield
            finally:
                self.lock_fd = None

    def scratch(self, *parts: str) -> Path:
        """A folder on this machine for unfinished work; it is created and outlives the process.

        Inside the lake when that is local and no scratch_root was given; otherwise below that
        folder, BOOTSTRAP_SCRATCH or the temporary folder, by lake, so that a killed stage finds
        its work again.
        """
        work = None if self.scratch_root else self.root.local_path(layout.WORK)
        if work is None:
            base = self.scratch_root or os.environ.get("BOOTSTRAP_SCRATCH", tempfile.gettempdir())
            name = hashlib.sha256(self.uri.encode()).hexdigest()[:12]
            work = Path(base).resolve() / f"bootstrap-{name}"
        folder = work.joinpath(*parts)
        with explained_at(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        return folder


def _create(root: Root) -> None:
    record = {
        "schema_version": SCHEMA_VERSION,
        "lake_id": uuid.uuid4().hex,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    root.write_bytes(layout.LAKE, json.dumps(record, indent=2).encode())
    logger.info("made a lake at %s", root.uri)


def _read_identity(root: Root) -> str:
    try:
        record = json.loads(root.read_bytes(layout.LAKE))
        version, lake_id = record["schema_version"], str(record["lake_id"])
    except (ValueError, KeyError, TypeError) as err:
        raise CorruptData(
            f"{root.uri}/{layout.LAKE} is not readable ({err}); restore it from a copy, or write "
            f'{{"schema_version": {SCHEMA_VERSION}, "lake_id": "restored"}} into it'
        ) from err
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"lake {root.uri} has schema version {version}, this program reads and writes "
            f"{SCHEMA_VERSION}; use the release that wrote it, or start another lake"
        )
    return lake_id
