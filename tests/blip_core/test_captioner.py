import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip_core import MED, CaptionConfig, ConfigError, GeneratedCaption, MEDCaptioner, MEDTokenizer

IDS = [f"image-{index}" for index in range(16)]


def _captions(
    model: MED, tokenizer: MEDTokenizer, config: CaptionConfig, pixels: Tensor, ids: list[str]
) -> dict[str, list[GeneratedCaption]]:
    captions = MEDCaptioner(model, tokenizer, config).caption(pixels, ids)
    return dict(zip(ids, captions, strict=True))


def _texts(captions: dict[str, list[GeneratedCaption]]) -> dict[str, list[str]]:
    return {image: [caption.text for caption in found] for image, found in captions.items()}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.permutations(range(16)),
    cuts=st.sets(st.integers(1, 15), max_size=6),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    decoding=st.sampled_from(["nucleus", "beam"]),
)
def test_captions_are_the_same_in_any_company(
    model: MED,
    tokenizer: MEDTokenizer,
    pixel_values: Tensor,
    order: list[int],
    cuts: set[int],
    dtype: str,
    decoding: str,
) -> None:
    """Batch size, order and resumption (whatever was not done yet) are all a partition of the images."""
    config = CaptionConfig(
        decoding=decoding, max_new_tokens=7, num_captions=3 if decoding == "nucleus" else 1
    )
    captioner = MEDCaptioner(model, tokenizer, config, dtype=dtype)
    expected = dict(zip(IDS, captioner.caption(pixel_values, IDS), strict=True))
    bounds = [0, *sorted(cuts), 16]
    for start, stop in itertools.pairwise(bounds):
        rows = order[start:stop]
        ids = [IDS[row] for row in rows]
        for image, found in zip(ids, captioner.caption(pixel_values[rows], ids), strict=True):
            for caption, other in zip(found, expected[image], strict=True):
                assert caption.text == other.text
                assert caption.finish_reason == other.finish_reason
                assert caption.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_captions_do_not_depend_on_the_batch(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, batch_size: int
) -> None:
    config = CaptionConfig(max_new_tokens=8, num_captions=2, seed=3)
    expected = _texts(_captions(model, tokenizer, config, pixel_values, IDS))
    assert len({text for found in expected.values() for text in found}) > 20
    order = torch.randperm(16, generator=torch.Generator().manual_seed(batch_size))
    found: dict[str, list[str]] = {}
    for rows in order.split(batch_size):
        ids = [IDS[row] for row in rows.tolist()]
        found |= _texts(_captions(model, tokenizer, config, pixel_values[rows], ids))
    assert found == expected


def test_more_captions_keep_the_first_ones(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    one = CaptionConfig(max_new_tokens=8)
    three = dataclasses.replace(one, num_captions=3)
    first = _texts(_captions(model, tokenizer, one, pixel_values[:4], IDS[:4]))
    more = _texts(_captions(model, tokenizer, three, pixel_values[:4], IDS[:4]))
    assert [found[:1] for found in more.values()] == list(first.values())
    assert all(len(set(found)) == 3 for found in more.values())


def test_seed_and_image_id_change_the_draws(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    same = pixel_values[:1].expand(8, -1, -1, -1)
    config = CaptionConfig(max_new_tokens=8)
    texts = _texts(_captions(model, tokenizer, config, same, IDS[:8]))
    assert len({found[0] for found in texts.values()}) == 8
    other = _texts(_captions(model, tokenizer, dataclasses.replace(config, seed=1), same, IDS[:8]))
    assert all(texts[image] != other[image] for image in texts)


def test_captions_hold_no_special_token_and_not_the_prompt(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    config = CaptionConfig(max_new_tokens=6, prompt="a picture of", top_p=1.0, num_captions=4)
    captions = _captions(model, tokenizer, config, pixel_values, IDS)
    everything = [caption for found in captions.values() for caption in found]
    assert not any("[" in caption.text for caption in everything)
    assert not any(caption.text.startswith("a picture of") for caption in everything)
    assert all(1 <= caption.num_tokens <= 6 for caption in everything)
    assert {caption.finish_reason for caption in everything} <= {"sep", "length"}
    cut = [caption for caption in everything if caption.finish_reason == "length"]
    assert all(caption.num_tokens == 6 for caption in cut)


@torch.no_grad()
def test_mean_logprob_is_that_of_the_model(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    config = CaptionConfig(decoding="greedy", max_new_tokens=6, min_new_tokens=0)
    captioner = MEDCaptioner(model, tokenizer, config)
    forbidden = torch.tensor(captioner.forbidden_ids)
    embeds = model.encode_image(pixel_values[:1])
    ids = [tokenizer.dec_id]
    total = 0.0
    for _ in range(6):
        prefix = torch.tensor([ids])
        logits = model.lm_logits(embeds, prefix, torch.ones_like(prefix))[0, -1]
        logprobs = logits.index_fill(0, forbidden, float("-inf")).double().log_softmax(0)
        ids.append(int(logprobs.argmax()))
        total += float(logprobs.max())
        if ids[-1] == tokenizer.sep_id:
            break
    caption = captioner.caption(pixel_values[:1], ["x"])[0][0]
    assert caption.text == tokenizer.decode(ids)
    assert caption.mean_logprob == pytest.approx(total / (len(ids) - 1), abs=1e-4)


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_searches_do_not_depend_on_the_batch_either(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, decoding: str
) -> None:
    config = CaptionConfig(decoding=decoding, max_new_tokens=6)
    together = _texts(_captions(model, tokenizer, config, pixel_values[:6], IDS[:6]))
    alone = {}
    for row in range(6):
        pixels = pixel_values[row : row + 1]
        alone |= _texts(_captions(model, tokenizer, config, pixels, IDS[row : row + 1]))
    assert together == alone


def test_captioner_refuses_more_tokens_than_positions(model: MED, tokenizer: MEDTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"make 41 tokens, but text.max_positions is 40"):
        MEDCaptioner(model, tokenizer, CaptionConfig(max_new_tokens=40))


def test_official_decoding_forbids_no_special_token(model: MED, tokenizer: MEDTokenizer) -> None:
    official = CaptionConfig(decoding="official", max_new_tokens=12)
    assert MEDCaptioner(model, tokenizer, official).forbidden_ids == []
    forbidden = MEDCaptioner(model, tokenizer, CaptionConfig()).forbidden_ids
    assert set(forbidden) == set(tokenizer.special_ids) - {tokenizer.sep_id}


def test_a_caption_that_continues_a_word_shows_no_mark(tokenizer: MEDTokenizer) -> None:
    pieces = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]).isalpha()]
    texts = [tokenizer.decode([piece]) for piece in range(tokenizer.vocab_size)]
    assert len(pieces) > 20
    assert not any("#" in text for text in texts)
