"""Pictures small enough to stand in the page."""

import base64
import io

from PIL import Image

SIDE_PX = 192
SMALL_BYTES = 8_000


def thumbnail_uri(data: bytes, side_px: int = SIDE_PX) -> str:
    """The picture as a data: URI, at most `side_px` on its longer side.

    A small JPEG is taken as it is. Raises OSError when the bytes are no picture.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.format != "JPEG" or len(data) > SMALL_BYTES or max(image.size) > side_px:
            data = _shrunk(image, side_px)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def _shrunk(image: Image.Image, side_px: int) -> bytes:
    image.draft("RGB", (side_px, side_px))
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()
