"""The gate on made-up figures: what it promotes, refuses and leaves to a person, and what it writes down."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.errors import MissingInput
from flows.session import Run
from flows.settings import parse_settings
from flows.steps.gate import Verdict, judge, write_findings
from storage import Lake, commit_part, query, registry, rounds
from storage.fingerprint import basis_of
from storage.tables import rows_table

NUM_IMAGES = 200
BASIS = basis_of("test", 1, {}, [])


class MadeUp:
    """A lake with round 1 promoted and round 2 to be judged; figures are given by the test."""

    def __init__(self, folder: Path) -> None:
        self.lake = Lake.open(str(folder / "lake"), create=True)
        self.models = [self._model(folder / str(number), number) for number in range(3)]
        self.writers = {
            number: registry.register_foreign(
                self.lake,
                f"{number}{'c' * 31}",
                role="foreign_captioner",
                round=number,
                reference="hf:x",
                config={},
            )
            for number in (1, 2)
        }
        registry.promote(self.lake, self.models[0].model_id, 0, "the first model")
        self.parts = 0
        for number in (1, 2):
            ids = {"model_id": f"{number}{'f' * 31}", "round": number, "status": "ok"}
            self.commit("scores", number, [{"caption_id": "x", "image_id": "x", **ids}])
            text = {"caption_id": "x", "image_id": "x", "source": "synthetic", "status": "ok"}
            writer = {"round": number, "model_id": self.writers[number].model_id}
            self.commit("captions", number, [text | writer])
        record = rounds.begin_round(self.lake, 1, {})
        champion = self.models[1].model_id
        ended = replace(record, status="promoted", champion_after=champion, decided_by="gate")
        rounds.write_round(self.lake, ended)
        registry.promote(self.lake, champion, 1, "better")
        rounds.begin_round(self.lake, 2, {}, champion)

    def _model(self, folder: Path, number: int) -> registry.ModelRef:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(f"weights {number}".encode())
        about = {"role": "med", "round": number, "parent_id": None, "trained_on": None}
        return registry.register(self.lake, folder, config={}, **about)

    def commit(self, table: str, round: int, rows: list[dict[str, Any]]) -> None:
        self.parts += 1
        name = f"{table}-{self.parts}"
        commit_part(self.lake, table, name, rows_table(table, rows), round=round, basis=BASIS)

    def recall(self, round: int, model: int, found: np.ndarray, *, ranks: bool = True) -> None:
        """Model `model` measured in `round`: the images and texts it `found` first, the rest last."""
        model_id = self.models[model].model_id
        about = {"round": round, "model_id": model_id, "dataset": "heldout"}
        value, spread = float(found.mean()), 1.96 * float(found.std()) / len(found) ** 0.5
        metric = {"metric": "mean_recall", "value": value, "n": len(found)}
        ends = {"low": value - spread, "high": value + spread}
        self.commit("metrics", round, [about | metric | ends])
        rows = [
            about
            | {
                "direction": direction,
                "image_id": f"{image:032x}",
                "caption_id": text,
                "rank": rank,
            }
            for image, rank in enumerate(np.where(found, 0, 50).tolist())
            for direction, text in (("i2t", None), ("t2i", f"{image:032x}"))
        ]
        if ranks:
            self.commit("ranks", round, rows)

    def figures(self, round: int, dataset: str, **values: Any) -> None:
        """Figures of a round's captions, canaries or judged texts; a triple has an interval."""
        maker = self.writers[round].model_id if dataset == "captions" else f"{round}{'f' * 31}"
        maker = "people" if dataset == "human-captions" else maker
        rows = []
        for name, value in values.items():
            number, low, high = value if isinstance(value, tuple) else (value, None, None)
            about = {"round": round, "model_id": maker, "dataset": dataset, "metric": name}
            rows.append(about | {"value": number, "low": low, "high": high, "n": 400})
        self.commit("metrics", round, rows)

    def run(self, round: int = 2, **gate: Any) -> Run:
        return Run(self.lake, parse_settings({"preset": None, "gate": gate}), round)

    def judge(self, round: int = 2, **gate: Any) -> Verdict:
        return judge(self.run(round, **gate), self.models[round - 1], self.models[round])


