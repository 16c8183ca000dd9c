"""COCO's captions JSON, as pycocotools and all that reads COCO open it, with the images beside.

Images and annotations have whole numbers, from 1 in the order of the export; what names them in the lake stands beside.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from storage.exports import json_file
from storage.exports.format import Captions, DamagedExport, Plan
from storage.exports.pieces import Picture, Piece, json_line
from storage.exports.selection import Selection
from storage.exports.target import File, PieceRecord, Target

NAME = "captions.json"


class CocoJson:
    """An image an entry, a text an annotation."""

    name = "coco-json"
    captions: tuple[Captions, ...] = ("each",)
    with_images = True

    def contents(self, plan: Plan) -> Mapping[str, Collection[str] | None]:
        """A JSON file and a folder of images."""
        return {NAME: (), "images": None}

    def write_piece(self, target: Target, piece: Piece, plan: Plan) -> Sequence[File]:
        """The images, and the entries as lines for the end."""
        image, text = piece.first_image, piece.first_text
        with (
            target.staged(json_file.lines(piece.index, "images")) as images,
            target.staged(json_file.lines(piece.index, "annotations")) as annotations,
            images.path.open("w", encoding="utf-8") as of_images,
            annotations.path.open("w", encoding="utf-8") as of_texts,
        ):
            for chunk in piece.chunks():
                target.root.write_many({picture.path: picture.data for picture in chunk})
                for picture in chunk:
                    image += 1
                    json_file.add(of_images, [_image(picture, image, plan)])
                    json_file.add(of_texts, _annotations(picture, image, text))
                    text += len(picture.picked.texts)
        return (*images.files, *annotations.files)

    def finish(
        self, target: Target, pieces: Sequence[PieceRecord], selection: Selection, plan: Plan
    ) -> Sequence[File]:
        """Put the entries together."""
        config = target.basis["config"]
        about = f"{config['generation']} of round {config['round']}"
        info = {"description": f"Image-text pairs kept by {about}", "version": "1.0"}
        listed = [{"id": i, "name": name, "url": ""} for i, name in enumerate(plan.licences, 1)]
        with target.staged(NAME) as staged:
            with staged.path.open("wb") as f:
                f.write(f'{{"info": {json_line(info)}, "licenses": {json_line(listed)},\n'.encode())
                f.write(b'"images": ')
                json_file.write_list(f, target, pieces, "images")
                f.write(b',\n"annotations": ')
                json_file.write_list(f, target, pieces, "annotations")
                f.write(b"}\n")
        return staged.files

    def read_back(
        self, target: Target, pieces: Sequence[PieceRecord], plan: Plan
    ) -> Iterator[tuple[int, int]]:
        """Every image with its file, then every annotation."""
        num_images = 0
        for chunk in json_file.chunked(json_file.read_list(target, NAME)):
            images = [entry for number, entry in chunk if number == 0]
            texts = [entry for number, entry in chunk if number == 1]
            num_images += len(images)
            json_file.check_images(target, [entry["file_name"] for entry in images])
            if any(not 1 <= entry["image_id"] <= num_images for entry in texts):
                raise DamagedExport(target, NAME, "has annotations of images that are not there")
            yield len(images), len(texts)


def _image(picture: Picture, number: int, plan: Plan) -> dict[str, Any]:
    picked = picture.picked
    licence = {} if picked.licence is None else {"license": plan.licences.index(picked.licence) + 1}
    return licence | {
        "id": number,
        "file_name": picture.path,
        "width": picked.width,
        "height": picked.height,
        "coco_url": picked.url,
        "lake_image_id": picked.image_id,
    }


def _annotations(picture: Picture, image: int, last: int) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(picture.picked.texts, last + 1):
        yield {
            "id": number,
            "image_id": image,
            "caption": text.caption,
            "caption_id": text.caption_id,
            "source": text.source,
            "itm_prob": text.itm_prob,
        }
