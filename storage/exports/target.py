"""The folder that an export is written into: what is done of it, and nothing else inside.

    export.json                 the commit record, written last: what it was made from, every file
    README.md  croissant.json   what people and programs are told of it
    _export/plan.json           what it is made from, while it is being written
    _export/piece-00000.json    the record of a finished piece
    _export/piece-00000.*       what a JSON format puts together at the end

A piece is done when its record is there. Names that begin with a dot are let be: an export may be
written into a checked-out repository of a hub.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.errors import ConfigError, CorruptData, StaleOutput
from storage.fingerprint import Basis, explain, fingerprint_of
from storage.fs import Root
from storage.lock import hold_local, hold_remote
from storage.tables import OnStale, file_sha256

logger = logging.getLogger(__name__)

DONE = "export.json"
LEDGER = "_export"
PLAN = f"{LEDGER}/plan.json"
LOCK = f"{LEDGER}/lock"
CARD = "README.md"
CROISSANT = "croissant.json"
LOST = "not_exported.jsonl"
OWN_NAMES = {DONE, LEDGER, CARD, CROISSANT, LOST}
"""Top-level names of every export, beside those of its format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file of the export."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceRecord:
    """A finished piece: some images in a row, with what became of them."""

    index: int
    first_image: int
    """Images written by the pieces before it."""
    num_images: int
    num_texts: int
    files: tuple[File, ...] = ()
    """Files that the piece alone makes; images that lie beside a JSON are not listed."""
    lost: tuple[Mapping[str, Any], ...] = ()
    """Images that could not be read: image_id, shard, num_texts, reason."""


