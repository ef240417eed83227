"""llama2.c's ``tokenizer.bin``, encoding and decoding as its ``run.c`` does.

The file, little-endian: int32 length of the longest token, then for each token float32 score,
int32 length, bytes. How many tokens there are only the model knows. Ids 0 to 2 are unknown, start
and end; ids 3 to 258 are the raw bytes, spelled "<0x00>" to "<0xFF>".

Encoding puts a space before the text, looks every UTF-8 character up (one that is not a token
becomes its bytes) and then merges the adjacent pair whose joined text is the token of the best
score, the leftmost of equals, until no pair makes a token. Decoding drops the space after the start
token.

Different from run.c: text may hold NUL, which there ends it; and a character that came as raw bytes
is decoded from them, where run.c prints no raw byte that is not printable ASCII. As in run.c, in a
vocabulary that has pieces of "<0x41>" as tokens, such text can merge into the raw byte.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

from minitx.checkpoints.common import short, unreadable
from minitx.checkpoints.merging import merge_best_first
from minitx.checkpoints.tokenizer import Tokenizer, check_text
from minitx.errors import MinitxError

_START, _END = 1, 2
_FIRST_BYTE = 3  # id of the raw byte 0
_LEAST_SCORE = -1e10  # run.c merges only what scores better

# run.c's reading of UTF-8: a character is a byte and up to three continuation bytes after it; stray
# continuation bytes are taken four at a time.
_CHARACTER = re.compile(rb"[^\x80-\xbf][\x80-\xbf]{0,3}|[\x80-\xbf]{1,4}", re.DOTALL)
_RAW_BYTE = re.compile(rb"<0x([0-9A-Fa-f]{2})>")


class Llama2cTokenizer(Tokenizer):
    """The tokenizer of a ``tokenizer.bin`` (the interface: ``tokenizer.py``).

    tokens: the text of each token, by id, raw bytes spelled out; scores: one for each.
    `eos` is the start token: it stands between texts, and run.c stops where it is generated.
    """

    def __init__(self, tokens: list[bytes], scores: list[float]):
        self.tokens, self.scores = list(tokens), list(scores)
        self.vocab_size = len(self.tokens)
        self.bos = self.eos = _START
        self.special_ids = frozenset({_START, _END})
        self._ids: dict[bytes, int] = {}
        for id, token in enumerate(self.tokens):
            self._ids.setdefault(token, id)
        self._check()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`; with `special` the start token first, as run.c has it."""
        check_text(text)
        return self._encode(text.encode("utf-8"), special)

    def encode_bytes(self, data: bytes) -> list[int]:
        """As `encode`, for bytes that need not be UTF-8."""
        return self._encode(data, True)

    def token_bytes(self, id: int, previous: int | None = None) -> bytes:
        """What run.c decodes `id` to after `previous`; the start token, put first, is not text."""
        self._check_id(id)
        if id == _START and previous is None:
            return b""
        token = self.tokens[id]
        if previous == _START and token.startswith(b" "):
            token = token[1:]
        raw = _RAW_BYTE.fullmatch(token)
        return bytes([int(raw[1], 16)]) if raw else token

    def _encode(self, data: bytes, special: bool) -> list[int]:
        ids = [_START] if special else []
        if data:
            ids.append(self._ids[b" "])
        for character in _CHARACTER.findall(data):
            id = self._ids.get(character)
            ids += [_FIRST_BYTE + byte for byte in character] if id is None else [id]
        return merge_best_first(ids, self._merge)

    def _merge(self, left: int, right: int) -> tuple[float, int] | None:
        id = self._ids.get(self.tokens[left] + self.tokens[right])
        if id is None or self.scores[id] <= _LEAST_SCORE:
            return None
        return -self.scores[id], id

    def _check(self) -> None:
        """What encoding relies on: the raw bytes where run.c looks for them, and a space."""
        for byte in range(256):
            id, needed = _FIRST_BYTE + byte, b"<0x%02X>" % byte
            found = self.tokens[id] if id < self.vocab_size else None
            if found != needed:
                raise MinitxError(
                    f"token {id} of {self.vocab_size} is {short(found)}; expected {needed!r}, for "
                    "a character that is not a token becomes its bytes: use llama2.c's tokenizer.bin"
                )
        if b" " not in self._ids:
            raise MinitxError("no token is a single space, which run.c puts before every text")


def read_llama2c_tokenizer(path, vocab_size: int) -> Llama2cTokenizer:
    """The tokenizer in the file `path`, which has `vocab_size` tokens, as many as its model.

    Raises MinitxError for a file that is truncated, has bytes left over or lengths that cannot be.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        return Llama2cTokenizer(*_parse(data, vocab_size))
    except MinitxError as error:
        raise MinitxError(f"{path}: {error}.") from None


def _parse(data: bytes, vocab_size: int) -> tuple[list[bytes], list[float]]:
    if len(data) < 4:
        raise MinitxError(f"the file has {len(data)} bytes, not even the 4 of its header")
    (longest,) = struct.unpack_from("<i", data)
    tokens: list[bytes] = []
    scores: list[float] = []
    at = 4
    for id in range(vocab_size):
        if len(data) - at < 8:
            raise MinitxError(
                f"the file ends after {id} tokens, but the model has {vocab_size}; it is truncated "
                "or belongs to another model"
            )
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if math.isnan(score):
            raise MinitxError(f"token {id} has the score NaN; expected a number")
        if not 0 < length <= min(longest, len(data) - at):
            raise MinitxError(
                f"token {id} claims {length} bytes, but the file has {len(data) - at} left and its "
                f"header says that the longest token has {longest}"
            )
        tokens.append(data[at : at + length])
        scores.append(score)
        at += length
    if at < len(data):
        raise MinitxError(
            f"{len(data) - at} bytes are left after {vocab_size} tokens, as many as the model has; "
            "the tokenizer belongs to another model"
        )
    return tokens, scores
