"""Tars for webdataset and open_clip: an image, its text as `.txt`, what is known of both as `.json`.

open_clip takes one text a sample: its loader reads `txt`, and knows no list. So several texts of an
image are several samples by default, each with the image: every text is seen every epoch, and any version of
any loader reads it. They lie apart (first texts of all images, then the second ones), or a batch would
hold one picture twice, as its own negative. With a list, a sample is an image: `.txt` has its most trusted
text, `.json` has all, also as flat keys (`caption_web`, `caption_synthetic`, `caption_synthetic_1`, ...) from which a newer
open_clip draws with `--json-text-key` and `--json-text-key-probs`.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from storage import ids
from storage.exports.format import Captions, DamagedExport, Plan
from storage.exports.pieces import Picture, Piece, json_line
from storage.exports.selection import Picked, Selection, Text
from storage.exports.target import File, PieceRecord, Target
from storage.shards import add_member

SIZES = "sizes.json"
"""Samples of each tar, where open_clip looks for them."""


class WebDataset:
    """One tar a piece."""

    name = "webdataset"
    captions: tuple[Captions, ...] = ("each", "list")
    with_images = True

    def contents(self, plan: Plan) -> Mapping[str, Collection[str] | None]:
        """A folder of tars, with their sizes."""
        return {"data": {SIZES, *(_name(i) for i in range(plan.num_pieces))}}

    def write_piece(self, target: Target, piece: Piece, plan: Plan) -> Sequence[File]:
        """One tar."""
        most = max(len(picked.texts) for picked in piece.images)
        with target.staged(f"data/{_name(piece.index)}") as staged:
            with (
                staged.path.open("wb") as f,
                tarfile.open(fileobj=f, mode="w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for nth in range(most if plan.captions == "each" else 1):
                    for chunk in piece.chunks(min_texts=nth + 1):
                        for picture in chunk:
                            _add_sample(tar, f, picture, nth, plan.captions)
        return staged.files

    def finish(
        self, target: Target, pieces: Sequence[PieceRecord], selection: Selection, plan: Plan
    ) -> Sequence[File]:
        """How many samples each tar has."""
        each = plan.captions == "each"
        sizes = {_name(p.index): p.num_texts if each else p.num_images for p in pieces}
        return target.write_text(f"data/{SIZES}", json.dumps(sizes, indent=1) + "\n")

    def read_back(
        self, target: Target, pieces: Sequence[PieceRecord], plan: Plan
    ) -> Iterator[tuple[int, int]]:
        """Every tar from end to end."""
        for piece in pieces:
            for file in piece.files:
                yield _read_tar(target, file.path)


def _name(index: int) -> str:
    return f"{index:05d}.tar"


def _add_sample(
    tar: tarfile.TarFile, f: BinaryIO, picture: Picture, nth: int, captions: Captions
) -> None:
    picked = picture.picked
    text = picked.texts[nth]
    key = picked.image_id if captions == "list" else f"{picked.image_id}-{nth}"
    meta = _of_image(picked) | (_all_texts(picked) if captions == "list" else _of_text(text))
    add_member(tar, f, f"{key}.{picture.ext}", picture.data)
    add_member(tar, f, f"{key}.json", json_line(meta).encode())
    add_member(tar, f, f"{key}.txt", text.caption.encode())


def _of_image(picked: Picked) -> dict[str, Any]:
    return {
        "image_id": picked.image_id,
        "url": picked.url,
        "source_name": picked.source_name,
        "licence": picked.licence,
        "width": picked.width,
        "height": picked.height,
    }


def _of_text(text: Text) -> dict[str, Any]:
    return {name: getattr(text, name) for name in Text.__slots__}


def _all_texts(picked: Picked) -> dict[str, Any]:
    """The texts as a list, and each under a key of its own."""
    flat, seen = {}, Counter[str]()
    for text in picked.texts:
        number = seen[text.source]
        flat[f"caption_{text.source}" + (f"_{number}" if number else "")] = text.caption
        seen[text.source] += 1
    return {"captions": [_of_text(text) for text in picked.texts], **flat}


def _read_tar(target: Target, rel: str) -> tuple[int, int]:
    """(images, texts) of a tar; every image must be the one that its key names."""
    images, texts = set(), 0
    try:
        with target.root.open(rel) as f, tarfile.open(fileobj=f, mode="r|") as tar:
            for member in tar:
                key, _, ext = member.name.partition(".")
                source = tar.extractfile(member)
                data = source.read() if source is not None else b""
                image_id = key.partition("-")[0]
                if ext == "json":
                    meta = json.loads(data)
                    texts += len(meta["captions"]) if "captions" in meta else 1
                elif ext != "txt":
                    if ids.image_id(data) != image_id:
                        raise DamagedExport(
                            target, rel, f"holds {member.name} with other bytes than its name says"
                        )
                    images.add(image_id)
    except (tarfile.TarError, EOFError, ValueError) as err:
        raise DamagedExport(target, rel, f"is not readable ({err})") from err
    return len(images), texts
