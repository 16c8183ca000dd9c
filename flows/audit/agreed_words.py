"""Words on which people agree: where one names it, most others who look at the same picture do too.

A written caption that names such a thing, when nobody who looked at the picture did, is contradicted. The idea is that of
CHAIR (Rohrbach et al., 2018, object hallucination), with the words found in the captions instead of a list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from flows.audit.planting import GRAMMAR, begin_alike, plain

LEAST_AGREEMENT = 0.5
"""Mean share of the other captions that have the word, over all captions with it."""
LEAST_IMAGES = 3
"""Images in which a word must occur."""


class AgreedWords:
    """The words that people agree on, found in images with two captions or more."""

    def __init__(self, texts_of_images: Iterable[Sequence[str]]) -> None:
        agreeing: Counter[str] = Counter()
        others: Counter[str] = Counter()
        images: Counter[str] = Counter()
        for texts in texts_of_images:
            said = [set(words(text)) for text in texts]
            if len(said) < 2:
                continue
            counts = Counter(word for text in said for word in text)
            for word, count in counts.items():
                images[word] += 1
                agreeing[word] += count * (count - 1)
                others[word] += count * (len(said) - 1)
        self.words = frozenset(
            word
            for word, number in images.items()
            if number >= LEAST_IMAGES
            and word not in GRAMMAR
            and agreeing[word] >= LEAST_AGREEMENT * others[word]
        )

    def contradicted(self, text: str, own_texts: Sequence[str]) -> list[str]:
        """The agreed words of a text that none of the image's captions has, in any of their forms."""
        own = {word for each in own_texts for word in words(each)}
        return [
            word
            for word in words(text)
            if word in self.words
            and word not in own
            and not any(len(word) > 3 and begin_alike(word, other) for other in own)
        ]


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without the points around them."""
    return [word for word in plain(text).split() if any(letter.isalnum() for letter in word)]
