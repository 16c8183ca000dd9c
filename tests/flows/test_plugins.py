"""A captioner from the user's own file captions a round, and what is wrong with one is said."""

import json
from pathlib import Path

import pytest
import torch
from cycle import FinishedCycle, before_captioning

from blip_core import CaptionConfig
from flows import models
from flows.errors import SettingsError
from flows.plugins import plugin_captioner, plugin_id
from flows.session import Run
from flows.settings import parse_settings
from flows.steps.collapse import measure_captions
from flows.steps.curate_shards import curate_shards
from storage import Lake, query

GOOD = """
import math
from blip_core import EvalTransform, GeneratedCaption

class Shouter:
    transform = EvalTransform(32, quick=True)

    def caption(self, pixel_values, image_ids):
        assert pixel_values.shape[1:] == (3, 32, 32)
        return [[GeneratedCaption(f"look at {i[:4]}", 3, math.nan, "sep")] for i in image_ids]

def shouter(config, device):
    return Shouter()

def broken(config, device):
    return object()
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "my_captioner.py"
    path.write_text(GOOD, encoding="utf-8")
    return path


def test_captioner_of_ones_own_captions_a_round_under_an_id_of_its_file(
    finished: FinishedCycle, plugin: Path, tmp_path: Path
) -> None:
    cycle = before_captioning(finished, tmp_path / "copy")
    settings = json.loads(json.dumps(cycle.settings))
    settings["caption"]["captioner"] = f"python:{plugin}:shouter"
    run = Run(Lake.open(str(cycle.lake)), parse_settings(settings), 1)
    with run.lake.lock("test"):
        ref = models.captioner_ref(run)
        curate_shards(run, ref, None, lambda done, total, note: None)
        assert measure_captions(run) == [], "too few images to compare"
    assert ref.model_id == plugin_id(f"{plugin}:shouter")
    rows = query(run.lake, "FROM captions WHERE source = 'synthetic' AND round = 1").to_pylist()
    assert len(rows) > 30
    assert all(row["caption"] == f"look at {row['image_id'][:4]}" for row in rows)
    assert {(row["model_id"], row["mean_logprob"]) for row in rows} == {(ref.model_id, None)}
    plugin.write_text(GOOD.replace("look at", "see"), encoding="utf-8")
    assert plugin_id(f"{plugin}:shouter") != ref.model_id, "another file is another captioner"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("{}", "names no function"),
        ("no/such/file.py:f", r"there is no no/such/file\.py"),
        ("no_such_module_here:f", "there is no no_such_module_here"),
        ("{}:absent", "has no absent"),
        ("{}:broken", r"gave something \(object\) without `caption`"),
    ],
)
def test_captioner_that_cannot_be_made_is_named_with_the_remedy(
    plugin: Path, where: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        plugin_captioner(where.format(plugin), CaptionConfig(), torch.device("cpu"))


def test_captioner_whose_file_fails_says_how(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import no_such_thing\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="cannot be imported: ModuleNotFoundError"):
        plugin_captioner(f"{path}:f", CaptionConfig(), torch.device("cpu"))


def test_captioner_of_a_module_is_found_by_its_name() -> None:
    where = "flows.quickstart.scenes:describe"
    assert len(plugin_id(where)) == 32
    assert plugin_id(where) != plugin_id("flows.quickstart.scenes:parse")
