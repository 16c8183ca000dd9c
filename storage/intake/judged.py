"""Rows whose pictures a check refuses: `unsafe`, with its reason, and without the picture."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from PIL import Image

from storage.errors import ConfigError
from storage.intake.looking import Looked
from storage.intake.safety import Safety

UNSAFE = "unsafe"


def safe_rows(rows: Iterable[Looked], safety: Safety | None) -> Iterator[Looked]:
    """The rows in their order; those whose picture is refused are `unsafe`, with the reason, and without it.

    A picture that the check fails on is refused as well. ConfigError when it fails on every one of several: then it is
    the check that is broken.
    """
    if safety is None:
        yield from rows
        return
    held: list[Looked] = []
    num_images = 0
    for row in rows:
        held.append(row)
        num_images += row.image is not None
        if num_images == safety.batch_images:
            yield from _judged(held, safety)
            held, num_images = [], 0
    yield from _judged(held, safety)


def _judged(rows: list[Looked], safety: Safety) -> Iterator[Looked]:
    # Decoded here and now: only those of one batch are in memory.
    pictures = [_decoded(row.image) for row in rows if row.image is not None]
    reasons = iter(_reasons(pictures, safety))
    for row in rows:
        reason = next(reasons) if row.image is not None else None
        if reason is None:
            yield row
        else:
            row.pair.update(status=UNSAFE, reason=reason)
            yield replace(row, image=None, looks=None)


def _reasons(pictures: list[Image.Image], safety: Safety) -> Sequence[str | None]:
    """What the check says of each picture; a batch that it fails on is judged one by one."""
    found, failure = _asked(pictures, safety)
    if failure is None:
        return found
    if len(pictures) == 1:
        return [_failed(failure)]
    alone = [_asked([picture], safety) for picture in pictures]
    if all(failure is not None for _, failure in alone):
        raise ConfigError(
            f"the safety check {safety.id} failed on each of {len(pictures)} pictures, the first time with "
            f"{_words(failure)}; mend it, and run the same command again"
        ) from failure
    return [said[0] if failure is None else _failed(failure) for said, failure in alone]


def _asked(
    pictures: list[Image.Image], safety: Safety
) -> tuple[list[str | None], Exception | None]:
    """What the check says, or how it failed."""
    if not pictures:
        return [], None
    try:
        said = list(safety.judge(pictures))
    except Exception as err:  # noqa: BLE001 - somebody else's code
        return [], err
    if len(said) != len(pictures) or not all(r is None or isinstance(r, str) for r in said):
        wanted = f"a reason or None for each of {len(pictures)} pictures"
        return [], ValueError(f"it must say {wanted}, and said {said!r:.200}")
    return said, None


def _failed(failure: Exception) -> str:
    return f"could not be judged: {_words(failure)}"


def _words(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


def _decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")
