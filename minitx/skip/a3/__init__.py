"""A3: the ends of sorted key columns tell which keys are worth a dot product.

Here: the card and the options, the paper's greedy search, the selector that runs it, notes. Beside
it: sorted_columns.py keeps the columns sorted while the cache grows; fixed_point.py is the optional
fixed-point arithmetic with exponential tables.
"""

from heapq import heapify, heapreplace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.model import Attend
from minitx.shared.coarse import coarse
from minitx.shared.sparse_attention import SparseAttention, Visible
from minitx.skip.a3.fixed_point import FixedPointAttend, Rounding
from minitx.skip.a3.sorted_columns import Columns, cached_columns
from minitx.state import Layer
from minitx.technique import above, at_least, between, swap, technique
from minitx.tree import Part, part


@technique(
    level="scores",
    exact=False,
    neutral={"iterations": None, "threshold": 0.0},
    event=("keys kept", "keys seen"),
    presets={  # the paper's
        "conservative": {"iterations": 1 / 2, "threshold": 5.0},
        "aggressive": {"iterations": 1 / 8, "threshold": 10.0},
    },
)
def a3(
    lm,
    *,
    iterations: Annotated[
        float | None,
        "of the greedy search, as a share of the keys that the query sees; None: no search",
        above(0, 1024),
    ] = 1 / 2,
    threshold: Annotated[
        float,
        "drop keys with less than this percentage of the largest weight; 0: none",
        between(0, 100),
    ] = 5.0,
    rebuild: Annotated[
        int,
        "sort in groups of this many keys; keys not sorted yet are always kept; 0: insert each key "
        "at once",
        at_least(0),
    ] = 0,
    exp: Annotated[
        Literal["exact", "tables"], "the softmax's exponential: exact, or from two small tables"
    ] = "exact",
    integer_bits: Annotated[
        int | None, "round q, k, v to fixed point; the paper: 4; None: floats", between(1, 8)
    ] = None,
    fraction_bits: Annotated[
        int, "f, of fixed point; each table of exp=tables has 2^(2f) entries", between(1, 8)
    ] = 4,
):
    """Select keys by a greedy search over sorted key columns, then score only those.

    Paper:     Ham et al., "A3: Accelerating Attention Mechanisms in Neural Networks with
               Approximation", HPCA 2020, arXiv 2002.10941, sections III and IV.
    Fidelity:  the paper's text. Causal attention and a growing cache are our extension.
               What is unconfirmed is in the Notes.
    Kind:      approximate; exact at iterations=None threshold=0. No setting pays on the shipped
               models: the default, the paper's conservative one, reads 0.89x the KV cache at 512
               tokens and costs 0.14 nats; with more iterations the search reads more than dense.
    Idea:      A score is a sum of d products q[j] * key[j]. The most extreme products of all keys
               tell which keys may score high, and they are at the ends of the sorted columns.
    Offline:   nothing.
    Online:    keep each column j of the keys (after RoPE) sorted, each number with its key's row;
               for each query: greedy[key] = 0 for all keys, running = 0
               repeat M = max(1, round(iterations * keys seen)) times:
                   pop the largest product q[j] * key[j] left in any column; if it is positive,
                       add it to greedy[key] and to running
                   if running >= 0 (the gate):
                       pop the smallest product left in any column; if it is negative,
                           add it to greedy[key] and to running
               candidates: keys with greedy > 0; if there are none, the key with the largest greedy
               s = q . key / sqrt(d)    exact scores, for the candidates only
               keep s >= max(s) - ln(100 / threshold), or all if threshold=0; softmax over those
    Saves:     per decoded token and query head, with S cached keys, c candidates and r kept keys:
               at most 2 (d + M) + (c + r) d multiply-adds instead of 2 S d. The sorted columns take
               8 d bytes per key and key head. A prompt saves none: all scores are computed.
    In NumPy:  much slower than dense attention, since Python pops one product at a time (Notes).
    Not for:   heads whose scores are nearly all negative (one candidate is left) or all positive
               (nothing is dropped): a candidate is a key whose sum is above 0.
    Proof:     tests/skip/test_a3.py; literal version: tests/skip/literal_a3.py
    Tutorial:  tutorials/07_four_ways_to_find_keys.py
    """
    rounding = None if integer_bits is None else Rounding(integer_bits, fraction_bits)

    def change(dense: Attend) -> SparseAttention:
        selector = GreedySelector(iterations, rebuild, dense.scale, rounding)
        if rounding is None and exp == "exact":
            return SparseAttention(selector, dense.scale, threshold / 100)
        arithmetic = FixedPointAttend(exp == "tables", fraction_bits, rounding)
        return SparseAttention(selector, dense.scale, threshold / 100, arithmetic)

    return swap(lm, Attend, change)


