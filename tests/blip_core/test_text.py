import pytest
import torch

from blip_core import MED


def _kv(model: MED, pixel_values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with torch.no_grad():
        return model.project_image(model.encode_image(pixel_values))


@torch.no_grad()
def test_causal_logits_do_not_see_later_tokens(model: MED, pixel_values: torch.Tensor) -> None:
    kv = _kv(model, pixel_values[:1])
    ids = torch.tensor([[5, 8, 9, 10, 11, 12]])
    mask = torch.ones_like(ids)
    logits = model.lm_logits_from_kv(kv, ids, mask)
    for changed in range(1, 6):
        other = ids.clone()
        other[0, changed] = 20
        moved = (model.lm_logits_from_kv(kv, other, mask) - logits).abs().amax(dim=-1)[0]
        assert moved[:changed].max() == 0.0
        assert moved[changed] > 1e-4


@torch.no_grad()
def test_fused_mode_sees_every_token(model: MED, pixel_values: torch.Tensor) -> None:
    kv = _kv(model, pixel_values[:1])
    ids = torch.tensor([[5, 8, 9, 10]])
    other = torch.tensor([[5, 8, 9, 20]])
    mask = torch.ones_like(ids)
    first = model.text(ids, mask, mode="fused", image_kv=kv)[0, 0]
    second = model.text(other, mask, mode="fused", image_kv=kv)[0, 0]
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["text", "fused", "causal"])
@torch.no_grad()
def test_padding_changes_nothing_for_real_tokens(
    model: MED, pixel_values: torch.Tensor, mode: str
) -> None:
    kv = None if mode == "text" else _kv(model, pixel_values[:1])
    ids = torch.tensor([[5, 8, 9]])
    short = model.text(ids, torch.ones_like(ids), mode=mode, image_kv=kv)
    padded_ids = torch.tensor([[5, 8, 9, 0, 33, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    padded = model.text(padded_ids, mask, mode=mode, image_kv=kv)
    torch.testing.assert_close(padded[:, :3], short, atol=1e-5, rtol=1e-4)


def test_modes_insist_on_an_image_or_on_none(model: MED, pixel_values: torch.Tensor) -> None:
    ids = torch.tensor([[5, 8]])
    with pytest.raises(ValueError, match="needs an image"):
        model.text(ids, None, mode="fused")
    with pytest.raises(ValueError, match="reads no image"):
        model.text(ids, None, mode="text", image_kv=_kv(model, pixel_values[:1]))


@pytest.mark.parametrize("mode", ["text", "fused", "causal"])
@pytest.mark.parametrize("is_trained", [True, False], ids=["training", "inference"])
def test_a_text_that_is_all_padding_is_finite_and_touches_no_other(
    mode: str, is_trained: bool, model: MED, pixel_values: torch.Tensor
) -> None:
    image_kv = None
    if mode != "text":
        image_kv = model.project_image(model.encode_image(pixel_values[:2]))
    ids = torch.randint(5, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.set_grad_enabled(is_trained):
        whole = model.text(ids, mask, mode=mode, image_kv=image_kv)
        mask[1] = 0
        hidden = model.text(ids, mask, mode=mode, image_kv=image_kv)
    assert torch.isfinite(hidden).all()
    torch.testing.assert_close(hidden[0], whole[0])
    if is_trained:
        model.zero_grad()
        hidden.sum().backward()
        grads = [each.grad for each in model.text.parameters() if each.grad is not None]
        assert all(torch.isfinite(grad).all() for grad in grads)
