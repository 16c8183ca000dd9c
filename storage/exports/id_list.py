"""Ids and addresses without bytes: what may be published where the images may not."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from storage.exports.format import Captions, DamagedExport, Plan
from storage.exports.pieces import Piece
from storage.exports.selection import Selection
from storage.exports.target import File, PieceRecord, Target

SCHEMA = pa.schema([(name, pa.string()) for name in ("caption_id", "image_id", "url", "source")])


class IdList:
    """Parquet, or CSV, a row a text."""

    name = "ids"
    captions: tuple[Captions, ...] = ("each",)
    with_images = False

    def contents(self, plan: Plan) -> Mapping[str, Collection[str] | None]:
        """A folder of tables."""
        return {"data": {_name(i, plan) for i in range(plan.num_pieces)}}

    def write_piece(self, target: Target, piece: Piece, plan: Plan) -> Sequence[File]:
        """One table."""
        rows = [
            (text.caption_id, picked.image_id, picked.url, text.source)
            for picked in piece.images
            for text in picked.texts
        ]
        columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        table = pa.Table.from_arrays(columns, schema=SCHEMA)
        with target.staged(f"data/{_name(piece.index, plan)}") as staged:
            if plan.csv:
                pc.write_csv(table, staged.path)
            else:
                pq.write_table(table, staged.path, compression="zstd")
        return staged.files

    def finish(
        self, target: Target, pieces: Sequence[PieceRecord], selection: Selection, plan: Plan
    ) -> Sequence[File]:
        """Nothing needs all pieces."""
        return ()

    def read_back(
        self, target: Target, pieces: Sequence[PieceRecord], plan: Plan
    ) -> Iterator[tuple[int, int]]:
        """Every table: its rows, and how often the image changes."""
        for piece in pieces:
            for file in piece.files:
                with target.root.open(file.path) as f:
                    try:
                        table = pc.read_csv(f) if plan.csv else pq.read_table(f)
                    except (pa.ArrowException, OSError) as err:
                        raise DamagedExport(target, file.path, f"is not readable ({err})") from err
                if table.column_names != SCHEMA.names:
                    raise DamagedExport(target, file.path, f"has columns {table.column_names}")
                yield len(set(table["image_id"].to_pylist())), table.num_rows


def _name(index: int, plan: Plan) -> str:
    return f"ids-{index:05d}-of-{plan.num_pieces:05d}.{'csv' if plan.csv else 'parquet'}"
