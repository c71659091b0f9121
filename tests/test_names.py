"""Names of tokens: the allowed characters, and the text that reaches a terminal or a log."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.names import checked_name, printable

CONTROLS = "\n\t\x1b\x00\x7f\x85\x9b\u2028\u2029"
BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
HIDDEN = "\u200b\ufeff\U000e0001\U000e0041\U000e007f\u2062\u206a\ufff9"
NO_CHARACTERS = "\ud800\udcff\ufdd0\uffff\ue000\U000f0000\U0003ffff\u0378"
SCRIPTS = [
    *("田中\u3000太郎", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "क्\u200dष", "👩\u200d💻 laptop", "ま゙"),
    "\u0600\u0605\U00013430\U0001343f\U0001bca0\U0001bca3 1",
    *("1\ufe0f\u20e3 clé", "Qui\u202f? Moi\u00a0!", "ᠠ\u180eᠰ", "\u06dd\u0661", "名前 'ü'".ljust(200)),
]
BLANKS = ["", " ", "\u3000", "\u2800", "\u3164", "\u115f\u1160", "\uffa0", "\u034f", "\u17b4\ufe0f", "\xad", "\u200d"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_script_is_a_name(name: str) -> None:
    """A name in any script, with its joiners and spaces, is accepted and shown as typed."""
    assert checked_name(name) == printable(name) == name


@pytest.mark.parametrize("character", [*CONTROLS, *BIDIRECTIONAL, *HIDDEN, *NO_CHARACTERS])
def test_dangerous_character_is_refused(character: str) -> None:
    """A character that controls a terminal, changes the reading direction or is invisible is refused, and escaped."""
    message = rf"must not contain U\+{ord(character):04X} \([^()]+\); leave it out$"
    for name in (character, f"a{character}b"):
        with pytest.raises(ValueError, match=message) as caught:
            checked_name(name)
        assert str(caught.value).isprintable()
        assert printable(name) == name.encode("unicode_escape").decode()


def test_error_describes_the_character() -> None:
    """The error describes the character to leave out in plain words."""
    for character, words in (("\u202e", "RIGHT-TO-LEFT OVERRIDE"), ("\x1b", "a control character")):
        with pytest.raises(ValueError, match=rf"U\+{ord(character):04X} \({words}\)"):
            checked_name(character)


@pytest.mark.parametrize("blank", BLANKS)
def test_invisible_name_is_refused(blank: str) -> None:
    """The list does not show a token without a visible name; beside a visible character a blank one is accepted."""
    for name in (blank, blank * 3):
        with pytest.raises(ValueError, match="must not be empty or invisible"):
            checked_name(name)
    assert checked_name(f"a{blank}") == f"a{blank}"


def test_long_name_is_refused() -> None:
    """A name has at most 200 characters."""
    with pytest.raises(ValueError, match="longer than 200"):
        checked_name("a" * 201)


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet=st.characters(), max_size=30))
def test_shown_text_controls_nothing(text: str) -> None:
    """No text of a file starts a line, moves the cursor or changes the reading direction on a terminal or in a log."""
    shown = printable(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert not set(shown) & set(BIDIRECTIONAL)
    assert not text.isprintable() or shown == text
