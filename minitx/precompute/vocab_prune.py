"""Vocabulary pruning: drop tokens that hardly occur, from the embedding and from the output head.

The card and options, the parts that run and the tokenizer (online), which tokens stay (offline),
notes.

Letters: V tokens of the vocabulary, n of them kept, D width.
"""

from collections import Counter
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx.calibration import calibration_ids
from minitx.checkpoints.tokenizer import Tokenizer
from minitx.model import Head, TiedHead, TokenEmbedding
from minitx.technique import SEEDS, at_least, need, swap, technique
from minitx.tree import Part, part, table


@technique(
    level="pruning",
    exact=False,
    neutral={"keep": 1 << 40},
    after=("prune", "prune_structure", "head_prune"),
    demo={"keep": 0, "stories": 1},
)
def vocab_prune(
    lm,
    *,
    keep: Annotated[
        int | None,
        "how many tokens stay, the most frequent; bytes and special tokens always do; default: all "
        "that occur in the calibration text",
        at_least(0),
    ] = None,
    choose: Annotated[
        Literal["frequency", "random"], "by frequency, or a random baseline"
    ] = "frequency",
    stories: Annotated[
        int,
        "calibration stories (with calibrate: passages of the text) whose tokens are counted",
        at_least(1, limit=1000),
    ] = 256,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Prune the vocabulary: drop rare tokens from the embedding and the output head.

    Paper:     Bogoychev et al., "The Ups and Downs of Large Language Model Inference with
               Vocabulary Trimming by Language Heuristics", 2023, arXiv 2311.09709; of its two
               heuristics, the selection by a corpus.
    Fidelity:  a reconstruction from the abstract. Ours: what happens to dropped tokens, in a prompt
               and in the logits.
    Kind:      approximate: logits of kept tokens are exact (after a prompt of kept tokens), dropped
               tokens are never generated (but by sampling at temperatures far above 1).
    Idea:      A general tokenizer has many tokens that one kind of text never uses. Each costs a
               row of the embedding, a column of the head, and D multiply-adds per logit.
    Offline:   count the tokens of calibration text. Keep the most frequent ones, and always single
               bytes and special tokens, so that any text can still be encoded.
               ids (n,): the kept tokens in ascending order, token ids[r] is row r
               E' = E[ids]; U' = U[:, ids], or E' again if the head is tied
               row[t] = r if t = ids[r];  for a dropped t, the kept row with the largest cosine
    Online:    Ids are still those of the whole vocabulary.
                 encode a text as usual, then split each dropped token into the longest kept tokens
                 x = E'[row[t]]                   so a dropped id in a prompt reads a similar row
                 logits[ids] = h U';  those of dropped tokens: 50 below the largest
    Saves:     D (V - n) multiply-adds per logits and weights of the head, as many of an embedding
               that is not tied to it. Costs V + n integers.
    In NumPy:  hardly faster on stories-draft: generation 1.03x to 1.08x. Memory is what it saves:
               0.84x there, with 587 of 1,022 tokens.
    Not for:   text of another kind than the calibration text: it takes more tokens. first_layer,
               remove_weights, merge_embeddings, whose tables replace the embedding.
    Proof:     tests/precompute/test_vocab_prune.py; literal version:
               tests/precompute/literal_vocab_prune.py
    """
    V = lm.model.config.vocab_size
    if keep is not None and keep >= V:
        return lm
    texts = calibration_ids("vocab_prune", lm, stories)
    ids = kept_tokens(lm, keep, texts, choose, seed)
    if len(ids) == V:
        return lm
    need(lm.model.head, Head, TiedHead)
    return prune_to(lm, ids)


# Online ------------------------------------------------------------------------------------------


@part
class PrunedEmbedding(Part):
    """Token ids of the whole vocabulary, looked up in a table of the kept ones."""

    inner: Part  # of n tokens
    row: np.ndarray = table()  # (V,) the row of each token

    def __call__(self, ids, positions):
        return self.inner(self.row[ids], positions)


@part
class PrunedHead(Part):
    """Logits of the kept tokens; those of dropped tokens are too low to be ever sampled."""

    inner: Part  # of n tokens
    vocab_size: int  # V
    ids: np.ndarray = table()  # (n,) the token of each row, ascending

    def __call__(self, x):
        kept = self.inner(x)  # (..., n)
        logits = np.empty((*kept.shape[:-1], self.vocab_size), kept.dtype)
        logits[...] = kept.max(-1, keepdims=True) - BELOW
        logits[..., self.ids] = kept
        return logits  # (..., V)

    def argmax(self, x) -> int:
        """The token with the largest logit for one row x (D,)."""
        return int(self.ids[self.inner.argmax(x)])

    def tokenizer_for(self, tokenizer):
        """The tokenizer that writes texts in kept tokens."""
        return SplittingTokenizer(tokenizer, self.ids)


# exp(-50) = 2e-22: less than the sampler can tell from 0, unless the temperature is well above 1.
# Finite, so that losses and KL divergences are finite too: a dropped token in a text that is read
# costs about 50 nats, where the true price is infinite.
BELOW = 50.0


class SplittingTokenizer(Tokenizer):
    """The tokenizer ``original``, but dropped tokens are split into kept ones. Same ids."""

    def __init__(self, original: Tokenizer, kept):
        self._original = original
        self.vocab_size, self.special_ids = original.vocab_size, original.special_ids
        self.bos, self.eos = original.bos, original.eos
        self.pieces = all_pieces(original, kept)  # of each dropped token that has some

    @property
    def original(self) -> Tokenizer:
        return self._original

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.split(self.original.encode(text, special))

    def encode_bytes(self, data: bytes) -> list[int]:
        return self.split(self.original.encode_bytes(data))

    def split(self, ids) -> list[int]:
        return [piece for id in ids for piece in self.pieces.get(id, (id,))]

    def token_bytes(self, id: int, previous: int | None = None) -> bytes:
        return self.original.token_bytes(id, previous)

    def decoder(self, previous: int | None = None):
        return self.original.decoder(previous)


# Offline -----------------------------------------------------------------------------------------


def kept_tokens(lm, keep: int | None, texts, choose: str, seed: int) -> np.ndarray:
    """The ids that stay, ascending."""
    V = lm.model.config.vocab_size
    count = np.zeros(V, int)
    for id, times in Counter(id for ids in texts for id in ids).items():
        count[id] = times
    always = np.zeros(V, bool)
    always[needed_tokens(lm)] = True
    wanted = int((always | (count > 0)).sum()) if keep is None else keep
    if choose == "random":
        count = np.random.default_rng(seed).permutation(V)
    # The needed ones, then by frequency; ties go to the lower id, which BPE learned earlier.
    order = np.lexsort((-count, ~always))
    kept = np.zeros(V, bool)
    kept[order[: max(wanted, int(always.sum()))]] = True
    if lm.tokenizer is not None:  # a token that cannot be spelled by others has to stay
        pieces = all_pieces(lm.tokenizer, np.flatnonzero(kept))
        for id in range(min(V, lm.tokenizer.vocab_size)):
            kept[id] |= id not in pieces and bytes_of(lm.tokenizer, id) != b""
    return np.flatnonzero(kept)


def needed_tokens(lm) -> list[int]:
    """Special tokens, and those of one byte."""
    config, tokenizer = lm.model.config, lm.tokenizer
    found = {id for id in (config.bos, *config.eos) if id is not None}
    if tokenizer is not None:
        found |= set(tokenizer.special_ids)
        found |= {id for id in (tokenizer.bos, tokenizer.eos) if id is not None}
        found |= {i for i in range(tokenizer.vocab_size) if len(bytes_of(tokenizer, i)) == 1}
    return [id for id in sorted(found) if id < config.vocab_size]


def bytes_of(tokenizer, id: int) -> bytes:
    """The bytes of a token in the middle of a text."""
    return tokenizer.token_bytes(id, previous=id)


def all_pieces(tokenizer, kept) -> dict[int, list[int]]:
    """The pieces of each dropped token, at every point the longest kept token that fits. Tokens
    that cannot be spelled so, or that have no bytes, are left out."""
    by_bytes = {bytes_of(tokenizer, i): i for i in sorted(map(int, kept), reverse=True)}
    by_bytes.pop(b"", None)
    longest, found = max(map(len, by_bytes), default=0), {}
    for id in set(range(tokenizer.vocab_size)) - set(map(int, kept)):
        if pieces := spell(bytes_of(tokenizer, id), by_bytes, longest):
            found[id] = pieces
    return found


def spell(data: bytes, by_bytes: dict[bytes, int], longest: int) -> list[int]:
    """The ids of kept tokens that spell the data; none if they cannot."""
    pieces, at = [], 0
    while at < len(data):
        ends = range(min(len(data), at + longest), at, -1)
        end = next((end for end in ends if data[at:end] in by_bytes), None)
        if end is None:
            return []
        pieces.append(by_bytes[data[at:end]])
        at = end
    return pieces


def prune_to(lm, ids):
    """The model and the tokenizer with only these tokens."""
    made: dict[int, np.ndarray] = {}  # a tied head shares the embedding's array

    def rows(w):
        return made.setdefault(id(w), w[ids])

    def embedding(e: TokenEmbedding) -> Part:
        return PrunedEmbedding(replace(e, w=rows(e.w)), nearest_rows(e.w, ids))

    def head(h: Part) -> Part:
        if type(h) is TiedHead:
            inner = replace(h, w=rows(h.w))
        else:
            w = np.ascontiguousarray(h.w[:, ids])
            inner = replace(h, w=w, b=None if h.b is None else h.b[ids])
        return PrunedHead(inner, lm.model.config.vocab_size, ids)

    new = swap(lm, TokenEmbedding, embedding)
    new = replace(new, model=replace(new.model, head=head(lm.model.head)))
    if lm.tokenizer is None:
        return new
    return replace(new, tokenizer=new.model.head.tokenizer_for(lm.tokenizer))


def nearest_rows(w, ids) -> np.ndarray:
    """(V,): for each row of w (V, D), its index in w[ids]; for one that is not among them, the
    index of the row with the largest cosine."""
    unit = w / np.maximum(np.linalg.norm(w, axis=1, keepdims=True), np.finfo(w.dtype).tiny)
    row = np.empty(len(w), np.int64)
    dropped = np.setdiff1d(np.arange(len(w)), ids)
    for some in np.array_split(dropped, len(dropped) // 1024 + 1):
        row[some] = (unit[some] @ unit[ids].T).argmax(1)
    row[ids] = np.arange(len(ids))
    return row


# Notes:
#
# - Which ids are which: nothing is renumbered for the caller. The embedding's ``row`` maps a token
#   to its row, the head's ``ids`` a row to its token; the printed tree shows both sizes.
# - A token that is dropped by mistake is expensive: the model knows its word as one token, hardly
#   ever in pieces, and predicts pieces badly. With the tokens of 16 calibration stories, stories-
#   draft needed 600 nats more for a held-out story (4 stories, in its own tokens). So the
#   calibration text must be long: of 100 held-out stories, 0.7 % of the tokens do not occur in 32
#   calibration stories, 0.02 % not in 256.
# - minitx compare and sweep read texts in the dense model's tokens, so a dropped one costs about 50
#   nats as a target and reads as a similar token in the input; minitx evaluate reads them in the
#   pruned model's own tokens.
# - Figures on stories-draft (minitx sweep vocab-prune keep=587,450,350 choose=frequency,random -m
#   stories-draft --stories 60; 587 is the default there). Loss: above dense, in nats per token.
#   Hops: % of answers right, by the facts that they combine.
#
#       keep    choose       multiply-adds    memory    loss       1 / 2 / 3 hops
#       1022    (dense)          1.000x       1.000x     0.000     43 / 51 / 25
#        587    frequency        0.858x       0.836x    +0.009     43 / 51 / 25
#        587    random           0.858x       0.836x   +21.9        2 / 20 /  0
#        450    frequency        0.813x       0.775x    +2.9       42 / 51 / 25
#        350    frequency        0.781x       0.731x   +10.7       20 / 22 / 17
#        350    random           0.781x       0.731x   +37.0        0 /  2 /  0
#
#   256 of these tokens are single bytes, which stories hardly need; other texts may.
