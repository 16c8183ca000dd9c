import numpy as np
import pytest
import torch
from torch import Tensor

from blip_core import (
    MED,
    MEDTokenizer,
    RetrievalRanks,
    average_precision,
    encode_pairs,
    evaluate_itm,
    evaluate_retrieval,
    itm_auc,
    mean_recall_gain,
    recall_metrics,
    retrieval_recalls,
)
from blip_core.errors import ConfigError
from blip_core.evaluation import rerank, retrieval_ranks
from blip_core.pairs import match_logits


def _slow_recalls(sim: Tensor, index: list[int]) -> dict[str, float]:
    """Recalls by sorting, as obvious as possible."""
    num_images, num_texts = sim.shape
    found = {}
    for k in (1, 5, 10):
        hits = []
        for image in range(num_images):
            top = sorted(range(num_texts), key=lambda text: -sim[image, text].item())[:k]
            hits.append(any(index[text] == image for text in top))
        found[f"i2t_r{k}"] = sum(hits) / num_images
        hits = []
        for text in range(num_texts):
            top = sorted(range(num_images), key=lambda image: -sim[image, text].item())[:k]
            hits.append(index[text] in top)
        found[f"t2i_r{k}"] = sum(hits) / num_texts
    return found | {"mean_recall": sum(found.values()) / 6}


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "with_ties"])
def test_recalls_equal_those_of_plain_sorting(rounded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sim = torch.randn(20, 50, generator=generator)
    sim = (sim * 2).round() if rounded else sim
    index = torch.randint(0, 20, (50,), generator=generator)
    assert retrieval_recalls(sim, index) == pytest.approx(_slow_recalls(sim, index.tolist()))


def test_a_constant_model_recalls_no_more_than_chance() -> None:
    recalls = retrieval_recalls(torch.zeros(50, 50), torch.arange(50))
    assert (recalls["i2t_r1"], recalls["t2i_r10"]) == (0.02, 0.2)


def test_itm_auc_counts_pairs_and_halves_ties() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 8, 40) + 1, rng.integers(0, 8, 30)
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert itm_auc(positive, negative) == pytest.approx(np.mean(pairs))
    assert itm_auc(np.ones(3), np.ones(5)) == 0.5
    assert itm_auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0


@pytest.fixture
def captions(texts: list[str]) -> list[list[str]]:
    return [[text, text.replace("on the left", "")] for text in texts]


def test_evaluate_retrieval_gives_seven_figures_with_intervals(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, captions: list[list[str]]
) -> None:
    pairs = encode_pairs(model, tokenizer, pixel_values.split(5), captions)
    metrics = {m.name: m for m in evaluate_retrieval(model, tokenizer, pairs)}
    expected = _slow_recalls(
        pairs.image_features @ pairs.text_features.T, pairs.text_image_index.tolist()
    )
    assert {name: m.value for name, m in metrics.items()} == pytest.approx(expected)
    assert (metrics["i2t_r1"].n, metrics["t2i_r1"].n) == (16, 32)
    assert metrics["t2i_r5"].low <= metrics["t2i_r5"].value <= metrics["t2i_r5"].high


def test_evaluate_retrieval_draws_the_same_images_for_all_six_recalls_of_the_mean(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, captions: list[list[str]]
) -> None:
    pairs = encode_pairs(model, tokenizer, pixel_values.split(5), captions)
    metrics = {m.name: m for m in evaluate_retrieval(model, tokenizer, pairs)}
    mean = metrics.pop("mean_recall")
    sim = pairs.image_features @ pairs.text_features.T
    image_ranks, text_ranks = retrieval_ranks(sim, pairs.text_image_index)
    own = [np.flatnonzero(pairs.text_image_index.numpy() == image) for image in range(16)]
    drawn = []
    for draw in np.random.default_rng(0).integers(0, 16, (1000, 16)):
        ranks = image_ranks[draw], text_ranks[np.concatenate([own[image] for image in draw])]
        drawn.append(np.mean([(r < k).double().mean() for r in ranks for k in (1, 5, 10)]))
    assert [mean.low, mean.high] == pytest.approx(list(np.percentile(drawn, [2.5, 97.5])))
    assert mean.n == 16
    assert all(m.low is not None and m.low <= m.value <= m.high for m in metrics.values())


def test_retrieval_ranks_never_find_an_image_without_a_text() -> None:
    ranks, _ = retrieval_ranks(torch.eye(3)[:, :2], torch.tensor([0, 1]))
    assert (ranks[:2].tolist(), ranks[2].item() >= 10) == ([0, 0], True)
    assert retrieval_recalls(torch.eye(3)[:, :2], torch.tensor([0, 1]))["i2t_r10"] == 2 / 3


@torch.no_grad()
def test_rerank_leaves_the_others_in_the_order_of_their_cosines(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, captions: list[list[str]]
) -> None:
    pairs = encode_pairs(model, tokenizer, pixel_values.split(8), captions)
    sim = pairs.image_features @ pairs.text_features.T
    sim = sim.mean() + 0.01 * (sim - sim.mean())  # cosines of a poor model: close to each other
    by_image, by_text = rerank(model, tokenizer, pairs, sim, k=3)
    for reranked, cosines in ((by_image, sim), (by_text.T, sim.T)):
        order = cosines.argsort(dim=1, descending=True, stable=True)[:, 3:]
        steps = reranked.gather(1, order).diff(dim=1)
        assert (steps <= 0).all()
        assert (steps < 0).double().mean() > 0.99  # not rounded to the same number


