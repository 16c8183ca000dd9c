"""Parquet files with the pictures in them, as `datasets` writes them: a column of bytes, others of texts."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import ConfigError, MissingColumn
from storage.intake.adopting.found import CAPTION_FIELDS, Fields, Found

_BATCH_ROWS = 64
"""Pictures in memory at a time."""
_USUAL = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")


def num_rows(f: BinaryIO, name: str, fields: Fields) -> int:
    """Rows of a file, once it is known to hold pictures and texts. ConfigError or MissingColumn otherwise."""
    file = _opened(f, name)
    column = image_column(file.schema_arrow, name, fields.image)
    names = file.schema_arrow.names
    wanted = (fields.caption,) if fields.caption else CAPTION_FIELDS
    if not any(each in names for each in wanted):
        raise MissingColumn(
            f"{name} has no column of texts: {', '.join(map(str, wanted))} were looked for beside {column!r}, it has "
            f"{', '.join(names)}; name the right one as caption_column"
        )
    return int(file.metadata.num_rows)


def read_rows(
    f: BinaryIO, name: str, fields: Fields, max_bytes: int, first: int, last: int
) -> Iterator[Found]:
    """Rows first to last - 1 of an opened file."""
    file = _opened(f, name)
    column = image_column(file.schema_arrow, name, fields.image)
    fields = Fields(caption=fields.caption, url=fields.url, licence=fields.licence, image=column)
    begin = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if begin < last and begin + size > first:
            row = begin
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group]):
                skipped = max(first - row, 0)
                for i, record in enumerate(batch.slice(skipped).to_pylist(), row + skipped):
                    if i < last:
                        yield _row(record, f"{name}/{i}", column, fields, max_bytes)
                row += batch.num_rows
        begin += size


def image_column(schema: pa.Schema, name: str, wanted: str | None) -> str:
    """The column of the pictures: the named one, else the one of bytes with the most usual name."""
    holds = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted is not None:
        if wanted in holds:
            return wanted
        kind = f"of type {schema.field(wanted).type}" if wanted in schema.names else "not there"
        raise MissingColumn(
            f"{name}: image_column {wanted!r} is {kind}; columns of bytes are {', '.join(holds) or 'none'}"
        )
    if not holds:
        raise MissingColumn(
            f"{name} has no column of pictures (bytes, or a struct with bytes); it has {', '.join(schema.names)}: a list "
            "of addresses is ingest.url_lists"
        )
    return next((each for each in _USUAL if each in holds), holds[0])


def _opened(f: BinaryIO, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(f)
    except (pa.ArrowException, OSError) as err:
        raise ConfigError(
            f"{name} is not a readable Parquet file: {err}; replace or remove it"
        ) from err


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _row(record: dict[str, Any], name: str, column: str, fields: Fields, max_bytes: int) -> Found:
    value, told = record[column], fields.told(record)
    path = value.get("path") if isinstance(value, dict) else None
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        where = f"only a path is there, {path}" if path else "there is nothing in its column"
        return Found(name=name, status="lost", reason=f"no bytes of the picture: {where}", **told)
    if len(data) > max_bytes:
        reason = f"{len(data)} bytes, more than {max_bytes}"
        return Found(name=name, status="too_large", reason=reason, **told)
    return Found(name=name, image=data, **told)
