"""Running a policy over the texts of a round: a few shards at a time where it goes image by image, else all at once.

The next texts are decided on while the last are written.
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import TypeVar

import duckdb
import pyarrow as pa

from storage import catalog
from storage.candidates import COLUMNS, Candidates
from storage.errors import ConfigError
from storage.fingerprint import canonical
from storage.policy_file import Policy
from storage.policy_header import Value
from storage.policy_sql import MADE_CUTS, ParsedPolicy, bare, failed
from storage.schemas import schema_of

DECIDED = """
SELECT
    caption_id, image_id, source, CAST($round AS INTEGER) AS round, $policy AS policy, $params AS params,
    kept, reason, $generation AS generation{variant}
FROM {verdicts}
{order}
"""
_JOINED = "(SELECT c.image_id, c.source, v.caption_id, v.kept, v.reason FROM candidates c JOIN verdict v USING (caption_id))"
_WHOLE_ORDER = "ORDER BY image_id, caption_id"
MAX_WORKERS = 8

T = TypeVar("T")


class PolicyRun:
    """One policy with its parameters on the texts of one round."""

    def __init__(
        self,
        candidates: Candidates,
        parsed: ParsedPolicy,
        params: Mapping[str, Value],
        *,
        memory_limit: str,
        time_limit_s: float,
    ) -> None:
        self.candidates = candidates
        self.policy: Policy = parsed.policy
        self.parsed = parsed
        self.params = dict(params)
        self.columns = columns_of(parsed)
        self.counts: Counter[str] = Counter()
        """texts, kept and dropped so far."""
        self._memory_limit = memory_limit
        self._time_limit_s = time_limit_s
        self._given = {
            "round": candidates.round,
            "policy": self.policy.name,
            "params": canonical(self.params),
            "generation": self.policy.generation(self.params, candidates.variant),
        }
        if candidates.variant is not None:
            self._given["variant"] = candidates.variant

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Rows of `decisions`, in an order that depends on nothing but the parts.

        ConfigError when the policy fails, forgets a text or takes too long.
        """
        with ExitStack() as stack:
            clock = stack.enter_context(time_limited(self.policy, self._time_limit_s))
            whole = stack.enter_context(catalog.connect(self.candidates.lake, self._memory_limit))
            clock.watch(whole)
            if not self.policy.header.by_image:
                # All threads at once: only sorting puts the rows in an order.
                yield from self._decide(
                    whole, bare(self.policy.sql), None, _WHOLE_ORDER
                ).to_batches()
                return
            sql, cuts = bare(self.policy.sql), None
            if self.policy.header.has_cuts:
                sql, cuts = self.parsed.without_cuts_sql(whole), self._cuts(whole)
            whole.close()
            yield from self._by_chunks(sql, cuts, clock)

    def _by_chunks(
        self, sql: str, cuts: pa.Table | None, clock: "Clock"
    ) -> Iterator[pa.RecordBatch]:
        """Chunk after chunk, in order."""

        def work(con: duckdb.DuckDBPyConnection, shards: list[str]) -> pa.Table:
            return self._decide(con, sql, shards, "")

        tables = {} if cuts is None else {MADE_CUTS: cuts}
        for table in workers(self.candidates, self._memory_limit, clock, work, tables):
            yield from table.to_batches()

    def _cuts(self, con: duckdb.DuckDBPyConnection) -> pa.Table:
        """What the clause `cuts` finds in all texts."""
        con.execute(
            f"CREATE OR REPLACE TEMP VIEW candidates AS {self.candidates.sql(self.columns)}"
        )
        sql = self.parsed.cuts_sql(con)
        try:
            return con.sql(sql, params=bound(con, sql, self.params)).to_arrow_table()
        except duckdb.InterruptException:
            raise
        except duckdb.Error as err:
            raise failed(self.policy, err, 0) from err

    def _decide(
        self, con: duckdb.DuckDBPyConnection, sql: str, shards: list[str] | None, order: str
    ) -> pa.Table:
        texts = self.candidates.sql(self.columns, shards)
        con.execute(f"CREATE OR REPLACE TEMP TABLE candidates AS {texts}")
        try:
            con.execute(
                f"CREATE OR REPLACE TEMP TABLE verdict AS FROM (\n{sql}\n)",
                bound(con, sql, self.params),
            )
        except duckdb.InterruptException:
            raise
        except duckdb.Error as err:
            raise failed(self.policy, err, 1) from err
        num_texts, kept = check_complete(con, self.policy)
        self.counts.update(texts=num_texts, kept=kept, dropped=num_texts - kept)
        verdicts = "verdict" if _gives_ids(con) else _JOINED
        variant = "" if self.candidates.variant is None else ", $variant AS variant"
        sql = DECIDED.format(verdicts=verdicts, order=order, variant=variant)
        return (
            con.sql(sql, params=self._given).to_arrow_table().cast(schema_of(self.candidates.table))
        )


