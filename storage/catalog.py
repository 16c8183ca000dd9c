"""SQL over the lake: DuckDB views on committed parts, never on what lies beside them.

`connect` for this program, `query` for strangers' SQL (fenced, read-only), `write_catalog` for the
DuckDB CLI. The views are the files of `storage/sql`; DuckDB only reads.
"""

import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from storage import layout
from storage.champions import champions_sql
from storage.errors import ConfigError, QueryRefused, StorageFull
from storage.fs import explained
from storage.generations import active_generation
from storage.lake import Lake
from storage.listed_files import ListedFiles
from storage.parts_sql import quoted, rows_of
from storage.schemas import TABLES
from storage.steady import steadily
from storage.tables import PartRef, list_parts

T = TypeVar("T")

VIEWS = (
    "reserved",
    "images",
    "models",
    "verdicts",
    "variant_verdicts",
    "clean",
    "rejected",
    "human",
    "heldout",
    "raw",
    "funnel",
    "noise",
    "purges",
    "lineage",
    "round_costs",
    "compare_rounds",
    "why",
    "policies",
)
"""The files of `storage/sql`, in the order in which they build on each other."""

_VIEW_OF = {"models": "model_records"}
"""Tables whose plain rows have another name, because a view adds columns to them."""


def connect(
    lake: Lake,
    memory_limit: str = "2GB",
    threads: int | None = None,
    *,
    as_of: int | None = None,
) -> duckdb.DuckDBPyConnection:
    """An in-memory connection with all views over what is committed now.

    With `as_of`, a round: over what that round and those before it took in and made.
    """
    con = connect_bare(lake, memory_limit, threads)
    create_views(con, lake, as_of=as_of)
    return con


def connect_bare(
    lake: Lake, memory_limit: str = "2GB", threads: int | None = None
) -> duckdb.DuckDBPyConnection:
    """`connect` without any view: for SQL over parts that are named one by one."""
    con = duckdb.connect(config=_config(lake, memory_limit, threads))
    if not lake.root.is_local:
        con.register_filesystem(ListedFiles(lake.root))
    return con


def create_views(con: duckdb.DuckDBPyConnection, lake: Lake, *, as_of: int | None = None) -> None:
    """Make every view: the tables first, then the files of `storage/sql`."""
    parts: dict[str, list[PartRef]] = {}
    for table in TABLES:
        name = _VIEW_OF.get(table, table)
        parts[table] = list_parts(lake, table, check=True)
        if as_of is not None:
            parts[table] = [ref for ref in parts[table] if not _is_later(ref, as_of)]
        con.execute(f"CREATE OR REPLACE VIEW {name} AS {rows_of(lake, table, parts[table])}")
    con.execute(
        f"CREATE OR REPLACE VIEW brought_later AS {_brought_later(lake, parts['captions'])}"
    )
    active = _active_parts(lake, parts["decisions"])
    con.execute(f"CREATE OR REPLACE VIEW active_policies AS {_active_policies(lake, active)}")
    counting = rows_of(lake, "decisions", list(active.values()))
    con.execute(f"CREATE OR REPLACE VIEW active_decisions AS {counting}")
    con.execute(f"CREATE OR REPLACE VIEW champions AS {champions_sql(lake)}")
    for view in VIEWS:
        con.execute(_sql_of(view))
    con.execute(_sql_of("macros"))
    # The same for any generation, whichever counts.
    con.execute(
        _sql_of("verdicts")
        .replace("VIEW verdicts AS", "MACRO verdicts_of(a_round, a_generation) AS TABLE")
        .replace(
            "FROM active_decisions d",
            "FROM (FROM decisions WHERE round = a_round AND generation = a_generation) d",
        )
    )


def _sql_of(view: str) -> str:
    return files("storage").joinpath("sql", f"{view}.sql").read_text("utf-8")


def query(
    lake: Lake,
    sql: str,
    params: Mapping[str, Any] | None = None,
    memory_limit: str = "2GB",
    threads: int | None = None,
) -> pa.Table:
    """The rows of one reading statement as an Arrow table.

    Raises QueryRefused when the text is not exactly one statement that only reads, touches files
    outside the lake, or fails.
    """
    batches = steadily(lake, lambda: list(stream(lake, sql, params, memory_limit, threads)))
    return pa.Table.from_batches(batches[1:], schema=batches[0].schema)


