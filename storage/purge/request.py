"""What a purge is asked for: addresses, images or hosts, and why."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage import addresses
from storage.errors import ConfigError

Kind = Literal["url", "image", "host"]

_IMAGE_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Asked:
    """One thing to be purged."""

    kind: Kind
    text: str
    """As it was given."""
    value: str
    """Normal form of an address (or, where it has none, the text), an image_id, or a host."""

    def __str__(self) -> str:
        """As tables and people are told of it."""
        return f"{self.kind} {self.value}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be purged, and why."""

    asked: tuple[Asked, ...]
    because: str
    is_list: bool = False
    """Came from a file: what matches nothing is listed, and the rest is done."""
    bad_lines: tuple[str, ...] = ()
    """Lines of the file that say nothing, each with its number and what is wrong."""

    def __post_init__(self) -> None:
        """A purge has a reason and something to purge."""
        if not self.because.strip():
            raise ConfigError('a purge needs a reason, which is recorded: --because "..."')
        if not self.asked:
            raise ConfigError(
                "nothing to purge: give an address, an image_id, a host or a file of such"
            )


def asked_url(text: str) -> Asked:
    """An address as somebody wrote it; of a picture that people captioned, its file."""
    if not text.strip():
        raise ConfigError("an address to purge is empty; give it as it was listed")
    return Asked("url", text, addresses.normal(text) or text.strip())


def asked_image(text: str) -> Asked:
    """An image_id. Raises ConfigError when it is none."""
    image_id = text.strip().lower()
    if not _IMAGE_ID.fullmatch(image_id):
        raise ConfigError(f"image id {text!r} is not 32 hex digits; `bootstrap why URL` shows it")
    return Asked("image", text, image_id)


def asked_host(text: str) -> Asked:
    """A host with its subdomains. Raises ConfigError when it is none."""
    return Asked("host", text, addresses.asked_host(text))


def read_list(path: Path, because: str) -> Request:
    """A file with one address, image_id or host a line; empty lines and those that begin with # say nothing.

    32 hex digits are an image, what holds `://` is an address, all else is a host. Raises ConfigError when the file
    cannot be read or says nothing at all.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} cannot be read ({err}); name a text file in UTF-8") from err
    asked, bad = _read(lines)
    if not asked:
        raise ConfigError(
            f"{path} names nothing to purge"
            + (f": {'; '.join(bad[:3])}" if bad else "; give one address, image_id or host a line")
        )
    return Request(asked=asked, because=because, is_list=True, bad_lines=bad)


def _read(lines: Iterable[str]) -> tuple[tuple[Asked, ...], tuple[str, ...]]:
    asked: dict[Asked, None] = {}
    bad = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            asked[_guessed(text)] = None
        except ConfigError as err:
            bad.append(f"line {number}: {err}")
    return tuple(asked), tuple(bad)


def _guessed(text: str) -> Asked:
    if _IMAGE_ID.fullmatch(text.lower()):
        return asked_image(text)
    if "://" in text:
        url = asked_url(text)
        if addresses.normal(text) is None:
            raise ConfigError(f"{text!r} is not an http or https address")
        return url
    return asked_host(text)
