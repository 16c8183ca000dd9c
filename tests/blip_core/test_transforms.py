import io

import numpy as np
import pytest
import torch
from PIL import Image

from blip_core import (
    ConfigError,
    DecodeError,
    EvalTransform,
    TrainTransform,
    decode_for,
    decode_image,
    picture_tensor,
)
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


def _grey_ramp(dtype: type, brightest: float) -> Image.Image:
    return Image.fromarray((np.linspace(0, 1, 256).reshape(16, 16) * brightest).astype(dtype))


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (_grey_ramp(np.uint8, 255), "PNG"),
        (_grey_ramp(np.uint16, 65535), "PNG"),
        (_grey_ramp(np.uint16, 65535), "TIFF"),
        (_grey_ramp(np.int32, 255), "TIFF"),
        (_grey_ramp(np.int32, 100_000), "TIFF"),
        (_grey_ramp(np.float32, 1.0), "TIFF"),
        (_grey_ramp(np.float32, 255.0), "TIFF"),
    ],
    ids=["8", "16_png", "16_tiff", "32_of_8", "32", "float_of_1", "float_of_255"],
)
def test_decode_image_keeps_the_greys_whatever_their_depth(image: Image.Image, kind: str) -> None:
    decoded = np.asarray(decode_image(_encoded(image, kind)), dtype=np.int64)
    assert np.abs(decoded[..., 0].ravel() - np.arange(256)).max() <= 1


def test_decode_image_keeps_colours_of_cmyk_and_of_a_palette_with_a_clear_entry() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.array(decode_image(_encoded(cmyk, "JPEG")).getpixel((8, 8)))
    assert np.abs(red - [255, 0, 0]).max() <= 3
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.paste(1, (2, 0, 4, 2))
    decoded = decode_image(_encoded(palette, "PNG", transparency=0))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((3, 1)) == (10, 200, 30)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_decode_image_gives_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_decode_image_says_the_same_of_the_same_bytes() -> None:
    said = set()
    for _ in range(3):
        with pytest.raises(DecodeError) as caught:
            decode_image(b"no picture at all")
        said.add(str(caught.value))
    assert said == {"not_an_image: cannot identify image file these bytes"}


def _photo(width: int, height: int) -> Image.Image:
    """Smooth colours, so that what a reduced decoding changes can be told from noise."""
    across, down = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    waves = [np.sin(across + down), np.cos(across * 2), np.sin(down * 3 + across)]
    return Image.fromarray((np.stack(waves, axis=-1) * 100 + 128).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "target_px", "decoded"),
    [
        ((640, 480), 384, (640, 480)),
        ((768, 767), 384, (768, 767)),
        ((768, 768), 384, (384, 384)),
        ((1600, 1200), 64, (200, 150)),
        ((1601, 1199), 300, (801, 600)),
        ((4000, 300), 200, (4000, 300)),
    ],
)
def test_decode_image_reduces_a_jpeg_of_twice_the_target_but_never_below_it(
    size: tuple[int, int], target_px: int, decoded: tuple[int, int]
) -> None:
    data = _encoded(_photo(*size), "JPEG", quality=90)
    assert decode_image(data, target_px=target_px).size == decoded
    whole = decode_image(data)
    assert whole.size == size, "only where a target is named"
    transform = EvalTransform(target_px, quick=True)
    reduced, full = picture_tensor(data, transform), transform(whole)
    plain = EvalTransform(target_px)
    assert torch.equal(picture_tensor(data, plain), plain(whole))
    assert torch.equal(reduced, full) == (decoded == size)
    assert (reduced - full).abs().mean() < 0.02


def test_decode_image_reduces_jpegs_alone_and_turns_what_it_reduced() -> None:
    assert decode_image(_encoded(_photo(300, 200), "PNG"), target_px=50).size == (300, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _encoded(_photo(400, 200), "JPEG", exif=exif)
    assert decode_image(turned, target_px=100).size == (100, 200)


@pytest.mark.parametrize(
    ("size", "accepted"),
    [((1, 1), True), ((100, 1), True), ((1, 101), False), ((10_000, 1), False)],
)
def test_picture_tensor_refuses_a_picture_that_is_all_length(
    size: tuple[int, int], accepted: bool
) -> None:
    data = _encoded(Image.new("RGB", size, (10, 20, 30)), "PNG")
    if accepted:
        pixels = picture_tensor(data, EvalTransform(16, quick=True))
        assert pixels.shape == (3, 16, 16)
        assert pixels.std(dim=(1, 2)).max() == 0
        return
    with pytest.raises(DecodeError, match=f"too_thin: {size[0]} x {size[1]}, one side more than"):
        picture_tensor(data, EvalTransform(16, quick=True))
    assert picture_tensor(data, EvalTransform(16)).shape == (3, 16, 16), "as in training"


def test_decode_for_gives_a_transform_the_same_picture_whatever_stands_beside_it() -> None:
    data = _encoded(_photo(1000, 800), "JPEG", quality=90)
    sides = (100, 384, 90, 500)
    transforms = [EvalTransform(side, quick=True) for side in sides]
    pictures = decode_for(data, [*transforms, EvalTransform(90)])
    assert [picture.size for picture in pictures] == [
        (125, 100),
        (500, 400),
        (125, 100),
        (1000, 800),
        (1000, 800),
    ]
    assert pictures[0] is pictures[2], "decoded once"
    for transform, picture in zip(transforms, pictures, strict=False):
        (alone,) = decode_for(data, [transform])
        assert picture.tobytes() == alone.tobytes()


def test_decode_image_takes_64_megapixels_and_refuses_more_than_its_limit() -> None:
    large = _encoded(Image.new("L", (8000, 8000), 200), "JPEG")
    assert decode_image(large, target_px=384).size == (1000, 1000)
    with pytest.raises(DecodeError, match="8000 x 8000, at most 63999999 are decoded"):
        decode_image(large, max_pixels=8000 * 8000 - 1, target_px=384)


def test_eval_transform_resizes_directly_and_normalises(picture: Image.Image) -> None:
    tensor = EvalTransform(32)(picture)
    assert (tensor.shape, tensor.dtype) == ((3, 32, 32), torch.float32)
    resized = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 255.0
    expected = (resized - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(640, 480), (100, 333), (33, 20), (5, 1), (64, 64)])
def test_quick_eval_transform_is_that_of_pillow_within_two_steps(size: tuple[int, int]) -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    pillow, fast = (EvalTransform(64, quick=quick)(image) for quick in (False, True))
    assert fast.is_contiguous()
    steps = (fast - pillow).abs() * torch.tensor(CLIP_STD)[:, None, None] * 255
    assert steps.max() < 2.01
    assert steps.mean() < 0.3, "even of pure noise"
    assert (size == (64, 64)) == torch.equal(fast, pillow) or steps.max() == 0


def test_eval_transform_gives_the_same_bytes_whatever_the_number_of_threads() -> None:
    image = _photo(640, 480)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(EvalTransform(224, quick=True)(image))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


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
