"""Added tokens: whole strings such as "<|endoftext|>", cut out of the text before all else.

As in Hugging Face ``tokenizers``: first the tokens with ``normalized=False`` are looked for in the
text as given, then the others in what is left, after normalization. The leftmost match counts, and
of those that start together the longest.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from minitx.checkpoints.pretoken import is_white_space, kind_of

# The two joiners; and circled, squared and blackened letters, symbols that count as alphabetic.
_OTHER_WORD_CHARS = re.compile(
    "[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]"
)


@dataclass(frozen=True)
class AddedToken:
    """One added token, with the flags that ``tokenizer.json`` has for it."""

    content: str
    id: int
    special: bool = True  # left out by decode(..., skip_special=True)
    lstrip: bool = False  # swallows the white space on its left
    rstrip: bool = False  # and on its right
    single_word: bool = False  # counts only where no word character touches it
    normalized: bool = False  # looked for in the normalized text


class AddedTokenSplitter:
    """Cuts added tokens out: `split(text)` gives pieces of (normalized) text and ids, in order."""

    def __init__(self, tokens: Iterable[AddedToken], normalize: Callable[[str], str]):
        self.normalize = normalize
        tokens = list(tokens)
        self._raw = _Matcher({t.content: t for t in tokens if not t.normalized})
        self._normalized = _Matcher({normalize(t.content): t for t in tokens if t.normalized})

    def split(self, text: str) -> list[str | int]:
        pieces: list[str | int] = []
        for piece in self._raw.cut(text):
            if isinstance(piece, int):
                pieces.append(piece)
            else:
                pieces += self._normalized.cut(self.normalize(piece))
        return pieces


class _Matcher:
    def __init__(self, tokens: dict[str, AddedToken]):
        self.tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)  # "|" takes the first that fits
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def cut(self, text: str) -> list[str | int]:
        if not self.pattern:
            return [text] if text else []
        pieces: list[str | int] = []
        done = 0  # everything before it is in `pieces`
        for match in self.pattern.finditer(text):
            token, (start, stop) = self.tokens[match.group()], match.span()
            if token.single_word and _touches_a_word(text, start, stop):
                continue
            while token.lstrip and start > done and is_white_space(text[start - 1]):
                start -= 1
            while token.rstrip and stop < len(text) and is_white_space(text[stop]):
                stop += 1
            if done < start:
                pieces.append(text[done:start])
            pieces.append(token.id)
            done = stop
        return pieces + ([text[done:]] if done < len(text) else [])


def _touches_a_word(text: str, start: int, stop: int) -> bool:
    left, right = text[start - 1 : start] if start else "", text[stop : stop + 1]
    return any(char and _is_word_char(char) for char in (left, right))


def _is_word_char(char: str) -> bool:
    r"""\w as Unicode defines it for patterns (UTS #18, annex C): Python's own \w lacks marks and
    has more numbers."""
    category = unicodedata.category(char)
    if kind_of(char) == "A" or category[0] == "M" or category in ("Nd", "Nl", "Pc"):
        return True
    return _OTHER_WORD_CHARS.match(char) is not None
