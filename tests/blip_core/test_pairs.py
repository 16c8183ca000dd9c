from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip_core import MED, ConfigError, EncodedPairs, MEDTokenizer, encode_pairs
from blip_core.med import select_images
from blip_core.pairs import match_logits


@pytest.fixture
def pairs(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> EncodedPairs:
    return encode_pairs(model, tokenizer, pixel_values.split(5), [[text] for text in texts])


@torch.no_grad()
def test_match_logits_equal_those_of_one_pair_at_a_time_when_images_have_unequal_texts(
    model: MED, tokenizer: MEDTokenizer, pairs: EncodedPairs, texts: list[str]
) -> None:
    words = ["a", *texts, " ".join(texts[:3]), "a red", "a red", ""]
    generator = torch.Generator().manual_seed(0)
    rows = [0] * 300 + [3] * 20 + torch.randint(0, 16, (60,), generator=generator).tolist()
    said = [words[i] for i in torch.randint(0, 21, (380,), generator=generator).tolist()]
    found = match_logits(model, tokenizer, pairs, rows, said)
    for place in range(0, 380, 7):
        tokens = tokenizer.encode([said[place]], 35)
        alone = model.itm_logits(
            pairs.image_embeds[rows[place], None],
            tokenizer.encoder_ids(tokens.input_ids),
            tokens.attention_mask,
        )
        torch.testing.assert_close(found[place, None], alone, atol=1e-5, rtol=0)
    assert found.std(dim=0).min() > 0.01
    assert match_logits(model, tokenizer, pairs, [], []).shape == (0, 2)


def test_match_logits_projects_every_image_once(
    model: MED, tokenizer: MEDTokenizer, pairs: EncodedPairs, texts: list[str]
) -> None:
    projected: list[int] = []
    layer = model.text.stack()[0].cross_attention.kv
    layer.register_forward_hook(lambda _, inputs, __: projected.append(len(inputs[0])))
    rows = [image for image in range(10) for _ in range(6 * (image + 1))]
    said = [texts[place % 16] for place in range(len(rows))]
    match_logits(model, tokenizer, pairs, rows, said)
    assert sum(projected) == 10


@torch.no_grad()
def test_itm_logits_from_kv_with_a_row_for_each_image_equal_those_with_a_row_for_each_text(
    model: MED, tokenizer: MEDTokenizer, pairs: EncodedPairs, texts: list[str]
) -> None:
    tokens = tokenizer.encode([*texts[:11], "a red circle, a red circle"], 35)
    ids = tokenizer.encoder_ids(tokens.input_ids)
    image_kv = model.project_image(pairs.image_embeds[:4])
    rows = torch.arange(4).repeat_interleave(3)
    copied = model.itm_logits_from_kv(select_images(image_kv, rows), ids, tokens.attention_mask)
    shared = model.itm_logits_from_kv(image_kv, ids, tokens.attention_mask)
    torch.testing.assert_close(shared, copied, atol=1e-5, rtol=0)
    assert not torch.allclose(shared, shared[:1], atol=1e-3)


def test_encode_pairs_cuts_texts_for_features_and_matching_alike(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    long, short = "a red circle on the left", "a red circle"
    pairs = encode_pairs(model, tokenizer, [pixel_values[:2]], [[long], [short]], max_text_tokens=5)
    torch.testing.assert_close(pairs.text_features[0], pairs.text_features[1])
    logits = match_logits(model, tokenizer, pairs, [0, 0], [long, short])
    torch.testing.assert_close(logits[0], logits[1])


@torch.no_grad()
def test_encode_pairs_gives_the_same_from_image_tokens_as_from_pixels(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    captions = [[text] for text in texts]
    tokens = model.encode_image(pixel_values)
    from_pixels = encode_pairs(model, tokenizer, pixel_values.split(5), captions)
    from_tokens = encode_pairs(model, tokenizer, tokens.split(5), captions)
    torch.testing.assert_close(from_tokens.image_embeds, from_pixels.image_embeds)
    torch.testing.assert_close(from_tokens.image_features, from_pixels.image_features)
    torch.testing.assert_close(from_tokens.text_features, from_pixels.text_features)


def test_encode_pairs_gives_the_same_from_a_file_that_nobody_sees(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str], tmp_path: Path
) -> None:
    captions = [[text] for text in texts]
    held, mapped = (
        encode_pairs(
            model,
            tokenizer,
            pixel_values.split(5),
            captions,
            max_held_bytes=limit,
            spill_folder=tmp_path,
        )
        for limit in (1 << 20, 0)
    )
    assert torch.equal(held.image_embeds, mapped.image_embeds)
    assert torch.equal(held.image_features, mapped.image_features)
    assert list(tmp_path.iterdir()) == []
    rows = list(range(16))
    assert torch.equal(
        match_logits(model, tokenizer, held, rows, texts),
        match_logits(model, tokenizer, mapped, rows, texts),
    )


def test_encode_pairs_names_a_folder_that_cannot_take_the_embeddings(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, tmp_path: Path
) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(ConfigError, match=r"absent cannot take [\d,]+ bytes .*spill_folder"):
        encode_pairs(
            model,
            tokenizer,
            [pixel_values[:2]],
            [["a"], ["a red"]],
            max_held_bytes=0,
            spill_folder=absent,
        )


def test_encode_pairs_names_a_mismatch(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    with pytest.raises(ConfigError, match="2 images, but captions of 1 images"):
        encode_pairs(model, tokenizer, [pixel_values[:2]], [["a"]])
    with pytest.raises(ConfigError, match="2 images, but captions of 3 images"):
        encode_pairs(model, tokenizer, [pixel_values[:2]], [["a"], ["a"], ["a"]])
    with pytest.raises(ConfigError, match="no images"):
        encode_pairs(model, tokenizer, [], [])
    with pytest.raises(ConfigError, match="no captions"):
        encode_pairs(model, tokenizer, [pixel_values[:2]], [[], []])
    with pytest.raises(ConfigError, match="max_text_tokens 600 is above"):
        encode_pairs(model, tokenizer, [pixel_values[:1]], [["a"]], max_text_tokens=600)


def test_a_model_that_gives_nan_is_refused_and_not_ranked_first(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, pairs: EncodedPairs
) -> None:
    with torch.no_grad():
        model.itm_head.bias.fill_(torch.nan)
        with pytest.raises(ConfigError, match="match logits that are not finite"):
            match_logits(model, tokenizer, pairs, [0], ["a red circle"])
        model.vision_proj.weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="features that are not finite"):
        encode_pairs(model, tokenizer, [pixel_values[:1]], [["a"]])
