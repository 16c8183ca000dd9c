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
from blip_core.evaluation import Metric, mean_metric

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
    pycocoevalcap's scale, on which 1.0 is what papers print as 100. CIDEr and ROUGE-L, which are means over
    images, have bootstrap intervals.
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
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    _, per_image_cider = Cider().compute_score(truths, results)
    bleu, _ = Bleu(4).compute_score(truths, results, verbose=0)
    _, per_image_rouge = Rouge().compute_score(truths, results)
    return [
        mean_metric("cider", np.asarray(per_image_cider, dtype=np.float64)),
        Metric("bleu4", float(bleu[3]), len(results)),
        mean_metric("rouge_l", np.asarray(per_image_rouge, dtype=np.float64)),
    ]


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
    return [Metric("meteor", float(value), len(per_image))]
