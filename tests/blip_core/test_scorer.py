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


def test_a_text_is_read_once_while_it_is_remembered(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    scorer = MEDScorer(model, tokenizer, num_cached_texts=3)
    read: list[int] = []
    scorer.model.text_proj.register_forward_hook(lambda _, args, __: read.append(len(args[0])))
    first = scorer.score(pixel_values[:2], [texts[:2], [texts[1], texts[2]]])
    assert read == [3], "the text of both images once"
    assert scorer.score(pixel_values[:2], [texts[:2], [texts[1], texts[2]]]) == first
    assert read == [3]
    scorer.score(pixel_values[:1], [[texts[3]]])  # the one that was not used for longest goes
    scorer.score(pixel_values[:1], [[texts[1], texts[2], texts[3]]])
    assert read == [3, 1]
    scorer.score(pixel_values[:1], [texts[:1]])
    assert read == [3, 1, 1]
    scorer.forget_texts()
    scorer.score(pixel_values[:1], [texts[:1]])
    assert read == [3, 1, 1, 1]


def test_a_text_that_an_image_has_twice_is_scored_once(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    scorer = MEDScorer(model, tokenizer)
    matched: list[int] = []
    scorer.model.itm_head.register_forward_hook(lambda _, args, __: matched.append(len(args[0])))
    found = scorer.score(pixel_values[:2], [["a ring", "A ring!", "a cross"], ["a ring"]])
    assert matched == [3]
    assert found[0][0] == found[0][1] != found[1][0]


def test_scores_in_bfloat16_are_near(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    exact = MEDScorer(model, tokenizer).score(pixel_values[:2], [texts[:3]] * 2)
    near = MEDScorer(model, tokenizer, dtype="bfloat16").score(pixel_values[:2], [texts[:3]] * 2)
    for one, other in zip(exact[0] + exact[1], near[0] + near[1], strict=True):
        assert one.itm_prob == pytest.approx(other.itm_prob, abs=0.05)
        assert one.itc_sim == pytest.approx(other.itc_sim, abs=0.05)
        assert one != other