def workers(
    candidates: Candidates,
    memory_limit: str,
    clock: "Clock",
    work: Callable[[duckdb.DuckDBPyConnection, list[str]], T],
    tables: Mapping[str, pa.Table] | None = None,
) -> Iterator[T]:
    """What `work` makes of each chunk of shards, in order, some at a time.

    Each worker has a database of one thread, so that the rows it gives have an order; they share the memory.
    """
    num_workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    limit = f"{catalog.memory_bytes(memory_limit) // num_workers}B"
    free: SimpleQueue[duckdb.DuckDBPyConnection] = SimpleQueue()

    def with_connection(shards: list[str]) -> T:
        con = free.get()
        try:
            return work(con, shards)
        finally:
            free.put(con)

    with ExitStack() as stack:
        for _ in range(num_workers):
            con = stack.enter_context(catalog.connect(candidates.lake, limit, threads=1))
            clock.watch(con)
            for name, table in (tables or {}).items():
                con.register(name, table)
            free.put(con)
        pool = stack.enter_context(ThreadPoolExecutor(num_workers))
        coming: deque[Future[T]] = deque()
        try:
            for shards in candidates.chunks():
                coming.append(pool.submit(with_connection, shards))
                if len(coming) > num_workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        except BaseException:
            for future in coming:
                future.cancel()
            clock.interrupt()
            raise


def columns_of(parsed: ParsedPolicy) -> set[str]:
    """Which columns of `candidates` a policy reads, the ids always among them."""
    found = list(parsed.named())
    if any(each.kind == "every column" for each in found):
        return set(COLUMNS)
    named = {each.name for each in found if each.kind == "column"}
    return {"caption_id", "image_id", "source"} | (named & set(COLUMNS))


def check_complete(con: duckdb.DuckDBPyConnection, policy: Policy) -> tuple[int, int]:
    """Texts and kept ones of `verdict`; ConfigError unless every candidate has exactly one row in it.

    Sums of hashes are compared, not sets: a scan of each, whatever the number of rows.
    """
    ids = "caption_id, image_id, source" if _gives_ids(con) else "caption_id"
    texts, wanted = con.execute(f"SELECT count(*), sum(hash({ids})) FROM candidates").fetchall()[0]
    rows, given, kept, blank = con.execute(
        f"SELECT count(*), sum(hash({ids})), count(*) FILTER (WHERE kept), "
        "count(*) FILTER (WHERE kept IS NULL OR reason IS NULL) FROM verdict"
    ).fetchall()[0]
    if (rows, given, blank) != (texts, wanted, 0):
        missing, strange, twice = con.execute(
            "SELECT (SELECT count(*) FROM candidates ANTI JOIN verdict USING (caption_id)), "
            "(SELECT count(*) FROM verdict ANTI JOIN candidates USING (caption_id)), "
            "(SELECT count(*) - count(DISTINCT caption_id) FROM verdict)"
        ).fetchall()[0]
        raise ConfigError(
            f"policy {policy.name} must give each of the {texts} texts one row with its own ids, kept and "
            f"reason: it gave {rows} rows; {missing} texts are missing, {twice} rows are doubled, {strange} "
            f"rows are of no text, and {blank} rows have no verdict or reason"
        )
    return int(texts), int(kept)


class Clock:
    """Interrupts the connections that it watches when the time is up."""

    def __init__(self) -> None:
        self.too_long = threading.Event()
        self._watched: list[duckdb.DuckDBPyConnection] = []

    def watch(self, con: duckdb.DuckDBPyConnection) -> None:
        """Interrupt this one too."""
        self._watched.append(con)
        if self.too_long.is_set():
            con.interrupt()

    def stop(self) -> None:
        """The time is up."""
        self.too_long.set()
        self.interrupt()

    def interrupt(self) -> None:
        """End what runs on the connections."""
        for con in self._watched:
            con.interrupt()


@contextmanager
def time_limited(policy: Policy, seconds: float) -> Iterator[Clock]:
    """A clock whose connections are interrupted after some seconds; ConfigError names the policy and the limit."""
    clock = Clock()
    timer = threading.Timer(seconds, clock.stop)
    timer.daemon = True
    timer.start()
    try:
        yield clock
    except RuntimeError as err:
        catalog.raise_if_stopped(err)
        raise
    except duckdb.Error as err:
        if not clock.too_long.is_set():
            raise
        raise ConfigError(
            f"policy {policy.name} took longer than {seconds:g} s and was stopped: look for a join without a "
            "condition or a recursion without an end; if it needs the time, raise decide.time_limit_s"
        ) from err
    finally:
        timer.cancel()


def bound(
    con: duckdb.DuckDBPyConnection, sql: str, params: Mapping[str, Value]
) -> dict[str, Value] | None:
    """The parameters that a statement names; DuckDB refuses others."""
    named = con.extract_statements(sql)[0].named_parameters
    return {name: params[name] for name in named} or None


def _gives_ids(con: duckdb.DuckDBPyConnection) -> bool:
    """Whether the policy gives image_id and source too, so that no join has to find them."""
    names = {row[0] for row in con.execute("DESCRIBE verdict").fetchall()}
    return {"image_id", "source"} <= names
