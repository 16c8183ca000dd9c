import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign_models
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, VisionEncoderDecoderModel

from blip_core import CheckpointError, ConfigError, ForeignCaptioner
from blip_core.generation import CaptionConfig
from blip_core.sampling import nucleus_probs

SAMPLED = CaptionConfig(num_captions=3, max_new_tokens=6, top_p=0.9)
GREEDY = CaptionConfig(decoding="greedy", max_new_tokens=6)
NAMES = ["x", "y", "z"]
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Each model's folder, built when it is first asked for."""
    built: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in built:
            built[name] = foreign_models.CAPTIONERS[name](tmp_path_factory.mktemp(name))
        return built[name]

    return find


def _pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((50, 70), (64, 64), (40, 120))
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8).repeat(4, axis=1))
        for size in sizes
    ]


def _pixels(captioner: ForeignCaptioner) -> Tensor:
    return torch.stack([captioner.transform(picture) for picture in _pictures()])


def _own_generate(folder: Path, captioner: ForeignCaptioner, **options: Any) -> list[str]:
    """What a user of transformers gets, image by image."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    texts = []
    for picture in _pictures():
        if captioner.transform.side_px:
            picture = picture.resize((captioner.transform.side_px,) * 2, Image.Resampling.BICUBIC)
        start = 0
        if isinstance(model, VisionEncoderDecoderModel):
            inputs = {"pixel_values": captioner.transform(picture)[None]}
        else:
            processor = AutoProcessor.from_pretrained(folder)
            text = foreign_models.prompt_of(processor)
            inputs = processor(images=picture, **text, return_tensors="pt")
            if model.config.model_type == "blip":
                start = 1  # [DEC], which this tokenizer does not know as special
            elif not model.config.is_encoder_decoder and "input_ids" in inputs:
                start = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                min_new_tokens=1,
                max_new_tokens=6,
                forced_eos_token_id=None,
                **{"repetition_penalty": 1.0, **options},
            )
        texts.append(captioner.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("name", list(foreign_models.CAPTIONERS))
def test_captions_depend_on_seed_image_and_index_alone(folders: Folders, name: str) -> None:
    captioner = ForeignCaptioner(folders(name), SAMPLED)
    pixels = _pixels(captioner)
    together = captioner.caption(pixels, NAMES)
    assert [len(captions) for captions in together] == [3, 3, 3]
    assert len({caption.text for captions in together for caption in captions}) > 6
    turned = captioner.caption(pixels.flip(0), NAMES[::-1])[::-1]
    alone = [captioner.caption(pixels[i : i + 1], [NAMES[i]])[0] for i in range(3)]
    assert [[c.text for c in captions] for captions in turned] == _texts(together)
    assert _texts(alone) == _texts(together)
    expected = [c.mean_logprob for captions in together for c in captions]
    found = [c.mean_logprob for captions in alone for c in captions]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    other = ForeignCaptioner(folders(name), replace(SAMPLED, seed=1)).caption(pixels, NAMES)
    assert _texts(other) != _texts(together)
    fewer = ForeignCaptioner(folders(name), replace(SAMPLED, num_captions=1))
    assert _texts(fewer.caption(pixels, NAMES)) == [texts[:1] for texts in _texts(together)]


def _texts(found: list[list[Any]]) -> list[list[str]]:
    return [[caption.text for caption in captions] for captions in found]


@pytest.mark.parametrize("name", list(foreign_models.CAPTIONERS))
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GREEDY, {"do_sample": False, "num_beams": 1}),
        (replace(GREEDY, decoding="beam"), {"do_sample": False, "num_beams": 3}),
        (
            replace(GREEDY, decoding="beam", num_beams=2, length_penalty=-3.0),
            {"do_sample": False, "num_beams": 2, "length_penalty": -3.0},
        ),
        (replace(GREEDY, decoding="beam", num_beams=1), {"do_sample": False, "num_beams": 1}),
        (
            replace(GREEDY, repetition_penalty=4.0),
            {"do_sample": False, "num_beams": 1, "repetition_penalty": 4.0},
        ),
    ],
    ids=["greedy", "beam", "short_beam", "beam_of_one", "penalised"],
)
def test_searched_captions_are_those_of_transformers(
    folders: Folders, name: str, config: CaptionConfig, options: dict[str, Any]
) -> None:
    captioner = ForeignCaptioner(folders(name), config)
    found = captioner.caption(_pixels(captioner), NAMES)
    expected = _own_generate(folders(name), captioner, **{"length_penalty": 1.0, **options})
    assert [text for (text,) in _texts(found)] == expected
    for (caption,) in found:
        assert -math.log(400) * config.repetition_penalty < caption.mean_logprob < 0
        assert 1 <= caption.num_tokens <= 6


@pytest.mark.parametrize("name", list(foreign_models.CAPTIONERS))
def test_transform_survives_pickling_and_gives_every_picture_one_shape(
    folders: Folders, name: str
) -> None:
    captioner = ForeignCaptioner(folders(name), GREEDY)
    sent = pickle.loads(pickle.dumps(captioner.transform))
    for picture in _pictures():
        assert torch.equal(sent(picture), captioner.transform(picture))
    assert len({tuple(sent(picture).shape) for picture in _pictures()}) == 1
    assert sent.decode_px >= 32


def test_mean_logprob_is_that_of_the_caption_under_the_model(folders: Folders) -> None:
    config = replace(SAMPLED, num_captions=40, max_new_tokens=20, min_new_tokens=0, top_p=1.0)
    captioner = ForeignCaptioner(folders("vit_gpt2"), config)
    pixels = _pixels(captioner)[:1]
    (captions,) = captioner.caption(pixels, ["x"])
    keys = {caption.finish_reason for caption in captions}
    assert keys == {"sep", "length"}, "both ends occur among forty"
    for caption in captions:
        assert (caption.num_tokens == 20) == (caption.finish_reason == "length")
    (one,) = ForeignCaptioner(folders("vit_gpt2"), GREEDY).caption(pixels, ["x"])[0]
    model = AutoModelForImageTextToText.from_pretrained(folders("vit_gpt2")).eval()
    ids = [0]
    total = 0.0
    for _ in range(6):  # without a cache: another way to the same numbers
        with torch.inference_mode():
            logits = model(pixel_values=pixels, decoder_input_ids=torch.tensor([ids])).logits
        last = logits[0, -1].double()
        if len(ids) == 1:
            last[0] = -torch.inf  # the shortest caption has one token
        ids.append(int(last.argmax()))
        total += float(last.log_softmax(-1)[ids[-1]])
    assert one.mean_logprob == pytest.approx(total / 6, abs=1e-5)


def test_nucleus_draws_follow_the_models_probabilities(folders: Folders) -> None:
    config = CaptionConfig(num_captions=3000, max_new_tokens=1, top_p=0.8, temperature=0.2)
    captioner = ForeignCaptioner(folders("vit_gpt2"), config)
    pixels = _pixels(captioner)[:1]
    (captions,) = captioner.caption(pixels, ["x"])
    with torch.no_grad():
        start = torch.tensor([[0]])
        logits = captioner.model(pixel_values=pixels, decoder_input_ids=start).logits[:, -1]
    logits[:, 0] = -torch.inf
    probs = nucleus_probs(logits, config)[0]
    assert 5 < int((probs > 0).sum()) < 60
    expected: dict[str, float] = {}
    for token, probability in enumerate(probs.tolist()):
        text = captioner.tokenizer.decode([token]).strip()
        expected[text] = expected.get(text, 0.0) + probability
    counts = dict.fromkeys(expected, 0)
    for caption in captions:
        counts[caption.text] += 1
    assert all(expected[text] > 0 for text, count in counts.items() if count)
    distance = sum(abs(counts[text] / 3000 - p) for text, p in expected.items()) / 2
    assert distance < 0.05


def test_picture_that_gives_no_numbers_costs_its_own_captions_alone(folders: Folders) -> None:
    captioner = ForeignCaptioner(folders("blip"), SAMPLED)
    pixels = _pixels(captioner)
    sound = captioner.caption(pixels, NAMES)
    broken = pixels.clone()
    broken[1] = torch.nan
    found = captioner.caption(broken, NAMES)
    assert found[0] == sound[0]
    assert found[2] == sound[2]
    assert all(math.isnan(caption.mean_logprob) for caption in found[1])
    assert [(caption.text, caption.finish_reason) for caption in found[1]] == [("", "nan")] * 3
    (searched,) = ForeignCaptioner(folders("blip"), replace(GREEDY, decoding="beam")).caption(
        broken[1:2], ["y"]
    )
    assert (searched[0].text, searched[0].finish_reason) == ("", "nan")


def test_captioning_leaves_the_global_generator_alone(folders: Folders) -> None:
    captioner = ForeignCaptioner(folders("vit_gpt2"), SAMPLED)
    pixels = _pixels(captioner)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    captioner.caption(pixels, NAMES)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", ["blip", "blip2", "vit_gpt2", "qwen2_vl"])
def test_prompt_steers_the_caption_and_is_no_part_of_it(folders: Folders, name: str) -> None:
    with_prompt = replace(GREEDY, prompt="two green squares")
    plain, prompted = (ForeignCaptioner(folders(name), config) for config in (GREEDY, with_prompt))
    before = plain.caption(_pixels(plain), NAMES)
    after = prompted.caption(_pixels(prompted), NAMES)
    assert _texts(after) != _texts(before)
    assert all(caption.num_tokens <= 6 for (caption,) in after)
    assert not any(caption.text.startswith("two green") for (caption,) in after)


def test_retrieval_checkpoint_of_the_same_family_is_refused(tmp_path: Path) -> None:
    folder = foreign_models.blip_retrieval(tmp_path)
    with pytest.raises(CheckpointError, match="is a BlipForImageTextRetrieval, not a BlipFor"):
        ForeignCaptioner(folder, GREEDY)


def test_model_without_text_is_refused_naming_its_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'clip' model, which writes no text"):
        ForeignCaptioner(foreign_models.clip(tmp_path), GREEDY)


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        ("blip", "model.safetensors", "no weights at .*model.safetensors"),
        ("blip", "config.json", "config.json is not there"),
        ("blip", "processor_config.json", "the processor .* preprocessor_config.* save_pretrained"),
        ("blip", "[tv]o[kc]*", "the processor .* vocab.txt.* save_pretrained"),
        ("vit_gpt2", "preprocessor_config.json", "the image processor .* save_pretrained"),
        ("vit_gpt2", "tokenizer*", "the tokenizer .* save_pretrained"),
    ],
)
def test_folder_that_lacks_a_part_is_refused_naming_it(
    folders: Folders, tmp_path: Path, name: str, missing: str, said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders(name), folder)
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(CheckpointError, match=said) as caught:
        ForeignCaptioner(folder, GREEDY)
    assert str(folder) in str(caught.value)


def test_prompt_that_a_processor_refuses_is_an_error_of_settings(folders: Folders) -> None:
    with pytest.raises(ConfigError, match=r"refuses a picture with this prompt: .*<CAPTION>"):
        ForeignCaptioner(folders("florence2"), replace(GREEDY, prompt="<CAPTION> please"))


def test_decoding_of_the_released_blip_is_refused_for_other_models(folders: Folders) -> None:
    with pytest.raises(ConfigError, match=r"decoding official .* use nucleus, greedy or beam"):
        ForeignCaptioner(folders("blip"), CaptionConfig(decoding="official"))


def test_no_images_give_no_captions(folders: Folders) -> None:
    captioner = ForeignCaptioner(folders("blip"), GREEDY)
    assert captioner.caption(_pixels(captioner)[:0], []) == []


def test_images_without_ids_are_refused(folders: Folders) -> None:
    captioner = ForeignCaptioner(folders("blip"), GREEDY)
    with pytest.raises(ConfigError, match="3 images, but 1 image_ids"):
        captioner.caption(_pixels(captioner), ["x"])
