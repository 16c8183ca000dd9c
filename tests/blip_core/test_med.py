import dataclasses
import math

import pytest
import torch
from torch import Tensor

from blip_core import (
    MED,
    CaptionConfig,
    ConfigError,
    MEDCaptioner,
    MEDConfig,
    MEDScorer,
    MEDTokenizer,
    build_model,
)
from blip_core.config import Head
from blip_core.med import select_images
from blip_core.momentum import MomentumEncoders


@pytest.mark.parametrize(
    ("name", "heads", "image_size_px", "millions"),
    [
        ("base", ("itc", "itm", "lm"), 224, 252.44),
        ("large", ("itc", "itm", "lm"), 224, 474.73),
        ("base", ("lm",), 384, 223.97),
        ("large", ("lm",), 384, 446.29),
        ("base", ("itc", "itm"), 384, 223.74),
        ("large", ("itc", "itm"), 384, 446.13),
    ],
)
def test_unique_parameters_are_those_of_the_paper(
    name: str, heads: tuple[Head, ...], image_size_px: int, millions: float
) -> None:
    with torch.device("meta"):
        model = MED(MEDConfig.preset(name, heads=heads, image_size_px=image_size_px))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("heads", "absent"),
    [
        (("lm",), {"vision_proj", "text_proj", "itm_head", "logit_scale", "encoder_attention"}),
        (("itc", "itm"), {"lm_head", "decoder_attention"}),
        (("itc",), {"lm_head", "itm_head", "decoder_attention", "cross_attention"}),
        ((), {"vision_proj", "itm_head", "lm_head", "logit_scale", "decoder_attention"}),
    ],
)
def test_a_model_has_no_parameters_of_heads_that_it_lacks(
    heads: tuple[Head, ...], absent: set[str]
) -> None:
    whole = {name for name, _ in MED(MEDConfig.preset("tiny")).named_parameters()}
    found = {name for name, _ in MED(MEDConfig.preset("tiny", heads=heads)).named_parameters()}
    assert found < whole
    assert {part for name in whole - found for part in absent if part in name} == absent
    assert not [name for name in found if any(part in name for part in absent)]


def test_heads_decide_what_a_model_answers(pixel_values: Tensor) -> None:
    ids = torch.tensor([[5, 8, 9]])
    mask = torch.ones_like(ids)
    captioner = build_model(MEDConfig.preset("tiny", heads=("lm",)), seed=0).eval()
    scorer = build_model(MEDConfig.preset("tiny", heads=("itm", "itc")), seed=0).eval()
    embeds = captioner.encode_image(pixel_values[:1])
    assert captioner.lm_logits(embeds, ids, mask).shape == (1, 3, 64)
    assert scorer.itm_logits(embeds, ids, mask).shape == (1, 2)
    captioner.clamp_scale()
    needs = "needs the head 'itm', but this model has lm: load a retrieval checkpoint"
    with pytest.raises(ConfigError, match=f"itm_logits {needs}"):
        captioner.itm_logits(embeds, ids, mask)
    for answer in (
        lambda: captioner.image_features(embeds),
        lambda: captioner.text_features(ids, mask),
        lambda: captioner.scale,
        lambda: MomentumEncoders(captioner, queue_size=4),
    ):
        with pytest.raises(ConfigError, match="needs the head 'itc', but this model has lm"):
            answer()
    for answer in (
        lambda: scorer.lm_logits(embeds, ids, mask),
        lambda: scorer.generate(pixel_values[:1], [5], sep_id=3),
    ):
        with pytest.raises(
            ConfigError, match="'lm', but this model has itc, itm: load a captioning"
        ):
            answer()