@pytest.fixture
def made_up(tmp_path: Path) -> MadeUp:
    return MadeUp(tmp_path)


def _found(share: float, shift: int = 0) -> np.ndarray:
    """Which of the images a model finds: a share of them, from another place on with `shift`."""
    found = np.arange(NUM_IMAGES) < round(share * NUM_IMAGES)
    return np.roll(found, shift)


def _outcomes(verdict: Verdict) -> dict[str, str]:
    return {finding.name: finding.outcome for finding in verdict.findings}


@pytest.mark.parametrize(
    ("before", "after", "status", "rule"),
    [
        (_found(0.5), _found(0.8), "promoted", None),
        (_found(0.5), _found(0.5), "promoted", None),
        # 6 of 200 images lost and 5 won: half a hundredth below, which is nothing.
        (_found(0.5), _found(0.495, shift=5), "promoted", None),
        # 50 lost and 44 won: three hundredths below, and chance may do that.
        (_found(0.5), _found(0.47, shift=50), "needs a person", "recall_below_champion"),
        # 10 lost and none won: five hundredths below, and on the same images that is no chance.
        (_found(0.5), _found(0.45), "refused", "recall_clearly_worse"),
    ],
    ids=["clear gain", "the same", "noise", "below, perhaps by chance", "clearly worse"],
)
def test_recall_of_the_challenger_decides_as_far_as_it_can_be_told(
    made_up: MadeUp, before: np.ndarray, after: np.ndarray, status: str, rule: str | None
) -> None:
    made_up.recall(2, 1, before)
    made_up.recall(2, 2, after)
    verdict = made_up.judge()
    assert verdict.status == status
    assert "mean_recall" in verdict.why
    assert verdict.why.count("of champion") >= 1
    if rule:
        assert verdict.why.startswith(f"{rule}: ")


def test_paired_interval_sees_what_two_intervals_do_not(made_up: MadeUp) -> None:
    made_up.recall(2, 1, _found(0.5), ranks=False)
    made_up.recall(2, 2, _found(0.45), ranks=False)
    assert made_up.judge().status == "needs a person", "as in a lake of an older version"


def test_max_recall_drop_lets_a_loss_through(made_up: MadeUp) -> None:
    made_up.recall(2, 1, _found(0.5))
    made_up.recall(2, 2, _found(0.45))
    assert made_up.judge(max_recall_drop=0.05).status == "promoted"
    assert made_up.judge(max_recall_drop=0.01).status == "refused"


def test_small_losses_that_add_up_ask_a_person(made_up: MadeUp) -> None:
    made_up.recall(1, 1, _found(0.6))  # as it was measured in its own round
    made_up.recall(2, 1, _found(0.5))
    made_up.recall(2, 2, _found(0.5))
    verdict = made_up.judge()
    assert verdict.status == "needs a person"
    assert "0.5 of challenger" in verdict.why
    assert "0.6 of round 1" in verdict.why


GOOD = {
    "distinct_share": 0.9,
    "distinct_2": 0.3,
    "vocabulary": 500.0,
    "length_mean": 9.0,
    "self_bleu": 0.4,
    "mean_logprob": -1.2,
    "matched_share": (0.8, 0.75, 0.85),
}


@pytest.fixture
def even(made_up: MadeUp) -> MadeUp:
    """Recall tells nothing: what is left are the captions and the filter."""
    made_up.recall(2, 1, _found(0.5))
    made_up.recall(2, 2, _found(0.5))
    made_up.figures(1, "captions", **GOOD)
    return made_up


