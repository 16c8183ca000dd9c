"""Rules that tell alt texts which are no captions: each a name that SQL can count, and a pattern.

A text that a rule meets keeps its row in `captions`, with the rule as its status, and goes no further; its image stays,
and the captioner writes for it.
"""

import re
from collections.abc import Callable, Collection

from storage.errors import ConfigError

MOST_CHARS = 1000
_WORD = re.compile(r"[^\W\d_]{2,}")
_FILE_NAME = re.compile(r"\S+\.(jpe?g|png|gif|webp|bmp|tiff?|heic|svg|avif)", re.IGNORECASE)
_CAMERA = re.compile(
    r"(img|dsc[fn]?|dcim|pic|image|photo|foto|screenshot|scan|p|wp)?[\s_-]*\d[\d\s_().-]*",
    re.IGNORECASE,
)
_URL = re.compile(r"(https?://|www\.)\S+", re.IGNORECASE)
_MAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*[a-z]", re.IGNORECASE)
_PHONE = re.compile(
    # As people write them: with a country code, an area code that begins with 0 or stands in brackets, or as in
    # North America; a row of years is none.
    r"(?<![\w.-])(?:\+\d[\d ()./-]{7,}\d|\(?00?[1-9][\d ()./-]{6,}\d|\(\d{2,5}\)[ ./-]?\d[\d ./-]{4,}\d"
    r"|\d{3}[.-]\d{3}[.-]\d{4})(?!\w)"
)
_BOILERPLATE = frozenset(
    """image|images|photo|photos|picture|pic|logo|icon|avatar|thumbnail|thumb|banner|placeholder|untitled|no image|
    no image available|image not available|image coming soon|click to enlarge|click to zoom|enlarge|zoom|loading|
    profile picture|profile photo|user avatar|featured image|main image|product image|slide|header image|cover|
    default|alt text|image description|share|facebook|twitter|instagram|pinterest|youtube|linkedin|email|print|
    advertisement|ad|menu|search|close|play|video""".replace("\n", "")
    .replace("    ", "")
    .split("|")
)


def _letters(text: str) -> int:
    return sum(letter.isalpha() for letter in text)


def _has_phone(text: str) -> bool:
    return any(
        9 <= sum(sign.isdigit() for sign in found.group()) <= 15 for found in _PHONE.finditer(text)
    )


RULES: dict[str, Callable[[str], bool]] = {
    "no_letters": lambda text: _letters(text) == 0,
    "too_short": lambda text: _letters(text) < 3 or (text.isascii() and not _WORD.search(text)),
    "too_long": lambda text: len(text) > MOST_CHARS,
    "file_name": lambda text: bool(_FILE_NAME.fullmatch(text) or _CAMERA.fullmatch(text)),
    "url_like": lambda text: bool(_URL.search(text)),
    "boilerplate": lambda text: text.strip(" .!:-_").lower() in _BOILERPLATE,
    "e_mail": lambda text: bool(_MAIL.search(text)),
    "phone": _has_phone,
}
"""By name, in the order in which they are asked; the first that a text meets is its status."""
ALL = "all"


def checked_rules(names: Collection[str]) -> tuple[str, ...]:
    """The rules meant by names, in order; `all` means every one. ConfigError names one that there is not."""
    unknown = [name for name in names if name not in RULES and name != ALL]
    if unknown:
        raise ConfigError(
            f"text_rules: {', '.join(unknown)} is no rule; there are {', '.join(RULES)}, and {ALL}"
        )
    return tuple(name for name in RULES if ALL in names or name in names)


def rule_met(text: str, rules: Collection[str]) -> str | None:
    """The first of some rules (as `checked_rules` gives them) that a text meets."""
    stripped = text.strip()
    return next((name for name in rules if RULES[name](stripped)), None)
