"""Decoders: the text of a sequence of tokens, one token at a time.

ByteLevel      tokens spell bytes (byte_characters.py); invalid UTF-8 becomes U+FFFD
Replace        "▁" becomes a space
ByteFallback   "<0xE2>" is a byte. A run of such tokens is text if it is valid UTF-8 as a whole;
               otherwise every one of them becomes U+FFFD, so a run is held back until it ends
Metaspace      "▁" becomes a space, but nothing in the first token
Strip          removes spaces from the start of the text
Fuse           joins what it gets; here everything is joined anyway

A `Decoder` is a list of such stages. Each has ``push(token)``, which returns the tokens (or texts)
that it lets through, and ``finish()``, which returns what it still held back.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from pathlib import Path

from minitx.checkpoints.byte_characters import to_bytes
from minitx.checkpoints.normalizers import literal_pattern
from minitx.checkpoints.pre_tokenizers import replacement
from minitx.checkpoints.tokenizer_steps import Step, steps
from minitx.errors import MinitxError

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class Stage:
    """A stage that lets everything through; Fuse is one."""

    def push(self, token: str) -> list[str]:
        return [token]

    def finish(self) -> list[str]:
        return []


class ByteLevel(Stage):
    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> list[str]:
        return [self._utf8.decode(to_bytes(token))]

    def finish(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class Replace(Stage):
    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def push(self, token: str) -> list[str]:
        return [token.replace(self.old, self.new)]


class Metaspace(Stage):
    def __init__(self, replacement: str, drop_in_first: bool):
        self.replacement, self.drop = replacement, drop_in_first

    def push(self, token: str) -> list[str]:
        space, self.drop = "" if self.drop else " ", False
        return [token.replace(self.replacement, space)]


class ByteFallback(Stage):
    def __init__(self):
        self._run = b""

    def push(self, token: str) -> list[str]:
        byte = raw_byte(token)
        if byte is not None:
            self._run += byte
            return []
        return [*self.finish(), token]

    def finish(self) -> list[str]:
        run, self._run = self._run, b""
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\ufffd" * len(run)]


class Strip(Stage):
    """Removes up to `count` leading characters `content` of the whole text."""

    def __init__(self, content: str, count: int):
        self.content, self.count = content, count

    def push(self, token: str) -> list[str]:
        while self.count and token:
            if not token.startswith(self.content):
                self.count = 0
                break
            token, self.count = token[1:], self.count - 1
        return [token]


class Decoder:
    """Stages in turn: `push(token)` returns the text that is complete, `finish()` the rest."""

    def __init__(self, stages: list[Stage]):
        self.stages = stages

    def push(self, token: str) -> str:
        if len(self.stages) == 1:  # ByteLevel, most of the time
            return "".join(self.stages[0].push(token))
        return "".join(self._through([token], self.stages))

    def finish(self) -> str:
        found = ""
        for index, stage in enumerate(self.stages):
            found += "".join(self._through(stage.finish(), self.stages[index + 1 :]))
        return found

    @staticmethod
    def _through(tokens: list[str], stages: list[Stage]) -> list[str]:
        for stage in stages:
            tokens = [out for token in tokens for out in stage.push(token)]
        return tokens


MakeDecoder = Callable[[bool], Decoder]  # called with whether the first token starts the text


def byte_level_decoder(at_start: bool) -> Decoder:
    return Decoder([ByteLevel()])


def raw_byte(token: str) -> bytes | None:
    """The byte that "<0xE2>" stands for, or None."""
    found = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else None


# ---------------------------------------------------------------------------------------- reading


def read_decoder(file: Path, step) -> tuple[MakeDecoder, bool]:
    """The "decoder" of a ``tokenizer.json``, and whether its tokens spell bytes (ByteLevel)."""
    if step is None:
        raise MinitxError(f"{file}: the decoder is null, which puts spaces between all tokens.")
    found = steps(file, "decoder", step, "decoders")
    fused = False  # the stages before a Fuse work on tokens, those after it on the whole text
    makers: list[Callable[[bool], Stage]] = []
    for step in found:
        makers.append(_read(step, fused))
        fused = fused or step.type in ("Fuse", "ByteLevel")
    is_byte_level = any(step.type == "ByteLevel" for step in found)

    def make(at_start: bool) -> Decoder:
        return Decoder([maker(at_start) for maker in makers])

    return make, is_byte_level


def _read(step: Step, fused: bool) -> Callable[[bool], Stage]:
    if step.type == "ByteLevel":
        return lambda at_start: ByteLevel()
    if step.type == "Fuse":
        return lambda at_start: Stage()
    if step.type == "ByteFallback" and not fused:
        return lambda at_start: ByteFallback()
    if step.type == "Replace":
        old, new = literal_pattern(step), step.string("content")
        if not fused or len(old) == 1:  # a longer one might span two tokens
            return lambda at_start: Replace(old, new)
    if step.type == "Metaspace" and not fused:
        char = replacement(step)
        never = step.fields.get("prepend_scheme") == "never"
        never = never or step.fields.get("add_prefix_space") is False
        return lambda at_start: Metaspace(char, at_start and not never)
    if step.type == "Strip" and fused and step.fields.get("stop") == 0:
        char = step.get("content", " ", lambda v: type(v) is str and len(v) == 1, "a character")
        count = step.get("start", 0, lambda v: type(v) is int and v >= 0, "an integer >= 0")
        return lambda at_start: Strip(char, count if at_start else 0)
    raise step.unsupported(
        "ByteLevel, Metaspace, or Replace, ByteFallback, Fuse and Strip(start) in this order"
    )
