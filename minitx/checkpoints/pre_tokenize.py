r"""GPT-2's pre-tokenization: split text into words; byte-pair merges never cross word boundaries.

The published pattern (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
released code) is

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

where \p{L} is any Unicode letter, \p{N} any number and \s any whitespace. Python's ``re`` has no
\p{..}, so each non-ASCII character is first replaced by a character that stands for its class: "A"
for an uppercase letter, "a" for a lowercase one, "0" for a number, a tab for whitespace, and so on
(`LETTERS` and the other names below). This keeps the length of the text and the word boundaries,
which are then applied to the original text. Nothing is built at import time; the class of a
character is looked up on first use.

Unicode versions: the classes come from ``unicodedata`` of the running Python (3.10 has Unicode 13,
3.11 has 14, 3.12 has 15, 3.13 has 15.1). Letters, numbers and marks added since, up to Unicode 16,
are listed below, so Pythons 3.10 to 3.14 split alike and like the reference (Hugging Face
``tokenizers`` 0.23 has Unicode 16). A Python with a later Unicode knows letters that the reference
still treats as symbols; so does the ``regex`` package.

The patterns of other models are in ``split_patterns.py``.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

# What stands for a class. ASCII characters stand for themselves; of the others only these occur.
_UPPER, _LOWER, _NUMBER, _SPACE, _SYMBOL = "A", "a", "0", "\t", "!"
_UNCASED, _MARK, LONG_S = "\x80", "\x81", "\x82"  # letters without case; combining marks; U+017F

# The same classes inside a regular expression's brackets (with re.ASCII).
LETTERS = rf"A-Za-z{_UNCASED}{LONG_S}"
UPPER_OR_UNCASED, LOWER_OR_UNCASED = rf"A-Z{_UNCASED}", rf"a-z{_UNCASED}{LONG_S}"
MARKS = _MARK
WORD_CLASSES = (_UPPER, _LOWER, _UNCASED, _NUMBER, _MARK)

_GPT2 = re.compile(
    rf"'(?:[stmd]|re|ve|ll)| ?[{LETTERS}]+| ?[0-9]+| ?[^\s{LETTERS}0-9]+|\s+(?!\S)|\s+", re.ASCII
)

# Ranges of code points (hexadecimal) that are unassigned in Unicode 13 but not in Unicode 16.
_SINCE_13 = {
    _UPPER: """1c89 2c2f a7c0 a7cb-a7cc a7d0 a7d6 a7d8 a7da a7dc 10570-1057a 1057c-1058a
1058c-10592 10594-10595 10d50-10d65""",
    _LOWER: """1c8a 2c5f a7c1 a7cd a7d1 a7d3 a7d5 a7d7 a7d9 a7db 10597-105a1 105a3-105b1
105b3-105b9 105bb-105bc 10d70-10d85 1df00-1df09 1df0b-1df1e 1df25-1df2a""",
    _UNCASED: """870-887 889-88e 8b5 8c8-8c9 c5d cdd 170d 171f 1b4c 9ffd-9fff a7f2-a7f4 105c0-105f3
10780-10785 10787-107b0 107b2-107ba 10d4a-10d4f 10d6f 10ec2-10ec4 10f70-10f81 11071-11072 11075
1123f-11240 11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 11740-11746 11ab0-11abf
11bc0-11be0 11f02 11f04-11f10 11f12-11f33 12f90-12ff0 1342f 13441-13446 13460-143fa 16100-1611d
16a70-16abe 16d40-16d6c 18cff 1aff0-1aff3 1aff5-1affb 1affd-1affe 1b11f-1b122 1b132 1b155 1df0a
1e030-1e06d 1e290-1e2ad 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0 1e7e0-1e7e6 1e7e8-1e7eb 1e7ed-1e7ee
1e7f0-1e7fe 2a6de-2a6df 2b735-2b739 2ebf0-2ee5d 31350-323af""",
    _NUMBER: """10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16ac0-16ac9 16d70-16d79
1ccf0-1ccf9 1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa""",
    _MARK: """897-89f 8ca-8d2 c3c cf3 ece 1715 180f 1ac1-1ace 1dfa 10d69-10d6d 10efc-10eff
10f82-10f85 11070 11073-11074 110c2 11241 113b8-113c0 113c2 113c5 113c7-113ca 113cc-113d0 113d2
113e1-113e2 11f00-11f01 11f03 11f34-11f3a 11f3e-11f42 11f5a 13440 13447-13455 1611e-1612f
1cf00-1cf2d 1cf30-1cf46 1e08f 1e2ae 1e4ec-1e4ef 1e5ee-1e5ef""",
}
_BY_CATEGORY = {"Lu": _UPPER, "Lt": _UPPER, "Ll": _LOWER, "Lm": _UNCASED, "Lo": _UNCASED}
_BY_CATEGORY |= {"Nd": _NUMBER, "Nl": _NUMBER, "No": _NUMBER, "Mn": _MARK, "Mc": _MARK, "Me": _MARK}


def pre_tokenize(text: str) -> list[str]:
    """Splits `text` into GPT-2's words; concatenated they are `text`.

    A lone surrogate counts as a symbol.
    """
    if text.isascii():
        return _GPT2.findall(text)
    return [text[m.start() : m.end()] for m in _GPT2.finditer(char_classes(text))]


def char_classes(text: str) -> str:
    """`text` with every non-ASCII character replaced by one that stands for its class."""
    return text if text.isascii() else text.translate(_ascii_classes)


def is_whitespace(char: str) -> bool:
    r"""Unicode's White_Space property, which is \s of the reference; ``str.isspace`` also accepts
    the separators U+001C to U+001F."""
    return char.isspace() and char not in "\x1c\x1d\x1e\x1f"


def char_class(char: str) -> str:
    """The class of a character: "A" letter, "0" number, tab whitespace, "!" anything else."""
    found = fine_class(char)
    if found in (_UPPER, _LOWER, _UNCASED):
        return "A"
    return _SYMBOL if found == _MARK else found


def fine_class(char: str) -> str:
    """What stands for the class of a character: `LETTERS`, "0", a tab, `MARKS` or "!"."""
    if is_whitespace(char):
        return _SPACE
    category = unicodedata.category(char)
    if category == "Cn":  # unassigned in this Python's Unicode, perhaps not in a later version
        return _classes_since_13().get(ord(char), _SYMBOL)
    return _BY_CATEGORY.get(category, _SYMBOL)


@cache
def _classes_since_13() -> dict[int, str]:
    classes = {}
    for char, ranges in _SINCE_13.items():
        for first_last in ranges.split():
            first, _, last = first_last.partition("-")
            classes |= dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), char)
    return classes


class _AsciiClasses(dict):
    """Code point -> what stands for its class, for ``str.translate``; filled on first use."""

    def __missing__(self, code: int) -> str | int:
        self[code] = code if code < 128 else fine_class(chr(code))
        return self[code]


_ascii_classes = _AsciiClasses({0x17F: LONG_S})  # without case it equals "s", in "'s" too
