"""Randomized k-d trees with best-bin-first search: the index of the paper.

A k-d tree halves the points again and again along one coordinate. A search goes down to the query's
own leaf, then visits the other boxes in the order of their distance (best bin first, one queue for
all trees). Once it has looked at ``keep`` points, it ends when it has looked at ``checks`` of them,
or when no other box can hold a nearer point than the ``keep`` nearest so far. With checks=None only
the second ends it, so it is exact. Points are augmented keys (inner_product.py).

Here to look at, not to be fast: at the width of attention heads a k-d tree hardly prunes anything
(``measure_pruning``), and a search that is cut off finds few of the best keys. Plain Python, in
float64, on keys and queries that are rounded to 20 bits (coarse.py): a search that rounding errors
can send another way would find other keys for a prompt than for single tokens. Trees are immutable:
inserting or removing a point makes a new root that shares all nodes but one path with the old, so
undoing a write means going back to the old root.
"""

import heapq
from itertools import count
from typing import NamedTuple

import numpy as np

from minitx import ledger
from minitx.shared.coarse import ERROR, coarse
from minitx.skip.sparse_memory.inner_product import augment_keys, augment_queries
from minitx.tree import Part, part, table

SPREAD = 5  # a split is along a random one of this many dimensions of largest variance


class Split(NamedTuple):
    """An inner node: points with x[dim] < at are on the left. A leaf is a plain tuple of slots."""

    dim: int
    at: float
    left: tuple
    right: tuple


class Forest(NamedTuple):
    """Several trees over the same points."""

    roots: tuple
    R: float  # no key is longer
    built: int  # points when the trees were built
    added: int  # points inserted since then


@part
class KDTrees(Part):
    """The index. Trees are rebuilt after as many insertions as they had points (in a full memory:
    every ``slots`` insertions, as in the paper), and when a key is longer than R."""

    has_history = True  # the trees of a sequence, beyond its keys and values (tree.Part)

    R: np.ndarray | None = table()  # (K,): bounds of the key lengths; None: the longest so far
    keep: int  # points wanted: the search goes on until it has that many
    checks: int | None  # points to look at; None: until the search is exact
    trees: int
    seed: int

    def precompute(self, k) -> tuple:
        return ()

    def __call__(self, q, k, codes, built):
        """Candidates (M, G, T, n) for q (M, G, T, d) and k (M, n, d), from M forests."""
        found = np.zeros((*q.shape[:-1], k.shape[-2]), bool)
        for m, g, t in np.ndindex(q.shape[:-1]):
            found[m, g, t, self.search(built[m], k[m], q[m, g, t])] = True
        ledger.count(q.size * k.shape[-2], cache_bytes=k.nbytes)
        ledger.event("points checked", found)
        return found

    def search(self, forest: Forest, keys, q) -> list[int]:
        """The slots of keys (n, d) that were looked at for the query q (d,)."""
        x = augment_queries(coarse(q), forest.R)  # (d + 1,)
        # One product gives all distances; only those of points that are looked at are used.
        products = coarse(keys) @ x[:-1]
        distance = (forest.R**2 + x @ x - 2 * products).tolist()
        x, number = x.tolist(), count()  # number: breaks ties between equally near boxes
        # A heap, nearest first: (squared distance ``bound`` from the query to the box, number, its
        # node, offsets: the part of ``bound`` that each dimension contributes).
        boxes = [(0.0, next(number), root, {}) for root in forest.roots]
        slack = 8 * ERROR * forest.R**2  # twice what rounding changes in a squared distance
        nearest: list[float] = []  # heap of the ``keep`` smallest distances, negated
        seen: dict[int, None] = {}
        while boxes:
            bound, _, node, offsets = heapq.heappop(boxes)
            if len(nearest) == self.keep:
                enough = self.checks is not None and len(seen) >= self.checks
                if enough or bound > -nearest[0] + slack:
                    break
            while type(node) is Split:  # go down on the query's side, put the other into the heap
                gap = x[node.dim] - node.at
                near, far = (node.left, node.right) if gap < 0 else (node.right, node.left)
                away = bound - offsets.get(node.dim, 0.0) + gap * gap  # squared distance to far
                box = away, next(number), far, {**offsets, node.dim: gap * gap}
                heapq.heappush(boxes, box)
                node = near
            for slot in node:  # a leaf
                if slot not in seen:  # else another tree has led to it
                    seen[slot] = None
                    push = heapq.heappush if len(nearest) < self.keep else heapq.heappushpop
                    push(nearest, -distance[slot])
        return list(seen)

    def empty(self) -> Forest:
        return Forest(((),) * self.trees, 0.0, 0, 0)

    def insert(self, forest: Forest, keys, slot: int, old, head: int) -> Forest:
        """The forest after the key in this slot of keys (n, d) has replaced ``old`` (d,), or None
        if the slot was free. head: the number of the key head."""
        new = coarse(keys[slot])
        if forest.added >= forest.built or new @ new > forest.R**2:
            return self.build(keys, head)
        roots = forest.roots
        if old is not None:
            x = augment_keys(coarse(old), forest.R)
            roots = tuple(without_point(root, slot, x) for root in roots)

        def points(slots):
            return augment_keys(coarse(keys[list(slots)]), forest.R)

        x = augment_keys(new, forest.R)
        roots = tuple(with_point(root, slot, x, points) for root in roots)
        return forest._replace(roots=roots, added=forest.added + 1)

    def build(self, keys, head: int = 0) -> Forest:
        """Trees over keys (n, d); the same keys always give the same trees."""
        keys = coarse(keys)
        R = float(np.sqrt(np.einsum("nd,nd->n", keys, keys).max()))
        if self.R is not None:
            R = max(R, float(self.R[head]))
        points, slots = augment_keys(keys, R), np.arange(len(keys))
        rngs = [np.random.default_rng((self.seed, head, i)) for i in range(self.trees)]
        return Forest(tuple(build_tree(points, slots, rng) for rng in rngs), R, len(keys), 0)


