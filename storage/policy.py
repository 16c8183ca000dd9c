"""Decisions: one SQL file over captions and scores says which texts stay, and why.

Another threshold or another policy is seconds of DuckDB and no model; the texts keep their ids.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb

from storage import catalog, layout
from storage.errors import ConfigError, EmptyInput
from storage.fingerprint import basis_of, canonical
from storage.lake import Lake
from storage.schemas import DECISIONS
from storage.tables import (
    Counts,
    OnStale,
    PartRef,
    commit_batches,
    committed_part,
    list_parts,
)

STAGE_VERSION = 1

NUMBERS = ("itm_prob", "itc_sim")
"""What a scorer may say about a text; a model without a matching head leaves itm_prob null."""
_OTHER_POLICY = {
    "itm_prob": "one on itc_sim (decide.policy: itc, with a decide.threshold that suits the model)",
    "itc_sim": "one on itm_prob (decide.policy: blip)",
}
_NOT_CODE = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", re.DOTALL)
_MAY_BE_NULL = re.compile(r"--\s*may be null:\s*(.+)")

CANDIDATES = """
CREATE TEMP TABLE candidates AS
-- Every text that a round decides on: all web texts, and the synthetic ones of this round.
SELECT
    c.caption_id, c.image_id, c.source, c.caption,
    s.itm_prob, s.itc_sim, s.status AS score_status, s.error AS score_error
FROM captions c
LEFT JOIN scores s ON s.caption_id = c.caption_id AND s.round = $round
WHERE c.status = 'ok'
  -- Shards are named by the round that took them in; a round decides on what it had.
  AND ((c.source = 'web' AND c.round = 0 AND EXISTS (
          SELECT 1 FROM pairs p
          WHERE p.image_id = c.image_id AND p.pool = 'web' AND p.shard < $next_round)) OR (c.source = 'synthetic' AND c.round = $round))
"""

DECIDED = """
SELECT
    c.caption_id, c.image_id, c.source,
    CAST($round AS INTEGER) AS round, $policy AS policy, $params AS params,
    v.kept, v.reason
