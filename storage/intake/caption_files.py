"""Captions files in their several shapes, read into one: a picture and its texts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from storage.errors import ConfigError
from storage.intake.url_list import open_table


@dataclass(frozen=True, slots=True)
class CaptionedFile:
    """A picture's file, relative to its folder, and what people said of it."""

    image: str
    captions: tuple[str, ...]


def read_caption_file(
    path: str | Path,
    format: str,
    image_column: str,
    caption_column: str,
    splits: Sequence[str] | None,
) -> list[CaptionedFile]:
    """The pictures of a captions file in its order, those without a text left out.

    Raises ConfigError naming the file, the entry and what is wrong with it.
    """
    if format == "table" or (format == "auto" and not str(path).lower().endswith(".json")):
        return _from_table(path, image_column, caption_column)
    try:
        with fsspec.open(str(path), "rb") as f:
            content = json.loads(cast(BinaryIO, f).read().decode("utf-8"))
        if format == "auto":
            format = _shape_of(path, content)
        return _from_coco(content) if format == "coco" else _from_karpathy(content, splits)
    except (FileNotFoundError, IsADirectoryError) as err:
        raise ConfigError(f"captions file {path} does not exist; check the path") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} is not UTF-8 (byte {err.start}); convert it") from err
    except json.JSONDecodeError as err:
        raise ConfigError(f"{path} is not JSON: {err}; name a captions file") from err
    except (KeyError, TypeError, AttributeError) as err:
        raise ConfigError(
            f"{path} does not have the shape of a {format} captions file ({err!r}); set the format "
            "to coco, karpathy or table"
        ) from err


def _shape_of(path: str | Path, content: Any) -> str:
    if isinstance(content, dict) and "annotations" in content and "images" in content:
        return "coco"
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and images and "sentences" in images[0]:
        return "karpathy"
    if isinstance(content, dict) and images == []:
        return "coco" if "annotations" in content else "karpathy"
    raise ConfigError(
        f"{path} is neither COCO's captions JSON (images and annotations) nor Karpathy's (images "
        "with sentences); give one of these, or a CSV, Parquet or JSONL table"
    )


def _from_coco(content: Any) -> list[CaptionedFile]:
    texts: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content.get("annotations", []):
        if annotation["image_id"] not in texts:
            raise ConfigError(
                f"captions JSON: annotation {annotation.get('id')} names image "
                f"{annotation['image_id']}, which is not listed under images"
            )
        texts[annotation["image_id"]].append(str(annotation["caption"]))
    return _merged((str(i["file_name"]), texts[i["id"]]) for i in content["images"])


def _from_karpathy(content: Any, splits: Sequence[str] | None) -> list[CaptionedFile]:
    chosen = (i for i in content["images"] if splits is None or i.get("split") in splits)
    return _merged(
        (
            str(Path(i.get("filepath", ""), i["filename"])),
            [str(s["raw"]) for s in i["sentences"]],
        )
        for i in chosen
    )


def _from_table(path: str | Path, image_column: str, caption_column: str) -> list[CaptionedFile]:
    rows = []
    for batch in open_table(path, {image_column: "image", caption_column: "caption"}):
        for row in batch:
            if row.bad is not None:
                raise ConfigError(f"{path}, row {row.position}: {row.bad}; correct that row")
            image, caption = row.values["image"], row.values["caption"]
            if not image:
                raise ConfigError(f"{path}, row {row.position}: no {image_column}; fill it in")
            rows.append((image, [caption] if caption else []))
    return _merged(rows)


def _merged(rows: Iterable[tuple[str, list[str]]]) -> list[CaptionedFile]:
    """One entry for each picture, its texts stripped and in order; none without a text."""
    texts: dict[str, list[str]] = {}
    for image, captions in rows:
        texts.setdefault(image, []).extend(c.strip() for c in captions if c.strip())
    return [CaptionedFile(image, tuple(found)) for image, found in texts.items() if found]
