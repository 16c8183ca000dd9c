import pytest
import torch
from torch import Tensor

from blip_core import MED, ConfigError, MEDScorer, MEDTokenizer


@torch.no_grad()
def test_scores_equal_those_of_one_pair_at_a_time_with_enc_at_position_0(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    lists = [texts[:3], [], ["a red ring", "", "A RED ring!"], texts[5:6]]
    found = MEDScorer(model, tokenizer).score(pixel_values[:4], lists)
    assert [len(scores) for scores in found] == [3, 0, 3, 1]
    for row, of_image in enumerate(lists):
        embeds = model.encode_image(pixel_values[row : row + 1])
        for text, scored in zip(of_image, found[row], strict=True):
            tokens = tokenizer.encode([text.lower().replace("!", "").strip()], 35)
            ids = tokens.input_ids.clone()
            ids[0, 0] = tokenizer.enc_id
            logits = model.itm_logits(embeds, ids, tokens.attention_mask)
            sim = (
                model.image_features(embeds)
                @ model.text_features(tokens.input_ids, tokens.attention_mask).T
            )
            assert scored.itm_prob == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)
            assert scored.itc_sim == pytest.approx(sim.item(), abs=1e-5)
    assert found[2][0].itm_prob == pytest.approx(found[2][2].itm_prob), "texts are cleaned"
    probs = [score.itm_prob for scores in found for score in scores]
    assert max(probs) - min(probs) > 0.01


def test_padding_by_a_long_neighbour_changes_no_score(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    scorer = MEDScorer(model, tokenizer)
    alone = scorer.score(pixel_values[:1], [["a red ring"]])[0][0]
    beside = scorer.score(pixel_values[:1], [["a red ring", "a green cross on the left " * 4]])[0][
        0
    ]
    assert beside.itm_prob == pytest.approx(alone.itm_prob, abs=1e-6)
    assert beside.itc_sim == pytest.approx(alone.itc_sim, abs=1e-6)


def test_each_image_is_encoded_once(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    encoded: list[int] = []
    model.vision.patch_embed.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    MEDScorer(model, tokenizer).score(pixel_values[:3], [texts, texts[:2], texts[:5]])
    assert encoded == [3]


def test_no_texts_at_all_give_empty_lists(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    assert MEDScorer(model, tokenizer).score(pixel_values[:2], [[], []]) == [[], []]


def test_score_names_a_mismatch_of_images_and_lists(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    with pytest.raises(ConfigError, match="2 images, but 1 lists of texts"):
        MEDScorer(model, tokenizer).score(pixel_values[:2], [["a"]])
    with pytest.raises(ConfigError, match=r"max_text_tokens 41 is above text.max_positions 40"):
        MEDScorer(model, tokenizer, max_text_tokens=41)
