"""The gate's rules, held against what was measured: one finding for each, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from blip_core import Metric
from flows.gate_section import GateRule

Outcome = Literal["pass", "fail", "not measured"]
ASKED = {"at_least": "at least", "at_most": "at most"}
ENDS = {"value": "", "low": ", of the lower end", "high": ", of the upper end"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number of `metrics`, with its interval where it has one, and whose it is."""

    value: float
    low: float | None
    high: float | None
    model_id: str
    of: str
    """Whose it is, as a sentence names it: `round 1`, `champion 8bf96e8e`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a rule came to."""

    name: str
    rule: GateRule
    outcome: Outcome
    why: str
    figure: Figure | None = None
    reference: Figure | None = None
    compared: Metric | None = None

    @property
    def failed(self) -> bool:
        """Whether the figure is on the wrong side of the limit."""
        return self.outcome == "fail"

    @property
    def asks_person(self) -> bool:
        """Whether a person has to look: the rule failed and says so, or its figure is missing and that matters."""
        if self.outcome == "not measured":
            return self.rule.if_absent == "person"
        return self.failed and self.rule.if_failed == "person"

    @property
    def refuses(self) -> bool:
        """Whether the round is refused for it."""
        return self.failed and self.rule.if_failed == "refuse"

    def row(self, round: int) -> dict[str, Any]:
        """The finding as a row of `gate_rules`."""
        rule, compared = self.rule, self.compared
        return {
            "round": round,
            "rule": self.name,
            "dataset": rule.dataset,
            "metric": rule.metric,
            "model_id": self.figure.model_id if self.figure else None,
            "measured": self.figure.value if self.figure else None,
            "reference": self.reference.value if self.reference else None,
            "value": compared.value if compared else None,
            "low": compared.low if compared else None,
            "high": compared.high if compared else None,
            "limit": rule.limit,
            "direction": rule.direction,
            "against": rule.against,
            "outcome": self.outcome,
            "verdict_if_failed": rule.if_failed,
            "why": self.why,
        }


def hold(
    name: str,
    rule: GateRule,
    figure: Figure | None,
    reference: Figure | None,
    paired: Callable[[], Metric | None],
) -> Finding:
    """Hold one rule against its figure and what that is compared with.

    `paired` gives the difference from the same cases, None where there is none such; otherwise the interval of
    a difference is made from those of the two figures (`difference`).
    """
    if figure is None:
        return _absent(name, rule, f"{rule.metric} of dataset {rule.dataset} was not measured")
    if rule.against != "nothing" and reference is None:
        return _absent(name, rule, f"there is no {rule.metric} of {_whom(rule)} to compare with")
    compared = _compared(rule, figure, reference, paired)
    held = compared.value if rule.end == "value" else getattr(compared, rule.end)
    if held is None or not math.isfinite(held):
        missing = "number" if rule.end == "value" else "interval"
        return _absent(
            name, rule, f"{rule.metric} {figure.value:.4g} gives no {missing} to compare"
        )
    right = held >= rule.limit if rule.direction == "at_least" else held <= rule.limit
    return Finding(
        name=name,
        rule=rule,
        outcome="pass" if right else "fail",
        why=_sentence(rule, figure, reference, compared),
        figure=figure,
        reference=reference,
        compared=compared,
    )


def difference(figure: Figure, reference: Figure) -> Metric:
    """Figure minus reference; its interval from those of the two, as of unrelated cases.

    The method of variance estimates recovery (Zou and Donner 2008): the distances to the ends add like standard
    deviations. Of the same cases it is too wide, never too narrow for what depends on them alike.
    """
    value = figure.value - reference.value
    interval: tuple[float | None, float | None] = (None, None)
    ends = (figure.low, figure.high, reference.low, reference.high)
    if None not in ends:
        low, high, low_before, high_before = (float(end) for end in ends if end is not None)
        interval = (
            value - math.hypot(figure.value - low, high_before - reference.value),
            value + math.hypot(high - figure.value, reference.value - low_before),
        )
    return Metric("difference", value, 0, *interval)


def _compared(
    rule: GateRule,
    figure: Figure,
    reference: Figure | None,
    paired: Callable[[], Metric | None],
) -> Metric:
    if reference is None:
        return Metric("value", figure.value, 0, figure.low, figure.high)
    if rule.compare == "difference":
        return paired() or difference(figure, reference)
    ratio = figure.value / reference.value if reference.value else math.nan
    return Metric("ratio", ratio, 0)


def _absent(name: str, rule: GateRule, why: str) -> Finding:
    asks = "; a person is asked" if rule.if_absent == "person" else ""
    return Finding(name=name, rule=rule, outcome="not measured", why=f"{why}{asks}")


def _whom(rule: GateRule) -> str:
    return {"champion": "the champion"}.get(rule.against, "an earlier promoted round")


def _sentence(rule: GateRule, figure: Figure, reference: Figure | None, compared: Metric) -> str:
    limit = f"{ASKED[rule.direction]} {rule.limit:g}{ENDS[rule.end]}"
    between = (
        f" (95 % interval {compared.low:+.4f} to {compared.high:+.4f})"
        if compared.low is not None and compared.high is not None
        else ""
    )
    measured = f"{rule.metric} {figure.value:.4g} of {figure.of}"
    if reference is None:
        return f"{measured}{between}; asked for: {limit}"
    other = f"{reference.value:.4g} of {reference.of}"
    if rule.compare == "ratio":
        return f"{measured} is {compared.value:.3g} times the {other}; asked for: {limit}"
    return f"{measured} is {compared.value:+.4f}{between} from the {other}; asked for: {limit}"
