"""The tokenizer interface, and streaming decoding.

    encode(text, special=True) -> list[int]   `special` adds the tokens that start and end a text
    encode_bytes(data) -> list[int]           any bytes, including invalid UTF-8
    decode(ids, skip_special=False) -> str    invalid UTF-8 becomes U+FFFD
    decode_bytes(ids, skip_special=False)     the bytes of the tokens
    token_bytes(id, previous=None) -> bytes   the bytes of a token after `previous`, if any
    decoder(previous=None)                    a new decoder of a stream of ids
    vocab_size, len()                         the highest id plus one
    bos, eos                                  the ids that start and end a text, or None
    special_ids                               the ids that `skip_special` omits

``decode(encode(text)) == text`` for any text: `decode` omits a leading bos that `encode` prepended.
Exceptions are features of a tokenizer file: tokens that strip whitespace (lstrip, rstrip), a
prepended space, normalization, an eos that `encode` appends, characters that are not in the
vocabulary. Text with a lone surrogate is not valid Unicode and is rejected.

The tokenizers: `PipelineTokenizer` in ``pipeline_tokenizer.py`` (its files: ``tokenizer_json.py``)
and `Llama2cTokenizer` in ``llama2c_tokenizer.py``.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from minitx.errors import MinitxError


class Tokenizer:
    """Base class of all tokenizers; subclasses implement encode, encode_bytes and token_bytes."""

    vocab_size: int
    bos: int | None = None
    eos: int | None = None
    special_ids: frozenset[int] = frozenset()

    @property
    def original(self) -> Tokenizer:
        """The one in the file: another for a tokenizer that a technique has changed."""
        return self

    def encode(self, text: str, special: bool = True) -> list[int]:
        raise NotImplementedError

    def encode_bytes(self, data: bytes) -> list[int]:
        raise NotImplementedError

    def token_bytes(self, id: int, previous: int | None = None) -> bytes:
        raise NotImplementedError

    def decoder(self, previous: int | None = None) -> IdDecoder:
        """Decodes a stream of ids after `previous`: ``push(id)``, ``skip(id)`` and ``finish()``."""
        return IdDecoder(self, previous)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        stream = StreamDecoder(self, None, skip_special)
        return "".join(map(stream.push, ids)) + stream.finish()

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        parts, previous = [], None
        for id in ids:
            data = self.token_bytes(id, previous)
            previous = id
            if not (skip_special and id in self.special_ids):
                parts.append(data)
        return b"".join(parts)

    def __len__(self) -> int:
        return self.vocab_size


class IdDecoder:
    """The text of a stream of ids whose tokens are bytes, in any tokenizer with `token_bytes`."""

    def __init__(self, tokenizer: Tokenizer, previous: int | None):
        self._tokenizer, self._previous = tokenizer, previous
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        data = self._tokenizer.token_bytes(id, self._previous)
        self._previous = id
        return self._utf8.decode(data)

    def skip(self, id: int) -> None:
        """An id that is not to be decoded, but that the next one follows."""
        self._previous = id

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class StreamDecoder:
    """Decodes ids one by one: `push(id)` returns the text completed so far, `finish()` the rest.

    What is not certain yet (a character split over tokens) is held back until it is. All pieces
    concatenated are ``tokenizer.decode(ids)``. `previous` is the id before the first one pushed
    (the last of the prompt), or None.
    """

    def __init__(
        self, tokenizer: Tokenizer, previous: int | None = None, skip_special: bool = False
    ):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = tokenizer.decoder(previous)

    def push(self, id: int) -> str:
        if id in self._skipped:
            self._decoder.skip(id)
            return ""
        return self._decoder.push(id)

    def finish(self) -> str:
        """Flushes what was held back (an incomplete character as U+FFFD) and starts anew."""
        rest = self._decoder.finish()
        self._decoder = self._tokenizer.decoder()
        return rest


def need_valid_unicode(text: str) -> None:
    """Raises MinitxError for a lone surrogate, which has no UTF-8 encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise MinitxError(
            f"character {error.start} of the text is the lone surrogate U+{code:04X}, which is not "
            "valid Unicode; remove it, or use encode_bytes for raw bytes"
        ) from None
