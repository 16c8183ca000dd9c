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


def _is_phone(found: re.Match[str]) -> bool:
    return 9 <= sum(sign.isdigit() for sign in found.group()) <= 15


def _has_phone(text: str) -> bool:
    return any(map(_is_phone, _PHONE.finditer(text)))


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
PLACEHOLDER = "placeholder"
"""The rule that a text is found under many addresses: the plan of an intake knows (plan.sql)."""
LANGUAGE = "language"
"""Status of a text in a language that is not wanted; naming languages switches it on (cleaning.py)."""
ALL = "all"

_MASKS = ("<email>", "<phone>")


def checked_rules(names: Collection[str]) -> tuple[str, ...]:
    """The rules meant by names, in order; `all` means every one. ConfigError names one that there is not."""
    every = (*RULES, PLACEHOLDER)
    unknown = [name for name in names if name not in every and name != ALL]
    if LANGUAGE in unknown:
        raise ConfigError(
            "text_rules: language is not switched on here; name the languages that may stay (languages: [en])"
        )
    if unknown:
        raise ConfigError(
            f"text_rules: {', '.join(unknown)} is no rule; there are {', '.join(every)}, and {ALL}"
        )
    return tuple(name for name in every if ALL in names or name in names)


def rule_met(text: str, rules: Collection[str]) -> str | None:
    """The first of some rules (as `checked_rules` gives them) that a text meets, but for those about other rows."""
    stripped = text.strip()
    return next((name for name in rules if name in RULES and RULES[name](stripped)), None)


def masked(text: str) -> str:
    """The text with what the rules `e_mail` and `phone` find replaced by a word that says which it was."""
    mail, phone = _MASKS
    text = _MAIL.sub(mail, text) if "@" in text else text
    return _PHONE.sub(lambda found: phone if _is_phone(found) else found.group(), text)
