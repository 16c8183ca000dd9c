"""Retrieval and matching on held-out pairs (BLIP, sections 5.1 and 3.2).

Dimension key: I images, T texts, N pairs, R resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip_core.config import require
from blip_core.intervals import (
    Metric,
    Statistic,
    auc_metric,
    measured,
    precision_metric,
    weighted_mean,
)
from blip_core.med import MED
from blip_core.pairs import EncodedPairs, match_logits
from blip_core.tokenizer import MEDTokenizer

RECALL_AT = (1, 5, 10)
NEVER = torch.iinfo(torch.int64).max
"""The rank of an image without a text."""
_RANKED = 512
"""Rows or columns that are ranked at once."""


def retrieval_recalls(sim: Tensor, text_image_index: Tensor) -> dict[str, float]:
    """Return i2t_r1 .. t2i_r10 and mean_recall, in [0, 1], of similarities (I, T).

    An image counts as found at its best caption. Equal similarities rank in order of position.
    """
    image_ranks, text_ranks = retrieval_ranks(sim, text_image_index)
    recalls = {f"i2t_r{k}": float((image_ranks < k).double().mean()) for k in RECALL_AT}
    recalls |= {f"t2i_r{k}": float((text_ranks < k).double().mean()) for k in RECALL_AT}
    return recalls | {"mean_recall": sum(recalls.values()) / len(recalls)}


def retrieval_ranks(sim: Tensor, text_image_index: Tensor) -> tuple[Tensor, Tensor]:
    """Return 0-based ranks: of every image's best own text (I,), of every text's image (T,).

    An image without a text gets `NEVER`.
    """
    num_images, num_texts = sim.shape
    text_order, image_order = torch.arange(num_texts), torch.arange(num_images)
    own = sim[text_image_index, text_order]
    best = torch.full((num_images,), -torch.inf).scatter_reduce(0, text_image_index, own, "amax")
    place = torch.where(own == best[text_image_index], text_order, num_texts)
    first = torch.full((num_images,), num_texts).scatter_reduce(0, text_image_index, place, "amin")
    image_ranks, text_ranks = [], []
    for start in range(0, num_images, _RANKED):
        rows = image_order[start : start + _RANKED]
        mine, score = best[rows, None], sim[rows]
        ahead = (score > mine) | ((score == mine) & (text_order < first[rows, None]))
        image_ranks.append(torch.where(first[rows] < num_texts, ahead.sum(dim=1), NEVER))
    for start in range(0, num_texts, _RANKED):
        columns = text_order[start : start + _RANKED]
        mine, score = own[columns], sim[:, columns]
        is_earlier = image_order[:, None] < text_image_index[columns]
        text_ranks.append(((score > mine) | ((score == mine) & is_earlier)).sum(dim=0))
    return torch.cat(image_ranks), torch.cat(text_ranks)


def rerank(
    model: MED, tokenizer: MEDTokenizer, pairs: EncodedPairs, sim: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return similarities (I, T) re-ranked by matching: per image its top k texts, per text its top k images.

    A candidate gets its match logit plus its cosine, as the authors' evaluation does; all others rank below,
    in the order of their cosines.
    """
    num_images, num_texts = sim.shape
    top_texts = sim.topk(min(k, num_texts), dim=1).indices
    top_images = sim.topk(min(k, num_images), dim=0).indices
    images = torch.cat(
        [torch.arange(num_images).repeat_interleave(top_texts.shape[1]), top_images.flatten()]
    )
    texts = torch.cat([top_texts.flatten(), torch.arange(num_texts).repeat(top_images.shape[0])])
    words = [pairs.texts[text] for text in texts.tolist()]
    scores = match_logits(model, tokenizer, pairs, images.tolist(), words)[:, 1]
    scores = scores + sim[images, texts]
    below = sim.max() - scores.min() + 1.0  # just enough: a large number would round cosines away
    by_image, by_text = sim - below, sim - below
    num_first = top_texts.numel()
    by_image[images[:num_first], texts[:num_first]] = scores[:num_first]
    by_text[images[num_first:], texts[num_first:]] = scores[num_first:]
    return by_image, by_text


@dataclass(frozen=True, slots=True)
class RetrievalRanks:
    """Where each query found what belongs to it: what every recall, and every comparison of two, is made of."""

    image_ranks: np.ndarray
    """(I,) int64, 0-based: the best own text of each image; `NEVER` without one."""
    text_ranks: np.ndarray
    """(T,) int64, 0-based: the image of each text."""
    text_image_index: np.ndarray
    """(T,) int64: whose each text is."""


def rank_pairs(
    model: MED, tokenizer: MEDTokenizer, pairs: EncodedPairs, *, rerank_k: int = 0
) -> RetrievalRanks:
    """Return the ranks of `pairs` in both directions; `rerank_k` 0 ranks by cosine alone."""
    sim = pairs.image_features @ pairs.text_features.T
    by_image, by_text = sim, sim
    if rerank_k:
        by_image, by_text = rerank(model, tokenizer, pairs, sim, rerank_k)
    image_ranks, _ = retrieval_ranks(by_image, pairs.text_image_index)
    _, text_ranks = retrieval_ranks(by_text, pairs.text_image_index)
    return RetrievalRanks(image_ranks.numpy(), text_ranks.numpy(), pairs.text_image_index.numpy())


def evaluate_retrieval(
    model: MED, tokenizer: MEDTokenizer, pairs: EncodedPairs, *, rerank_k: int = 0
) -> list[Metric]:
    """Return `recall_metrics` of a model on `pairs`; `rerank_k` 0 ranks by cosine alone."""
    return recall_metrics(rank_pairs(model, tokenizer, pairs, rerank_k=rerank_k))


