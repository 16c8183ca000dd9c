"""What the filter and the models really did, against the world's known truth.

The pipeline never sees any of this: only here are its decisions compared with what the pictures show.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import duckdb
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from blip_core.rates import Rate
from flows.quickstart.scenes import caption_is_true
from flows.quickstart.world import World

NOISE_LABELS = {
    "other_picture": "another picture's text",
    "boilerplate": "boilerplate",
    "one_word": "one word swapped",
}

ARM_METRICS = {
    "caption_truth": "captions true of the picture",
    "mean_recall": "mean recall",
    "i2t_r1": "image to text, R@1",
    "t2i_r1": "text to image, R@1",
    "itm_auc_random": "ITM AUC, random negatives",
    "itm_auc_hard": "ITM AUC, hard negatives",
    "itm_auc_swapped": "ITM AUC, one word swapped",
    "cider": "CIDEr",
    "bleu4": "BLEU-4",
}
"""The rows of the raw-versus-clean table, in order; a metric that was not measured has no row."""

_DECIDED = """
SELECT d.source, d.kept, c.image_id, c.caption, p.url, p.source_name
FROM decisions d
JOIN captions c ON c.caption_id = d.caption_id AND c.status = 'ok'
    AND c.round = CASE WHEN d.source = 'web' THEN 0 ELSE d.round END
JOIN (SELECT image_id, min(url) AS url, min(source_name) AS source_name FROM pairs
      WHERE pool = 'web' AND status = 'ok' GROUP BY image_id) p ON p.image_id = c.image_id
WHERE d.round = ? AND coalesce(d.generation, d.policy) = ?
ORDER BY d.caption_id
"""

_ARMS = """
SELECT metric,
    max(value) FILTER (model_id = $raw) AS raw,
    max(value) FILTER (model_id = $clean) AS clean
