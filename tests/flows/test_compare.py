"""`compare`: arms that share a round's texts and leave the round alone, resumable, with honest words about noise."""

import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cycle import (
    FinishedCycle,
    bootstrap,
    command_environment,
    copied,
    drop_later_rounds,
    stamps,
    table_contents,
)

from flows.comparison.figure import figure_svg, panel_svg
from flows.comparison.table import Comparison, compared
from flows.comparison.words import markdown, notes, sentences
from flows.errors import MissingInput, SettingsError
from flows.report.facts import ReportFacts
from flows.report.gather import gather_facts
from flows.session import Run, open_beside
from flows.settings import parse_settings
from flows.steps.arms import plan_arms, run_arm
from storage import Lake, connect, drop_part, list_parts, query, read_image, registry
from storage.errors import ConfigError

POLICIES = ["raw", "web_filtered", "percentile:share=0.4"]
ASKED = {"policies": POLICIES, "seeds": 2, "steps": 6, "round": 1}
OF_THE_ROUND = ("rounds", "reports", "champion.json", "tables/captions", "tables/scores")


def _silent(*_: Any) -> None:
    pass


def _compare(cycle: FinishedCycle, **asked: Any) -> tuple[Comparison, list[str]]:
    """The comparison without Prefect, and the names of its arms."""
    settings = parse_settings(cycle.settings | {"compare": ASKED | asked})
    with open_beside(settings, purpose="compare", round=settings.compare.round) as run:
        arms = plan_arms(run)
        for arm in arms:
            run_arm(run, arm, _silent)
        found = compared(run.lake, run.round, steps=arms[0].steps)
    assert found is not None
    return found, [arm.name for arm in arms]


def _round_1(finished: FinishedCycle, folder: Path) -> FinishedCycle:
    """A copy with round 1 alone, whatever other tests have added."""
    cycle = copied(finished, folder)
    drop_later_rounds(cycle.lake)
    return cycle


@pytest.fixture(scope="module")
def before(finished: FinishedCycle, tmp_path_factory: pytest.TempPathFactory) -> FinishedCycle:
    return _round_1(finished, tmp_path_factory.mktemp("before"))


@pytest.fixture(scope="module")
def done(
    before: FinishedCycle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FinishedCycle, Comparison]:
    """A lake on which three policies were compared with two seeds each."""
    cycle = copied(before, tmp_path_factory.mktemp("compared"))
    return cycle, _compare(cycle)[0]


def test_compare_gives_every_policy_its_figures_with_intervals_and_differences(
    done: tuple[FinishedCycle, Comparison],
) -> None:
    comparison = done[1]
    raw, filtered, both = comparison.policies
    assert [row.policy for row in comparison.policies] == ["raw", "web_filtered", "percentile"]
    assert comparison.baseline == "raw"
    assert (raw.has_captioner, raw.has_filter) == (False, False)
    assert not filtered.has_captioner
    assert json.loads(filtered.params) == {"threshold": 0.2}  # the round's own, on the same number
    assert filtered.label == "web_filtered:threshold=0.2"
    assert both.label == "percentile:share=0.4"
    assert both.has_filter
    assert raw.num_synthetic == filtered.num_synthetic == 0
    assert len({row.num_human for row in comparison.policies}) == 1
    assert set(comparison.metrics) >= {"mean_recall", "itm_auc_hard", "cider", "caption_truth"}
    for row in comparison.policies:
        assert row.seeds == (0, 1)
        for figure in row.figures:
            values = [value for _, value in figure.by_seed]
            assert figure.mean.value == pytest.approx(sum(values) / 2)
            assert 0 <= figure.mean.low <= figure.mean.value <= figure.mean.high
            assert figure.mean.covers_seeds
            assert (figure.gain is None) == (row is raw)
            if figure.gain is not None:
                base = raw.figure(figure.metric)
                assert base is not None
                assert figure.gain.value == pytest.approx(figure.mean.value - base.mean.value)


def test_arms_are_trained_on_what_their_policy_keeps_and_on_nothing_reserved(
    done: tuple[FinishedCycle, Comparison],
) -> None:
    cycle, comparison = done
    lake = Lake.open(str(cycle.lake), read_only=True)
    arms = query(lake, "SELECT * FROM arms ORDER BY generation, seed").to_pylist()
    assert len(arms) == 6
    kept = {
        (row["generation"], row["source"]): row["n"]
        for row in query(
            lake,
            "SELECT generation, source, count(*) AS n FROM decisions WHERE kept GROUP BY ALL",
        ).to_pylist()
    }
    reserved = set(query(lake, "SELECT image_id FROM reserved").column(0).to_pylist())
    human = query(lake, "SELECT DISTINCT image_id, caption FROM human").num_rows
    for arm in arms:
        of_arm = (arm["num_web"], arm["num_synthetic"])
        assert of_arm == tuple(
            kept.get((arm["generation"], source), 0) for source in ("web", "synthetic")
        )
        assert arm["num_human"] == human
        rows = _trainset(lake, arm["trained_on"])
        assert len(rows) == sum(of_arm) + human
        assert not {image_id for image_id, _ in rows} & reserved
    best = comparison.policies[-1]
    assert 0 < best.num_web < comparison.policies[0].num_web
    assert best.num_synthetic


