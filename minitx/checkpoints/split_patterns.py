r"""The split patterns of GPT-2, GPT-4, Llama 3, Qwen2 and their relatives.

A pattern in a ``tokenizer.json`` is a regular expression for another engine, and running a foreign
one could take forever. All of them are alternatives from one small stock, "contractions | words |
numbers | symbols | line breaks | spaces", so a pattern is taken apart into alternatives that we
know, and each of these is written here in Python's syntax over character classes
(``pre_tokenize.py``). Llama 3's, for example:

    (?i:'s|'t|'re|'ve|'m|'ll|'d)     a contraction, in either case
    [^\r\n\p{L}\p{N}]?\p{L}+         a word, with the space or symbol before it
    \p{N}{1,3}                       up to three digits
     ?[^\s\p{L}\p{N}]+[\r\n]*        symbols, with a space before and line breaks after them
    \s*[\r\n]+                       whitespace up to the last line break
    \s+(?!\S)                        whitespace, except a last one that belongs to the next word
    \s+                              whitespace
"""

from __future__ import annotations

import re

from minitx.checkpoints.pre_tokenize import (
    LETTERS,
    LONG_S,
    LOWER_OR_UNCASED,
    MARKS,
    UPPER_OR_UNCASED,
    char_classes,
)

# Qwen2's, for a tokenizer that transformers builds without reading the pattern in the file.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_L, _M = LETTERS, MARKS
_CONTRACTION = rf"'(?:[sSdDmMtT{LONG_S}]|[lL][lL]|[vV][eE]|[rR][eE])"
_UPPER, _LOWER = rf"[{UPPER_OR_UNCASED}{_M}]", rf"[{LOWER_OR_UNCASED}{_M}]"  # in o200k
_WORD_PREFIX = rf"[^\r\n{_L}0-9]?"

# Each alternative as it is spelled in files -> in Python's syntax over classes. A possessive
# quantifier (++) matches the same here, since what follows it could not match what it gives back.
_ALTERNATIVES = {
    **{contraction: contraction for contraction in ("'s 't 're 've 'm 'll 'd".split())},
    r"'(?:[sdmt]|ll|ve|re)": r"'(?:[sdmt]|ll|ve|re)",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)": _CONTRACTION,
    r"(?i:'(?:[sdmt]|ll|ve|re))": _CONTRACTION,
    r"'(?i:[sdmt]|ll|ve|re)": _CONTRACTION,
    r"\p{L}+": rf"[{_L}]+",
    r" ?\p{L}+": rf" ?[{_L}]+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+": rf"{_WORD_PREFIX}[{_L}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+": rf"{_WORD_PREFIX}[{_L}{_M}]+",
    r"\p{N}": "[0-9]",
    r"\p{N}+": "[0-9]+",
    r" ?\p{N}+": " ?[0-9]+",
    r"\p{N}{1,2}": "[0-9]{1,2}",
    r"\p{N}{1,3}": "[0-9]{1,3}",
    r" ?[^\s\p{L}\p{N}]+": rf" ?[^\s{_L}0-9]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*": rf" ?[^\s{_L}0-9]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*": rf" ?[^\s{_L}0-9]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*": rf" ?[^\s{_L}{_M}0-9]+[\r\n]*",
    r"\s*[\r\n]": r"\s*[\r\n]",
    r"\s*[\r\n]+": r"\s*[\r\n]+",
    r"\s+(?!\S)": r"\s+(?!\S)",
    r"\s": r"\s",
    r"\s+": r"\s+",
}
# GPT-4o's two kinds of words: "Word" and "WORD", with a contraction or without.
for _foreign, _here in (
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        rf"{_WORD_PREFIX}{_UPPER}*{_LOWER}+",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        rf"{_WORD_PREFIX}{_UPPER}+{_LOWER}*",
    ),
):
    _ALTERNATIVES[_foreign] = _here
    _ALTERNATIVES[_foreign + r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"] = rf"{_here}(?:{_CONTRACTION})?"

_LONGEST_FIRST = sorted(_ALTERNATIVES, key=len, reverse=True)


def split_pattern(pattern: str) -> re.Pattern | None:
    """The pattern in Python's syntax, to be matched against ``char_classes(text)``; None if it has
    an alternative that is not known."""
    rest = pattern.replace("\r", r"\r").replace("\n", r"\n")  # some files have the characters
    for quantifier in ("+", "?", "*"):
        rest = rest.replace(quantifier + "+", quantifier)  # possessive
    found = []
    while rest:
        known = next((k for k in _LONGEST_FIRST if (rest + "|").startswith(k + "|")), None)
        if known is None:
            return None
        found.append(_ALTERNATIVES[known])
        rest = rest[len(known) :]
        if rest == "|":  # an empty alternative
            return None
        rest = rest.removeprefix("|")
    return re.compile("|".join(found), re.ASCII) if found else None


def matches(pattern: re.Pattern, text: str) -> list[tuple[int, int]]:
    """Where `pattern`, one of `split_pattern`, matches in `text`: (start, stop) of each match."""
    return [match.span() for match in pattern.finditer(char_classes(text))]