def build_tree(points, slots, rng=None) -> tuple:
    """A tree over these slots of points (n, d + 1), split at the mean of a random dimension among
    those of largest variance; without rng of the one with the largest."""
    if len(slots) < 2:
        return tuple(slots.tolist())
    x = points[slots]
    variance = x.var(0)
    largest = np.argsort(-variance, kind="stable")
    dim = int(largest[0] if rng is None else rng.choice(largest[:SPREAD]))
    at = float(x[:, dim].mean())
    left = x[:, dim] < at
    if not left.any() or left.all():  # no variance in this dimension
        return build_tree(points, slots) if rng and variance.any() else tuple(slots.tolist())
    return Split(
        dim, at, build_tree(points, slots[left], rng), build_tree(points, slots[~left], rng)
    )


def with_point(node: tuple, slot: int, x, points) -> tuple:
    """The tree with one more point x (d + 1,); ``points(slots)`` returns the points of a leaf."""
    if type(node) is not Split:
        leaf = np.array([*node, slot])
        return relabel(build_tree(points(leaf), np.arange(len(leaf))), leaf)
    if x[node.dim] < node.at:
        return node._replace(left=with_point(node.left, slot, x, points))
    return node._replace(right=with_point(node.right, slot, x, points))


def without_point(node: tuple, slot: int, x) -> tuple:
    """The tree without the point x (d + 1,) in this slot."""
    if type(node) is not Split:
        return tuple(s for s in node if s != slot)
    if x[node.dim] < node.at:
        return node._replace(left=without_point(node.left, slot, x))
    return node._replace(right=without_point(node.right, slot, x))


def relabel(node: tuple, slots) -> tuple:
    """The tree with ``slots[i]`` instead of i in its leaves."""
    if type(node) is Split:
        return node._replace(left=relabel(node.left, slots), right=relabel(node.right, slots))
    return tuple(int(slots[i]) for i in node)


# What they are worth -----------------------------------------------------------------------------


class Pruning(NamedTuple):
    """How much of the points a search looks at, and what it finds."""

    width: int
    exact: float  # share of the points, until the search is exact
    checked: float  # share of the points, if cut off after ``checks``
    recall: float  # share of the true top k found then


def measure_pruning(d: int, n=1000, keep=8, checks=32, trees=1, queries=40, seed=0) -> Pruning:
    """Search n random keys of width d with random queries."""
    rng = np.random.default_rng(seed)
    keys, q = rng.standard_normal((n, d)), rng.standard_normal((queries, d))
    best = np.argsort(-(q @ keys.T), -1)[:, :keep]  # (queries, keep)

    def run(checks):
        index = KDTrees(None, keep, checks, trees, seed)
        forest = index.build(keys)
        seen = [index.search(forest, keys, row) for row in q]
        share = np.mean([len(s) for s in seen]) / n
        return float(share), float(np.mean([np.isin(b, s).mean() for b, s in zip(best, seen)]))

    (exact, _), (checked, recall) = run(None), run(checks)
    return Pruning(d, exact, checked, recall)
