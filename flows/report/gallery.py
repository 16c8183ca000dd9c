"""Which pictures the page shows: the surest and the closest calls of the filter, kept and dropped."""

import logging
from collections.abc import Mapping
from typing import Any

import duckdb

from flows.report import queries
from flows.report.asking import ReadImage, ask
from flows.report.facts import Card, GalleryGroup, TextFacts
from flows.report.thumbnails import thumbnail_uri
from storage.errors import StorageError

logger = logging.getLogger(__name__)

MAX_PICTURE_BYTES = 3_500_000
"""All pictures of the page together, as text; the page stays below 5 MB."""

# (key, kept, order by itm_prob, title, note)
RULES = (
    (
        "kept-close",
        True,
        "ASC",
        "Kept, but only just",
        "Just above the threshold: where a stricter filter would cut first.",
    ),
    (
        "dropped-close",
        False,
        "DESC",
        "Dropped, but only just",
        "Just below the threshold: where good texts are lost, if they are.",
    ),
    (
        "kept-sure",
        True,
        "DESC",
        "Kept with confidence",
        "The highest itm_prob of either source.",
    ),
    (
        "dropped-sure",
        False,
        "ASC",
        "Dropped with confidence",
        "The lowest itm_prob of either source.",
    ),
)

# (key, query, title, note)
ASKED = (
    (
        "replaced",
        queries.PICK_REPLACED,
        "Web text out, synthetic caption in",
        "What the loop is for: the web text was dropped and a caption of our own stands in for it.",
    ),
    (
        "judge-apart",
        queries.PICK_APART,
        "Judge and filter part",
        "Where the scorer outside the loop differs most from the round's filter.",
    ),
    (
        "changed",
        queries.PICK_CHANGED,
        "Most changed since the round before",
        "The same text of the same picture, seen otherwise by the filter of the round before.",
    ),
)

# image_id and the caption_id that it was chosen for
Pick = tuple[str, str]


def gather_gallery(
    connection: duckdb.DuckDBPyConnection,
    about: Mapping[str, Any],
    read_image: ReadImage,
    limit: int,
) -> tuple[GalleryGroup, ...]:
    """Up to `limit` pictures for each rule, web and synthetic by turns."""
    if limit == 0:
        return ()
    chosen: dict[str, list[Pick]] = {}
    for key, sql, _, _ in ASKED:
        rows = ask(connection, sql, {**about, "limit": limit})
        chosen[key] = list({row["image_id"]: row["caption_id"] for row in rows[::-1]}.items())[::-1]
    for key, kept, order, _, _ in RULES:
        chosen[key] = _pick(connection, about, kept, order, limit)
    images = sorted({image_id for picks in chosen.values() for image_id, _ in picks})
    cards = _Cards(connection, about, images, read_image)
    titles = {key: (title, note) for key, _, _, title, note in RULES}
    titles |= {key: (title, note) for key, _, title, note in ASKED}
    return tuple(
        GalleryGroup(
            key=key,
            title=titles[key][0],
            note=titles[key][1],
            cards=tuple(cards.card(*pick) for pick in picks),
        )
        for key, picks in chosen.items()
    )


def _pick(
    connection: duckdb.DuckDBPyConnection,
    about: Mapping[str, Any],
    kept: bool,
    order: str,
    limit: int,
) -> list[Pick]:
    """The first texts of each source in the given order, by turns, one for each picture."""
    sql = queries.PICK.format(texts=queries.TEXTS, order=order)
    lists = [
        ask(connection, sql, {**about, "kept": kept, "source": source, "limit": limit})
        for source in ("web", "synthetic")
    ]
    turns = [row for i in range(limit) for rows in lists for row in rows[i : i + 1]]
    picks: dict[str, str] = {}
    for row in turns:
        picks.setdefault(row["image_id"], row["caption_id"])
    return list(picks.items())[:limit]


class _Cards:
    """Makes cards from one query for all texts and one for all places."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        about: Mapping[str, Any],
        images: list[str],
        read_image: ReadImage,
    ) -> None:
        wanted = {**about, "images": images}
        self._texts: dict[str, list[dict[str, Any]]] = {}
        for row in ask(connection, queries.CARD_TEXTS, wanted):
            self._texts.setdefault(row["image_id"], []).append(row)
        self._places = {
            row["image_id"]: row for row in ask(connection, queries.CARD_IMAGES, wanted)
        }
        self._read_image = read_image
        self._room = MAX_PICTURE_BYTES

    def card(self, image_id: str, caption_id: str) -> Card:
        rows = sorted(self._texts[image_id], key=lambda row: row["caption_id"] != caption_id)
        names = list(TextFacts.__dataclass_fields__)
        place = self._places.get(image_id)
        return Card(
            image_id=image_id,
            source_name=place["source_name"] if place else "",
            thumbnail=self._thumbnail(place) if place else "",
            texts=tuple(TextFacts(**{name: row[name] for name in names}) for row in rows),
        )

    def _thumbnail(self, place: Mapping[str, Any]) -> str:
        """The picture as a data: URI, or "" when it cannot be read or the page is full."""
        try:
            data = self._read_image(place["shard"], place["offset"], place["size"])
            uri = thumbnail_uri(data)
        except (OSError, StorageError) as err:
            logger.warning("picture %s is left out of the report: %s", place["image_id"], err)
            return ""
        self._room -= len(uri)
        return uri if self._room >= 0 else ""