FROM candidates c
JOIN verdict v ON v.caption_id = c.caption_id
ORDER BY c.caption_id
"""


def decide(
    lake: Lake,
    round: int,
    policy: str = "blip",
    params: Mapping[str, Any] | None = None,
    *,
    activate: bool = True,
    on_stale: OnStale = "error",
    memory_limit: str = "2GB",
) -> PartRef:
    """Decide on every text of a round; one row each, kept or dropped, with its reason.

    `policy` names a file of `storage/policies`, or is the path of one. With `activate`, `clean`
    and the other views follow this policy from now on. Raises EmptyInput when the round has no
    text, ConfigError when the policy is unknown, fails, or forgets a text.
    """
    params = {"threshold": 0.5} if params is None else dict(params)
    name, sql = read_policy(policy)
    basis = basis_of(
        "decide",
        STAGE_VERSION,
        {
            "policy": name,
            "params": params,
            "sql_sha256": hashlib.sha256(sql.encode()).hexdigest()[:16],
        },
        sorted(
            ref.fingerprint
            for table, of in (("captions", 0), ("captions", round), ("scores", round))
            for ref in list_parts(lake, table, of)
            if ref.name < layout.web_shards(round + 1)
        ),
    )
    ref = committed_part(lake, "decisions", name, round=round, basis=basis, on_stale=on_stale)
    if ref is None:
        ref = _decide(lake, round, name, sql, params, basis, memory_limit)
    if activate and catalog.active_policy(lake, round) != name:
        data = json.dumps({"policy": name}).encode()
        lake.root.write_bytes(layout.round_policy(round), data)
    return ref


def read_policy(policy: str) -> tuple[str, str]:
    """Name and SQL of a policy, built in or at a path that ends in .sql."""
    built_in = files("storage").joinpath("policies", f"{policy}.sql")
    path = Path(policy)
    if "/" not in policy and built_in.is_file():
        return policy, built_in.read_text("utf-8")
    if path.suffix == ".sql" and path.is_file():
        return path.stem, path.read_text("utf-8")
    known = sorted(
        p.name.removesuffix(".sql")
        for p in files("storage").joinpath("policies").iterdir()
        if p.name.endswith(".sql")
    )
    raise ConfigError(
        f"policy {policy!r} is unknown; there are {', '.join(known)}, or give the path of a .sql file"
    )


def needed_numbers(sql: str) -> tuple[str, ...]:
    """Which of NUMBERS a policy cannot do without: those that its SQL reads.

    A policy that knows what to do without one says so in a comment: `-- may be null: itm_prob`.
    """
    code = _NOT_CODE.sub(" ", sql)
    optional = {name.strip() for found in _MAY_BE_NULL.findall(sql) for name in found.split(",")}
    return tuple(
        name
        for name in NUMBERS
        if name not in optional and re.search(rf"\b{name}\b", code, re.IGNORECASE)
    )


def explain_absent(policy: str, number: str, scorer: str) -> str:
    """Why a policy cannot decide on what a scorer gives, and what to do."""
    return (
        f"policy {policy} decides by {number}, which {scorer} does not give: decide by {_OTHER_POLICY[number]}, "
        f"or score with a model that gives {number}"
    )


def _decide(
    lake: Lake,
    round: int,
    name: str,
    sql: str,
    params: dict[str, Any],
    basis: dict[str, Any],
    memory_limit: str,
) -> PartRef:
    with catalog.disk_watched(lake, layout.WORK), catalog.connect(lake, memory_limit) as con:
        con.execute(CANDIDATES, {"round": round, "next_round": layout.web_shards(round + 1)})
        num_in = _count(con, "SELECT count(*) FROM candidates")
        if num_in == 0:
            raise EmptyInput(
                f"round {round} of {lake.uri} has no text to decide on: no web text came in and no "
                "caption was made; run the ingest and caption stages, and look at the funnel"
            )
        _check_numbers(con, round, name, sql)
        _run_policy(con, name, sql, params)
        _check_complete(con, name, num_in)
        dropped = _count(con, "SELECT count(*) FROM verdict WHERE NOT kept")
        counts = Counts(num_in=num_in, num_ok=num_in - dropped, reasons={"dropped": dropped})
        given = {"round": round, "policy": name, "params": canonical(params)}
        batches = con.sql(DECIDED, params=given).to_arrow_reader(10_000)
        return commit_batches(
            lake,
            "decisions",
            name,
            (b.cast(DECISIONS) for b in batches),
            round=round,
            basis=basis,
            counts=counts,
        )


def _check_numbers(con: duckdb.DuckDBPyConnection, round: int, name: str, sql: str) -> None:
    """Refuse a policy that reads a number which the scorer did not give."""
    for number in needed_numbers(sql):
        absent = con.execute(
            f"SELECT s.model_id, any_value(m.path), count(*) FROM candidates c "
            f"JOIN scores s ON s.caption_id = c.caption_id AND s.round = ? "
            f"LEFT JOIN models m ON m.model_id = s.model_id AND m.round = s.round "
            f"WHERE s.status = 'ok' AND s.{number} IS NULL GROUP BY ALL ORDER BY ALL LIMIT 1",
            [round],
        ).fetchall()
        if absent:
            model_id, path, texts = absent[0]
            scorer = f"model {model_id[:8]} ({path}), the scorer of {texts} texts of round {round},"
            raise ConfigError(explain_absent(name, number, scorer))


def _run_policy(
    con: duckdb.DuckDBPyConnection, name: str, sql: str, params: Mapping[str, Any]
) -> None:
    catalog.checked_statement(con, sql)
    used = {k: v for k, v in params.items() if f"${k}" in sql}
    unused = sorted(set(params) - set(used))
    if unused:
        raise ConfigError(
            f"policy {name} has no parameter {unused[0]!r}; its SQL names it ${unused[0]}"
        )
    try:
        con.execute(
            "CREATE TEMP TABLE verdict AS SELECT caption_id, kept, reason FROM (\n"
            f"{sql.rstrip().rstrip(';')}\n)",
            used or None,
        )
    except duckdb.Error as err:
        raise ConfigError(f"policy {name} failed: {err}") from err


def _check_complete(con: duckdb.DuckDBPyConnection, name: str, num_in: int) -> None:
    """Every candidate has exactly one verdict with kept and a reason."""
    rows = _count(con, "SELECT count(*) FROM verdict")
    distinct = _count(con, "SELECT count(DISTINCT caption_id) FROM verdict")
    matched = _count(con, "SELECT count(*) FROM candidates SEMI JOIN verdict USING (caption_id)")
    blank = _count(con, "SELECT count(*) FROM verdict WHERE kept IS NULL OR reason IS NULL")
    if not rows == distinct == matched == num_in or blank:
        raise ConfigError(
            f"policy {name} must give each of the {num_in} texts one row with kept and reason: it "
            f"gave {rows} rows for {distinct} texts, {num_in - matched} texts are missing and "
            f"{blank} rows have no verdict or reason"
        )


def _count(con: duckdb.DuckDBPyConnection, sql: str) -> int:
    return int(con.execute(sql).fetchall()[0][0])
