"""The view `champions`: champion.json as rows, so that SQL tells who was champion when, and why."""

from storage import registry
from storage.lake import Lake

_COLUMNS = {
    "place": "INTEGER",
    "round": "INTEGER",
    "model_id": "VARCHAR",
    "action": "VARCHAR",
    "why": "VARCHAR",
    "changed_at": "TIMESTAMP WITH TIME ZONE",
}


def champions_sql(lake: Lake) -> str:
    """SQL of every change of the champion, in order; `is_now` marks the last.

    Changes by an older version of the program have no action and no time.
    """
    rows = [
        (
            place,
            entry["round"],
            entry["model_id"],
            entry.get("action"),
            entry["why"],
            entry.get("at"),
        )
        for place, entry in enumerate(registry.promotions(lake))
    ]
    nothing = ", ".join(["NULL"] * len(_COLUMNS))
    values = [", ".join(_literal(cell) for cell in row) for row in rows]
    listed = ", ".join(f"({row})" for row in [nothing, *values])
    columns = ", ".join(f"CAST({name} AS {kind}) AS {name}" for name, kind in _COLUMNS.items())
    return (
        f"SELECT {columns}, place::INTEGER = {len(rows) - 1} AS is_now "
        f"FROM (VALUES {listed}) AS t({', '.join(_COLUMNS)}) WHERE place IS NOT NULL ORDER BY place"
    )


def _literal(cell: object) -> str:
    return "NULL" if cell is None else "'" + str(cell).replace("'", "''") + "'"
