"""Training a byte-level BPE tokenizer (Sennrich et al., 2016, algorithm 1).

Start from the bytes of every word, merge the most frequent adjacent pair into a new token wherever
it occurs, and repeat. Counting all pairs again for every merge would be slow, so counts are kept,
and a merge updates only those of the words that it changes.

The result depends only on the counts: ties go to the pair with the lower ids. Ids: bytes are 0 to
255, merged tokens follow in the order of their merges, special tokens come last.
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
    """A tokenizer with at most `vocab_size` ids and merges learned from `texts`.

    texts: texts, which are split by GPT-2's pre-tokenizer pattern; or words with their counts.
    vocab_size: includes bytes and special tokens; training stops early once every word is one
    token. special_tokens: get the last ids; the first is `bos` and `eos`.
    """
    special_tokens = list(special_tokens)
    counts = texts if isinstance(texts, Mapping) else _count_words(texts)
    room = vocab_size - len(special_tokens)
    if room < 256:
        raise MinitxError(
            f"vocab_size must be at least {256 + len(special_tokens)}, for 256 bytes and "
            f"{len(special_tokens)} special tokens; got {vocab_size}."
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
    """A tokenizer in which every word of `words` is exactly one token, with few other tokens.

    A word is one pre-token of GPT-2's pattern, such as " park", "Once" or ".". Each word has count
    1, so shared substrings are merged first, until each word is one token: 450 English words take
    about 1,080 ids, of which some 370 are intermediate pieces. With `ignore_merges` there are no
    merges and no such pieces, only 256 + words + special tokens: whole words are looked up, and any
    other text is encoded as bytes. With `adds_bos` the first special token is prepended to every
    text.
    """
    words, special = list(dict.fromkeys(words)), list(special_tokens)
    for word in words:
        need_valid_unicode(word)
        pre_tokens = pre_tokenize(word)
        if pre_tokens != [word]:
            raise MinitxError(
                f"Expected one word by GPT-2's pattern, got {word!a}, which is {len(pre_tokens)}; "
                "split it."
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
    # As in GPT-2, special tokens are part of the vocabulary; no merge produces them.
    added = [AddedToken(content, len(tokens) + n) for n, content in enumerate(special)]
    tokens = tokens + [content.encode("utf-8") for content in special]
    first = added[0].id if added else None
    return ByteLevelBPE(tokens, merges, added, bos=first, eos=first, **options)


class _Learner:
    """The words as sequences of tokens, and the count of each adjacent pair."""

    def __init__(self, counts: Mapping[str, int]):
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.merges: list[Pair] = []
        self._words = [list(word.encode("utf-8")) for word in counts]
        self._counts = list(counts.values())
        self._pairs: Counter[Pair] = Counter()
        self._where: dict[Pair, set[int]] = {}  # words that contain the pair, or did before a merge
        for number in range(len(self._words)):
            self._count_pairs(number, +1)
        self._heap = [(-count, pair) for pair, count in self._pairs.items()]
        heapify(self._heap)

    def merge_best_pair(self) -> bool:
        """Merge the most frequent pair; False if every word is a single token."""
        pair = self._best_pair()
        if pair is None:
            return False
        # No other pair can have produced the same bytes: all occurrences of a byte sequence between
        # two token boundaries have been merged in the same way.
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
            if self._pairs[pair] == -count > 0:  # else the heap entry is outdated
                return pair
        return None

    def _count_pairs(self, number: int, sign: int) -> set[Pair]:
        """Add (+1) or subtract (-1) the counts of a word's pairs; returns these pairs."""
        word = self._words[number]
        pairs = list(pairwise(word))
        for pair in pairs:
            self._pairs[pair] += sign * self._counts[number]
            if sign > 0:
                self._where.setdefault(pair, set()).add(number)
        return set(pairs)


def _merge_word(word: list[int], pair: Pair, merged: int) -> list[int]:
    """`word` with each occurrence of `pair` replaced by `merged`, from left to right."""
    out: list[int] = []
    for id in word:
        if out and (out[-1], id) == pair:
            out[-1] = merged
        else:
            out.append(id)
    return out
