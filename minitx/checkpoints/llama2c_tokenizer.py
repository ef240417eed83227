"""The tokenizer of llama2.c (``tokenizer.bin``): encodes and decodes like its ``run.c``.

The file, little-endian: int32 length of the longest token, then for each token float32 score,
int32 length, bytes. The number of tokens is not stored; it comes from the model. Ids 0 to 2 are
unk, bos and eos; ids 3 to 258 are the raw bytes, spelled "<0x00>" to "<0xFF>".

Encoding prepends a space to the text and looks up every UTF-8 character (byte fallback: one that is
not a token becomes its bytes). Then it repeatedly merges the adjacent pair whose concatenation is
the token with the highest score, until no pair can be merged; ties go to the leftmost pair.
Decoding drops the space after bos.

Differences from run.c: NUL may occur in a text (there it ends the text), and all raw bytes are
decoded (run.c prints only printable ASCII ones). As in run.c, if the vocabulary has pieces of
"<0x41>" as tokens, that text can merge into the raw byte.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

from minitx.checkpoints.bpe_merge import merge_best_first
from minitx.checkpoints.common import abbreviate, read
from minitx.checkpoints.tokenizer import Tokenizer, need_valid_unicode
from minitx.errors import MinitxError

_BOS, _EOS = 1, 2
_FIRST_BYTE = 3  # id of the raw byte 0
_MIN_SCORE = -1e10  # run.c merges only pairs with a higher score

# How run.c splits UTF-8: a character is a byte and up to three continuation bytes; stray
# continuation bytes form groups of up to four.
_CHARACTER = re.compile(rb"[^\x80-\xbf][\x80-\xbf]{0,3}|[\x80-\xbf]{1,4}", re.DOTALL)
_RAW_BYTE = re.compile(rb"<0x([0-9A-Fa-f]{2})>")


class Llama2cTokenizer(Tokenizer):
    """The tokenizer of a ``tokenizer.bin`` (the interface: ``tokenizer.py``).

    tokens: the text of each token by id, raw bytes as "<0x00>"; scores: one per token.
    `eos` is the bos token: it separates texts, and run.c stops when it is generated.
    """

    def __init__(self, tokens: list[bytes], scores: list[float]):
        self.tokens, self.scores = list(tokens), list(scores)
        self.vocab_size = len(self.tokens)
        self.bos = self.eos = _BOS
        self.special_ids = frozenset({_BOS, _EOS})
        self._ids: dict[bytes, int] = {}
        for id, token in enumerate(self.tokens):
            self._ids.setdefault(token, id)
        self._check_vocabulary()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`; `special` prepends bos, as in run.c."""
        need_valid_unicode(text)
        return self._encode(text.encode("utf-8"), special)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Like `encode`, for bytes that may be invalid UTF-8."""
        return self._encode(data, True)

    def token_bytes(self, id: int, previous: int | None = None) -> bytes:
        """The bytes that run.c prints for `id` after `previous`; nothing for a leading bos."""
        self._check_id(id)
        if id == _BOS and previous is None:
            return b""
        token = self.tokens[id]
        if previous == _BOS and token.startswith(b" "):
            token = token[1:]
        raw = _RAW_BYTE.fullmatch(token)
        return bytes([int(raw[1], 16)]) if raw else token

    def _check_id(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise MinitxError(
                f"token id {id} is outside the tokenizer's vocabulary of {self.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )

    def _encode(self, data: bytes, special: bool) -> list[int]:
        ids = [_BOS] if special else []
        if data:
            ids.append(self._ids[b" "])
        for character in _CHARACTER.findall(data):
            id = self._ids.get(character)
            ids += [_FIRST_BYTE + byte for byte in character] if id is None else [id]
        return merge_best_first(ids, self._merge)

    def _merge(self, left: int, right: int) -> tuple[float, int] | None:
        id = self._ids.get(self.tokens[left] + self.tokens[right])
        if id is None or self.scores[id] <= _MIN_SCORE:
            return None
        return -self.scores[id], id

    def _check_vocabulary(self) -> None:
        """Encoding needs the raw bytes at ids 3 to 258 and a token for the space."""
        for byte in range(256):
            id, expected = _FIRST_BYTE + byte, b"<0x%02X>" % byte
            found = self.tokens[id] if id < self.vocab_size else None
            if found != expected:
                raise MinitxError(
                    f"token {id} of {self.vocab_size} must be the raw byte {expected!r}, "
                    f"got {abbreviate(found)}; use llama2.c's tokenizer.bin"
                )
        if b" " not in self._ids:
            raise MinitxError(
                "expected a token for a single space, which run.c prepends to every text"
            )


def read_llama2c_tokenizer(path, vocab_size: int) -> Llama2cTokenizer:
    """The tokenizer in the file `path`; `vocab_size` is that of its model.

    Raises MinitxError if the file is truncated, has trailing bytes or impossible lengths.
    """
    path = Path(path)
    data = read(path)
    try:
        return Llama2cTokenizer(*_parse(data, vocab_size))
    except MinitxError as error:
        raise MinitxError(f"{path}: {error}.") from None


def _parse(data: bytes, vocab_size: int) -> tuple[list[bytes], list[float]]:
    if len(data) < 4:
        raise MinitxError(f"expected a header of 4 bytes, got a file of {len(data)}")
    (longest,) = struct.unpack_from("<i", data)
    tokens: list[bytes] = []
    scores: list[float] = []
    at = 4
    for id in range(vocab_size):
        if len(data) - at < 8:
            raise MinitxError(
                f"expected the {vocab_size} tokens of the model, got {id}; the file is truncated "
                "or belongs to another model"
            )
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if math.isnan(score):
            raise MinitxError(f"the score of token {id} must be a number, got NaN")
        if not 0 < length <= min(longest, len(data) - at):
            raise MinitxError(
                f"token {id} has length {length}, but the file has {len(data) - at} bytes left and "
                f"the longest token in its header has {longest}"
            )
        tokens.append(data[at : at + length])
        scores.append(score)
        at += length
    if at < len(data):
        raise MinitxError(
            f"{len(data) - at} bytes follow the {vocab_size} tokens of the model; "
            "the tokenizer belongs to another model"
        )
    return tokens, scores
