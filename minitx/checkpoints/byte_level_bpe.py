"""Byte-level byte-pair encoding (BPE), as in GPT-2.

Added tokens are split off, the remaining text is pre-tokenized into words, and the bytes of each
word are merged pair by pair, lowest merge rank first (Sennrich et al. 2016, arXiv:1508.07909, on
bytes instead of characters). If all 256 bytes are tokens, every text can be encoded. Files are read
and written in ``tokenizer_json.py`` and ``tokenizer_json_write.py``; merges are trained in
``training/bpe.py``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from minitx.checkpoints.added_tokens import AddedToken, AddedTokenSplitter
from minitx.checkpoints.bpe_merge import merge_best_first
from minitx.checkpoints.pre_tokenize import pre_tokenize
from minitx.checkpoints.tokenizer import Tokenizer, need_valid_unicode
from minitx.errors import MinitxError

_CACHED_WORDS = 50_000  # clear the cache of encoded words at this size
_CACHED_LENGTH = 50  # longer words rarely repeat


class ByteLevelBPE(Tokenizer):
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
        self.added = sorted(added, key=lambda token: token.id)
        self.bos, self.eos, self.adds_bos = bos, eos, adds_bos
        self.add_prefix_space, self.use_regex = add_prefix_space, use_regex
        self.nfc, self.ignore_merges = nfc, ignore_merges

        _check_added(self.added, self.tokens)
        _check_bos_and_eos(self.added, bos, eos, adds_bos)
        after = [token for token in self.added if token.id >= len(self.tokens)]
        self._bytes = self.tokens + [token.content.encode("utf-8") for token in after]
        self.vocab_size = len(self._bytes)
        self.special_ids = frozenset(token.id for token in self.added if token.special)
        self._ids = _ids_by_bytes(self.tokens, {token.id for token in self.added})
        self._byte_ids = [self._ids.get(bytes([byte])) for byte in range(256)]
        self._ranks = _rank_merges(self.merges, self.tokens, self._ids)
        self._splitter = AddedTokenSplitter(self.added, self._normalize)
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`, including added tokens; `special` prepends `bos` if adds_bos."""
        need_valid_unicode(text)
        ids = [self.bos] if special and self.adds_bos else []
        for piece in self._splitter.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            elif self.add_prefix_space and not piece.startswith(" "):
                ids += self._encode_plain(" " + piece)
            else:
                ids += self._encode_plain(piece)
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids that decode to exactly `data`.

        Pre-tokenized and merged like text; a byte that is not valid UTF-8 counts as a symbol. No
        bos, no normalization, no added tokens: "<|endoftext|>" is encoded as plain text.
        """
        return self._encode_plain(data.decode("utf-8", errors="surrogateescape"))

    def token_bytes(self, id: int, previous: int | None = None) -> bytes:
        self._check_id(id)
        if self.adds_bos and id == self.bos and previous is None:
            return b""  # `encode` prepended it
        return self._bytes[id]

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in pre_tokenize(text) if self.use_regex else [text]:
            word_ids = self._cache.get(word)
            if word_ids is None:
                word_ids = self._encode_word(word.encode("utf-8", errors="surrogateescape"))
                self._cache_word(word, word_ids)
            ids += word_ids
        return ids

    def _encode_word(self, word: bytes) -> list[int]:
        if self.ignore_merges and word in self._ids:
            return [self._ids[word]]
        ids = [self._byte_ids[byte] for byte in word]
        if None in ids:
            raise MinitxError(
                f"this tokenizer has no token for the byte 0x{word[ids.index(None)]:02X} "
                f"(in {word[:40]!r}); use a tokenizer with all 256 bytes"
            )
        return merge_best_first(ids, lambda left, right: self._ranks.get((left, right)))

    def _cache_word(self, word: str, ids: list[int]) -> None:
        if len(word) <= _CACHED_LENGTH:
            if len(self._cache) >= _CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids

    def _normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text


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


def _ids_by_bytes(tokens: list[bytes], added_ids: set[int]) -> dict[bytes, int]:
    """Token bytes -> id. If an added token has the bytes of a plain token, the plain one wins."""
    ids: dict[bytes, int] = {}
    for id, data in enumerate(tokens):
        if id not in added_ids and ids.setdefault(data, id) != id:
            raise MinitxError(
                f"the tokens {ids[data]} and {id} are both {data!r}; expected unique bytes"
            )
    for id in sorted(added_ids & set(range(len(tokens)))):
        ids.setdefault(tokens[id], id)
    return ids


def _rank_merges(
    merges: list[tuple[int, int]], tokens: list[bytes], ids: dict[bytes, int]
) -> dict[tuple[int, int], tuple[int, int]]:
    """(left id, right id) -> (rank, merged id)."""
    ranks = {}
    for rank, (left, right) in enumerate(merges):
        if not (0 <= left < len(tokens) and 0 <= right < len(tokens)):
            raise MinitxError(
                f"merge {rank}: expected ids from 0 to {len(tokens) - 1}, got {left} and {right}"
            )
        joined = tokens[left] + tokens[right]
        if joined not in ids:
            raise MinitxError(
                f"merge {rank} produces {joined!r}, which is not a token; add it to the vocabulary"
            )
        ranks[left, right] = (rank, ids[joined])
    return ranks
