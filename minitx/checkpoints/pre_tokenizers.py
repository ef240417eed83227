"""Pre-tokenizers: split the normalized text into words, which are then merged one by one.

ByteLevel   GPT-2's words (pre_tokenize.py), spelled in byte characters (byte_characters.py)
Split       words by a known pattern (split_patterns.py) or at a literal text
Digits      numbers apart from the rest, or every digit on its own
Metaspace   SentencePiece's spelling: a space is "▁", and one is prepended

Each is called with the words found so far and with whether the first of them starts the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minitx.checkpoints.byte_characters import to_byte_characters
from minitx.checkpoints.pre_tokenize import pre_tokenize
from minitx.checkpoints.split_patterns import matches, split_pattern
from minitx.checkpoints.tokenizer_steps import Step, steps

PreTokenizer = Callable[[list[str], bool], list[str]]
Spans = list[tuple[int, int, bool]]  # (start, stop, whether the pattern matched), in order


@dataclass(frozen=True)
class ByteLevel:
    add_prefix_space: bool = False
    use_regex: bool = True

    def __call__(self, words: list[str], at_start: bool) -> list[str]:
        if self.add_prefix_space:
            words = [word if word.startswith(" ") else " " + word for word in words]
        if self.use_regex:
            words = [part for word in words for part in pre_tokenize(word)]
        return list(map(to_byte_characters, words))


@dataclass(frozen=True)
class Split:
    """pattern: a compiled one over character classes, or a literal text; behavior: what becomes of
    a match; invert: matches and the text between them change roles."""

    pattern: re.Pattern | str
    behavior: str
    invert: bool = False

    def __call__(self, words: list[str], at_start: bool) -> list[str]:
        return [part for word in words for part in self._split(word)]

    def _split(self, word: str) -> list[str]:
        found = _find(self.pattern, word) if isinstance(self.pattern, str) else None
        spans = _with_gaps(matches(self.pattern, word) if found is None else found, len(word))
        if self.invert:
            spans = [(start, stop, not matched) for start, stop, matched in spans]
        return [word[start:stop] for start, stop in BEHAVIORS[self.behavior](spans)]


@dataclass(frozen=True)
class Metaspace:
    """prepend: "always" to every piece of text between added tokens, "first" to the one that starts
    the text, or "never"; split: every "▁" starts a word."""

    replacement: str = "\u2581"
    prepend: str = "always"
    split: bool = True

    def __call__(self, words: list[str], at_start: bool) -> list[str]:
        return [
            part
            for index, word in enumerate(words)
            for part in self._parts(word, at_start and index == 0)
        ]

    def _parts(self, word: str, is_first: bool) -> list[str]:
        word = word.replace(" ", self.replacement)
        if self.prepend == "always" or (self.prepend == "first" and is_first):
            if not word.startswith(self.replacement):
                word = self.replacement + word
        if not self.split:
            return [word]
        spans = _with_gaps(_find(self.replacement, word), len(word))
        return [word[start:stop] for start, stop in _merged_with_next(spans)]


DIGIT = re.compile("[0-9]")  # over character classes


# ------------------------------------------------------------------- what becomes of what matches


def _find(text: str, word: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(re.escape(text), word)]


def _with_gaps(found: list[tuple[int, int]], end: int) -> Spans:
    """The matches and what lies between them, in order."""
    spans, done = [], 0
    for start, stop in found:
        if done < start:
            spans.append((done, start, False))
        spans.append((start, stop, True))
        done = stop
    return spans + ([(done, end, False)] if done < end else [])


def _isolated(spans: Spans) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop, _ in spans]


def _removed(spans: Spans) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop, matched in spans if not matched]


def _joined(spans: Spans, joins: Callable[[bool, bool], bool]) -> list[tuple[int, int]]:
    """Adjacent spans joined where `joins(matched before, matched here)`."""
    words: list[tuple[int, int]] = []
    before = False
    for start, stop, matched in spans:
        if words and joins(before, matched):
            words[-1] = (words[-1][0], stop)
        else:
            words.append((start, stop))
        before = matched
    return words


def _merged_with_previous(spans: Spans) -> list[tuple[int, int]]:
    return _joined(spans, lambda before, here: here and not before)


def _contiguous(spans: Spans) -> list[tuple[int, int]]:
    return _joined(spans, lambda before, here: here == before)


def _merged_with_next(spans: Spans) -> list[tuple[int, int]]:
    mirrored = [(-stop, -start, matched) for start, stop, matched in reversed(spans)]
    return [(-stop, -start) for start, stop in reversed(_merged_with_previous(mirrored))]


BEHAVIORS = {
    "Isolated": _isolated,
    "Removed": _removed,
    "MergedWithPrevious": _merged_with_previous,
    "MergedWithNext": _merged_with_next,
    "Contiguous": _contiguous,
}


# ---------------------------------------------------------------------------------------- reading


def read_pre_tokenizer(file: Path, step) -> PreTokenizer:
    """The "pre_tokenizer" of a ``tokenizer.json``. MinitxError names one that is not supported."""
    found = steps(file, "pre_tokenizer", step, "pretokenizers")
    for before in found[:-1]:
        if before.type == "ByteLevel":  # the next step would see byte characters, not text
            raise before.unsupported("ByteLevel to be the last pre-tokenizer")
    return in_turn([_read(step) for step in found])


def needs_text_offsets(file: Path, step) -> bool:
    """Does it matter to the pre-tokenizer where its first word stood before normalization?"""
    found = steps(file, "pre_tokenizer", step, "pretokenizers")
    return any(s.type == "Metaspace" and _read_metaspace(s).prepend == "first" for s in found)


def in_turn(pre_tokenizers: list[PreTokenizer]) -> PreTokenizer:
    def split(words: list[str], at_start: bool) -> list[str]:
        for pre_tokenizer in pre_tokenizers:
            words = pre_tokenizer(words, at_start)
        return words

    return split


def _read(step: Step) -> PreTokenizer:
    if step.type == "ByteLevel":
        use_regex = step.boolean("use_regex", True)
        return ByteLevel(step.boolean("add_prefix_space", False), use_regex)
    if step.type == "Digits":
        individual = step.boolean("individual_digits", False)
        return Split(DIGIT, "Isolated" if individual else "Contiguous")
    if step.type == "Metaspace":
        return _read_metaspace(step)
    if step.type == "Split":
        behavior = step.get("behavior", None, BEHAVIORS.__contains__, f"one of {list(BEHAVIORS)}")
        if behavior is None:
            raise step.unsupported("a behavior")
        return Split(_read_pattern(step), behavior, step.boolean("invert", False))
    raise step.unsupported("ByteLevel, Split, Digits or Metaspace")


def _read_pattern(step: Step) -> re.Pattern | str:
    pattern = step.fields.get("pattern")
    pattern = pattern if isinstance(pattern, dict) else {}
    text, regex = pattern.get("String"), pattern.get("Regex")
    if isinstance(text, str) and text:
        return text
    known = split_pattern(regex) if isinstance(regex, str) else None
    if known is None:
        raise step.unsupported("the pattern of GPT-2, GPT-4, GPT-4o, Llama 3 or Qwen2")
    return known


def _read_metaspace(step: Step) -> Metaspace:
    schemes = ("always", "first", "never")
    prepend = step.get("prepend_scheme", "always", schemes.__contains__, f"one of {schemes}")
    if step.fields.get("add_prefix_space") is False:  # the older key
        if "prepend_scheme" in step.fields and prepend != "never":
            raise step.unsupported("add_prefix_space and prepend_scheme to agree")
        prepend = "never"
    return Metaspace(replacement(step), prepend, step.boolean("split", True))


def replacement(step: Step) -> str:
    """The character that Metaspace writes for a space."""
    return step.get(
        "replacement", "\u2581", lambda v: type(v) is str and len(v) == 1, "one character"
    )
