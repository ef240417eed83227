"""Learning the merges of a byte-level BPE tokenizer from text (Sennrich et al. 2016, algorithm 1).

Start from the bytes of every word, join the most frequent adjacent pair into a new token wherever
it occurs, and do it again. Counting all pairs anew for every merge would be slow, so the counts are
kept, and a merge changes only those of the words it touches.

The result depends on the counts alone: of pairs that are equally frequent the one of the lower ids
goes first. Ids: the 256 bytes are 0 to 255 by value, merged tokens follow in the order in which
they were made, special tokens come last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

from minitx.checkpoints.added_tokens import AddedToken
from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.pre_tokenize import pre_tokenize
from minitx.checkpoints.tokenizer import need_valid_unicode
from minitx.errors import MinitxError

END_OF_TEXT = "<|endoftext|>"

Pair = tuple[int, int]


def learn_bpe(
    texts: Iterable[str] | Mapping[str, int],
    vocab_size: int,
    special_tokens: Iterable[str] = (END_OF_TEXT,),
) -> ByteLevelBPE:
    """A tokenizer of at most `vocab_size` ids with merges learned from `texts`.

    texts: texts, which GPT-2's pattern splits into words; or the words with their counts.
    vocab_size: bytes and special tokens included; fewer if every word is one token before.
    special_tokens: take the last ids; the first of them is `bos` and `eos`.
    """
    special_tokens = list(special_tokens)
    counts = texts if isinstance(texts, Mapping) else _count_words(texts)
    room = vocab_size - len(special_tokens)
    if room < 256:
        raise MinitxError(
            f"a vocabulary of {vocab_size} is too small for 256 bytes and {len(special_tokens)} "
            f"special tokens; it needs at least {256 + len(special_tokens)}"
        )
    learner = _Learner(counts)
    while len(learner.tokens) < room and learner.merge_best_pair():
        pass
    return _tokenizer(learner.tokens, learner.merges, special_tokens)


def bpe_for_words(
    words: Iterable[str],
    special_tokens: Iterable[str] = (END_OF_TEXT,),
    *,
    ignore_merges: bool = False,
    adds_bos: bool = False,
) -> ByteLevelBPE:
    """A tokenizer in which every word of `words` is exactly one token, with few tokens besides.

    A word is what GPT-2's pattern leaves whole, such as " park", "Once" or ".". Merges are learned
    with each word counted once, so what many words share is merged first, until each is one token:
    450 English words take about 1,080 ids, of which some 370 are pieces that only lead to words.
    With `ignore_merges` there are no merges and no such pieces, 256 + words + special tokens in
    all: a word is looked up as a whole, and any other text becomes bytes. With `adds_bos` the first
    special token is put before every text.
    """
    words, special = list(dict.fromkeys(words)), list(special_tokens)
    for word in words:
        need_valid_unicode(word)
        if pre_tokenize(word) != [word]:
            raise MinitxError(
                f"{word!a} is {len(pre_tokenize(word))} words to GPT-2's pattern; give one"
            )
    if ignore_merges:
        singles = [bytes([byte]) for byte in range(256)]
        longer = [data for word in words if len(data := word.encode("utf-8")) > 1]
        return _tokenizer(singles + longer, [], special, ignore_merges=True, adds_bos=adds_bos)
    learner = _Learner(dict.fromkeys(words, 1))
    while learner.merge_best_pair():
        pass
    return _tokenizer(learner.tokens, learner.merges, special, adds_bos=adds_bos)


def _count_words(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        need_valid_unicode(text)
        counts.update(pre_tokenize(text))
    return counts


def _tokenizer(
    tokens: list[bytes], merges: list[Pair], special: list[str], **options: bool
) -> ByteLevelBPE:
    # The special tokens stand in the vocabulary too, as GPT-2's does: no merge leads to them.
    added = [AddedToken(content, len(tokens) + n) for n, content in enumerate(special)]
    tokens = tokens + [content.encode("utf-8") for content in special]
    first = added[0].id if added else None
    return ByteLevelBPE(tokens, merges, added, bos=first, eos=first, **options)


class _Learner:
    """The words, cut into the tokens known so far, and how often each adjacent pair occurs."""

    def __init__(self, counts: Mapping[str, int]):
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.merges: list[Pair] = []
        self._words = [list(word.encode("utf-8")) for word in counts]
        self._counts = list(counts.values())
        self._pairs: Counter[Pair] = Counter()
        self._where: dict[Pair, set[int]] = {}  # the words in which a pair occurs, or once did
        for number in range(len(self._words)):
            self._count_pairs(number, +1)
        self._heap = [(-count, pair) for pair, count in self._pairs.items()]
        heapify(self._heap)

    def merge_best_pair(self) -> bool:
        """Make one merge; False if every word is a single token."""
        pair = self._best_pair()
        if pair is None:
            return False
        # The joined bytes are new: between two cuts a word is merged alike whatever stands around
        # it, so no other pair has made them.
        merged = len(self.tokens)
        self.tokens.append(self.tokens[pair[0]] + self.tokens[pair[1]])
        self.merges.append(pair)
        changed: set[Pair] = set()
        for number in self._where.pop(pair):
            changed |= self._count_pairs(number, -1)
            self._words[number] = _merge_word(self._words[number], pair, merged)
            changed |= self._count_pairs(number, +1)
        for pair in changed:
            if self._pairs[pair] > 0:
                heappush(self._heap, (-self._pairs[pair], pair))
        return True

    def _best_pair(self) -> Pair | None:
        while self._heap:
            count, pair = heappop(self._heap)
            if self._pairs[pair] == -count > 0:  # else the entry is older than the last change
                return pair
        return None

    def _count_pairs(self, number: int, sign: int) -> set[Pair]:
        """Add (+1) or take away (-1) the pairs of one word; which pairs these are."""
        word = self._words[number]
        pairs = list(pairwise(word))
        for pair in pairs:
            self._pairs[pair] += sign * self._counts[number]
            if sign > 0:
                self._where.setdefault(pair, set()).add(number)
        return set(pairs)


def _merge_word(word: list[int], pair: Pair, merged: int) -> list[int]:
    """`word` with `merged` wherever `pair` stands, from left to right."""
    out: list[int] = []
    for id in word:
        if out and (out[-1], id) == pair:
            out[-1] = merged
        else:
            out.append(id)
    return out
