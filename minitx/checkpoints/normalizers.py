"""Normalizers, the first step of a tokenizer: text -> text, before it is split into words.

NFC, NFKC, NFD, NFKD    Unicode normalization, by the Unicode version of the running Python. (The
                        reference has Unicode 12's: "㋿", added later, is "令和" by NFKC only here.)
Prepend, Replace        SentencePiece's spelling of spaces: " a b" and "a b" become "▁a▁b"
Strip, Lowercase        whitespace at the ends; lowercase letters, one by one
ByteLevel               bytes as printable characters (byte_characters.py)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

from minitx.checkpoints.byte_characters import to_byte_characters
from minitx.checkpoints.pre_tokenize import is_whitespace
from minitx.checkpoints.tokenizer_steps import Step, steps

Normalizer = Callable[[str], str]


def prepend(prefix: str, text: str) -> str:
    return prefix + text if text else text


def replace(old: str, new: str, text: str) -> str:
    return text.replace(old, new)


def strip(left: bool, right: bool, text: str) -> str:
    start, stop = 0, len(text)
    while left and start < stop and is_whitespace(text[start]):
        start += 1
    while right and start < stop and is_whitespace(text[stop - 1]):
        stop -= 1
    return text[start:stop]


def lowercase(text: str) -> str:
    return "".join(map(str.lower, text))  # one by one: no special case for a final sigma


def in_turn(functions: list[Normalizer]) -> Normalizer:
    return lambda text: reduce(lambda found, function: function(found), functions, text)


# ---------------------------------------------------------------------------------------- reading


def read_normalizer(file: Path, step) -> Normalizer:
    """The "normalizer" of a ``tokenizer.json``. MinitxError names one that is not supported."""
    return in_turn([_read(step) for step in steps(file, "normalizer", step, "normalizers")])


def _read(step: Step) -> Normalizer:
    if step.type in ("NFC", "NFKC", "NFD", "NFKD"):
        return partial(unicodedata.normalize, step.type)
    if step.type == "Prepend":
        return partial(prepend, step.string("prepend"))
    if step.type == "Replace":
        return partial(replace, literal_pattern(step), step.string("content"))
    if step.type == "Strip":
        return partial(strip, step.boolean("strip_left"), step.boolean("strip_right"))
    if step.type == "Lowercase":
        return lowercase
    if step.type == "ByteLevel":
        return to_byte_characters
    raise step.unsupported("NFC, NFKC, NFD, NFKD, Prepend, Replace, Strip, Lowercase or ByteLevel")


def literal_pattern(step: Step) -> str:
    """The text that a Replace looks for; a regular expression is not supported."""
    pattern = step.fields.get("pattern")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(text, str) or not text:
        raise step.unsupported('a pattern {"String": "some text"}')
    return text
