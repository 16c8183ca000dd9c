import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import foreign_models
import numpy as np
import pytest
import torch
from odd_texts import ODD
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from blip_core import CheckpointError, CLIPScorer, ConfigError, PairScore
from blip_core import clip_scorer as module

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    built = {
        name: build(tmp_path_factory.mktemp(name)) for name, build in foreign_models.SCORERS.items()
    }
    return built.__getitem__


def _pictures(number: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [
        Image.fromarray(rng.integers(0, 256, (60, 40 + 20 * place, 3), dtype=np.uint8))
        for place in range(number)
    ]


def _pixels(scorer: CLIPScorer) -> Tensor:
    return torch.stack([scorer.transform(picture) for picture in _pictures()])


@pytest.mark.parametrize("name", list(foreign_models.SCORERS))
def test_itc_sim_is_the_cosine_that_transformers_gives(folders: Folders, name: str) -> None:
    folder = folders(name)
    scorer = CLIPScorer(folder)
    texts = foreign_models.TEXTS
    scores = scorer.score(_pixels(scorer), [texts] * 3)
    model, processor = (
        AutoModel.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    inputs = processor(
        images=_pictures(),
        text=texts,
        padding="max_length",
        max_length=scorer.max_text_tokens,
        return_tensors="pt",
    )
    if name == "siglip":
        del inputs["attention_mask"]  # its published tokenizer makes none
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        found = model(**inputs)
    expected = (found.image_embeds @ found.text_embeds.T).numpy()
    assert expected.std() > 0.05
    np.testing.assert_allclose([[s.itc_sim for s in row] for row in scores], expected, atol=1e-5)
    assert all(score.itm_prob is None for row in scores for score in row)


@pytest.mark.parametrize("name", list(foreign_models.SCORERS))
def test_scores_do_not_depend_on_company(folders: Folders, name: str) -> None:
    texts = [["a red circle", *ODD.values()], [], ["two green squares", "a red circle"]]
    scorer = CLIPScorer(folders(name))
    pixels = _pixels(scorer)
    together = scorer.score(pixels, texts)
    assert [len(row) for row in together] == [11, 0, 2]
    for place, of_image in enumerate(texts):
        for text, score in zip(of_image, together[place], strict=True):
            fresh = CLIPScorer(folders(name)) if text == ODD["emoji"] else scorer
            ((alone,),) = fresh.score(pixels[place : place + 1], [[text]])
            assert alone.itc_sim == pytest.approx(score.itc_sim, abs=1e-6)


@pytest.mark.parametrize("name", list(foreign_models.SCORERS))
@pytest.mark.parametrize("kind", list(ODD))
def test_odd_text_gets_a_number_and_its_neighbours_keep_theirs(
    folders: Folders, name: str, kind: str
) -> None:
    scorer = CLIPScorer(folders(name))
    pixels = _pixels(scorer)[:1]
    (with_odd,) = scorer.score(pixels, [["a red circle", ODD[kind], "it is 7"]])
    (without,) = CLIPScorer(folders(name)).score(pixels, [["a red circle", "it is 7"]])
    assert -1 <= with_odd[1].itc_sim <= 1
    np.testing.assert_allclose(
        [with_odd[0].itc_sim, with_odd[2].itc_sim], [s.itc_sim for s in without], atol=1e-6
    )


def test_text_beyond_the_limit_is_cut_there(folders: Folders) -> None:
    scorer = CLIPScorer(folders("clip"))
    assert scorer.max_text_tokens == 24
    long = "x " * 60
    (scores,) = scorer.score(_pixels(scorer)[:1], [[long, long + "a red circle", long[:20]]])
    assert scores[0] == scores[1] != scores[2]
    assert CLIPScorer(folders("clip"), max_text_tokens=9).max_text_tokens == 9


def test_text_features_are_computed_once_and_the_cache_is_bounded(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Counting(CLIPScorer):
        def __post_init__(self) -> None:
            super().__init__(folders("clip"))
            self.asked: list[str] = []

        def text_features(self, texts: list[str]) -> Tensor:
            self.asked += texts
            return super().text_features(texts)

    monkeypatch.setattr(module, "MAX_CACHED_TEXTS", 2)
    scorer = Counting()
    pixels = _pixels(scorer)
    texts = [["a", "b"], ["b", "a", "b"], []]
    first = scorer.score(pixels, texts)
    assert scorer.asked == ["a", "b"]
    assert scorer.score(pixels, texts) == first
    assert scorer.asked == ["a", "b"]
    scorer.score(pixels[:1], [["c"]])
    scorer.score(pixels[:1], [["a", "b", "c"]])
    assert len(scorer.asked) < 7, "what is in use is not computed again"
    assert len(scorer._cache) == 2
    scorer.asked.clear()
    scorer.forget_texts()
    scorer.score(pixels[:1], [["c"]])
    assert scorer.asked == ["c"]


def test_score_of_a_picture_without_numbers_is_not_a_number_and_others_keep_theirs(
    folders: Folders,
) -> None:
    scorer = CLIPScorer(folders("clip"))
    pixels = _pixels(scorer)
    texts = [["a red circle"]] * 3
    sound = scorer.score(pixels, texts)
    pixels[1] = torch.nan
    found = scorer.score(pixels, texts)
    assert np.isnan(found[1][0].itc_sim)
    assert (found[0], found[2]) == (sound[0], sound[2])


@pytest.mark.parametrize("name", list(foreign_models.SCORERS))
def test_transform_is_that_of_the_models_processor_and_survives_pickling(
    folders: Folders, name: str
) -> None:
    scorer = CLIPScorer(folders(name))
    processor = AutoProcessor.from_pretrained(folders(name))
    sent = pickle.loads(pickle.dumps(scorer.transform))
    for picture in _pictures():
        expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(sent(picture), expected)
    assert sent.decode_px == 32


def test_no_texts_need_no_model(folders: Folders) -> None:
    scorer = CLIPScorer(folders("clip"))
    assert scorer.score(_pixels(scorer), [[], [], []]) == [[], [], []]
    with pytest.raises(ConfigError, match="3 images, but 1 lists of texts"):
        scorer.score(_pixels(scorer), [["a"]])


def test_folder_of_another_kind_is_refused_naming_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'blip' model, .* one of .*clip.*siglip"):
        CLIPScorer(foreign_models.blip(tmp_path))


@pytest.mark.parametrize(
    ("missing", "said"),
    [("processor_config.json", "the image processor"), ("tokenizer*", "the tokenizer")],
)
def test_folder_that_lacks_a_part_is_refused_naming_it(
    folders: Folders, tmp_path: Path, missing: str, said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders("clip"), folder)
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(CheckpointError, match=f"{said} of .* save it beside the model"):
        CLIPScorer(folder)


def test_tokenizer_of_a_larger_vocabulary_is_refused(folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders("clip"), folder)
    tokenizer = foreign_models.clip_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"has 309 tokens, the model 300"):
        CLIPScorer(folder)


def test_pair_scores_have_no_match_probability(folders: Folders) -> None:
    scorer = CLIPScorer(folders("siglip"))
    ((score,), _, _) = scorer.score(_pixels(scorer), [["a"], [], []])
    assert isinstance(score, PairScore)
    assert score.itm_prob is None
