"""Bytes written as printable characters: how a byte-level vocabulary is spelled in a file.

GPT-2's byte encoder: bytes that are printable in Latin-1 represent themselves; the others map, in
order, to U+0100 and up: a space is U+0120 ("Ġ"). So " café", six bytes in UTF-8 and one more for
the space, is spelled "ĠcafÃ©", one character for each byte.
"""

from __future__ import annotations


def _byte_characters() -> list[str]:
    """The character that represents each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    code_of = {byte: byte for byte in printable}
    code_of |= {byte: 256 + n for n, byte in enumerate(others)}
    return [chr(code_of[byte]) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
# For str.translate: byte -> its character, and back; what represents no byte is not Latin-1 then.
_TABLE = dict(enumerate(BYTE_CHARACTERS))
_BACK = dict.fromkeys(range(256), 0xFFFF) | {ord(char): byte for byte, char in _TABLE.items()}


def spell(data: bytes) -> str:
    """One character for each byte of `data`."""
    return data.decode("latin-1").translate(_TABLE)


def to_byte_characters(text: str) -> str:
    """The bytes of `text` in UTF-8, spelled. A byte that was not valid UTF-8 is a surrogate in
    `text` (``errors="surrogateescape"``)."""
    return spell(text.encode("utf-8", errors="surrogateescape"))


def to_bytes(token: str) -> bytes:
    """The bytes that a token spells; one with any other character (an added token, say) stands for
    itself, as in the reference."""
    try:
        return token.translate(_BACK).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8")
