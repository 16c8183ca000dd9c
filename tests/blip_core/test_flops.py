import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blip_core import MED, MEDConfig
from blip_core.flops import step_flops, vision_flops

ALL = ("itc", "itm", "lm")


def test_step_flops_of_the_base_preset_are_the_known_ones() -> None:
    base = MEDConfig.preset("base")
    assert 3 * vision_flops(base) == pytest.approx(105.4e9, rel=1e-3)
    assert vision_flops(base) == pytest.approx(35.1e9, rel=1e-3), "what the momentum encoder takes"
    total = step_flops(base, num_text_tokens=14, objectives=ALL)
    assert total == pytest.approx(203.6e9, rel=3e-3)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_vision_flops_are_what_torch_counts(name: str) -> None:
    config = MEDConfig.preset(name)
    with torch.device("meta"):
        model = MED(config)
        pixels = torch.zeros(1, 3, config.vision.image_size_px, config.vision.image_size_px)
    for block in model.vision.blocks:
        block.attn.fused_attn = False  # plain products, which the counter knows on every device
    with FlopCounterMode(display=False) as counter:
        model.encode_image(pixels)
    assert vision_flops(config) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_step_flops_count_projections_as_often_as_they_are_made() -> None:
    base = MEDConfig.preset("base")
    counts = [
        step_flops(base, num_text_tokens=14, objectives=ALL, num_projections=times)
        for times in (1, 4)
    ]
    assert counts[1] - counts[0] == pytest.approx(3 * 3 * 12 * 4 * 197 * 768 * 768)
    assert counts[1] == pytest.approx(253.8e9, rel=3e-3), "keys and values in every pass"


def test_step_flops_count_only_what_is_trained() -> None:
    base = MEDConfig.preset("base")
    vision = vision_flops(base)
    whole = step_flops(base, num_text_tokens=14, objectives=ALL)
    frozen = step_flops(base, num_text_tokens=14, objectives=ALL, vision_frozen=True)
    assert whole - frozen == pytest.approx(3 * vision), "backward, and the momentum encoder's pass"
    captioning = step_flops(base, num_text_tokens=14, objectives=("lm",))
    assert 3 * vision < captioning < whole - vision
    wider = dataclasses.replace(base, text=dataclasses.replace(base.text, vocab_size=60_000))
    more = step_flops(wider, num_text_tokens=14, objectives=ALL)
    assert more - whole == pytest.approx(3 * 2 * 13 * 768 * (60_000 - base.text.vocab_size))