FROM metrics WHERE dataset = $dataset AND model_id IN ($raw, $clean)
GROUP BY metric
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Texts of one group by truth and fate."""

    group: str
    wrong_dropped: int
    wrong_kept: int
    true_dropped: int
    true_kept: int

    @property
    def num_texts(self) -> int:
        """All texts of the group."""
        return self.wrong_dropped + self.wrong_kept + self.true_dropped + self.true_kept

    @property
    def drop_precision(self) -> Rate:
        """Share of the dropped texts that were wrong."""
        return Rate(hits=self.wrong_dropped, n=self.wrong_dropped + self.true_dropped)

    @property
    def drop_recall(self) -> Rate:
        """Share of the wrong texts that were dropped."""
        return Rate(hits=self.wrong_dropped, n=self.wrong_dropped + self.wrong_kept)

    @property
    def true_before(self) -> Rate:
        """Share of true texts before filtering."""
        return Rate(hits=self.true_dropped + self.true_kept, n=self.num_texts)

    @property
    def true_after(self) -> Rate:
        """Share of true texts among those kept."""
        return Rate(hits=self.true_kept, n=self.true_kept + self.wrong_kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What filtering did in one round, by the truth."""

    round: int
    web: Outcome
    synthetic: Outcome
    by_source: tuple[Outcome, ...]
    """Web texts by source_name."""
    by_noise: tuple[Outcome, ...]
    """Wrong web texts by the kind of wrong they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmRow:
    """One metric of the two arms."""

    metric: str
    label: str
    raw: float | None
    clean: float | None

    @property
    def gain(self) -> float | None:
        """Clean minus raw; every metric here is better when higher."""
        return None if self.raw is None or self.clean is None else self.clean - self.raw


@dataclass(frozen=True, slots=True)
class _Judged:
    source: str
    source_name: str
    noise_kind: str
    is_true: bool
    kept: bool


def judge_round(
    connection: duckdb.DuckDBPyConnection, world: World, round: int, generation: str = "blip"
) -> Verdict:
    """Compare every decision of a generation with the truth. Reads views decisions, captions, pairs."""
    scenes = world.scenes()
    # A duplicate row repeats its original, so either may name the kind.
    noise_kinds = {row["url"]: row["noise_kind"] for row in world.truth().to_pylist()}
    judged = [
        _Judged(
            source=source,
            source_name=source_name,
            noise_kind=noise_kinds.get(url, ""),
            is_true=caption_is_true(caption, scenes[image_id]),
            kept=kept,
        )
        for source, kept, image_id, caption, url, source_name in connection.execute(
            _DECIDED, [round, generation]
        ).fetchall()
    ]
    web = [text for text in judged if text.source == "web"]
    wrong = [text for text in web if not text.is_true]
    return Verdict(
        round=round,
        web=_outcome("web", web),
        synthetic=_outcome("synthetic", (text for text in judged if text.source == "synthetic")),
        by_source=_by(web, lambda text: text.source_name),
        by_noise=_by(wrong, lambda text: text.noise_kind),
    )


def noise_truth(verdict: Verdict) -> dict[str, float]:
    """The true values of what an audit estimates, under the names of its metrics."""
    truth: dict[str, float] = {}
    hits = {"before": [0, 0], "left": [0, 0]}
    for name, outcome in (("web", verdict.web), ("synthetic", verdict.synthetic)):
        for when, rate in (("before", outcome.true_before), ("left", outcome.true_after)):
            hits[when][0] += rate.n - rate.hits
            hits[when][1] += rate.n
            if rate.n:
                truth[f"noise_{when}_{name}"] = 1 - rate.value
    return truth | {f"noise_{when}": wrong / n for when, (wrong, n) in hits.items() if n}


def captions_true(captions: Iterable[tuple[str, str]], world: World) -> list[bool]:
    """Which (image_id, caption) are true of their picture, in order. KeyError for unknown images."""
    scenes = world.scenes()
    return [caption_is_true(caption, scenes[image_id]) for image_id, caption in captions]


def compare_arms(
    connection: duckdb.DuckDBPyConnection,
    raw_model_id: str,
    clean_model_id: str,
    dataset: str = "heldout",
) -> tuple[ArmRow, ...]:
    """Metrics of the model trained on raw texts beside those of the one trained on clean texts."""
    arms = {"raw": raw_model_id, "clean": clean_model_id, "dataset": dataset}
    found = {row[0]: row[1:] for row in connection.execute(_ARMS, arms).fetchall()}
    return tuple(
        ArmRow(metric=metric, label=label, raw=found[metric][0], clean=found[metric][1])
        for metric, label in ARM_METRICS.items()
        if metric in found
    )


def render_verdict(verdict: Verdict, arms: Iterable[ArmRow] = ()) -> RenderableType:
    """The verdict as it is printed at the end of the quickstart."""
    blocks: list[RenderableType] = [
        _headline(verdict),
        _source_table(verdict),
        _noise_table(verdict),
    ]
    if rows := tuple(arms):
        blocks.append(_arm_table(rows))
    return Group(*(piece for block in blocks for piece in (block, Text())))


def _outcome(group: str, texts: Iterable[_Judged]) -> Outcome:
    fates = [(text.is_true, text.kept) for text in texts]
    return Outcome(
        group=group,
        wrong_dropped=fates.count((False, False)),
        wrong_kept=fates.count((False, True)),
        true_dropped=fates.count((True, False)),
        true_kept=fates.count((True, True)),
    )


def _by(texts: list[_Judged], group_of: Callable[[_Judged], str]) -> tuple[Outcome, ...]:
    groups = sorted({group_of(text) for text in texts})
    return tuple(
        _outcome(group, (text for text in texts if group_of(text) == group)) for group in groups
    )


def _percent(rate: Rate) -> str:
    return f"{rate.value:.1%}" if rate.n else "-"


def _headline(verdict: Verdict) -> Text:
    web, synthetic = verdict.web, verdict.synthetic
    return Text.from_markup(
        f"The filter dropped [bold]{_percent(web.drop_recall)}[/] of the wrong web texts; "
        f"{_percent(web.drop_precision)} of what it dropped was wrong.\n"
        f"True web texts: {_percent(web.true_before)} before, "
        f"[bold]{_percent(web.true_after)}[/] after. True synthetic captions: "
        f"{_percent(synthetic.true_before)} before, [bold]{_percent(synthetic.true_after)}[/] after."
    )


def _source_table(verdict: Verdict) -> Table:
    table = Table(title="Filtering against the known truth", title_justify="left")
    table.add_column("texts")
    for heading in ("number", "true before", "true after", "drop precision", "drop recall"):
        table.add_column(heading, justify="right")
    groups = [(f"web: {group.group}", group) for group in verdict.by_source]
    for label, group in (*groups, ("web, all", verdict.web), ("synthetic", verdict.synthetic)):
        rates = (group.true_before, group.true_after, group.drop_precision, group.drop_recall)
        table.add_row(label, f"{group.num_texts:,}", *(_percent(rate) for rate in rates))
    return table


def _noise_table(verdict: Verdict) -> Table:
    table = Table(title="Wrong web texts by kind", title_justify="left")
    table.add_column("kind")
    for heading in ("number", "dropped"):
        table.add_column(heading, justify="right")
    for group in verdict.by_noise:
        label = NOISE_LABELS.get(group.group, group.group)
        table.add_row(label, f"{group.num_texts:,}", _percent(group.drop_recall))
    return table


def _arm_table(arms: Iterable[ArmRow]) -> Table:
    title = "Same model, same steps: trained on raw texts or on the clean set"
    table = Table(title=title, title_justify="left")
    table.add_column("on held-out pictures")
    for heading in ("raw", "clean", "gain"):
        table.add_column(heading, justify="right")
    for arm in arms:
        gain = "-" if arm.gain is None else f"{arm.gain:+.3f}"
        style = "green" if arm.gain and arm.gain > 0 else ""
        table.add_row(arm.label, _number(arm.raw), _number(arm.clean), Text(gain, style=style))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
