"""The texts of a part's images: what becomes a caption of which image, and why another does not.

An address or a picture that comes again brings another text for an image that is stored already: one image, several
texts. Each text has a row in `captions`, in the part of the row that brought it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from storage import ids
from storage.intake.cleaning import Cleaner
from storage.intake.download_config import DownloadConfig
from storage.intake.purged import PurgedImages
from storage.intake.stored import StoredImages
from storage.schemas import OK, PURGED_STATUS
from storage.tables import Counts

REPEATED = "repeated"
"""Status of a text that its image has already."""
TOO_MANY = "too_many_texts"
"""Status of a text whose image has as many as one may have."""
DUPLICATES = ("duplicate_url", "duplicate_image")
"""Statuses of rows that show what an earlier row shows, to the byte."""


class WebTexts:
    """The rows of `captions` that the rows of a part of `pairs` give, part after part."""

    def __init__(
        self, config: DownloadConfig, images: StoredImages, purged: PurgedImages | None = None
    ) -> None:
        """`images` are those of the parts before, whenever asked. Raises ConfigError as `Cleaner` does.

        `purged` is needed where a row may be taken for another by its address, without a look at its picture.
        """
        self._images, self._purged = images, purged
        self._most = config.texts_per_image
        self._cleaner = Cleaner(config)

    def unite(self, pairs: list[dict[str, Any]], planned: list[dict[str, Any]]) -> None:
        """Let duplicates among `pairs` name the image that they show, and where it lies.

        `planned` are the same rows as the plan has them. Pairs that are ok have their places already. A picture that is
        refused has none, and its texts go no further; what is said of one that was purged is not even kept.
        """
        by_row: dict[int, dict[str, Any]] = {}
        by_image = {pair["image_id"]: pair for pair in pairs if pair["status"] == OK}
        for pair, plan in zip(pairs, planned, strict=True):
            if pair["status"] in (OK, PURGED_STATUS):
                by_row[pair["row"]] = pair
            if pair["status"] not in DUPLICATES:
                continue
            image_id = pair.get("image_id") or plan["known_image"]
            if image_id is None and plan["first_row"] is not None:
                first = by_row.get(plan["first_row"])
                image_id = (
                    first.get("image_id") if first else self._images.of_row(plan["first_row"])
                )
            if image_id is None:
                continue
            gone = self._purged.outcome(image_id) if self._purged else None
            if gone is not None:
                pair |= gone
                by_row[pair["row"]] = pair
                continue
            if self._most == 1:
                continue
            here, there = by_image.get(image_id), self._images.place(image_id)
            if here is not None:
                where = {name: here[name] for name in ("shard", "offset", "size")}
            elif there is not None:
                where = {"shard": there.shard, "offset": there.offset, "size": there.size}
            else:
                continue
            pair |= where | {"image_id": image_id}
            by_row[pair["row"]] = pair

    def captions(
        self,
        pairs: list[dict[str, Any]],
        planned: list[dict[str, Any]],
        texts: Sequence[Sequence[str]] | None = None,
    ) -> list[dict[str, Any]]:
        """A row of `captions` for each text of an image that is stored, in the order of the pairs.

        `texts` are those of each pair, where one may have several; without them each has its alt_text.
        Which of an image's texts are kept depends on their order in the lists alone.
        """
        found = []
        has: dict[str, set[str]] = {}
        for place, (pair, plan) in enumerate(zip(pairs, planned, strict=True)):
            if pair.get("shard") is None:
                continue
            image_id = pair["image_id"]
            if image_id not in has:
                is_first = pair["status"] == OK
                has[image_id] = set() if is_first else self._images.texts(image_id)
            for given in [pair["alt_text"] or ""] if texts is None else texts[place]:
                text = self._cleaner.cleaned(given)
                if not text.strip():
                    continue
                caption_id = ids.caption_id(image_id, "web", text)
                status = self._cleaner.refusal(text, is_placeholder=plan["is_placeholder"])
                if status is None:
                    status = self._place(caption_id, has[image_id])
                found.append(
                    {
                        "caption_id": caption_id,
                        "image_id": image_id,
                        "source": "web",
                        "caption": text,
                        "status": status,
                        "round": 0,
                    }
                )
        return found

    def _place(self, caption_id: str, has: set[str]) -> str:
        """The outcome of a text that meets no rule, among those that its image has."""
        if caption_id in has:
            return REPEATED
        if len(has) >= self._most:
            return TOO_MANY
        has.add(caption_id)
        return OK


def counts_of_texts(
    pairs: list[dict[str, Any]],
    captions: list[dict[str, Any]],
    texts: Sequence[Sequence[str]] | None = None,
) -> Counts:
    """Of the texts that rows with a stored image bring (a row without one counts as one): what goes on, the rest by outcome."""
    stored = (place for place, pair in enumerate(pairs) if pair.get("shard") is not None)
    num_in = sum(1 if texts is None else max(len(texts[place]), 1) for place in stored)
    reasons = Counter(text["status"] for text in captions if text["status"] != OK)
    reasons["no_text"] = num_in - len(captions)
    return Counts(
        num_in=num_in, num_ok=num_in - reasons.total(), reasons=dict(sorted((+reasons).items()))
    )


def texts_by_image(captions: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Ids of the ok captions among some rows, by image."""
    found: dict[str, list[str]] = {}
    for text in captions:
        if text["status"] == OK:
            found.setdefault(text["image_id"], []).append(text["caption_id"])
    return found
