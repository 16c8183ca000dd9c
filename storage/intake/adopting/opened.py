"""A set as it is opened: which files it has, in which shape, and the rows of each."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from glob import escape, has_magic
from pathlib import PurePosixPath

from storage.adopted import SetFile
from storage.errors import ConfigError, EmptyInput
from storage.fs import Root
from storage.intake.adopting import embedded
from storage.intake.adopting.found import IMAGE_ENDINGS, Fields, Found
from storage.intake.adopting.image_set import ImageSetConfig
from storage.intake.adopting.listing import Listed, from_captions, from_folder
from storage.intake.adopting.tars import is_tar, read_statistics, read_tar

logger = logging.getLogger(__name__)


class OpenedSet(ABC):
    """A set whose files were listed."""

    in_place = False
    """Whether pictures stay where they are, in tars."""
    format = ""

    def __init__(self, config: ImageSetConfig, root: Root, max_bytes: int) -> None:
        self.config, self.root, self.max_bytes = config, root, max_bytes
        self.fields = Fields(
            caption=config.caption_column,
            url=config.url_column,
            licence=config.licence_column,
            image=config.image_column,
        )

    @abstractmethod
    def files(self) -> list[SetFile]:
        """What becomes a shard each, in order."""

    def listing(self) -> list[tuple[object, ...]]:
        """What tells this set from the same one with other files or texts."""
        return [(file.path, file.size, file.first, file.last) for file in self.files()]

    @abstractmethod
    def rows(self, file: SetFile) -> Iterator[Found]:
        """The rows of one of them."""


class Tars(OpenedSet):
    """img2dataset's and other webdataset tars."""

    in_place = True

    def __init__(
        self, config: ImageSetConfig, root: Root, max_bytes: int, sizes: dict[str, int]
    ) -> None:
        super().__init__(config, root, max_bytes)
        self._sizes = sizes
        beside = {path for path in sizes if path.endswith(".parquet")}
        given = config.format if config.format != "auto" else None
        self._tars = [path for path in sizes if is_tar(path)]
        has_tables = any(_table_of(tar) in beside for tar in self._tars)
        self.format = given or ("img2dataset" if has_tables else "webdataset")
        self._beside = beside if self.format == "img2dataset" else set()

    def files(self) -> list[SetFile]:
        """As `OpenedSet.files`."""
        return [SetFile(path=tar, size=self._sizes[tar]) for tar in self._tars]

    def listing(self) -> list[tuple[object, ...]]:
        """As `OpenedSet.listing`, with what lies beside the tars."""
        return [(tar, self._sizes[tar], self._sizes.get(_table_of(tar))) for tar in self._tars]

    def rows(self, file: SetFile) -> Iterator[Found]:
        """As `OpenedSet.rows`."""
        table, path = {}, _table_of(file.path)
        if path in self._beside:
            with self.root.open(path) as f:
                table = read_statistics(f, f"{self.root.uri}/{path}")
        elif self.format == "img2dataset":
            logger.warning(
                "%s has no Parquet file beside it: rows that failed are not known", file.path
            )
        with self.root.open(file.path) as f:
            yield from read_tar(f, file.path, self.fields, self.max_bytes, table)


class Embedded(OpenedSet):
    """Parquet files that hold the pictures."""

    format = "hf"

    def __init__(
        self,
        config: ImageSetConfig,
        root: Root,
        max_bytes: int,
        sizes: dict[str, int],
        shard_rows: int,
    ) -> None:
        super().__init__(config, root, max_bytes)
        self._sizes, self._shard_rows = sizes, shard_rows

    def files(self) -> list[SetFile]:
        """As `OpenedSet.files`."""
        found = []
        for path in self._sizes:
            if not path.endswith(".parquet"):
                continue
            with self.root.open(path) as f:
                rows = embedded.num_rows(f, f"{self.root.uri}/{path}", self.fields)
            found += [
                SetFile(
                    path=path,
                    size=self._sizes[path],
                    first=first,
                    last=min(first + self._shard_rows, rows),
                )
                for first in range(0, rows, self._shard_rows)
            ]
        return found

    def rows(self, file: SetFile) -> Iterator[Found]:
        """As `OpenedSet.rows`."""
        assert file.last is not None
        with self.root.open(file.path) as f:
            yield from embedded.read_rows(
                f, file.path, self.fields, self.max_bytes, file.first, file.last
            )


