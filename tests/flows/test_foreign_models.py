"""Rounds that caption and score with models that were not trained here."""

import dataclasses
import json
import shutil
from pathlib import Path

import foreign_models
import pytest
import torch
from cycle import FinishedCycle, bootstrap, drop_later_rounds, stamps, write_settings

from blip_core import MED, BlipError, CheckpointError, MEDCaptioner, save_official
from flows import models
from flows.errors import SettingsError
from flows.foreign_models import require_unchanged
from flows.session import Run
from flows.settings import curate_basis, load_settings, parse_settings
from flows.steps.caption import caption_basis
from flows.steps.curate_shards import curate_shards
from flows.steps.decide import decide_round
from flows.steps.variants import write_variant
from storage import (
    ConfigError,
    Lake,
    drop_part,
    list_parts,
    part_manifest,
    query,
    registry,
)

MADE = ("captions/round=0001", "scores", "decisions", "models", "metrics", "rounds")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    built = tmp_path_factory.mktemp("foreign")
    made = {name: foreign_models.CAPTIONERS[name](built / name) for name in ("blip", "vit_gpt2")}
    made["clip"] = foreign_models.clip(built / "clip")
    made["retrieval"] = foreign_models.blip_retrieval(built / "retrieval")
    made["pth"] = built / "retrieval.pth"
    save_official(MED.from_pretrained(made["retrieval"]), made["pth"])
    return made


@pytest.fixture
def taken_in(finished: FinishedCycle, tmp_path: Path) -> FinishedCycle:
    """The lake as it was when pictures and texts had come in, and nothing else was done."""
    lake = tmp_path / "lake"
    shutil.copytree(finished.lake, lake)
    for folder in (*(f"tables/{name}" for name in MADE), "models", "rounds", "reports"):
        shutil.rmtree(lake / folder, ignore_errors=True)
    drop_later_rounds(lake)
    settings = finished.settings | {"machine": finished.settings["machine"] | {"lake": str(lake)}}
    config = write_settings(tmp_path / "tiny.yaml", settings)
    return FinishedCycle(tmp_path, lake, config, settings, "")


def _changed(cycle: FinishedCycle, **sections: dict) -> Run:
    settings = json.loads(json.dumps(cycle.settings))
    for name, fields in sections.items():
        settings[name] = {**settings[name], **fields}
    return Run(Lake.open(str(cycle.lake)), parse_settings(settings), 1)


def test_curate_captions_and_scores_with_the_models_that_are_named(
    taken_in: FinishedCycle, folders: dict[str, Path], tmp_path: Path, api_url: str
) -> None:
    def curate(*more: str) -> str:
        done = bootstrap(
            "curate",
            "--config",
            str(taken_in.config),
            "--captioner",
            f"hf:{folders['blip']}",
            "--scorer",
            f"clip:{folders['clip']}",
            *more,
            cwd=tmp_path,
            api_url=api_url,
        )
        return f"{done.returncode} {' '.join(done.stderr.split())}"

    refused = curate()
    assert refused.startswith("2 ")
    assert f"policy blip decides by itm_prob, which score.scorer clip:{folders['clip']} " in refused
    assert "decide.policy: itc" in refused
    assert not list((taken_in.lake / "tables" / "captions" / "round=0001").glob("*"))
    by_cosine = ("--set", "decide.policy=itc", "--set", "decide.threshold=0.05")
    assert curate(*by_cosine).startswith("0 ")
    lake = Lake.open(str(taken_in.lake), read_only=True)
    roles = {row["role"]: row for row in query(lake, "SELECT * FROM models").to_pylist()}
    assert set(roles) == {"foreign_captioner", "foreign_scorer"}
    writer, judge = roles["foreign_captioner"], roles["foreign_scorer"]
    assert (writer["path"], judge["path"]) == (f"hf:{folders['blip']}", f"clip:{folders['clip']}")
    assert registry.lineage_of(lake, judge["model_id"])["config"]["model_type"] == "clip"
    said = query(lake, "SELECT * FROM captions WHERE source = 'synthetic'").to_pylist()
    assert {row["model_id"] for row in said} == {writer["model_id"]}
    assert len({row["caption"] for row in said}) > 30
    scores = query(lake, "SELECT * FROM scores").to_pylist()
    assert {(row["model_id"], row["status"]) for row in scores} == {(judge["model_id"], "ok")}
    assert {row["itm_prob"] for row in scores} == {None}
    assert len({row["itc_sim"] for row in scores}) > 60
    verdicts = query(lake, "SELECT kept, itc_sim, reason FROM verdicts").to_pylist()
    assert len(verdicts) == len(scores)
    assert all(row["kept"] == (row["itc_sim"] >= 0.05) for row in verdicts)
    assert {row["kept"] for row in verdicts} == {True, False}
    before = stamps(taken_in.lake, "tables")
    assert curate(*by_cosine).startswith("0 ")
    assert stamps(taken_in.lake, "tables") == before, "found, not made again"
    beside = _changed(
        taken_in,
        caption={"captioner": writer["path"]},
        score={"scorer": judge["path"]},
        decide={"policy": "itc", "threshold": 0.05},
    )
    write_variant(beside, "beam", lambda *told: None)
    searched = query(beside.lake, "SELECT * FROM variant_captions").to_pylist()
    assert len(searched) == len(said)
    assert {(row["model_id"], row["top_p"]) for row in searched} == {(writer["model_id"], None)}
    assert query(beside.lake, "FROM variant_scores WHERE itc_sim IS NOT NULL").num_rows > 30
    after = stamps(taken_in.lake, "tables")
    assert {path: after[path] for path in before} == before, "the round is as it was"
    ref = registry.find(lake, "foreign_captioner", 1)
    assert ref is not None
    with pytest.raises(SettingsError, match=r"other weights .* than round 1 worked with"):
        require_unchanged(dataclasses.replace(ref, model_id="0" * 32))


