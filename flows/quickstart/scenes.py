"""What can be in a picture of the world, how people say it, and whether a sentence is true of it.

A scene is one or two kinds of coloured shapes on a coloured ground. The grammar is small on purpose: whatever a
captioner writes can be checked word for word, with no judge in between.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "yellow": (250, 214, 50),
    "green": (44, 160, 70),
    "blue": (38, 84, 204),
    "white": (242, 242, 242),
    "black": (28, 28, 28),
    "orange": (245, 132, 31),
    "purple": (128, 48, 160),
    "pink": (247, 140, 186),
    "brown": (121, 78, 46),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "cross",
    "ring",
    "star",
    "diamond",
    "heart",
    "moon",
    "arrow",
)
PATTERNS = ("plain", "striped", "dotted")

# The first WEB_FORMS are what web pages say; people use all.
FORMS = (
    "{things} on {ground}",
    "{things} on a {ground} background",
    "a pattern of {things} on {ground}",
    "there are {things} on {ground}",
    "{things} with a {ground} background",
    "many {things} on {ground}",
)
WEB_FORMS = 3

PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
_SINGULARS = {plural: shape for shape, plural in PLURALS.items()}
_THING = rf"(?P<color{{0}}>{'|'.join(COLORS)}) (?P<shape{{0}}>{'|'.join(_SINGULARS)})"
_SENTENCE = re.compile(
    r"(?:a pattern of |there are |many )?"
    + _THING.format(1)
    + r"(?: and "
    + _THING.format(2)
    + r")? (?:on|with)(?: a)?(?: (?P<pattern>striped|dotted))?"
    + rf" (?P<ground>{'|'.join(COLORS)})(?: background)?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What is in one picture: (color, shape) of each kind of thing, and the ground behind them."""

    things: tuple[tuple[str, str], ...]
    ground: str
    pattern: str = "plain"

    def to_json(self) -> str:
        """One line of JSON, for the truth table."""
        return json.dumps([self.things, self.ground, self.pattern])

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """The scene that `to_json` wrote."""
        things, ground, pattern = json.loads(text)
        return cls(things=tuple((c, s) for c, s in things), ground=ground, pattern=pattern)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The words that scenes of one world may use."""

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    patterns: tuple[str, ...] = ("plain",)

    def scenes(self, num_things: int) -> int:
        """How many different scenes with this many things there are (order of things ignored)."""
        singles = (len(self.colors) - 1) * len(self.shapes)
        choices = singles if num_things == 1 else singles * (singles - 1) // 2
        return len(self.colors) * len(self.patterns) * choices

    def draw(self, rng: np.random.Generator, num_things: int) -> Scene:
        """A scene drawn evenly: the ground differs from every thing, and no two things are equal."""
        ground = _pick(rng, self.colors)
        others = [color for color in self.colors if color != ground]
        things: list[tuple[str, str]] = []
        while len(things) < num_things:
            thing = (_pick(rng, others), _pick(rng, self.shapes))
            if thing not in things:
                things.append(thing)
        return Scene(things=tuple(things), ground=ground, pattern=_pick(rng, self.patterns))


def describe(scene: Scene, form: int = 0) -> str:
    """A true sentence about the scene, in the given one of `FORMS`."""
    things = " and ".join(f"{color} {PLURALS[shape]}" for color, shape in scene.things)
    ground = scene.ground if scene.pattern == "plain" else f"{scene.pattern} {scene.ground}"
    sentence = FORMS[form].format(things=things, ground=ground)
    return sentence.replace(" a orange background", " an orange background")


def caption_is_true(caption: str, scene: Scene) -> bool:
    """Whether the caption is a whole sentence of the grammar and every word of it fits the scene.

    Case and punctuation do not matter. A sentence that leaves out a thing, the ground's colour or its
    pattern is not true; nor is one with words outside the grammar (file names, adverts).
    """
    said = parse(caption)
    if said is None:
        return False
    return (said.ground, said.pattern) == (scene.ground, scene.pattern) and sorted(
        said.things
    ) == sorted(scene.things)


def parse(caption: str) -> Scene | None:
    """The scene that a caption describes, or None when it is not a sentence of the grammar."""
    words = " ".join(re.sub(r"[^a-z ]", " ", caption.lower()).split())
    words = words.removeprefix("a picture of ").replace(" an ", " a ")
    match = _SENTENCE.fullmatch(words)
    if match is None:
        return None
    things = [(match["color1"], _SINGULARS[match["shape1"]])]
    if match["color2"]:
        things.append((match["color2"], _SINGULARS[match["shape2"]]))
    return Scene(things=tuple(things), ground=match["ground"], pattern=match["pattern"] or "plain")


def swap_one_word(scene: Scene, vocabulary: Vocabulary, rng: np.random.Generator) -> Scene:
    """The scene with one colour, shape or ground replaced by another: nearly right, and wrong."""
    color, shape = scene.things[0]
    rest = scene.things[1:]
    what = rng.integers(3)
    if what == 0:
        color = _pick(rng, [c for c in vocabulary.colors if c not in (color, scene.ground)])
    elif what == 1:
        shape = _pick(rng, [s for s in vocabulary.shapes if s != shape])
    else:
        taken = {scene.ground, *(c for c, _ in scene.things)}
        ground = _pick(rng, [c for c in vocabulary.colors if c not in taken])
        return Scene(things=scene.things, ground=ground, pattern=scene.pattern)
    return Scene(things=((color, shape), *rest), ground=scene.ground, pattern=scene.pattern)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
