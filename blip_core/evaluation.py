"""Retrieval and matching on held-out pairs (BLIP, sections 5.1 and 3.2).

Dimension key: I images, T texts, B batch, P image tokens, L text tokens, D width, E shared width, N pairs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip_core.config import require
from blip_core.med import MED
from blip_core.tokenizer import MEDTokenizer, clean_caption

RECALL_AT = (1, 5, 10)
_PAIR_BATCH = 256


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure, what it rests on, and its 95 % bootstrap interval where one was computed."""

    name: str
    value: float
    n: int
    """Images, texts or pairs that the figure is a mean over."""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """A held-out set, encoded once for every evaluation; on the CPU."""

    image_embeds: Tensor
    """(I, P, D)."""
    image_features: Tensor
    """(I, E), L2-normalised."""
    text_features: Tensor
    """(T, E), L2-normalised."""
    texts: list[str]
    """T cleaned texts."""
    text_image_index: Tensor
    """(T,) int64: the image that a text describes."""


@torch.inference_mode()
def encode_pairs(
    model: MED,
    tokenizer: MEDTokenizer,
    images: Iterable[Tensor],
    captions: Sequence[Sequence[str]],
    *,
    device: torch.device | str = "cpu",
    max_text_tokens: int = 35,
) -> EncodedPairs:
    """Encode batches of pixel values (B, 3, S, S) and the captions of every image, in the same order."""
    model = model.to(device).eval()
    embeds = [model.encode_image(pixel_values.to(device)) for pixel_values in images]
    require(bool(embeds), "there are no images to evaluate on")
    num_images = sum(len(batch) for batch in embeds)
    require(
        num_images == len(captions), f"{num_images} images, but captions of {len(captions)} images"
    )
    texts = [clean_caption(text) for of_image in captions for text in of_image]
    require(bool(texts), "there are no captions to evaluate on")
    features = []
    for start in range(0, len(texts), _PAIR_BATCH):
        chunk = texts[start : start + _PAIR_BATCH]
        tokens = tokenizer.encode(chunk, max_text_tokens).to(device)
        features.append(model.text_features(tokens.input_ids, tokens.attention_mask).float().cpu())
    index = [image for image, of_image in enumerate(captions) for _ in of_image]
    return EncodedPairs(
        image_embeds=torch.cat([batch.cpu() for batch in embeds]),
        image_features=torch.cat([model.image_features(batch).float().cpu() for batch in embeds]),
        text_features=torch.cat(features),
        texts=texts,
        text_image_index=torch.tensor(index),
    )


@torch.inference_mode()
def match_logits(
    model: MED,
    tokenizer: MEDTokenizer,
    pairs: EncodedPairs,
    image_rows: Sequence[int],
    texts: Sequence[str],
    *,
    max_text_tokens: int = 35,
) -> Tensor:
    """Return ITM logits (N, 2) of images `image_rows` with `texts`, both of length N; on the CPU."""
    parts = [torch.zeros(0, 2)]
    for start in range(0, len(texts), _PAIR_BATCH):
        rows = torch.tensor(list(image_rows[start : start + _PAIR_BATCH]))
        chunk = [clean_caption(text) for text in texts[start : start + _PAIR_BATCH]]
        tokens = tokenizer.encode(chunk, max_text_tokens).to(model.device)
        logits = model.itm_logits(
            pairs.image_embeds[rows].to(model.device),
            tokenizer.encoder_ids(tokens.input_ids),
            tokens.attention_mask,
        )
        parts.append(logits.float().cpu())
    return torch.cat(parts)


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

    An image without a text gets rank T, which is never found.
    """
    num_images, num_texts = sim.shape
    image_ranks = torch.full((num_images,), num_texts)
    text_ranks = torch.empty(num_texts, dtype=torch.int64)
    text_order, image_order = torch.arange(num_texts), torch.arange(num_images)
    for text, image in enumerate(text_image_index.tolist()):
        own = sim[image, text]
        row, column = sim[image], sim[:, text]
        ahead = int(((row > own) | ((row == own) & (text_order < text))).sum())
        image_ranks[image] = min(int(image_ranks[image]), ahead)
        text_ranks[text] = int(((column > own) | ((column == own) & (image_order < image))).sum())
    return image_ranks, text_ranks


def rerank(
    model: MED, tokenizer: MEDTokenizer, pairs: EncodedPairs, sim: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return similarities (I, T) re-ranked by matching: per image its top k texts, per text its top k images.

    A candidate gets its match logit plus its cosine, as the reference does; all others rank below, in the
    order of their cosines.
    """
    num_images, num_texts = sim.shape
    by_image, by_text = sim - 1e4, sim - 1e4
    top_texts = sim.topk(min(k, num_texts), dim=1).indices
    top_images = sim.topk(min(k, num_images), dim=0).indices
    image_rows = torch.arange(num_images)[:, None].expand_as(top_texts).flatten()
    text_rows = torch.arange(num_texts)[None, :].expand_as(top_images).flatten()
    for target, images, texts in (
        (by_image, image_rows, top_texts.flatten()),
        (by_text, top_images.flatten(), text_rows),
    ):
        words = [pairs.texts[index] for index in texts.tolist()]
        match = match_logits(model, tokenizer, pairs, images.tolist(), words)[:, 1]
        target[images, texts] = match + sim[images, texts]
    return by_image, by_text


