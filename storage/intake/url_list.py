"""Tables of the user's (Parquet, CSV, JSONL), read some rows at a time; a bad row is a row.

CSV and JSONL are read as bytes and decoded row by row, so text that is not UTF-8 spoils its own
row and no other.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import ConfigError, EmptyInput, MissingColumn
from storage.store_errors import store_named

BATCH_ROWS = 10_000


@dataclass(slots=True)
class ListRow:
    """One row of a user's table: the wanted columns by our names, the others as they are."""

    position: int
    values: dict[str, str | None]
    extra: dict[str, Any]
    bad: str | None = None
    """Why its text cannot be used; None when it can."""


ListFormat = Literal["table", "cc3m", "cc12m", "laion", "datacomp"]

_PUBLISHED: dict[str, dict[str, str]] = {
    "cc3m": {"caption": "alt_text", "url": "url"},
    "cc12m": {"url": "url", "caption": "alt_text"},
    "laion": {
        "URL": "url",
        "url": "url",
        "TEXT": "alt_text",
        "text": "alt_text",
        "caption": "alt_text",
    },
    "datacomp": {"url": "url", "text": "alt_text"},
}
"""Their column names, to ours, of lists as they were published."""
_WITHOUT_HEADER = ("cc3m", "cc12m")
"""Tab-separated, their columns in the order above, no quotes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlListConfig:
    """Where the list of URLs is, and what its columns are called."""

    path: str
    """A Parquet, CSV or JSONL file, a folder of such, or a pattern with * or ?; a local path or an fsspec URI."""
    format: ListFormat = "table"
    """A table whose columns are named below, or a list as it was published."""
    name: str = "web"
    """The source_name of rows that do not name their own."""
    url_column: str = "url"
    alt_text_column: str = "alt_text"
    source_name_column: str | None = None
    """Column that names each row's source; None gives all rows `name`."""
    licence_column: str | None = None

    def __post_init__(self) -> None:
        """Check the format."""
        if self.format not in get_args(ListFormat):
            raise ConfigError(
                f"list {self.path}: format {self.format!r} is unknown; there are {', '.join(get_args(ListFormat))}"
            )

    def columns(self) -> dict[str, str]:
        """Their column names, to ours; of a published list all that it has had."""
        if self.format != "table":
            named = dict(_PUBLISHED[self.format])
        else:
            named = {self.url_column: "url", self.alt_text_column: "alt_text"}
        if self.source_name_column is not None:
            named[self.source_name_column] = "source_name"
        if self.licence_column is not None:
            named[self.licence_column] = "licence"
        return named

    def as_basis(self) -> dict[str, str]:
        """What of it shapes the rows, apart from the bytes of its files."""
        named = {ours: theirs for theirs, ours in self.columns().items()}
        return named if self.format == "table" else named | {"format": self.format}


def list_files(path: str) -> list[str]:
    """The files of a list, sorted: the one that is named, those of a folder, or those that match a pattern.

    Raises ConfigError when there is none.
    """
    try:
        fs, base = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as err:
        raise ConfigError(f"URL list {path!r}: no file system for this address ({err})") from err
    if has_magic(path):
        found = fs.glob(base)
    elif fs.isdir(base):
        found = [each for each in fs.find(base) if _kind_of(each) is not None]
    else:
        return [path]
    if not found:
        raise ConfigError(
            f"{path}: no {'file matches' if has_magic(path) else 'Parquet, CSV or JSONL file is in it'}; check the path of "
            "the URL list"
        )
    return sorted(str(fs.unstrip_protocol(each)).removeprefix("file://") for each in found)


def open_list(config: UrlListConfig) -> Iterator[list[ListRow]]:
    """The rows of a list, file after file, some at a time; positions go on. Raises as `open_table` does."""
    header = tuple(_PUBLISHED[config.format]) if config.format in _WITHOUT_HEADER else None
    position = 0
    for file in list_files(config.path):
        before = position
        for batch in open_table(file, config.columns(), header):
            for row in batch:
                row.position += before
            position += len(batch)
            yield batch


def open_table(
    path: str | Path, columns: Mapping[str, str], header: tuple[str, ...] | None = None
) -> Iterator[list[ListRow]]:
    """The rows of a table, up to BATCH_ROWS at a time; `columns` maps their names to ours.

    With a `header` text is tab-separated, without a header line and without quotes.

    Raises ConfigError for a file that is absent or of another kind, EmptyInput when it has no
    row, MissingColumn when a named column is absent.
    """
    name = str(path)
    read = _reader_of(name, header)
    try:
        with store_named(name), fsspec.open(name, "rb", compression="infer") as f:
            position = 0
            for batch in read(cast(BinaryIO, f), name, columns):
                position += len(batch)
                yield batch
    except FileNotFoundError as err:
        raise ConfigError(f"{name} does not exist; check the path") from err
    except (PermissionError, IsADirectoryError) as err:
        raise ConfigError(f"{name} cannot be read: {err.strerror}; name a readable file") from err
    if position == 0:
        raise EmptyInput(f"{name} has no row; give a list with at least one")


_Reader = Callable[[BinaryIO, str, Mapping[str, str]], Iterator[list[ListRow]]]


def _reader_of(name: str, header: tuple[str, ...] | None) -> _Reader:
    read = _kind_of(name)
    if header is not None and read in (None, _read_csv):
        return partial(_read_plain, header=list(header))
    if read is None:
        raise ConfigError(
            f"{name}: the ending tells the kind; it must be one of {', '.join(_kinds())}"
        )
    return read


