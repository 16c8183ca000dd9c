"""`compare --decodings`: captions of another decoding beside a round, made once, shared by arms, and seen by nobody else."""

import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from cycle import (
    FinishedCycle,
    before_captioning,
    bootstrap,
    command_environment,
    copied,
    drop_later_rounds,
    file_hashes,
    stamps,
    table_contents,
)

from flows import models
from flows.comparison.figure import figure_svg
from flows.comparison.table import Comparison, compared
from flows.comparison.words import markdown, notes, sentences
from flows.errors import MissingInput, SettingsError
from flows.report.pay_parts import pay_parts
from flows.session import Run, open_beside
from flows.settings import parse_settings
from flows.steps.arms import plan_arms, plan_decodings, run_arm
from flows.steps.curate_shards import curate_shards
from flows.steps.variants import variant_run, write_variant
from storage import (
    Lake,
    commit_part,
    connect,
    drop_part,
    list_parts,
    part_manifest,
    query,
    read_part,
)
from storage.catalog import VIEWS
from storage.errors import ConfigError
from storage.generations import generation_named
from storage.sweep import sweep
from storage.why import why

BLIP = "blip:threshold=0.2"
ASKED = {"policies": ["raw", "blip"], "seeds": 1, "steps": 4, "round": 1}
DECODINGS = ["nucleus", "beam"]
NEW_TABLES = ("variant_captions", "variant_scores", "variant_decisions", "arms", "arm_resamples")


def _silent(*_: Any) -> None:
    pass


def _write(run: Run) -> None:
    for decoding in plan_decodings(run):
        write_variant(run, decoding, _silent)


def _compare(cycle: FinishedCycle, **asked: Any) -> Comparison:
    """The comparison without Prefect."""
    settings = parse_settings(cycle.settings | {"compare": ASKED | asked})
    with open_beside(settings, purpose="compare", round=1) as run:
        _write(run)
        arms = plan_arms(run)
        for arm in arms:
            run_arm(run, arm, _silent)
        found = compared(
            run.lake,
            run.round,
            steps=arms[0].steps,
            generations=list(dict.fromkeys(arm.texts.generation for arm in arms)),
        )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def before(finished: FinishedCycle, tmp_path_factory: pytest.TempPathFactory) -> FinishedCycle:
    """A lake with round 1 alone."""
    cycle = copied(finished, tmp_path_factory.mktemp("before"))
    drop_later_rounds(cycle.lake)
    return cycle


@pytest.fixture(scope="module")
def plain(before: FinishedCycle, tmp_path_factory: pytest.TempPathFactory) -> FinishedCycle:
    """A lake whose policies were compared on the round's own captions."""
    cycle = copied(before, tmp_path_factory.mktemp("plain"))
    _compare(cycle)
    return cycle


@pytest.fixture(scope="module")
def done(
    plain: FinishedCycle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FinishedCycle, Comparison]:
    """The same, compared by decoding after that."""
    cycle = copied(plain, tmp_path_factory.mktemp("decoded"))
    return cycle, _compare(cycle, decodings=DECODINGS)


def test_every_decoding_has_its_row_and_raw_has_one(
    done: tuple[FinishedCycle, Comparison],
) -> None:
    cycle, comparison = done
    raw, nucleus, beam = comparison.policies
    assert comparison.baseline == "raw"
    assert comparison.has_decodings
    assert [row.name for row in comparison.policies] == [
        "raw",
        f"{BLIP} (nucleus)",
        f"{BLIP} (beam)",
    ]
    assert [row.decoding for row in comparison.policies] == [None, "nucleus", "beam"]
    assert (raw.noise_ratio, raw.num_synthetic) == (None, 0)
    lake = Lake.open(str(cycle.lake), read_only=True)
    arms = query(lake, "SELECT policy, decoding, generation FROM arms").to_pylist()
    assert sorted((arm["policy"], arm["decoding"] or "") for arm in arms) == [
        ("blip", "beam"),
        ("blip", "nucleus"),
        ("raw", ""),
    ]
    for row, table in ((nucleus, "scores"), (beam, "variant_scores")):
        shares = query(
            lake,
            f"SELECT avg((coalesce(itm_prob, 0) < 0.2)::INT) AS dropped FROM {table} "
            f"SEMI JOIN {table.replace('scores', 'captions')} c USING (caption_id, round)",
        )
        assert row.noise_ratio is not None
        assert row.noise_ratio == pytest.approx(shares.column(0)[0].as_py())
        assert row.num_synthetic > 0
        assert row.dropped_web == nucleus.dropped_web, "web texts have the round's scores"
    assert beam.generation == f"{nucleus.generation}-beam"
    for figure in beam.figures:
        base = raw.figure(figure.metric)
        assert base is not None
        assert figure.gain is not None
        assert figure.gain.value == pytest.approx(figure.mean.value - base.mean.value)