def _trainset(lake: Lake, fingerprint: str) -> list[tuple[str, str]]:
    import pyarrow as pa

    with pa.memory_map(f"{lake.uri}/trainsets/{fingerprint}.arrow") as file:
        table = pa.ipc.open_file(file).read_all()
    return list(zip(table["image_id"].to_pylist(), table["caption"].to_pylist(), strict=True))


def test_a_comparison_leaves_its_round_as_it_was(
    before: FinishedCycle, done: tuple[FinishedCycle, Comparison]
) -> None:
    cycle = done[0]
    was, now = table_contents(before.lake), table_contents(cycle.lake)
    assert {name: rows for name, rows in now.items() if name in was} == was
    for name in OF_THE_ROUND:
        path = before.lake / name
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        assert files
        for file in files:
            other = cycle.lake / file.relative_to(before.lake)
            assert other.read_bytes() == file.read_bytes(), file
    lakes = [Lake.open(str(each.lake), read_only=True) for each in (before, cycle)]
    for view in ("verdicts", "clean", "compare_rounds", "funnel", "noise"):
        first, second = (query(lake, f"FROM {view}").to_pylist() for lake in lakes)
        assert _sorted(first) == _sorted(second), view
    assert _facts(lakes[0]) == _facts(lakes[1])
    champion = [registry.champion(lake) for lake in lakes]
    assert champion[0] == champion[1]


def _facts(lake: Lake) -> ReportFacts:
    """What the report of round 1 says."""
    with connect(lake, as_of=1) as connection:
        return gather_facts(connection, 1, partial(read_image, lake), lake="lake", gallery_pairs=2)


