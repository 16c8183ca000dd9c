"""Finetuning and export of single models: what is refused before any work, and resumption."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip_core import MED, ConfigError, MEDConfig, MEDTokenizer, build_model, load_model, save_model
from flows.errors import MissingInput, SettingsError
from flows.finetune import WORK, finetune
from flows.model_export import export_model, write_folder
from flows.settings import BootstrapSettings, parse_settings
from storage import Lake, ModelRef, registry

TEXTS = ("a red ring", "two blue squares", "a green cross on white")


@pytest.fixture
def settings() -> BootstrapSettings:
    section = {"steps": 6, "batch_size": 4, "queue_size": 8, "checkpoint_every_steps": 2}
    values: dict[str, Any] = {
        "preset": None,
        "machine": {"device": "cpu", "num_threads": 1, "decode_workers": 1},
        "captioner": section,
        "filter": section,
    }
    return parse_settings(values)


@pytest.fixture
def captioned(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "images").mkdir()
    rng, rows = np.random.default_rng(0), []
    for index in range(6):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": TEXTS[index % 3]})
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"captions": captions, "images": tmp_path / "images"}


def _model(folder: Path, preset: str = "tiny") -> str:
    tokenizer = MEDTokenizer.train(TEXTS, vocab_size=64)
    model = build_model(MEDConfig.preset(preset, vocab_size=tokenizer.vocab_size), seed=0)
    save_model(model, tokenizer, folder)
    return str(folder)


def _ignore(done: int, total: int, note: str) -> None:
    pass


def test_finetune_makes_a_filter_with_the_role(
    tmp_path: Path, captioned: dict[str, Path], settings: BootstrapSettings
) -> None:
    start, out = _model(tmp_path / "start"), tmp_path / "out"
    finetune(start, out=out, settings=settings, role="filter", on_progress=_ignore, **captioned)
    assert MED.from_pretrained(out).config.heads == ("itc", "itm")


def test_finetune_keeps_the_best_model_on_pairs_held_back(
    tmp_path: Path,
    captioned: dict[str, Path],
    settings: BootstrapSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    early = {"dev_share": 0.4, "evaluate_every_steps": 2}
    settings = settings.with_changes({"captioner": early})
    start, out = _model(tmp_path / "start"), tmp_path / "out"
    with caplog.at_level(logging.INFO, logger="flows"):
        finetune(start, out=out, settings=settings, on_progress=_ignore, **captioned)
    assert re.search(
        r"captioner: the model is that of step [246] of 6, whose dev_loss", caplog.text
    )


def test_finetune_goes_on_from_its_checkpoint_after_a_stop(
    tmp_path: Path, captioned: dict[str, Path], settings: BootstrapSettings
) -> None:
    settings = settings.with_changes({"captioner": {"log_every_steps": 1}})
    start = _model(tmp_path / "start")
    seen: list[int] = []

    def stop_at_4(done: int, total: int, note: str) -> None:
        seen.append(done)
        if seen == [1, 2, 3, 4]:
            raise KeyboardInterrupt

    def run(out: Path) -> None:
        finetune(
            start, out=out, settings=settings, layout="own", on_progress=stop_at_4, **captioned
        )

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    run(tmp_path / "stopped")
    assert seen == [1, 2, 3, 4, 3, 4, 5, 6], "the checkpoint of step 2 was there, that of 4 not yet"
    run(tmp_path / "whole")
    stopped, whole = load_model(tmp_path / "stopped"), load_model(tmp_path / "whole")
    assert stopped.model_id == whole.model_id
    assert not (tmp_path / "stopped" / WORK).exists()


def test_finetune_leaves_folders_that_are_not_its_own(
    tmp_path: Path, captioned: dict[str, Path], settings: BootstrapSettings
) -> None:
    start, out = _model(tmp_path / "start"), tmp_path / "out"
    mine = out / "work" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    finetune(start, out=out, settings=settings, layout="own", on_progress=_ignore, **captioned)
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "work",
    ]


def test_finetune_refuses_a_work_folder_that_it_did_not_make(
    tmp_path: Path, captioned: dict[str, Path], settings: BootstrapSettings
) -> None:
    start, mine = _model(tmp_path / "start"), tmp_path / "out" / WORK / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(
        SettingsError, match=rf"{WORK} is not a folder of a finetuning .* rename it"
    ):
        finetune(start, out=tmp_path / "out", settings=settings, on_progress=_ignore, **captioned)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("is_empty", [False, True])
def test_finetune_killed_while_it_removed_its_work_is_finished(
    is_empty: bool, tmp_path: Path, captioned: dict[str, Path], settings: BootstrapSettings
) -> None:
    out = tmp_path / "out"
    _model(out)
    before = load_model(out).model_id
    work = out / WORK
    if is_empty:
        work.mkdir()
    else:
        Lake.open(str(work), create=True).scratch("start")
    finetune("not-read", out=out, settings=settings, on_progress=_ignore, **captioned)
    assert not work.exists()
    assert load_model(out).model_id == before


def test_finetune_takes_the_tokenizer_of_the_settings_for_a_folder_without_one(
    tmp_path: Path, captioned: dict[str, Path], settings: BootstrapSettings
) -> None:
    whole, bare, out = tmp_path / "start", tmp_path / "bare", tmp_path / "out"
    MED.from_pretrained(_model(whole)).save_pretrained(bare, "own")

    def run(settings: BootstrapSettings) -> None:
        finetune(
            str(bare), out=out, settings=settings, layout="own", on_progress=_ignore, **captioned
        )

    with pytest.raises(SettingsError, match=r"bare has no tokenizer: give model\.tokenizer"):
        run(settings)
    run(settings.with_changes({"model": {"tokenizer": str(whole)}}))
    expected = MEDTokenizer.from_pretrained(whole)
    assert (
        load_model(out)
        .tokenizer.encode(TEXTS, 16)
        .input_ids.equal(expected.encode(TEXTS, 16).input_ids)
    )


def test_finetune_refuses_a_layout_that_cannot_hold_the_model_before_it_trains(
    tmp_path: Path, captioned: dict[str, Path], settings: BootstrapSettings
) -> None:
    start, out = _model(tmp_path / "start", preset="nano"), tmp_path / "out"
    with pytest.raises(ConfigError, match="layout='own'"):
        finetune(start, out=out, settings=settings, on_progress=_ignore, **captioned)
    assert not out.exists()


def test_finetune_refuses_a_model_without_the_trained_head(
    tmp_path: Path, captioned: dict[str, Path], settings: BootstrapSettings
) -> None:
    start = MED.from_pretrained(_model(tmp_path / "start"))
    tokenizer = MEDTokenizer.from_pretrained(tmp_path / "start")
    start.save_pretrained(tmp_path / "retrieval", "hf-retrieval", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="finetuning a captioner needs the head 'lm'"):
        finetune(
            str(tmp_path / "retrieval"),
            out=tmp_path / "out",
            settings=settings,
            on_progress=_ignore,
            **captioned,
        )


def test_finetune_refuses_a_folder_that_holds_a_model(
    tmp_path: Path, captioned: dict[str, Path], settings: BootstrapSettings
) -> None:
    start = _model(tmp_path / "start")
    with pytest.raises(SettingsError, match="holds a model already"):
        finetune(start, out=Path(start), settings=settings, on_progress=_ignore, **captioned)


def test_export_names_the_round_that_is_not_there(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    with pytest.raises(MissingInput, match=re.escape("has no round 3; `bootstrap rounds`")):
        export_model(lake, "captioner", tmp_path / "out", round=3)


def _registered(lake: Lake, folder: Path, round: int, seed: int, stats: str) -> ModelRef:
    tokenizer = MEDTokenizer.train(TEXTS, vocab_size=64)
    model = build_model(MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size), seed=seed)
    save_model(model, tokenizer, folder)
    config = {"model": {"pixel_stats": stats}}
    return registry.register(
        lake, folder, role="med", round=round, parent_id=None, trained_on=None, config=config
    )


def test_export_writes_round_0_and_the_champion(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    with pytest.raises(MissingInput, match="no med of round 0; run `bootstrap pretrain`"):
        export_model(lake, "med", tmp_path / "out")
    pretrained = _registered(lake, tmp_path / "first", 0, seed=0, stats="imagenet")
    _registered(lake, tmp_path / "second", 1, seed=1, stats="clip")
    promoted = _registered(lake, tmp_path / "third", 2, seed=2, stats="clip")
    registry.promote(lake, pretrained.model_id, 0, "the first model")
    assert export_model(lake, "med", tmp_path / "now") == pretrained, "the others were no better"
    registry.promote(lake, promoted.model_id, 2, "better")
    assert export_model(lake, "med", tmp_path / "later", layout="own") == promoted
    assert load_model(tmp_path / "later").model_id == promoted.model_id
    assert export_model(lake, "med", tmp_path / "zero", round=0) == pretrained
    pixels = json.loads((tmp_path / "zero" / "preprocessor_config.json").read_text())
    assert pixels["image_mean"] == pytest.approx([0.485, 0.456, 0.406]), "as that model was trained"


def test_export_says_which_heads_a_layout_drops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(_model(tmp_path / "start"))
    with caplog.at_level(logging.WARNING):
        write_folder(loaded, tmp_path / "own", "own", "clip")
        assert caplog.text == ""
        write_folder(loaded, tmp_path / "theirs", "hf-captioning", "clip")
    assert "layout hf-captioning has no place for the heads itc, itm" in caplog.text
