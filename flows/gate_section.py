"""The gate as data: a table of rules, each a figure, what it is held against, a limit, and what a failure means."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from flows.sections import Section

HEADLINE = "mean_recall"
"""The one figure that a round cannot be judged without."""


class GateRule(Section):
    """One rule. It passes when its figure, compared as said, is on the right side of the limit."""

    dataset: Literal["heldout", "captions", "canaries", "judge"]
    """Dataset of the figure in `metrics`: of the challenger (heldout), the captions or the filter of the round."""
    metric: str = Field(min_length=1)
    """Name of the figure in `metrics`."""
    against: Literal["champion", "best", "first", "last", "nothing"]
    """champion: the model that the round began with; best: of the promoted rounds the one with the largest
    figure; first: the first promoted round that has the figure (in a lake without one, the human captions);
    last: the last such round; nothing: the figure itself."""
    compare: Literal["difference", "ratio", "value"] = "difference"
    """Figure minus reference, figure over reference, or the figure itself (with against: nothing)."""
    end: Literal["value", "low", "high"] = "value"
    """What is held against the limit: the number, or an end of its 95 % interval."""
    direction: Literal["at_least", "at_most"] = "at_least"
    """Which side of the limit is right."""
    limit: float
    """The limit. `max_recall_drop` lowers it for rules on mean_recall against champion or best."""
    if_failed: Literal["refuse", "person"] = "person"
    """Whether a failure refuses the round, or asks a person."""
    if_absent: Literal["pass", "person"] = "pass"
    """Whether a round passes without the figure, or asks a person."""

    @property
    def is_headline(self) -> bool:
        """Whether this is about the mean recall of the challenger and an earlier champion."""
        of_models = self.against in ("champion", "best")
        return of_models and (self.dataset, self.metric) == ("heldout", HEADLINE)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.against == "nothing") != (self.compare == "value"):
            raise ValueError(
                f"against: {self.against} with compare: {self.compare}; a figure that is held against "
                "nothing is compared as value, every other as difference or ratio"
            )
        if self.compare == "ratio" and self.end != "value":
            raise ValueError(
                f"end: {self.end} of a ratio; only values and differences have intervals"
            )
        if self.against in ("champion", "best") and self.dataset != "heldout":
            raise ValueError(
                f"against: {self.against} with dataset {self.dataset}; only heldout figures are of a model "
                "that was champion; give first or last"
            )
        return self


def _captions(metric: str, against: str, limit: float, **more: str) -> dict[str, Any]:
    rule = {"dataset": "captions", "metric": metric, "against": against, "compare": "ratio"}
    return rule | {"limit": limit} | more


def _differs(dataset: str, metric: str, against: str, limit: float, **more: str) -> dict[str, Any]:
    rule = {"dataset": dataset, "metric": metric, "against": against, "compare": "difference"}
    return rule | {"limit": limit} | more


_RECALL = {"dataset": "heldout", "metric": HEADLINE, "against": "champion"}

DEFAULT_RULES: dict[str, dict[str, Any]] = {
    # The paired difference of mean recall: refused when all of its interval is below nothing lost; a person is
    # asked when more than a hundredth is lost and it may yet be chance, or when small losses have added up.
    "recall_clearly_worse": _RECALL | {"limit": 0.0, "end": "high", "if_failed": "refuse"},
    "recall_below_champion": _RECALL | {"limit": -0.01},
    "recall_below_best": _RECALL | {"against": "best", "limit": -0.02},
    # Collapse: what a captioner loses that feeds on its own texts. On the same images in every round.
    "distinct_share_first": _captions("distinct_share", "first", 0.5, if_failed="refuse"),
    "distinct_share_last": _captions("distinct_share", "last", 0.7),
    "distinct_2_first": _captions("distinct_2", "first", 0.3, if_failed="refuse"),
    "distinct_2_last": _captions("distinct_2", "last", 0.7),
    "vocabulary_first": _captions("vocabulary", "first", 0.3),
    "vocabulary_last": _captions("vocabulary", "last", 0.7),
    "length_short": _captions("length_mean", "first", 0.5),
    "length_long": _captions("length_mean", "first", 2.0, direction="at_most"),
    "length_last": _captions("length_mean", "last", 0.7),
    "self_bleu_first": _differs("captions", "self_bleu", "first", 0.25, direction="at_most"),
    "self_bleu_last": _differs("captions", "self_bleu", "last", 0.15, direction="at_most"),
    "logprob_first": _captions("mean_logprob", "first", 0.25),
    "logprob_last": _captions("mean_logprob", "last", 0.4),
    # What the round's filter says of the round's captions.
    "matched_share_first": _captions("matched_share", "first", 0.5, if_failed="refuse"),
    "matched_share_last": _captions("matched_share", "last", 0.5, if_failed="refuse"),
    "matched_share_least": _captions("matched_share", "nothing", 0.1, compare="value"),
    # The filter on pairs whose truth is known: clearly worse than before.
    "filter_precision_first": _differs(
        "canaries", "filter_precision", "first", -0.05, end="high", if_failed="refuse"
    ),
    "filter_precision_last": _differs("canaries", "filter_precision", "last", -0.05, end="high"),
    "filter_recall_first": _differs(
        "canaries", "filter_recall", "first", -0.1, end="high", if_failed="refuse"
    ),
    "filter_recall_last": _differs("canaries", "filter_recall", "last", -0.1, end="high"),
    # What people say of the captions that the round's captioner writes for canary images.
    "contradicted_first": _differs(
        "canaries", "written_contradicted", "first", 0.15, direction="at_most", if_failed="refuse"
    ),
    "contradicted_last": _differs(
        "canaries", "written_contradicted", "last", 0.1, direction="at_most"
    ),
    # A scorer outside the loop: when the two part, the loop is flattering itself.
    "judge_agreement_first": _differs("judge", "judge_agreement", "first", -0.1, end="high"),
    "judge_agreement_last": _differs("judge", "judge_agreement", "last", -0.1, end="high"),
    "judge_agreement_least": _differs(
        "judge", "judge_agreement", "nothing", 0.6, compare="value", end="high"
    ),
    "judge_kept_first": _differs("judge", "judge_kept_itm_prob", "first", -0.1, end="high"),
    "judge_kept_last": _differs("judge", "judge_kept_itm_prob", "last", -0.1, end="high"),
    "judge_synthetic_first": _differs(
        "judge", "judge_synthetic", "first", -0.2, end="high", if_failed="refuse"
    ),
    "judge_synthetic_last": _differs("judge", "judge_synthetic", "last", -0.1, end="high"),
}
"""The rules that hold unless the settings change them; docs/rounds.md says why each limit is what it is."""


class GateSettings(Section):
    """When a challenger becomes the champion."""

    max_recall_drop: float = Field(default=0.0, ge=0, le=1)
    """How far the challenger's mean recall may lie below the champion's."""
    panel_images: int = Field(default=1000, ge=100)
    """Images whose captions are compared from round to round, the same ones in every round."""
    rules: dict[str, GateRule | None] = Field(default={}, validate_default=True)
    """Rules by name, laid over the built-in ones field by field; null takes one away. See docs/rounds.md."""

    @model_validator(mode="before")
    @classmethod
    def _over_the_built_in(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("rules", {}), Mapping):
            return given
        rules: dict[str, Any] = dict(DEFAULT_RULES)
        for name, rule in given.get("rules", {}).items():
            if rule is None and name not in rules:
                known = get_close_matches(str(name), list(rules), n=1) or sorted(rules)
                raise ValueError(f"rules.{name}: no such rule to take away; there is {known[0]}")
            over = isinstance(rule, Mapping) and isinstance(rules.get(name), Mapping)
            rules[name] = {**rules[name], **rule} if over else rule
        return {**given, "rules": rules}

    @property
    def table(self) -> dict[str, GateRule]:
        """The rules that hold, with `max_recall_drop` taken from their limits."""
        held: dict[str, GateRule] = {}
        for name, rule in self.rules.items():
            if rule is not None and rule.is_headline:
                held[name] = rule.model_copy(update={"limit": rule.limit - self.max_recall_drop})
            elif rule is not None:
                held[name] = rule
        return held


def gate_basis(settings: GateSettings) -> dict[str, Any]:
    """What a round's verdict depends on; what is as it was built in is left out, as in older lakes."""
    dumped: dict[str, Any] = settings.model_dump(mode="json")
    built_in = GateSettings().model_dump(mode="json")
    changed = {
        name: rule
        for name, rule in dumped["rules"].items()
        if name not in built_in["rules"] or rule != built_in["rules"][name]
    }
    basis = {"max_recall_drop": dumped["max_recall_drop"]}
    if changed:
        basis["rules"] = changed
    if dumped["panel_images"] != built_in["panel_images"]:
        basis["panel_images"] = dumped["panel_images"]
    return basis