@torch.no_grad()
def test_rerank_puts_match_logit_plus_cosine_on_the_top_k_only(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, captions: list[list[str]]
) -> None:
    pairs = encode_pairs(model, tokenizer, pixel_values.split(8), captions)
    sim = pairs.image_features @ pairs.text_features.T
    by_image, by_text = rerank(model, tokenizer, pairs, sim, k=3)
    for image in range(16):
        ordered = sim[image].argsort(descending=True)
        chosen = [pairs.texts[text] for text in ordered[:3].tolist()]
        match = match_logits(model, tokenizer, pairs, [image] * 3, chosen)[:, 1]
        expected = match + sim[image, ordered[:3]]
        torch.testing.assert_close(by_image[image, ordered[:3]], expected, atol=1e-4, rtol=0)
        assert by_image[image, ordered[3:]].max() < by_image[image, ordered[:3]].min()
    top = sim.argsort(dim=0, descending=True)
    for text in range(32):
        assert by_text[top[3:, text], text].max() < by_text[top[:3, text], text].min()


def test_evaluate_itm_never_takes_a_text_of_the_same_words(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    captions = [["a red ring"], ["a red ring"], ["a blue cross"], ["a green square"]]
    pairs = encode_pairs(model, tokenizer, [pixel_values[:4]], captions)
    from blip_core.evaluation import _hard_negatives, _random_negatives

    own = [of_image[0] for of_image in captions]
    for drawn in (list(_hard_negatives(pairs)), list(_random_negatives(pairs, seed=0))):
        assert all(text is not None and text != mine for text, mine in zip(drawn, own, strict=True))
    metrics = {m.name: m for m in evaluate_itm(model, tokenizer, pairs)}
    kinds = ("auc_random", "ap_random", "auc_hard", "ap_hard")
    assert list(metrics) == [f"itm_{kind}" for kind in kinds]
    assert all(0.0 <= m.low <= m.value <= m.high <= 1.0 and m.n == 4 for m in metrics.values())


def test_evaluate_itm_ranks_true_pairs_by_the_margin_of_their_logits(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    pairs = encode_pairs(model, tokenizer, [pixel_values], [[text] for text in texts])
    swapped = [*texts[1:], texts[0]]
    found = {m.name: m for m in evaluate_itm(model, tokenizer, pairs, swapped_texts=swapped)}
    true, wrong = (
        match_logits(model, tokenizer, pairs, range(16), said).diff(dim=1)[:, 0].double().numpy()
        for said in (texts, swapped)
    )
    assert found["itm_auc_swapped"].value == pytest.approx(itm_auc(true, wrong))
    assert found["itm_ap_swapped"].value == pytest.approx(average_precision(true, wrong))
    with torch.no_grad():
        model.itm_head.weight.mul_(1e4)  # so sure that probabilities would all be 0 or 1
    sure = {m.name: m for m in evaluate_itm(model, tokenizer, pairs, swapped_texts=swapped)}
    assert sure["itm_auc_swapped"].value == pytest.approx(found["itm_auc_swapped"].value, abs=0.02)


def test_evaluate_itm_leaves_out_what_has_no_negative(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor
) -> None:
    pairs = encode_pairs(model, tokenizer, [pixel_values[:2]], [["a red ring"], ["a red ring"]])
    swapped = evaluate_itm(model, tokenizer, pairs, swapped_texts=["a blue ring", "a red cross"])
    assert [metric.name for metric in swapped] == ["itm_auc_swapped", "itm_ap_swapped"]


def _ranks(found: np.ndarray, texts_each: int = 2) -> RetrievalRanks:
    """Ranks of a model that finds some images, and their texts, at once and the others late."""
    ranks = np.where(found, 0, 99)
    index = np.repeat(np.arange(len(found)), texts_each)
    return RetrievalRanks(ranks, ranks[index], index)


def test_mean_recall_gain_is_the_difference_of_the_two_and_zero_with_itself() -> None:
    rng = np.random.default_rng(0)
    before, after = (_ranks(rng.random(300) < share) for share in (0.5, 0.6))
    recall = {
        name: next(m.value for m in recall_metrics(ranks) if m.name == "mean_recall")
        for name, ranks in (("before", before), ("after", after))
    }
    gain = mean_recall_gain(before, after)
    assert gain.value == pytest.approx(recall["after"] - recall["before"])
    assert gain.low is not None
    assert gain.high is not None
    assert gain.low < gain.value < gain.high
    same = mean_recall_gain(before, before)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_mean_recall_gain_covers_the_true_gain_and_is_narrower_than_unpaired() -> None:
    covered, repeats = 0, 60
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        hard = rng.random(200)  # one difficulty of each image for both models
        before, after = (_ranks(hard + 0.1 * rng.random(200) < share) for share in (0.55, 0.6))
        gain = mean_recall_gain(before, after)
        assert gain.low is not None
        assert gain.high is not None
        covered += gain.low <= 0.05 <= gain.high
        metrics = [recall_metrics(ranks)[-1] for ranks in (before, after)]
        widths = [m.high - m.low for m in metrics if m.high is not None and m.low is not None]
        assert gain.high - gain.low < 0.7 * np.hypot(*widths)
    assert covered >= 0.85 * repeats


def test_mean_recall_gain_refuses_ranks_of_other_pairs() -> None:
    with pytest.raises(ConfigError, match="ranks of other pairs: 10 images and 20 texts against 9"):
        mean_recall_gain(_ranks(np.ones(10, bool)), _ranks(np.ones(9, bool)))
