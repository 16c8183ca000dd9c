"""Scoring: the filter's itm_prob and itc_sim for every web and synthetic text of a shard."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blip_core import PairScore
from flows.errors import MissingInput
from flows.foreign_models import basis_fields
from flows.session import Run
from flows.settings import curate_basis
from flows.steps.caption import Text
from storage import ModelRef, PartRef, basis_of, committed_part, fingerprint, layout, read_part
from storage.fingerprint import Basis

logger = logging.getLogger(__name__)

STAGE_VERSION = 2
"""2: pictures are decoded no larger than the model reads and resized by torch; 16-bit greys keep their range."""


def score_basis(run: Run, caption_ids: Iterable[str], scorer: ModelRef) -> Basis:
    """What the scores of a shard's texts are made of."""
    inputs = [texts_input(caption_ids)]
    config = curate_basis(run.settings.score) | basis_fields(scorer)
    return basis_of("score", STAGE_VERSION, config, inputs, scorer.model_id)


def texts_input(caption_ids: Iterable[str]) -> str:
    """The texts of a shard, in any order."""
    return fingerprint("captions", 1, {"caption_ids": sorted(caption_ids)}, [])


def texts_by_image(run: Run, pairs: PartRef, *, captioned: bool) -> dict[str, list[Text]]:
    """The ok texts of a pairs part that are to be scored, by image: web texts, and the round's captions where there are any.

    Of another decoding only its captions: web texts have their scores from the round. MissingInput before captioning.
    """
    places = [("captions", pairs.name, 0)] if run.variant is None else []
    if captioned:
        table = layout.variant_table("captions", run.variant)
        places.append((table, layout.variant_part(pairs.name, run.variant), run.round))
    texts: dict[str, list[Text]] = {}
    for table, name, number in places:
        part = committed_part(run.lake, table, name, round=number)
        if part is None:
            stage = "compare" if run.variant else "caption" if number else "ingest"
            raise MissingInput(
                f"shard {pairs.name} has no {table} of round {number}; run `bootstrap {stage}` first"
            )
        rows = read_part(run.lake, part, ["caption_id", "image_id", "caption", "status"])
        for row in rows.to_pylist():
            if row["status"] == "ok":
                texts.setdefault(row["image_id"], []).append((row["caption_id"], row["caption"]))
    return texts


class ScoreRows:
    """Rows of `scores` for one shard, kept in the order of its images whenever they are made.

    A text that could not be scored is a row with its error.
    """

    table = "scores"

    def __init__(self, run: Run, scorer: ModelRef, texts_of: Mapping[str, list[Text]]) -> None:
        """`texts_of` are the texts that are there before any caption is made, by image."""
        self.texts_of = {image_id: list(texts) for image_id, texts in texts_of.items()}
        self._run, self._scorer = run, scorer
        self._by_place: dict[int, list[dict[str, Any]]] = {}

    @property
    def basis(self) -> Basis:
        """What the rows are made of, once all texts are there."""
        ids = (text[0] for texts in self.texts_of.values() for text in texts)
        return score_basis(self._run, ids, self._scorer)

    def add_texts(self, image_id: str, texts: Sequence[Text]) -> list[Text]:
        """Take texts of an image that were just written; returns all that it has."""
        if texts:
            self.texts_of.setdefault(image_id, []).extend(texts)
        return self.texts_of.get(image_id, [])

    def made(self, place: int, image_id: str, scores: Sequence[PairScore]) -> None:
        """Take a score for each text of the image at `place`."""
        records = []
        for text, score in zip(self.texts_of[image_id], scores, strict=True):
            problem = _not_finite(score)
            record = self._record(image_id, text)
            if problem is None:
                record |= {"itm_prob": score.itm_prob, "itc_sim": score.itc_sim}
            else:
                record |= {"status": "model_error", "error": problem}
            records.append(record)
        self._by_place[place] = records

    def failed(self, place: int, image_id: str, status: str, error: str) -> None:
        """Take that no text of the image at `place` could be scored."""
        texts = self.texts_of.get(image_id, [])
        failure = {"status": status, "error": error}
        self._by_place[place] = [self._record(image_id, text) | failure for text in texts]

    def records(self) -> list[dict[str, Any]]:
        """All rows, in the order of the images."""
        return [record for place in sorted(self._by_place) for record in self._by_place[place]]

    def _record(self, image_id: str, text: Text) -> dict[str, Any]:
        return {
            "caption_id": text[0],
            "image_id": image_id,
            "model_id": self._scorer.model_id,
            "itm_prob": None,
            "itc_sim": None,
            "status": "ok",
            "error": None,
            "round": self._run.round,
        }


def _not_finite(pair: PairScore) -> str | None:
    """What is wrong with a score; None when nothing is."""
    numbers = {"itm_prob": pair.itm_prob, "itc_sim": pair.itc_sim}
    bad = [
        name for name, value in numbers.items() if value is not None and not math.isfinite(value)
    ]
    return f"{' and '.join(bad)} not finite" if bad else None