class Target:
    """The folder of one export, opened for one basis."""

    def __init__(
        self, uri: str, basis: Basis, contents: Mapping[str, Collection[str] | None]
    ) -> None:
        """`contents`: top-level names that the format writes; of a folder what may be in it, None for anything."""
        self.root = Root(uri, what="target")
        self.basis = json.loads(json.dumps(basis))
        self.contents = dict(contents)

    @property
    def uri(self) -> str:
        """Its address."""
        return self.root.uri

    def check(self, on_stale: OnStale = "error") -> bool:
        """Whether the whole export is there already; nothing is changed.

        Raises ConfigError when the folder holds something that is not an export, or more than it,
        StaleOutput when it holds another export and `on_stale` is not "rebuild".
        """
        if self.root.exists("") and self.root.fs.isfile(self.root.path("")):
            raise ConfigError(f"target {self.uri} is a file; name a folder that is new or empty")
        found = self._names("")
        record = self._record()
        if record is None:
            if set(found) - {LEDGER}:
                raise ConfigError(
                    f"target {self.uri} holds something that is not an export: {_shown(found)}; "
                    "name a folder that is new or empty, or move these away"
                )
            return False
        if not self._is_ours(record):
            differs = explain(record.get("basis", {}), self.basis) or [f"{DONE} is not readable"]
            if on_stale == "rebuild":
                return False
            raise StaleOutput(
                f"target {self.uri} holds another export: {'; '.join(differs)}; name another "
                "folder, give the old values, or add --on-stale rebuild to replace it"
            )
        self._refuse_more(found)
        return self.root.exists(DONE)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder: two exports into one would mix."""
        path = self.root.local_path(LEDGER)
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
        hold = hold_local if self.root.is_local else hold_remote
        with hold(self.root, LOCK, "export", "target"):
            yield
        if self.root.exists(DONE):
            self.root.remove(LEDGER)

    def begin(self) -> None:
        """Say what is going to be written here; hold the folder.

        Another export is removed, and so are unfinished writes of a killed process.
        """
        record = self._record()
        if record is not None and not self._is_ours(record):
            logger.info("replacing the export %s", self.uri)
            self._write_json(PLAN, record)  # a kill from here on still leaves an export
            for name in (DONE, *OWN_NAMES - {DONE, LEDGER}, *record.get("contents", ())):
                self.root.remove(name)
        self.root.sweep("", max_depth=1)
        for name, inside in self.contents.items():
            if inside is not None:
                self.root.sweep(name)
        if record is None or not self._is_ours(record):
            for name in self.root.list(LEDGER):
                if f"{LEDGER}/{name}" != LOCK:
                    self.root.remove(f"{LEDGER}/{name}")
            self._write_json(PLAN, self._head())

    def piece(self, index: int) -> PieceRecord | None:
        """The record of a piece, None when it is not done or a file of it is not as it was."""
        record = self._json(f"{LEDGER}/piece-{index:05d}.json")
        if record is None:
            return None
        made = piece_record(record)
        return made if all(self._is_there(file) for file in made.files) else None

    def finish_piece(self, record: PieceRecord) -> None:
        """Commit a piece."""
        self._write_json(f"{LEDGER}/piece-{record.index:05d}.json", asdict(record))

    def finish(self, record: Mapping[str, Any]) -> None:
        """Commit the export."""
        self._write_json(DONE, self._head() | dict(record))

    def done(self) -> dict[str, Any]:
        """The commit record; CorruptData when there is none."""
        record = self._json(DONE)
        if record is None:
            raise CorruptData(f"export {self.uri} has lost its {DONE}; run the same command again")
        return record

    def reopen(self, pieces: Sequence[PieceRecord], again: Collection[int]) -> None:
        """Take back the commit; the pieces of which `again` has the index are to be made anew.

        All are where pieces leave nothing but what a JSON was put together from.
        """
        self._write_json(PLAN, self._head())
        for piece in pieces:
            if piece.files and piece.index not in again:
                self.finish_piece(piece)
            else:
                self.forget_piece(piece.index)
        self.root.remove(DONE)

    def forget_piece(self, index: int) -> None:
        """Take back the commit of a piece."""
        self.root.remove(f"{LEDGER}/piece-{index:05d}.json")

    @contextmanager
    def staged(self, rel: str) -> Iterator["Staged"]:
        """A local file to write; when the block ends it is `rel`, and `files` has its record."""
        with self.root.staged(rel) as tmp:
            staged = Staged(path=tmp)
            yield staged
            sha256 = file_sha256(tmp)
            staged.files = (File(path=rel, num_bytes=tmp.stat().st_size, sha256=sha256),)

    def write_text(self, rel: str, text: str) -> tuple[File, ...]:
        """Write a small file whole."""
        with self.staged(rel) as staged:
            staged.path.write_text(text, "utf-8")
        return staged.files

    def sha256(self, rel: str) -> str:
        """sha256 of a file, 64 hex digits; FileNotFoundError when it is absent."""
        digest = hashlib.sha256()
        with self.root.open(rel) as f:
            while block := f.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _head(self) -> dict[str, Any]:
        return {
            "fingerprint": fingerprint_of(self.basis),
            "basis": self.basis,
            "contents": sorted(self.contents),
        }

    def _record(self) -> dict[str, Any] | None:
        """What the folder says it holds: of a finished export, else of one that was begun."""
        done = self._json(DONE)
        return self._json(PLAN) if done is None else done

    def _is_ours(self, record: Mapping[str, Any]) -> bool:
        return record.get("fingerprint") == fingerprint_of(self.basis)

    def _names(self, rel_dir: str) -> list[str]:
        return [name for name in self.root.list(rel_dir) if not name.startswith(".")]

    def _refuse_more(self, found: Sequence[str]) -> None:
        more = [name for name in found if name not in OWN_NAMES and name not in self.contents]
        for folder, inside in self.contents.items():
            if inside:
                names = self._names(folder)
                more += [f"{folder}/{name}" for name in names if name not in inside]
        if more:
            raise ConfigError(
                f"target {self.uri} holds this export and something else: {_shown(more)}; move it "
                "away: who reads the export would read that too"
            )

    def _is_there(self, file: File) -> bool:
        try:
            return self.root.size(file.path) == file.num_bytes
        except FileNotFoundError:
            return False

    def _json(self, rel: str) -> dict[str, Any] | None:
        try:
            record = json.loads(self.root.read_bytes(rel))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            record = None
        return record if isinstance(record, dict) else {}

    def _write_json(self, rel: str, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
        self.root.write_bytes(rel, f"{text}\n".encode())


@dataclass(kw_only=True, slots=True)
class Staged:
    """A file that is being written."""

    path: Path
    files: tuple[File, ...] = ()
    """Its record, set when it is written."""


def piece_record(record: Mapping[str, Any]) -> PieceRecord:
    """A piece's record from its JSON."""
    files = tuple(File(**file) for file in record["files"])
    return PieceRecord(**{**record, "files": files, "lost": tuple(record["lost"])})


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
