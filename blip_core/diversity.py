"""How varied a set of captions is: what a captioner loses first when a loop feeds on itself.

Distinct n-grams are those of Li et al. 2016 (arXiv 1510.03055), self-BLEU that of Zhu et al. 2018 (Texygen, arXiv
1802.01886). Both depend on how many texts there are: compare sets of equal size only.
"""

from collections.abc import Sequence

import numpy as np

from blip_core.caption_evaluation import ptb_tokens
from blip_core.config import require
from blip_core.intervals import Metric

DISTINCT_N = (1, 2, 3)
SELF_BLEU_TEXTS = 200
"""Texts that self-BLEU compares with each other: its time grows with their square (about a second for 200)."""


def caption_diversity(texts: Sequence[str]) -> list[Metric]:
    """Return what a captioner's texts, one for each image, say about its variety.

    distinct_share (different texts), distinct_1 .. distinct_3 (different n-grams, as shares of all), self_bleu
    (of the first 200 texts), vocabulary (different words), length_mean, length_p5, length_p50 and length_p95 (in
    words). Texts are compared as words in lower case, without punctuation. Raises ConfigError without a text.
    """
    require(bool(texts), "there are no captions to look at")
    words = [tuple(ptb_tokens(text)) for text in texts]
    lengths = np.array([len(text) for text in words])
    figures = {"distinct_share": len(set(words)) / len(words)}
    figures |= {f"distinct_{n}": _distinct_share(words, n) for n in DISTINCT_N}
    figures["vocabulary"] = float(len({word for text in words for word in text}))
    figures["length_mean"] = float(lengths.mean())
    for percent in (5, 50, 95):
        figures[f"length_p{percent}"] = float(np.percentile(lengths, percent))
    metrics = [Metric(name, value, len(texts)) for name, value in figures.items()]
    compared = words[:SELF_BLEU_TEXTS]
    if len(compared) > 1:
        metrics.append(Metric("self_bleu", _self_bleu(compared), len(compared)))
    return metrics


def _distinct_share(words: Sequence[tuple[str, ...]], n: int) -> float:
    """Different n-grams as a share of all; 0 where no text has n words."""
    grams = [text[i : i + n] for text in words for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _self_bleu(words: Sequence[tuple[str, ...]]) -> float:
    """Mean BLEU-4 of each text against all others: 1 when every text says the same."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    texts = [" ".join(text) for text in words]
    scorer = BleuScorer(n=4)
    for place, text in enumerate(texts):
        scorer += (text, texts[:place] + texts[place + 1 :])
    _, by_text = scorer.compute_score(option="closest")
    return float(np.mean(by_text[3]))
