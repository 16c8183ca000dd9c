"""Whether the audit's intervals hold the truth: noise before and after filtering, in worlds whose truth is known.

    python benchmarks/audit.py [--quick] [--json PATH] [--lake LAKE --world FOLDER]

Simulated: scores of each kind of pair come from a beta distribution, a filter of three qualities; N canaries of each
kind are drawn, and a stream of 5,000 texts of a known mixture; the share of the 95 % intervals that hold the true share
of wrong texts, over repeats, is reported with their mean width. A repeat redraws everything.

With --lake, a lake of the quickstart: its own canaries and texts, whose truth its world knows; a repeat takes half of the
canary images and a third of the texts at random. There the assumptions of the estimate are not given but tried.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from blip_core.noise import Noise, NoiseModel, counted, score_ranges, share_of_draws
from blip_core.rates import Rate
from flows.audit.planting import WRITTEN
from flows.quickstart.scenes import caption_is_true
from flows.quickstart.world import load_world
from flows.steps.audit import CanaryScores, noise_draws, noise_model
from storage import Lake, connect

KINDS = ("true", "random", "hard", "swapped")
FILTERS = {
    "sharp": ((20, 1), (1, 20), (1, 4), (1.5, 3)),
    "blurry": ((4, 1.5), (1, 5), (1.5, 3), (2, 2)),
    "blind to swaps": ((8, 1), (1, 12), (1, 4), (7, 1.2)),
}
"""Parameters of the beta distribution of the scores of each of KINDS."""
MIXTURES = ((0.6, 0.3, 0.05, 0.05), (0.9, 0.1, 0.0, 0.0), (0.6, 0.2, 0.0, 0.2))
NUM_TEXTS = 5000
CUT = 0.5
NOMINAL = 0.9
"""Share of the intervals that must hold the truth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """One audit against its truth."""

    noise: Noise
    before: float
    left: float

    def holds(self) -> tuple[bool, bool]:
        """Whether the intervals hold the truth, before and after filtering."""
        assert self.noise.left is not None, "nothing was kept"
        return (
            self.noise.before.low <= self.before <= self.noise.before.high,
            self.noise.left.low <= self.left <= self.noise.left.high,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Coverage in one setting."""

    name: str
    repeats: int
    covered_before: float
    covered_left: float
    width_before: float
    width_left: float
    true_before: float
    true_left: float
    error_left: float
    """Mean of estimate minus truth."""


def audit(canaries: dict[str, np.ndarray], scores: np.ndarray, wrong: np.ndarray) -> Repeat:
    """Audit texts (N,) kept from CUT on, by canaries."""
    edges = score_ranges(np.concatenate(list(canaries.values())), [CUT])
    kept = scores >= CUT
    noise = NoiseModel(canaries, edges).estimate(
        counted(scores, edges), counted(scores[kept], edges)
    )
    return Repeat(noise=noise, before=float(wrong.mean()), left=float(wrong[kept].mean()))


def simulated(
    quality: str, num_canaries: int, mixture: tuple[float, ...], repeats: int
) -> Iterator[Repeat]:
    """Repeats in a world where the assumptions are given."""
    shapes = FILTERS[quality]
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        canaries = {
            kind: rng.beta(*shape, size=num_canaries)
            for kind, shape in zip(KINDS, shapes, strict=True)
        }
        kinds = rng.choice(len(KINDS), size=NUM_TEXTS, p=mixture)
        scores = np.array([shapes[kind] for kind in kinds])
        yield audit(canaries, rng.beta(scores[:, 0], scores[:, 1]), kinds > 0)


def resampled(lake: Path, world_folder: Path, source: str, repeats: int) -> Iterator[Repeat]:
    """Repeats on the canaries and the texts of a real round of the quickstart, as the audit estimates them."""
    scenes = load_world(world_folder).scenes()
    with connect(Lake.open(str(lake), read_only=True)) as con:
        planted = con.execute(
            "SELECT image_id, kind, itm_prob, contradicted FROM canaries WHERE round = 1 ORDER BY caption_id"
        ).fetchall()
        texts = con.execute(
            "SELECT image_id, caption, itm_prob FROM verdicts "
            "WHERE round = 1 AND source = ? AND itm_prob IS NOT NULL ORDER BY caption_id",
            [source],
        ).fetchall()
    images = sorted({row[0] for row in planted})
    scores = np.array([row[2] for row in texts])
    wrong = np.array([not caption_is_true(text, scenes[image]) for image, text, _ in texts])
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        half = set(rng.choice(images, size=len(images) // 2, replace=False))
        canaries = scores_of([row[1:] for row in planted if row[0] in half])
        some = rng.choice(len(texts), size=len(texts) // 3, replace=False)
        yield audited(canaries, source, scores[some], wrong[some])


def scores_of(planted: list[tuple[str, float, bool | None]]) -> CanaryScores:
    """(kind, itm_prob, contradicted) of canaries as the audit takes them."""
    written = [row for row in planted if row[0] == WRITTEN]
    asked = [bool(row[2]) for row in planted if row[0] == "true" and row[2] is not None]
    return CanaryScores(
        number="itm_prob",
        of_kind={kind: np.array([row[1] for row in planted if row[0] == kind]) for kind in KINDS},
        of_stratum={},
        written=np.array([row[1] for row in written]),
        is_contradicted=np.array([row[2] for row in written], dtype=bool),
        people_contradicted=Rate(hits=sum(asked), n=len(asked)),
    )


def audited(canaries: CanaryScores, source: str, scores: np.ndarray, wrong: np.ndarray) -> Repeat:
    """Audit texts (N,) of a source kept from CUT on, as a round does."""
    model, kept = noise_model(canaries, CUT), scores >= CUT
    before, left = noise_draws(
        canaries,
        source,
        model,
        counted(scores, model.edges),
        counted(scores[kept], model.edges),
        CUT,
    )
    assert left is not None, "nothing was kept"
    noise = Noise(
        before=share_of_draws(before, len(scores)), left=share_of_draws(left, int(kept.sum()))
    )
    return Repeat(noise=noise, before=float(wrong.mean()), left=float(wrong[kept].mean()))


def line(name: str, repeats: list[Repeat]) -> Line:
    """Sum up the repeats of one setting."""
    held = np.array([repeat.holds() for repeat in repeats])
    shares = [(repeat.noise.before, repeat.noise.left) for repeat in repeats]
    widths = np.array([[share.high - share.low for share in pair if share] for pair in shares])
    error = [
        pair[1].value - repeat.left for pair, repeat in zip(shares, repeats, strict=True) if pair[1]
    ]
    return Line(
        name=name,
        repeats=len(repeats),
        covered_before=float(held[:, 0].mean()),
        covered_left=float(held[:, 1].mean()),
        width_before=float(widths[:, 0].mean()),
        width_left=float(widths[:, 1].mean()),
        true_before=float(np.mean([repeat.before for repeat in repeats])),
        true_left=float(np.mean([repeat.left for repeat in repeats])),
        error_left=float(np.mean(error)),
    )


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="20 repeats instead of 100")
    parser.add_argument("--json", type=Path, help="write the lines as a list")
    parser.add_argument("--lake", type=Path, help="a lake of the quickstart")
    parser.add_argument("--world", type=Path, default=Path("world"), help="its world")
    options = parser.parse_args()
    repeats = 20 if options.quick else 100
    print("| setting | true before | held | width | true left | held | width | error |")
    print("|---|---|---|---|---|---|---|---|")
    lines = []
    if options.lake:
        for source in ("web", "synthetic"):
            found = list(resampled(options.lake, options.world, source, repeats))
            lines.append(show(line(f"quickstart, {source}", found)))
    for quality in FILTERS:
        for num_canaries in (50, 100, 200):
            for mixture in MIXTURES:
                shares = " ".join(f"{share:.0%}" for share in mixture)
                name = f"{quality}, {num_canaries} canaries, {shares}"
                found = list(simulated(quality, num_canaries, mixture, repeats))
                lines.append(show(line(name, found)))
    good = sum(min(each.covered_before, each.covered_left) >= NOMINAL for each in lines)
    print(
        f"\n{good} of {len(lines)} settings hold the truth in {NOMINAL:.0%} of the repeats or more"
    )
    if options.json:
        options.json.write_text(
            json.dumps([asdict(each) for each in lines], indent=1) + "\n", encoding="utf-8"
        )


def show(found: Line) -> Line:
    """Print a line of the table."""
    print(
        f"| {found.name} | {found.true_before:.3f} | {found.covered_before:.0%} | {found.width_before:.3f} "
        f"| {found.true_left:.3f} | {found.covered_left:.0%} | {found.width_left:.3f} | {found.error_left:+.3f} |",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
