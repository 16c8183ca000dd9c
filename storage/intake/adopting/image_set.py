"""What a set of pictures is called, where it lies, and in which shape."""

from dataclasses import dataclass
from typing import Literal, get_args

from storage.errors import ConfigError

Format = Literal["auto", "img2dataset", "webdataset", "hf", "folder", "table", "coco", "karpathy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSetConfig:
    """A set of pictures with the texts that were found beside them."""

    path: str
    """A folder, a file or a pattern with * or ?; on this machine or an fsspec URI. With `captions`: the folder of the
    pictures."""
    name: str
    """The source_name of its rows; letters, digits, - and _."""
    format: Format = "auto"
    captions: str | None = None
    """The captions file of table, coco and karpathy."""
    image_column: str | None = None
    """Column of the picture: its bytes (hf), or its file (table); None takes the usual names."""
    caption_column: str | None = None
    """Column, JSON field or ending that holds the texts; None takes the usual ones."""
    url_column: str | None = None
    """Column or JSON field of the address; None takes `url`."""
    licence_column: str | None = None
    splits: tuple[str, ...] | None = None
    """Which splits of a Karpathy file to take; None takes all."""

    def __post_init__(self) -> None:
        """Check name and format."""
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"name must be letters, digits, - and _, got {self.name!r}")
        if self.format not in get_args(Format):
            raise ConfigError(
                f"format {self.format!r} is unknown; there are {', '.join(get_args(Format))}"
            )
        if self.format in ("coco", "karpathy", "table") and self.captions is None:
            raise ConfigError(
                f"image set {self.name}: format {self.format} needs `captions`, the file with the texts"
            )
        if self.captions is not None and self.format in (
            "img2dataset",
            "webdataset",
            "hf",
            "folder",
        ):
            raise ConfigError(
                f"image set {self.name}: format {self.format} has its texts beside the pictures; leave `captions` out"
            )
