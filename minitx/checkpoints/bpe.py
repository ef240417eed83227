"""Byte-pair encoding of one word (Sennrich et al. 2016, arXiv:1508.07909): characters, merged.

Start from the characters of the word and merge the adjacent pair with the lowest rank, again and
again (``bpe_merge.py``). Byte-level BPE is the same algorithm on a word whose "characters" spell
its bytes (``byte_characters.py``). What is not in the vocabulary becomes its bytes ("<0xE2>", with
`byte_fallback`), else the unknown token, else nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from minitx.checkpoints.bpe_merge import merge_best_first
from minitx.checkpoints.json_object import REQUIRED, JsonObject
from minitx.errors import MinitxError, abbreviate

_CACHED_WORDS = 50_000  # clear the cache of encoded words at this size
_CACHED_LENGTH = 50  # longer words rarely repeat


class BPE:
    """Words -> ids.

    vocab: id by token; merges: pairs of tokens in rank order, whose concatenation must be a token
    too. unk: the token for characters that are not in the vocabulary, or None; fuse_unk: one for
    several in a row. byte_fallback: write such a character as its bytes. ignore_merges: a word that
    is in the vocabulary is that token; no merges (as in Llama 3).
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        *,
        unk: str | None = None,
        fuse_unk: bool = False,
        byte_fallback: bool = False,
        ignore_merges: bool = False,
    ):
        self.vocab = vocab
        self.unk = None if unk is None else vocab[unk]
        self.fuse_unk, self.ignore_merges = fuse_unk, ignore_merges
        self._ranks = rank_merges(merges, vocab)
        self._byte_ids = [vocab.get(byte_token(byte)) for byte in range(256)]
        if not byte_fallback:
            self._byte_ids = [None] * 256
        self._cache: dict[str, list[int]] = {}

    def ids(self, word: str) -> list[int]:
        found = self._cache.get(word)
        if found is None:
            found = self._encode(word)
            if len(word) <= _CACHED_LENGTH:
                if len(self._cache) >= _CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = found
        return found

    def _encode(self, word: str) -> list[int]:
        if self.ignore_merges and word in self.vocab:
            return [self.vocab[word]]
        ranks = self._ranks
        return merge_best_first(
            self._characters(word), lambda left, right: ranks.get((left, right))
        )

    def _characters(self, word: str) -> list[int]:
        """The id of every character, before merging."""
        ids: list[int] = []
        unknown = False  # the unknown token is due, unless the next character fuses with it
        for char in word:
            id = self.vocab.get(char)
            if id is not None:
                if unknown:
                    ids.append(self.unk)
                    unknown = False
                ids.append(id)
            elif None not in (in_bytes := self._in_bytes(char)):
                ids += in_bytes  # as in the reference, before an unknown token that is due
            elif self.unk is not None:
                if unknown and not self.fuse_unk:
                    ids.append(self.unk)
                unknown = True
        return ids + ([self.unk] if unknown else [])

    def _in_bytes(self, char: str) -> list[int | None]:
        return [self._byte_ids[byte] for byte in char.encode("utf-8", errors="surrogateescape")]


def byte_token(byte: int) -> str:
    """How SentencePiece spells a byte."""
    return f"<0x{byte:02X}>"


def rank_merges(
    merges: Iterable[tuple[str, str]], vocab: Mapping[str, int]
) -> dict[tuple[int, int], tuple[int, int]]:
    """(left id, right id) -> (rank, merged id)."""
    ranks = {}
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in vocab:
                raise MinitxError(
                    f"merge {rank}, {left!a} and {right!a}, needs the token {token!a}; "
                    "add it to the vocabulary"
                )
        ranks[vocab[left], vocab[right]] = (rank, vocab[left + right])
    return ranks


# ---------------------------------------------------------------------------------------- reading

_KEYS = (
    "type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback "
    "ignore_merges vocab merges"
)


def read_bpe(file: Path, fields: dict) -> BPE:
    """The "model" of a ``tokenizer.json``. MinitxError if it is damaged or not BPE."""
    vocab, model = read_vocab(file, fields), fields["model"]
    for name in model:
        if name not in _KEYS.split():
            raise MinitxError(f"{file}: the model has the unknown key {abbreviate(name)}.")
    checked = JsonObject(file, model)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):  # null, 0 and "" have no effect
            checked.reject(name, "minitx does not support")
    unk = checked.get(
        "unk_token", None, lambda v: isinstance(v, str) and v in vocab, "a token of the vocabulary"
    )
    merges = checked.get("merges", REQUIRED, lambda v: isinstance(v, list), "an array")
    try:
        return BPE(
            vocab,
            [_pair(rank, merge) for rank, merge in enumerate(merges)],
            unk=unk,
            fuse_unk=checked.boolean("fuse_unk", False),
            byte_fallback=checked.boolean("byte_fallback", False),
            ignore_merges=checked.boolean("ignore_merges", False),
        )
    except MinitxError as error:
        raise MinitxError(f"{file}: {error}.") from None


def read_vocab(file: Path, fields: dict) -> dict[str, int]:
    """The vocabulary of the model, id by token. Ids must be unique but may have gaps: an id without
    a token is decoded to nothing."""
    model = JsonObject(file, fields).object("model").fields
    if not model:
        raise MinitxError(f"{file}: has no 'model'; expected an object.")
    if model.get("type", "BPE") != "BPE":  # OpenAI's file for GPT-2 has no type
        raise MinitxError(f"{file}: the model type must be BPE, got {abbreviate(model['type'])}.")
    vocab = JsonObject(file, model).get(
        "vocab", REQUIRED, lambda v: isinstance(v, dict), "an object"
    )
    names: dict[int, str] = {}
    for name, id in vocab.items():
        if type(id) is not int or not 0 <= id < 2**32:
            raise MinitxError(
                f"{file}: the token {abbreviate(name)} has id {abbreviate(id)}; expected an "
                "integer from 0 to 2**32 - 1."
            )
        if names.setdefault(id, name) != name:
            both = f"{abbreviate(names[id])} and {abbreviate(name)}"
            raise MinitxError(
                f"{file}: the tokens {both} have the same id {id}; expected unique ids."
            )
    return vocab


def _pair(rank: int, merge) -> tuple[str, str]:
    """A merge, written as "a b" or ["a", "b"]."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(pair, list) and [type(name) for name in pair] == [str, str]):
        raise MinitxError(f"merge {rank} is {abbreviate(merge)}; expected two tokens")
    return pair[0], pair[1]
