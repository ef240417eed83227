"""Byte-level byte-pair encoding (BPE), as in GPT-2: the tokenizer that minitx trains.

A `PipelineTokenizer` given by the bytes of its tokens: text is split into GPT-2's words, and the
bytes of each word are merged pair by pair. If all 256 bytes are tokens, every text can be encoded.
Merges are trained in ``training/bpe.py``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import partial

from minitx.checkpoints import normalizers, pre_tokenizers
from minitx.checkpoints.added_tokens import AddedToken
from minitx.checkpoints.bpe import BPE
from minitx.checkpoints.byte_characters import spell
from minitx.checkpoints.decoders import byte_level_decoder
from minitx.checkpoints.pipeline_tokenizer import Pipeline, PipelineTokenizer
from minitx.errors import MinitxError


class ByteLevelBPE(PipelineTokenizer):
    """A byte-level BPE tokenizer (the interface: ``tokenizer.py``).

    tokens: the bytes of each token of the vocabulary, by id.
    merges: pairs of ids in rank order; the concatenated bytes of a pair must be a token too.
    added: tokens matched as literal strings. An id inside `tokens` must have the same bytes there;
        the others take the next free ids.
    bos, eos: ids of added tokens; adds_bos: `encode` prepends `bos`.
    add_prefix_space: prepend a space to every text piece that does not start with one.
    use_regex: pre-tokenize into words before merging.
    nfc: normalize to NFC first, by the Unicode version of the running Python.
    ignore_merges: a word that is in the vocabulary is that token; no merges (as in Llama 3).
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: Sequence[tuple[int, int]],
        added: Sequence[AddedToken] = (),
        *,
        bos: int | None = None,
        eos: int | None = None,
        adds_bos: bool = False,
        add_prefix_space: bool = False,
        use_regex: bool = True,
        nfc: bool = False,
        ignore_merges: bool = False,
    ):
        self.tokens, self.merges = list(tokens), list(merges)
        self.add_prefix_space, self.use_regex = add_prefix_space, use_regex
        self.nfc, self.ignore_merges = nfc, ignore_merges
        added = sorted(added, key=lambda token: token.id)
        _check_added(added, self.tokens)
        _check_bos_and_eos(added, bos, eos, adds_bos)
        self.names = _names(self.tokens, added)
        ids = {name: id for id, name in enumerate(self.names)}
        if len(ids) < len(self.names):
            raise _same_name(self.names)
        pipeline = Pipeline(
            normalize=partial(unicodedata.normalize, "NFC") if nfc else normalizers.in_turn([]),
            pre_tokenize=pre_tokenizers.ByteLevel(add_prefix_space, use_regex),
            model=BPE(ids, _named_merges(self.merges, self.names), ignore_merges=ignore_merges),
            before=[bos] if adds_bos else [],
            after=[],
            make_decoder=byte_level_decoder,
            spells_bytes=True,
        )
        super().__init__(pipeline, added, bos=bos, eos=eos)


def _names(tokens: list[bytes], added: list[AddedToken]) -> list[str]:
    """How each token of the vocabulary is spelled: an added one as its text, the others with one
    character for each byte."""
    contents = {token.id: token.content for token in added}
    return [contents.get(id) or spell(data) for id, data in enumerate(tokens)]


def _named_merges(merges: list[tuple[int, int]], names: list[str]) -> list[tuple[str, str]]:
    for rank, (left, right) in enumerate(merges):
        if not (0 <= left < len(names) and 0 <= right < len(names)):
            raise MinitxError(
                f"merge {rank}: expected ids from 0 to {len(names) - 1}, got {left} and {right}"
            )
    return [(names[left], names[right]) for left, right in merges]


def _check_added(added: list[AddedToken], tokens: list[bytes]) -> None:
    """`added` (sorted by id) must agree with the vocabulary, and the ids must have no gap."""
    contents: set[str] = set()
    next_id = len(tokens)
    for token in added:
        if not token.content or token.content in contents:
            raise MinitxError(
                f"the added token {token.content!a} is empty or duplicated; give each a unique text"
            )
        contents.add(token.content)
        if 0 <= token.id < len(tokens):
            if tokens[token.id] != token.content.encode("utf-8"):
                raise MinitxError(
                    f"the added token {token.content!a} has id {token.id}, but in the vocabulary "
                    f"that id is {tokens[token.id]!r}; give it another id"
                )
        elif token.id != next_id:
            raise MinitxError(
                f"the added token {token.content!a} must have id {next_id}, the next free id, "
                f"got {token.id}"
            )
        else:
            next_id += 1


def _check_bos_and_eos(
    added: list[AddedToken], bos: int | None, eos: int | None, adds_bos: bool
) -> None:
    for name, id in (("bos", bos), ("eos", eos)):
        if id is not None and id not in [token.id for token in added]:
            raise MinitxError(f"{name} must be the id of an added token, got {id}")
    if adds_bos and bos is None:
        raise MinitxError("adds_bos needs a bos, got none; give the id of the token to prepend")


def _same_name(names: list[str]) -> MinitxError:
    first, second = next(
        (names.index(name), id) for id, name in enumerate(names) if names.index(name) < id
    )
    return MinitxError(
        f"the tokens {first} and {second} are both {names[first]!a}; expected unique bytes"
    )
