"""Identity from content: the same bytes and texts have the same ids in every run."""

import hashlib

ID_LENGTH = 32
"""Hex digits of an id: 128 bits, so that a collision among 10**12 rows stays out of reach."""


def image_id(image: bytes) -> str:
    """The id of an image: of its stored bytes."""
    return hashlib.sha256(image).hexdigest()[:ID_LENGTH]


def caption_id(image_id: str, source: str, caption: str) -> str:
    """The id of a text proposed for an image by a source (`web`, `synthetic`, `human`)."""
    return joined_id(image_id, source, caption)


def pair_key(source_name: str, url: str, alt_text: str | None) -> str:
    """The id of an input row: where it came from, its address and its text."""
    return joined_id(source_name, url, alt_text or "")


def joined_id(*fields: str) -> str:
    """The id of several texts in order; lengths are hashed too, so no two tuples meet."""
    digest = hashlib.sha256()
    for field in fields:
        data = field.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:ID_LENGTH]
