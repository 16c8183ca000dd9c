"""What each policy of a comparison keeps of a round's texts: decided, counted, and written as a training set.

The synthetic ones are the round's own captions, or those of another decoding (`flows/steps/variants.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import yaml

from flows.errors import MissingInput, SettingsError
from flows.session import Run
from flows.steps.decide import require_scores
from flows.steps.plans import clean_sql
from flows.steps.variants import require_variant
from storage import PartRef, build_trainset, connect, decide, decide_variant, layout
from storage.errors import ConfigError
from storage.fingerprint import canonical
from storage.generations import active_generation
from storage.policy import check_on_variant
from storage.policy_file import Policy, read_policy

THRESHOLD = "threshold"

_DECIDED = """
SELECT source, count(*) AS texts, count(*) FILTER (kept) AS kept
FROM {table} WHERE round = ? AND generation = ? GROUP BY source
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """A policy as it was asked for."""

    text: str
    policy: Policy
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name or path of the policy."""
        return self.text.split(":")[0]


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
    decoding: str | None
    """How the captions that it decided on were decoded; None where it keeps none of them, however they were."""


def policy_texts(
    run: Run, asked: Sequence[str], decodings: Sequence[str] = ()
) -> list[PolicyTexts]:
    """The texts of each policy, in order; the views go on following the round's own decisions.

    With decodings, a policy has texts for each of them, or once where it keeps no synthetic text and so the same of
    all.

    Raises:
        ConfigError: a policy or parameter is unknown, or a policy fails.
        SettingsError: a policy keeps nothing, or two are the same.
        MissingInput: some shard has not been scored in this round, has no captions of a decoding, or the round has
            not decided.
    """
    chosen = _chosen(run, asked)
    own = run.settings.caption.decoding
    variants = [None if each == own else each for each in decodings] or [None]
    for variant in filter(None, variants):
        require_variant(run, variant)
    return [texts for choice in chosen for texts in _of_policy(run, choice, variants)]


def check_variants(run: Run, asked: Sequence[str], variants: Sequence[str]) -> None:
    """Refuse, before captions of other decodings are written, policies that could not use them.

    Raises:
        ConfigError, MissingInput: as `policy_texts`; or a policy asks what only the round's own captions have.
        SettingsError: as `policy_texts`; or no policy keeps a synthetic text, so that the decoding changes nothing.
    """
    chosen = _chosen(run, asked)
    for choice in chosen if variants else ():
        for variant in variants:
            with _named(choice):
                check_on_variant(choice.policy, choice.policy.params(choice.params), variant)
    keeps = [_keeps_captions(run, choice) for choice in chosen if variants]
    if variants and not any(keeps):
        raise SettingsError(
            f"compare.decodings {', '.join(run.settings.compare.decodings)}: of the policies {', '.join(asked)} none "
            f"keeps a synthetic text of round {run.round}, so that the decoding changes nothing; add one that does, "
            "such as blip, or leave compare.decodings out"
        )


def _chosen(run: Run, asked: Sequence[str]) -> list[_Choice]:
    """The policies that are asked for, each once, on a round that can be decided on."""
    chosen = [_parsed(run, text) for text in asked]
    named: dict[str, str] = {}
    for choice in chosen:
        generation = choice.policy.generation(choice.policy.params(choice.params))
        if generation in named:
            raise SettingsError(
                f"compare.policies: {choice.text!r} and {named[generation]!r} are the same policy with the same "
                "parameters; name it once"
            )
        named[generation] = choice.text
    require_scores(run)
    if active_generation(run.lake, run.round) is None:
        # Else the first of the policies compared would be what `clean` and the retraining follow.
        raise MissingInput(
            f"round {run.round} of {run.lake.uri} has not decided yet; run `bootstrap decide` first"
        )
    return chosen


def _parsed(run: Run, text: str) -> _Choice:
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
    return _Choice(text=text, policy=policy, params=params)


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


def _of_policy(run: Run, choice: _Choice, variants: Sequence[str | None]) -> list[PolicyTexts]:
    """The texts of one policy for each variant, None being the round's own captions; one where none of them keeps a caption."""
    found = [_texts(run, choice, variant) for variant in variants]
    if any(texts.num_synthetic for texts in found):
        own = run.settings.caption.decoding
        pairs = zip(found, variants, strict=True)
        return [replace(texts, decoding=variant or own) for texts, variant in pairs]
    # The arm is named by the round's own decisions, whichever decodings are asked for, so that it is trained once.
    plain = found[variants.index(None)] if None in variants else _texts(run, choice, None)
    return list(
        dict.fromkeys(plain if texts.trained_on == plain.trained_on else texts for texts in found)
    )


def _texts(run: Run, choice: _Choice, variant: str | None) -> PolicyTexts:
    part, decided = _decided(run, choice, variant)
    sql = clean_sql(run.round, part.name, variant)
    with connect(run.lake) as connection:
        rows = dict(
            connection.execute(
                f"SELECT source, count(*) FROM (\n{sql}\n) GROUP BY source"
            ).fetchall()
        )
    trained_on = build_trainset(run.lake, sql, name=f"arm-{part.name}").fingerprint
    policy = choice.policy
    values, defaults = policy.params(choice.params), policy.params({})
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
        decoding=variant or (run.settings.caption.decoding if rows.get("synthetic") else None),
    )


def _decided(
    run: Run, choice: _Choice, variant: str | None
) -> tuple[PartRef, dict[str, tuple[int, int]]]:
    """The policy's decisions, and texts and kept ones by source. SettingsError when it keeps nothing."""
    limit_s = run.settings.decide.time_limit_s
    with _named(choice):
        part = (
            decide(
                run.lake,
                run.round,
                choice.name,
                choice.params,
                activate=False,
                on_stale=run.on_stale,
                time_limit_s=limit_s,
            )
            if variant is None
            else decide_variant(
                run.lake,
                run.round,
                variant,
                choice.name,
                choice.params,
                on_stale=run.on_stale,
                time_limit_s=limit_s,
            )
        )
    sql = _DECIDED.format(table=layout.variant_table("decisions", variant))
    with connect(run.lake) as connection:
        rows = connection.execute(sql, [run.round, part.name]).fetchall()
    if not any(kept for _, _, kept in rows):
        of = "" if variant is None else f" with captions of decoding {variant}"
        raise SettingsError(
            f"compare.policies {choice.text!r}: it keeps none of the {part.num_rows} texts of round {run.round}{of}, "
            "so that its arm would be the human pairs alone; loosen it, or look at the scores (SELECT source, "
            f"median(itm_prob) FROM {'verdicts' if variant is None else 'variant_verdicts'} GROUP BY source)"
        )
    return part, {source: (texts, kept) for source, texts, kept in rows}


def _keeps_captions(run: Run, choice: _Choice) -> bool:
    """Whether a policy keeps some of the round's own captions."""
    _, kept = _decided(run, choice, None)[1].get("synthetic", (0, 0))
    return kept > 0


@contextmanager
def _named(choice: _Choice) -> Iterator[None]:
    """Say of which policy an error of deciding is."""
    try:
        yield
    except ConfigError as err:
        raise type(err)(f"compare.policies {choice.text!r}: {err}") from err
