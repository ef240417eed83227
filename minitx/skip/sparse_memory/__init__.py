"""Sparse memory: slots with least-recently-used eviction, of which a query attends to the top k.

From top to bottom: the card and the options; the memory (write, evict, read) as the paper has it;
the selector that uses it inside attention; notes. nearest.py scores the candidates that an index
proposes. The plain index is a scan of all slots; lsh.py and kd_trees.py are the paper's other two.
"""

from typing import Annotated, Literal, NamedTuple

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import Attend, Attention
from minitx.shared.break_even import check_selection
from minitx.shared.shapes_seen import score_shapes
from minitx.shared.sparse_attention import SparseAttention, Visible, per_key
from minitx.skip.sparse_memory.inner_product import key_norm_bound
from minitx.skip.sparse_memory.kd_trees import KDTrees
from minitx.skip.sparse_memory.lsh import random_lsh
from minitx.skip.sparse_memory.nearest import LinearScan, top_k_of_candidates
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, between, swap, technique
from minitx.tree import Part, float_type, part, walk


@technique(
    level="scores",
    exact=False,
    neutral={"keep": 1 << 40, "slots": None, "index": "linear"},
    demo={"keep": 3, "slots": 10},
    event="keys evicted",
    presets={"aggressive": {"keep": 16}, "eviction": {"keep": 32, "slots": 256}},
)
def sparse_memory(
    lm,
    *,
    keep: Annotated[int, "keys that a query attends to (paper: K)", at_least(1)] = 32,
    slots: Annotated[
        int | None, "keys that can be read, per key head (paper: N); default: all", at_least(1)
    ] = None,
    threshold: Annotated[
        float, "weight above which a slot counts as accessed (paper: delta)", between(0, 1)
    ] = 0.005,
    index: Annotated[
        Literal["linear", "lsh", "kd-tree"], "what proposes the keys to score; linear: all slots"
    ] = "linear",
    bits: Annotated[int, "index=lsh: sign bits per hash table", between(1, 16)] = 8,
    tables: Annotated[int, "index=lsh: hash tables", at_least(1, limit=1024)] = 40,
    augment: Annotated[bool, "index=lsh: hash lengths too, not only directions"] = True,
    trees: Annotated[int, "index=kd-tree: randomized trees", at_least(1, limit=64)] = 4,
    checks: Annotated[
        int | None, "index=kd-tree: keys to look at; None: until the search is exact", at_least(1)
    ] = 32,
    seed: Annotated[int, "of the hyperplanes (lsh) or split dimensions (kd-tree)", SEEDS] = 0,
):
    """Attend to the top-k keys of a fixed-size memory with LRU eviction.

    Paper:     Rae et al., "Scaling Memory-Augmented Neural Networks with Sparse Reads and Writes"
               (SAM), NIPS 2016, arXiv 1610.09027.
    Fidelity:  the paper's text for reads, eviction, undoing and the indexes. Its memory belongs to
               an LSTM. That keys and values are the memory is ours, after Memorizing Transformers
               (arXiv 2203.08913); slots that were read are never written to (the paper's write gate
               alpha is fixed to 1, its gamma to 0).
    Kind:      approximate; exact if keep and slots reach the context, with index=linear.
    Idea:      Few keys get most of the attention, so attend to the best ones only. And a key that
               nobody has attended to for a long time can make room for a new one.
    Offline:   nothing (linear); random hyperplanes (lsh); for lsh and kd-tree a bound on the length
               of keys, from the weights.
    Online:    each key head has slots; a slot holds a key, its value, and ``last``, the number of
               the token that last accessed it. For token t:
               write   into a free slot, or else into the one with the smallest last (ties: the
                       oldest key); its last = t
               search  candidates: all slots, or those that the index finds
               read    for each query head that shares this key head: softmax over the ``keep``
                       candidates with the largest q . k
               access  last = t for slots whose weight is above threshold in any of these heads
    Saves:     per decoded token and query head n d + 2 r d multiply-adds instead of 2 S d (S cached
               tokens, d head width), with n = min(S, slots), r = min(n, keep). Not memory: the KV
               cache keeps every row, so that an eviction can be undone. Prompts save nothing: on
               stories of 512 tokens only cache reads fall (0.71x), not all multiply-adds.
    In NumPy:  slower than dense up to S = 4,096; with slots=256 it breaks even at about 8,000.
    Not for:   batches of different lengths, if keys can be evicted or with index=kd-tree: they run
               one by one. slots not much above keep: then recency, not importance, decides what
               is evicted.
    Proof:     tests/skip/test_sparse_memory.py; literal version:
               tests/skip/literal_sparse_memory.py
    Tutorial:  tutorials/07_four_ways_to_find_keys.py
    """
    context = lm.model.config.context
    slots = context if slots is None else min(slots, context)
    attentions = [node for _, node in walk(lm) if type(node) is Attention]
    bounds = {id(attn.attend): key_norm_bound(attn, lm.model.config.width) for attn in attentions}
    shapes = score_shapes(lm.model)

    def change(dense: Attend) -> SparseAttention:
        R = bounds.get(id(dense))
        if index == "linear":
            found = LinearScan()
        elif index == "lsh":
            (H, K, d), dtype = shapes[id(dense)], float_type(lm.model)
            hashing = (
                tables * bits * d
            )  # multiply-adds of one vector: a query, and its share of a key
            few = "use index=linear, or fewer tables or bits"
            check_selection("sparse_memory", context, d, hashing * (1 + K / H), 0, few)
            found = random_lsh(d, bits, tables, R if augment else None, seed, dtype)
        else:
            found = KDTrees(R, keep, checks, trees, seed)
        selector = SparseMemory(found, keep, slots, threshold, dense.scale, context)
        return SparseAttention(selector, dense.scale)

    return swap(lm, Attend, change)


