"""`bootstrap decide` by hand: another policy or other parameters on a round whose texts are scored, in seconds."""

from __future__ import annotations

import argparse
from typing import Any

from flows.errors import MissingInput, SettingsError


def is_by_hand(options: argparse.Namespace) -> bool:
    """Whether a policy, a parameter or a choice is given, so that the round's own settings do not decide."""
    bare = any("." not in text.partition("=")[0] for text in options.overrides)
    return bool(options.policy or options.activate or options.round or bare)


def add_options(sub: argparse.ArgumentParser) -> None:
    """What `decide` has beyond the options of a stage."""
    sub.add_argument("--policy", help="another policy: a name, or the path of a .sql file")
    sub.add_argument(
        "--round", type=int, help="with --policy: the latest scored one when not given"
    )
    sub.add_argument(
        "--activate",
        nargs="?",
        const=True,
        metavar="GENERATION",
        help="let `clean` and the other views follow it from now on; alone, the round's own again; or name one",
    )


def decide_by_hand(options: argparse.Namespace) -> int:
    """Write the decisions of a policy beside those of the round, and say how they differ."""
    from flows.cli import find_lake
    from flows.terminal import console
    from storage import Lake, connect, decide, write_catalog
    from storage.generations import active_generation

    uri = (
        _lake_of_config(options) if options.preset and not options.lake else find_lake(options.lake)
    )
    lake = Lake.open(uri)
    round = scored_round(lake, options.round)
    before = active_generation(lake, round)
    if options.activate and before and not options.policy and not options.overrides:
        named = options.activate if isinstance(options.activate, str) else before.of_round
        return _let_count(lake, round, named)
    if isinstance(options.activate, str):
        raise SettingsError(
            f"--activate {options.activate}: a generation is named where nothing is decided; leave --policy and "
            "--set away, or give --activate without a name"
        )
    policy, params = _asked(lake, round, options)
    with lake.lock("decide"):
        before = active_generation(lake, round)
        part = decide(
            lake,
            round,
            policy,
            params,
            activate=bool(options.activate) or before is None,
            on_stale=options.on_stale or "error",
        )
        after = active_generation(lake, round)
        write_catalog(lake)
    console.print(
        f"round {round}: {part.num_rows} texts decided, generation {part.name}", highlight=False
    )
    with connect(lake) as con:
        _print_comparison(con, round, part.name, before.generation if before else None)
    assert after is not None
    if after.generation == part.name:
        console.print(f"clean and the other views show {part.name} now", highlight=False)
    else:
        console.print(
            f"clean and the other views still show {after.generation}; --activate changes that, and "
            f"verdicts_of({round}, '{part.name}') reads this one",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def _let_count(lake: Any, round: int, named: str) -> int:
    """Let decisions that lie there already count."""
    from flows.terminal import console
    from storage import list_parts, part_manifest, write_catalog
    from storage.generations import generation_named, note_generation

    generation = generation_named(lake, round, named)
    (part,) = (ref for ref in list_parts(lake, "decisions", round) if ref.name == generation)
    policy = part_manifest(lake, part).basis.get("config", {}).get("policy", generation)
    with lake.lock("decide"):
        note_generation(lake, round, policy, generation, activate=True, of_round=False)
        write_catalog(lake)
    console.print(f"clean and the other views show {generation} now", highlight=False)
    return 0


def scored_round(lake: Any, wanted: int | None) -> int:
    """The round that is asked for, or the latest with scores. Raises MissingInput for one without."""
    from storage import list_parts

    scored = sorted({part.round for part in list_parts(lake, "scores") if part.round is not None})
    if wanted is None and scored:
        return scored[-1]
    if wanted is None or wanted not in scored:
        there = (
            f"there are scores of round {', '.join(map(str, scored))}"
            if scored
            else "no round has scores"
        )
        raise MissingInput(
            f"{'the lake' if wanted is None else f'round {wanted}'} of {lake.uri} has no scores to decide on "
            f"({there}); run `bootstrap score` first"
        )
    return wanted


def bare_values(overrides: list[str]) -> dict[str, Any]:
    """`--set NAME=VALUE` as parameters of a policy. Raises SettingsError for what is none."""
    import yaml

    values = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        name = name.removeprefix("decide.params.").removeprefix("decide.")
        if not equals or not name or "." in name:
            raise SettingsError(
                f"--set {text!r}: with --policy give a parameter of the policy, such as threshold=0.6; "
                "`bootstrap policies` lists them"
            )
        values[name] = yaml.safe_load(value)
    return values


def _asked(lake: Any, round: int, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Policy and parameters: those given, over the round's own where no policy is named."""
    from storage import rounds

    given = bare_values(options.overrides)
    if options.policy:
        return options.policy, given
    own = (rounds.settings_of(lake, round) or {}).get("decide", {})
    params = {"threshold": own.get("threshold"), **(own.get("params") or {})}
    return own.get("policy", "blip"), {k: v for k, v in params.items() if v is not None} | given


def _lake_of_config(options: argparse.Namespace) -> str:
    from flows.settings import load_settings

    return load_settings(options.preset).machine.lake


def _print_comparison(con: Any, round: int, generation: str, before: str | None) -> None:
    """Kept by source, and which texts have another fate than under the decisions that counted."""
    from flows.terminal import console, table

    rows = con.execute(
        "SELECT source, count(*), count(*) FILTER (kept), count(*) FILTER (kept) / count(*) "
        "FROM decisions WHERE round = ? AND generation = ? GROUP BY source ORDER BY source DESC",
        [round, generation],
    ).fetchall()
    shown = [(source, texts, kept, f"{share:.1%}") for source, texts, kept, share in rows]
    console.print(table(("source", "texts", "kept", "share"), shown))
    if before is None or before == generation:
        return
    gained, lost = con.execute(
        "SELECT count(*) FILTER (n.kept AND NOT o.kept), count(*) FILTER (o.kept AND NOT n.kept) "
        "FROM decisions n JOIN decisions o USING (caption_id) "
        "WHERE n.round = $round AND o.round = $round AND n.generation = $new AND o.generation = $old",
        {"round": round, "new": generation, "old": before},
    ).fetchall()[0]
    console.print(
        f"beside {before}: {gained} more texts are kept, {lost} no longer", highlight=False
    )
