"""BLIP's JSON: a list of {"image", "caption", ...}, as its loaders read it, with the images beside.

`data/pretrain_dataset.py` of BLIP opens `image` and takes one text; its loaders for retrieval and captioning join
`image` to their image root, and those that evaluate take a list of texts.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from storage.exports import json_file
from storage.exports.format import Captions, Plan
from storage.exports.pieces import Picture, Piece
from storage.exports.selection import Selection
from storage.exports.target import File, PieceRecord, Target

NAME = "captions.json"


class BlipJson:
    """One entry a text, or one an image with a list of texts."""

    name = "blip-json"
    captions: tuple[Captions, ...] = ("each", "list")
    with_images = True

    def contents(self, plan: Plan) -> Mapping[str, Collection[str] | None]:
        """A JSON file and a folder of images."""
        return {NAME: (), "images": None}

    def write_piece(self, target: Target, piece: Piece, plan: Plan) -> Sequence[File]:
        """The images, and the entries as lines for the end."""
        with target.staged(json_file.lines(piece.index, "entries")) as staged:
            with staged.path.open("w", encoding="utf-8") as f:
                for chunk in piece.chunks():
                    target.root.write_many({picture.path: picture.data for picture in chunk})
                    for picture in chunk:
                        json_file.add(f, _entries(picture, plan.captions))
        return staged.files

    def finish(
        self, target: Target, pieces: Sequence[PieceRecord], selection: Selection, plan: Plan
    ) -> Sequence[File]:
        """Put the entries together."""
        with target.staged(NAME) as staged:
            with staged.path.open("wb") as f:
                json_file.write_list(f, target, pieces, "entries")
                f.write(b"\n")
        return staged.files

    def read_back(
        self, target: Target, pieces: Sequence[PieceRecord], plan: Plan
    ) -> Iterator[tuple[int, int]]:
        """Every entry in order, and its image when it is another than the last entry's."""
        last = None
        for chunk in json_file.chunked(json_file.read_list(target, NAME)):
            entries = [entry for _, entry in chunk]
            images = list(dict.fromkeys(entry["image"] for entry in entries))
            images = [path for path in images if path != last]
            json_file.check_images(target, images)
            last = entries[-1]["image"]
            texts = (entry["caption"] for entry in entries)
            yield len(images), sum(len(t) if isinstance(t, list) else 1 for t in texts)


def _entries(picture: Picture, captions: Captions) -> Iterator[dict[str, Any]]:
    picked = picture.picked
    image = {"image": picture.path, "image_id": picked.image_id, "url": picked.url}
    if captions == "list":
        yield image | {
            "caption": [text.caption for text in picked.texts],
            "caption_id": [text.caption_id for text in picked.texts],
            "source": [text.source for text in picked.texts],
            "itm_prob": [text.itm_prob for text in picked.texts],
        }
        return
    for text in picked.texts:
        yield image | {
            "caption": text.caption,
            "caption_id": text.caption_id,
            "source": text.source,
            "itm_prob": text.itm_prob,
        }
