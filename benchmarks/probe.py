"""The probe that a training has to beat: frozen features of images and texts, and one ridge regression.

Dimension key: I images, T texts, F image features, D text width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blip_core import MED, EncodedPairs, MEDTokenizer, Metric, clean_caption
from blip_core.evaluation import RECALL_AT, retrieval_ranks, retrieval_recalls
from blip_core.intervals import auc_metric, measured, weighted_mean

RIDGES = (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)
_TEXT_BATCH = 256


def image_features(tokens: np.ndarray) -> Tensor:
    """(I, P, D) vision tokens -> (I, 2 D): CLS beside the mean of the patches."""
    rows = [
        np.concatenate([row[0], row[1:].astype(np.float32).mean(axis=0)]).astype(np.float32)
        for row in tokens
    ]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def text_features(model: MED, tokenizer: MEDTokenizer, texts: Sequence[str]) -> Tensor:
    """Return (T, D), L2-normalised means over a text's tokens, as MiniLM's sentence vectors are made."""
    cleaned = [clean_caption(text) for text in texts]
    order = sorted(range(len(cleaned)), key=lambda place: len(cleaned[place]))  # little padding
    features = torch.zeros(len(cleaned), model.config.text.width)
    model.eval()
    for start in range(0, len(order), _TEXT_BATCH):
        places = order[start : start + _TEXT_BATCH]
        batch = tokenizer.encode([cleaned[place] for place in places], 64)
        hidden = model.text(batch.input_ids, batch.attention_mask, mode="text")
        mask = batch.attention_mask[:, :, None]
        features[places] = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(features, dim=-1)


class Ridge:
    """A linear map from image features to text features, both centred, with one penalty on its weights."""

    def __init__(self, images: Tensor, texts: Tensor, penalty: float) -> None:
        """Fit on (I, F) and (I, D), a row of both for each image."""
        self._mean, self._std = images.mean(dim=0), images.std(dim=0).clamp(min=1e-6)
        self._text_mean = texts.mean(dim=0)
        x = ((images - self._mean) / self._std).double()
        gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.float64)
        self._weight = torch.linalg.solve(gram, x.T @ (texts - self._text_mean).double()).float()

    def __call__(self, images: Tensor) -> Tensor:
        """(I, F) -> (I, D), L2-normalised, to be compared with `centred` texts."""
        found = (images - self._mean) / self._std @ self._weight
        return torch.nn.functional.normalize(found, dim=-1)

    def centred(self, texts: Tensor) -> Tensor:
        """(T, D) -> (T, D) about the mean of the fitted texts, L2-normalised.

        Uncentred, all texts are alike, and recall is lower by a quarter.
        """
        return torch.nn.functional.normalize(texts - self._text_mean, dim=-1)


def best_ridge(
    images: Tensor, texts: Tensor, dev_images: Tensor, dev_texts: Tensor, dev_index: Tensor
) -> tuple[Ridge, float]:
    """Fit with every penalty; return the map with the highest mean recall on the dev split, and its penalty."""
    scored = []
    for penalty in RIDGES:
        ridge = Ridge(images, texts, penalty)
        recalls = retrieval_recalls(ridge(dev_images) @ ridge.centred(dev_texts).T, dev_index)
        scored.append((recalls["mean_recall"], penalty, ridge))
    _, penalty, ridge = max(scored, key=lambda each: each[0])
    return ridge, penalty


def as_pairs(
    image_rows: Tensor, text_rows: Tensor, captions: Sequence[Sequence[str]]
) -> EncodedPairs:
    """Return features as a held-out set that the project's evaluation reads; it has no image tokens."""
    return EncodedPairs(
        image_embeds=torch.zeros(len(image_rows), 0, 0),
        image_features=image_rows,
        text_features=text_rows,
        texts=[clean_caption(text) for of_image in captions for text in of_image],
        text_image_index=index_of(captions),
    )


def index_of(captions: Sequence[Sequence[str]]) -> Tensor:
    """Return the image (T,) of every caption."""
    return torch.tensor([image for image, texts in enumerate(captions) for _ in texts])


def cosine_auc(pairs: EncodedPairs, *, seed: int = 0) -> Metric:
    """Return the AUC of telling by cosine every pair from the image with another image's text at random."""
    rng = np.random.default_rng(seed)
    images = pairs.text_image_index.numpy()
    other = rng.integers(0, len(images), len(images))
    while (clash := images[other] == images).any():
        other[clash] = rng.integers(0, len(images), int(clash.sum()))
    sim = (pairs.image_features @ pairs.text_features.T).double().numpy()
    true, wrong = sim[images, np.arange(len(images))], sim[images, other]
    return auc_metric("cosine_auc_random", true, wrong, images)


def gains(ours: EncodedPairs, theirs: EncodedPairs) -> list[Metric]:
    """Return recalls of `ours` minus those of `theirs`, by cosine, with intervals of the difference.

    Both hold the same images and texts: an image that is drawn again counts for both, so that what is hard
    for both does not widen the interval.
    """
    ranks = [
        retrieval_ranks(pairs.image_features @ pairs.text_features.T, pairs.text_image_index)
        for pairs in (ours, theirs)
    ]
    of_text = ours.text_image_index.numpy()
    num_images, found = len(ours.image_features), []
    for side, (name, images) in enumerate((("i2t", np.arange(num_images)), ("t2i", of_text))):
        for k in RECALL_AT:
            hits = [(pair[side] < k).double().numpy() for pair in ranks]
            statistic = weighted_mean(hits[0] - hits[1], images, num_images)
            found.append(measured(f"{name}_r{k}", statistic, num_images, n=len(hits[0])))
    return found
