import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import blip_core  # noqa: F401 - lets transformers import beside a CPU build of torch
from blip_core import CaptionConfig
from blip_core.generation import Vocabulary, draw_key, uniforms
from blip_core.sampling import constrain, nucleus_probs, sample

SEP, VOCAB = 1, 6
NOTHING = torch.zeros(1, 0, dtype=torch.int64)


def _sorted_nucleus(logits: Tensor, config: CaptionConfig) -> Tensor:
    """The nucleus as its definition says it, by sorting."""
    probs = torch.softmax(logits.float() / config.temperature, dim=-1).double()
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    if config.top_k:
        ordered[:, config.top_k :] = 0.0
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    ordered = torch.where(ordered.cumsum(dim=-1) - ordered < config.top_p, ordered, 0.0)
    kept = torch.zeros_like(probs).scatter(1, tokens, ordered)
    return kept / kept.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("top_k", [0, 7, 50])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.11, 0.53, 0.91, 0.999])
def test_nucleus_is_that_of_a_sorted_vocabulary(spread: float, top_p: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(round(spread * 100) + top_k)
    logits = spread * torch.randn(5, 3000, generator=generator)
    logits[:, :40] = float("-inf")
    logits[1] = logits[1].round()  # many equal ones
    config = CaptionConfig(top_p=top_p, top_k=top_k, temperature=0.7)
    found, expected = nucleus_probs(logits, config), _sorted_nucleus(logits, config)
    # a sum in another order may put a token on the other side of the line, if it lies on it
    sizes = torch.stack([(found > 0).sum(dim=-1), (expected > 0).sum(dim=-1)])
    assert (sizes[0] - sizes[1]).abs().max() <= 1
    torch.testing.assert_close(found, expected, atol=2e-3 if spread < 1 else 1e-5, rtol=1e-3)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=16), min_size=2, max_size=400),
    top_p=st.floats(0.01, 1.0),
)
def test_nucleus_holds_enough_mass_and_not_a_token_more(logits: list[float], top_p: float) -> None:
    row = torch.tensor([logits])
    probs = torch.softmax(row.double(), dim=-1)[0]
    kept = nucleus_probs(row, CaptionConfig(top_p=top_p))[0] > 0
    mass = float(probs[kept].sum())
    assert mass >= top_p - 1e-6
    assert mass - float(probs[kept].min()) < top_p + 1e-6
    if not kept.all():
        assert float(probs[kept].min()) >= float(probs[~kept].max()) - 1e-9
        ties = probs == probs[kept].min()
        assert kept[ties].tolist() == sorted(kept[ties].tolist(), reverse=True), "first ones first"


@pytest.mark.parametrize("num_new", [0, 3, 9])
def test_official_decoding_is_the_chain_of_transformers_processors(num_new: int) -> None:
    from transformers import (
        LogitsProcessorList,
        MinLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    from blip_core.generation import as_nucleus

    generator = torch.Generator().manual_seed(num_new)
    logits = 2 * torch.randn(4, 300, generator=generator)
    ids = torch.randint(5, 300, (4, 4 + num_new), generator=generator)
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.1),
            MinLengthLogitsProcessor(10, eos_token_id=SEP),
            TopKLogitsWarper(50),
            TopPLogitsWarper(0.9),
        ]
    )
    expected = torch.softmax(chain(ids, logits.clone()), dim=-1)
    official = CaptionConfig(decoding="official", max_new_tokens=30, min_new_tokens=10)
    config = as_nucleus(official, 4)
    assert (config.max_new_tokens, config.min_new_tokens) == (26, 6)
    blocked = Vocabulary(SEP).blocked(num_new, config)
    found = nucleus_probs(constrain(logits, ids, config, blocked_ids=blocked), config)
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-4)


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


def test_min_new_tokens_forbids_sep_and_forbidden_ids_never_come() -> None:
    logits = torch.zeros(1, VOCAB)
    config = CaptionConfig(min_new_tokens=2)
    early = constrain(
        logits, NOTHING, config, blocked_ids=Vocabulary(SEP, (0, 4)).blocked(1, config)
    )
    assert torch.isinf(early)[0].nonzero().flatten().tolist() == [0, 1, 4]
    late = constrain(
        logits, NOTHING, config, blocked_ids=Vocabulary(SEP, (0, 4)).blocked(2, config)
    )
    assert torch.isinf(late)[0].nonzero().flatten().tolist() == [0, 4]


def test_repetition_penalty_lowers_generated_tokens_only() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 4.0]])
    config = CaptionConfig(repetition_penalty=2.0, min_new_tokens=0)
    seen = torch.tensor([[0, 1, 0]])
    changed = constrain(logits, seen, config, blocked_ids=[])
    assert changed.tolist() == [[1.0, -4.0, 1.0, 4.0]]