class Files(OpenedSet):
    """Pictures in files, with texts beside them or in a captions file."""

    def __init__(
        self,
        config: ImageSetConfig,
        root: Root,
        max_bytes: int,
        listed: list[Listed],
        format: str,
        shard_rows: int,
    ) -> None:
        super().__init__(config, root, max_bytes)
        self._all = self._listed = listed
        self.format, self._shard_rows = format, shard_rows

    def leave_out(self, is_known: Callable[[str], bool]) -> None:
        """Forget pictures that were taken in before, by their names."""
        self._listed = [each for each in self._listed if not is_known(each.image)]

    def files(self) -> list[SetFile]:
        """As `OpenedSet.files`."""
        step = self._shard_rows
        return [
            SetFile(
                path="",
                size=sum(each.size for each in self._listed[first : first + step]),
                first=first,
                last=min(first + step, len(self._listed)),
            )
            for first in range(0, len(self._listed), step)
        ]

    def listing(self) -> list[tuple[object, ...]]:
        """As `OpenedSet.listing`, texts included."""
        return [(each.image, each.size, each.texts, each.beside) for each in self._all]

    def rows(self, file: SetFile) -> Iterator[Found]:
        """As `OpenedSet.rows`."""
        for each in self._listed[file.first : file.last]:
            yield each.found(self.root, self.fields, self.max_bytes)


def open_set(config: ImageSetConfig, *, shard_rows: int, max_bytes: int) -> OpenedSet:
    """List the files of a set and find out its shape.

    Raises ConfigError when it is not there or has no shape that is known, EmptyInput when there is nothing in it.
    """
    root, pattern = _root_of(config)
    sizes = {path: size for path, size in root.sizes().items() if _is_meant(path, pattern)}
    if not sizes:
        raise EmptyInput(
            f"image set {config.name}: no file {f'matches {config.path}' if pattern else f'below {config.path}'}; check the path"
        )
    if config.captions is not None:
        listed, shape = from_captions(config, sizes)
        return Files(config, root, max_bytes, listed, shape, shard_rows)
    endings = {PurePosixPath(path).suffix.lower().lstrip(".") for path in sizes}
    shape = config.format
    if shape in ("auto", "img2dataset", "webdataset") and "tar" in endings:
        return Tars(config, root, max_bytes, sizes)
    if shape in ("auto", "folder") and endings & IMAGE_ENDINGS:
        listed = from_folder(config, root, sizes)
        return Files(config, root, max_bytes, listed, "folder", shard_rows)
    if shape in ("auto", "hf") and "parquet" in endings:
        return Embedded(config, root, max_bytes, sizes, shard_rows)
    packed = [path for path in sizes if path.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2"))]
    wanted = {
        "auto": "tars, Parquet files or pictures",
        "hf": "Parquet files",
        "folder": "pictures",
    }
    hint = (
        f"; {packed[0]} is compressed, and nothing can point into it: unpack it to a .tar"
        if packed
        else "; name another folder, or the right format"
    )
    raise ConfigError(
        f"image set {config.name}: among {len(sizes)} files of {config.path} are no {wanted.get(shape, 'tars')}{hint}"
    )


def _root_of(config: ImageSetConfig) -> tuple[Root, str | None]:
    """The folder of a set, and the pattern that its files have to match, relative to it."""
    steps = config.path.split("/")
    fixed = next((n for n, step in enumerate(steps) if has_magic(step)), None)
    if fixed is not None:
        return _root_at("/".join(steps[:fixed]) or "."), "/".join(steps[fixed:])
    root = _root_at(config.path)
    if root.is_file(""):
        return _root_at("/".join(steps[:-1]) or "."), escape(steps[-1])
    return root, None


def _root_at(folder: str) -> Root:
    return Root(folder, what="image set")


def _is_meant(path: str, pattern: str | None) -> bool:
    """Whether a file belongs to the set; what img2dataset wrote beside a tar belongs to it."""
    own = (
        [path, str(PurePosixPath(path).with_suffix(".tar"))]
        if path.endswith(".parquet")
        else [path]
    )
    return pattern is None or any(fnmatchcase(each, pattern) for each in own)


def _table_of(tar: str) -> str:
    return str(PurePosixPath(tar).with_suffix(".parquet"))
