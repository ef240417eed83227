"""Prefix caching: prompts that share a prefix reuse its keys and values, block by block.

This file: the card and options, the token loop that looks blocks up and stores them (online), the
same for a draft model (online), the store with its memory limit and LRU eviction, notes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from hashlib import sha256
from typing import Annotated, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from minitx import ledger
from minitx.decode import Sampler, TokenLoop
from minitx.digest import digest
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.shared.break_even import warn
from minitx.shared.turns import Turns
from minitx.state import Layer, State
from minitx.technique import at_least, owner, technique
from minitx.tree import Part, part, rebuild, walk


@technique(
    level="decode",
    exact=True,
    neutral={"megabytes": 0.0},
    after=(
        *("big_little", "ensemble", "jacobi", "lookahead"),
        *("prompt_lookup", "self_speculative", "speculative"),
    ),
    demo={"block": 2, "megabytes": 1.0},
    event="prompt tokens reused",
)
def prefix_cache(
    lm,
    *,
    block: Annotated[int, "tokens in a block, which is stored as a whole", at_least(1)] = 16,
    megabytes: Annotated[
        float, "memory limit for the stored keys and values; 0 stores none", at_least(0)
    ] = 64.0,
):
    """Reuse the KV cache of prompts that share a prefix.

    Paper:     Kwon et al., "Efficient Memory Management for Large Language Model Serving with
               PagedAttention", SOSP 2023, arXiv 2309.06180 (vLLM). Its prefix caching, which came
               later, is described in the documentation of vLLM.
    Fidelity:  a reconstruction from notes on vLLM's documentation and code. Ours: rows are copied,
               not shared; a prompt that is stored in full runs its last token, not its last block.
    Kind:      exact up to rounding: the same keys and values, so the same tokens or, with a seed,
               the same samples, unless two logits tie within rounding.
    Idea:      In a causal model a token's keys and values depend on it and on earlier tokens alone.
               Prompts with the same first m tokens have the same first m cache rows.
    Offline:   nothing.
    Online:    hash[0] = sha256(parts, settings and weights of the model)       once for each model
               hash[i] = sha256(hash[i-1], token ids of block i)                full blocks only
               m = block * number of leading blocks in the store, at most T - 1 of T prompt tokens:
                   the last one always runs, since its logits are needed
               copy rows 0..m-1 of every layer into the cache; run tokens m..T-1
               store each new block once it is full, of the prompt and of the completion
               above the limit: evict the least recently used block; of a prefix, the last one first
    Saves:     the prefill of m tokens, of which 2 L K d numbers each are copied instead; a stored
               token takes as many in memory. The same for a draft model. Nothing if no two prompts
               share a prefix, as in minitx compare.
    In NumPy:  400 of 420 prompt tokens reused: the first token comes 7 to 10 times sooner (minitx
               first-token --prefix-cache). A new prompt takes 2 to 5 % longer.
    Not for:   parts that free cache rows, that remember more than keys and values (sparse_memory,
               dota, early_exit with kv_fill=deferred), or whose decisions depend on the step or on
               the whole prompt. Prompts of a batch are decoded one by one.
    Proof:     tests/skip/test_prefix_cache.py; literal version: tests/skip/literal_prefix_cache.py
    Tutorial:  tutorials/17_answer_once.py
    """
    if not megabytes:
        return lm
    check(lm.model)
    context = lm.model.config.context
    if block >= context:
        warn(
            f"prefix_cache: a block of {block:,} tokens is as long as the context of {context:,}, "
            "and the last token of a prompt always runs, so no block is ever reused; use fewer."
        )
    store = PrefixStore(megabytes)
    return replace(lm, decode=PrefixCache(with_drafts(lm.decode, store, block), store, block))


def with_drafts(loop: Part, store: Part, block: int) -> Part:
    """The loop, with second models (a draft, say) that reuse prefixes too, where they can."""

    def change(node: Part) -> Part | None:
        if type(node) is Transformer and not why_not(node):
            own = {f.name: getattr(node, f.name) for f in fields(node)}
            return PrefixModel(**own, store=store, block=block)

    return rebuild(loop, change)


def check(model: Transformer) -> None:
    """Refuse a model in which the state after a prefix is more than its keys and values."""
    if why := why_not(model):
        raise MinitxError(
            f"prefix_cache cannot reuse the KV cache of a prefix: {why}; use one of the two."
        )


def why_not(model: Transformer) -> str:
    """Why the state after a prefix is more than its keys and values; "" if it is not."""
    for _, node in walk(model):
        if node.has_history:
            return f"{owner(node)} remembers more of a prompt than its keys and values"
        if node.frees_rows:
            return f"{owner(node)} keeps fewer cache rows than there are tokens"
        if node.decides != "token":
            return f"{owner(node)} makes keys and values depend on later tokens of the prompt"
    return ""


# Online ------------------------------------------------------------------------------------------


class ReusesPrefixes(Part):
    """Mixin: a part with a ``store``, whose blocks have ``block`` tokens."""

    def reuse(self, state: State, hashes: Sequence[bytes], T: int) -> int:
        """Copy the rows of all leading blocks that are stored into the state, and return how many.
        At least one of the T tokens of the prompt is left to run. The state may already hold a
        prefix of the prompt that the caller has run (see ``TokenLoop``)."""
        found = self.store.find(hashes)
        first, end = state.position, min(len(found) * self.block, T - 1)
        if end <= first:
            return 0
        tokens = state.take(end - first)
        for layer, *pieces in zip(state.layers, *(block.layers for block in found)):
            layer.tokens = tokens
            if None not in pieces:
                whole = (np.concatenate(arrays, -2) for arrays in zip(*pieces))
                k, v = (array[..., first:end, :] for array in whole)
                layer.store(k, v)  # (..., K, end - first, d), which copies them
                ledger.count(cache_bytes=k.nbytes + v.nbytes)
        state.position = end
        return end - first

    def keep(self, state: State, hashes: Sequence[bytes]) -> None:
        """Store copies of these leading blocks, unless they are stored already."""

        def copied(i: int) -> Block:
            return Block.of(state.layers, i * self.block, (i + 1) * self.block)

        self.store.put(hashes, copied)


@part
class PrefixCache(ReusesPrefixes, TokenLoop):
    """Copies the stored rows of the prompt's prefix into the cache, then runs the inner loop."""

    inner: Part
    store: Part
    block: int

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        if not limit:
            return
        text, hashes, stored = list(ids), [self.store.seed(model)], 0
        extend(hashes, text, self.block, len(text) // self.block)
        reused = self.reuse(state, hashes[1:], len(text))
        ledger.event("prompt tokens reused", reused)
        ledger.event("prompt tokens run", len(text) - state.position)
        for token in self.inner(model, state, ids, choose, limit):
            # The rows before state.position are cached by now. They may include tokens that have
            # not been yielded yet (speculative), which are not in the text.
            full = min(state.position, len(text)) // self.block
            if full > stored:
                extend(hashes, text, self.block, full)
                self.keep(state, hashes[1 : full + 1])
                stored = full
            text.append(token)
            yield token


@part
class PrefixModel(ReusesPrefixes, Transformer):
    """A second model inside the loop, such as the draft of speculative decoding. It has a state of
    its own, and the first ids that it runs are the prompt; what it writes itself is not stored."""

    store: Part
    block: int

    def last(self, ids, state: State | None = None):
        if state is None or state.position or np.ndim(ids) != 1:
            return super().last(ids, state)
        hashes = [self.store.seed(self)]
        extend(hashes, ids, self.block, len(ids) // self.block)
        reused = self.reuse(state, hashes[1:], len(ids))
        ledger.event("prompt tokens reused by the second model", reused)
        found = super().last(ids[reused:], state)
        self.keep(state, hashes[1:])
        return found


def extend(hashes: list[bytes], text: Sequence[int], block: int, n: int) -> None:
    """Append hash[i] = sha256(hash[i-1], tokens of block i) up to the n-th block. hashes[0] stands
    for the model, so the hash of a block covers the model and all tokens up to the block's end."""
    for i in range(len(hashes), n + 1):
        # 8 bytes for each id, so that [1, 23] and [12, 3] differ.
        tokens = np.array(text[(i - 1) * block : i * block], "<i8")
        hashes.append(sha256(hashes[-1] + tokens.tobytes()).digest())


class Block(NamedTuple):
    """The cache rows of some consecutive tokens: for each layer keys and values (..., K, n, d), or
    None for a layer that caches none."""

    layers: tuple
    nbytes: int

    @classmethod
    def of(cls, layers: Sequence[Layer], a: int, b: int) -> "Block":
        """Read-only copies of the rows of tokens a .. b - 1."""
        rows = tuple(copies(layer, a, b) for layer in layers)
        return cls(rows, sum(array.nbytes for pair in rows if pair for array in pair))


def copies(layer: Layer, a: int, b: int) -> tuple[np.ndarray, np.ndarray] | None:
    if not layer.count:
        return None
    pair = layer.keys[..., a:b, :].copy(), layer.values[..., a:b, :].copy()
    for array in pair:
        array.flags.writeable = False
        ledger.count(cache_bytes=array.nbytes)
    return pair


# The store ---------------------------------------------------------------------------------------


@part
class PrefixStore(Part):
    """Blocks by hash, in LRU order. It lives as long as the language model that it belongs to.

    The least recently used block comes first. The blocks of one prompt are marked as used from the
    last to the first. So the head counts as used latest, and a prefix loses its last blocks first:
    no block stays that can no longer be found because an earlier one is gone.
    """

    megabytes: float

    def __post_init__(self):
        # Not fields: a new store, or one read from a file, starts empty.
        object.__setattr__(self, "blocks", OrderedDict())  # hash -> Block
        object.__setattr__(self, "seeds", WeakKeyDictionary())  # model -> hash[0]
        object.__setattr__(self, "total", [0])  # bytes of all blocks; a list, as a part is frozen
        object.__setattr__(self, "turns", Turns())

    @property
    def limit(self) -> int:
        return int(self.megabytes * 1e6)

    @property
    def held(self) -> int:
        """Bytes of all blocks."""
        return self.total[0]

    def forget(self) -> None:
        with self.turns:
            self.blocks.clear()
            self.total[0] = 0

    def seed(self, model: Transformer) -> bytes:
        """hash[0], before a prompt's first block. The model is checked again: it may have been
        changed by hand after the technique was applied."""
        if model not in self.seeds:
            check(model)
            self.seeds[model] = digest(model)
        return self.seeds[model]

    def find(self, hashes: Sequence[bytes]) -> list[Block]:
        """The leading blocks that are stored, up to the first that is not."""
        with self.turns:
            found = [self.blocks[key] for key in hashes[: self.count_stored(hashes)]]
            self.mark_used(hashes[: len(found)])
        return found

    def put(self, hashes: Sequence[bytes], make: Callable[[int], Block]) -> None:
        """Store ``make(i)`` for each of these leading blocks that is not stored yet, as long as
        the whole prefix fits the limit. Other blocks are evicted to make room."""
        with self.turns:
            self._put(hashes, make)

    def _put(self, hashes: Sequence[bytes], make: Callable[[int], Block]) -> None:
        stored = self.count_stored(hashes)
        self.mark_used(hashes[:stored])
        own = sum(self.blocks[key].nbytes for key in hashes[:stored])  # bytes of this prefix
        for i in range(stored, len(hashes)):
            block = make(i)
            own += block.nbytes
            if own > self.limit:
                break
            self.evict(block.nbytes)  # never this prefix: it was used last, and it fits
            self.blocks[hashes[i]] = block
            self.total[0] += block.nbytes
            stored += 1
        self.mark_used(hashes[:stored])

    def count_stored(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks are stored, up to the first that is not."""
        missing = (i for i, key in enumerate(hashes) if key not in self.blocks)
        return next(missing, len(hashes))

    def mark_used(self, hashes: Sequence[bytes]) -> None:
        for key in reversed(hashes):
            self.blocks.move_to_end(key)

    def evict(self, nbytes: int) -> None:
        """Evict the least recently used blocks until this many bytes fit."""
        while self.held + nbytes > self.limit:
            _, block = self.blocks.popitem(last=False)
            self.total[0] -= block.nbytes
            ledger.event("prefix blocks evicted")


# Notes:
#
# Time to the first token, one thread, float32, a prompt of 420 tokens of which 400 are stored,
# block 16, median of 30 pairs alternating with the dense model (range), and of 15 for prompts of
# which nothing is stored (new). Models: width x layers, vocabulary.
#   128 x 8, stories:    40.2 ms dense, 4.1 ms: 10.0x (8.6x to 11.4x);   new 0.97x;  4,096 B a token
#   192 x 8, 1,024:      60.9 ms dense, 8.2 ms:  7.5x (5.8x to 8.7x);    new 0.98x; 12,288 B a token
#   288 x 6, 32,000:     80.6 ms dense, 11.6 ms: 6.9x (6.0x to 7.8x);    new 0.95x; 13,824 B a token
# ``minitx first-token --prefix-cache --rounds 15 --prompts 3`` prints the first; the others are
# random models of the shapes of ``minitx bench``, given to ``minitx.lab.first_token.first_token``.
#
# Stories that follow one another, 50 to 400 tokens of them the same in all prompts and then 20 of
# another story: minitx first-token --prefix-cache --prompts 4 --rounds 8 --shared 50 (100 ...).
# Median of 24 pairs (range); of new prompts 8. Reused are full blocks of 16: of 50 tokens 48.
#       shared   reused   run   multiply-adds   dense     changed    faster                  new
#       50       48       22    0.32x            5.2 ms   2.7 ms     2.0x (1.8x to 2.2x)     0.95x
#       100      96       24    0.21x            7.9 ms   3.3 ms     2.4x (1.7x to 2.7x)     0.95x
#       200      192      28    0.14x           17.3 ms   4.2 ms     4.2x (3.2x to 5.0x)     0.95x
#       400      400      20    0.06x           38.3 ms   3.9 ms     9.8x (8.1x to 10.4x)    0.96x
#
# 5 to 6 % of the multiply-adds are left, but 20 rows use BLAS less well than 420. At 192 x 8,
# copying the rows takes 0.6 ms, storing a new prompt 1.0 ms, hashing its tokens 0.07 ms.
#
# Why hash[0] is not a hash of the printed tree: printed settings are rounded, and of rotary tables
# only the shape is printed. The weights are hashed (1.3 GB/s) before a model's first prompt.
#
# The stored rows come from products of another shape: 20 rows alone may be rounded differently than
# the same rows among 420. So logits differ from those without the cache by rounding, and so may the
# token where two logits are that close.
#
# Rows are copied in and out. vLLM shares its blocks by reference and counts the references; here a
# state has its own arrays, so a block can be evicted at any time.
#
# With speculative, the draft model reuses prefixes too, from the same store: its blocks have other
# hashes, since hash[0] is that of its own weights. Its first call is where it would run the whole
# prompt. A single token needs no draft, so minitx first-token does not show it. For five tokens
# after prompts of 420 that were seen before, relative to plain decoding (lowest to highest of 5
# rounds), minitx frontier decoding --methods "speculative stop,prefix_cache,prefix_cache + draft"
# --length 420 --new 5 --prompts 7 prints:
#                                      multiply-adds  throughput
#       speculative                        1.07x     0.87x (0.86x to 0.91x)
#       prefix_cache                       0.02x     7.8x  (7.5x to 8.2x)
#       prefix_cache and speculative       0.03x     5.9x  (5.7x to 6.2x)
# Both models reuse what they can; for five tokens a draft takes more time than it saves.
# A second model that keeps more of a prompt than keys and values runs it in full. So do those of
# techniques that decide about a whole completion (they are applied later).
#
# The rows of a batch reuse the beginnings of those before them: a common beginning is run once, for
# the first row. Packed batches (padding_skip) make their own states, so the two are refused.