def test_blip_of_elsewhere_writes_and_judges_with_both_numbers(
    taken_in: FinishedCycle, folders: dict[str, Path]
) -> None:
    run = _changed(
        taken_in,
        caption={"captioner": f"blip:{folders['blip']}"},
        score={"scorer": f"blip:{folders['retrieval']}"},
    )
    writer, judge = models.captioner_ref(run), models.scorer_ref(run)
    assert isinstance(models.captioner_of(run, writer), MEDCaptioner), "not the slower generate"
    curate_shards(run, writer, judge, lambda *told: None)
    decide_round(run)
    rows = query(
        run.lake,
        "SELECT c.model_id AS writer, s.model_id AS judge, v.itm_prob, v.itc_sim, v.kept "
        "FROM verdicts v JOIN captions c USING (caption_id) JOIN scores s USING (caption_id) "
        "WHERE c.source = 'synthetic'",
    ).to_pylist()
    assert len(rows) > 30
    assert {(row["writer"], row["judge"]) for row in rows} == {(writer.model_id, judge.model_id)}
    assert all(0 <= row["itm_prob"] <= 1 and -1 <= row["itc_sim"] <= 1 for row in rows)
    assert all(row["kept"] == (row["itm_prob"] >= 0.2) for row in rows)


def test_pth_of_blips_authors_judges_as_the_folder_does(
    taken_in: FinishedCycle, folders: dict[str, Path]
) -> None:
    found = []
    for name in ("retrieval", "pth"):
        run = _changed(
            taken_in,
            score={"scorer": f"blip:{folders[name]}"},
            model={"tokenizer": str(folders["retrieval"])},
        )
        scorer = models.scorer_of(run, models.scorer_ref(run))
        pixels = torch.zeros(1, 3, 32, 32)
        ((score,),) = scorer.score(pixels, [["a red circle"]])
        found.append(score)
    # not to the last digit: the authors' norms have another epsilon than a new config of transformers
    assert found[0].itm_prob == pytest.approx(found[1].itm_prob, abs=1e-3)
    run = _changed(taken_in, score={"scorer": f"blip:{folders['pth']}"})
    with pytest.raises(
        SettingsError, match=r"retrieval.pth has no tokenizer: give model.tokenizer"
    ):
        models.scorer_of(run, models.scorer_ref(run))
    lost = _changed(taken_in, score={"scorer": "blip:lost.pth"})
    with pytest.raises(CheckpointError, match=r"no weights at lost.pth"):
        models.scorer_ref(lost)


