"""Running a policy over the texts of a round: a few shards at a time where it goes image by image, else all at once.

The next texts are decided on while the last are written.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import duckdb
import pyarrow as pa

from storage.candidates import COLUMNS, Candidates
from storage.errors import ConfigError
from storage.fingerprint import canonical
from storage.policy_file import Policy
from storage.policy_header import Value
from storage.policy_sql import MADE_CUTS, ParsedPolicy, bare, failed
from storage.schemas import DECISIONS

DECIDED = """
SELECT
    caption_id, image_id, source, CAST($round AS INTEGER) AS round, $policy AS policy, $params AS params,
    kept, reason, $generation AS generation
FROM {verdicts}
ORDER BY image_id, caption_id
"""
_JOINED = "(SELECT c.image_id, c.source, v.caption_id, v.kept, v.reason FROM candidates c JOIN verdict v USING (caption_id))"


class PolicyRun:
    """One policy with its parameters on the texts of one round."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        candidates: Candidates,
        parsed: ParsedPolicy,
        params: Mapping[str, Value],
        *,
        time_limit_s: float,
    ) -> None:
        self.con = con
        self.candidates = candidates
        self.policy: Policy = parsed.policy
        self.parsed = parsed
        self.params = dict(params)
        self.columns = columns_of(parsed)
        self.counts: Counter[str] = Counter()
        """texts, kept and dropped so far."""
        self._time_limit_s = time_limit_s

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Rows of `decisions`, in order; ConfigError when the policy fails, forgets a text or takes too long."""
        by_image = self.policy.header.by_image
        with time_limited(self.con, self.policy, self._time_limit_s):
            if self.policy.header.has_cuts:
                self._make_cuts()
                sql = self.parsed.without_cuts_sql(self.con)
            else:
                sql = bare(self.policy.sql)
            chunks = list(self.candidates.chunks()) if by_image else [None]
            with ThreadPoolExecutor(1) as ahead:
                coming = None
                for number in range(len(chunks) + 1):
                    ready = coming
                    more = number < len(chunks)
                    coming = ahead.submit(self._decide, sql, chunks[number]) if more else None
                    # The connection is one thread's at a time: what is ready is taken out of it there.
                    if ready is not None:
                        yield from ready.result().to_batches()

    def _make_cuts(self) -> None:
        """What the clause `cuts` finds in all texts, as a table."""
        self.con.execute(
            f"CREATE OR REPLACE TEMP VIEW candidates AS {self.candidates.sql(self.columns)}"
        )
        sql = self.parsed.cuts_sql(self.con)
        try:
            self.con.execute(f"CREATE OR REPLACE TEMP TABLE {MADE_CUTS} AS {sql}", self._used(sql))
        except duckdb.InterruptException:
            raise
        except duckdb.Error as err:
            raise failed(self.policy, err, 0) from err
        self.con.execute("DROP VIEW candidates")

    def _decide(self, sql: str, shards: list[str] | None) -> pa.Table:
        con = self.con
        con.execute(
            f"CREATE OR REPLACE TEMP TABLE candidates AS {self.candidates.sql(self.columns, shards)}"
        )
        try:
            con.execute(
                f"CREATE OR REPLACE TEMP TABLE verdict AS FROM (\n{sql}\n)", self._used(sql)
            )
        except duckdb.InterruptException:
            raise
        except duckdb.Error as err:
            raise failed(self.policy, err, 1) from err
        self._count(*check_complete(con, self.policy))
        verdicts = "verdict" if _gives_ids(con) else _JOINED
        given = {
            "round": self.candidates.round,
            "policy": self.policy.name,
            "params": canonical(self.params),
            "generation": self.policy.generation(self.params),
        }
        return (
            con.sql(DECIDED.format(verdicts=verdicts), params=given)
            .to_arrow_table()
            .cast(DECISIONS)
        )

    def _count(self, texts: int, kept: int) -> None:
        self.counts.update(texts=texts, kept=kept, dropped=texts - kept)

    def _used(self, sql: str) -> dict[str, Value] | None:
        """The parameters that a statement names; DuckDB refuses others."""
        named = self.con.extract_statements(sql)[0].named_parameters
        return {name: self.params[name] for name in named} or None


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


@contextmanager
def time_limited(con: duckdb.DuckDBPyConnection, policy: Policy, seconds: float) -> Iterator[None]:
    """Interrupt what runs on a connection after some seconds; ConfigError names the policy and the limit."""
    too_long = threading.Event()

    def stop() -> None:
        too_long.set()
        con.interrupt()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException as err:
        if not too_long.is_set():
            raise
        raise ConfigError(
            f"policy {policy.name} took longer than {seconds:g} s and was stopped: look for a join without a "
            "condition or a recursion without an end; if it needs the time, raise decide.time_limit_s"
        ) from err
    finally:
        timer.cancel()


def _gives_ids(con: duckdb.DuckDBPyConnection) -> bool:
    """Whether the policy gives image_id and source too, so that no join has to find them."""
    names = {row[0] for row in con.execute("DESCRIBE verdict").fetchall()}
    return {"image_id", "source"} <= names