# Online: greedy search ---------------------------------------------------------------------------


def greedy_search(q: list[float], columns: Columns, M: int, S: int, bits=None) -> list[float]:
    """The greedy sums of S keys for one query q (d). columns (d, n): those of the n sorted keys
    that the query sees; the other keys get 0. bits: of the numbers, for the ledger."""
    largest, smallest = pop_products(q, columns, 1), pop_products(q, columns, -1)
    greedy, running, popped = [0.0] * S, 0.0, 0
    for _ in range(M):
        product, key = next(largest, NOTHING)
        greedy[key] += product
        running += product
        popped += product != 0
        if running >= 0:  # the gate: too many negative products would leave no candidates
            product, key = next(smallest, NOTHING)
            greedy[key] += product
            running += product
            popped += product != 0
    products = popped + 2 * len(q)  # 2 d products are computed before the first pop
    value_bytes, row_bytes = columns.values.itemsize, columns.rows.itemsize
    ledger.count(products, 0, products * value_bytes + popped * row_bytes, bits=bits)
    ledger.event("products popped", popped)
    return greedy


NOTHING = 0.0, 0  # popped when no product of the wanted sign is left: adds 0 to key 0


def pop_products(q: list[float], columns: Columns, sign: int):
    """Yield (product, key) over all columns: with sign=1 the positive products, the largest first;
    with sign=-1 the negative ones, the smallest first.

    A priority queue holds the next product of each column. The first is at the end of the column
    if sign * q[j] > 0, and at its start otherwise; the next ones follow inwards.
    """
    number, key = columns.values.item, columns.rows.item
    d, n = columns.rows.shape
    step = [-1 if sign * x > 0 else 1 for x in q]
    start = [n - 1 if sign * x > 0 else 0 for x in q]
    # heapq pops the smallest first, so for sign=1 products are stored negated. Ties are popped by
    # the lower column first.
    queue = [(-sign * q[j] * number(j, start[j]), j, start[j]) for j in range(d)]
    heapify(queue)
    while queue[0][0] < 0:
        product, j, i = queue[0]
        after = i + step[j]
        following = -sign * q[j] * number(j, after) if 0 <= after < n else 0.0  # 0: none left
        heapreplace(queue, (following, j, after))
        yield -sign * product, key(j, i)


# Online: the selector ----------------------------------------------------------------------------


