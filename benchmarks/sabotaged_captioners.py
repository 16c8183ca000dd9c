"""Captioners that ruin a round of the drawn world, each in its own way; `benchmarks/demo_rounds.py` lets them in.

They come in by the door that is open to everybody's captioner, `caption.captioner: python:FILE.py:FUNCTION`, and
are also the shortest example of one. The world's folder is in the variable BOOTSTRAP_DEMO_WORLD.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from blip_core import CaptionConfig, EvalTransform, GeneratedCaption
from flows.quickstart.scenes import FORMS, Scene, describe
from flows.quickstart.world import load_world

WORLD_VARIABLE = "BOOTSTRAP_DEMO_WORLD"
SAME_CAPTION = "many red circles on a blue background"


class WrittenBy:
    """A `Captioner` that looks up what to say about an image by its id."""

    def __init__(self, say: Callable[[str], str]) -> None:
        self._say = say
        self.transform = EvalTransform(32, quick=True)

    def caption(
        self, pixel_values: torch.Tensor, image_ids: Sequence[str]
    ) -> list[list[GeneratedCaption]]:
        """One caption for each image; there is no model, and so no log-probability."""
        texts = [self._say(image_id) for image_id in image_ids]
        return [[GeneratedCaption(text, len(text.split()), math.nan, "sep")] for text in texts]


def same_caption(config: CaptionConfig, device: torch.device) -> WrittenBy:
    """Says the same of every picture: what a collapsed captioner does."""
    return WrittenBy(lambda image_id: SAME_CAPTION)


def wrong_colours(config: CaptionConfig, device: torch.device) -> WrittenBy:
    """Names every shape rightly and every colour wrongly, in sentences as varied as anybody's."""
    world = load_world(Path(os.environ[WORLD_VARIABLE]))
    scenes, colours = world.scenes(), world.config.vocabulary.colors
    instead = dict(zip(colours, colours[1:] + colours[:1], strict=True))

    def say(image_id: str) -> str:
        scene = scenes[image_id]
        said = Scene(
            things=tuple((instead[colour], shape) for colour, shape in scene.things),
            ground=instead[scene.ground],
            pattern=scene.pattern,
        )
        return describe(said, int(image_id[:8], 16) % len(FORMS))

    return WrittenBy(say)
