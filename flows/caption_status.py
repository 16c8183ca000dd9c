"""What became of a caption: one word for the `status` column."""

from __future__ import annotations

from blip_core import GeneratedCaption
from storage.schemas import OK

EMPTY, DEGENERATE, REPEATED, MODEL_ERROR = "empty", "degenerate", "repeated", "model_error"
LEAST_REPEATS = 3
"""Times that a caption must say its one word to be degenerate: `very very` may be meant."""


def caption_status(caption: GeneratedCaption) -> str:
    """`ok`, or why this caption is not scored: `model_error`, `empty` or `degenerate`.

    Degenerate is a caption that says one word and nothing else, three times or more: what a captioner falls into
    when it has lost the thread. Whether it repeats another caption of its image is not seen from here.
    """
    if caption.finish_reason == "nan":
        return MODEL_ERROR
    words = caption.text.casefold().split()
    if not words:
        return EMPTY
    is_one_word = len(set(words)) == 1 and len(words) >= LEAST_REPEATS
    return DEGENERATE if is_one_word else OK
