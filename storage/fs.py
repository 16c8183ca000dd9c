"""The root of a lake on any fsspec file system, with atomic writes.

A path is posix and relative to the root. On a local disk a write goes to `_tmp-*` in the same
folder, is synced, then renamed; on an object store it is one PUT. Readers therefore see the old
bytes or the new ones, never half of either.
"""

import errno
import io
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import ConfigError, NotWritable, StorageFull, TransientError
from storage.store_errors import is_past_the_end, store_named

TMP_PREFIX = "_tmp-"
"""Names that begin so are unfinished writes: no listing shows them, `sweep` removes them."""

Names = list[str]
"""Sorted names or paths; spelt so because `Root.list` hides the builtin inside the class."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


class Root:
    """A folder on an fsspec file system; every path given to it is relative to that folder."""

    def __init__(
        self, uri: str, storage_options: dict[str, Any] | None = None, what: str = "lake"
    ) -> None:
        """Name the folder, and for errors what it is; nothing is created and nothing is read."""
        try:
            self.fs, base = fsspec.core.url_to_fs(uri, **(storage_options or {}))
        except (ImportError, ValueError) as err:
            raise ConfigError(
                f"{what} {uri!r}: no file system for this address ({err}); install the extra that "
                "brings it (s3, gcs) or give a local folder"
            ) from err
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.base = os.path.abspath(base) if self.is_local else base.rstrip("/")
        self.uri = self.base if self.is_local else uri.rstrip("/")

    def __repr__(self) -> str:
        return f"Root({self.uri!r})"

    def path(self, rel: str) -> str:
        """The full path of `rel` in the terms of the file system."""
        parts = PurePosixPath(rel).parts
        if ".." in parts or rel.startswith("/"):
            raise ConfigError(f"path {rel!r} leaves the lake {self.uri}; give a path inside it")
        return f"{self.base}/{rel}" if rel not in ("", ".") else self.base

    def local_path(self, rel: str) -> Path | None:
        """The path on this machine's disk, or None when the lake is not local."""
        return Path(self.path(rel)) if self.is_local else None

    def exists(self, rel: str) -> bool:
        """Whether there is a file or folder of that name."""
        with explained(self, rel):
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self.path(rel)))

    def is_file(self, rel: str) -> bool:
        """Whether there is a file of that name, and not a folder."""
        with explained(self, rel):
            return bool(self.fs.isfile(self.path(rel)))

    def size(self, rel: str) -> int:
        """Bytes of a file; FileNotFoundError when absent."""
        with explained(self, rel):
            self.fs.invalidate_cache()
            return int(self.fs.info(self.path(rel))["size"])

    def modified(self, rel: str) -> datetime:
        """When a file was written, by the clock of whoever keeps it; FileNotFoundError when absent."""
        with explained(self, rel):
            self.fs.invalidate_cache()
            return cast(datetime, self.fs.modified(self.path(rel)))

    def open(self, rel: str) -> BinaryIO:
        """Open a file for reading."""
        with explained(self, rel):
            file = cast(BinaryIO, self.fs.open(self.path(rel), "rb"))
        return file if self.is_local else cast(BinaryIO, _StoredFile(self, rel, file))

    def read_bytes(self, rel: str) -> bytes:
        """A whole file; FileNotFoundError when absent."""
        with explained(self, rel):
            return cast(bytes, self.fs.cat_file(self.path(rel)))

    def read_many(self, rels: Names) -> list[bytes | None]:
        """Whole files, on a store several at a time; None for those that are absent."""
        if self.is_local:
            return [self._read_or_none(rel) for rel in rels]
        paths = [self.path(rel) for rel in rels]
        with explained(self, ""):
            found = self.fs.cat(paths, on_error="return") if paths else {}
            for read in found.values():
                if isinstance(read, Exception) and not isinstance(read, FileNotFoundError):
                    raise read
        by_path = {str(path).strip("/"): read for path, read in found.items()}
        read_as = (by_path[path.strip("/")] for path in paths)
        return [read if isinstance(read, bytes) else None for read in read_as]

    def read_range(self, rel: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer when the file ends before."""
        with explained(self, rel):
            try:
                found = self.fs.cat_file(self.path(rel), start=offset, end=offset + size)
            except OSError as err:
                if not is_past_the_end(err):
                    raise
                return b""
            return cast(bytes, found)

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write a whole file, atomically."""
        if not self.is_local:
            with explained(self, rel):
                self.fs.pipe_file(self.path(rel), data)
            return
        with self.staged(rel) as tmp, explained(self, rel):
            tmp.write_bytes(data)

    def write_many(self, files: Mapping[str, bytes]) -> None:
        """Write many whole files, on a store several at a time; a kill may leave some half written."""
        with explained(self, ""):
            if self.is_local:
                for folder in {PurePosixPath(self.path(rel)).parent for rel in files}:
                    Path(folder).mkdir(parents=True, exist_ok=True)
            self.fs.pipe({self.path(rel): data for rel, data in files.items()})

    def put_file(self, local: Path, rel: str) -> None:
        """Copy a local file into the lake, atomically."""
        with explained(self, rel):
            if self.is_local:
                target = Path(self.path(rel))
                target.parent.mkdir(parents=True, exist_ok=True)
                tmp = target.with_name(f"{TMP_PREFIX}{uuid.uuid4().hex}-{target.name}")
                try:
                    with local.open("rb") as source, tmp.open("wb") as sink:
                        while block := source.read(1 << 20):
                            sink.write(block)
                    _publish(tmp, target)
                finally:
                    tmp.unlink(missing_ok=True)
            else:
                self.fs.put_file(str(local), self.path(rel))

    @contextmanager
    def staged(self, rel: str) -> Iterator[Path]:
        """A local path to write to; it becomes `rel` when the block ends without an error."""
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="bootstrap-") as folder:
                tmp = Path(folder) / PurePosixPath(rel).name
                yield tmp
                self.put_file(tmp, rel)
            return
        target = Path(self.path(rel))
        tmp = target.with_name(f"{TMP_PREFIX}{uuid.uuid4().hex}-{target.name}")
        try:
            with explained(self, rel):
                target.parent.mkdir(parents=True, exist_ok=True)
            yield tmp
            with explained(self, rel):
                _publish(tmp, target)
        finally:
            with explained(self, rel):
                tmp.unlink(missing_ok=True)

    def get_file(self, rel: str, local: Path) -> None:
        """Copy a file of the lake to this machine's disk, atomically."""
        local.parent.mkdir(parents=True, exist_ok=True)
        tmp = local.with_name(f"{TMP_PREFIX}{uuid.uuid4().hex}-{local.name}")
        try:
            with explained(self, rel):
                self.fs.get_file(self.path(rel), str(tmp))
                _publish(tmp, local)
        finally:
            tmp.unlink(missing_ok=True)

    def list(self, rel_dir: str) -> Names:
        """Sorted names in a folder, unfinished writes excluded; empty when it is absent."""
        with explained(self, rel_dir):
            names = [PurePosixPath(p).name for p in self._ls(rel_dir)]
        return sorted(n for n in names if not n.startswith(TMP_PREFIX))

    def list_recursive(self, rel_dir: str) -> Names:
        """Sorted relative paths of all files below a folder, unfinished writes excluded."""
        return list(self.sizes(rel_dir))

    def sizes(self, rel_dir: str = "") -> dict[str, int]:
        """Bytes of all files below a folder by relative path, sorted, unfinished writes excluded: on a store one request."""
        with explained(self, rel_dir):
            self.fs.invalidate_cache()
            found = self.fs.find(self.path(rel_dir), detail=True)
        prefix = len(self.path("").rstrip("/")) + 1
        sizes = {str(path)[prefix:]: int(info["size"] or 0) for path, info in found.items()}
        return {
            rel: size
            for rel, size in sorted(sizes.items())
            if not PurePosixPath(rel).name.startswith(TMP_PREFIX)
        }

    def remove(self, rel: str) -> None:
        """Remove a file or a folder with what is in it; nothing happens when it is absent."""
        with explained(self, rel):
            self.fs.invalidate_cache()
            if self.fs.exists(self.path(rel)):
                self.fs.rm(self.path(rel), recursive=True)

    def sweep(self, rel_dir: str, max_depth: int | None = None) -> int:
        """Remove unfinished writes below a folder (hold the lake's lock); how many there were.

        With `max_depth` only so many folders down: 1 is the folder itself.
        """
        with explained(self, rel_dir):
            self.fs.invalidate_cache()
            found = [str(p) for p in self.fs.find(self.path(rel_dir), maxdepth=max_depth)]
            tmp = [p for p in found if PurePosixPath(p).name.startswith(TMP_PREFIX)]
            for path in tmp:
                self.fs.rm_file(path)
        return len(tmp)

    def _read_or_none(self, rel: str) -> bytes | None:
        try:
            return self.read_bytes(rel)
        except FileNotFoundError:
            return None

    def _ls(self, rel_dir: str) -> Names:
        self.fs.invalidate_cache()
        try:
            return [str(p).rstrip("/") for p in self.fs.ls(self.path(rel_dir), detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []


class _StoredFile(io.RawIOBase):
    """A file of a store that is being read: it is asked for as it is read, so what goes wrong does so then."""

    def __init__(self, root: Root, rel: str, file: BinaryIO) -> None:
        self._root, self._rel, self._file = root, rel, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        with explained(self._root, self._rel):
            return self._file.read(size)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def explained(root: Root, rel: str) -> Iterator[None]:
    """Turn what the file system says into an error with the path and a remedy."""
    with explained_at(f"{root.uri}/{rel}".rstrip("/")):
        yield


@contextmanager
def explained_at(where: str) -> Iterator[None]:
    """The same for an address that belongs to no root, such as a scratch folder's."""
    try:
        with store_named(where):
            yield
    except (ConnectionError, TimeoutError) as err:
        raise TransientError(f"{where}: {err}; it may pass, try again") from err
    except OSError as err:
        if err.errno in _FULL:
            raise StorageFull(
                f"{where}: no space left ({os.strerror(err.errno or 0)}); free some space and run "
                "the same command again: what is committed stays, the rest is made anew"
            ) from err
        if err.errno in _DENIED:
            raise NotWritable(
                f"{where}: {os.strerror(err.errno or 0)}; give this user the right to write there, "
                "or name another lake"
            ) from err
        raise


def _publish(tmp: Path, target: Path) -> None:
    """Make `tmp` durable, then let it take the place of `target`."""
    with tmp.open("rb+") as f:
        os.fsync(f.fileno())
    tmp.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
