"""The public surface that other programs build on."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip_core import MED, ConfigError, MEDConfig, MEDTokenizer, build_model

PROMISED = {
    "from_pretrained": ["path_or_repo"],
    "save_pretrained": ["path", "layout"],
    "encode_image": ["pixel_values"],
    "image_features": ["image_embeds"],
    "text_features": ["text_input_ids", "text_attention_mask"],
    "itm_logits": ["image_embeds", "encoder_input_ids", "text_attention_mask"],
    "lm_logits": ["image_embeds", "decoder_input_ids", "text_attention_mask"],
    "generate": ["pixel_values"],
}


@pytest.mark.parametrize("name", PROMISED)
def test_a_method_takes_what_is_promised_and_needs_no_more(name: str) -> None:
    method = getattr(MED, name)
    given = [each for each in inspect.signature(method).parameters.values() if each.name != "self"]
    promised = PROMISED[name]
    assert [each.name for each in given[: len(promised)]] == promised
    assert all(each.kind is each.POSITIONAL_OR_KEYWORD for each in given[: len(promised)])
    assert all(each.default is not each.empty for each in given[len(promised) :])
    assert all(each.annotation is not each.empty for each in given)
    assert method.__doc__
    assert inspect.signature(method).return_annotation is not inspect.Signature.empty


def test_layouts_are_the_three_that_are_promised() -> None:
    layout = inspect.signature(MED.save_pretrained).parameters["layout"]
    assert layout.default == "own"
    assert set(layout.annotation.__args__) == {"own", "hf-captioning", "hf-retrieval"}


@pytest.mark.parametrize("name", ["nano", "tiny", "small", "base", "large"])
def test_presets_are_there_by_name(name: str) -> None:
    assert MEDConfig.preset(name).heads == ("itc", "itm", "lm")


@torch.no_grad()
def test_everything_but_the_tokenizer_works_from_a_folder_that_holds_none(
    tmp_path: Path, pixel_values: Tensor
) -> None:
    config = MEDConfig.preset("tiny", vocab_size=90)
    build_model(config, seed=0).save_pretrained(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert not names & {"tokenizer.json", "vocab.txt"}
    model = MED.from_pretrained(tmp_path / "model")
    images, num_images = pixel_values[:3], 3
    ids = torch.randint(5, 80, (num_images, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    embeds = model.encode_image(images)
    assert embeds.shape == (num_images, 1 + (32 // 16) ** 2, config.vision.width)
    assert model.image_features(embeds).shape == (num_images, config.embed_width)
    assert model.text_features(ids, mask).shape == (num_images, config.embed_width)
    assert model.itm_logits(embeds, ids, mask).shape == (num_images, 2)
    assert model.lm_logits(embeds, ids, mask).shape == (num_images, 7, 90)
    written = model.generate(images, prompt_ids=[5], sep_id=6)
    assert len(written.ids) == num_images


@pytest.mark.parametrize(
    ("heads", "asked", "said"),
    [
        (("lm",), "itm_logits", "a retrieval checkpoint"),
        (("itc", "itm"), "lm_logits", "a captioning checkpoint"),
    ],
)
def test_a_head_that_a_checkpoint_lacks_is_a_clear_error(
    heads: tuple[str, ...], asked: str, said: str, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    config = MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size, heads=heads)
    model = build_model(config, seed=0)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match=said):
        getattr(model, asked)(model.encode_image(pixel_values[:1]), ids, torch.ones_like(ids))
