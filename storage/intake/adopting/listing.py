"""Pictures in files: what their texts are, from files beside them or from a captions file."""

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from storage.errors import ConfigError
from storage.fs import Root
from storage.intake.adopting.found import (
    CAPTION_FIELDS,
    IMAGE_ENDINGS,
    TEXT_ENDINGS,
    Fields,
    Found,
    distinct,
)
from storage.intake.adopting.image_set import ImageSetConfig
from storage.intake.caption_files import read_caption_file
from storage.intake.url_list import open_table

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of `datasets`' ImageFolder: a column file_name, and others."""
_FILE_NAME = "file_name"


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A picture in a file of its own."""

    image: str
    """Relative to the root of the set."""
    size: int
    """Bytes; -1 when there is no such file."""
    texts: tuple[str, ...] = ()
    beside: tuple[tuple[str, int], ...] = ()
    """Files that hold texts of it, or a JSON record, with their bytes."""

    def found(self, root: Root, fields: Fields, max_bytes: int) -> Found:
        """The row, its texts read; the picture is left to whoever looks at it."""
        told, texts = fields.told({}), [*self.texts]
        for path, _ in self.beside:
            data = root.read_bytes(path)
            if path.endswith(".json"):
                told = fields.told(_record(data))
            else:
                texts += data.decode("utf-8", "replace").splitlines()
        told["texts"] = distinct([*texts, *told["texts"]])
        if self.size < 0:
            return Found(name=self.image, status="lost", reason="there is no such file", **told)
        if self.size > max_bytes:
            reason = f"{self.size} bytes, more than {max_bytes}"
            return Found(name=self.image, status="too_large", reason=reason, **told)
        return Found(name=self.image, file=self.image, **told)


def from_folder(config: ImageSetConfig, root: Root, sizes: dict[str, int]) -> list[Listed]:
    """Every picture below a folder, with the texts beside it or in the folder's metadata."""
    told = _metadata(config, root, sizes)
    listed = []
    for path, size in sizes.items():
        name = PurePosixPath(path)
        if name.suffix.lower().lstrip(".") not in IMAGE_ENDINGS:
            continue
        beside = (
            str(name.with_suffix(f".{ending}"))
            for ending in (
                *([config.caption_column] if config.caption_column else TEXT_ENDINGS),
                "json",
            )
        )
        listed.append(
            Listed(
                image=path,
                size=size,
                texts=told.get(path, ()),
                beside=tuple((each, sizes[each]) for each in beside if each in sizes),
            )
        )
    return listed


def from_captions(config: ImageSetConfig, sizes: dict[str, int]) -> tuple[list[Listed], str]:
    """The pictures that a captions file names, and its shape.

    A name without a file is a row that is lost; ConfigError when no name has one.
    """
    assert config.captions is not None
    shape = config.format
    files = read_caption_file(
        config.captions,
        shape,
        config.image_column or "image",
        config.caption_column or "caption",
        config.splits,
    )
    names = [PurePosixPath(file.image).as_posix() for file in files]
    if not any(name in sizes for name in names):
        shown = ", ".join(names[:3]) or "none"
        raise ConfigError(
            f"{config.captions} names {len(names)} pictures ({shown}), of which none is in {config.path}: the file belongs "
            "to another set, or its names are relative to another folder; name the one that they are relative to"
        )
    listed = [
        Listed(image=name, size=sizes.get(name, -1), texts=file.captions)
        for name, file in zip(names, files, strict=True)
    ]
    return listed, shape if shape != "auto" else "table"


def _metadata(
    config: ImageSetConfig, root: Root, sizes: dict[str, int]
) -> dict[str, tuple[str, ...]]:
    """Texts by picture, from the tables that name pictures of their folder."""
    texts: dict[str, list[str]] = {}
    for path in sizes:
        name = PurePosixPath(path)
        if name.name not in _METADATA:
            continue
        for batch in open_table(_address(root, path), {_FILE_NAME: _FILE_NAME}):
            for row in batch:
                image, fields = row.values.get(_FILE_NAME), Fields(caption=config.caption_column)
                if image:
                    own = str(name.parent / image)
                    texts.setdefault(own, []).extend(fields.told(row.extra)["texts"])
    return {image: distinct(found) for image, found in texts.items()}


def _address(root: Root, path: str) -> str:
    return f"{root.uri}/{path}"


def _record(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as err:
        return {"json": f"not readable: {err}"}
    return record if isinstance(record, dict) else {CAPTION_FIELDS[0]: record}
