"""A row of a set as it was found, before anybody looked at its picture."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGE_ENDINGS = frozenset(
    ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif", "img")
)
TEXT_ENDINGS = ("txt", "text", "caption", "captions")
CAPTION_FIELDS = ("caption", "captions", "text", "texts", "TEXT", "alt_text", "sentences")
"""Columns and JSON fields that hold texts, where none is named; all that are there are taken."""
URL_FIELDS = ("url", "URL", "image_url")
_INSIDE = ("raw", "caption", "text")
"""Fields that hold the text where a text is a record, as in Karpathy's."""
_LEFT_OUT = ("exif",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One row: a picture and its texts, or why there is no picture."""

    name: str
    """Where it lies in the set, as tar and key, or as a file: the same row has the same name in every run."""
    texts: tuple[str, ...] = ()
    image: bytes | None = None
    file: str | None = None
    """The file to read the picture from, in place of `image`."""
    offset: int | None = None
    """First byte of the picture in its tar."""
    status: str | None = None
    """Why there is none; None when there is one."""
    reason: str | None = None
    url: str | None = None
    licence: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Which fields of a record say what."""

    caption: str | None = None
    url: str | None = None
    licence: str | None = None
    image: str | None = None

    def told(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """texts, url, licence and extra of a record of a table or a JSON sidecar."""
        captions = (self.caption,) if self.caption is not None else CAPTION_FIELDS
        urls = (self.url,) if self.url is not None else URL_FIELDS
        used = {*captions, *urls, self.licence, self.image, *_LEFT_OUT}
        url = next((record[name] for name in urls if record.get(name)), None)
        licence = record.get(self.licence) if self.licence is not None else None
        return {
            "texts": distinct(text for name in captions for text in texts_in(record.get(name))),
            "url": None if url is None else storable(str(url)),
            "licence": None if licence is None else storable(str(licence)),
            "extra": {k: v for k, v in record.items() if k not in used and _is_told(v)},
        }


def _is_told(value: Any) -> bool:
    """Whether a value is worth a place in `extra`: other pictures are not."""
    held = value.get("bytes") if isinstance(value, Mapping) else value
    return value is not None and not isinstance(held, bytes)


def texts_in(value: Any) -> list[str]:
    """The texts that a field holds: one, a list of them, or a list of records with one each."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes):
        return [value.decode("utf-8", "replace")]
    if isinstance(value, Mapping):
        return texts_in(next((value[name] for name in _INSIDE if name in value), None))
    if isinstance(value, list | tuple):
        return [text for each in value for text in texts_in(each)]
    return []


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """Texts stripped and storable, in order, each once, none empty."""
    found = (storable(text).strip() for text in texts)
    return tuple(dict.fromkeys(text for text in found if text))


def storable(text: str) -> str:
    """A text that UTF-8 and a C string can hold."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\x00", " ")
