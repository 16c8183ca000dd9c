"""Presets, merging and refusals: before anything runs."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.errors import SettingsError
from flows.settings import (
    TRAIN_ADDED_LATER,
    BootstrapSettings,
    describe,
    load_settings,
    merge,
    parse_settings,
    train_basis,
)
from flows.steps.curve import warn_if_stuck


def test_given_fields_win_over_the_preset_one_by_one() -> None:
    plain = load_settings("quickstart")
    changed = parse_settings({"preset": "quickstart", "pretrain": {"steps": 5, "warmup_steps": 0}})
    assert changed.pretrain.steps == 5
    assert changed.pretrain.batch_size == plain.pretrain.batch_size
    assert changed.captioner == plain.captioner


def test_deployment_parameters_are_merged_like_the_command_line() -> None:
    by_parameters = BootstrapSettings.model_validate({"machine": {"lake": "elsewhere"}})
    by_command = load_settings("quickstart", ["machine.lake=elsewhere"])
    assert by_parameters == by_command


def test_resolved_settings_survive_a_round_trip() -> None:
    settings = load_settings("base", ["decide.threshold=0.7"])
    assert parse_settings(settings.model_dump(mode="json")) == settings


def test_preset_may_be_a_path(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("seed: 11\nmodel: {preset: tiny}\n", encoding="utf-8")
    assert load_settings(str(mine)).seed == 11


@pytest.mark.parametrize("name", ["quickstart", "photos", "base", "large"])
def test_every_preset_loads(name: str) -> None:
    assert load_settings(name).preset == name


def test_presets_hold_the_papers_numbers() -> None:
    base, large = load_settings("base"), load_settings("large")
    assert (base.pretrain.batch_size, base.pretrain.learning_rate) == (2880, 3e-4)
    assert (large.pretrain.batch_size, large.pretrain.learning_rate) == (2400, 2e-4)
    assert base.caption.top_p == 0.9
    assert base.decide.threshold == 0.5
    assert base.pretrain.queue_size == 57_600
    assert base.pretrain.momentum == 0.995


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.stpes=5", "pretrain.stpes: no such setting; did you mean 'steps'?"),
        ("pretrian.steps=5", "pretrian: no such setting; did you mean 'pretrain'?"),
        ("pretrain.steps=0", "pretrain.steps: Input should be greater than or equal to 1"),
        ("caption.top_p=1.5", "caption.top_p: Input should be less than or equal to 1"),
        ("decide.threshold=often", "decide.threshold: Input should be a valid number"),
        ("pretrain.queue_size=3", "queue_size 3 is smaller than batch_size 64"),
        ("pretrain.warmup_steps=9000", "warmup_steps 9000 exceeds steps 500"),
        ("pretrain", "expected field=value"),
        ("ingest.url_lists=[{path: mine.csv}]", "add world: null"),
    ],
)
def test_bad_setting_is_refused_with_its_name(override: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings("quickstart", [override])
    assert said in str(refused.value)


def test_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(SettingsError, match="base, large, photos, quickstart"):
        load_settings("quickstrat")


def test_settings_are_frozen() -> None:
    settings = load_settings("quickstart")
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 3  # type: ignore[misc]


def test_every_field_is_described() -> None:
    undescribed = [line for line in describe(BootstrapSettings) if line.endswith(": ")]
    assert undescribed == []


def test_form_offers_no_defaults_that_would_win_over_the_preset() -> None:
    schema = BootstrapSettings.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    offered = [
        name
        for section in sections
        for name, field in section.get("properties", {}).items()
        if "default" in field
    ]
    assert offered == []


def test_machine_settings_do_not_make_another_round() -> None:
    here = load_settings("quickstart", ["machine.lake=a", "ingest.threads=2"])
    there = load_settings("quickstart", ["machine.lake=b", "ingest.threads=4"])
    assert here.as_basis() == there.as_basis()
    assert here.as_basis() != load_settings("quickstart", ["decide.threshold=0.6"]).as_basis()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"source_weights": {"web": 1, "synthetic": 1, "human": 2}}, "captions_per_epoch: one"),
        ({"captions_per_epoch": "one", "source_weights": {"web": 1}}, "they name web"),
        (
            {"captions_per_epoch": "one", "source_weights": {"web": 1, "crawl": 1, "human": 1}},
            "they name web, crawl, human",
        ),
        (
            {"captions_per_epoch": "one", "source_weights": {"web": 0, "synthetic": 0, "human": 0}},
            "all 0",
        ),
        (
            {
                "captions_per_epoch": "one",
                "source_weights": {"web": 1, "synthetic": -1, "human": 1},
            },
            "source_weights.synthetic",
        ),
    ],
)
def test_source_weights_that_could_not_be_drawn_by_are_refused(
    section: dict[str, object], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_settings({"preset": "quickstart", "retrain": section})


def test_drawn_captions_make_another_model_and_the_default_the_one_of_older_lakes() -> None:
    weights = ["source_weights.web=1", "source_weights.synthetic=1", "source_weights.human=2"]
    changes = [f"pretrain.{change}" for change in ("captions_per_epoch=one", *weights)]
    default = train_basis(load_settings("quickstart").pretrain)
    assert default.keys().isdisjoint({"captions_per_epoch", "source_weights"})
    assert train_basis(load_settings("quickstart", changes).pretrain) == default | {
        "captions_per_epoch": "one",
        "source_weights": {"web": 1.0, "synthetic": 1.0, "human": 2.0},
    }


def test_training_that_ends_at_the_constant_answer_says_so() -> None:
    assert warn_if_stuck("filter", [{"loss_itm": 0.70}, {"loss_itm": 0.6390}])
    assert not warn_if_stuck("filter", [{"loss_itm": 0.64}, {"loss_itm": 0.41}])
    assert not warn_if_stuck("captioner", [{"loss_itm": None}])


def test_merge_replaces_lists_and_merges_mappings() -> None:
    assert merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}}


def test_fields_younger_than_the_first_lakes_are_in_no_basis_at_their_defaults() -> None:
    basis = load_settings("quickstart", []).as_basis()
    assert not {"dropout", "text_depth"} & set(basis["model"])
    assert not set(TRAIN_ADDED_LATER) & set(basis["pretrain"])
    changed = load_settings("quickstart", ["model.dropout=0.2", "pretrain.fresh_lr_scale=2"])
    assert changed.as_basis()["model"]["dropout"] == 0.2
    assert changed.as_basis()["pretrain"]["fresh_lr_scale"] == 2


def test_batches_that_processes_cannot_share_equally_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"batch_size 64 .*train_processes 3"):
        load_settings("quickstart", ["machine.train_processes=3"])


def test_how_curation_runs_is_no_part_of_what_a_round_was_begun_with() -> None:
    plain = parse_settings({"preset": None})
    changes = {
        "machine": {"curate_processes": 4, "decode_in": "processes", "stop_grace_s": 0.0},
        "curate": {"fused": True},
        "caption": {"batch_size": "auto"},
        "score": {"batch_size": 7},
    }
    changed = parse_settings({"preset": None, **changes})
    assert changed.curate.fused
    assert changed.as_basis() == plain.as_basis()
    assert "curate" not in plain.as_basis(), "lakes of before know no such section"


@pytest.mark.parametrize("size", [0, -3, "fast", 1.5])
def test_batch_size_is_a_number_of_images_or_auto(size: object) -> None:
    with pytest.raises(SettingsError, match=r"caption\.batch_size"):
        parse_settings({"preset": None, "caption": {"batch_size": size}})