@pytest.mark.parametrize(
    ("changed", "status", "rules"),
    [
        ({}, "promoted", set()),
        ({"distinct_share": 0.01}, "refused", {"distinct_share_first", "distinct_share_last"}),
        ({"distinct_share": 0.6}, "needs a person", {"distinct_share_last"}),
        ({"distinct_2": 0.02}, "refused", {"distinct_2_first", "distinct_2_last"}),
        ({"vocabulary": 300.0}, "needs a person", {"vocabulary_last"}),
        ({"length_mean": 3.0}, "needs a person", {"length_short", "length_last"}),
        ({"length_mean": 19.0}, "needs a person", {"length_long"}),
        ({"self_bleu": 0.6}, "needs a person", {"self_bleu_last"}),
        ({"mean_logprob": -0.2}, "needs a person", {"logprob_first", "logprob_last"}),
        ({"matched_share": 0.2}, "refused", {"matched_share_first", "matched_share_last"}),
    ],
)
def test_captions_that_collapse_fail_their_rules_and_no_others(
    even: MadeUp, changed: dict[str, float], status: str, rules: set[str]
) -> None:
    even.figures(2, "captions", **GOOD | changed)
    verdict = even.judge()
    assert verdict.status == status
    failed = {name for name, outcome in _outcomes(verdict).items() if outcome == "fail"}
    assert failed == rules
    for rule in rules:
        assert rule in verdict.why


def test_round_is_compared_with_promoted_rounds_only(even: MadeUp) -> None:
    record = rounds.read_round(even.lake, 1)
    assert record is not None
    even.figures(2, "captions", **GOOD | {"distinct_share": 0.01})
    assert even.judge().status == "refused"
    rounds.write_round(even.lake, replace(record, status="refused"))
    verdict = even.judge()
    assert _outcomes(verdict)["distinct_share_first"] == "not measured"
    even.figures(1, "human-captions", distinct_share=1.0)
    verdict = even.judge()
    assert _outcomes(verdict)["distinct_share_first"] == "fail"
    assert "times the 1 of people" in verdict.why


@pytest.mark.parametrize(
    ("before", "now", "status"),
    [
        ((0.9, 0.87, 0.93), (0.6, 0.55, 0.65), "refused"),
        ((0.9, 0.87, 0.93), (0.86, 0.82, 0.9), "promoted"),
        ((0.9, 0.6, 0.97), (0.7, 0.5, 0.9), "promoted"),
    ],
    ids=["clearly worse", "a little worse", "too few canaries to tell"],
)
def test_filter_that_is_clearly_less_precise_on_canaries_is_refused(
    even: MadeUp, before: tuple, now: tuple, status: str
) -> None:
    even.figures(2, "captions", **GOOD)
    even.figures(1, "canaries", filter_precision=before)
    even.figures(2, "canaries", filter_precision=now)
    verdict = even.judge()
    assert verdict.status == status
    assert _outcomes(verdict)["filter_recall_first"] == "not measured"


def test_judge_that_parts_from_the_filter_asks_a_person(even: MadeUp) -> None:
    even.figures(1, "judge", judge_agreement=(0.9, 0.87, 0.93))
    even.figures(2, "judge", judge_agreement=(0.7, 0.66, 0.74))
    verdict = even.judge()
    assert verdict.status == "needs a person"
    assert str(verdict).startswith("needs a person: judge_agreement_first: ")
    assert "judge_agreement 0.7 of filter 2fffffff is -0.2000" in verdict.why


def test_judge_that_was_the_rounds_own_filter_is_no_reference(even: MadeUp) -> None:
    even.figures(1, "judge", judge_agreement=(1.0, 1.0, 1.0), judge_synthetic=(0.4, 0.38, 0.42))
    even.figures(2, "judge", judge_agreement=(0.75, 0.72, 0.78), judge_synthetic=(0.5, 0.48, 0.52))
    for number in (1, 2):  # the filter of round 1 judges both
        text = {"caption_id": "x", "image_id": "x", "source": "web", "model_id": f"1{'f' * 31}"}
        even.commit("judgements", number, [text | {"round": number}])
    verdict = even.judge()
    outcomes = _outcomes(verdict)
    assert outcomes["judge_agreement_first"] == "not measured"
    assert outcomes["judge_synthetic_first"] == "pass", "one judge, other texts"
    assert outcomes["judge_agreement_least"] == "pass"
    assert verdict.status == "promoted"