def test_arms_of_a_decoding_are_trained_on_its_kept_captions(
    done: tuple[FinishedCycle, Comparison],
) -> None:
    import pyarrow as pa

    lake = Lake.open(str(done[0].lake), read_only=True)
    (arm,) = query(lake, "SELECT * FROM arms WHERE decoding = 'beam'").to_pylist()
    with pa.memory_map(f"{lake.uri}/trainsets/{arm['trained_on']}.arrow") as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    trained = {(row["image_id"], row["caption"], row["source"]) for row in rows}
    synthetic = {pair for pair in trained if pair[2] == "synthetic"}
    kept = query(
        lake,
        "SELECT c.image_id, c.caption, 'synthetic' AS source FROM variant_captions c "
        "JOIN variant_decisions d USING (caption_id) WHERE d.kept AND c.status = 'ok' "
        f"AND d.generation = '{arm['generation']}' AND c.image_id NOT IN (SELECT image_id FROM reserved)",
    ).to_pylist()
    assert synthetic == {tuple(row.values()) for row in kept}
    assert synthetic
    reserved = set(query(lake, "SELECT image_id FROM reserved").column(0).to_pylist())
    assert reserved
    assert not {image_id for image_id, _, _ in trained} & reserved


def test_captions_are_those_of_a_round_with_that_decoding(
    finished: FinishedCycle, done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    cycle = before_captioning(finished, tmp_path)
    settings = cycle.settings | {"caption": cycle.settings["caption"] | {"decoding": "beam"}}
    run = Run(Lake.open(str(cycle.lake)), parse_settings(settings), 1)
    with run.lake.lock("test"):
        curate_shards(run, models.captioner_ref(run), None, _silent)
        curate_shards(run, None, models.scorer_ref(run), _silent)
    ours = Lake.open(str(done[0].lake), read_only=True)
    columns = "caption_id, image_id, source, caption, model_id, top_p, seed, num_tokens, status"
    asked = f"SELECT {columns} FROM {{}} WHERE source = 'synthetic' AND round = 1 ORDER BY ALL"
    wanted = query(run.lake, asked.format("captions")).to_pylist()
    assert len(wanted) > 30
    assert all(row["top_p"] is None for row in wanted)
    assert query(ours, asked.format("variant_captions")).to_pylist() == wanted
    scores = "SELECT caption_id, itm_prob FROM {} SEMI JOIN {} USING (caption_id, round) ORDER BY 1"
    expected = query(run.lake, scores.format("scores", "captions")).to_pydict()
    found = query(ours, scores.format("variant_scores", "variant_captions")).to_pydict()
    assert found["caption_id"] == expected["caption_id"]
    assert found["itm_prob"] == pytest.approx(expected["itm_prob"], abs=1e-5)


def test_the_round_and_all_that_was_there_stay_as_they_were(
    plain: FinishedCycle, done: tuple[FinishedCycle, Comparison]
) -> None:
    cycle = done[0]
    was, now = (
        file_hashes(each.lake, "tables", "rounds", "reports", "shards") for each in (plain, cycle)
    )
    assert {name: now.get(name) for name in was} == was
    for name in set(now) - set(was):
        assert name.split("/")[1] in (*NEW_TABLES, "metrics", "models"), name
    lakes = [Lake.open(str(each.lake), read_only=True) for each in (plain, cycle)]
    untouched = set(VIEWS) - {"models", "lineage", "variant_verdicts"}
    views = [*untouched, "captions", "scores", "decisions", "pairs", "rounds", "champions"]
    with connect(lakes[0]) as first, connect(lakes[1]) as second:
        for view in views:
            rows = [
                sorted(map(str, con.execute(f"FROM {view}").fetchall())) for con in (first, second)
            ]
            assert rows[0] == rows[1], view
        count = "SELECT count(*) FROM variant_verdicts"
        assert first.execute(count).fetchall() == [(0,)]
        assert second.execute(count).fetchall() > [(0,)]
    swept = [sweep(lake, 1, "blip", "threshold", [0.1, 0.5]) for lake in lakes]
    assert swept[0] == swept[1]
    image_id = query(lakes[0], "SELECT min(image_id) FROM clean").column(0)[0].as_py()
    told = [
        [
            (text["caption"], text["scores"], text["decisions"])
            for text in why(lake, image_id)["images"][0]["texts"]
        ]
        for lake in lakes
    ]
    assert told[0] == told[1]
    generation = next(row.generation for row in done[1].policies if row.decoding == "beam")
    with pytest.raises(ConfigError, match=f"no decisions named '{generation}'"):
        generation_named(lakes[1], 1, generation)


def test_what_was_compared_before_is_found_and_again_does_nothing(
    plain: FinishedCycle, done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    cycle = copied(done[0], tmp_path)
    lake = Lake.open(str(cycle.lake), read_only=True)
    assert query(lake, "SELECT count(*) FROM models WHERE role = 'arm'").column(0)[0].as_py() == 3
    stamped = stamps(cycle.lake, "tables", "models")
    assert _compare(cycle, decodings=DECODINGS) == done[1]
    alone = _compare(cycle, decodings=["beam"])
    assert [row.name for row in alone.policies] == ["raw", f"{BLIP} (beam)"]
    two = _compare(cycle, decodings=DECODINGS, policies=["blip"])
    assert two.baseline == f"{BLIP} (nucleus)"
    assert stamps(cycle.lake, "tables", "models") == stamped
    assert compared(Lake.open(str(plain.lake), read_only=True), 1) == _compare(cycle)


def test_words_and_figure_tell_decodings_apart(done: tuple[FinishedCycle, Comparison]) -> None:
    comparison = done[1]
    text = markdown(comparison)
    assert "| C | F | policy | captions | noise | texts | seeds |" in text
    beam = comparison.policies[-1]
    assert beam.noise_ratio is not None
    assert f"| {BLIP} | beam | {100 * beam.noise_ratio:.1f} |" in text
    assert "| raw | - | - |" in text
    assert f"{BLIP} (beam) against raw:" in " ".join(sentences(comparison))
    assert f"{100 * beam.noise_ratio:.1f} % with beam" in " ".join(notes(comparison))
    assert pay_parts(comparison)["pay_notes"] == notes(comparison)
    drawn = ET.fromstring(figure_svg(comparison))
    labels = [
        node.text
        for node in drawn.iter("{http://www.w3.org/2000/svg}text")
        if node.get("class") == "label"
    ]
    assert labels[:3] == ["raw", "blip:thre… (nucleus)", "blip:thresho… (beam)"]


def test_without_decodings_the_table_is_as_it_was(plain: FinishedCycle) -> None:
    comparison = compared(Lake.open(str(plain.lake), read_only=True))
    assert comparison is not None
    assert not comparison.has_decodings
    assert [row.name for row in comparison.policies] == ["raw", BLIP]
    assert "| C | F | policy | texts | seeds |" in markdown(comparison)
    assert "Noise" not in " ".join(notes(comparison))


def test_arms_of_an_older_program_count_as_the_rounds_own_decoding(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    lake = Lake.open(str(copied(done[0], tmp_path).lake))
    for part in list_parts(lake, "arms"):
        rows = read_part(lake, part)
        if rows["decoding"][0].as_py() != "beam":
            basis = part_manifest(lake, part).basis
            older = rows.drop_columns("decoding")
            commit_part(lake, "arms", part.name, older, round=1, basis=basis)
    found = compared(lake)
    assert found is not None
    assert found.policies == done[1].policies


def test_several_processes_in_one_pass_write_the_same_rows(
    before: FinishedCycle, done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    cycle = copied(before, tmp_path)
    machine = cycle.settings["machine"] | {"curate_processes": 2}
    changes = {"machine": machine, "curate": {"fused": True}, "seed": 5}
    asked = {"compare": ASKED | {"decodings": ["beam"]}}
    settings = parse_settings(cycle.settings | changes | asked)
    with open_beside(settings, purpose="compare", round=1) as run:
        _write(run)
    was, now = (
        {name: rows for name, rows in table_contents(each.lake).items() if "/variant_" in name}
        for each in (done[0], cycle)
    )
    assert len(now) == 6
    assert {name: was[name] for name in now} == now


def test_a_decoding_keeps_the_rounds_seed_and_writes_as_many_captions_as_it_can(
    before: FinishedCycle,
) -> None:
    caption = before.settings["caption"] | {"num_captions": 3}
    settings = parse_settings(before.settings | {"caption": caption, "seed": 7})
    run = Run(Lake.open(str(before.lake), read_only=True), settings, 1)
    counts = {}
    for decoding in ("beam", "greedy", "official"):
        beside = variant_run(run, decoding)
        assert (beside.variant, beside.round, beside.settings.seed) == (decoding, 1, 0)
        assert beside.settings.caption.decoding == decoding
        counts[decoding] = beside.settings.caption.num_captions
    assert counts == {"beam": 1, "greedy": 1, "official": 3}


def test_killed_between_its_shards_the_same_command_ends_with_the_same_tables(
    plain: FinishedCycle, done: tuple[FinishedCycle, Comparison], tmp_path: Path, api_url: str
) -> None:
    """kill -9 in the middle of writing captions, and of scoring them."""
    cycle = copied(plain, tmp_path)
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps(cycle.settings | {"compare": ASKED | {"decodings": DECODINGS}}))
    killer = str(Path(__file__).with_name("killer.py"))
    for table in ("variant_captions", "variant_scores"):
        killed = subprocess.run(
            [sys.executable, killer, f"{table}:2", asked, "compare"],
            cwd=tmp_path,
            env=command_environment(api_url),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert killed.returncode == -signal.SIGKILL, f"{table}: {killed.stderr[-2000:]}"
        there = list_parts(Lake.open(str(cycle.lake)), table, 1)
        assert len(there) == 1, f"{table}: what was committed stays"
    assert _compare(cycle, decodings=DECODINGS) == done[1]
    was, now = table_contents(done[0].lake), table_contents(cycle.lake)
    assert was.keys() == now.keys()
    assert {name: rows for name, rows in now.items() if was[name] != rows} == {}


def _with_captioner(cycle: FinishedCycle, **caption: Any) -> FinishedCycle:
    """As if round 1 had been begun with other settings of captioning."""
    cycle.settings["caption"] = cycle.settings["caption"] | caption
    path = cycle.lake / "rounds" / "0001" / "settings.json"
    began = json.loads(path.read_text())
    path.write_text(json.dumps(began | {"caption": began["caption"] | caption}))
    return cycle


@pytest.mark.parametrize(
    ("decodings", "caption", "said"),
    [
        (
            ["beam"],
            {"captioner": "python:mine.py:build"},
            "python:mine.py:build, which decodes as its own",
        ),
        (
            ["official"],
            {"captioner": "hf:some/model"},
            "released code, and the captioner of round 1 is hf:",
        ),
        (["official"], {"top_k": 7}, "'official' does not go with .* round 1: .*fixes top_k at 50"),
    ],
    ids=["plug-in", "foreign", "settings"],
)
def test_a_decoding_that_the_captioner_does_not_know_is_refused(
    before: FinishedCycle, tmp_path: Path, decodings: list[str], caption: dict[str, Any], said: str
) -> None:
    cycle = _with_captioner(copied(before, tmp_path), **caption)
    with pytest.raises(SettingsError, match=said):
        _compare(cycle, decodings=decodings)


@pytest.mark.parametrize(
    ("policies", "error", "said"),
    [
        (
            ["raw", "web_filtered"],
            SettingsError,
            "none keeps a synthetic text .*decoding changes nothing",
        ),
        (["raw", "top_k:ranked_by=judge_itm_prob"], ConfigError, "none of decoding beam: rank by"),
        (["looks_aside.sql"], ConfigError, "reads table captions, which has nothing of .* beam"),
        (["blipp"], ConfigError, "policy 'blipp' is unknown"),
        (["blip", "blip"], SettingsError, "are the same"),
    ],
    ids=["no captions", "judge", "table", "unknown", "twice"],
)
def test_policies_that_a_decoding_cannot_have_are_refused_before_anything_is_written(
    before: FinishedCycle, tmp_path: Path, policies: list[str], error: type, said: str
) -> None:
    cycle = copied(before, tmp_path)
    aside = tmp_path / "looks_aside.sql"
    aside.write_text(
        "SELECT caption_id, true AS kept, 'there' AS reason FROM candidates SEMI JOIN captions USING (caption_id)"
    )
    named = [str(aside) if policy == aside.name else policy for policy in policies]
    with pytest.raises(error, match=said):
        _compare(cycle, decodings=DECODINGS, policies=named)
    assert not list_parts(Lake.open(str(cycle.lake)), "variant_captions")


@pytest.mark.parametrize(
    ("decodings", "said"),
    [
        (["beams"], "compare.decodings.0: .*'nucleus', 'greedy', 'beam' or 'official'"),
        (["beam", "nucleus", "beam"], "compare.decodings: .*beam is named twice"),
    ],
)
def test_decodings_are_checked_with_the_settings(
    before: FinishedCycle, decodings: list[str], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_settings(before.settings | {"compare": ASKED | {"decodings": decodings}})


def test_a_lake_without_captioner_or_without_the_captions_says_what_to_run(
    before: FinishedCycle, tmp_path: Path
) -> None:
    cycle = copied(before, tmp_path)
    lake = Lake.open(str(cycle.lake))
    settings = parse_settings(cycle.settings | {"compare": ASKED | {"decodings": ["beam"]}})
    with pytest.raises(
        MissingInput, match=r"\d shards have no variant_captions of round 1, beam-web"
    ):
        plan_arms(Run(lake, settings, 1))
    for part in list_parts(lake, "models", 1):
        if part.name.startswith("captioner-"):
            drop_part(lake, part)
    with pytest.raises(
        MissingInput, match="has no captioner of round 1; run `bootstrap finetune-captioner`"
    ):
        plan_decodings(Run(lake, settings, 1))


def test_the_command_shows_decodings(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path, api_url: str
) -> None:
    cycle = copied(done[0], tmp_path)
    written = tmp_path / "table.json"
    arguments = [
        "--config",
        str(cycle.config),
        "--seeds",
        "1",
        "--steps",
        "4",
        "--policies",
        "raw,blip",
    ]
    arguments += ["--decodings", "nucleus, beam", "--json", str(written)]
    ran = bootstrap("compare", *arguments, cwd=tmp_path, api_url=api_url)
    assert ran.returncode == 0, ran.stdout[-1500:] + ran.stderr[-1500:]
    assert f"{BLIP} (beam) against raw:" in ran.stdout
    assert "captions" in ran.stdout
    assert "noise" in ran.stdout
    rows = json.loads(written.read_text())["policies"]
    assert [row["decoding"] for row in rows] == [None, "nucleus", "beam"]
    assert [row["noise_ratio"] for row in rows] == [row.noise_ratio for row in done[1].policies]


def test_a_purged_image_leaves_other_decodings_too_and_nothing_is_made_anew(
    done: tuple[FinishedCycle, Comparison], tmp_path: Path
) -> None:
    cycle = copied(done[0], tmp_path)
    lake = Lake.open(str(cycle.lake))
    [row] = query(
        lake, "SELECT image_id FROM variant_captions ORDER BY image_id LIMIT 1"
    ).to_pylist()
    purged = bootstrap(
        *("purge", "--image-id", row["image_id"], "--because", "asked to"),
        *("--lake", str(cycle.lake)),
        cwd=tmp_path,
    )
    assert purged.returncode == 0, purged.stdout[-1500:] + purged.stderr[-1500:]
    for table in ("variant_captions", "variant_scores", "variant_decisions"):
        left = query(
            lake, f"SELECT count(*) AS n FROM {table} WHERE image_id = $id", {"id": row["image_id"]}
        )
        assert left.to_pylist() == [{"n": 0}], table
    before = stamps(cycle.lake, "tables/variant_captions", "tables/variant_scores", "models")
    again = _compare(cycle, decodings=DECODINGS)
    assert (
        stamps(cycle.lake, "tables/variant_captions", "tables/variant_scores", "models") == before
    )
    assert [each.name for each in again.policies] == [each.name for each in done[1].policies]
