"""What the writers of all formats have in common."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from storage.errors import CorruptData
from storage.exports.pieces import Piece
from storage.exports.selection import Selection
from storage.exports.target import File, PieceRecord, Target

Captions = Literal["each", "list"]
"""Several texts of one image: a sample for each of them, or one sample with all of them."""


class DamagedExport(CorruptData):
    """A file of an export is not as it was written; `path` names it."""

    def __init__(self, target: Target, path: str, what: str) -> None:
        super().__init__(
            f"export {target.uri}: {path} {what}; run the same command again: what is damaged is "
            "written anew"
        )
        self.path = path


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How an export is cut and laid out."""

    num_pieces: int
    captions: Captions
    csv: bool = False
    licences: tuple[str, ...] = ()
    """Every licence that its images have, sorted."""


class Format(Protocol):
    """One way to write a clean set."""

    name: str
    captions: tuple[Captions, ...]
    """What it can do with several texts of an image, the default first."""
    with_images: bool

    def contents(self, plan: Plan) -> Mapping[str, Collection[str] | None]:
        """Top-level names that it writes, as `Target` takes them."""
        ...

    def write_piece(self, target: Target, piece: Piece, plan: Plan) -> Sequence[File]:
        """Write a piece; the files that it alone makes."""
        ...

    def finish(
        self, target: Target, pieces: Sequence[PieceRecord], selection: Selection, plan: Plan
    ) -> Sequence[File]:
        """Write what needs all pieces."""
        ...

    def read_back(
        self, target: Target, pieces: Sequence[PieceRecord], plan: Plan
    ) -> Iterator[tuple[int, int]]:
        """Read everything as its users will: (images, texts) found, some at a time.

        Raises DamagedExport when an image is not the one that its id names.
        """
        ...
