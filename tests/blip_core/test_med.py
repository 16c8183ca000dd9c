import math

import pytest
import torch
from torch import Tensor

from blip_core import MED, MEDConfig, MEDTokenizer, build_model
from blip_core.med import select_images


@pytest.mark.parametrize(("name", "millions"), [("base", 252.44), ("large", 474.73)])
def test_unique_parameters_are_those_of_the_paper(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = MED(MEDConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


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