def _sorted(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(map(str, rows))


def test_arms_models_say_of_which_policy_and_seed_they_are(
    done: tuple[FinishedCycle, Comparison],
) -> None:
    lake = Lake.open(str(done[0].lake), read_only=True)
    found = query(lake, "SELECT model_id, arm FROM lineage WHERE role = 'arm'").to_pylist()
    said = "; ".join(row["arm"] for row in found)
    for row in done[1].policies:
        for seed in row.seeds:
            assert f"{row.generation}, seed {seed}, 6 steps" in said
    assert query(lake, "FROM models WHERE role <> 'arm' AND arm IS NOT NULL").num_rows == 0
    with pytest.raises(ConfigError, match="arm of a comparison and never champion"):
        registry.promote(Lake.open(str(done[0].lake)), found[0]["model_id"], 1, "by mistake")


def test_the_same_comparison_again_does_nothing_and_one_more_seed_adds_one(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    cycle = copied(done[0], tmp_path)
    before = stamps(cycle.lake, "tables", "models")
    again, _ = _compare(cycle)
    assert again == done[1]
    assert stamps(cycle.lake, "tables", "models") == before
    more, names = _compare(cycle, policies=["raw"], seeds=3)
    assert names[-1].endswith("seed-2")
    after = stamps(cycle.lake, "tables", "models")
    assert {path: after[path] for path in before} == before
    assert next(row.seeds for row in more.policies if row.policy == "raw") == (0, 1, 2)


def test_one_seed_says_that_seeds_are_not_covered(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    lake = Lake.open(str(done[0].lake), read_only=True)
    one = compared(lake, seeds={0})
    assert one is not None
    assert not one.covers_seeds
    assert "say nothing about other seeds" in " ".join(notes(one))
    measured = query(lake, "SELECT model_id, metric, low, high FROM metrics WHERE dataset = 'arms'")
    known = {(row["model_id"], row["metric"]): row for row in measured.to_pylist()}
    (model,) = query(
        lake, "SELECT model_id FROM arms WHERE policy = 'raw' AND seed = 0"
    ).to_pylist()
    for figure in one.policies[0].figures:
        row = known[model["model_id"], figure.metric]
        assert (figure.mean.low, figure.mean.high) == pytest.approx((row["low"], row["high"]))


def test_words_and_figure_say_what_is_within_noise(
    done: tuple[FinishedCycle, Comparison],
) -> None:
    comparison = done[1]
    said = " ".join(sentences(comparison))
    for row in comparison.policies[1:]:
        assert f"{row.label} against raw:" in said
        for figure in row.figures:
            assert figure.gain is not None
    text = markdown(comparison)
    assert "Intervals are 95 %, over seeds and 16 held-out images" in text
    assert text.count("| percentile:share=0.4 |") == 2
    drawn = ET.fromstring(figure_svg(comparison))
    titles = [node.text or "" for node in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 1 + len(comparison.metrics) * 3
    assert figure_svg(comparison) == figure_svg(comparison)
    for metric, label in comparison.metrics.items():
        alone = ET.fromstring(panel_svg(comparison, metric))
        assert alone.get("aria-label") == label
        assert len(list(alone.iter("title"))) == 3
    for figure in comparison.policies[1].figures:
        assert figure.gain is not None
        verdict = "than the baseline" if figure.gain.is_clear else "within noise of the baseline"
        value = f"web_filtered:threshold=0.2: {100 * figure.mean.value:.1f}, "
        assert any(title.startswith(value) and verdict in title for title in titles)


def test_policies_that_keep_the_same_texts_share_a_model(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    cycle = copied(done[0], tmp_path)
    models = len(list((cycle.lake / "models").iterdir()))
    mine = tmp_path / "every_web_text.sql"
    mine.write_text("SELECT caption_id, source = 'web' AS kept, 'mine' AS reason FROM candidates")
    comparison, _ = _compare(cycle, policies=["raw", str(mine)])
    raw, same = (
        next(row for row in comparison.policies if row.policy == name)
        for name in ("raw", "every_web_text")
    )
    assert len(list((cycle.lake / "models").iterdir())) == models
    assert [f.by_seed for f in raw.figures] == [f.by_seed for f in same.figures]
    gain = same.figures[0].gain
    assert gain is not None
    assert not gain.is_clear


def test_discarded_models_leave_their_figures_and_are_not_trained_again(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    cycle = copied(done[0], tmp_path)
    lake = Lake.open(str(cycle.lake))
    of_rounds = {ref.model_id for ref in registry.list_models(lake) if ref.role != "arm"}
    again, _ = _compare(cycle, keep_models=False)
    assert again == done[1]
    assert {path.name for path in (cycle.lake / "models").iterdir()} == of_rounds
    before = stamps(cycle.lake, "tables", "models")
    assert _compare(cycle, keep_models=False)[0] == again
    assert stamps(cycle.lake, "tables", "models") == before


def test_an_arm_with_the_rounds_own_weights_does_not_take_them_along(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    cycle = copied(done[0], tmp_path)
    lake = Lake.open(str(cycle.lake))
    before = _facts(lake)
    # The round's policy, steps and seed: the very training of the round.
    _compare(cycle, policies=["blip"], seeds=1, steps=9)
    assert _facts(lake) == before, "the round's report tells of the arm"
    (arm,) = query(lake, "SELECT model_id FROM arms WHERE steps = 9").to_pylist()
    own = registry.find(lake, "med", 1)
    assert own is not None
    assert arm["model_id"] == own.model_id
    assert registry.resolve(lake, own.model_id) == own
    _compare(cycle, policies=["blip"], seeds=1, steps=9, keep_models=False)
    assert (cycle.lake / own.path / "model.safetensors").is_file()
    assert registry.find(lake, "med", 1) == own


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (
            {"policies": ["raw", "blipp"]},
            ConfigError,
            "policy 'blipp' is unknown; there are .*blip",
        ),
        ({"policies": ["blip:bar=1"]}, ConfigError, "bar"),
        ({"policies": ["blip:0.6"]}, SettingsError, "write it as blip:threshold=0.6"),
        (
            {"policies": ["blip:threshold=1"]},
            SettingsError,
            "keeps none of the .* texts of round 1",
        ),
        ({"policies": ["raw", "blip", "raw"]}, SettingsError, "'raw' and 'raw' are the same"),
        ({"round": 7}, MissingInput, "no round 7 .there is 1."),
    ],
    ids=["policy", "parameter", "no parameter", "nothing kept", "twice", "round"],
)
def test_what_cannot_be_compared_is_said_before_any_training(
    before: FinishedCycle, tmp_path: Path, asked: dict[str, Any], error: type, said: str
) -> None:
    cycle = copied(before, tmp_path)
    with pytest.raises(error, match=said):
        _compare(cycle, **asked)
    assert not list_parts(Lake.open(str(cycle.lake)), "arms")
    assert not list((cycle.lake / "work" / "train").glob("arm-*"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"seeds": 0}, "compare.seeds: .*greater than or equal to 1"),
        ({"steps": 0}, "compare.steps: .*greater than or equal to 1"),
        ({"policies": []}, "compare.policies: .*at least one policy"),
        ({"policies": ["raw", ""]}, "compare.policies: .*at least one policy"),
    ],
)
def test_settings_of_a_comparison_are_checked(
    before: FinishedCycle, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_settings(before.settings | {"compare": ASKED | asked})


def test_a_round_without_decisions_or_scores_is_refused(
    before: FinishedCycle, tmp_path: Path
) -> None:
    cycle = copied(before, tmp_path)
    lake = Lake.open(str(cycle.lake))
    (cycle.lake / "rounds" / "0001" / "policy.json").unlink()
    with pytest.raises(MissingInput, match=r"round 1 of .* has not decided yet"):
        _compare(cycle)
    drop_part(lake, list_parts(lake, "scores", 1)[0])
    with pytest.raises(MissingInput, match="1 shards have no scores of round 1"):
        _compare(cycle)


def test_settings_of_other_texts_and_a_query_of_its_own_are_refused(
    before: FinishedCycle, tmp_path: Path
) -> None:
    cycle = copied(before, tmp_path)
    other = {"caption": cycle.settings["caption"] | {"top_p": 0.5}}
    opened = open_beside(parse_settings(cycle.settings | other), purpose="compare")
    with pytest.raises(SettingsError, match=r"caption.top_p: 0.9 -> 0.5"):
        opened.__enter__()
    train = cycle.settings["pretrain"] | {"sql": "SELECT image_id, caption, source FROM human"}
    settings = parse_settings(cycle.settings | {"retrain": train})
    with pytest.raises(SettingsError, match="leave it out, or write the rule as a policy"):
        plan_arms(Run(Lake.open(str(cycle.lake)), settings, 1))


def test_changed_settings_are_named_and_rebuild_makes_all_arms_anew(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    cycle = copied(done[0], tmp_path)
    cycle.settings["retrain"] = cycle.settings["pretrain"] | {"learning_rate": 2e-3}
    with pytest.raises(SettingsError, match=r"train.learning_rate: 0.001 -> 0.002; .*--on-stale"):
        _compare(cycle, policies=["all"])
    cycle.settings["machine"] = cycle.settings["machine"] | {"on_stale": "rebuild"}
    anew, _ = _compare(cycle, policies=["raw"], seeds=1)
    assert [row.policy for row in anew.policies] == ["raw"]
    lake = Lake.open(str(cycle.lake))
    (arm,) = query(lake, "SELECT * FROM arms").to_pylist()
    measured = query(lake, "SELECT DISTINCT model_id FROM metrics WHERE dataset = 'arms'")
    assert measured.column(0).to_pylist() == [arm["model_id"]]


def test_killed_in_an_arm_the_same_command_ends_with_the_same_figures(
    before: FinishedCycle, tmp_path: Path, api_url: str
) -> None:
    """kill -9 in a training, and between data and manifest of every part that an arm commits."""
    undisturbed, cycle = copied(before, tmp_path / "a"), copied(before, tmp_path / "b")
    asked = {"policies": ["raw", "blip"], "seeds": 1, "steps": 9}
    expected, _ = _compare(undisturbed, **asked)
    settings = tmp_path / "asked.json"
    settings.write_text(json.dumps(cycle.settings | {"compare": ASKED | asked}))
    for place in ("train:arm", "arm_resamples:1", "metrics:1", "arms:3"):
        killed = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).with_name("killer.py")),
                place,
                settings,
                "compare",
            ],
            cwd=tmp_path,
            env=command_environment(api_url),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert killed.returncode == -signal.SIGKILL, f"{place}: {killed.stderr[-2000:]}"
    found, _ = _compare(cycle, **asked)
    assert found == expected
    was, now = table_contents(undisturbed.lake), table_contents(cycle.lake)
    assert was.keys() == now.keys()
    assert {name: rows for name, rows in now.items() if was[name] != rows} == {}


def test_the_command_prints_and_writes_what_it_found(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path, api_url: str
) -> None:
    cycle = copied(done[0], tmp_path)
    written, drawn = tmp_path / "table.json", tmp_path / "figure.svg"
    arguments = ["compare", "--config", str(cycle.config), "--seeds", "2", "--steps", "6"]
    arguments += ["--policies", ",".join(ASKED["policies"])]
    ran = bootstrap(
        *arguments, "--json", str(written), "--figure", str(drawn), cwd=tmp_path, api_url=api_url
    )
    assert ran.returncode == 0, ran.stdout[-1500:] + ran.stderr[-1500:]
    assert "percentile:share=0.4 against raw:" in ran.stdout
    found = json.loads(written.read_text())
    assert [row["policy"] for row in found["policies"]] == ["raw", "web_filtered", "percentile"]
    assert ET.parse(drawn).getroot().tag.endswith("svg")
    refused = bootstrap(
        *arguments, "--json", str(tmp_path / "no" / "table.json"), cwd=tmp_path, api_url=api_url
    )
    assert refused.returncode == 2
    assert "there is no folder" in refused.stderr
