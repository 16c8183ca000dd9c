"""What the command line shows: stage progress, tables, and errors without tracebacks."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console()
errors = Console(stderr=True)


class StageBars:
    """One bar for every stage that reports progress; plain lines where there is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:>7.0f}/{task.total:<7.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        self._said: dict[str, int] = {}

    def __enter__(self) -> StageBars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        """Show that `done` of `total` of a stage is done."""
        if self._progress.disable:
            self._say(stage, done, total, note)
            return
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total, note=note)
        self._progress.update(self._bars[stage], completed=done, total=total, note=note)

    def _say(self, stage: str, done: int, total: int, note: str) -> None:
        """A line each quarter: enough for a log file."""
        quarter = 4 * done // total if total else 4
        if self._said.get(stage) != quarter:
            self._said[stage] = quarter
            console.print(f"{stage:<11} {done}/{total} {note}", highlight=False)


def table(names: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> Table:
    """Rows as a table; numbers to the right."""
    shown = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(names):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        shown.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(_cell(value) for value in row))
    return shown


def print_rows(names: list[str], rows: list[tuple[Any, ...]], form: str) -> None:
    """Rows as a table, or for scripts: csv, json."""
    if form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    elif form == "json":
        records = [dict(zip(names, row, strict=True)) for row in rows]
        sys.stdout.write(json.dumps(records, default=str, indent=2) + "\n")
    else:
        console.print(table(names, rows))


def rows_of(result: pa.Table) -> list[tuple[Any, ...]]:
    """The rows of a query's answer, column by column: two columns may have one name."""
    return list(zip(*(column.to_pylist() for column in result.columns), strict=True))


def _cell(value: Any) -> str:
    if value is None:
        return "[dim]NULL[/]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("[", r"\[")


def fail(message: str) -> int:
    """Print an error that the user can act on; returns the exit status."""
    # Not wrapped: a path that is broken in two cannot be copied.
    shown = message.replace("[", r"\[")
    errors.print(f"[bold red]error:[/] {shown}", highlight=False, soft_wrap=True)
    sys.stdout.flush()
    return 2
