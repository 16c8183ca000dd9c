"""Decisions: one SQL file over captions and scores says which texts stay, and why.

Another threshold or another policy is seconds of DuckDB and no model; the texts keep their ids. Each is a
generation of its own, beside the others.
"""

from collections.abc import Mapping
from typing import Any

import duckdb

from storage import catalog, layout
from storage.candidates import Candidates, candidates_of
from storage.errors import ConfigError, EmptyInput
from storage.fingerprint import Basis, basis_of
from storage.generations import note_generation
from storage.lake import Lake
from storage.policy_check import check_policy
from storage.policy_file import JUDGES_NUMBERS, Policy, explain_absent, read_policy
from storage.policy_header import Value
from storage.policy_run import PolicyRun
from storage.tables import Counts, OnStale, PartRef, commit_batches, committed_part

STAGE_VERSION = 2
TIME_LIMIT_S = 3600.0
OF_THE_ROUND = frozenset({"captions", "scores", "decisions", "judgements"})
"""Tables that hold nothing of the captions of another decoding."""


def decide(
    lake: Lake,
    round: int,
    policy: str = "blip",
    params: Mapping[str, Any] | None = None,
    *,
    activate: bool = True,
    of_round: bool = False,
    on_stale: OnStale = "error",
    memory_limit: str = "2GB",
    time_limit_s: float = TIME_LIMIT_S,
) -> PartRef:
    """Decide on every text of a round; one row each, kept or dropped, with its reason.

    `policy` names a file of `storage/policies`, or is the path of one; parameters that are not given have
    their defaults. Decisions made before under other parameters stay. With `activate`, `clean` and the other
    views follow these from now on; with `of_round` they are the round's own as well.

    Raises EmptyInput when the round has no text, ConfigError when the policy is unknown, fails, takes longer
    than `time_limit_s`, or forgets a text, StaleOutput when texts or scores have changed since.
    """
    chosen = read_policy(policy)
    values = chosen.params(params or {})
    candidates = candidates_of(lake, round)
    ref = _found_or_decided(candidates, chosen, values, on_stale, memory_limit, time_limit_s)
    note_generation(lake, round, chosen.name, ref.name, activate=activate, of_round=of_round)
    return ref


def decide_variant(
    lake: Lake,
    round: int,
    variant: str,
    policy: str = "blip",
    params: Mapping[str, Any] | None = None,
    *,
    on_stale: OnStale = "error",
    memory_limit: str = "2GB",
    time_limit_s: float = TIME_LIMIT_S,
) -> PartRef:
    """Decide on a round's web texts and the captions that another decoding wrote: rows of `variant_decisions`.

    Beside the round: no view but `variant_verdicts` shows them, and they never count. Raises as `decide`, and
    ConfigError for a policy that would look at the round's own captions.
    """
    chosen = read_policy(policy)
    values = chosen.params(params or {})
    check_on_variant(chosen, values, variant)
    candidates = candidates_of(lake, round, variant)
    return _found_or_decided(candidates, chosen, values, on_stale, memory_limit, time_limit_s)


def check_on_variant(policy: Policy, params: dict[str, Value], variant: str) -> None:
    """ConfigError for a policy that cannot decide on captions of another decoding: it asks what only the round's have."""
    if judged := set(JUDGES_NUMBERS) & set(params.values()):
        raise ConfigError(
            f"policy {policy.name} ranks by {min(judged)}, and the judge has only seen the round's own captions, none "
            f"of decoding {variant}: rank by itm_prob or itc_sim"
        )
    parsed = check_policy(policy, params)
    tables = {each.name.lower() for each in parsed.named() if each.kind == "table"}
    if read := (tables & OF_THE_ROUND) - {name.lower() for name in parsed.ctes()}:
        raise ConfigError(
            f"policy {policy.name} reads table {min(read)}, which has nothing of the captions of decoding {variant}: "
            "let it read candidates alone"
        )


def _found_or_decided(
    candidates: Candidates,
    policy: Policy,
    params: dict[str, Value],
    on_stale: OnStale,
    memory_limit: str,
    time_limit_s: float,
) -> PartRef:
    config = {"policy": policy.name, "params": params, "sql_sha256": policy.sql_sha256}
    basis = basis_of(
        "decide",
        STAGE_VERSION,
        config | ({"variant": candidates.variant} if candidates.variant else {}),
        candidates.inputs
        + (candidates.judged if set(params.values()) & set(JUDGES_NUMBERS) else []),
    )
    ref = committed_part(
        candidates.lake,
        candidates.table,
        policy.generation(params, candidates.variant),
        round=candidates.round,
        basis=basis,
        on_stale=on_stale,
    )
    if ref is None:
        ref = _decide(candidates, policy, params, basis, memory_limit, time_limit_s)
    return ref


def _decide(
    candidates: Candidates,
    policy: Policy,
    params: dict[str, Value],
    basis: Basis,
    memory_limit: str,
    time_limit_s: float,
) -> PartRef:
    lake, round = candidates.lake, candidates.round
    parsed = check_policy(policy, params)
    with catalog.disk_watched(lake, layout.WORK), catalog.connect(lake, memory_limit) as con:
        if not _count(con, f"SELECT count(*) FROM ({candidates.sql({'source'})} LIMIT 1)"):
            raise EmptyInput(
                f"round {round} of {lake.uri} has no text to decide on: no web text came in and no "
                "caption was made; run the ingest and caption stages, and look at the funnel"
            )
        _check_numbers(con, candidates, policy, params)
    running = PolicyRun(
        candidates, parsed, params, memory_limit=memory_limit, time_limit_s=time_limit_s
    )
    with catalog.disk_watched(lake, layout.WORK):
        return commit_batches(
            lake,
            candidates.table,
            policy.generation(params, candidates.variant),
            running.batches(),
            round=round,
            basis=basis,
            counts=lambda: Counts(
                num_in=running.counts["texts"],
                num_ok=running.counts["kept"],
                reasons={"dropped": running.counts["dropped"]},
            ),
        )


def _check_numbers(
    con: duckdb.DuckDBPyConnection,
    candidates: Candidates,
    policy: Policy,
    params: Mapping[str, Value],
) -> None:
    """Refuse a policy that reads a number which the scorer did not give."""
    for number in policy.needed_numbers(params):
        absent = con.execute(
            f"SELECT s.model_id, any_value(m.path), count(*) FROM scores s "
            f"LEFT JOIN models m ON m.model_id = s.model_id AND m.round = s.round "
            f"WHERE s.round = ? AND s.status = 'ok' AND s.{number} IS NULL "
            "GROUP BY ALL ORDER BY ALL LIMIT 1",
            [candidates.round],
        ).fetchall()
        if absent:
            model_id, path, texts = absent[0]
            scorer = (
                f"model {model_id[:8]} ({path}), the scorer of {texts} texts of round "
                f"{candidates.round},"
            )
            raise ConfigError(explain_absent(policy.name, number, scorer))
    for number in sorted(set(JUDGES_NUMBERS) & set(params.values())):
        said = number.removeprefix("judge_")
        if not _count(
            con,
            f"SELECT count(*) FROM judgements WHERE round = {candidates.round} AND {said} IS NOT NULL",
        ):
            raise ConfigError(
                f"policy {policy.name} ranks by {number}, and the judge has said none of round {candidates.round}: let "
                "the judge score its texts first, or rank by itm_prob or itc_sim"
            )


def _count(con: duckdb.DuckDBPyConnection, sql: str) -> int:
    return int(con.execute(sql).fetchall()[0][0])
