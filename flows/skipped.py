"""Rows that a training passed over because their image could not be decoded.

A file in the training's folder that all its processes append to, so that the count outlives a kill;
what a resumed run reads again is counted once.
"""

from __future__ import annotations

from pathlib import Path


class SkippedRows:
    """Lines of position, attempt and image_id."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, position: int, attempt: int, image_id: str) -> None:
        """Note that try `attempt` at filling `position` of the data's order failed."""
        with self._path.open("a", encoding="utf-8") as file:  # one write, whole among processes
            file.write(f"{position} {attempt} {image_id}\n")

    def count(self, num_positions: int) -> int:
        """How many rows were passed over in filling the first `num_positions`."""
        if not self._path.is_file():
            return 0
        with self._path.open(encoding="utf-8") as file:
            noted = {tuple(line.split()) for line in file}
        return sum(int(position) < num_positions for position, *_ in noted)
