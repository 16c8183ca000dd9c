"""A sweep: what a policy would keep at each of many values of one parameter, by source, without deciding.

Where the policy looks at one row at a time, all values are counted in one scan; otherwise the texts are read once and
the policy runs over them for each value.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np

from storage import catalog
from storage.candidates import Candidates, candidates_of
from storage.errors import ConfigError, EmptyInput
from storage.lake import Lake
from storage.policy_check import check_policy
from storage.policy_file import Policy, read_policy
from storage.policy_header import Parameter, Value
from storage.policy_run import (
    bound,
    columns_of,
    time_limited,
    workers,
)
from storage.policy_sql import ParsedPolicy, bare, failed

MAX_VALUES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRow:
    """What one value keeps of one source."""

    value: Value
    source: str
    texts: int
    kept: int
    ranges: tuple[np.ndarray, np.ndarray] | None = None
    """(B,) texts and (B,) kept ones in each range of the number that was asked for; those without a number in none."""

    @property
    def share(self) -> float:
        """Kept texts of the source's texts."""
        return self.kept / self.texts if self.texts else 0.0


def sweep(
    lake: Lake,
    round: int,
    policy: str,
    parameter: str,
    values: Sequence[Value],
    params: dict[str, Any] | None = None,
    *,
    number: str = "itm_prob",
    edges: np.ndarray | None = None,
    memory_limit: str = "2GB",
    time_limit_s: float = 3600.0,
) -> list[SweepRow]:
    """One row for each value and source, in the order of the values.

    With `edges` (B - 1, ascending), rows also say how their texts lie over the ranges of `number` between them; an
    edge belongs to the range above it. Raises ConfigError for an unknown policy or parameter or a value out of its
    range, EmptyInput when the round has no text.
    """
    chosen = read_policy(policy)
    declared = _parameter(chosen, parameter)
    if not 1 <= len(values) <= MAX_VALUES:
        raise ConfigError(f"a sweep has 1 to {MAX_VALUES} values, not {len(values)}")
    settings = [chosen.params({**(params or {}), declared.name: value}) for value in values]
    parsed = check_policy(chosen, settings[0])
    candidates = candidates_of(lake, round)
    place = _range_sql(number, edges)
    job = _Job(
        candidates=candidates,
        parsed=parsed,
        settings=settings,
        place=place,
        number=number if edges is not None else None,
        memory_limit=memory_limit,
    )
    with duckdb.connect() as con:
        kept = parsed.kept_of_a_row(con)
    counted = _by_rows(job, kept, time_limit_s) if kept else _by_values(job, time_limit_s)
    if not counted:
        raise EmptyInput(
            f"round {round} of {lake.uri} has no text to sweep over; run the ingest, caption and score stages first"
        )
    return _rows(counted, [each[declared.name] for each in settings], edges)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    candidates: Candidates
    parsed: ParsedPolicy
    settings: list[dict[str, Value]]
    place: str
    """SQL of the range that a row lies in; -1 for none."""
    number: str | None
    memory_limit: str

    @property
    def columns(self) -> set[str]:
        return columns_of(self.parsed) | ({self.number} if self.number else set())


_Counted = dict[tuple[str, int], tuple[int, list[int]]]
"""By source and range: texts, and the kept ones for each value."""


def _by_rows(job: _Job, kept: str, time_limit_s: float) -> _Counted:
    """All values in one scan: what the policy calls kept, once for each, counted over a few shards at a time."""
    counts: list[str] = []
    given: dict[str, Value] = {}
    for i, params in enumerate(job.settings):
        text = kept
        for name in job.parsed.parameters:
            text = re.sub(rf"\${name}\b", f"$p{i}_{name}", text)
            given[f"p{i}_{name}"] = params[name]
        counts.append(f"count(*) FILTER (WHERE {text})")
    columns = {name for name in job.columns if name in kept} | {"source"}
    columns |= {job.number} if job.number else set()
    counted: _Counted = {}

    def count(con: duckdb.DuckDBPyConnection, shards: list[str]) -> list[tuple[Any, ...]]:
        sql = (
            f"SELECT source, {job.place}, count(*), {', '.join(counts)} "
            f"FROM ({job.candidates.sql(columns, shards)}) GROUP BY 1, 2"
        )
        return con.execute(sql, bound(con, sql, given)).fetchall()

    policy = job.parsed.policy
    with time_limited(policy, time_limit_s) as clock:
        for rows in workers(job.candidates, job.memory_limit, clock, count):
            for source, place, texts, *kept_of in rows:
                before = counted.get((source, place), (0, [0] * len(kept_of)))
                added = [a + b for a, b in zip(before[1], kept_of, strict=True)]
                counted[source, place] = before[0] + texts, added
    return counted


def _by_values(job: _Job, time_limit_s: float) -> _Counted:
    """The policy over all texts, once for each value; the texts are read once."""
    policy = job.parsed.policy
    counted: dict[tuple[str, int], tuple[int, list[int]]] = {}
    with (
        time_limited(policy, time_limit_s) as clock,
        catalog.connect(job.candidates.lake, job.memory_limit) as con,
    ):
        clock.watch(con)
        con.execute(f"CREATE TEMP TABLE candidates AS {job.candidates.sql(job.columns)}")
        for number, params in enumerate(job.settings):
            sql = (
                f"SELECT c.source, {job.place}, count(*), count(*) FILTER (WHERE v.kept) FROM (\n"
                f"{bare(policy.sql)}\n) v JOIN candidates c USING (caption_id) GROUP BY 1, 2"
            )
            try:
                rows = con.execute(sql, bound(con, sql, params)).fetchall()
            except duckdb.InterruptException:
                raise
            except duckdb.Error as err:
                raise failed(policy, err, 1) from err
            for source, place, texts, kept in rows:
                entry = counted.setdefault((source, place), (texts, [0] * len(job.settings)))
                entry[1][number] = kept
    return counted


def _rows(counted: _Counted, values: list[Value], edges: np.ndarray | None) -> list[SweepRow]:
    size = 0 if edges is None else len(edges) + 1
    rows = []
    for number, value in enumerate(values):
        for source in sorted({source for source, _ in counted}, reverse=True):
            of_source = {place: each for (name, place), each in counted.items() if name == source}
            texts, kept = np.zeros(size, int), np.zeros(size, int)
            for place, (num_texts, num_kept) in of_source.items():
                if 0 <= place < size:
                    texts[place], kept[place] = num_texts, num_kept[number]
            rows.append(
                SweepRow(
                    value=value,
                    source=source,
                    texts=sum(each[0] for each in of_source.values()),
                    kept=sum(each[1][number] for each in of_source.values()),
                    ranges=None if edges is None else (texts, kept),
                )
            )
    return rows


def _range_sql(number: str, edges: np.ndarray | None) -> str:
    if edges is None:
        return "-1"
    listed = ", ".join(repr(float(edge)) for edge in edges)
    return f"CASE WHEN {number} IS NULL THEN -1 ELSE len(list_filter([{listed}]::DOUBLE[], lambda e: e <= {number})) END"


def _parameter(policy: Policy, name: str) -> Parameter:
    for parameter in policy.header.parameters:
        if parameter.name == name:
            return parameter
    policy.params({name: 0})  # says which there are
    raise AssertionError(f"policy {policy.name} takes {name} but does not declare it")