def test_captioning_blip_cannot_judge(taken_in: FinishedCycle, folders: dict[str, Path]) -> None:
    run = _changed(taken_in, score={"scorer": f"blip:{folders['blip']}"})
    with pytest.raises(BlipError, match="a scorer needs the head 'itc', but this model has lm"):
        models.scorer_of(run, models.scorer_ref(run))


def test_one_pass_makes_the_rows_of_two(taken_in: FinishedCycle, folders: dict[str, Path]) -> None:
    run = _changed(
        taken_in,
        caption={"captioner": f"hf:{folders['vit_gpt2']}", "num_captions": 2},
        score={"scorer": f"clip:{folders['clip']}"},
        decide={"policy": "itc"},
    )
    writer, judge = models.captioner_ref(run), models.scorer_ref(run)
    found = []
    for passes in ([(writer, None), (None, judge)], [(writer, judge)]):
        for refs in passes:
            curate_shards(run, *refs, lambda *told: None)
        parts = [
            part for table in ("captions", "scores") for part in list_parts(run.lake, table, 1)
        ]
        found.append([part_manifest(run.lake, part).sha256 for part in parts])
        for part in parts:
            drop_part(run.lake, part)
    assert found[0] == found[1]
    assert len(found[0]) == 6


def test_decide_refuses_the_policy_before_it_writes_whatever_the_settings_say(
    taken_in: FinishedCycle, folders: dict[str, Path], curated: None
) -> None:
    run = _changed(taken_in)  # the settings of another round: no foreign scorer, policy blip
    with pytest.raises(
        ConfigError, match=r"policy blip decides by itm_prob, which model .*\(clip:"
    ):
        decide_round(run)
    assert list_parts(run.lake, "decisions", 1) == []


@pytest.fixture
def curated(taken_in: FinishedCycle, folders: dict[str, Path]) -> None:
    """Captions and scores of foreign models, made by the stages' own step."""
    run = _changed(
        taken_in,
        caption={"captioner": f"hf:{folders['vit_gpt2']}"},
        score={"scorer": f"clip:{folders['clip']}"},
        decide={"policy": "itc"},
    )
    for refs in ((models.captioner_ref(run), None), (None, models.scorer_ref(run))):
        curate_shards(run, *refs, lambda *told: None)


def test_basis_follows_weights_and_tokenizer_and_not_the_folder(
    taken_in: FinishedCycle, folders: dict[str, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folders["blip"], moved)

    def basis(folder: Path) -> object:
        run = _changed(taken_in, caption={"captioner": f"hf:{folder}"})
        return caption_basis(run, [], models.captioner_ref(run))

    first = basis(folders["blip"])
    assert basis(moved) == first
    other = tmp_path / "other"
    shutil.copytree(folders["blip"], other)
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 9}))
    assert basis(other) != first


def test_settings_that_name_no_foreign_model_keep_their_basis() -> None:
    settings = load_settings("quickstart")
    assert not {"captioner", "dtype"} & set(curate_basis(settings.caption))
    assert set(curate_basis(settings.score)) == {"max_text_tokens"}
    assert set(settings.as_basis()["score"]) == {"max_text_tokens"}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("caption.captioner", "clip:some/model", "caption.captioner"),
        ("caption.captioner", "hf:", "caption.captioner"),
        ("score.scorer", "hf:some/model", "score.scorer"),
        ("score.scorer", "clip:some/model", "policy blip decides by itm_prob"),
        (
            "decide.policy",
            "nobodys",
            "policy 'nobodys' is unknown; there are all, best_of, blip, itc",
        ),
    ],
)
def test_reference_of_the_wrong_kind_is_refused_with_the_field(
    field: str, value: str, said: str
) -> None:
    section, name = field.split(".")
    scorer = {"score": {"scorer": "clip:x"}} if section == "decide" else {}
    given = {"preset": "quickstart", section: {name: value}} | scorer
    with pytest.raises(SettingsError) as caught:
        parse_settings(given)
    assert said in str(caught.value)
    assert value in str(caught.value)


def test_model_that_is_not_there_is_named(taken_in: FinishedCycle, tmp_path: Path) -> None:
    run = _changed(taken_in, caption={"captioner": f"hf:{tmp_path}/gone"})
    with pytest.raises(Exception, match=f"no model at {tmp_path}/gone: there is no such folder"):
        models.captioner_ref(run)
    assert registry.list_models(run.lake) == []
