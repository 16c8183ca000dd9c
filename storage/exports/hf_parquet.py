"""Parquet with the images inside, as `datasets` and its hub read it: the column `image` is an Image there.

A row is an image with the lists of its texts, or a text with its image.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage import ids
from storage.exports.format import Captions, DamagedExport, Plan
from storage.exports.pieces import Picture, Piece
from storage.exports.selection import Selection
from storage.exports.target import File, PieceRecord, Target

ROW_GROUP_ROWS = 100
"""What `datasets` writes for images: a reader that wants one row reads so many."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OF_TEXT = {
    "caption": pa.string(),
    "caption_id": pa.string(),
    "source": pa.string(),
    "itm_prob": pa.float64(),
    "itc_sim": pa.float64(),
    "captioner_id": pa.string(),
}
OF_IMAGE = {
    "image_id": pa.string(),
    "url": pa.string(),
    "source_name": pa.string(),
    "licence": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
}
LIST_NAMES = {
    "caption": "captions",
    "caption_id": "caption_ids",
    "source": "sources",
    "itm_prob": "itm_probs",
    "itc_sim": "itc_sims",
    "captioner_id": "captioner_ids",
}
"""Columns of texts as lists."""


class HFParquet:
    """One Parquet file a piece."""

    name = "hf-parquet"
    captions: tuple[Captions, ...] = ("list", "each")
    with_images = True

    def contents(self, plan: Plan) -> Mapping[str, Collection[str] | None]:
        """A folder of Parquet files."""
        return {"data": {_name(i, plan) for i in range(plan.num_pieces)}}

    def write_piece(self, target: Target, piece: Piece, plan: Plan) -> Sequence[File]:
        """One file, a row group in memory."""
        schema = schema_of(plan.captions)
        rows = (row for chunk in piece.chunks() for p in chunk for row in _rows(p, plan.captions))
        # The images are compressed already.
        compression = {"image.bytes": "none"} | {
            name: "zstd" for name in _leaves(schema) if name != "image.bytes"
        }
        with (
            target.staged(f"data/{_name(piece.index, plan)}") as staged,
            pq.ParquetWriter(staged.path, schema, compression=compression) as writer,
        ):
            group: list[dict[str, Any]] = []
            for row in rows:
                group.append(row)
                if len(group) == ROW_GROUP_ROWS:
                    writer.write_batch(pa.RecordBatch.from_pylist(group, schema))
                    group = []
            if group:
                writer.write_batch(pa.RecordBatch.from_pylist(group, schema))
        return staged.files

    def finish(
        self, target: Target, pieces: Sequence[PieceRecord], selection: Selection, plan: Plan
    ) -> Sequence[File]:
        """Nothing needs all pieces."""
        return ()

    def read_back(
        self, target: Target, pieces: Sequence[PieceRecord], plan: Plan
    ) -> Iterator[tuple[int, int]]:
        """Every row of every file; an image is counted once however many rows show it."""
        for piece in pieces:
            for file in piece.files:
                yield _read_parquet(target, file.path)


def schema_of(captions: Captions) -> pa.Schema:
    """Columns of a row; the metadata tells `datasets` that `image` is an image."""
    texts = (
        {LIST_NAMES[name]: pa.list_(kind) for name, kind in OF_TEXT.items()}
        if captions == "list"
        else OF_TEXT
    )
    features = {"image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema({"image": IMAGE, **texts, **OF_IMAGE}, metadata=metadata)


def _name(index: int, plan: Plan) -> str:
    return f"train-{index:05d}-of-{plan.num_pieces:05d}.parquet"


def _rows(picture: Picture, captions: Captions) -> Iterator[dict[str, Any]]:
    picked = picture.picked
    image: dict[str, Any] = {name: getattr(picked, name) for name in OF_IMAGE}
    image["image"] = {"bytes": picture.data, "path": f"{picked.image_id}.{picture.ext}"}
    if captions == "list":
        yield image | {
            LIST_NAMES[name]: [getattr(text, name) for text in picked.texts] for name in OF_TEXT
        }
        return
    for text in picked.texts:
        yield image | {name: getattr(text, name) for name in OF_TEXT}


def _leaves(schema: pa.Schema) -> list[str]:
    """Paths of the columns as Parquet names them."""
    names = []
    for column in schema:
        if pa.types.is_struct(column.type):
            names += [f"{column.name}.{child.name}" for child in column.type]
        else:
            is_list = pa.types.is_list(column.type)
            names.append(f"{column.name}.list.element" if is_list else column.name)
    return names


def _read_parquet(target: Target, rel: str) -> tuple[int, int]:
    images, texts = set(), 0
    try:
        with target.root.open(rel) as f:
            for batch in pq.ParquetFile(f).iter_batches(ROW_GROUP_ROWS):
                for row in batch.select(
                    [n for n in batch.schema.names if n in ("image", "image_id", "captions")]
                ).to_pylist():
                    if ids.image_id(row["image"]["bytes"]) != row["image_id"]:
                        raise DamagedExport(
                            target, rel, f"holds other bytes than those of image {row['image_id']}"
                        )
                    images.add(row["image_id"])
                    texts += len(row["captions"]) if "captions" in row else 1
    except (pa.ArrowException, OSError) as err:
        raise DamagedExport(target, rel, f"is not readable ({err})") from err
    return len(images), texts