def stream(
    lake: Lake,
    sql: str,
    params: Mapping[str, Any] | None = None,
    memory_limit: str = "2GB",
    threads: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """`query`, some rows at a time: an empty batch with the schema, then the rows.

    A purge that replaces a part while rows are being handed out ends it with QueryRefused; `query` asks again.
    """
    con = fenced(lake, memory_limit, threads)
    try:
        checked_statement(con, sql)
        given = dict(params) if params else None
        reader = stoppable(con, lambda: con.sql(sql, params=given).to_arrow_reader(10_000))
        yield pa.RecordBatch.from_arrays(
            [pa.array([], f.type) for f in reader.schema], schema=reader.schema
        )
        while (batch := stoppable(con, lambda: next(reader, None))) is not None:
            yield batch
    except (duckdb.Error, pa.ArrowException) as err:
        raise QueryRefused(f"the query failed: {err}") from err
    except RuntimeError as err:
        raise_if_stopped(err)
        raise
    finally:
        con.close()


def memory_bytes(limit: str) -> int:
    """Bytes of a memory limit as DuckDB writes it, such as 2GB or 512 MiB. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", limit, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"memory limit {limit!r} is none; give one such as 2GB or 512MiB")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


def stoppable(con: duckdb.DuckDBPyConnection, work: Callable[[], T]) -> T:
    """`work()` on a connection, such that Ctrl-C ends it at once.

    DuckDB looks for signals between its own steps, and one step may take for ever: so another thread works, and the
    main one waits where Python can wake it.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(work)
        while True:
            try:
                return coming.result(timeout=0.1)
            except TimeoutError:
                if coming.done():
                    raise
            except KeyboardInterrupt:
                con.interrupt()
                raise


def raise_if_stopped(err: RuntimeError) -> None:
    """DuckDB answers Ctrl-C with a RuntimeError of these words; KeyboardInterrupt is what the rest knows."""
    if str(err) == "Query interrupted":
        raise KeyboardInterrupt from err


def fenced(
    lake: Lake, memory_limit: str = "2GB", threads: int | None = None
) -> duckdb.DuckDBPyConnection:
    """A connection for SQL of unknown origin: no files but the lake's, no settings to change.

    DuckDB's fence still lets a statement write inside the lake, so each statement must pass
    `checked_statement` too.
    """
    con = connect(lake, memory_limit, threads)
    if lake.root.is_local:
        con.execute(f"SET allowed_directories = [{quoted(lake.root.base)}]")
        con.execute("SET enable_external_access = false")
    else:
        con.execute("SET disabled_filesystems = 'LocalFileSystem'")
    con.execute("SET lock_configuration = true")
    return con


def checked_statement(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    """QueryRefused unless `sql` is exactly one statement that only reads."""
    try:
        statements = con.extract_statements(sql)
    except duckdb.Error as err:
        raise QueryRefused(f"not SQL: {err}") from err
    if len(statements) != 1:
        raise QueryRefused(f"one statement at a time, please: there are {len(statements)}")
    statement = statements[0]
    if statement.type == duckdb.StatementType.EXPLAIN:
        inner = _explained_text(statement.query)
        return checked_statement(con, inner)
    if statement.type != duckdb.StatementType.SELECT:
        raise QueryRefused(
            f"{statement.type.name} statements are refused: the lake is only read here; use "
            "SELECT, WITH, FROM, DESCRIBE, SHOW or SUMMARIZE"
        )
    return None


def write_catalog(lake: Lake) -> str | None:
    """Write catalog.duckdb, whose views the DuckDB CLI opens; its path, None on a remote lake.

    The file can be deleted and written again at any time; its views name absolute paths, so write
    it again after moving the lake.
    """
    if not lake.root.is_local:
        return None
    with disk_watched(lake, layout.CATALOG), lake.root.staged(layout.CATALOG) as tmp:
        with duckdb.connect(str(tmp), config=_config(lake, "2GB", 1)) as con:
            create_views(con, lake)
            con.execute("CHECKPOINT")
        tmp.with_name(f"{tmp.name}.wal").unlink(missing_ok=True)
    return layout.CATALOG


@contextmanager
def disk_watched(lake: Lake, rel: str) -> Iterator[None]:
    """Turn what DuckDB, SQLite and the file system say of a full disk into StorageFull."""
    try:
        with explained(lake.root, rel):
            yield
    except (duckdb.Error, sqlite3.Error) as err:
        if not any(words in str(err) for words in ("No space left", "disk is full")):
            raise
        raise StorageFull(
            f"{lake.uri}/{rel}: no space left; free some space and run the same command again: "
            "what is committed stays, the rest is made anew"
        ) from err


def _config(lake: Lake, memory_limit: str, threads: int | None) -> dict[str, Any]:
    memory_bytes(memory_limit)
    config: dict[str, Any] = {
        "memory_limit": memory_limit,
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
        "TimeZone": "UTC",
        # A name in SQL is a view of the lake, never a variable of this program.
        "python_enable_replacements": False,
    }
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads must be 1 or more, got {threads}")
        config["threads"] = threads
    if lake.root.is_local and not lake.read_only:
        config["temp_directory"] = str(lake.scratch("duckdb"))
    return config


def _is_later(ref: PartRef, round: int) -> bool:
    """Whether a part was made by a round after `round`, or from web pairs that one took in."""
    of_web = ref.table in ("pairs", "captions", "scores") and ref.name.startswith("web-")
    return (ref.round or 0) > round or (of_web and ref.name >= layout.web_shards(round + 1))


def _brought_later(lake: Lake, captions: list[PartRef]) -> str:
    """SQL of (caption_id, round): web texts that a round after the first brought, some of images that it had."""
    first = layout.web_shards(2)
    later = [ref for ref in captions if ref.name >= first and ref.name.startswith("web-")]
    texts = rows_of(lake, "captions", [ref for ref in later if ref.round == 0], named=True)
    number = "CAST(regexp_extract(part, 'web-([0-9]+)-[^/]*$', 1) AS INTEGER)"
    return f"SELECT caption_id, {number} AS round FROM ({texts}) WHERE status = 'ok'"


def _active_parts(lake: Lake, parts: list[PartRef]) -> dict[int, PartRef]:
    """Of parts of `decisions`, those that count, by round."""
    active: dict[int, PartRef] = {}
    named: dict[int, str] = {}
    for ref in parts:
        assert ref.round is not None, f"{ref.path} has no round"
        if ref.round not in named:
            says = active_generation(lake, ref.round)
            named[ref.round] = says.generation if says else ref.name
        if ref.name == named[ref.round]:
            active[ref.round] = ref
    return active


def _active_policies(lake: Lake, active: Mapping[int, PartRef]) -> str:
    """SQL of (round, policy, generation, of_round): whose decisions count in each round, and which are its own."""
    listed = []
    for round, ref in active.items():
        says = active_generation(lake, round)
        policy, own = (says.policy, says.of_round) if says else (ref.name, ref.name)
        listed.append(f"({round}, {quoted(policy)}, {quoted(ref.name)}, {quoted(own)})")
    rows = ", ".join(listed) or "(0, '', '', '')"
    return (
        "SELECT CAST(round AS INTEGER) AS round, policy, generation, of_round "
        f"FROM (VALUES {rows}) AS t(round, policy, generation, of_round) WHERE round > 0"
    )


def _explained_text(text: str) -> str:
    """The statement inside an EXPLAIN; QueryRefused for EXPLAIN with options we do not know."""
    words = text.split(None, 2)
    rest = text.split(None, 1)[1] if len(words) > 1 else ""
    if len(words) > 1 and words[1].upper() == "ANALYZE":
        rest = words[2] if len(words) > 2 else ""
    if rest.startswith("("):
        raise QueryRefused("EXPLAIN with options is refused; use EXPLAIN SELECT ...")
    return rest
