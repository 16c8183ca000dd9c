import io

import numpy as np
import pytest
import torch
from PIL import Image

from blip_core import ConfigError, DecodeError, EvalTransform, TrainTransform, decode_image
from blip_core.augment import OPERATIONS, rand_augment
from blip_core.transforms import CLIP_MEAN, CLIP_STD, random_crop_box, swap_sides


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    """Left half red, right half a green ramp."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30, 0] = 200
    pixels[:, 30:, 1] = np.linspace(0, 250, 30).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "I;16"])
def test_decode_image_gives_rgb_whatever_the_mode(mode: str) -> None:
    image = Image.new(mode, (8, 6))
    kind = {"CMYK": "JPEG"}.get(mode, "PNG")
    decoded = decode_image(_encoded(image, kind))
    assert (decoded.mode, decoded.size) == ("RGB", (8, 6))


def test_decode_image_turns_transparent_to_white_and_obeys_exif() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(_encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    turned = _encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert decode_image(turned).size == (4, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<html>not found</html>", "not_an_image"),
        (_encoded(Image.new("RGB", (64, 64), (1, 2, 3)), "JPEG")[:400], "not_an_image"),
        (_encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "truncated"),
        (_encoded(Image.effect_noise((64, 64), 50), "PNG")[:900], "truncated"),
    ],
    ids=["empty", "html", "header_only", "half_jpeg", "half_png"],
)
def test_decode_image_says_why_it_cannot(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_image(data)
    assert caught.value.reason in (reason, "truncated" if reason == "not_an_image" else reason)
    assert caught.value.reason in str(caught.value)


def test_decode_image_refuses_a_bomb_before_decoding_it() -> None:
    bomb = _encoded(Image.new("1", (20000, 20000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(DecodeError, match="too_many_pixels"):
        decode_image(bomb)
    with pytest.raises(DecodeError, match="10 x 10, at most 99 are decoded"):
        decode_image(_encoded(Image.new("RGB", (10, 10)), "PNG"), max_pixels=99)


def test_eval_transform_resizes_directly_and_normalises(picture: Image.Image) -> None:
    tensor = EvalTransform(32)(picture)
    assert (tensor.shape, tensor.dtype) == ((3, 32, 32), torch.float32)
    resized = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 255.0
    expected = (resized - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("augment", ["none", "flip_crop", "paper"])
def test_train_transform_depends_on_its_generator_only(picture: Image.Image, augment: str) -> None:
    transform = TrainTransform(16, augment)
    first, second = (transform(picture, "a", np.random.default_rng(5))[0] for _ in "ab")
    assert torch.equal(first, second)
    assert first.shape == (3, 16, 16)
    others = {transform(picture, "a", np.random.default_rng(s))[0].sum().item() for s in range(9)}
    assert len(others) == (1 if augment == "none" else 9)


def test_train_transform_swaps_left_and_right_exactly_when_it_mirrors(
    picture: Image.Image,
) -> None:
    transform = TrainTransform(16, "flip_crop", min_crop_area=1.0)
    mirrored = 0
    for seed in range(40):
        tensor, caption = transform(picture, "red on the left", np.random.default_rng(seed))
        red_is_left = tensor[0, :, :4].mean() > tensor[0, :, -4:].mean()
        assert caption == ("red on the left" if red_is_left else "red on the right")
        mirrored += not red_is_left
    assert 10 < mirrored < 30


def test_train_transform_leaves_texts_alone_when_asked_to(picture: Image.Image) -> None:
    transform = TrainTransform(16, "flip_crop", min_crop_area=1.0, swap_sides=False)
    made = [transform(picture, "red on the left", np.random.default_rng(seed)) for seed in range(9)]
    assert {caption for _, caption in made} == {"red on the left"}
    assert len({float(tensor[0, 0, 0]) for tensor, _ in made}) > 1, "mirrored or not"


def test_swap_sides_keeps_case_and_other_words() -> None:
    assert swap_sides("Left of the LEFT leftover, right?") == "Right of the RIGHT leftover, left?"


def test_random_crop_box_keeps_area_and_ratio_within_bounds() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box((120, 80), 0.2, rng) for _ in range(300)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 120
    assert boxes[:, 3].max() <= 80
    area = width * height / 9600
    assert area.min() > 0.18
    assert area.max() <= 1.0
    assert len(np.unique(boxes[:, 0])) > 20
    thin = [random_crop_box((1000, 2), 0.9, rng) for _ in range(20)]
    assert (0, 0, 1000, 2) in thin, "no box of these sides fits: the whole picture"


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_augmentation_keeps_size_and_mode(picture: Image.Image, name: str) -> None:
    for sign in (1.0, -1.0):
        changed = OPERATIONS[name](picture, sign)
        assert (changed.size, changed.mode) == (picture.size, "RGB")


def test_rand_augment_applies_each_of_two_operations_half_of_the_time(
    picture: Image.Image,
) -> None:
    plain = picture.tobytes()
    rng = np.random.default_rng(0)
    untouched = sum(rand_augment(picture, rng).tobytes() == plain for _ in range(400)) / 400
    # a quarter of draws applies nothing; identity, and operations that happen to change nothing, add to it
    assert 0.25 < untouched < 0.5


def test_train_transform_refuses_an_unknown_augmentation() -> None:
    with pytest.raises(ConfigError, match="augment must be one of none, flip_crop, paper"):
        TrainTransform(16, "blip")
