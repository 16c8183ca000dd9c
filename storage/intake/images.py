"""Is this an image, a whole one, and of a size that we want? Also what it looks like."""

import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from storage.intake.looks import SIDE, Looks, looks_of
from storage.schemas import OK

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """What a look at an image's bytes gave; all but status and reason are set when it is ok."""

    status: str
    reason: str | None = None
    width: int | None = None
    height: int | None = None
    looks: Looks | None = None
    ext: str = "jpg"


def inspect_image(data: bytes, min_side_px: int, max_pixels: int) -> Inspected:
    """Decode an image (at reduced size where the format allows) and judge it.

    Status: ok, not_an_image, decode_error, too_small or too_many_pixels. The pixel limit is checked
    on the header, before anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit decides, below; Pillow's warning would only repeat it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, Image.DecompressionBombError) as err:
        if isinstance(err, Image.DecompressionBombError):
            return Inspected(status="too_many_pixels", reason=f"more than {max_pixels} pixels")
        return Inspected(status="not_an_image", reason=f"starts with {_beginning(data)}")
    except (OSError, SyntaxError, ValueError) as err:
        return Inspected(status="decode_error", reason=str(err))
    with image:
        width, height = image.size
        if min(width, height) < min_side_px:
            reason = f"{width} x {height} px, shorter side below {min_side_px}"
            return Inspected(status="too_small", reason=reason)
        if width * height > max_pixels:
            reason = f"{width} x {height} px, more than {max_pixels} pixels"
            return Inspected(status="too_many_pixels", reason=reason)
        return _decode(image, width, height)


def _decode(image: Image.Image, width: int, height: int) -> Inspected:
    try:
        # Where the format can decode a smaller picture, one that is large enough for its looks.
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        image.load()
        looks = looks_of(image)
    except (OSError, SyntaxError, ValueError) as err:
        return Inspected(status="decode_error", reason=str(err))
    ext = EXTENSIONS.get(image.format or "", "bin")
    return Inspected(status=OK, width=width, height=height, looks=looks, ext=ext)


def _beginning(data: bytes) -> str:
    return repr(data[:24])[1:] if data else "nothing: it is empty"
