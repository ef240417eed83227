r"""GPT-2's pre-tokenization: split text into words; byte-pair merges never cross word boundaries.

The published pattern (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
released code) is

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

where \p{L} is any Unicode letter, \p{N} any number and \s any whitespace. Python's ``re`` has no
\p{..}, so each non-ASCII character is first replaced by one ASCII character of its class: "A" for a
letter, "0" for a number, a tab for whitespace, "!" for anything else. This keeps the length of the
text and the word boundaries, which are then applied to the original text. Nothing is built at
import time; the class of a character is looked up on first use.

Unicode versions: the classes come from ``unicodedata`` of the running Python (3.10 has Unicode 13,
3.11 has 14, 3.12 has 15, 3.13 has 15.1). Letters and numbers added since, up to Unicode 16, are
listed below, so Pythons 3.10 to 3.14 split alike and like the reference (Hugging Face
``tokenizers`` 0.23 has Unicode 16). A Python with a later Unicode knows letters that the reference
still treats as symbols; so does the ``regex`` package.

Other patterns (GPT-4's, Llama 3's, single digits) are not implemented.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

_SPLIT = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)

# Ranges of code points (hexadecimal) that are unassigned in Unicode 13 and letters or numbers in
# Unicode 16.
_LETTERS_SINCE_13 = """870-887 889-88e 8b5 8c8-8c9 c5d cdd 170d 171f 1b4c 1c89-1c8a 2c2f 2c5f
9ffd-9fff a7c0-a7c1 a7cb-a7cd a7d0-a7d1 a7d3 a7d5-a7dc a7f2-a7f4 10570-1057a 1057c-1058a 1058c-10592
10594-10595 10597-105a1 105a3-105b1 105b3-105b9 105bb-105bc 105c0-105f3 10780-10785 10787-107b0
107b2-107ba 10d4a-10d65 10d6f-10d85 10ec2-10ec4 10f70-10f81 11071-11072 11075 1123f-11240
11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 11740-11746 11ab0-11abf 11bc0-11be0 11f02
11f04-11f10 11f12-11f33 12f90-12ff0 1342f 13441-13446 13460-143fa 16100-1611d 16a70-16abe
16d40-16d6c 18cff 1aff0-1aff3 1aff5-1affb 1affd-1affe 1b11f-1b122 1b132 1b155 1df00-1df1e
1df25-1df2a 1e030-1e06d 1e290-1e2ad 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0 1e7e0-1e7e6 1e7e8-1e7eb
1e7ed-1e7ee 1e7f0-1e7fe 2a6de-2a6df 2b735-2b739 2ebf0-2ee5d 31350-323af"""
_NUMBERS_SINCE_13 = """10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16ac0-16ac9
16d70-16d79 1ccf0-1ccf9 1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa"""

_LETTER, _NUMBER, _SPACE, _SYMBOL = "A", "0", "\t", "!"


def pre_tokenize(text: str) -> list[str]:
    """Splits `text` into GPT-2's words; concatenated they are `text`.

    A lone surrogate counts as a symbol.
    """
    if text.isascii():
        return _SPLIT.findall(text)
    return [text[m.start() : m.end()] for m in _SPLIT.finditer(text.translate(_ascii_classes))]


def is_whitespace(char: str) -> bool:
    r"""Unicode's White_Space property, which is \s of the reference; ``str.isspace`` also accepts
    the separators U+001C to U+001F."""
    return char.isspace() and char not in "\x1c\x1d\x1e\x1f"


def char_class(char: str) -> str:
    """The class of a character: "A" letter, "0" number, tab whitespace, "!" anything else."""
    if is_whitespace(char):
        return _SPACE
    category = unicodedata.category(char)
    if category == "Cn":  # unassigned in this Python's Unicode, perhaps not in a later version
        return _classes_since_13().get(ord(char), _SYMBOL)
    return {"L": _LETTER, "N": _NUMBER}.get(category[0], _SYMBOL)


@cache
def _classes_since_13() -> dict[int, str]:
    classes = {}
    for char, ranges in ((_LETTER, _LETTERS_SINCE_13), (_NUMBER, _NUMBERS_SINCE_13)):
        for first_last in ranges.split():
            first, _, last = first_last.partition("-")
            classes |= dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), char)
    return classes


class _AsciiClasses(dict):
    """Code point -> code point of its class, for ``str.translate``; filled on first use."""

    def __missing__(self, code: int) -> int:
        self[code] = code if code < 128 else ord(char_class(chr(code)))
        return self[code]


_ascii_classes = _AsciiClasses()
