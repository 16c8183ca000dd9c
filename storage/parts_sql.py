"""Committed parts as SQL: an explicit list of files, never a pattern."""

import pyarrow as pa

from storage.lake import Lake
from storage.schemas import ADDED_LATER, TABLES
from storage.tables import PartRef

_FILLED = {("decisions", "generation"): "policy"}
"""Where parts of older lakes lack a column, the column that says the same of them."""

_PART_PATH = "^.*/(tables/[^/]+/(?:round=[0-9]+/)?[^/]+[.]parquet)$"

_SQL_TYPES = {
    pa.string(): "VARCHAR",
    pa.int64(): "BIGINT",
    pa.int32(): "INTEGER",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.binary(): "BLOB",
}


def rows_of(lake: Lake, table: str, parts: list[PartRef], *, named: bool = False) -> str:
    """SQL of the rows of some parts: an explicit list, or no row of the right types.

    With `named` there is a column `part` more: the path in the lake of the part that a row is in.
    """
    nothing = empty_table(TABLES[table])
    if not parts:
        return f"SELECT *, '' AS part FROM ({nothing})" if named else nothing
    if named:
        rows = rows_of(lake, table, parts)
        name = f"regexp_extract(filename, '{_PART_PATH}', 1) AS part"
        return rows.replace("SELECT ", f"SELECT {name}, ", 1).replace(
            "hive_partitioning = false", "hive_partitioning = false, filename = true", 1
        )
    names = TABLES[table].names
    paths = ", ".join(quoted(_address(lake, ref.path)) for ref in parts)
    if table not in ADDED_LATER:
        columns = ", ".join(f'"{name}"' for name in names)
        return f"SELECT {columns} FROM read_parquet([{paths}], hive_partitioning = false)"
    # Parts may lack a column, all of them even: by name, beside no rows that have it.
    found = (
        f"SELECT * FROM read_parquet([{paths}], hive_partitioning = false, union_by_name = true)"
    )
    columns = ", ".join(
        f'coalesce("{name}", "{_FILLED[table, name]}") AS "{name}"'
        if (table, name) in _FILLED
        else f'"{name}"'
        for name in names
    )
    return f"SELECT {columns} FROM ({nothing} UNION ALL BY NAME {found})"


def empty_table(schema: pa.Schema) -> str:
    """SQL of no row of a schema's columns and types."""
    columns = ", ".join(f'CAST(NULL AS {_sql_type(f.type)}) AS "{f.name}"' for f in schema)
    return f"SELECT {columns} WHERE false"


def quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _address(lake: Lake, rel: str) -> str:
    """A path as DuckDB reads it; fsspec's protocol leads to the registered file system."""
    if lake.root.is_local:
        return lake.root.path(rel)
    return str(lake.root.fs.unstrip_protocol(lake.root.path(rel)))


def _sql_type(kind: pa.DataType) -> str:
    return "TIMESTAMP WITH TIME ZONE" if pa.types.is_timestamp(kind) else _SQL_TYPES[kind]