@part
class GreedySelector(Part):
    """Keeps the candidates of the greedy search, and the keys that are not sorted yet."""

    iterations: float | None  # as a share of the keys seen; None: no search, keep all
    rebuild: int  # sort in groups of this many keys; 0: insert each key at once
    scale: float  # 1 / sqrt(d)
    rounding: Part | None = None  # to fixed point

    def keeps_all(self, S: int) -> bool:
        return self.iterations is None

    def remember(self, k, layer: Layer) -> Columns | None:
        """The sorted columns of all keys so far; None if none is sorted."""
        if self.iterations is None:
            return None
        S = k.shape[-2]
        if self.rebuild:
            # Each sequence has (S - start) % rebuild keys after its last full group. In a batch all
            # sequences are sorted up to the same row, S minus the smallest of these remainders; the
            # search of each still stops at its own last full group (``end`` below). max: a sequence
            # that is still all padding counts as one key.
            start = 0 if layer.start is None else layer.start
            S -= np.min(np.maximum(S - start, 1) % self.rebuild)
        return cached_columns(self, k[..., :S, :], layer, self.searched)

    def searched(self, x):
        """Queries or keys as the search compares them: in fixed point, or else rounded to 20 bits
        (coarse.py), so that columns which several keys share have equal numbers. Without rotation
        all keys of a token share them."""
        return self.rounding(x) if self.rounding else coarse(x).astype(x.dtype)

    def __call__(self, q, k, known, visible: Visible):
        q = q.reshape(*q.shape[:-3], k.shape[-3], -1, visible.T, q.shape[-1])  # (..., K, G, T, d)
        if known is None:
            return visible.hide(np.ones((*q.shape[:-1], visible.S), bool), False)
        if self.rounding:  # scale, then round; in floats the scale changes no candidate
            q = q * self.scale
        q = self.searched(q)
        end = visible.own + 1
        first = end - visible.count  # the query sees the keys first .. end - 1
        if self.rebuild:  # the search reads only full groups of sorted keys
            end = end - visible.count % self.rebuild
        iterations = np.maximum(1, np.rint(self.iterations * visible.count)).astype(int)
        shape = q.shape[:-1]  # (..., K, G, T)
        first, end, iterations = (np.broadcast_to(x, shape) for x in (first, end, iterations))
        greedy = self.search(q, known, first, end, iterations, visible.S)  # (..., K, G, T, S)
        kept = greedy > 0
        if self.rebuild:
            kept |= visible.hide(np.arange(visible.S) >= end[..., None], False)
        none = np.nonzero(~kept.any(-1))
        kept[(*none, visible.hide(greedy).argmax(-1)[none])] = True  # ties go to the lower index
        return kept

    def search(self, q, columns: Columns, first, end, iterations, S: int):
        """Greedy sums (..., K, G, T, S), one query after another."""
        greedy = np.zeros((*q.shape[:-1], S))
        bits = self.rounding.bits if self.rounding else None
        *heads, G, T, _ = q.shape
        for head in np.ndindex(*heads):  # (..., K)
            of_head = columns.of_head(head)
            for t in range(T):
                # the same keys for all G query heads, so [0, t]
                seen = of_head.between(first[head][0, t], end[head][0, t])
                if not seen.rows.size:  # no group is full yet
                    continue
                for g in range(G):
                    M = int(iterations[head][g, t])
                    query = q[head][g, t].tolist()
                    greedy[head][g, t] = greedy_search(query, seen, M, S, bits)
        return greedy


# Notes:
#
# - Unconfirmed: whether ``running``, where the gate reads it, already contains this iteration's
#   largest product, which the paper's wording leaves open (here it does); and the width of the
#   exponential tables' entries.
# - The paper pops M products on each side, whatever their signs. Here a side stops where products
#   have the wrong sign and would not be added; this changes only the count.
# - Ties: of equal products in two columns the lower column's is popped first; in one column the
#   outer one. Equal numbers of a column are sorted by key, so for q[j] > 0 the largest products
#   come from the last of equal keys.
# - A large ``iterations`` does not make a3 exact: at iterations = d all d n products are popped
#   (except those that the gate holds back), so greedy is about q . key, and keys with a negative
#   score are still dropped. Exact is iterations=None threshold=0.
# - Each query searches only the keys that it sees, so a prompt selects what single tokens select.
# - The hardware searches with the scaled and rounded query, and so does integer_bits. In floats the
#   scale multiplies all products alike and changes no candidate, so it is left out of the search.
# - Inserting a new key moves half of each column on average ("sorted values moved"), and in
#   decoding only one query per head uses the result; in the paper many queries share one sorting.
#   rebuild=64 sorts after every 64 keys.
# - Time on stories, one BLAS thread (OMP_NUM_THREADS=1, model(ids, state) timed by itself):
#
#                              decode at 256 keys    at 500 keys    prompt of 256
#       dense                        0.7 ms             0.8 ms           17 ms
#       preset=conservative           10 ms              16 ms         1200 ms
#       preset=aggressive              6 ms               7 ms          650 ms
# - ``threshold`` saves value rows: those of the candidates that it drops are not read, so weighting
#   the values takes r d multiply-adds instead of c d.
# - Fixed point and the tables show what the hardware's arithmetic does to the outputs; they are
#   slower still.