def evaluate_retrieval(
    model: MED, tokenizer: MEDTokenizer, pairs: EncodedPairs, *, rerank_k: int = 0
) -> list[Metric]:
    """Return recalls at 1, 5, 10 in both directions and their mean; `rerank_k` 0 ranks by cosine alone."""
    sim = pairs.image_features @ pairs.text_features.T
    by_image, by_text = sim, sim
    if rerank_k:
        by_image, by_text = rerank(model, tokenizer, pairs, sim, rerank_k)
    image_ranks, _ = retrieval_ranks(by_image, pairs.text_image_index)
    _, text_ranks = retrieval_ranks(by_text, pairs.text_image_index)
    metrics = []
    for name, ranks in (("i2t", image_ranks), ("t2i", text_ranks)):
        for k in RECALL_AT:
            hits = (ranks < k).double().numpy()
            metrics.append(mean_metric(f"{name}_r{k}", hits))
    mean = sum(metric.value for metric in metrics) / len(metrics)
    return [*metrics, Metric("mean_recall", mean, len(image_ranks))]


def evaluate_itm(
    model: MED,
    tokenizer: MEDTokenizer,
    pairs: EncodedPairs,
    *,
    seed: int = 0,
    swapped_texts: Sequence[str] | None = None,
) -> list[Metric]:
    """Return the AUC of telling every true pair from a wrong text of the same image.

    `itm_auc_random` takes another image's text at random, `itm_auc_hard` the most similar one by cosine;
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
    true = _match_prob(model, tokenizer, pairs, images, pairs.texts)
    metrics = []
    for name, texts in candidates.items():
        usable = [index for index, text in enumerate(texts) if text is not None]
        wrong = _match_prob(
            model, tokenizer, pairs, [images[i] for i in usable], [texts[i] or "" for i in usable]
        )
        if usable:
            metrics.append(auc_metric(f"itm_auc_{name}", true[usable], wrong))
    return metrics


def itm_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the probability that a positive (N,) is above a negative (M,); equal values count half."""
    values = np.concatenate([positive, negative])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2.0  # 1-based, the mean over equal values
    rank_sum = float(mean_ranks[inverse[: len(positive)]].sum())
    above = rank_sum - len(positive) * (len(positive) + 1) / 2.0
    return above / (len(positive) * len(negative))


def mean_metric(name: str, values: np.ndarray, *, num_resamples: int = 1000) -> Metric:
    """Return the mean of values (n,) with its bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(num_resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Metric(name, float(values.mean()), len(values), float(low), float(high))


def auc_metric(
    name: str, positive: np.ndarray, negative: np.ndarray, *, num_resamples: int = 200
) -> Metric:
    """Return the AUC of paired values (n,) and (n,) with its bootstrap interval over pairs."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(num_resamples):
        rows = rng.integers(0, len(positive), len(positive))
        drawn.append(itm_auc(positive[rows], negative[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Metric(name, itm_auc(positive, negative), len(positive), float(low), float(high))


def _match_prob(
    model: MED,
    tokenizer: MEDTokenizer,
    pairs: EncodedPairs,
    images: Sequence[int],
    texts: Sequence[str],
) -> np.ndarray:
    logits = match_logits(model, tokenizer, pairs, images, texts)
    return (logits[:, 1] - logits[:, 0]).double().sigmoid().numpy()


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
