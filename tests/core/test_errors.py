"""Messages of errors and notes: one printable line of bounded length, whatever they quote."""

import pickle
import warnings

import pytest

from minitx.errors import LONGEST_MESSAGE, LONGEST_VALUE, MinitxError, MinitxWarning, abbreviate


class Odd:
    def __repr__(self):
        raise RuntimeError("no text")


HOSTILE = ["\n", "\x1b[2J", "\0", "\r", "\u202e", "\ud800", "\x7f", "\u2028"]


@pytest.mark.parametrize("character", HOSTILE)
def test_control_characters_in_a_message_are_escaped(character):
    text = str(MinitxError(f"a{character}b"))
    assert text.isprintable() and text.isascii() and text.startswith("a\\") and text.endswith("b")


def test_message_is_bounded_and_keeps_its_end():
    text = str(MinitxError("file: " + "\n" * 10**7 + " is not valid; write it again."))
    assert len(text) <= LONGEST_MESSAGE
    assert text.startswith("file: ") and text.endswith("is not valid; write it again.")


def test_message_of_an_ordinary_error_is_unchanged():
    text = "k\u00f6nig: expected 3, got '\\n'; write 3."
    assert str(MinitxError(text)) == text
    assert str(pickle.loads(pickle.dumps(MinitxError(text)))) == text


def test_notes_are_one_bounded_line_too():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("one\ntwo " * 1000, MinitxWarning, stacklevel=1)
    text = str(caught[0].message)
    assert text.isprintable() and len(text) <= LONGEST_MESSAGE


VALUES = [
    10**400, -(10**5000), "x" * 10**7, b"x" * 10**7, [1] * 10**6, {i: i for i in range(10**5)},
    "\x1b[2J",
    [[["x" * 10**6] * 1000] * 1000] * 1000, Odd(), [Odd()], {"a": 10**5000}, (10**5000,), 1.5, None,
    "\ud800", object(), {(1, 2): {3}},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_abbreviated_value_is_one_short_ascii_line(value):
    text = abbreviate(value)
    assert text.isprintable() and text.isascii() and 0 < len(text) <= LONGEST_VALUE


def test_abbreviated_small_value_is_its_repr():
    for value in (3, 2**63, "a b", [1, "x"], (1,), (), {"a": [None]}, b"x", True, 1e308):
        assert abbreviate(value) == repr(value)
