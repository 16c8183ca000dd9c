"""Captioning: every web image of a shard gets k new captions (paper, section 3.3)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from blip_core import GeneratedCaption
from flows.caption_status import REPEATED, caption_status
from flows.foreign_models import basis_fields
from flows.session import Run
from flows.settings import curate_basis
from flows.stream import ImageRow
from storage import ModelRef, PartRef, basis_of, caption_id, fingerprint, read_part
from storage.fingerprint import Basis

logger = logging.getLogger(__name__)

STAGE_VERSION = 3
"""3: pictures are decoded no larger than the model reads and resized by torch; 16-bit greys keep their range;
captions of one word are `degenerate`, captions without numbers `model_error`."""

Text = tuple[str, str]
"""(caption_id, caption)."""


def caption_basis(run: Run, images: Sequence[ImageRow], captioner: ModelRef) -> Basis:
    """What the captions of a shard's images are made of."""
    config = curate_basis(run.settings.caption) | basis_fields(captioner)
    config |= {"seed": run.settings.seed}
    inputs = [images_input([row.image_id for row in images])]
    return basis_of("caption", STAGE_VERSION, config, inputs, captioner.model_id)


def images_input(image_ids: list[str]) -> str:
    """The images of a shard by content: one that was dropped and fetched anew may hold others."""
    return fingerprint("images", 1, {"image_ids": image_ids}, [])


def web_images(run: Run, pairs: PartRef) -> list[ImageRow]:
    """The ok web images of a pairs part, in row order."""
    columns = ["image_id", "shard", "offset", "size", "status", "pool"]
    table = read_part(run.lake, pairs, columns)
    return [
        ImageRow(
            image_id=row["image_id"], shard=row["shard"], offset=row["offset"], size=row["size"]
        )
        for row in table.to_pylist()
        if row["status"] == "ok" and row["pool"] == "web"
    ]


def guest_images(run: Run, pairs: PartRef) -> list[ImageRow]:
    """Images of other shards that rows of a pairs part have a text for, in the order in which they lie."""
    columns = ["image_id", "shard", "offset", "size", "status", "pool"]
    rows = read_part(run.lake, pairs, columns).to_pylist()
    found = {
        ImageRow(
            image_id=row["image_id"], shard=row["shard"], offset=row["offset"], size=row["size"]
        )
        for row in rows
        if row["pool"] == "web" and row["status"] != "ok" and row["shard"] not in (None, pairs.name)
    }
    return sorted(found, key=lambda row: (row.shard, row.offset))


class CaptionRows:
    """Rows of `captions` for one shard, kept in the order of its images whenever they are made.

    An image that cannot be decoded, and a caption that comes out empty, is a row with a status and no text; one that
    only says a word over and over keeps its text, but is not ok.
    """

    table = "captions"

    def __init__(self, run: Run, captioner: ModelRef, basis: Basis) -> None:
        self.basis = basis
        self._run, self._captioner = run, captioner
        self._by_place: dict[int, list[dict[str, Any]]] = {}

    def made(self, place: int, image_id: str, captions: Sequence[GeneratedCaption]) -> list[Text]:
        """Take the captions of the image at `place`; returns the texts that are to be scored.

        The same words twice for one image are one caption.
        """
        records: list[dict[str, Any]] = []
        seen: set[str] = set()
        for index, caption in enumerate(captions):
            text = caption.text.strip()
            logprob = caption.mean_logprob
            record = self._record(image_id, index, text)
            record |= {
                "num_tokens": caption.num_tokens,
                "mean_logprob": logprob if math.isfinite(logprob) else None,
                "finish_reason": caption.finish_reason,
            }
            status = caption_status(caption)
            if not text:
                record |= {"status": status, "caption": None}
            elif text in seen:
                record["status"] = REPEATED
            else:
                record["status"] = status
            seen.add(text)
            records.append(record)
        self._by_place[place] = records
        ok = [record for record in records if record["status"] == "ok"]
        return [(record["caption_id"], record["caption"]) for record in ok]

    def failed(self, place: int, image_id: str, status: str, error: str) -> None:
        """Take that there is no caption of the image at `place`."""
        logger.warning("image %s got no caption: %s", image_id, error)
        record = self._record(image_id, 0, "") | {"status": status, "caption": None}
        self._by_place[place] = [record]

    def records(self) -> list[dict[str, Any]]:
        """All rows, in the order of the images."""
        return [record for place in sorted(self._by_place) for record in self._by_place[place]]

    def _record(self, image_id: str, index: int, text: str) -> dict[str, Any]:
        settings = self._run.settings.caption
        return {
            "caption_id": caption_id(image_id, "synthetic", text),
            "image_id": image_id,
            "source": "synthetic",
            "caption": text,
            "model_id": self._captioner.model_id,
            "top_p": settings.top_p if settings.decoding in ("nucleus", "official") else None,
            "seed": self._run.settings.seed,
            "index": index,
            "status": "ok",
            "round": self._run.round,
        }
