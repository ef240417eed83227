"""Added tokens: literal strings such as "<|endoftext|>", split off before pre-tokenization.

As in Hugging Face ``tokenizers``: tokens with ``normalized=False`` are matched first, in the raw
text; the others are matched in the remaining pieces after normalization. The leftmost match wins;
among matches at the same position, the longest.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from minitx.checkpoints.pre_tokenize import WORD_CLASSES, fine_class, is_whitespace

# The two zero-width joiners, and circled or squared letters: symbols with the Alphabetic property.
_OTHER_WORD_CHARS = re.compile(
    "[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]"
)


@dataclass(frozen=True)
class AddedToken:
    """One added token and its flags, as in ``tokenizer.json``."""

    content: str
    id: int
    special: bool = True  # omitted by decode(..., skip_special=True)
    lstrip: bool = False  # the match includes whitespace to its left
    rstrip: bool = False  # and to its right
    single_word: bool = False  # no match next to a word character
    normalized: bool = False  # matched in the normalized text


class AddedTokenSplitter:
    """Splits text at added tokens: `split(text)` -> (normalized) text pieces and ids in order.

    unmatched: ids of tokens whose text stays text.
    """

    def __init__(
        self,
        tokens: Iterable[AddedToken],
        normalize: Callable[[str], str],
        unmatched: Container[int] = (),
    ):
        self.normalize = normalize
        tokens = list(tokens)
        raw = {t.content: t for t in tokens if not t.normalized}
        normalized = {normalize(t.content): t for t in tokens if t.normalized}
        self._raw, self._normalized = _Matcher(raw, unmatched), _Matcher(normalized, unmatched)

    def split(self, text: str) -> list[str | int]:
        pieces: list[str | int] = []
        for piece in self._raw.split(text):
            if isinstance(piece, int):
                pieces.append(piece)
            else:
                pieces += self._normalized.split(self.normalize(piece))
        return pieces


class _Matcher:
    def __init__(self, tokens: dict[str, AddedToken], unmatched: Container[int]):
        tokens.pop("", None)  # nothing is left of it after normalization
        self.tokens, self.unmatched = tokens, unmatched
        longest_first = sorted(tokens, key=len, reverse=True)  # "|" takes the first alternative
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def split(self, text: str) -> list[str | int]:
        if not self.pattern:
            return [text] if text else []
        pieces: list[str | int] = []
        done = 0  # text[:done] is in `pieces`
        for match in self.pattern.finditer(text):
            token, (start, stop) = self.tokens[match.group()], match.span()
            if token.id in self.unmatched:
                continue
            if token.single_word and _adjacent_to_word(text, start, stop):
                continue
            if token.lstrip:
                while start > done and is_whitespace(text[start - 1]):
                    start -= 1
                start = max(start, done)  # the token before may have taken its whitespace
            while token.rstrip and stop < len(text) and is_whitespace(text[stop]):
                stop += 1
            if start >= stop:  # or even all of it
                continue
            if done < start:
                pieces.append(text[done:start])
            pieces.append(token.id)
            done = stop
        return pieces + ([text[done:]] if done < len(text) else [])


def _adjacent_to_word(text: str, start: int, stop: int) -> bool:
    left, right = text[start - 1 : start] if start else "", text[stop : stop + 1]
    return any(char and _is_word_char(char) for char in (left, right))


def _is_word_char(char: str) -> bool:
    r"""\w as Unicode defines it for regular expressions (UTS #18, annex C). Python's \w lacks
    combining marks and includes more numbers."""
    if unicodedata.category(char) in ("No", "Pc"):
        return unicodedata.category(char) == "Pc"
    return fine_class(char) in WORD_CLASSES or _OTHER_WORD_CHARS.match(char) is not None
