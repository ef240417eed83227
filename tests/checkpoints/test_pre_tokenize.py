"""GPT-2's pre-tokenization: worked examples, and agreement with the reference on all of Unicode."""

import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest

from minitx.checkpoints.pre_tokenize import char_class, is_whitespace, pre_tokenize

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
        ("can\u2019t", ["can", "\u2019", "t"]),  # a curly apostrophe is not a contraction
        ("x1y \u00b2\u2168", ["x", "1", "y", " \u00b2\u2168"]),  # superscripts are numbers
        ("a   b", ["a", "  ", " b"]),
        ("a\n\n b \n", ["a", "\n\n", " b", " \n"]),
        ("a\u00a0b", ["a", "\u00a0", "b"]),  # only U+0020 is attached to a word
        ("e\u0301x", ["e", "\u0301", "x"]),  # a combining mark is neither letter nor number
        ("na\u00efve \u4e16\u754c!", ["na\u00efve", " \u4e16\u754c", "!"]),
        ("\x1c\x1d", ["\x1c\x1d"]),  # separators are not whitespace, unlike in str.isspace
        ("\U0001f642 \ud800", ["\U0001f642", " \ud800"]),
    ],
)
def test_pre_tokenize_worked_examples(text, words):
    assert pre_tokenize(text) == words


@pytest.mark.parametrize("number", range(len(REFERENCE["texts"])))
def test_words_equal_reference(number):
    text, words = REFERENCE["texts"][number], pre_tokenize(REFERENCE["texts"][number])
    assert [len(word) for word in words] == REFERENCE["word lengths"][number]
    assert "".join(words) == text


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="its Unicode is newer than the reference's")
def test_char_classes_equal_reference_for_every_code_point():
    found = {"A": set(), "0": set(), "\t": set(), "!": set()}
    for code in [*range(0xD800), *range(0xE000, 0x110000)]:
        found[char_class(chr(code))].add(code)
    assert found["A"] == code_points(REFERENCE["letters"])
    assert found["0"] == code_points(REFERENCE["numbers"])
    assert found["\t"] == code_points(REFERENCE["white space"])
    assert found["\t"] == {code for code in range(0x110000) if is_whitespace(chr(code))}


def literal_split(text):
    """The pattern, alternative by alternative at every position, without `re`."""

    def end_of_run(at, in_class):
        while at < len(text) and in_class(text[at]):
            at += 1
        return at

    letter, number = (lambda c: char_class(c) == "A"), (lambda c: char_class(c) == "0")
    words, at = [], 0
    while at < len(text):
        end = at
        for suffix in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
            if end == at and text.startswith(suffix, at):
                end = at + len(suffix)
        for in_class in (letter, number, lambda c: char_class(c) == "!"):
            start = at + (text[at] == " ")
            if end == at and end_of_run(start, in_class) > start:
                end = end_of_run(start, in_class)
        if end == at:
            end = end_of_run(at, is_whitespace)
            if end < len(text) and end - at > 1:  # the last whitespace goes to the next word
                end -= 1
        words.append(text[at:end])
        at = end
    return words


def test_pre_tokenize_equals_literal_version():
    rng = random.Random(5)
    pieces = [
        *" \n\t'strevemlldSa1!.\u00a0\u2003\u00e9\u0301\u0663\u00bd\u4e16\U0001f642\x1c",
        "  ",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 25)))
        assert pre_tokenize(text) == literal_split(text), text


def test_char_classes_are_looked_up_lazily():
    from minitx.checkpoints import pre_tokenize as module

    before = len(module._ascii_classes)
    pre_tokenize("plain ASCII 123")
    assert len(module._ascii_classes) == before
    assert unicodedata.category("\u0249")[0] == "L"
    pre_tokenize("\u0249")
    assert 0x249 in module._ascii_classes
