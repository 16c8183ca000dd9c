"""CIDEr, BLEU-4, ROUGE-L and METEOR of generated captions, through pycocoevalcap.

Captions are tokenised here and not by Stanford's Java tokenizer: lower case, words and contractions as the Penn
Treebank splits them, punctuation left out. METEOR is itself a Java program and is absent without one.
"""

import logging
import re
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from blip_core.config import require
from blip_core.intervals import Metric, Statistic, mean_metric, measured

logger = logging.getLogger(__name__)

_TOKEN = re.compile(r"n't\b|'(?:s|m|d|ll|re|ve)\b|\w+?(?=n't\b)|\w+(?:[-.]\w+)*")


def ptb_tokens(text: str) -> list[str]:
    """Split a caption as the Penn Treebank does, without punctuation."""
    return _TOKEN.findall(text.lower().replace("\u2019", "'"))


def caption_metrics(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> list[Metric]:
    """Return cider, bleu4, rouge_l and, with Java, meteor of one caption per image.

    Both mappings have image ids as keys, the same ones; an image needs at least one reference. CIDEr is on
    pycocoevalcap's scale, on which 1.0 is what papers print as 100. Intervals come from resampled images: of
    means for CIDEr (word weights as they are) and ROUGE-L, of the corpus for BLEU-4; METEOR's own figure is
    not a mean, and has the interval of the mean of its scores of images, shifted to that figure.
    """
    require(bool(captions), "there are no captions to evaluate")
    absent = sorted(set(captions) ^ set(references))
    require(not absent, f"captions and references differ in images: {', '.join(absent[:5])}")
    bare = sorted(image for image, texts in references.items() if not texts)
    require(not bare, f"images without a reference: {', '.join(bare[:5])}")
    results = {image: [_joined(text)] for image, text in sorted(captions.items())}
    truths = {image: [_joined(text) for text in references[image]] for image in results}
    return [*_python_metrics(truths, results), *_meteor(truths, results)]


def _joined(text: str) -> str:
    return " ".join(ptb_tokens(text))


def _python_metrics(truths: dict[str, list[str]], results: dict[str, list[str]]) -> list[Metric]:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    _, per_image_cider = Cider().compute_score(truths, results)
    _, per_image_rouge = Rouge().compute_score(truths, results)
    return [
        mean_metric("cider", np.asarray(per_image_cider, dtype=np.float64)),
        measured("bleu4", _corpus_bleu4(truths, results), len(results)),
        mean_metric("rouge_l", np.asarray(per_image_rouge, dtype=np.float64)),
    ]


def _corpus_bleu4(truths: dict[str, list[str]], results: dict[str, list[str]]) -> Statistic:
    """BLEU-4 of the drawn images as one corpus, from pycocoevalcap's counts of each."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for image, (text,) in results.items():
        scorer += (text, truths[image])
    tested = np.array([counts["testlen"] for counts in scorer.ctest], dtype=np.float64)
    closest = [
        min((abs(length - counts["testlen"]), length) for length in counts["reflen"])[1]
        for counts in scorer.ctest
    ]
    referred = np.array(closest, dtype=np.float64)
    right = np.array([counts["correct"] for counts in scorer.ctest], dtype=np.float64)
    guessed = np.array([counts["guess"] for counts in scorer.ctest], dtype=np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        precision = (weights @ right + 1e-15) / (weights @ guessed + 1e-9)  # (R, 4)
        ratio = (weights @ tested + 1e-15) / (weights @ referred + 1e-9)
        brevity = np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))
        bleu: np.ndarray = np.prod(precision, axis=1) ** 0.25 * brevity
        return bleu

    return statistic


def _meteor(truths: dict[str, list[str]], results: dict[str, list[str]]) -> list[Metric]:
    if shutil.which("java") is None:
        logger.warning("METEOR is left out: it needs Java, and no java is on the PATH")
        return []
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        value, per_image = meteor.compute_score(truths, results)
    except (OSError, ValueError) as err:
        logger.warning("METEOR is left out: its Java program failed: %s", err)
        return []
    finally:
        process = meteor.meteor_p
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
    scores = np.asarray(per_image, dtype=np.float64)
    shift = float(value) - scores.mean()
    return [mean_metric("meteor", scores + shift)]
