"""What captions and what scores, whoever made the model: the two protocols of curation.

A MED of ours, any image-to-text model and any CLIP are driven alike. Dimension key: B batch, S image side.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor

from blip_core.captioner import GeneratedCaption
from blip_core.scorer import PairScore

ImageTransform = Callable[[Image.Image], Tensor]
"""RGB picture -> (3, S, S), every picture to the same shape and type. Runs in other processes: picklable."""


class Captioner(Protocol):
    """Images to captions."""

    transform: ImageTransform

    def caption(
        self, pixel_values: Tensor, image_ids: Sequence[str]
    ) -> list[list[GeneratedCaption]]:
        """B images, as `transform` gave them, and their ids -> the captions of each image."""


class Scorer(Protocol):
    """Images and texts to match probabilities, cosines, or both."""

    transform: ImageTransform

    def score(self, pixel_values: Tensor, texts: Sequence[Sequence[str]]) -> list[list[PairScore]]:
        """B images, as `transform` gave them, and B lists of texts -> a score of each text."""
