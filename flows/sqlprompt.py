"""The SQL prompt: one statement at a time, ended by a semicolon."""

from __future__ import annotations

import contextlib

from flows.terminal import console, fail, rows_of, table
from storage import Lake, StorageError, query

VIEWS = (
    "clean, rejected, funnel, noise, lineage, rounds, compare_rounds, why, pairs, captions, scores, "
    "decisions, metrics, models"
)


def prompt(lake: Lake) -> int:
    """Read statements until end of input; an error in one does not end the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - its import gives input() history and editing
    console.print(f"lake {lake.uri}; views: {VIEWS}", highlight=False)
    console.print("end a statement with ; and the session with Ctrl-D", style="dim")
    pending: list[str] = []
    while True:
        try:
            line = input("....> " if pending else "sql> ")
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            console.print()
            pending = []
            continue
        if not pending and line.strip().lower() in {"exit", "quit", ".exit", ".quit"}:
            return 0
        pending.append(line)
        if line.rstrip().endswith(";"):
            _answer(lake, "\n".join(pending))
            pending = []


def _answer(lake: Lake, statement: str) -> None:
    try:
        result = query(lake, statement)
    except StorageError as err:
        fail(str(err))
        return
    rows = rows_of(result)
    console.print(table(result.column_names, rows))
    console.print(f"{len(rows)} rows", style="dim")
