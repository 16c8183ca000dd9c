"""A model of open_clip as a scorer; the package is not one of this project's and is imported when it is asked for.

Dimension key: B batch, T distinct texts, E feature width, S image side.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_core.clip_scorer import DualEncoderScorer
from blip_core.errors import CheckpointError
from blip_core.packed import DTYPES, DType
from blip_core.protocols import ImageTransform


class OpenCLIPScorer(DualEncoderScorer):
    """A model of open_clip, which is not installed with this project: `pip install open_clip_torch`."""

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: DType = "float32",
    ) -> None:
        """`name` is a folder with open_clip_config.json and its weights, or the name of a model on the hub.

        Raises CheckpointError when open_clip is not there, or cannot load the model.
        """
        super().__init__(device)
        self.where, self.dtype = name, DTYPES[dtype]
        open_clip = require_open_clip(name)
        schema = f"local-dir:{Path(name).resolve()}" if Path(name).is_dir() else f"hf-hub:{name}"
        try:
            model, preprocess = open_clip.create_model_from_pretrained(schema)
            self.tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(schema)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as err:
            said = " ".join(str(err).split())
            raise CheckpointError(
                f"open_clip cannot load {name}: {said[:300]}; give a folder with open_clip_config.json and "
                "its weights, or a hub name that has them"
            ) from err
        self.model = model.to(self.device, self.dtype).eval()
        self.transform: ImageTransform = OpenCLIPTransform(preprocess, _side_of(model))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E)."""
        features: Tensor = self.model.encode_image(pixel_values.to(self.device, self.dtype))
        return features

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """T texts -> (T, E); padded to the model's limit, as open_clip does."""
        features: Tensor = self.model.encode_text(self.tokenizer(list(texts)).to(self.device))
        return features


class OpenCLIPTransform:
    """The preprocessing of open_clip; `decode_px` is the side of the model's input."""

    def __init__(self, preprocess: Callable[[Any], Tensor], decode_px: int) -> None:
        self.preprocess, self.decode_px = preprocess, decode_px

    def __call__(self, image: Any) -> Tensor:
        """RGB picture -> (3, S, S)."""
        return self.preprocess(image)


def require_open_clip(name: str) -> Any:
    """Import open_clip. Raises CheckpointError saying how to install it."""
    try:
        import open_clip
    except ImportError as err:
        raise CheckpointError(
            f"open_clip:{name} needs the package open_clip, which is not installed ({err}): "
            "pip install open_clip_torch, or give a CLIP of transformers as clip:PATH"
        ) from err
    return open_clip


def _side_of(model: Any) -> int:
    side = model.visual.image_size
    return int(max(side)) if isinstance(side, tuple | list) else int(side)
