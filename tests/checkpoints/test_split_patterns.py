"""Split patterns: worked examples of each, and patterns that are not run."""

import time

import pytest

from minitx.checkpoints.split_patterns import QWEN2, matches, split_pattern

LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PREFIX, CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    f"{PREFIX}{UPPER}*{LOWER}+{CONTRACTION}|{PREFIX}{UPPER}+{LOWER}*{CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words(pattern, text):
    return [text[start:stop] for start, stop in matches(split_pattern(pattern), text)]


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (GPT2, "I'm 1234 I'M\n\n x", ["I", "'m", " 1234", " I", "'", "M", "\n\n", " x"]),
        (LLAMA3, "I'm 1234 I'M\n\n x", ["I", "'m", " ", "123", "4", " I", "'M", "\n\n", " x"]),
        (QWEN2, "12\u0663", ["1", "2", "\u0663"]),
        (LLAMA3, "(word) -x", ["(word", ")", " -", "x"]),  # one symbol goes with a word
        (LLAMA3, "!!\n\n a", ["!!\n\n", " a"]),  # line breaks go with symbols
        (LLAMA3, "  \n\t\n  a", ["  \n\t\n", " ", " a"]),
        (LLAMA3, "x'\u017fy", ["x", "'\u017f", "y"]),  # the long s is an "s" without case
        (GPT2, "x'\u017fy", ["x", "'", "\u017fy"]),
        (LLAMA3, "e\u0301x", ["e", "\u0301x"]),  # a mark is a symbol here
        (GPT4O, "e\u0301x", ["e\u0301x"]),  # and a part of the word here
        (GPT4O, "helloWorld HTMLParser", ["hello", "World", " HTMLParser"]),
        (GPT4O, "DON'T \u01c5a\u4eca", ["DON'T", " \u01c5a\u4eca"]),
        (r"\s+", "a  b", ["  "]),
    ],
)
def test_words_worked_examples(pattern, text, expected):
    assert words(pattern, text) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a|a)*b",
        r"\w+",
        "",
        "|",
        r"\p{L}+|",
        GPT2 + "|x",
        r"\p{N}{1,3}+",
        GPT2.replace("'s", "'S"),
    ],
)
def test_unknown_pattern_is_not_run(pattern):
    assert split_pattern(pattern) is None


def test_other_spellings_are_the_same_pattern():
    text = "It's 123\r\n\r\n naïve?!\n"
    possessive = LLAMA3.replace("]?", "]?+", 1).replace("]+[", "]++[")
    assert words(possessive, text) == words(LLAMA3, text)
    characters = LLAMA3.replace(r"\r", "\r").replace(r"\n", "\n")
    assert words(characters, text) == words(LLAMA3, text)
    assert words(r"'(?:[sdmt]|ll|ve|re)" + GPT2[len("'s|'t|'re|'ve|'m|'ll|'d") :], text) == words(
        GPT2, text
    )


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, GPT4O])
@pytest.mark.parametrize("text", [" ", "\n", "\t ", "A", "a", "1", "!", "'", "\u0301", "\u4eca"])
def test_long_run_is_split_in_linear_time(pattern, text):
    started = time.process_time()
    assert "".join(words(pattern, text * 200_000)) == text * 200_000
    assert time.process_time() - started < 5, "a run of one character must not be quadratic"
