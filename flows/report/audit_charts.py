"""Charts of the audit: ROC, calibration, and the curve of a sweep."""

from collections.abc import Sequence

from markupsafe import Markup, escape

from blip_core.filter_figures import Bin
from flows.audit.sweep import SweepPoint
from flows.report.audit_facts import RocCurve
from flows.report.charts import Frame, Numbering, grid, svg

TICKS = [0.0, 0.25, 0.5, 0.75, 1.0]
UNIT = Frame(0.0, 1.0, 0.0, 1.0)


def roc_chart(numbers: Numbering, curves: Sequence[RocCurve]) -> Markup:
    """True pairs kept over mismatches kept, a line for each kind of mismatch."""
    parts = grid(UNIT, TICKS, TICKS, "mismatches kept", "true pairs kept")
    parts.append(_diagonal())
    for curve in curves:
        path = " ".join(f"{UNIT.x(x):.1f},{UNIT.y(y):.1f}" for x, y in curve.points)
        parts.append(
            f'<polyline class="line kind-{escape(curve.kind)}" points="{path}">'
            f"<title>{escape(curve.kind)}</title></polyline>"
        )
    at = "; ".join(f"{curve.kind}: {_kept_at(curve, 0.1):.0%} kept" for curve in curves)
    return svg(numbers, "ROC of the filter", f"With 10 % of the mismatches kept, {at}.", parts)


def calibration_chart(numbers: Numbering, bins: Sequence[Bin]) -> Markup:
    """Share of true canaries over itm_prob, with 95 % intervals; on the diagonal a filter says what is so."""
    parts = grid(UNIT, TICKS, TICKS, "itm_prob", "share that is true")
    parts.append(_diagonal())
    for each in bins:
        x = UNIT.x(each.mean_score)
        parts.append(
            f'<line class="whisker after" x1="{x:.1f}" x2="{x:.1f}" y1="{UNIT.y(each.low):.1f}" '
            f'y2="{UNIT.y(each.high):.1f}"/><circle class="dot after" cx="{x:.1f}" '
            f'cy="{UNIT.y(each.share_true):.1f}" r="4"><title>itm_prob {each.mean_score:.2f}: '
            f"{each.share_true:.0%} of {each.n} true</title></circle>"
        )
    said = "; ".join(f"at {each.mean_score:.2f} {each.share_true:.0%}" for each in bins)
    return svg(numbers, "Calibration of the filter", f"True among canaries: {said}.", parts)


def sweep_chart(numbers: Numbering, points: Sequence[SweepPoint]) -> Markup:
    """Kept share, and estimated share of noise among the kept, over the threshold; a pair of lines a source."""
    parts = grid(UNIT, TICKS, TICKS, "threshold", "share")
    said = []
    for source in dict.fromkeys(point.source for point in points):
        of = [point for point in points if point.source == source]
        kept = [(point.threshold, point.kept / point.texts) for point in of if point.texts]
        noise = [(point.threshold, point.noise.value) for point in of if point.noise is not None]
        for line, style in ((kept, f"sweep-{source}"), (noise, f"sweep-{source} noise-line")):
            path = " ".join(f"{UNIT.x(x):.1f},{UNIT.y(y):.1f}" for x, y in line)
            parts.append(f'<polyline class="line {style}" points="{path}"/>')
        said.append(
            f"{source}: from {kept[0][1]:.0%} to {kept[-1][1]:.0%} kept" if kept else source
        )
    parts.append(
        f'<line class="mark" id="threshold-mark" x1="{UNIT.x(0.5):.1f}" x2="{UNIT.x(0.5):.1f}" '
        f'y1="{UNIT.y(1):.1f}" y2="{UNIT.y(0):.1f}"/>'
    )
    return svg(numbers, "Kept and noise by threshold", "; ".join(said) + ".", parts)


def _diagonal() -> str:
    return (
        f'<line class="grid" x1="{UNIT.x(0):.1f}" y1="{UNIT.y(0):.1f}" x2="{UNIT.x(1):.1f}" '
        f'y2="{UNIT.y(1):.1f}"/>'
    )


def _kept_at(curve: RocCurve, wrong: float) -> float:
    return max((y for x, y in curve.points if x <= wrong), default=0.0)
