"""The texts of canaries: what is planted is what its label says."""

from hypothesis import given
from hypothesis import strategies as st

from flows.audit.planting import CanaryImage, SwappedWords, _Draws, plant, stratum, texts_of
from flows.stream import ImageRow

COLOURS = ("red", "green", "blue", "black", "white")
SHAPES = ("ring", "star", "cross", "heart")
SCENES = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def texts(colour: str, shape: str) -> tuple[str, ...]:
    return (f"a {colour} {shape}", f"there is a {colour} {shape} on the left")


def picture(number: int, colour: str, shape: str) -> CanaryImage:
    row = ImageRow(image_id=f"{number:032x}", shard="s", offset=0, size=1)
    return CanaryImage(row=row, texts=texts(colour, shape))


ALL = [picture(number, *scene) for number, scene in enumerate(SCENES)]
CORPUS = [text for image in ALL for text in image.texts]


def test_true_text_is_one_of_the_image_and_mismatches_are_of_others() -> None:
    for image, planted in zip(ALL, plant(ALL, CORPUS, 0), strict=True):
        assert planted.true in image.texts
        assert planted.random is not None
        for wrong in (planted.random, *planted.candidates):
            assert wrong in CORPUS
            assert wrong not in image.texts


def test_picture_of_the_same_thing_gives_no_mismatch() -> None:
    twins = [picture(0, "red", "ring"), picture(1, "red", "ring"), picture(2, "blue", "star")]
    for planted in plant(twins, CORPUS, 0):
        own = set(planted.image.texts)
        assert not own & {planted.random, *planted.candidates}


def test_lone_picture_has_a_true_and_a_swapped_text_only() -> None:
    (planted,) = plant(ALL[:1], CORPUS, 0)
    assert set(texts_of(planted, None)) == {"true", "swapped"}


def test_swap_changes_one_word_for_one_of_the_same_place() -> None:
    for image, planted in zip(ALL, plant(ALL, CORPUS, 0), strict=True):
        assert planted.swapped is not None
        before, after = planted.true.split(), planted.swapped.split()
        (old, new), *others = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert not others
        assert {old, new} <= set(COLOURS) or {old, new} <= set(SHAPES)
        assert new not in " ".join(image.texts).split()


def test_swap_finds_none_where_no_other_word_was_used() -> None:
    swaps = SwappedWords(["a cat asleep"])
    assert swaps.swap("a cat asleep", ["a cat asleep"], _Draws("x")) is None


@given(seed=st.integers(0, 5), dropped=st.sets(st.integers(0, len(ALL) - 1), max_size=5))
def test_texts_of_an_image_depend_on_seed_and_id_not_on_order(seed: int, dropped: set[int]) -> None:
    forward = {p.image.row.image_id: p for p in plant(ALL, CORPUS, seed)}
    backward = {p.image.row.image_id: p for p in plant(ALL[::-1], CORPUS[::-1], seed)}
    assert {k: (p.true, p.swapped) for k, p in forward.items()} == {
        k: (p.true, p.swapped) for k, p in backward.items()
    }
    fewer = [image for number, image in enumerate(ALL) if number not in dropped]
    for planted in plant(fewer, CORPUS, seed):
        assert planted.true == forward[planted.image.row.image_id].true


def test_stratum_goes_by_words() -> None:
    assert [stratum("a " * n) for n in (1, 5, 6, 12, 13)] == [
        "short",
        "short",
        "medium",
        "medium",
        "long",
    ]
