"""The files of a store as one connection of DuckDB sees them: listed once.

DuckDB opens each file again for every view that stands on it, and asks for its size and age each time: that many
requests a query, one after the other, take longer on a store than the query itself.
"""

import inspect
from datetime import datetime
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from storage import layout
from storage.fs import Root


class ListedFiles(AbstractFileSystem):  # type: ignore[misc]
    """A root's file system, for reading; what it lists when it is first asked holds as long as it lives."""

    cachable = False

    def __init__(self, root: Root) -> None:
        super().__init__()
        self._fs = root.fs
        self._tables = root.path(layout.TABLES)
        self._listed: dict[str, dict[str, Any]] | None = None
        self._takes_size = "size" in inspect.signature(self._fs._open).parameters
        self.protocol = self._fs.protocol
        self._strip_protocol = self._fs._strip_protocol

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size and the rest of a file; FileNotFoundError when it was not there."""
        if self._listed is None:
            self._fs.invalidate_cache()
            self._listed = self._fs.find(self._tables, detail=True)
        name = self._strip_protocol(path)
        if name not in self._listed:
            self._listed[name] = self._fs.info(path)
        return self._listed[name]

    def modified(self, path: str) -> datetime:
        """When a file was written."""
        found = self.info(path).get("LastModified") or self._fs.modified(path)
        assert isinstance(found, datetime), f"{path} was written at {found!r}"
        return found

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        """What is in a folder."""
        return self._fs.ls(path, detail=detail, **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """A file, to be read."""
        if not (self._takes_size and mode == "rb"):
            return self._fs.open(path, mode, **options)
        known = self.info(path)
        file = self._fs.open(path, mode, size=known["size"], **options)
        # Where it keeps them, it asks for them before the first byte.
        if isinstance(file, AbstractBufferedFile):
            file.details = known
        return file
