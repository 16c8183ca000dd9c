import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from blip_core import MED, CaptionConfig, ConfigError, MEDCaptioner, MEDTokenizer
from blip_core.beam import beam_search
from blip_core.decoding import close_ranks, decode_rows
from blip_core.generation import Sequences, Vocabulary, draw_key, uniforms
from blip_core.sampling import constrain, draw

SEP, VOCAB = 1, 6
CPU = torch.device("cpu")


class BigramModel:
    """Next-token logits that depend on the last two tokens, and remembers rows as the decoder does."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 2.0 * torch.randn(VOCAB, VOCAB, VOCAB, generator=generator)
        self.tokens: Tensor | None = None
        self.sizes: list[int] = []

    def step(self, ids: Tensor) -> Tensor:
        self.sizes.append(len(ids))
        self.tokens = ids if self.tokens is None else torch.cat([self.tokens, ids], dim=1)
        return self.logits(self.tokens[:, -2], self.tokens[:, -1])

    def select(self, rows: Tensor) -> None:
        assert self.tokens is not None
        self.tokens = self.tokens[rows]

    def logits(self, before: Tensor, last: Tensor) -> Tensor:
        return self.table[before, last]


class TwoModels(BigramModel):
    """Another table for each of two images."""

    def __init__(self, *seeds: int) -> None:
        super().__init__(seeds[0])
        self.tables = torch.stack([BigramModel(seed).table for seed in seeds])
        self.image_of = torch.arange(len(seeds))

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.image_of = self.image_of[rows]

    def logits(self, before: Tensor, last: Tensor) -> Tensor:
        return self.tables[self.image_of, before, last]


def _decode(model: BigramModel, config: CaptionConfig, rows: int = 2) -> Sequences:
    vocabulary = Vocabulary(SEP, (0,))
    if config.decoding == "beam":
        return beam_search(model, [2, 3], rows, config, vocabulary, CPU)
    ids = [str(row) for row in range(rows)]
    return decode_rows(model, [2, 3], ids, config, vocabulary, CPU)


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


@pytest.mark.parametrize("decoding", ["beam", "nucleus", "greedy"])
def test_rows_that_have_ended_leave_and_the_others_do_not_notice(decoding: str) -> None:
    count = 3 if decoding == "nucleus" else 1
    config = CaptionConfig(decoding=decoding, num_captions=count, max_new_tokens=9)
    seeds = (3, 28, 33, 4)
    together, alone = TwoModels(*seeds), []
    found = _decode(together, config, rows=4)
    for image, seed in enumerate(seeds):
        model = BigramModel(seed)
        if decoding == "beam":
            alone.append(_decode(model, config, rows=1))
        else:
            alone.append(
                decode_rows(model, [2, 3], [str(image)], config, Vocabulary(SEP, (0,)), CPU)
            )
    assert found.ids == [ids for each in alone for ids in each.ids]
    assert found.finish_reasons == [r for each in alone for r in each.finish_reasons]
    assert found.sum_logprobs == pytest.approx([s for each in alone for s in each.sum_logprobs])
    assert together.sizes[0] == 4, "the prompt is read once an image"
    assert together.sizes[1:] == sorted(together.sizes[1:], reverse=True)
    assert together.sizes[-1] < together.sizes[1]


def test_ranks_are_closed_by_rows_from_the_end() -> None:
    kept = torch.tensor([True, False, True, False, False, True, True])
    assert close_ranks(kept).tolist() == [0, 5, 2, 6]
    assert close_ranks(torch.tensor([True, True])).tolist() == [0, 1]
    assert close_ranks(torch.tensor([False, False])).tolist() == []


@pytest.mark.parametrize("decoding", ["beam", "nucleus", "greedy"])
def test_a_row_without_numbers_ends_alone(decoding: str) -> None:
    seeds = (3, 4, 5)
    config = CaptionConfig(decoding=decoding, max_new_tokens=5)
    broken = TwoModels(*seeds)
    broken.tables[1] = float("nan")
    found, expected = _decode(broken, config, rows=3), _decode(TwoModels(*seeds), config, rows=3)
    assert found.finish_reasons[1] == "nan"
    assert found.ids[1] == []
    assert np.isnan(found.sum_logprobs[1])
    assert [found.ids[0], found.ids[2]] == [expected.ids[0], expected.ids[2]]


def test_official_decoding_is_the_released_sampler() -> None:
    """Penalty on prompt and caption, lengths less the prompt, the draws of a nucleus; step by step by hand."""

    class Flat(BigramModel):
        def logits(self, before: Tensor, last: Tensor) -> Tensor:
            return self.table[before, last] / 8

    config = CaptionConfig(decoding="official", max_new_tokens=9, min_new_tokens=4, seed=5)
    vocabulary, prompt = Vocabulary(SEP), [2, 3]
    names = [f"image-{index}" for index in range(40)]
    found = decode_rows(Flat(0), prompt, names, config, vocabulary, CPU)
    nucleus = CaptionConfig(top_k=50, repetition_penalty=1.1)
    for name, ids in zip(names, found.ids, strict=True):
        text, keys = list(prompt), np.array([draw_key(5, name, 0)], np.uint64)
        for position in range(7):
            logits = Flat(0).logits(torch.tensor([text[-2]]), torch.tensor([text[-1]]))
            blocked = [SEP] if position < 2 else []
            logits = constrain(logits, torch.tensor([text]), nucleus, blocked_ids=blocked)
            token = int(draw(logits, torch.from_numpy(uniforms(keys, position)), nucleus))
            if token == SEP:
                break
            text.append(token)
        assert ids == text[2:]
    assert {len(ids) for ids in found.ids} >= {2, 7}
    assert any(0 in ids for ids in found.ids), "nothing is forbidden"


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_a_large_repetition_penalty_lets_no_token_come_twice(decoding: str) -> None:
    config = CaptionConfig(decoding=decoding, max_new_tokens=4, repetition_penalty=1e6)
    model = BigramModel(7)
    model.table = model.table.abs() + 0.1  # a penalty makes small what is above 0
    model.table[:, :, SEP] = -50.0
    penalised = _decode(model, config, rows=1).ids[0]
    model.tokens = None
    free = dataclasses.replace(config, repetition_penalty=1.0)
    assert len(set(_decode(model, free, rows=1).ids[0])) < 4
    assert len(set(penalised)) == len(penalised) == 4


def test_no_images_give_no_captions(model: MED, tokenizer: MEDTokenizer) -> None:
    for decoding in ("nucleus", "beam"):
        captioner = MEDCaptioner(model, tokenizer, CaptionConfig(decoding=decoding))
        assert captioner.caption(torch.zeros(0, 3, 32, 32), []) == []


def test_length_penalty_prefers_long_captions() -> None:
    lengths = []
    for penalty in (0.0, 1.0, 4.0):
        config = CaptionConfig(
            decoding="beam", num_beams=250, max_new_tokens=4, length_penalty=penalty
        )
        found = _decode(BigramModel(13), config, rows=1)
        best = max(
            (mean * length ** (1.0 - penalty), ids)
            for mean, ids, length in (
                (mean, ids, len(ids) + (len(ids) < 4))
                for mean, ids in _all_captions(BigramModel(13), 4)
            )
        )
        assert found.ids == [best[1]]
        lengths.append(len(found.ids[0]))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


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
        (
            {"decoding": "beams"},
            "decoding must be one of nucleus, greedy, beam, official, got 'beams'",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens must be above 0, got 0"),
        ({"min_new_tokens": 30}, r"min_new_tokens must be in \[0, max_new_tokens\], got 30"),
        ({"decoding": "greedy", "num_captions": 2}, "greedy decoding gives one caption"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number, got nan"),
        ({"decoding": "official", "top_k": 40}, "decoding official fixes top_k at 50, got 40"),
    ],
)
def test_caption_config_names_field_value_and_bound(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CaptionConfig(**change)
