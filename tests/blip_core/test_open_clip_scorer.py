import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_texts import ODD
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from blip_core import CheckpointError, OpenCLIPScorer

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    },
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def open_clip() -> Any:
    return pytest.importorskip("open_clip", reason="pip install open_clip_torch (extra open_clip)")


@pytest.fixture(scope="module")
def folder(open_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as open_clip publishes them."""
    made = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    state = {k: v.contiguous() for k, v in open_clip.CLIP(**CONFIG).state_dict().items()}
    save_file(state, made / "open_clip_model.safetensors")
    pictures = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"model_cfg": CONFIG, "preprocess_cfg": {**pictures, "resize_mode": "shortest"}}
    (made / "open_clip_config.json").write_text(json.dumps(config))
    return made


def _pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (50, 40 + 30 * place, 3), dtype=np.uint8))
        for place in range(3)
    ]


def _pixels(scorer: OpenCLIPScorer) -> Tensor:
    return torch.stack([scorer.transform(picture) for picture in _pictures()])


def test_itc_sim_is_the_cosine_that_open_clip_gives(open_clip: Any, folder: Path) -> None:
    scorer = OpenCLIPScorer(str(folder))
    texts = ["a red circle", "two green squares", *ODD.values()]
    scores = scorer.score(_pixels(scorer), [texts, [], texts[:1]])
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    kept = [text.replace("\ud83c", "\ufffd") for text in texts]
    with torch.inference_mode():
        images = model.eval().encode_image(torch.stack([preprocess(p) for p in _pictures()]))
        features = model.encode_text(tokenizer(kept))
    images, features = (t / t.norm(dim=-1, keepdim=True) for t in (images, features))
    expected = (images @ features.T).numpy()
    assert expected.std() > 0.02
    short = np.array(
        [place for place, kind in enumerate(["", "", *ODD]) if "surrogate" not in kind]
    )
    found = np.array([score.itc_sim for score in scores[0]])
    np.testing.assert_allclose(found[short], expected[0][short], atol=1e-5)
    assert scores[1] == []
    assert scores[2][0].itc_sim == pytest.approx(expected[2][0], abs=1e-5)
    assert all(score.itm_prob is None for score in scores[0])


def test_transform_survives_pickling_and_knows_its_side(folder: Path) -> None:
    scorer = OpenCLIPScorer(str(folder))
    sent = pickle.loads(pickle.dumps(scorer.transform))
    assert torch.equal(sent(_pictures()[1]), scorer.transform(_pictures()[1]))
    assert sent.decode_px == 32


def test_folder_without_weights_is_refused_naming_what_is_needed(
    folder: Path, tmp_path: Path
) -> None:
    config = (folder / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(
        CheckpointError, match=r"cannot load .* open_clip_config.json and its weigh"
    ):
        OpenCLIPScorer(str(tmp_path))


def test_absent_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(
        CheckpointError, match="pip install open_clip_torch, or give a CLIP of tran"
    ):
        OpenCLIPScorer("some/model")
