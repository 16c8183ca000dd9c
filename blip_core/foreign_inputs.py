"""What a foreign model reads: one tensor that is the picture, and others that are the same for every picture.

A processor of transformers turns a picture and a prompt into several tensors. A probe finds out, once, which of them
depends on the picture; it is made in the decoding workers, the others are kept and repeated.

Dimension key: B batch, R rows that one picture takes in the picture's tensor.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip_core.errors import ConfigError

PROBE_SIZES = ((640, 480), (300, 420))
"""Pictures of two shapes: a processor that treats them alike needs no resizing before it."""
FIXED_SIDE_PX = 448
"""Side that pictures get for a model that takes any size; a multiple of the patches in use (28 and 32 px)."""

Process = Callable[[Image.Image], Mapping[str, Any]]
"""A picture, as a batch of one, to a processor's tensors."""


class ForeignTransform:
    """A picture to the tensor that a foreign model reads of it; picklable, runs in decoding workers."""

    def __init__(self, image_processor: Any, name: str, side_px: int | None) -> None:
        """`name` is the processor's tensor, `side_px` what pictures are resized to before it."""
        self.image_processor, self.name, self.side_px = image_processor, name, side_px
        self.decode_px = side_px or FIXED_SIDE_PX
        """Px that no side of a picture should be decoded below."""

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> (...) of a batch without its dimension, or (R, ...) where a picture takes R rows."""
        if self.side_px is not None and image.size != (self.side_px, self.side_px):
            image = image.resize((self.side_px, self.side_px), Image.Resampling.BICUBIC)
        values: Tensor = self.image_processor(images=image, return_tensors="pt")[self.name]
        return values[0] if values.shape[0] == 1 else values


class PictureInputs:
    """The inputs of a model for a batch of pictures, all with the same prompt."""

    def __init__(
        self,
        image_processor: Any,
        process: Process,
        where: str,
        image_size_px: int | None = None,
    ) -> None:
        """`process` is the whole processor with the prompt in it, or the image processor alone.

        Raises ConfigError naming the model when no single tensor carries the picture.
        """
        self.where = where
        alone = _Alone(image_processor)
        side_px = image_size_px
        if side_px is None and not _same_shape(alone):
            side_px = FIXED_SIDE_PX
        size = (side_px, side_px) if side_px else PROBE_SIZES[0]
        first, second = (self._probe(process, _noise(size, seed)) for seed in (0, 1))
        self.name = self._of_the_picture(first, second)
        self.companions = {name: value for name, value in first.items() if name != self.name}
        """The tensors that are the same for every picture, as of a batch of one."""
        self.num_rows = int(first[self.name].shape[0])
        """R: rows of the picture's tensor that one picture takes."""
        self.transform = ForeignTransform(image_processor, self.name, side_px)
        made = self.transform(_noise(size, 0))
        expected = first[self.name]
        if not torch.equal(made.reshape(expected.shape), expected):
            raise ConfigError(
                f"the processor of {where} makes another {self.name} with a prompt than without one, "
                "which this adapter cannot split between processes; write a Captioner of your own"
            )
        if side_px is None and made.ndim == 3:
            self.transform.decode_px = max(made.shape[-2:])

    def batch(
        self, pixel_values: Tensor, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """(B, ...) stacked tensors of `transform` -> what the model's forward and generate take."""
        num_images = len(pixel_values)
        if self.num_rows > 1:
            pixel_values = pixel_values.flatten(0, 1)
        inputs = {self.name: pixel_values}
        for name, value in self.companions.items():
            inputs[name] = value.repeat(num_images, *[1] * (value.ndim - 1))
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }

    def _probe(self, process: Process, image: Image.Image) -> dict[str, Tensor]:
        try:
            found = dict(process(image))
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError) as err:
            said = " ".join(str(err).split())
            raise ConfigError(
                f"the processor of {self.where} refuses a picture with this prompt: {said[:300]}; give the "
                "prompt that the model's card asks for as `prompt`"
            ) from err
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def _of_the_picture(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> str:
        differing = [
            name
            for name, value in first.items()
            if value.shape != second[name].shape or not torch.equal(value, second[name])
        ]
        if len(differing) != 1:
            raise ConfigError(
                f"the processor of {self.where} makes {len(differing)} tensors that depend on the picture "
                f"({', '.join(differing) or 'none'}) where one is expected; write a Captioner or Scorer "
                "of your own for it"
            )
        return differing[0]


class _Alone:
    """The image processor as a `Process`."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, image: Image.Image) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.image_processor(images=image, return_tensors="pt")
        return found


def _same_shape(process: Process) -> bool:
    """Whether pictures of two shapes become tensors of one, with nothing else beside them that differs."""
    wide, tall = (process(_noise(size, 0)) for size in PROBE_SIZES)
    return all(
        isinstance(value, Tensor)
        and value.shape == tall[name].shape
        and (value.is_floating_point() or torch.equal(value, tall[name]))
        for name, value in wide.items()
    )


def _noise(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)
