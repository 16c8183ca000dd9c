"""Commands about rounds: `rounds`, `compare-rounds`, `promote`, `rollback`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from storage import Lake

ROUNDS_SQL = """
SELECT r.round, r.status, r.decided_by AS "by", coalesce(bool_or(h.is_now), false) AS champion,
       c.kept, c.share_kept, c.best_mean_recall AS recall, r.why
FROM rounds r
LEFT JOIN compare_rounds c USING (round)
LEFT JOIN champions h ON h.round = r.round
GROUP BY ALL ORDER BY r.round
"""
RULES_SQL = """
SELECT rule, CASE outcome WHEN 'fail' THEN 'fail: ' || verdict_if_failed ELSE outcome END AS outcome,
       value, low, high, CASE direction WHEN 'at_least' THEN '>= ' ELSE '<= ' END
           || printf('%g', "limit") AS asked, "against", why
FROM gate_rules WHERE round = $round
ORDER BY CASE outcome WHEN 'fail' THEN 0 WHEN 'pass' THEN 1 ELSE 2 END, rule
"""
SHOWN_SQL = f"""
SELECT rule, outcome, printf('%.4g', value) AS value,
       coalesce(printf('%.3f to %.3f', low, high), '') AS interval,
       asked || CASE "against" WHEN 'nothing' THEN '' ELSE ' of ' || "against" END AS asked
FROM ({RULES_SQL}) WHERE value IS NOT NULL
ORDER BY CASE WHEN starts_with(outcome, 'fail') THEN 0 ELSE 1 END, rule
"""
COSTS_SQL = "SELECT stage, seconds, device_seconds, share FROM round_costs WHERE round = $round"

Command = Callable[[argparse.Namespace], int]
AddCommand = Callable[[Any, str, str, Command], argparse.ArgumentParser]


def register(commands: Any, add: AddCommand) -> None:
    """Add the commands; `add` makes one with what all have."""
    listed = add(commands, "rounds", "the rounds of a lake with their verdicts", _rounds)
    listed.add_argument("round", nargs="?", type=int, help="show what its gate asked, and its cost")
    compared = add(commands, "compare-rounds", "the rounds side by side, a figure a line", _compare)
    for sub in (listed, compared):
        sub.add_argument("--lake", help="lake to read")
        sub.add_argument("--format", choices=("table", "csv", "json"), default="table")
    for name, text in (
        ("promote", "make a round's model the champion, whatever its gate said"),
        ("rollback", "go back to the model of a round that was champion before"),
    ):
        sub = add(commands, name, text, partial(_by_hand, action=name))
        sub.add_argument("round", type=int, help="the round; 0 is the first model")
        sub.add_argument("--because", required=True, help="the reason, which is recorded")
        sub.add_argument("--lake", help="lake to work on")


def _rounds(options: argparse.Namespace) -> int:
    from flows.terminal import console
    from storage import query

    lake = _lake(options, read_only=True)
    if options.round is not None:
        return _one_round(lake, options)
    result = query(lake, ROUNDS_SQL)
    _print(result, options.format)
    if options.format == "table":
        for row in result.to_pylist():
            _say(f"round {row['round']}: {row['why'] or 'not finished'}")
        console.print("[dim]`bootstrap rounds N` shows what the gate asked of round N[/]")
    return 0


def _one_round(lake: Lake, options: argparse.Namespace) -> int:
    """What the gate asked of a round, and what the round cost."""
    from storage import ConfigError, query

    of = {"round": options.round}
    known = query(lake, "SELECT status, why FROM rounds WHERE round = $round", of).to_pylist()
    if not known:
        raise ConfigError(f"lake {lake.uri} has no round {options.round}; see `bootstrap rounds`")
    asked = query(lake, RULES_SQL, of)
    if options.format != "table":
        _print(asked, options.format)
    else:
        if asked.num_rows:
            _print(query(lake, SHOWN_SQL, of), "table")
        else:
            _say("no rules: the round has not been judged yet, or was by a version without them")
        absent = asked.column("rule").filter(asked.column("value").is_null()).to_pylist()
        if absent:
            _say(f"not measured: {', '.join(absent)}")
        _print(query(lake, COSTS_SQL, of), "table")
        _say(f"round {options.round}: {known[0]['status']}. {known[0]['why'] or ''}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from flows.terminal import print_rows, rows_of
    from storage import query

    result = query(_lake(options, read_only=True), "SELECT * FROM compare_rounds ORDER BY round")
    if options.format != "table":
        print_rows(result.column_names, rows_of(result), options.format)
        return 0
    rounds = [f"round {number}" for number in result.column("round").to_pylist()]
    figures = [
        (name, *(_shown(value) for value in column.to_pylist()))
        for name, column in zip(result.column_names, result.columns, strict=True)
        if name not in ("round", "why")
    ]
    print_rows(["figure", *rounds], figures, "table")
    return 0


def _by_hand(options: argparse.Namespace, *, action: str) -> int:
    from storage import by_hand, write_catalog

    lake = _lake(options)
    decide = by_hand.promote if action == "promote" else by_hand.roll_back
    ref = decide(lake, options.round, options.because)
    write_catalog(lake)
    _say(f"champion: {ref.model_id} of round {options.round}; the next round starts from it")
    return 0


def _lake(options: argparse.Namespace, *, read_only: bool = False) -> Lake:
    from flows.cli import find_lake
    from storage import Lake

    return Lake.open(find_lake(options.lake), read_only=read_only)


def _print(result: pa.Table, form: str) -> None:
    """Rows; as a table without their reasons, which are sentences."""
    from flows.terminal import print_rows, rows_of

    if form == "table" and "why" in result.column_names:
        result = result.drop_columns(["why"])
    print_rows(result.column_names, rows_of(result), form)


def _say(text: str) -> None:
    from flows.terminal import console

    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _shown(value: Any) -> Any:
    """A model id shortened; all else as it is."""
    is_id = isinstance(value, str) and len(value) == 32 and " " not in value
    return value[:8] if is_id else value
