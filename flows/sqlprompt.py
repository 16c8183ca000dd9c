"""The SQL prompt: one statement at a time, ended by a semicolon."""

from __future__ import annotations

import contextlib
from typing import Any

from flows.terminal import console, fail, print_rows, rows_of
from storage import Lake, StorageError, query

VIEWS = (
    "clean, rejected, verdicts, funnel, noise, policies, lineage, rounds, compare_rounds, why, canaries, "
    "pairs, captions, scores, decisions, metrics, models; with a blank to fill: kept(round), "
    "texts_of(image_id), changed(round, generation, generation), docs/sql.md has them all"
)


def prompt(lake: Lake, form: str = "table", **limits: Any) -> int:
    """Read statements until end of input; neither an error in one nor Ctrl-C ends the prompt.

    Each statement sees what is committed when it is asked.
    """
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
            _answer(lake, "\n".join(pending), form, limits)
            pending = []


def _answer(lake: Lake, statement: str, form: str, limits: dict[str, Any]) -> None:
    try:
        result = query(lake, statement, **limits)
        rows = rows_of(result)
        print_rows(result.column_names, rows, form)
    except StorageError as err:
        fail(str(err))
    except KeyboardInterrupt:
        fail("the query was interrupted")
    else:
        console.print(f"{len(rows)} rows", style="dim")
