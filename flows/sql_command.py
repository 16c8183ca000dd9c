"""`bootstrap sql`: one question to the lake or a prompt, answered as a table, CSV, JSON or a Parquet file."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.errors import SettingsError

FORMATS = ("table", "csv", "json", "parquet")


def register(commands: Any, command: Any) -> None:
    """Add the commands `sql` and `policies`."""
    sub = command(commands, "sql", "ask the lake; without a query, a prompt", _sql)
    sub.add_argument("query", nargs="?", help="one SELECT statement")
    sub.add_argument("--lake", help="lake to read; else BOOTSTRAP_LAKE, else the last used here")
    sub.add_argument("--format", choices=FORMATS, default="table")
    sub.add_argument("--out", metavar="FILE", help="write the answer there; parquet needs one")
    sub.add_argument(
        "--memory-limit", default="2GB", help="most memory of a query; 2GB when not given"
    )
    sub.add_argument("--threads", type=int, help="threads of a query; all of them when not given")
    command(
        commands,
        "policies",
        "the policies that come with the program, and their parameters",
        _policies,
    )


def _sql(options: argparse.Namespace) -> int:
    from flows.cli import find_lake
    from flows.sqlprompt import prompt
    from flows.terminal import fail, print_rows, rows_of
    from storage import Lake, query
    from storage.catalog import stream
    from storage.steady import steadily

    lake = Lake.open(find_lake(options.lake), read_only=True)
    limits = {"memory_limit": options.memory_limit, "threads": options.threads}
    if options.query is None:
        if options.out:
            raise SettingsError("--out needs a query: give one, or leave --out away for a prompt")
        return prompt(lake, options.format, **limits)
    try:
        if options.out:
            path = _writable(Path(options.out), lake)
            num_rows = steadily(
                lake,
                lambda: write_answer(stream(lake, options.query, **limits), path, options.format),
            )
            sys.stderr.write(f"{num_rows} rows: {path}\n")
        elif options.format == "parquet":
            raise SettingsError("--format parquet needs --out FILE: it is no text to print")
        else:
            result = query(lake, options.query, **limits)
            print_rows(result.column_names, rows_of(result), options.format)
    except KeyboardInterrupt:
        return fail("the query was interrupted")
    return 0


def write_answer(batches: Iterator[Any], path: Path, form: str) -> int:
    """Write the batches of `storage.catalog.stream` to a file, all of it or nothing; the number of rows.

    The program writes it, not DuckDB: the query's connection may write nowhere.
    """
    first = next(batches)
    tmp = path.with_name(f"_tmp-{path.name}")
    try:
        num_rows = _WRITERS[form](first, batches, tmp)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
    return num_rows


def _write_parquet(first: Any, batches: Iterator[Any], path: Path) -> int:
    import pyarrow.parquet as pq

    num_rows = 0
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        for batch in batches:
            num_rows += batch.num_rows
            writer.write_batch(batch)
    return num_rows


def _write_csv(first: Any, batches: Iterator[Any], path: Path) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(first.schema.names)
        for batch in batches:
            num_rows += batch.num_rows
            writer.writerows(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    return num_rows


def _write_json(first: Any, batches: Iterator[Any], path: Path) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8") as f:
        f.write("[")
        for batch in batches:
            for row in batch.to_pylist():
                f.write(("\n" if num_rows == 0 else ",\n") + json.dumps(row, default=str))
                num_rows += 1
        f.write("\n]\n")
    return num_rows


def _write_table(first: Any, batches: Iterator[Any], path: Path) -> int:
    from rich.console import Console

    from flows.terminal import table

    rows = [
        row
        for batch in batches
        for row in zip(*(c.to_pylist() for c in batch.columns), strict=True)
    ]
    text = io.StringIO()
    Console(file=text, width=200).print(table(first.schema.names, rows))
    path.write_text(text.getvalue(), encoding="utf-8")
    return len(rows)


_WRITERS = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "json": _write_json,
    "table": _write_table,
}


def _writable(path: Path, lake: Any) -> Path:
    """The file to write; SettingsError for one inside the lake or in a folder that is not there."""
    path = path.expanduser().resolve()
    if lake.root.is_local and path.is_relative_to(lake.root.base):
        raise SettingsError(
            f"--out {path} is inside the lake, which is only read here; name a file outside it"
        )
    if not path.parent.is_dir():
        raise SettingsError(f"--out {path}: there is no folder {path.parent}; make it first")
    return path


def _policies(options: argparse.Namespace) -> int:
    from flows.terminal import console
    from storage.policy_file import built_in_policies, read_policy

    for name in built_in_policies():
        policy = read_policy(name)
        said = policy.summary
        console.print(f"{name}: {said}", highlight=False, markup=False, soft_wrap=True)
        for parameter in policy.header.parameters:
            console.print(f"    {parameter}", highlight=False, markup=False, soft_wrap=True)
    return 0
