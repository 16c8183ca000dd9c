import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from blip_core import CaptionConfig, ConfigError
from blip_core.beam import beam_search
from blip_core.generation import (
    Sequences,
    constrain,
    decode_rows,
    draw_key,
    nucleus_probs,
    sample,
    uniforms,
)
from blip_core.text import KVCache

SEP, VOCAB = 1, 6
CPU = torch.device("cpu")


class BigramModel:
    """Next-token logits that depend on the last two tokens, read through a cache as the decoder's are."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 2.0 * torch.randn(VOCAB, VOCAB, VOCAB, generator=generator)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        shape = (len(ids), 1, ids.shape[1], 1)
        new = ids.float().view(shape)
        if cache.layers:
            new = torch.cat([cache.layers[0][0], new], dim=2)
        cache.layers = [(new, new)]
        tokens = new[:, 0, :, 0].long()
        return self.table[tokens[:, -2], tokens[:, -1]]


def _decode(
    model: BigramModel, config: CaptionConfig, rows: int = 2, **options: object
) -> Sequences:
    arguments = {"sep_id": SEP, "forbidden_ids": [0], "device": CPU}
    if config.decoding == "beam":
        return beam_search(model, [2, 3], rows, config, **arguments)
    return decode_rows(model, [2, 3], rows, config, keys=options.get("keys"), **arguments)


def _all_captions(model: BigramModel, max_new_tokens: int) -> list[tuple[float, list[int]]]:
    """Every caption with its mean log-probability, by brute force."""
    found = []
    for length in range(1, max_new_tokens + 1):
        for body in itertools.product(range(VOCAB), repeat=length):
            ends = body[-1] == SEP
            if SEP in body[:-1] or 0 in body or (not ends and length < max_new_tokens):
                continue
            total, context = 0.0, [2, 3]
            for position, token in enumerate(body):
                logprobs = model.table[context[-2], context[-1]].double().log_softmax(0)
                is_forbidden = token == 0 or (token == SEP and position == 0)
                total += float("-inf") if is_forbidden else float(logprobs[token])
                context.append(token)
            if total > float("-inf"):
                found.append((total / length, [t for t in body if t != SEP]))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(6))
def test_beam_of_1_is_greedy(seed: int) -> None:
    model = BigramModel(seed)
    beam = _decode(model, CaptionConfig(decoding="beam", num_beams=1, max_new_tokens=5))
    greedy = _decode(model, CaptionConfig(decoding="greedy", max_new_tokens=5))
    assert beam.ids == greedy.ids
    assert beam.finish_reasons == greedy.finish_reasons


@pytest.mark.parametrize("seed", range(6))
def test_a_wide_beam_finds_the_best_of_all_captions(seed: int) -> None:
    model = BigramModel(seed)
    config = CaptionConfig(decoding="beam", num_beams=250, max_new_tokens=4)
    found = _decode(model, config)
    best_mean, best_ids = _all_captions(model, 4)[0]
    length = len(found.ids[0]) + (found.finish_reasons[0] == "sep")
    assert found.ids == [best_ids, best_ids]
    assert found.sum_logprobs[0] / length == pytest.approx(best_mean)


@pytest.mark.parametrize("seed", [28, 33])
def test_a_beam_that_is_done_takes_nothing_more_while_others_go_on(seed: int) -> None:
    class Slow(BigramModel):
        def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
            logits = super().__call__(ids, cache).clone()
            logits[3:, SEP] = -50.0  # every row but the first never ends by itself
            return logits

    config = CaptionConfig(decoding="beam", num_beams=3, max_new_tokens=9)
    together = _decode(Slow(seed), config, rows=3)
    assert together.finish_reasons == ["sep", "length", "length"]
    assert together.ids[0] == _decode(Slow(seed), config, rows=1).ids[0]


def test_beam_rows_do_not_touch_each_other() -> None:
    tables = [BigramModel(seed).table for seed in (3, 4)]
    config = CaptionConfig(decoding="beam", num_beams=3, max_new_tokens=6)

    class Both(BigramModel):
        def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
            self.table = tables[0]
            super().__call__(ids, cache)
            tokens = cache.layers[0][0][:, 0, :, 0].long()
            halves = zip(tables, tokens.chunk(2), strict=True)
            return torch.cat([table[half[:, -2], half[:, -1]] for table, half in halves])

    together = _decode(Both(0), config)
    alone = [_decode(BigramModel(seed), config, rows=1) for seed in (3, 4)]
    assert together.ids == [alone[0].ids[0], alone[1].ids[0]]


def test_sampling_follows_the_probabilities() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.2, 0.0, 0.3, 0.0]], dtype=torch.float64).expand(20000, -1)
    keys = np.array([draw_key(0, str(index), 0) for index in range(20000)], dtype=np.uint64)
    tokens = sample(probs, torch.from_numpy(uniforms(keys, position=3)))
    counts = torch.bincount(tokens, minlength=6) / 20000
    torch.testing.assert_close(counts, probs[0].float(), atol=0.015, rtol=0)
    assert counts[[0, 3, 5]].sum() == 0


def test_sampling_at_the_very_ends_stays_on_tokens_with_mass() -> None:
    probs = torch.tensor([[0.0, 0.7, 0.3, 0.0]] * 2, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert sample(probs, ends).tolist() == [1, 2]
    assert sample(probs / 3, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [1, 2]


def test_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.05, 0.35]])
    kept = nucleus_probs(probs.log(), CaptionConfig(top_p=0.8))
    torch.testing.assert_close(kept[0].float(), torch.tensor([0.0, 0.5 / 0.85, 0.0, 0.35 / 0.85]))
    only = nucleus_probs(probs.log(), CaptionConfig(top_p=0.01))
    assert only[0].tolist() == [0.0, 1.0, 0.0, 0.0]
    everything = nucleus_probs(probs.log(), CaptionConfig(top_p=1.0))
    torch.testing.assert_close(everything.float(), probs)


def test_top_k_comes_before_top_p_and_temperature_before_both() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.05, 0.35]])
    kept = nucleus_probs(probs.log(), CaptionConfig(top_p=1.0, top_k=2))
    torch.testing.assert_close(kept[0].float(), torch.tensor([0.0, 0.5 / 0.85, 0.0, 0.35 / 0.85]))
    cold = nucleus_probs(probs.log(), CaptionConfig(top_p=1.0, temperature=0.5))
    torch.testing.assert_close(cold.float(), probs**2 / (probs**2).sum())


def test_draws_are_uniform_and_differ_in_every_argument() -> None:
    keys = np.array([draw_key(s, i, k) for s in (0, 1) for i in "ab" for k in (0, 1)], np.uint64)
    draws = np.stack([uniforms(keys, position) for position in range(500)])
    assert len(np.unique(draws)) == draws.size
    assert ((draws >= 0) & (draws < 1)).all()
    assert abs(draws.mean() - 0.5) < 0.02
    assert np.abs(np.corrcoef(draws.T) - np.eye(8)).max() < 0.2


def test_draws_never_change_between_versions() -> None:
    key = draw_key(7, "5f0c", 2)
    assert key == 6523806604724949719
    assert uniforms(np.array([key], np.uint64), 3)[0] == pytest.approx(0.1349985658, abs=1e-9)


def test_min_new_tokens_forbids_sep_and_forbidden_ids_never_come() -> None:
    logits = torch.zeros(1, VOCAB)
    config = CaptionConfig(min_new_tokens=2)
    early = constrain(logits, torch.zeros(1, 1).long(), config, sep_id=SEP, forbidden_ids=[0, 4])
    assert torch.isinf(early)[0].nonzero().flatten().tolist() == [0, 1, 4]
    late = constrain(logits, torch.zeros(1, 2).long(), config, sep_id=SEP, forbidden_ids=[0, 4])
    assert torch.isinf(late)[0].nonzero().flatten().tolist() == [0, 4]


def test_repetition_penalty_lowers_generated_tokens_only() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 4.0]])
    config = CaptionConfig(repetition_penalty=2.0, min_new_tokens=0)
    seen = torch.tensor([[0, 1, 0]])
    changed = constrain(logits, seen, config, sep_id=3, forbidden_ids=[])
    assert changed.tolist() == [[1.0, -4.0, 1.0, 4.0]]


def test_rows_stop_at_max_new_tokens_with_the_reason() -> None:
    model = BigramModel(0)
    model.table[:, :, SEP] = -50.0
    found = _decode(model, CaptionConfig(decoding="greedy", max_new_tokens=4))
    assert [len(ids) for ids in found.ids] == [4, 4]
    assert found.finish_reasons == ["length", "length"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"decoding": "beams"}, "decoding must be one of nucleus, greedy, beam, got 'beams'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be above 0, got 0"),
        ({"min_new_tokens": 30}, r"min_new_tokens must be in \[0, max_new_tokens\], got 30"),
        ({"decoding": "greedy", "num_captions": 2}, "greedy decoding gives one caption"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_caption_config_names_field_value_and_bound(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CaptionConfig(**change)
