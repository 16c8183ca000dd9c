"""What is measured on a held-out split of photographs: the probes, the trained model and its captions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import probe
import torch
from photo_pairs import Split, pixel_batches

from blip_core import (
    MED,
    CaptionConfig,
    EncodedPairs,
    MEDCaptioner,
    MEDTokenizer,
    Metric,
    caption_metrics,
    encode_pairs,
    evaluate_itm,
    evaluate_retrieval,
)

NUM_PROBE = 1500
MAX_TEXT_TOKENS = 24


def held_out(model: MED, tokenizer: MEDTokenizer, split: Split) -> EncodedPairs:
    """Encode a split from its vision tokens."""
    return encode_pairs(
        model,
        tokenizer,
        split.token_batches(),
        split.captions,
        max_text_tokens=MAX_TEXT_TOKENS,
        max_held_bytes=4 << 30,
    )


def values_of(metrics: Sequence[Metric]) -> dict[str, float]:
    """Return metrics by name, without their intervals."""
    return {metric.name: metric.value for metric in metrics}


def fitted_probes(
    model: MED, tokenizer: MEDTokenizer, splits: dict[str, Split], folder: Path
) -> Callable[[str], dict[str, EncodedPairs]]:
    """Fit the probe on 1,500 and on all train images, by dev; returns what gives their features of a split.

    `model` still has MiniLM's own weights; what it makes of the texts is kept in `folder`.
    """
    images, texts = {}, {}
    for name, split in splits.items():
        images[name] = probe.image_features(split.tokens)
        flat = [text for of_image in split.captions for text in of_image]
        path = folder / f"probe-{name}.pt"
        if not path.exists():
            partial = path.with_suffix(".tmp")
            torch.save(probe.text_features(model, tokenizer, flat), partial)
            partial.replace(path)
        texts[name] = torch.load(path)
    index = probe.index_of(splits["train"].captions)
    counts = torch.bincount(index)[:, None]
    means = torch.zeros(len(counts), texts["train"].shape[1]).index_add_(0, index, texts["train"])
    means = means / counts
    dev_index = probe.index_of(splits["dev"].captions)
    ridges = {}
    for size in sorted({min(NUM_PROBE, len(means)), len(means)}):
        ridge, penalty = probe.best_ridge(
            images["train"][:size], means[:size], images["dev"], texts["dev"], dev_index
        )
        ridges[f"probe, {size} images"] = ridge
        print(f"probe on {size} images: penalty {penalty}", flush=True)

    def on_split(name: str) -> dict[str, EncodedPairs]:
        captions = splits[name].captions
        return {
            title: probe.as_pairs(ridge(images[name]), ridge.centred(texts[name]), captions)
            for title, ridge in ridges.items()
        }

    return on_split


def measured_pairs(
    model: MED,
    tokenizer: MEDTokenizer,
    split: Split,
    probes: dict[str, EncodedPairs],
    *,
    rerank_k: int,
) -> dict[str, list[Metric]]:
    """Measure the probes and the trained model on a split, in float32."""
    pairs = held_out(model, tokenizer, split)
    found = {}
    for title, each in {**probes, "MED, ITC alone": pairs}.items():
        recalls = evaluate_retrieval(model, tokenizer, each)
        found[title] = [*recalls, probe.cosine_auc(each)]
    found["MED, re-ranked"] = [
        *evaluate_retrieval(model, tokenizer, pairs, rerank_k=rerank_k),
        *evaluate_itm(model, tokenizer, pairs),
    ]
    gains = {f"MED, ITC minus {title}": probe.gains(pairs, each) for title, each in probes.items()}
    return found | gains


def measured_captions(
    photos: Path, model: MED, tokenizer: MEDTokenizer, split: Split, limit: int
) -> tuple[list[Metric], dict[str, str]]:
    """Caption the first images of a split with beam search, and measure the captions."""
    chosen = split.names[:limit]
    decoding = CaptionConfig(decoding="beam", num_beams=3, max_new_tokens=20, min_new_tokens=4)
    captioner = MEDCaptioner(model, tokenizer, decoding)
    captions: dict[str, str] = {}
    size = model.config.vision.image_size_px
    for pixel_values in pixel_batches(photos, chosen, size):
        names = chosen[len(captions) : len(captions) + len(pixel_values)]
        found = captioner.caption(pixel_values, names)
        captions |= {name: rows[0].text for name, rows in zip(names, found, strict=True)}
    references = dict(zip(chosen, split.captions, strict=False))  # of the first images alone
    return caption_metrics(captions, references), captions
