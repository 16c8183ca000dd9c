import shutil

import pytest
import torch
from torch import Tensor

from blip_core import MED, CaptionConfig, ConfigError
from blip_core.attention import attend
from blip_core.decoder import MEDDecoder
from blip_core.packed import PackedLinear, can_pack, for_inference

CLOSE = {"atol": 1e-3, "rtol": 1e-3}


def _whole(model: MED, pixels: Tensor, ids: Tensor) -> Tensor:
    """Logits (N, V) after the last token, without any cache."""
    return model.lm_logits(model.encode_image(pixels), ids, torch.ones_like(ids))[:, -1]


@torch.no_grad()
def test_steps_give_the_logits_of_whole_sequences(model: MED, pixel_values: Tensor) -> None:
    pixels = pixel_values[:2]
    ids = torch.tensor([[5, 8, 9, 10, 11], [5, 20, 21, 22, 23]])
    decoder = MEDDecoder(model, model.encode_image(pixels), max_tokens=5)
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        found = decoder.step(ids[:, start:stop])
        torch.testing.assert_close(found, _whole(model, pixels, ids[:, :stop]), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("per_image", [1, 3])
def test_rows_and_images_move_and_leave(model: MED, pixel_values: Tensor, per_image: int) -> None:
    """Whatever is selected, each row gets what its own tokens and its own image give."""
    generator = torch.Generator().manual_seed(per_image)
    pixels, num_images = pixel_values[:5], 5
    decoder = MEDDecoder(model, model.encode_image(pixels), per_image=per_image, max_tokens=9)
    decoder.step(torch.tensor([[5, 8]]).expand(num_images, -1))
    image_of = torch.arange(num_images).repeat_interleave(per_image)
    ids = torch.tensor([[5, 8]]).expand(len(image_of), -1)
    decoder.select(image_of)
    for keep in (1.0, 0.8, 0.7, 1.0, 0.5, 0.4):
        rows = torch.randperm(len(ids), generator=generator)[: max(1, int(keep * len(ids)))]
        decoder.select(rows)
        ids, image_of = ids[rows], image_of[rows]
        new = torch.randint(5, 40, (len(ids), 1), generator=generator)
        ids = torch.cat([ids, new], dim=1)
        torch.testing.assert_close(decoder.step(new), _whole(model, pixels[image_of], ids), **CLOSE)
        assert decoder._num_images == len(image_of.unique()), "images without rows are let go"


@torch.no_grad()
def test_a_row_may_be_continued_twice(model: MED, pixel_values: Tensor) -> None:
    decoder = MEDDecoder(model, model.encode_image(pixel_values[:2]), per_image=2, max_tokens=4)
    decoder.step(torch.tensor([[5, 8], [5, 8]]))
    decoder.select(torch.tensor([0, 0, 1, 1]))
    decoder.step(torch.tensor([[10], [11], [12], [13]]))
    decoder.select(torch.tensor([1, 1, 3, 2]))
    found = decoder.step(torch.tensor([[20], [21], [22], [23]]))
    ids = torch.tensor([[5, 8, 11, 20], [5, 8, 11, 21], [5, 8, 13, 22], [5, 8, 12, 23]])
    expected = _whole(model, pixel_values[[0, 0, 1, 1]], ids)
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.skipif(not can_pack(torch.float32), reason="this PyTorch packs no weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, rows = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (96,), (40, 64))
    )
    layer = PackedLinear(weight, bias)
    whole = layer(rows)
    expected = torch.nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(
        whole, expected, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0.01
    )
    for count in (1, 2, 3, 4, 7, 16, 33):
        assert torch.equal(layer(rows[:count]), whole[:count])
        assert torch.equal(layer(rows[40 - count :]), whole[40 - count :])


def _assert_alike(found: Tensor, expected: Tensor, dtype: str) -> None:
    if dtype == "float32":
        torch.testing.assert_close(found, expected, **CLOSE)
    off = (found.float() - expected).norm() / expected.norm()
    assert off < 0.1, off


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_inference_copy_computes_what_the_model_does(
    model: MED, pixel_values: Tensor, dtype: str
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ready = for_inference(model, device="cpu", dtype=dtype)
    ids = torch.tensor([[5, 8, 9], [5, 20, 21]])
    mask = torch.ones_like(ids)
    assert any(isinstance(part, PackedLinear) for part in ready.modules()) == can_pack(ready.dtype)
    embeds = ready.encode_image(pixel_values[:2].to(ready.dtype))
    expected_embeds = model.encode_image(pixel_values[:2])
    _assert_alike(embeds, expected_embeds, dtype)
    for name in ("itm_logits", "lm_logits"):
        found = getattr(ready, name)(embeds, ids, mask)
        _assert_alike(found, getattr(model, name)(expected_embeds, ids, mask), dtype)
    assert ready.text.word_embeddings.weight.dtype == ready.dtype
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.float32


@pytest.mark.skipif(not can_pack(torch.float32), reason="this PyTorch packs no weights")
def test_an_inference_copy_cannot_be_copied_again(model: MED) -> None:
    with pytest.raises(ConfigError, match="give the model it was made from"):
        for_inference(for_inference(model, device="cpu"), device="cpu")


@torch.no_grad()
@pytest.mark.parametrize("decoding", ["nucleus", "beam"])
def test_keys_and_values_of_an_image_are_computed_once(
    model: MED, pixel_values: Tensor, decoding: str
) -> None:
    rows: list[int] = []
    attention = model.text.stack()[0].cross_attention
    attention.kv.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    count = 4 if decoding == "nucleus" else 1
    config = CaptionConfig(
        decoding=decoding, num_captions=count, max_new_tokens=6, min_new_tokens=6
    )
    text = model.config.text
    found = model.generate(
        pixel_values[:3], [text.vocab_size - 2], config=config, sep_id=text.vocab_size - 1
    )
    assert len(found.ids) == 3 * count
    assert rows == [3]


@torch.no_grad()
def test_an_answer_does_not_depend_on_how_many_ask_at_once() -> None:
    """Float32, several threads, as many keys as an image of 224 px has: the fused kernel's would."""
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(8, 12, n, 64, generator=generator) for n in (3, 197, 197))
    try:
        torch.set_num_threads(2)
        whole = attend(query, key, value, None)
        for count in (1, 2, 5):
            assert torch.equal(
                attend(query[:count], key[:count], value[:count], None), whole[:count]
            )
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_copy_computes_the_same(model: MED, pixel_values: Tensor) -> None:
    ready = for_inference(model, device="cpu", compile=True)
    assert not any(isinstance(part, PackedLinear) for part in ready.modules())
    assert all(block._compiled_call_impl is not None for block in ready.vision.blocks)
    for batch in (pixel_values[:3], pixel_values[:5]):
        torch.testing.assert_close(ready.encode_image(batch), model.encode_image(batch), **CLOSE)
    ids = torch.tensor([[5, 8, 9], [5, 20, 21]])
    embeds, mask = model.encode_image(pixel_values[:2]), torch.ones_like(ids)
    found = ready.itm_logits(embeds, ids, mask)
    torch.testing.assert_close(found, model.itm_logits(embeds, ids, mask), **CLOSE)
    assert all(block._compiled_call_impl is None for block in model.vision.blocks)