# Online: the memory ------------------------------------------------------------------------------


class SlotMemory:
    """M memories of N slots each: one per key head, and per sequence of a batch.

        token    (M, N)               the token in each slot; -1 if the slot is free
        last     (M, N)               the token that last accessed the slot; -1 if it is free
        rows     (M, N, d)            the key in each slot
                 (M, N, any), ...     and each array that the index stores per key (its codes)
        source   (M, S, d), ...       the same arrays for every token
        built    M                    the k-d trees of each memory; None with another index
        journal  one ``Change`` per token, to undo it
        heads    K; memory m is that of key head m % K, in every sequence of a batch

    Values stay in the KV cache.
    """

    def __init__(
        self, source: tuple, heads: int, index: Part, keep: int, slots: int, threshold: float
    ):
        M = len(source[0])
        self.source, self.heads, self.index = source, heads, index
        self.keep, self.slots, self.threshold = keep, slots, threshold
        self.rows = tuple(np.zeros((M, slots, a.shape[2]), a.dtype) for a in source)
        self.token = np.full((M, slots), -1)
        self.last = np.full((M, slots), -1)
        self.built = [index.empty()] * M if index.has_history else None
        self.count = 0  # tokens written
        self.journal: list[Change] = []

    def write(self, t: int) -> None:
        """Put token t into a free slot, or else into the least recently accessed one; ties go to
        the oldest token."""
        each = np.arange(len(self.token))  # (M,)
        slot = np.full_like(each, t)
        old_keys = [None] * len(each)
        if t >= self.slots:
            slot = (self.last * (t + 1) + self.token).argmin(-1)  # smallest (last, token)
            old_keys = self.rows[0][each, slot]
            ledger.event("keys evicted", len(slot))
        before = self.token[each, slot], self.last[each, slot]
        self.journal.append(Change(slot, *before, self.built, []))
        self.put(slot, np.full_like(slot, t), t)
        self.count = t + 1
        if self.built is not None:
            n, keys = min(self.count, self.slots), self.rows[0]
            self.built = [
                self.index.insert(self.built[m], keys[m, :n], slot[m], old_keys[m], m % self.heads)
                for m in each
            ]

    def read(self, q):
        """The slots (M, G, 1, n), booleans, that the newest token attends to; q (M, G, 1, d)."""
        t, n = self.count - 1, min(self.count, self.slots)
        keys, *codes = (a[:, :n] for a in self.rows)
        order = self.token if self.count > self.slots else None  # None: slot i holds token i
        visible = Visible(1, n)  # one query, which may see all n slots
        kept, scores = top_k_of_candidates(
            self.index, self.keep, q, keys, codes, visible, self.built, order
        )
        where = np.nonzero(self.is_accessed(scores, kept)[:, 0])  # (memories, slots)
        self.journal[t].accessed[:] = where, self.last[where]
        self.last[where] = t
        return kept

    def is_accessed(self, scores, kept):
        """Which keys (M, T, n) get a weight above the threshold in some query head; scores and kept
        are (M, G, T, n)."""
        weights = np.exp(scores - scores.max(-1, keepdims=True))  # the maximum is always kept
        weights *= kept
        weights /= weights.sum(-1, keepdims=True)
        return (weights > self.threshold).any(1)

    def rewind(self, position: int) -> None:
        """Undo the tokens from ``position`` on, the newest first."""
        while self.count > position:
            change = self.journal.pop()
            self.count -= 1
            if change.accessed:
                where, last = change.accessed
                self.last[where] = last
            if self.count < self.slots:  # the slot was free
                for row in (*self.rows, self.token, self.last):
                    row[:, self.count] = 0 if row.ndim > 2 else -1
            else:
                self.put(change.slot, change.token, change.last)
            self.built = change.built

    def put(self, slot, token, last) -> None:
        """Put each memory's token (M,) into its slot (M,)."""
        each = np.arange(len(slot))
        for row, source in zip(self.rows, self.source):
            row[each, slot] = source[each, token]
        self.token[each, slot], self.last[each, slot] = token, last

    # Several tokens --------------------------------------------------------------------------

    def run(self, q, visible: Visible):
        """The tokens (M, G, T, S), booleans, that the tokens ``visible.own`` attend to; q
        (M, G, T, d)."""
        kept = np.zeros((*q.shape[:-1], visible.S), bool)
        first = int(visible.own[0])
        for t in range(self.count, first):  # tokens whose query skipped this layer: early_exit
            self.write(t)  # has only stored their keys and values
        at_once = self.tokens_without_eviction(visible)
        if at_once:
            found = self.run_without_eviction(q[:, :, :at_once], first)
            kept[:, :, :at_once, : first + at_once] = found
        for t in range(at_once, visible.T):  # one by one: what t reads decides what t + 1 evicts
            while self.count <= visible.own[t]:
                self.write(self.count)
            m, g, _, slot = np.nonzero(self.read(q[:, :, t : t + 1]))
            kept[m, g, t, self.token[m, slot]] = True
        return kept

    def tokens_without_eviction(self, visible: Visible) -> int:
        """How many of the tokens can be run at once: those that find a free slot, if they are the
        newest ones without a gap and the index does not depend on the order of writes."""
        first = int(visible.own[0])
        if self.built is not None or first != visible.S - visible.T:
            return 0
        return min(max(self.slots - first, 0), visible.T)

    def run_without_eviction(self, q, first: int):
        """Faster than write and read one by one, with the same result: nothing is evicted, so token
        t is in slot t, and all queries can be scored together."""
        S = first + q.shape[2]
        keys, *codes = (a[:, :S] for a in self.source)
        visible = Visible(q.shape[2], S)
        kept, scores = top_k_of_candidates(self.index, self.keep, q, keys, codes, visible)
        before = self.last[:, None, :S].copy()  # (M, 1, S)
        for t in range(first, S):
            self.write(t)
        t = np.arange(first, S)[:, None]
        written = t == np.arange(S)  # (T, S)
        accessed = self.is_accessed(scores, kept)  # (M, T, S)
        last = np.concatenate([before, np.where(accessed | written, t, -1)], 1)
        np.maximum.accumulate(last, 1, out=last)  # a slot keeps its latest access
        # Now last[:, i] (M, S) is ``last`` before the i-th of these tokens, last[:, -1] after all.
        self.last[:, :S] = last[:, -1]
        for i in range(S - first):
            where = np.nonzero(accessed[:, i])
            self.journal[first + i].accessed[:] = where, last[:, i][where]
        return kept


