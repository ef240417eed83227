"""GPT-2's split: worked examples, and agreement with the reference on all of Unicode."""

import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest

from minitx.checkpoints.pretoken import is_white_space, kind_of, split

REFERENCE = json.loads(
    (Path(__file__).parent.parent / "reference/tokenizer/reference.json").read_text(
        encoding="utf-8"
    )
)


def code_points(ranges):
    found = set()
    for first_last in ranges.split():
        first, last = first_last.split("-")
        found |= set(range(int(first, 16), int(last, 16) + 1))
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("Hello world", ["Hello", " world"]),
        ("Where's Tom? He's  here.", ["Where", "'s", " Tom", "?", " He", "'s", " ", " here", "."]),
        ("'S we'll'", ["'", "S", " we", "'ll", "'"]),
        ("can\u2019t", ["can", "\u2019", "t"]),  # a curly apostrophe makes no contraction
        ("x1y \u00b2\u2168", ["x", "1", "y", " \u00b2\u2168"]),  # superscripts are numbers
        ("a   b", ["a", "  ", " b"]),
        ("a\n\n b \n", ["a", "\n\n", " b", " \n"]),
        ("a\u00a0b", ["a", "\u00a0", "b"]),  # only the space itself joins a word
        ("e\u0301x", ["e", "\u0301", "x"]),  # a combining mark is neither letter nor number
        ("na\u00efve \u4e16\u754c!", ["na\u00efve", " \u4e16\u754c", "!"]),
        ("\x1c\x1d", ["\x1c\x1d"]),  # separators are no white space, unlike str.isspace
        ("\U0001f642 \ud800", ["\U0001f642", " \ud800"]),
    ],
)
def test_worked_examples(text, words):
    assert split(text) == words


@pytest.mark.parametrize("number", range(len(REFERENCE["texts"])))
def test_words_are_those_of_the_reference(number):
    text, words = REFERENCE["texts"][number], split(REFERENCE["texts"][number])
    assert [len(word) for word in words] == REFERENCE["word lengths"][number]
    assert "".join(words) == text


@pytest.mark.skipif(
    sys.version_info >= (3, 15), reason="a later Unicode than the reference has: more letters"
)
def test_kinds_are_those_of_the_reference_for_every_code_point():
    found = {"A": set(), "0": set(), "\t": set(), "!": set()}
    for code in [*range(0xD800), *range(0xE000, 0x110000)]:
        found[kind_of(chr(code))].add(code)
    assert found["A"] == code_points(REFERENCE["letters"])
    assert found["0"] == code_points(REFERENCE["numbers"])
    assert found["\t"] == code_points(REFERENCE["white space"])
    assert found["\t"] == {code for code in range(0x110000) if is_white_space(chr(code))}


def literal_split(text):
    """The pattern tried alternative by alternative at every place, without `re`."""

    def run(at, kind):
        while at < len(text) and kind(text[at]):
            at += 1
        return at

    letter, number = (lambda c: kind_of(c) == "A"), (lambda c: kind_of(c) == "0")
    words, at = [], 0
    while at < len(text):
        end = at
        for suffix in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
            if end == at and text.startswith(suffix, at):
                end = at + len(suffix)
        for kind in (letter, number, lambda c: kind_of(c) == "!"):
            start = at + (text[at] == " ")
            if end == at and run(start, kind) > start:
                end = run(start, kind)
        if end == at:
            end = run(at, is_white_space)
            if end < len(text) and end - at > 1:  # the last white space is left to the next word
                end -= 1
        words.append(text[at:end])
        at = end
    return words


def test_agrees_with_a_literal_reading_of_the_pattern():
    rng = random.Random(5)
    pieces = [
        *" \n\t'strevemlldSa1!.\u00a0\u2003\u00e9\u0301\u0663\u00bd\u4e16\U0001f642\x1c",
        "  ",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 25)))
        assert split(text) == literal_split(text), text


def test_nothing_is_looked_up_before_it_is_needed():
    from minitx.checkpoints import pretoken

    before = len(pretoken._stand_ins)
    split("plain ASCII 123")
    assert len(pretoken._stand_ins) == before
    assert unicodedata.category("\u0249")[0] == "L"
    split("\u0249")
    assert 0x249 in pretoken._stand_ins