def recall_metrics(ranks: RetrievalRanks) -> list[Metric]:
    """Return recalls at 1, 5, 10 in both directions and their mean.

    Intervals are over images: a text is drawn with its image.
    """
    num_images = len(ranks.image_ranks)
    recalls = list(_recalls(ranks))
    metrics = [measured(name, recall, num_images, n=n) for name, recall, n in recalls]

    def mean_recall(weights: np.ndarray) -> np.ndarray:
        mean: np.ndarray = np.mean([recall(weights) for _, recall, _ in recalls], axis=0)
        return mean

    return [*metrics, measured("mean_recall", mean_recall, num_images)]


def mean_recall_gain(before: RetrievalRanks, after: RetrievalRanks) -> Metric:
    """Return by how much the mean recall of `after` is above that of `before`, with its paired interval.

    Every resample draws the same images for both, so that what makes an image easy or hard for any model
    cancels out: the interval is that of the difference, narrower than two intervals beside each other tell.

    Raises ConfigError when the two are not ranks of the same pairs.
    """
    require(
        np.array_equal(before.text_image_index, after.text_image_index)
        and len(before.image_ranks) == len(after.image_ranks),
        f"ranks of other pairs: {len(before.image_ranks)} images and {len(before.text_ranks)} texts "
        f"against {len(after.image_ranks)} and {len(after.text_ranks)}; evaluate both models on the same",
    )
    pairs = [(b, a) for (_, b, _), (_, a, _) in zip(_recalls(before), _recalls(after), strict=True)]

    def gain(weights: np.ndarray) -> np.ndarray:
        mean: np.ndarray = np.mean([a(weights) - b(weights) for b, a in pairs], axis=0)
        return mean

    return measured("mean_recall_gain", gain, len(before.image_ranks))


def _recalls(ranks: RetrievalRanks) -> Iterator[tuple[str, Statistic, int]]:
    """Name, statistic and number of queries of each recall."""
    num_images = len(ranks.image_ranks)
    for name, of_query, images in (
        ("i2t", ranks.image_ranks, np.arange(num_images)),
        ("t2i", ranks.text_ranks, ranks.text_image_index),
    ):
        for k in RECALL_AT:
            found = (of_query < k).astype(np.float64)
            yield f"{name}_r{k}", weighted_mean(found, images, num_images), len(of_query)


def evaluate_itm(
    model: MED,
    tokenizer: MEDTokenizer,
    pairs: EncodedPairs,
    *,
    seed: int = 0,
    swapped_texts: Sequence[str] | None = None,
) -> list[Metric]:
    """Return AUC and average precision of telling every true pair from a wrong text of the same image.

    There are as many wrong pairs as true ones, so that average precision starts at a half. `itm_auc_random`
    (and `itm_ap_random`) takes another image's text at random, `itm_auc_hard` the most similar one by cosine;
    neither is a text of the same words. `itm_auc_swapped` takes `swapped_texts`, one per text of `pairs`,
    where the caller has such.
    """
    images = pairs.text_image_index.tolist()
    candidates = {
        "random": list(_random_negatives(pairs, seed)),
        "hard": list(_hard_negatives(pairs)),
    }
    if swapped_texts is not None:
        require(
            len(swapped_texts) == len(images),
            f"{len(swapped_texts)} swapped_texts, but {len(images)} texts",
        )
        candidates["swapped"] = list(swapped_texts)
    usable = {
        name: [index for index, text in enumerate(texts) if text is not None]
        for name, texts in candidates.items()
    }
    rows, words = list(images), list(pairs.texts)
    for name, indices in usable.items():
        rows += [images[index] for index in indices]
        words += [candidates[name][index] or "" for index in indices]
    logits = match_logits(model, tokenizer, pairs, rows, words).double().numpy()
    true, *wrongs = np.split(
        logits[:, 1] - logits[:, 0],
        np.cumsum([len(images), *map(len, usable.values())])[:-1],
    )
    metrics = []
    for (name, indices), wrong in zip(usable.items(), wrongs, strict=True):
        if indices:
            of_pair = np.asarray(images)[indices]
            metrics.append(auc_metric(f"itm_auc_{name}", true[indices], wrong, of_pair))
            metrics.append(precision_metric(f"itm_ap_{name}", true[indices], wrong, of_pair))
    return metrics


def _random_negatives(pairs: EncodedPairs, seed: int) -> Iterator[str | None]:
    """For every text, a text of another image and of other words; None when 100 draws find none."""
    rng = np.random.default_rng(seed)
    images, own_texts = pairs.text_image_index.tolist(), _texts_of_images(pairs)
    for image in images:
        draws = (int(rng.integers(len(images))) for _ in range(100))
        found = (
            pairs.texts[index]
            for index in draws
            if images[index] != image and pairs.texts[index] not in own_texts[image]
        )
        yield next(found, None)


def _hard_negatives(pairs: EncodedPairs) -> Iterator[str | None]:
    """For every text, the text most similar to its image that is not one of the image's own."""
    own_texts = _texts_of_images(pairs)
    hardest: dict[int, str | None] = {}
    for image in pairs.text_image_index.tolist():
        if image not in hardest:
            sim = pairs.text_features @ pairs.image_features[image]
            order = (
                pairs.texts[index] for index in sim.argsort(descending=True, stable=True).tolist()
            )
            hardest[image] = next((text for text in order if text not in own_texts[image]), None)
        yield hardest[image]


def _texts_of_images(pairs: EncodedPairs) -> dict[int, set[str]]:
    texts: dict[int, set[str]] = {}
    for image, text in zip(pairs.text_image_index.tolist(), pairs.texts, strict=True):
        texts.setdefault(image, set()).add(text)
    return texts