class Change(NamedTuple):
    """What one token changed in each memory: enough to undo it."""

    slot: np.ndarray  # (M,): where it was written
    token: np.ndarray  # (M,): the token that was there before; -1: none
    last: np.ndarray  # (M,): and when that was last accessed
    built: list | None  # the k-d trees before
    accessed: list  # [], filled in after the read: [(memories, slots), their ``last`` before]


# Online: in attention ----------------------------------------------------------------------------


@part
class SparseMemory(Part):
    """Selects the keys that each query attends to.

    With slots for the whole context nothing is ever evicted, so it does not matter what was read
    before: then there is no SlotMemory, and queries are processed together, in batches of any kind
    (unless the index has a history of its own).
    """

    index: Part
    keep: int
    slots: int
    threshold: float
    scale: float  # 1 / sqrt(d)
    context: int

    @property
    def has_history(self) -> bool:
        """True if eviction or the index depends on the order of earlier reads and writes."""
        return self.slots < self.context or self.index.has_history

    one_sequence = has_history  # True: no batches of different lengths (tree.Part)

    def keeps_all(self, S: int) -> bool:
        return type(self.index) is LinearScan and S <= self.keep and self.context <= self.slots

    def remember(self, k, layer: Layer):
        """What is known of the keys k (..., K, S, d): the SlotMemory, if there is one, or else the
        index's codes of all keys, each (..., K, S, any)."""
        codes = per_key(self.index, k, self.index.precompute, layer)
        if not self.has_history:
            return codes
        if layer.start is not None:
            raise MinitxError(
                "sparse_memory cannot evict keys or build k-d trees in a batch of prompts of "
                "different lengths; run them one by one, or use slots=None and another index."
            )
        source = tuple(a.reshape(-1, *a.shape[k.ndim - 2 :]) for a in (k, *codes))

        def make() -> SlotMemory:
            sizes = self.keep, self.slots, self.threshold
            return SlotMemory(source, k.shape[-3], self.index, *sizes)

        memory = layer.memory.recall(self, make) if layer.remember else make()
        memory.source = source  # which has grown
        return memory

    def __call__(self, q, k, known, visible: Visible):
        """The keys (..., K, G, T, S), booleans, that the queries q (..., H, T, d) attend to.
        known: what ``remember`` returned."""
        *lead, H, T, d = q.shape
        K = k.shape[-3]
        q = q.reshape(*lead, K, H // K, T, d) * self.scale  # (..., K, G, T, d)
        if isinstance(known, SlotMemory):
            kept = known.run(q.reshape(-1, *q.shape[-3:]), visible)  # (M, G, T, S)
            return kept.reshape(*q.shape[:-1], visible.S)
        codes = [a[..., : visible.S, :] for a in known]
        return top_k_of_candidates(self.index, self.keep, q, k, codes, visible)[0]


# Notes:
#
# - Equation 6 of the paper, read literally, evicts the most recently accessed slot; its text says
#   the least recently accessed one, which is what runs here. A token is written before it reads, so
#   it can attend to itself. Ties of q . k go to the lower slot.
# - The paper keeps slots in a linked list, O(1) per access. In NumPy an argmin over the slots is
#   faster; a test shows that the two evict the same slots.
# - The journal replaces the paper's rollback for back-propagation: ``rewind`` undoes tokens bit for
#   bit, for rejected draft tokens. An entry has at most 3 + 3 * G * keep numbers per key head.
# - Not here: what the paper trains (an LSTM that writes and erases). No figure of the paper is
#   about a transformer.
# - G query heads share a memory: choose slots well above G * keep.
# - If an index finds fewer than keep candidates, the latest tokens are added (nearest.py).
# - If the weights do not tell the bound R of the key lengths (a first_layer table, say), lsh hashes
#   directions as with augment=false, and k-d trees are rebuilt when a longer key comes.
# - Memory: slots * (d + 2) numbers per key head on top of the KV cache (key, token, last), and the
#   codes of the index twice, by slot and by token.
# - Multiply-adds that are counted: n * d for the scores. For lsh, c * d for c candidates instead,
#   plus tables * bits * d to hash a query and tables * bits * (d + 1) to hash a key; and per slot,
#   as many bytes read as there are tables (twice as many for bits > 8). Not counted: sorting, and
#   finding the slot to evict.
# - A prompt is scored in full: n * d per query and head to select, then again to attend.
# - In NumPy: selecting keys costs more time than it saves up to contexts of 4,096. A prompt runs
#   token by token once the slots are full. With slots=256 the time per token grows slowly and
#   breaks even near 8,000 keys. lsh was slower at every context that was tried; k-d trees are
#   plain Python, for looking at.