def test_captioner_and_scorer_refuse_a_model_without_their_head(tokenizer: MEDTokenizer) -> None:
    config = MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size, heads=("lm",))
    with pytest.raises(ConfigError, match="a scorer needs the head 'itc', but this model has lm"):
        MEDScorer(MED(config), tokenizer)
    config = MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size, heads=("itc", "itm"))
    with pytest.raises(ConfigError, match="a captioner needs the head 'lm', but this model has it"):
        MEDCaptioner(MED(config), tokenizer, CaptionConfig())


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer: MEDTokenizer) -> None:
    small = MED(MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size - 1))
    message = rf"tokenizer has {tokenizer.vocab_size} ids, but the model's text.vocab_size is"
    with pytest.raises(ConfigError, match=message):
        MEDScorer(small, tokenizer)
    with pytest.raises(ConfigError, match=message):
        MEDCaptioner(small, tokenizer, CaptionConfig())


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 3, 32, 16), (1, 1, 32, 32), (3, 32, 32)])
def test_pixels_of_another_shape_are_refused(model: MED, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"pixel_values are \(.*must be \(B, 3, 32, 32\): resize"):
        model.encode_image(torch.zeros(shape))


def test_a_text_longer_than_the_positions_is_refused(model: MED, pixel_values: Tensor) -> None:
    ids = torch.full((1, 41), 8)
    embeds = model.encode_image(pixel_values[:1])
    for answer in (
        lambda: model.text_features(ids, torch.ones_like(ids)),
        lambda: model.itm_logits(embeds, ids, torch.ones_like(ids)),
        lambda: model.lm_logits(embeds, ids, torch.ones_like(ids)),
    ):
        with pytest.raises(ConfigError, match=r"41 tokens is longer than text.max_positions 40"):
            answer()
    with pytest.raises(
        ConfigError, match=r"prompt and max_new_tokens make 43 tokens, but text.max"
    ):
        model.generate(
            pixel_values[:1], [5, 6, 7], sep_id=3, config=CaptionConfig(max_new_tokens=40)
        )


