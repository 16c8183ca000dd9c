"""A BLIP folder of transformers, loaded with `MED.from_pretrained`, gives the same numbers.

One known difference is set up here and not papered over: transformers leaves [CLS] where [ENC] belongs, so
these tests hand [ENC] (id 6) to both.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)
from transformers_blip import SHAPES, Shape, build, save

from blip_core import MED, CaptionConfig

DEC, ENC, CLS, SEP = 5, 6, 2, 3
NEAR = {"atol": 1e-4, "rtol": 1e-4}
MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]],
}


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


def _pixels(shape: Shape, count: int = 3) -> Tensor:
    size = shape.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def _texts(first: int, side: str) -> tuple[Tensor, Tensor]:
    """Three texts of 7, 4 and 2 tokens, `first` at their beginning, padded on `side`."""
    mask = torch.tensor(MASKS[side])
    ids = torch.randint(7, 64, mask.shape, generator=torch.Generator().manual_seed(3)) * mask
    starts = mask.argmax(dim=1) if side == "left" else torch.zeros(3, dtype=torch.int64)
    ids[torch.arange(3), starts] = first
    return ids, mask


def _loaded(model_class: type, shape: Shape, folder: Path) -> tuple[nn.Module, MED]:
    theirs = build(model_class, shape)
    return theirs, MED.from_pretrained(save(theirs, folder))


@pytest.mark.parametrize("side", MASKS)
@torch.no_grad()
def test_captioner_computes_what_transformers_does(shape: Shape, side: str, tmp_path: Path) -> None:
    theirs, ours = _loaded(BlipForConditionalGeneration, shape, tmp_path)
    pixel_values = _pixels(shape)
    ids, mask = _texts(DEC, side)
    output = theirs(pixel_values=pixel_values, input_ids=ids, attention_mask=mask)
    image_embeds = ours.encode_image(pixel_values)
    torch.testing.assert_close(image_embeds, output.last_hidden_state, **NEAR)
    logits = ours.lm_logits(image_embeds, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(logits[real], output.logits[real], **NEAR)
    assert logits[real].std() > 0.1, "logits that hardly differ would prove nothing"


@pytest.mark.parametrize("side", MASKS)
@torch.no_grad()
def test_filter_computes_what_transformers_does(shape: Shape, side: str, tmp_path: Path) -> None:
    theirs, ours = _loaded(BlipForImageTextRetrieval, shape, tmp_path)
    pixel_values = _pixels(shape)
    image_embeds = ours.encode_image(pixel_values)
    ids, mask = _texts(ENC, side)
    arguments = {"pixel_values": pixel_values, "input_ids": ids, "attention_mask": mask}
    matched = theirs(**arguments, use_itm_head=True)
    torch.testing.assert_close(image_embeds, matched.last_hidden_state, **NEAR)
    torch.testing.assert_close(ours.itm_logits(image_embeds, ids, mask), matched.itm_score, **NEAR)
    ids, mask = _texts(CLS, side)
    arguments |= {"input_ids": ids, "attention_mask": mask}
    expected = theirs(**arguments, use_itm_head=False).itm_score
    image_features = ours.image_features(image_embeds)
    text_features = ours.text_features(ids, mask)
    torch.testing.assert_close(image_features @ text_features.T, expected, **NEAR)
    expected = nn.functional.normalize(theirs.vision_proj(image_embeds[:, 0]), dim=-1)
    torch.testing.assert_close(image_features, expected, **NEAR)
    hidden = theirs.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = nn.functional.normalize(theirs.text_proj(hidden[:, 0]), dim=-1)
    torch.testing.assert_close(text_features, expected, **NEAR)


@pytest.mark.parametrize("name", ["plain", "deep_text"])
@torch.no_grad()
def test_question_encoder_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    theirs, ours = _loaded(BlipForQuestionAnswering, shape, tmp_path)
    assert ours.config.heads == ()
    pixel_values = _pixels(shape)
    ids, mask = _texts(ENC, "right")
    image_embeds = ours.encode_image(pixel_values)
    expected = theirs.vision_model(pixel_values=pixel_values).last_hidden_state
    torch.testing.assert_close(image_embeds, expected, **NEAR)
    question = theirs.text_encoder(
        input_ids=ids, attention_mask=mask, encoder_hidden_states=image_embeds
    ).last_hidden_state
    found = ours.text(ids, mask, mode="fused", image_kv=ours.project_image(image_embeds))
    real = mask.bool()
    torch.testing.assert_close(found[real], question[real], **NEAR)


@pytest.mark.parametrize("num_beams", [1, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_generate_finds_the_tokens_of_transformers(
    num_beams: int, seed: int, tmp_path: Path
) -> None:
    shape = SHAPES[list(SHAPES)[seed]]
    theirs = build(BlipForConditionalGeneration, shape, seed=seed)
    with torch.no_grad():  # let captions end at different lengths
        theirs.text_decoder.cls.predictions.bias[SEP] += (0.5, 2.5, 4.0, 1.5)[seed]
    ours = MED.from_pretrained(save(theirs, tmp_path))
    pixel_values = _pixels(shape, count=8)
    prompt = [DEC, 20, 21]
    limits = {"max_new_tokens": 10, "min_new_tokens": 2}
    expected = theirs.generate(
        pixel_values,
        input_ids=torch.tensor([[*prompt, SEP]] * 8),
        num_beams=num_beams,
        do_sample=False,
        **limits,
    )[:, len(prompt) :].tolist()
    config = CaptionConfig(
        decoding="greedy" if num_beams == 1 else "beam", num_beams=num_beams, **limits
    )
    found = ours.generate(pixel_values, prompt, config=config)
    assert found.ids == [row[: row.index(SEP)] if SEP in row else row for row in expected]
    ends = [reason == "sep" for reason in found.finish_reasons]
    assert ends == [SEP in row for row in expected]


def test_generate_starts_as_transformers_without_a_prompt(tmp_path: Path) -> None:
    theirs, ours = _loaded(BlipForConditionalGeneration, SHAPES["plain"], tmp_path)
    pixel_values = _pixels(SHAPES["plain"])
    expected = theirs.generate(pixel_values, max_new_tokens=6, do_sample=False)
    assert expected[:, 0].tolist() == [DEC] * 3
    config = CaptionConfig(decoding="greedy", max_new_tokens=6)
    found = ours.generate(pixel_values, config=config)
    rows = expected[:, 1:].tolist()
    assert found.ids == [row[: row.index(SEP)] if SEP in row else row for row in rows]


@pytest.mark.parametrize("image_size_px", [16, 64])
@torch.no_grad()
def test_another_image_size_computes_what_transformers_does(
    image_size_px: int, tmp_path: Path
) -> None:
    shape = SHAPES["deep_text"]  # 32 px, patches of 8
    theirs = build(BlipForImageTextRetrieval, shape)
    save(theirs, tmp_path)
    ours = MED.from_pretrained(tmp_path, image_size_px=image_size_px)
    pixel_values = torch.randn(2, 3, image_size_px, image_size_px)
    expected = theirs.vision_model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours.encode_image(pixel_values), expected, **NEAR)
