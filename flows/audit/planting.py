"""The texts of canaries: one true text an image, and mismatches of three kinds whose truth is known.

A mismatch is never a text that anyone gave the image, nor one of an image that shares a text with it: two pictures
of the same thing are no mismatch.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flows.stream import ImageRow

WRITTEN = "written"
"""Kind of what the round's captioner writes for a canary image: nobody knows its truth."""
NUM_CANDIDATES = 32
"""Texts of other images among which the judge finds the hardest."""
SHORT, MEDIUM = 5, 12
"""Most words of a short and of a medium text."""
GRAMMAR = frozenset(
    [
        "a",
        "about",
        "after",
        "against",
        "along",
        "an",
        "and",
        "are",
        "around",
        "as",
        "at",
        "away",
        "be",
        "been",
        "behind",
        "beside",
        "between",
        "by",
        "down",
        "during",
        "for",
        "from",
        "front",
        "has",
        "have",
        "her",
        "him",
        "his",
        "in",
        "inside",
        "into",
        "is",
        "it",
        "its",
        "near",
        "next",
        "of",
        "off",
        "on",
        "onto",
        "or",
        "out",
        "outside",
        "over",
        "past",
        "that",
        "the",
        "their",
        "them",
        "there",
        "they",
        "this",
        "through",
        "to",
        "toward",
        "towards",
        "two",
        "under",
        "up",
        "very",
        "was",
        "were",
        "while",
        "who",
        "with",
        "without",
    ]
)
"""English words that say little by themselves: swapped, they would often leave a text true."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryImage:
    """A human image that nothing was trained on, with all texts that people gave it."""

    row: ImageRow
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """The texts of one image."""

    image: CanaryImage
    true: str
    random: str | None
    swapped: str | None
    candidates: tuple[str, ...]
    """Mismatches of which the judge picks the hardest."""


def plant(
    images: Sequence[CanaryImage], human_texts: Iterable[str], seed: int
) -> Iterator[Planted]:
    """Choose the texts of every image; they depend on seed, image_id and the texts alone."""
    swaps = SwappedWords(human_texts)
    images_of: dict[str, set[int]] = defaultdict(set)
    for number, image in enumerate(images):
        for text in image.texts:
            images_of[plain(text)].add(number)
    pool = sorted((text, number) for number, image in enumerate(images) for text in image.texts)
    for number, image in enumerate(images):
        key = f"{seed} {image.row.image_id}"
        same = set().union(*(images_of[plain(text)] for text in image.texts)) | {number}
        others = _others(pool, same, _Draws(f"{key} others"))
        true = image.texts[_Draws(f"{key} true").below(len(image.texts))]
        yield Planted(
            image=image,
            true=true,
            random=others[0] if others else None,
            swapped=swaps.swap(true, image.texts, _Draws(f"{key} swapped")),
            candidates=tuple(others[1:]),
        )


def stratum(text: str) -> str:
    """The length of a text in words, as short, medium or long."""
    words = len(text.split())
    return "short" if words <= SHORT else "medium" if words <= MEDIUM else "long"


class SwappedWords:
    """Words that people use in the same place: between the same neighbours."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._between: dict[tuple[str, str], set[str]] = defaultdict(set)
        for text in set(texts):
            for before, word, after in _places(plain(text).split()):
                self._between[before, after].add(word)

    def swap(self, text: str, own_texts: Sequence[str], draw: _Draws) -> str | None:
        """`text` with one word replaced by one that none of the image's texts has; None when there is none."""
        words = text.split()
        own = {word for each in own_texts for word in plain(each).split()}
        choices: list[tuple[int, list[str]]] = []
        for index, (before, word, after) in enumerate(_places(plain(text).split())):
            others = self._between[before, after] - own
            fitting = sorted(other for other in others - GRAMMAR if not begin_alike(other, word))
            if fitting and word not in GRAMMAR:
                choices.append((index, fitting))
        if not choices or len(plain(text).split()) != len(words):
            return None
        index, fitting = choices[draw.below(len(choices))]
        words[index] = fitting[draw.below(len(fitting))]
        return " ".join(words)


class _Draws:
    """Draws that depend on a key alone."""

    def __init__(self, key: str) -> None:
        self._key, self._count = key, 0

    def below(self, n: int) -> int:
        """A whole number in [0, n)."""
        self._count += 1
        digest = hashlib.sha256(f"canary text {self._key} {self._count}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % n


def _others(pool: Sequence[tuple[str, int]], same: set[int], draw: _Draws) -> list[str]:
    """Up to 1 + NUM_CANDIDATES different texts of images that share none with this one."""
    found: dict[str, None] = {}
    for _ in range(8 * (1 + NUM_CANDIDATES)):
        text, number = pool[draw.below(len(pool))]
        if number not in same:
            found.setdefault(text)
        if len(found) > NUM_CANDIDATES:
            break
    return list(found)


def plain(text: str) -> str:
    """Lower case, without the points at the end of words."""
    return " ".join(word.strip(".,!?;:\"'") or word for word in text.lower().split())


def _places(words: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    padded = ["<", *words, ">"]
    yield from zip(padded, words, padded[2:], strict=False)


def begin_alike(one: str, other: str) -> bool:
    """Whether two words may be forms of one."""
    stem = min(len(one), len(other), 4)
    return one[:stem] == other[:stem]


def texts_of(planted: Planted, hard: str | None) -> Mapping[str, str]:
    """kind -> text, of the kinds that an image has."""
    texts = {
        "true": planted.true,
        "random": planted.random,
        "hard": hard,
        "swapped": planted.swapped,
    }
    return {kind: text for kind, text in texts.items() if text is not None}
