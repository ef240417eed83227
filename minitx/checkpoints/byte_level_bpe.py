"""Byte-level byte-pair encoding, as GPT-2 has it.

Added tokens are cut out of the text, the rest is split into words, and the bytes of each word are
merged pair by pair in the order in which the merges were learned (Sennrich et al. 2016,
arXiv:1508.07909, on bytes instead of characters). All 256 bytes being tokens, every text can be
encoded. Files are read and written in ``tokenizer_json.py`` and ``tokenizer_json_write.py``, merges
are learned in ``training/bpe.py``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from minitx.checkpoints.added_tokens import AddedToken, AddedTokenSplitter
from minitx.checkpoints.merging import merge_best_first
from minitx.checkpoints.pretoken import split
from minitx.checkpoints.tokenizer import Tokenizer, check_text
from minitx.errors import MinitxError

_CACHED_WORDS = 50_000  # the cache of encoded words is emptied when it holds so many
_CACHED_LENGTH = 50  # longer words hardly come twice


class ByteLevelBPE(Tokenizer):
    """A byte-level BPE tokenizer (the interface: ``tokenizer.py``).

    tokens: the bytes of each token of the vocabulary, by id.
    merges: pairs of ids, the first merged first; the joined bytes are a token too.
    added: tokens found as whole strings. One with an id in `tokens` has the bytes that stand there;
        the others follow with the next ids.
    bos, eos: ids of added tokens; adds_bos: `encode` puts `bos` first.
    add_prefix_space: a piece of text that starts with no space gets one.
    use_regex: text is split into words before merging.
    nfc: text is normalized to NFC first, recent marks in the order that this Python gives them.
    ignore_merges: a word that is a token is that token, whatever the merges say (as in Llama 3).
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
        """The ids of `text`, added tokens found in it; `special` puts `bos` first if adds_bos."""
        check_text(text)
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

        Split and merged like text, where a byte that is not valid UTF-8 counts as a symbol. Nothing
        is put first, normalized or taken for an added token: "<|endoftext|>" is spelled out.
        """
        return self._encode_plain(data.decode("utf-8", errors="surrogateescape"))

    def token_bytes(self, id: int, previous: int | None = None) -> bytes:
        self._check_id(id)
        if self.adds_bos and id == self.bos and previous is None:
            return b""  # `encode` put it there
        return self._bytes[id]

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in split(text) if self.use_regex else [text]:
            word_ids = self._cache.get(word)
            if word_ids is None:
                word_ids = self._encode_word(word.encode("utf-8", errors="surrogateescape"))
                self._remember(word, word_ids)
            ids += word_ids
        return ids

    def _encode_word(self, word: bytes) -> list[int]:
        if self.ignore_merges and word in self._ids:
            return [self._ids[word]]
        ids = [self._byte_ids[byte] for byte in word]
        if None in ids:
            raise MinitxError(
                f"this tokenizer has no token for the byte 0x{word[ids.index(None)]:02X} "
                f"(in {word[:40]!r}); use one that has all 256 bytes"
            )
        return merge_best_first(ids, lambda left, right: self._ranks.get((left, right)))

    def _remember(self, word: str, ids: list[int]) -> None:
        if len(word) <= _CACHED_LENGTH:
            if len(self._cache) >= _CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids

    def _normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text


def _check_added(added: list[AddedToken], tokens: list[bytes]) -> None:
    """`added` (sorted by id) and the vocabulary agree, and their ids have no hole."""
    contents: set[str] = set()
    next_id = len(tokens)
    for token in added:
        if not token.content or token.content in contents:
            raise MinitxError(
                f"the added token {token.content!a} is empty or there twice; give each its own text"
            )
        contents.add(token.content)
        if 0 <= token.id < len(tokens):
            if tokens[token.id] != token.content.encode("utf-8"):
                raise MinitxError(
                    f"the added token {token.content!a} has id {token.id}, which is the token "
                    f"{tokens[token.id]!r} in the vocabulary; give it another id"
                )
        elif token.id != next_id:
            raise MinitxError(
                f"the added token {token.content!a} has id {token.id}, but the next one free after "
                f"the vocabulary of {len(tokens)} is {next_id}; leave no hole and use no id twice"
            )
        else:
            next_id += 1


def _check_bos_and_eos(
    added: list[AddedToken], bos: int | None, eos: int | None, adds_bos: bool
) -> None:
    for name, id in (("bos", bos), ("eos", eos)):
        if id is not None and id not in [token.id for token in added]:
            raise MinitxError(f"{name} is {id}, which is not an added token; give the id of one")
    if adds_bos and bos is None:
        raise MinitxError("adds_bos is set without a bos; give the id of the token to put first")


def _ids_by_bytes(tokens: list[bytes], added_ids: set[int]) -> dict[bytes, int]:
    """The id of each token by its bytes; where an added token spells another one, that one's."""
    ids: dict[bytes, int] = {}
    for id, data in enumerate(tokens):
        if id not in added_ids and ids.setdefault(data, id) != id:
            raise MinitxError(
                f"the tokens {ids[data]} and {id} are both {data!r}; give each its own bytes"
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
                f"merge {rank} joins the ids {left} and {right}; expected ids below {len(tokens)}"
            )
        joined = tokens[left] + tokens[right]
        if joined not in ids:
            raise MinitxError(
                f"merge {rank} makes {joined!r}, which is not a token; add it to the vocabulary"
            )
        ranks[left, right] = (rank, ids[joined])
    return ranks
