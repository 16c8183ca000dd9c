"""Any CLIP or SigLIP as a scorer: cosines of image and text, no match probability.

Dimension key: B batch, T distinct texts, E feature width, N pairs.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.config import require
from blip_core.errors import CheckpointError
from blip_core.foreign import (
    PICTURE_FILES,
    TOKENIZER_FILES,
    load_part,
    load_whole,
    read_config,
)
from blip_core.foreign_inputs import PictureInputs
from blip_core.packed import DTYPES, DType
from blip_core.protocols import ImageTransform
from blip_core.scorer import PairScore
from blip_core.tokenizer import storable_text

MAX_CACHED_TEXTS = 65_536
"""Texts whose features are kept: 400 MB at a width of 768, whatever the number of shards."""
TEXTS_AT_ONCE = 256
DUAL_ENCODERS = (
    "chinese_clip",
    "clip",
    "metaclip_2",
    "siglip",
    "siglip2",
)
"""Model types of transformers with an image and a text encoder that were trained to agree."""
_PADDED_FULLY = ("siglip", "siglip2")
"""Trained on texts padded to the limit, without a mask: shorter input has other features."""


class DualEncoderScorer(ABC):
    """Scores by the cosine of an image's and a text's features; a subclass says how to compute them."""

    transform: ImageTransform

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()

    @abstractmethod
    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, ...) stacked tensors of `transform` -> (B, E), of any length."""

    @abstractmethod
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """T texts -> (T, E), of any length; a text's do not depend on its company."""

    @torch.inference_mode()
    def score(self, pixel_values: Tensor, texts: Sequence[Sequence[str]]) -> list[list[PairScore]]:
        """B images, as `transform` gave them, and B lists of texts -> `itc_sim` of each; `itm_prob` is None.

        A text's features are computed once and kept (the last 65,536); texts longer than the model's limit are
        cut there. An empty text or an empty list is allowed.
        """
        require(
            len(pixel_values) == len(texts),
            f"there are {len(pixel_values)} images, but {len(texts)} lists of texts",
        )
        texts = [[storable_text(text) for text in of_image] for of_image in texts]
        features = self._features_of({text for of_image in texts for text in of_image})
        images = unit(self.image_features(pixel_values.to(self.device))) if features else ()
        scores: list[list[PairScore]] = []
        for place, of_image in enumerate(texts):
            if not of_image:
                scores.append([])
                continue
            rows = torch.stack([features[text] for text in of_image])
            cosines = (rows @ images[place]).clamp(-1.0, 1.0).tolist()
            scores.append([PairScore(None, cosine) for cosine in cosines])
        return scores

    def forget_texts(self) -> None:
        """Forget the features of texts: their last digits may depend on what they were first computed beside."""
        self._cache.clear()

    def _features_of(self, texts: set[str]) -> dict[str, Tensor]:
        """Normalised float64 features of distinct texts, from the cache where they are there."""
        keys = {text: hashlib.sha256(text.encode()).digest() for text in texts}
        features: dict[str, Tensor] = {}
        for text, key in keys.items():
            if key in self._cache:
                self._cache.move_to_end(key)
                features[text] = self._cache[key]
        absent = sorted(text for text in texts if text not in features)
        for start in range(0, len(absent), TEXTS_AT_ONCE):
            chunk = absent[start : start + TEXTS_AT_ONCE]
            for text, feature in zip(chunk, unit(self.text_features(chunk)), strict=True):
                features[text] = self._cache[keys[text]] = feature.clone()
        while len(self._cache) > MAX_CACHED_TEXTS:
            self._cache.popitem(last=False)
        return features


class CLIPScorer(DualEncoderScorer):
    """A CLIP, SigLIP or relative of transformers."""

    def __init__(
        self,
        path_or_repo: str | Path,
        device: torch.device | str = "cpu",
        dtype: DType = "float32",
        max_text_tokens: int | None = None,
    ) -> None:
        """Load a folder that save_pretrained wrote, or a model of the hub.

        Texts are cut at the model's own limit, or at `max_text_tokens` where that is less. Raises CheckpointError
        when the folder holds no such model or lacks a part of it.
        """
        super().__init__(device)
        self.where = str(path_or_repo)
        values = read_config(path_or_repo)
        self.model_type = values["model_type"]
        if self.model_type not in DUAL_ENCODERS:
            raise CheckpointError(
                f"{self.where} is a {self.model_type!r} model, which has no features of image and text to "
                f"compare; a scorer of this kind is one of {', '.join(DUAL_ENCODERS)}"
            )
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        pictures = load_part(
            AutoImageProcessor.from_pretrained, path_or_repo, "the image processor", PICTURE_FILES
        )
        self.tokenizer = load_part(
            AutoTokenizer.from_pretrained, path_or_repo, "the tokenizer", TOKENIZER_FILES
        )
        self.dtype = DTYPES[dtype]
        model: Any = load_whole(AutoModel, path_or_repo, self.dtype)
        self.model = model.to(self.device)
        self.inputs = PictureInputs(
            pictures, lambda image: pictures(images=image, return_tensors="pt"), self.where
        )
        self.transform = self.inputs.transform
        vocabulary = int(model.config.text_config.vocab_size)
        if len(self.tokenizer) > vocabulary:
            raise CheckpointError(
                f"the tokenizer of {self.where} has {len(self.tokenizer)} tokens, the model {vocabulary}: "
                "they do not belong together; save the model's own tokenizer beside it"
            )
        room = int(model.config.text_config.max_position_embeddings)
        limits = [room, int(self.tokenizer.model_max_length), max_text_tokens or room]
        self.max_text_tokens = min(limits)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, ...) stacked tensors of `transform` -> (B, E)."""
        inputs = self.inputs.batch(pixel_values, self.dtype, self.device)
        return _pooled(self.model.get_image_features(**inputs))

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """T texts -> (T, E); padded to a multiple of 8 tokens, or to the limit where the model was trained so."""
        lengths = [len(ids) for ids in self._ids(texts)["input_ids"]]
        buckets: dict[int, list[int]] = {}
        for place, length in enumerate(lengths):
            padded = min(-(-length // 8) * 8, self.max_text_tokens)
            if self.model_type in _PADDED_FULLY:
                padded = self.max_text_tokens
            buckets.setdefault(padded, []).append(place)
        found: dict[int, Tensor] = {}
        for padded, places in sorted(buckets.items()):
            features = self._bucket_features([texts[place] for place in places], padded)
            found |= dict(zip(places, features, strict=True))
        return torch.stack([found[place] for place in range(len(texts))])

    def _bucket_features(self, texts: list[str], num_tokens: int) -> Tensor:
        """Features of texts that are all padded to one length."""
        tokens = self._ids(texts, padding="max_length", max_length=num_tokens, return_tensors="pt")
        names = ["input_ids"] if self.model_type in _PADDED_FULLY else list(tokens)
        inputs = {name: tokens[name].to(self.device) for name in names}
        return _pooled(self.model.get_text_features(**inputs))

    def _ids(self, texts: Sequence[str], **options: Any) -> Any:
        given = {"max_length": self.max_text_tokens, **options}
        if self.model_type != "chinese_clip":
            given["return_token_type_ids"] = False
        return self.tokenizer(list(texts), truncation=True, **given)


def _pooled(found: Any) -> Tensor:
    """The features, which newer versions of transformers hand out in a larger output."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


def unit(features: Tensor) -> Tensor:
    """(..., E) -> float64, of length 1."""
    return F.normalize(features.double(), dim=-1)