def test_captions_that_the_judge_outside_the_loop_calls_wrong_are_refused(even: MadeUp) -> None:
    even.figures(1, "judge", judge_synthetic=(0.8, 0.75, 0.85))
    even.figures(2, "judge", judge_synthetic=(0.3, 0.25, 0.35))
    verdict = even.judge()
    assert verdict.status == "refused"
    assert verdict.why.startswith("judge_synthetic_first: ")


def test_rule_on_an_interval_is_not_held_where_there_is_none(even: MadeUp) -> None:
    even.figures(1, "judge", judge_agreement=0.9)
    even.figures(2, "judge", judge_agreement=0.1)
    verdict = even.judge()
    assert _outcomes(verdict)["judge_agreement_first"] == "not measured"
    assert verdict.status == "promoted"


def test_rule_whose_figure_is_missing_says_so_and_may_ask_a_person(even: MadeUp) -> None:
    assert even.judge().status == "promoted"
    verdict = even.judge(rules={"filter_recall_first": {"if_absent": "person"}})
    assert verdict.status == "needs a person"
    assert "filter_recall of dataset canaries was not measured; a person is asked" in verdict.why


def test_own_rule_is_held_and_a_built_in_one_taken_away(even: MadeUp) -> None:
    even.figures(2, "captions", **GOOD | {"distinct_share": 0.01})
    own = {
        "dataset": "captions",
        "metric": "length_mean",
        "against": "nothing",
        "compare": "value",
        "direction": "at_least",
        "limit": 12,
        "if_failed": "refuse",
    }
    gone = {"distinct_share_first": None, "distinct_share_last": None}
    verdict = even.judge(rules={"long_enough": own, **gone})
    assert verdict.status == "refused"
    assert verdict.why.startswith("long_enough: length_mean 9 of captioner 2ccccccc; asked for")


def test_champion_changed_by_hand_since_the_round_began_asks_a_person(even: MadeUp) -> None:
    registry.promote(even.lake, even.models[0].model_id, 0, "back", action="rollback")
    verdict = even.judge()
    assert verdict.status == "needs a person"
    assert f"the champion was changed to {even.models[0].model_id[:8]}" in verdict.why


def test_gate_asks_for_evaluation_when_a_model_was_not_measured(made_up: MadeUp) -> None:
    made_up.recall(2, 1, _found(0.5))
    with pytest.raises(MissingInput, match=r"has no mean_recall.*bootstrap evaluate"):
        made_up.judge()


def test_every_rule_leaves_a_row_with_its_figures(even: MadeUp) -> None:
    even.figures(2, "captions", **GOOD | {"distinct_share": 0.01})
    verdict = even.judge()
    write_findings(even.run(), verdict)
    rows = {row["rule"]: row for row in query(even.lake, "FROM gate_rules").to_pylist()}
    assert set(rows) == set(_outcomes(verdict))
    row = rows["distinct_share_first"]
    assert (row["round"], row["measured"], row["reference"]) == (2, 0.01, 0.9)
    assert row["value"] == pytest.approx(0.01 / 0.9)
    assert (row["limit"], row["direction"], row["against"]) == (0.5, "at_least", "first")
    assert (row["outcome"], row["verdict_if_failed"]) == ("fail", "refuse")
    headline = rows["recall_clearly_worse"]
    assert headline["low"] <= headline["value"] <= headline["high"]
    assert rows["filter_recall_last"]["value"] is None
    compared = query(even.lake, "SELECT failed_rules FROM compare_rounds WHERE round = 2")
    assert compared.to_pylist() == [{"failed_rules": "distinct_share_first, distinct_share_last"}]