def _kind_of(name: str) -> _Reader | None:
    stem = name.lower().removesuffix(".gz")
    return next((read for suffix, read in _kinds().items() if stem.endswith(suffix)), None)


def _kinds() -> dict[str, _Reader]:
    return {
        ".parquet": _read_parquet,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
    }


def _read_parquet(f: BinaryIO, name: str, columns: Mapping[str, str]) -> Iterator[list[ListRow]]:
    try:
        file = pq.ParquetFile(f)
        _check_columns(name, file.schema_arrow.names, columns)
        position = 0
        for batch in file.iter_batches(BATCH_ROWS):
            rows = [_row(position + i, record, columns) for i, record in enumerate(_records(batch))]
            position += len(rows)
            yield rows
    except (pa.ArrowInvalid, OSError) as err:
        raise ConfigError(f"{name} is not a readable Parquet file: {err}") from err


def _records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows of a batch; text that is not UTF-8 comes as bytes, for `_row` to judge."""
    try:
        return cast(list[dict[str, Any]], batch.to_pylist())
    except UnicodeDecodeError:
        columns = {
            field.name: (
                column.cast(pa.binary()) if pa.types.is_string(field.type) else column
            ).to_pylist()
            for field, column in zip(batch.schema, batch.columns, strict=True)
        }
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]


def _read_csv(f: BinaryIO, name: str, columns: Mapping[str, str]) -> Iterator[list[ListRow]]:
    # surrogateescape keeps undecodable bytes within their own field.
    text = io.TextIOWrapper(f, "utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(16 << 20)  # Python's own limit is less than a long alt text
    reader = csv.reader(text, delimiter="\t" if ".tsv" in name.lower() else ",")
    header = next(reader, None)
    if header is None:
        raise EmptyInput(f"{name} is empty; give a list with a header line and at least one row")
    _check_columns(name, header, columns)
    yield from _csv_rows(reader, name, header, columns)


def _read_plain(
    f: BinaryIO, name: str, columns: Mapping[str, str], header: list[str]
) -> Iterator[list[ListRow]]:
    text = io.TextIOWrapper(f, "utf-8-sig", errors="surrogateescape", newline="\n")
    csv.field_size_limit(16 << 20)
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    yield from _csv_rows(reader, name, header, columns)


def _csv_rows(
    reader: Any, name: str, header: list[str], columns: Mapping[str, str]
) -> Iterator[list[ListRow]]:
    rows: list[ListRow] = []
    try:
        for position, fields in enumerate(line for line in reader if line):
            padded = fields + [""] * (len(header) - len(fields))
            row = _row(position, dict(zip(header, padded, strict=False)), columns)
            if len(fields) != len(header):
                row.bad = f"{len(fields)} fields where the header has {len(header)}"
            rows.append(row)
            if len(rows) == BATCH_ROWS:
                yield rows
                rows = []
    except csv.Error as err:
        raise ConfigError(f"{name}, line {reader.line_num}: {err}; correct that line") from err
    if rows:
        yield rows


def _read_jsonl(f: BinaryIO, name: str, columns: Mapping[str, str]) -> Iterator[list[ListRow]]:
    rows: list[ListRow] = []
    found: set[str] = set()
    lines = (line for line in f if line.strip())
    for position, line in enumerate(lines):
        row = _json_row(position, line, columns)
        found |= {theirs for theirs, ours in columns.items() if ours in row.values}
        rows.append(row)
        if len(rows) == BATCH_ROWS:
            _check_columns(name, found, columns)
            yield rows
            rows = []
    if rows:
        _check_columns(name, found, columns)
        yield rows


def _json_row(position: int, line: bytes, columns: Mapping[str, str]) -> ListRow:
    text = line.decode("utf-8", "surrogateescape")
    try:
        record = json.loads(text)
    except ValueError as err:
        return ListRow(position, {}, {}, bad=f"not JSON: {err}")
    if not isinstance(record, dict):
        return ListRow(position, {}, {}, bad=f"not a JSON object: {text.strip()[:40]}")
    return _row(position, record, columns)


def _row(position: int, record: Mapping[str, Any], columns: Mapping[str, str]) -> ListRow:
    """Sort a record into what we want and the rest, and judge its text."""
    row = ListRow(position, {}, {})
    for theirs, value in record.items():
        ours = columns.get(theirs)
        text, problem = _clean(value)
        if problem is not None and row.bad is None:
            row.bad = f"column {theirs}: {problem}"
        if ours is None or ours in row.values:
            row.extra[theirs] = text if isinstance(value, bytes | str) else value
        else:
            row.values[ours] = text
    return row


def _clean(value: Any) -> tuple[str | None, str | None]:
    """A value as text that can be stored, and what was wrong with it."""
    if value is None:
        return None, None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    text = value if isinstance(value, str) else str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        return _storable(text), f"not UTF-8 at character {err.start}"
    if "\x00" in text:
        return text.replace("\x00", " "), "holds a NUL character"
    return text, None


def _storable(text: str) -> str:
    """A text with replacement characters for what UTF-8 cannot hold: stray bytes, halves of surrogate pairs."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "surrogatepass")
    return data.decode("utf-8", "replace")


def _check_columns(name: str, found: Any, columns: Mapping[str, str]) -> None:
    there = {ours for theirs, ours in columns.items() if theirs in found}
    absent = [t for t, ours in columns.items() if ours not in there]
    if absent:
        raise MissingColumn(
            f"{name} has no column {absent[0]!r}; it has {', '.join(map(str, found)) or 'none'}: "
            "name the right one in the settings"
        )
