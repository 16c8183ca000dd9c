"""A check that pictures have to pass before they are stored. Whose it is, is not known here: it is handed in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from storage.errors import ConfigError

Judge = Callable[[Sequence[Image.Image]], Sequence[str | None]]
"""Of some RGB pictures, why each must not be stored; None for one that may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Safety:
    """A check of pictures, with what tells it from another in fingerprints."""

    id: str
    judge: Judge
    batch_images: int = 32
    """Pictures that are judged together, and held in memory until they are."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.batch_images < 1:
            raise ConfigError(f"batch_images must be 1 or more, got {self.batch_images}")
