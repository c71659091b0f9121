"""Names of tokens: any script, but no character that controls a terminal, forges a line or is invisible. Pure.

The general category of a character decides (Unicode Standard, section 4.5). Names are not normalised: two spellings
that look the same are two names.
"""

from __future__ import annotations

import unicodedata

NAME_LIMIT = 200
"""Longest name, in characters."""

_REFUSED = {
    "Cc": "a control character",
    "Cf": "an invisible format character",
    "Cs": "half of a surrogate pair, so the text is not valid UTF-8",
    "Co": "a private-use character",
    "Cn": "an unassigned character",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}

# Format characters (Cf) that scripts need: joiners, the soft hyphen, the Mongolian vowel separator, and the visible
# signs of Arabic, Syriac, Kaithi, Egyptian hieroglyphs and shorthand. All others are refused, including the
# bidirectional controls (Unicode Standard Annex #9) and the tags, which carry hidden text.
_FORMATS = frozenset(
    "\u00ad\u180e\u200c\u200d\u2060\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
    + "".join(map(chr, [*range(0x600, 0x606), *range(0x13430, 0x13440), *range(0x1BCA0, 0x1BCA4)]))
)

# Letters and symbols without ink: Hangul fillers, the empty Braille pattern, the null notehead, the object replacement.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\U0001d159\ufffc")


def checked_name(name: str) -> str:
    """Return *name* unchanged.

    Raises:
        ValueError: it exceeds :data:`NAME_LIMIT`, holds a refused character, or holds no visible one.
    """
    if len(name) > NAME_LIMIT:
        raise ValueError(f"a token's name must not be longer than {NAME_LIMIT} characters")
    for character in name:
        if not _can_be_shown(character):
            raise ValueError(f"a token's name must not contain {_described(character)}; leave it out")
    if not any(unicodedata.category(character)[0] in "LNPS" and character not in _BLANK for character in name):
        raise ValueError("a token's name must not be empty or invisible; give it a letter, a digit or a symbol")
    return name


def printable(text: str) -> str:
    """Return *text* with each character escaped that could control a terminal, forge a log line or be invisible."""
    if text.isprintable():  # the usual case, and fast: a list of 100,000 tokens has 200,000 texts
        return text
    return "".join(c if _can_be_shown(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _can_be_shown(character: str) -> bool:
    return character in _FORMATS or unicodedata.category(character) not in _REFUSED


def _described(character: str) -> str:
    kind = _REFUSED[unicodedata.category(character)]
    return f"U+{ord(character):04X} ({unicodedata.name(character, kind)})"
