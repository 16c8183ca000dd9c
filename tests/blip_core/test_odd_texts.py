"""Odd texts and pictures without numbers, to a scorer and a captioner of ours: no neighbour is harmed."""

import math

import numpy as np
import pytest
import torch
from odd_texts import ODD
from torch import Tensor

from blip_core import MED, MEDCaptioner, MEDScorer, MEDTokenizer
from blip_core.generation import CaptionConfig

NEIGHBOURS = ["a red circle", "a blue ring on the left"]


@pytest.mark.parametrize("kind", list(ODD))
def test_odd_text_gets_both_numbers_and_its_neighbours_keep_theirs(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, kind: str
) -> None:
    alone = MEDScorer(model, tokenizer).score(pixel_values[:2], [NEIGHBOURS, NEIGHBOURS[:1]])
    texts = [[NEIGHBOURS[0], ODD[kind], NEIGHBOURS[1]], [NEIGHBOURS[0], ODD[kind]]]
    found = MEDScorer(model, tokenizer).score(pixel_values[:2], texts)
    for scores in found:
        assert 0.0 <= scores[1].itm_prob <= 1.0
        assert -1.0 <= scores[1].itc_sim <= 1.0
    kept = [found[0][0], found[0][2], found[1][0]]
    for score, expected in zip(kept, [*alone[0], *alone[1]], strict=True):
        assert score.itm_prob == pytest.approx(expected.itm_prob, abs=1e-6)
        assert score.itc_sim == pytest.approx(expected.itc_sim, abs=1e-6)


def test_picture_without_numbers_costs_its_own_scores_alone(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    broken = pixel_values[:3].clone()
    broken[1, 0, 5, 5] = math.nan
    texts = [NEIGHBOURS] * 3
    sound = MEDScorer(model, tokenizer).score(pixel_values[:3], texts)
    found = MEDScorer(model, tokenizer).score(broken, texts)
    assert all(math.isnan(score.itm_prob) for score in found[1])
    for place in (0, 2):
        numbers = [[s.itm_prob, s.itc_sim] for s in found[place]]
        expected = [[s.itm_prob, s.itc_sim] for s in sound[place]]
        np.testing.assert_allclose(numbers, expected, atol=1e-6)


@pytest.mark.parametrize("decoding", ["nucleus", "greedy", "beam"])
def test_picture_without_numbers_costs_its_own_caption_alone(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, decoding: str
) -> None:
    captioner = MEDCaptioner(model, tokenizer, CaptionConfig(decoding=decoding, max_new_tokens=8))
    broken = pixel_values[:3].clone()
    broken[1] = torch.inf
    names = ["x", "y", "z"]
    sound, found = captioner.caption(pixel_values[:3], names), captioner.caption(broken, names)
    ((failed,),) = found[1:2]
    assert (failed.text, failed.finish_reason) == ("", "nan")
    for place in (0, 2):
        assert [caption.text for caption in found[place]] == [c.text for c in sound[place]]
        assert found[place][0].finish_reason != "nan"
