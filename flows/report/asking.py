"""How the report asks the lake: named parameters in, rows as dictionaries out."""

from collections.abc import Callable, Mapping
from typing import Any

import duckdb

Rows = list[dict[str, Any]]
ReadImage = Callable[[str, int, int], bytes]
"""(shard, offset, size) to the image's bytes."""


def ask(connection: duckdb.DuckDBPyConnection, sql: str, parameters: Mapping[str, Any]) -> Rows:
    """The rows of a query as dictionaries; parameters that it does not name are left out."""
    used = {name: value for name, value in parameters.items() if f"${name}" in sql}
    cursor = connection.execute(sql, used)
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
