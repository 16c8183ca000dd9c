"""What pictures show; `main` is the process that looks at them (`looking.Lookers` starts it)."""

from storage import ids
from storage.intake.images import Inspected, inspect_image
from storage.schemas import OK
from storage.worker_process import serve

Seen = tuple[Inspected, str]
"""What a look at a picture's bytes gave, and its image_id, which is empty unless it is ok."""
Limits = tuple[int, int]
"""The shortest side that is wanted, in px, and the most pixels."""


def see(image: bytes, limits: Limits) -> Seen:
    """Look at one picture."""
    found = inspect_image(image, *limits)
    return found, ids.image_id(image) if found.status == OK else ""


def main(socket_fd: int) -> None:
    """Look at what comes through the socket until it is closed."""
    serve(socket_fd, _see_all)


def _see_all(asked: tuple[list[bytes], Limits]) -> list[Seen]:
    images, limits = asked
    return [see(image, limits) for image in images]
