"""Facts of a round, asked of the lake's views."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from flows.report import queries
from flows.report.asking import ReadImage, ask
from flows.report.audit_facts import gather_audit
from flows.report.facts import (
    Arms,
    Comparison,
    Curve,
    Finetuned,
    FunnelStep,
    Histogram,
    Loss,
    Measured,
    ModelFacts,
    NoiseRow,
    ReportFacts,
    RoundFacts,
    SourceCount,
)
from flows.report.gallery import gather_gallery
from flows.report.round_facts import gather_neighbours

NUM_BINS = 20
MAX_LOSSES = 12


def gather_facts(
    connection: duckdb.DuckDBPyConnection,
    round: int,
    read_image: ReadImage,
    *,
    lake: str,
    gallery_pairs: int = 12,
) -> ReportFacts:
    """Everything that the page of a round says. Reads the raw tables, and the views of SQL for people.

    Raises:
        LookupError: the round has no record.
    """
    record = _round(connection, round)
    policy, generation, threshold = _policy(connection, record, round)
    about = {"round": round, "generation": generation}
    models = _models(connection, record)
    arms = _arms(connection, record, models)
    drawn = [m.model_id for m in models if m.round == round]
    drawn += [arms.before_id] if arms else []
    drawn += [m.model_id for m in models if m.round == 0 and round == 1]
    return ReportFacts(
        lake=lake,
        round=record,
        policy=policy,
        threshold=threshold,
        funnel=_funnel(connection, about),
        noise=tuple(NoiseRow(**row) for row in ask(connection, queries.NOISE, about)),
        arms=arms,
        finetuned=_finetuned(connection, round, models),
        curves=_curves(connection, round, drawn),
        histograms=_histograms(connection, about),
        gallery=gather_gallery(connection, about, read_image, gallery_pairs),
        models=models,
        audit=gather_audit(connection, round),
        neighbours=gather_neighbours(connection, round),
    )


def _round(connection: duckdb.DuckDBPyConnection, round: int) -> RoundFacts:
    rows = ask(connection, "SELECT * FROM rounds WHERE round = $round", {"round": round})
    if not rows:
        raise LookupError(f"round {round} has no record in this lake; see `bootstrap sql`: rounds")
    row = rows[0]
    return RoundFacts(
        round=round,
        status=row["status"],
        why=row["why"] or "",
        champion_before=row["champion_before"],
        champion_after=row["champion_after"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        seconds=json.loads(row["seconds"]),
        settings=json.loads(row["settings"]),
    )


def _policy(
    connection: duckdb.DuckDBPyConnection, record: RoundFacts, round: int
) -> tuple[str, str, float | None]:
    """The policy that the round decided by, the generation, and its threshold, where it has one.

    Others may lie beside it, made by hand; the round's settings tell which is its own.
    """
    found = ask(connection, queries.POLICY, {"round": round})
    decide = record.settings.get("decide", {})
    wanted = Path(decide.get("policy", "blip")).stem
    params = {"threshold": decide.get("threshold"), **(decide.get("params") or {})}
    own = {name: value for name, value in params.items() if value is not None}
    found.sort(key=lambda row: (row["policy"] != wanted, json.loads(row["params"]) != own))
    if not found:
        return wanted, wanted, None
    threshold = json.loads(found[0]["params"]).get("threshold")
    return found[0]["policy"], found[0]["generation"], threshold


def _funnel(
    connection: duckdb.DuckDBPyConnection, about: Mapping[str, Any]
) -> tuple[FunnelStep, ...]:
    pairs = ask(connection, queries.PAIR_OUTCOMES, about)
    texts = ask(connection, queries.TEXT_COUNTS, about)
    failed = ask(connection, queries.FAILED_CAPTIONS, about)
    dropped = ask(connection, queries.DROP_REASONS, about)
    lost = [Loss(reason=_plain(r["status"]), rows=r["rows"]) for r in pairs if r["status"] != "ok"]
    stored = sum(row["rows"] for row in pairs if row["status"] == "ok")
    unscored = [Loss(reason=r["why"], rows=r["rows"]) for r in dropped if r["unscored"]]
    refused = [Loss(reason=r["why"], rows=r["rows"]) for r in dropped if not r["unscored"]]

    def counts(stage: str) -> tuple[SourceCount, ...]:
        return tuple(SourceCount(source=row["source"], rows=row[stage]) for row in texts)

    listed = (SourceCount(source="web", rows=sum(row["rows"] for row in pairs)),)
    return (
        FunnelStep(
            label="Rows of the URL lists", unit="rows", counts=listed, losses=_longest(lost)
        ),
        FunnelStep(
            label="Pictures stored",
            unit="pictures",
            counts=(SourceCount(source="web", rows=stored),),
            losses=_longest([Loss(**row) for row in failed]),
        ),
        FunnelStep(
            label="Texts proposed for them",
            unit="texts",
            counts=counts("proposed"),
            losses=_longest(unscored),
        ),
        FunnelStep(
            label="Scored by the filter",
            unit="texts",
            counts=counts("scored"),
            losses=_longest(refused),
        ),
        FunnelStep(label="Kept: the clean set", unit="texts", counts=counts("kept")),
    )


def _longest(losses: list[Loss]) -> tuple[Loss, ...]:
    """The largest losses by name, the rest as one."""
    if len(losses) <= MAX_LOSSES:
        return tuple(losses)
    rest = losses[MAX_LOSSES - 1 :]
    named = Loss(reason=f"{len(rest)} other reasons", rows=sum(loss.rows for loss in rest))
    return (*losses[: MAX_LOSSES - 1], named)


def _plain(status: str) -> str:
    """A status as words: http_4xx becomes HTTP 4xx, not_an_image becomes not an image."""
    words = status.replace("_", " ")
    return words.replace("http ", "HTTP ")


def _histograms(
    connection: duckdb.DuckDBPyConnection, about: Mapping[str, Any]
) -> tuple[Histogram, ...]:
    bins: dict[str, list[tuple[int, int]]] = {}
    for row in ask(connection, queries.HISTOGRAM, about):
        counts = bins.setdefault(row["source"], [(0, 0)] * NUM_BINS)
        counts[row["bin"]] = (row["kept"], row["dropped"])
    return tuple(
        Histogram(
            source=source,
            kept=tuple(kept for kept, _ in bins[source]),
            dropped=tuple(dropped for _, dropped in bins[source]),
        )
        for source in ("web", "synthetic")
        if source in bins
    )


def _models(connection: duckdb.DuckDBPyConnection, record: RoundFacts) -> tuple[ModelFacts, ...]:
    about = {"round": record.round, "champion": record.champion_before}
    rows = ask(connection, queries.MODELS, about)
    names = list(ModelFacts.__dataclass_fields__)
    return tuple(ModelFacts(**{name: row[name] for name in names}) for row in rows)


def _arms(
    connection: duckdb.DuckDBPyConnection, record: RoundFacts, models: tuple[ModelFacts, ...]
) -> Arms | None:
    """The round's new model beside what it has to beat; None when there is no new model."""
    whole = [model for model in models if model.role == "med"]
    after = next((m for m in reversed(whole) if m.round == record.round), None)
    earlier = [model for model in whole if model.round < record.round]
    before = next((m for m in earlier if m.model_id == record.champion_before), None)
    before = before or (earlier[-1] if earlier else None)
    if after is None or before is None:
        return None
    found: dict[str, dict[str, dict[str, Measured]]] = {}
    ids = {"models": [before.model_id, after.model_id]}
    for row in ask(connection, queries.MEASURED, ids):
        metrics = found.setdefault(row["dataset"], {})
        metrics.setdefault(row["metric"], {})[row["model_id"]] = _figure(row)
    if not found:
        return None
    dataset = max(found, key=lambda name: len(found[name]))
    return Arms(
        before_label="raw texts" if before.round == 0 else f"round {before.round}",
        before_id=before.model_id,
        after_label="clean set" if before.round == 0 else f"round {after.round}",
        after_id=after.model_id,
        dataset=dataset,
        rows=tuple(
            Comparison(metric=metric, before=by.get(before.model_id), after=by.get(after.model_id))
            for metric, by in found[dataset].items()
        ),
    )


def _finetuned(
    connection: duckdb.DuckDBPyConnection, round: int, models: tuple[ModelFacts, ...]
) -> tuple[Finetuned, ...]:
    roles = {model.model_id: model.role for model in models if model.role != "med"}
    return tuple(
        Finetuned(metric=row["metric"], role=roles[row["model_id"]], figure=_figure(row))
        for row in ask(connection, queries.FINETUNED, {"round": round})
        if row["model_id"] in roles
    )


def _figure(row: Mapping[str, Any]) -> Measured:
    return Measured(value=row["value"], low=row["low"], high=row["high"], n=row["n"])


def _curves(
    connection: duckdb.DuckDBPyConnection, round: int, models: list[str]
) -> tuple[Curve, ...]:
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in ask(connection, queries.CURVES, {"round": round, "models": models}):
        points.setdefault((row["run"], row["metric"]), []).append((row["step"], row["value"]))
    return tuple(
        Curve(run=run, metric=metric, points=tuple(values))
        for (run, metric), values in points.items()
    )
