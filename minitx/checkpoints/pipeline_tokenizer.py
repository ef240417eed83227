"""A tokenizer as a pipeline: the way of a text to ids and back.

    text
     -> added tokens split off, normalizer     added_tokens.py, normalizers.py
     -> pre-tokenizer: words                   pre_tokenizers.py
     -> BPE: ids of every word                 bpe.py
     -> post-processor: ids before and after   post_processor.py
    ids
     -> decoder: text                          decoders.py

The steps are those of Hugging Face ``tokenizers``, and so are the results: ids and decoded text.
Files with such a pipeline are read in ``tokenizer_json.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitx.checkpoints.added_tokens import AddedToken, AddedTokenSplitter
from minitx.checkpoints.bpe import BPE
from minitx.checkpoints.byte_characters import to_bytes
from minitx.checkpoints.decoders import Decoder, MakeDecoder, raw_byte
from minitx.checkpoints.normalizers import Normalizer
from minitx.checkpoints.pre_tokenizers import PreTokenizer
from minitx.checkpoints.tokenizer import Tokenizer, need_valid_unicode
from minitx.errors import MinitxError


@dataclass(frozen=True)
class Pipeline:
    """The steps. before, after: ids that the post-processor adds; spells_bytes: the decoder is
    ByteLevel."""

    normalize: Normalizer
    pre_tokenize: PreTokenizer
    model: BPE
    before: list[int]
    after: list[int]
    make_decoder: MakeDecoder
    spells_bytes: bool


class PipelineTokenizer(Tokenizer):
    """A tokenizer of these steps (the interface: ``tokenizer.py``).

    added: tokens matched as literal strings before everything else. Of several with one id the last
    one counts, but "special", and how a normalized one is decoded, hold from the first on.
    splits_special: the special ones are not matched. bos, eos: ids, or None. fields: the
    ``tokenizer.json`` that holds the same tokenizer, for writing it again.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        added: Sequence[AddedToken] = (),
        *,
        bos: int | None = None,
        eos: int | None = None,
        splits_special: bool = False,
        fields: dict | None = None,
    ):
        self.pipeline, self.fields = pipeline, fields
        self.added = [by_id for _, by_id in sorted({token.id: token for token in added}.items())]
        self.bos, self.eos, self.splits_special = bos, eos, splits_special
        self.adds_bos = bos is not None and pipeline.before[:1] == [bos]
        special = {token.content: token.id for token in added if token.special}
        unmatched = frozenset(special.values() if splits_special else ())
        self._splitter = AddedTokenSplitter(self.added, pipeline.normalize, unmatched)
        self._tokens = {id: token for token, id in pipeline.model.vocab.items()}
        self.model_vocab_size = max(self._tokens, default=-1) + 1
        self._tokens |= {token.id: token.content for token in self.added}
        for token in added:
            if token.normalized:
                self._tokens[token.id] = pipeline.normalize(token.content)
        self.vocab_size = max(self._tokens, default=-1) + 1
        # By its text, as in the reference: one that normalization changes is not skipped.
        self.special_ids = frozenset(id for id, token in self._tokens.items() if token in special)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`, including added tokens, between those of the post-processor
        (`special`)."""
        need_valid_unicode(text)
        ids: list[int] = []
        at_start = True
        for piece in self._splitter.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encode_plain(piece, at_start)
            at_start = False
        return self.pipeline.before + ids + self.pipeline.after if special else ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of `data`, without special tokens.

        Pre-tokenized and merged like text; a byte that is not valid UTF-8 counts as a symbol. No
        normalization, no added tokens: "<|endoftext|>" is encoded as plain text.
        """
        text = data.decode("utf-8", errors="surrogateescape")
        return self._encode_plain(text, True) if text else []

    def token(self, id: int) -> str | None:
        """The token as it is spelled in the vocabulary; None for an id without a token."""
        if id < 0:
            raise MinitxError(f"expected a token id >= 0, got {id}")
        return self._tokens.get(id)

    def token_bytes(self, id: int, previous: int | None = None) -> bytes:
        token = self.token(id)
        if token is None or (previous is None and self._is_leading_bos(id)):
            return b""
        if self.pipeline.spells_bytes:
            return to_bytes(token)
        byte = raw_byte(token)
        if byte is not None:
            return byte
        decoder = self._text_decoder(previous)
        return (decoder.push(token) + decoder.finish()).encode("utf-8")

    def decoder(self, previous: int | None = None) -> PipelineDecoder:
        return PipelineDecoder(self, self._text_decoder(previous), at_start=previous is None)

    def _text_decoder(self, previous: int | None) -> Decoder:
        at_start = previous is None or self._is_leading_bos(previous)
        return self.pipeline.make_decoder(at_start)

    def _is_leading_bos(self, id: int) -> bool:
        return self.adds_bos and id == self.bos

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        encode = self.pipeline.model.ids
        ids: list[int] = []
        for word in self.pipeline.pre_tokenize([text], at_start):
            ids += encode(word)
        return ids


class PipelineDecoder:
    """The text of a stream of ids. An id without a token is nothing, as in the reference."""

    def __init__(self, tokenizer: PipelineTokenizer, text: Decoder, at_start: bool):
        self._tokenizer, self._text, self._at_start = tokenizer, text, at_start

    def push(self, id: int) -> str:
        token = self._tokenizer.token(id)
        is_leading_bos = self._at_start and self._tokenizer._is_leading_bos(id)
        self._at_start = False
        return "" if token is None or is_leading_bos else self._text.push(token)

    def skip(self, id: int) -> None:
        self._at_start = False

    def finish(self) -> str:
        return self._text.finish()
