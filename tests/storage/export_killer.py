"""Export, and kill this very process with SIGKILL at a chosen instant.

usage: export_killer.py PLACE LAKE TARGET FORMAT. A place is `picture:N` (when the N-th image is to be written),
`piece:N` (its files are there, its record is not), `card` (all pieces are there), `commit` (all but the last
record) or `replace` (another export is half removed).
"""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

PLACE, _, NTH = sys.argv[1].partition(":")


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_picture() -> None:
    from storage.exports.pieces import Picture, Piece

    original, seen = Piece.chunks, []

    def chunks(self: Piece, min_texts: int = 1) -> Iterator[list[Picture]]:
        for chunk in original(self, min_texts):
            for picture in chunk:
                seen.append(picture)
                if len(seen) == int(NTH):
                    die()
                yield [picture]

    Piece.chunks = chunks  # type: ignore[method-assign]


def at_piece() -> None:
    from storage.exports.target import PieceRecord, Target

    original = Target.finish_piece

    def finish_piece(self: Target, record: PieceRecord) -> None:
        if record.index == int(NTH):
            die()
        original(self, record)

    Target.finish_piece = finish_piece  # type: ignore[method-assign]


def at_replacement() -> None:
    from storage.fs import Root

    original = Root.remove

    def remove(self: Root, rel: str) -> None:
        original(self, rel)
        if rel == "export.json":
            die()

    Root.remove = remove  # type: ignore[method-assign]


def main() -> None:
    from storage import Lake
    from storage.exports import Options, export
    from storage.exports.target import Target

    if PLACE == "picture":
        at_picture()
    elif PLACE == "piece":
        at_piece()
    elif PLACE == "replace":
        at_replacement()
    else:
        setattr(Target, {"card": "write_text", "commit": "finish"}[PLACE], die)
    lake, target, form = sys.argv[2:]
    options = Options(format=form, shard_images=4)
    export(Lake.open(lake), target, options, on_stale="rebuild" if PLACE == "replace" else "error")
    sys.exit(f"{PLACE} was never reached")


main()
