"""What each policy of a comparison keeps of a round's texts: decided, counted, and written as a training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from flows.errors import MissingInput, SettingsError
from flows.session import Run
from flows.steps.decide import require_scores
from flows.steps.plans import clean_sql
from storage import build_trainset, connect, decide
from storage.errors import ConfigError
from storage.fingerprint import canonical
from storage.generations import active_generation
from storage.policy_file import Policy, read_policy

THRESHOLD = "threshold"

_DECIDED = """
SELECT source, count(*) AS texts, count(*) FILTER (kept) AS kept
FROM decisions WHERE round = ? AND generation = ? GROUP BY source
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTexts:
    """One policy's decisions on a round, as a training set."""

    policy: str
    params: str
    """As a JSON object."""
    label: str
    """Policy, and its parameters that are not the default, as the command takes them."""
    generation: str
    sql: str
    """Rows of the training set: kept web and synthetic texts, and the human pairs."""
    trained_on: str
    """Fingerprint of those rows."""
    num_web: int
    num_synthetic: int
    num_human: int
    dropped_web: int | None
    """Web texts left out; None when the policy uses none of them."""
    dropped_synthetic: int | None


def policy_texts(run: Run, asked: Sequence[str]) -> list[PolicyTexts]:
    """The texts of each policy, in order; the views go on following the round's own decisions.

    Raises:
        ConfigError: a policy or parameter is unknown, or a policy fails.
        SettingsError: a policy keeps nothing, or two are the same.
        MissingInput: some shard has not been scored in this round, or the round has not decided.
    """
    chosen = [(text, *_parsed(run, text)) for text in asked]
    named: dict[str, str] = {}
    for text, policy, params in chosen:
        generation = policy.generation(policy.params(params))
        if generation in named:
            raise SettingsError(
                f"compare.policies: {text!r} and {named[generation]!r} are the same policy with the same "
                "parameters; name it once"
            )
        named[generation] = text
    require_scores(run)
    if active_generation(run.lake, run.round) is None:
        # Else the first of the policies compared would be what `clean` and the retraining follow.
        raise MissingInput(
            f"round {run.round} of {run.lake.uri} has not decided yet; run `bootstrap decide` first"
        )
    return [_texts(run, text, policy, params) for text, policy, params in chosen]


def _parsed(run: Run, text: str) -> tuple[Policy, dict[str, Any]]:
    """Policy and parameters of NAME:PARAMETER=VALUE:..., with the round's own parameters where none are given."""
    name, *pairs = text.split(":")
    policy = read_policy(name)
    params = _rounds_own(run, name, policy)
    for pair in pairs:
        parameter, equals, value = pair.partition("=")
        if not equals or not parameter:
            raise SettingsError(
                f"compare.policies {text!r}: {pair!r} is no parameter; write it as blip:threshold=0.6"
            )
        params[parameter] = yaml.safe_load(value)
    return policy, params


def _rounds_own(run: Run, name: str, policy: Policy) -> dict[str, Any]:
    """The round's parameters for its own policy; its threshold also for one with a threshold on the same number."""
    own, settings = read_policy(run.settings.decide.policy), run.settings.decide
    given: Mapping[str, Any] = settings.given_params
    if name == settings.policy:
        return dict(given)
    alike = policy.needed_numbers({}) == own.needed_numbers({})
    if THRESHOLD in given and THRESHOLD in policy.params({}) and alike:
        return {THRESHOLD: given[THRESHOLD]}
    return {}


def _texts(run: Run, text: str, policy: Policy, params: Mapping[str, Any]) -> PolicyTexts:
    try:
        part = decide(
            run.lake,
            run.round,
            text.split(":")[0],
            params,
            activate=False,
            on_stale=run.on_stale,
            time_limit_s=run.settings.decide.time_limit_s,
        )
    except ConfigError as err:
        raise type(err)(f"compare.policies {text!r}: {err}") from err
    sql = clean_sql(run.round, part.name)
    with connect(run.lake) as connection:
        decided = {
            source: (texts, kept)
            for source, texts, kept in connection.execute(
                _DECIDED, [run.round, part.name]
            ).fetchall()
        }
        if not any(kept for _, kept in decided.values()):
            raise SettingsError(
                f"compare.policies {text!r}: it keeps none of the {part.num_rows} texts of round {run.round}, "
                "so that its arm would be the human pairs alone; loosen it, or look at the scores (SELECT source, "
                "median(itm_prob) FROM verdicts GROUP BY source)"
            )
        rows = dict(
            connection.execute(
                f"SELECT source, count(*) FROM (\n{sql}\n) GROUP BY source"
            ).fetchall()
        )
    trained_on = build_trainset(run.lake, sql, name=f"arm-{part.name}").fingerprint
    values, defaults = policy.params(params), policy.params({})
    changed = [(name, value) for name, value in values.items() if value != defaults[name]]
    dropped = {source: texts - kept if kept else None for source, (texts, kept) in decided.items()}
    return PolicyTexts(
        policy=policy.name,
        params=canonical(values),
        label=":".join([policy.name, *(f"{name}={value}" for name, value in changed)]),
        generation=part.name,
        sql=sql,
        trained_on=trained_on,
        num_web=rows.get("web", 0),
        num_synthetic=rows.get("synthetic", 0),
        num_human=rows.get("human", 0),
        dropped_web=dropped.get("web"),
        dropped_synthetic=dropped.get("synthetic"),
    )
