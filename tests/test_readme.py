"""The README's sections on models: their blocks are run as they stand, on tiny models and pictures.

What the blocks name is made small: models with random weights, a preset of four steps, a lake whose
first round has a captioner.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import foreign_models
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from blip_core import MED, MEDConfig, MEDTokenizer, build_model, save_model
from flows.cli import parser, settings_from
from flows.settings import PRESET_FOLDER_VARIABLE, parse_settings
from storage import Lake, registry, rounds

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = ("a cook in a kitchen", "two dogs on a beach", "a picture of a red ring")
SECONDS = 120

TINY_PRESET = {
    "machine": {"device": "cpu", "num_threads": 1, "decode_workers": 1},
    "captioner": {"steps": 4, "learning_rate": 1e-3, "prompt": "a picture of "},
}


def _blocks(heading: str = "The model") -> list[tuple[str, str]]:
    """Language and text of every block of a section, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tokenizer() -> MEDTokenizer:
    return MEDTokenizer.train(CAPTIONS, vocab_size=64)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: MEDTokenizer) -> Path:
    """A folder with everything that the section names."""
    folder = tmp_path_factory.mktemp("readme")
    _draw(folder / "kitchen.jpg", seed=0)
    _save_theirs(
        transformers.BlipForImageTextRetrieval, folder / "models/blip-itm-base-coco", tokenizer
    )
    captioner = folder / "models/blip-image-captioning-base"
    _save_theirs(transformers.BlipForConditionalGeneration, captioner, tokenizer)
    _write_coco(folder / "data")
    _write_lake(folder / "lakes/mine", tokenizer)
    (folder / "configs").mkdir()
    (folder / "configs/base.yaml").write_text(json.dumps(TINY_PRESET))
    return folder


def _draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _save_theirs(model_class: type, folder: Path, tokenizer: MEDTokenizer) -> None:
    """A random model as transformers saves it, with a vocab.txt."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": tokenizer.vocab_size,
        "intermediate_size": 64,
        "max_position_embeddings": 48,
        "bos_token_id": tokenizer.dec_id,
        "eos_token_id": tokenizer.sep_id,
        "sep_token_id": tokenizer.sep_id,
        "pad_token_id": tokenizer.pad_id,
    }
    vision = {"intermediate_size": 64, "image_size": 32, "patch_size": 16}
    config = transformers.BlipConfig(
        text_config=size | text, vision_config=size | vision, image_text_hidden_size=16
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    path.unlink()


def _write_coco(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index in range(6):
        name = f"{index:012d}.jpg"
        _draw(folder / "images" / name, seed=index)
        images.append({"id": index, "file_name": name})
        annotations.append({"id": index, "image_id": index, "caption": CAPTIONS[index % 3]})
    captions = {"images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(captions))


def _write_lake(folder: Path, tokenizer: MEDTokenizer) -> None:
    """A lake whose round 1 has a captioner."""
    lake = Lake.open(str(folder), create=True)
    settings = parse_settings({"preset": None, "machine": {"lake": str(folder)}})
    rounds.begin_round(lake, 1, settings.as_basis())
    model = build_model(MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size), seed=0)
    local = lake.scratch("captioner")
    save_model(model, tokenizer, local)
    config = {"model": settings.model.model_dump(mode="json")}  # as a training leaves it
    registry.register(
        lake, local, role="captioner", round=1, parent_id=None, trained_on=None, config=config
    )


def _run_bash(text: str, cwd: Path) -> str:
    """Run a block as a shell does in the activated environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=cwd,
        env=os.environ | {"PATH": path, PRESET_FOLDER_VARIABLE: str(cwd / "configs")},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def _run_python(text: str) -> str:
    """Run a block in this process, which has imported blip_core."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
    return shown.getvalue()


def test_the_section_has_three_snippets() -> None:
    assert [language for language, _ in _blocks()] == ["python", "bash", "bash", "python"]


def test_a_caption_is_scored_with_a_folder_of_transformers(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    shown = _run_python(_blocks()[0][1])
    assert re.fullmatch(r"([01]\.\d{3} match, -?[01]\.\d{3} cosine\n){2}", shown)


def test_a_captioner_is_finetuned_into_a_folder_of_transformers(place: Path) -> None:
    _run_bash(_blocks()[1][1], place)
    folder = place / "models/my-captioner"
    start = MED.from_pretrained(place / "models/blip-image-captioning-base").state_dict()
    tuned = MED.from_pretrained(folder).state_dict()
    assert start.keys() == tuned.keys()
    assert any(not torch.equal(start[name], tuned[name]) for name in start)
    assert (
        transformers.BlipForConditionalGeneration.from_pretrained(folder).config.model_type
        == "blip"
    )
    assert not (folder / "work").exists()


def test_a_round_is_exported_and_transformers_captions_with_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run_bash(_blocks()[2][1], place)
    monkeypatch.chdir(place)
    assert re.fullmatch(r"[a-z][a-z ]+\n", _run_python(_blocks()[3][1]))


def test_a_picture_is_captioned_and_scored_by_other_peoples_models(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, command), (language, code) = _blocks("Other people's models")
    assert language == "python"
    foreign_models.blip2(place / "models/blip2")
    foreign_models.clip(place / "models/clip")
    monkeypatch.chdir(place)
    lines = _run_python(code).split("\n")
    assert len([line for line in lines if re.match(r"[+-]0\.\d{3} ", line)]) == 3
    options = parser().parse_args(shlex.split(command.replace("\\\n", " "))[1:])
    options.preset = "quickstart"
    settings = settings_from(options)
    assert (settings.caption.captioner, settings.score.scorer) == (
        "hf:models/blip2",
        "clip:models/clip",
    )
    assert (settings.decide.policy, settings.decide.threshold) == ("itc", 0.28)
