"""Any text as token ids: read from a file, encoded once, cut into passages.

    text = read_text("notes.txt")         # "-" reads stdin
    ids = first_ids(lm, text, 4096)       # at most so many
    windows(ids, 512, start_of(lm))       # to measure: every token is a target once
    passages(ids, 256, prefix_of(lm))     # to calibrate on

Only as much of a text is read and encoded as is used, so a file of any length will do.
"""

import codecs
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from minitx.errors import MinitxError

MOST_BYTES = 2**26  # of a file or of stdin; what follows is not read


@dataclass(frozen=True)
class Text:
    """A text, and the name under which it is reported."""

    content: str
    name: str = "the text"


def as_text(text: "str | Text") -> Text:
    """A text as a ``Text``; MinitxError if it is none."""
    if isinstance(text, Text):
        return text
    if not isinstance(text, str):
        raise MinitxError(
            f"Expected a text (str), got a {type(text).__name__}; minitx.text.read_text(FILE) "
            "reads one from a file."
        )
    return Text(text, f"the text {_shown(' '.join(text[:24].split()) + '...')!r}")


# Reading -----------------------------------------------------------------------------------------


def read_text(path) -> Text:
    """The text of a UTF-8 file, or of stdin if the path is "-". MinitxError if it cannot be read,
    is empty, or is not text."""
    name = "stdin" if str(path) == "-" else _shown(path)
    data = _stdin() if str(path) == "-" else _file(Path(path))
    if b"\0" in data:
        raise MinitxError(f"{name}: holds NUL bytes, so it is not UTF-8 text; give a text file.")
    cut = len(data) == MOST_BYTES  # perhaps within a character
    try:
        content = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=not cut)
    except UnicodeDecodeError as error:
        raise MinitxError(
            f"{name}: byte {error.start} is not valid UTF-8; give a UTF-8 text file."
        ) from None
    if not content.strip():
        raise MinitxError(f"{name}: expected a text, got an empty one.")
    return Text(content, name)


def _stdin() -> bytes:
    if not sys.stdin:
        raise MinitxError("There is no stdin to read the text from.")
    return sys.stdin.buffer.read(MOST_BYTES)


def _file(path: Path) -> bytes:
    from minitx.checkpoints.common import open_file  # here: the core does not need checkpoints

    try:
        with open_file(path) as file:
            return file.read(MOST_BYTES)
    except MinitxError as error:
        said = str(error).removesuffix(".")
        raise MinitxError(f"{said}; give a UTF-8 text file, or - to read stdin.") from None


def _shown(path) -> str:
    """A path for messages: bounded, without control characters."""
    from minitx.checkpoints.common import abbreviate  # here: the core does not need checkpoints

    text = os.fspath(path)
    return text if text.isprintable() and len(text) <= 100 else abbreviate(text)


# Encoding ----------------------------------------------------------------------------------------


def first_ids(lm, text: Text, count: int) -> list[int]:
    """The first ``count`` ids of the text, without a beginning-of-text token. MinitxError without
    a tokenizer, or for a text of fewer than two tokens."""
    lm.need_tokenizer()
    ids = _encode_first(lm.tokenizer, text.content, count)
    if len(ids) < 2:
        raise MinitxError(
            f"{text.name} has {len(ids)} token{'s' * (len(ids) != 1)}; expected a text of at "
            "least 2."
        )
    return lm.check_ids(ids, any_length=True).tolist()


@lru_cache(maxsize=2)  # several techniques calibrate on the same text
def _encode_first(tokenizer, content: str, count: int) -> list[int]:
    size = 8 * count + 1000  # characters: one token often holds four
    while True:
        piece = content if size >= len(content) else _whole_words(content[:size])
        ids = tokenizer.encode(piece, special=False)
        if len(ids) > count or size >= len(content):
            return ids[:count]
        size *= 2


def _whole_words(piece: str) -> str:
    """Without the last word, which may go on: its first half could be encoded differently."""
    end = max(piece.rfind(" "), piece.rfind("\n"))
    return piece[:end] if end > 0 else piece


def start_of(lm) -> list[int]:
    """[the id that a text starts from: beginning-of-text, else end-of-text], or [] if the model has
    neither."""
    config = lm.model.config
    return list((config.eos if config.bos is None else (config.bos,))[:1])


def prefix_of(lm) -> list[int]:
    """What the tokenizer puts before every prompt: [beginning-of-text] or []."""
    return lm.tokenizer.encode("")


def windows(ids: list[int], length: int, start: list[int]) -> list[list[int]]:
    """Windows of ``length`` inputs and the token that follows each: length + 1 ids, of which all
    but the first are targets. Nothing carries over from one window to the next. Every token of the
    text is a target exactly once, the first one of a window after ``start``; without a start, it is
    predicted from the last token of the window before (and the first of the text is no target).
    """
    if start:
        return [[*start, *ids[a : a + length]] for a in range(0, len(ids), length)]
    return [ids[a : a + length + 1] for a in range(0, len(ids) - 1, length)]


def passages(ids: list[int], length: int, prefix: list[int]) -> list[list[int]]:
    """Passages of ``length`` ids, each beginning with ``prefix``. A shorter rest is left out,
    unless it is all there is."""
    own = max(length - len(prefix), 1)
    whole = max(len(ids) // own, 1)
    return [[*prefix, *ids[a * own : (a + 1) * own]][:length] for a in range(whole)]


def count_bytes(lm, ids: list[int]) -> int:
    """How many bytes of text these ids are."""
    return len(lm.tokenizer.decode_bytes(ids))