def test_generate_gives_the_captioner_s_captions_as_ids(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    names = ["a", "b", "c"]
    config = CaptionConfig(max_new_tokens=8, num_captions=2, prompt="a picture of", seed=4)
    captioner = MEDCaptioner(model, tokenizer, config)
    expected = captioner.caption(pixel_values[:3], names)
    found = model.generate(
        pixel_values[:3],
        tokenizer.prompt_ids("a picture of"),
        config=dataclasses.replace(config, prompt=""),
        sep_id=tokenizer.sep_id,
        forbidden_ids=captioner.forbidden_ids,
        image_ids=names,
    )
    texts = [tokenizer.decode(ids) for ids in found.ids]
    assert texts == [caption.text for of_image in expected for caption in of_image]
    assert len(set(texts)) > 3


def test_generate_refuses_what_it_cannot_read(model: MED, pixel_values: Tensor) -> None:
    pixels = pixel_values[:2]
    with pytest.raises(ConfigError, match="dec_id is not known for a vocabulary of"):
        model.generate(pixels)
    with pytest.raises(ConfigError, match=r"prompt_ids \[900\] and sep_id 3 must be ids below"):
        model.generate(pixels, [900], sep_id=3)
    with pytest.raises(ConfigError, match=r"prompt is text: give tokenizer.prompt_ids"):
        model.generate(pixels, [5], sep_id=3, config=CaptionConfig(prompt="a picture of"))
    with pytest.raises(ConfigError, match="there are 2 images, but 1 image_ids"):
        model.generate(pixels, [5], sep_id=3, image_ids=["one"])


def test_roles_share_everything_but_self_attention(model: MED) -> None:
    names = {name for name, _ in model.text.layers[0].named_children()}
    assert names == {"encoder_attention", "decoder_attention", "cross_attention", "feed_forward"}
    per_role = {name for name, _ in model.text.named_parameters() if "coder_attention" in name}
    total = sum(model.text.get_parameter(name).numel() for name in per_role)
    width, depth = model.config.text.width, model.config.text.depth
    assert total == 2 * depth * (4 * width * width + 4 * width + 2 * width)


@torch.no_grad()
def test_lm_head_reads_the_word_embeddings_themselves(model: MED, pixel_values: Tensor) -> None:
    embeds = model.encode_image(pixel_values[:1])
    ids = torch.tensor([[5, 8]])
    before = model.lm_logits(embeds, ids, torch.ones_like(ids))
    model.text.word_embeddings.weight[30] *= 3.0  # a token that the input does not use
    after = model.lm_logits(embeds, ids, torch.ones_like(ids))
    changed = (after - before).abs().amax(dim=(0, 1)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [30]


@torch.no_grad()
def test_features_are_unit_vectors_of_the_shared_width(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    tokens = tokenizer.encode(texts[:4], 20)
    image_embeds = model.encode_image(pixel_values[:4])
    assert image_embeds.shape == (4, 5, 32)
    for features in (
        model.image_features(image_embeds),
        model.text_features(tokens.input_ids, tokens.attention_mask),
    ):
        assert features.shape == (4, 16)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


@torch.no_grad()
def test_itm_logits_are_the_same_through_selected_projections(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    tokens = tokenizer.encode(texts[:3], 20)
    ids, rows = tokenizer.encoder_ids(tokens.input_ids), torch.tensor([1, 0, 1])
    embeds = model.encode_image(pixel_values[:2])
    direct = model.itm_logits(embeds[rows], ids, tokens.attention_mask)
    kv = select_images(model.project_image(embeds), rows)
    torch.testing.assert_close(model.itm_logits_from_kv(kv, ids, tokens.attention_mask), direct)
    assert direct.shape == (3, 2)


@torch.no_grad()
def test_itm_logits_are_the_same_when_the_last_texts_bring_their_own_images(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    tokens = tokenizer.encode([*texts[:6], "a picture of two"], 20)
    ids, rows = tokenizer.encoder_ids(tokens.input_ids), torch.tensor([0, 0, 1, 1, 2, 2, 1])
    kv = model.project_image(model.encode_image(pixel_values[:3]))
    expected = model.itm_logits_from_kv(select_images(kv, rows), ids, tokens.attention_mask)
    found = model.itm_logits_from_kv(
        kv, ids, tokens.attention_mask, extra_kv=select_images(kv, rows[6:])
    )
    torch.testing.assert_close(found, expected)
    other = model.itm_logits_from_kv(
        kv, ids, tokens.attention_mask, extra_kv=select_images(kv, torch.tensor([0]))
    )
    torch.testing.assert_close(other[:6], expected[:6])
    assert not torch.allclose(other[6], expected[6]), "the last text reads the image it brings"


def test_clamp_scale_keeps_the_temperature_of_blip(model: MED) -> None:
    assert model.scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(100.0)
    model.clamp_scale()
    assert model.scale.item() == pytest.approx(1000.0, rel=1e-4)
    with torch.no_grad():
        model.logit_scale.fill_(-100.0)
    model.clamp_scale()
    assert model.logit_scale.item() == pytest.approx(math.log(2.0))


def test_build_model_depends_on_the_seed_only(config: MEDConfig) -> None:
    torch.manual_seed(1)
    first = build_model(config, seed=3).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_model(config, seed=3).state_dict()
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = build_model(config, seed=4).state_dict()
    assert not torch.equal(first["text_proj.weight"], third["text_proj.weight"])


@pytest.mark.parametrize(("name", "expected"), [("nano", 0.049), ("base", 0.02)])
def test_initial_weights_are_wider_in_narrow_models(name: str, expected: float) -> None:
    model = build_model(MEDConfig.preset(name, vocab_size=64, image_size_px=64), seed=0)
    layer = model.text.layers[0]
    for weight in (
        layer.encoder_attention.qkv.weight,
        layer.feed_forward.output.weight,
        model.text.word_embeddings.weight,
        model.vision.blocks[1].mlp.fc1.weight,
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
