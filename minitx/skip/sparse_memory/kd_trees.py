"""Randomised k-d trees with best-bin-first search: the index of the sparse-memory paper.

It is here to be looked at, not to be fast: at the width of attention heads a k-d tree leaves
hardly a point unseen, which ``looked_at`` measures. Written in plain Python, in float64.

A tree never changes: putting a point in or taking one out gives a new root that shares all but one
path with the old, so undoing is going back to the old root.
"""

import heapq
from itertools import count
from typing import NamedTuple

import numpy as np

from minitx import ledger
from minitx.skip.sparse_memory.nearest import augmented_keys, augmented_queries
from minitx.tree import Part, part, table

SPREAD = 5  # a tree splits along a random one of so many dimensions of the largest variance


class Split(NamedTuple):
    """Points with x[dim] < at are on the left. (A leaf is a plain tuple of slots.)"""

    dim: int
    at: float
    left: tuple
    right: tuple


class Forest(NamedTuple):
    """Some trees over the same points, which are all no longer than R."""

    roots: tuple
    R: float
    built: int  # points when they were built
    added: int  # since then


@part
class KDTrees(Part):
    """Looks at the points of the boxes nearest to the query, until ``checks`` points were seen.

    Built anew after as many insertions as it held points (in a full memory: N), and whenever a
    longer key comes than R allows.
    """

    R: np.ndarray | None = table()  # (K,) bounds of the lengths of keys, or None: as they come
    K: int  # points wanted: the search goes on till it has so many
    checks: int | None  # None: until no box can hold a nearer point, which is exact
    trees: int
    seed: int

    history = True

    def remember(self, k) -> tuple:
        return ()

    def empty(self) -> Forest:
        return Forest(((),) * self.trees, 0.0, 0, 0)

    def put(self, forest: Forest, keys, u: int, old, memory: int) -> Forest:
        """With the new key in slot u of keys (n, d), whose key was ``old`` (d,), None if it had
        none; memory: the number of the key head (in a batch, counted on)."""
        new = np.asarray(keys[u], np.float64)
        if forest.added >= forest.built or new @ new > forest.R**2:
            return self.build(keys, memory)
        roots = forest.roots
        if old is not None:
            x = augmented_keys(np.asarray(old, np.float64), forest.R)
            roots = tuple(taken_out(root, u, x) for root in roots)

        def points(slots):
            return augmented_keys(np.asarray(keys[list(slots)], np.float64), forest.R)

        x = augmented_keys(new, forest.R)
        roots = tuple(put_in(root, u, x, points) for root in roots)
        return forest._replace(roots=roots, added=forest.added + 1)

    def build(self, keys, memory: int = 0) -> Forest:
        """Trees over keys (n, d), always the same for the same keys."""
        keys = np.asarray(keys, np.float64)
        R = float(np.sqrt(np.einsum("nd,nd->n", keys, keys).max()))
        if self.R is not None:
            R = max(R, float(self.R[memory % len(self.R)]))
        points, slots = augmented_keys(keys, R), np.arange(len(keys))
        draws = [np.random.default_rng((self.seed, memory, i)) for i in range(self.trees)]
        return Forest(tuple(grown(points, slots, rng) for rng in draws), R, len(keys), 0)

    def __call__(self, q, k, facts, held):
        """Candidates (M, G, T, n) for q (M, G, T, d), k (M, n, d) and M forests."""
        found = np.zeros((*q.shape[:-1], k.shape[-2]), bool)
        for m, g, t in np.ndindex(q.shape[:-1]):  # slow, and meant to be read: see the top
            seen = self.search(held[m], k[m], q[m, g, t])
            found[m, g, t, seen] = True
        ledger.count(q.size * k.shape[-2], cache_bytes=k.nbytes)
        ledger.event("points checked", found)
        return found

    def search(self, forest: Forest, keys, q) -> list[int]:
        """The slots (of keys (n, d)) that were looked at for the query q (d,)."""
        x = augmented_queries(np.asarray(q, np.float64), forest.R)  # (d + 1,)
        # All distances in one product, of which only those of points looked at are made use of.
        products = np.asarray(keys, np.float64) @ x[:-1]
        distance = (forest.R**2 + x @ x - 2 * products).tolist()
        x, number = x.tolist(), count()
        boxes = [(0.0, next(number), root, {}) for root in forest.roots]  # nearest box first
        nearest: list[float] = []  # of the K best, negative: the farthest is on top
        seen: dict[int, None] = {}
        while boxes:
            bound, _, node, offsets = heapq.heappop(boxes)
            if len(nearest) == self.K:
                enough = self.checks is not None and len(seen) >= self.checks
                if enough or bound > -nearest[0] + 1e-9 * forest.R**2:
                    break
            while type(node) is Split:  # to the query's side; the other one has to wait
                gap = x[node.dim] - node.at
                near, far = (node.left, node.right) if gap < 0 else (node.right, node.left)
                away = bound - offsets.get(node.dim, 0.0) + gap * gap
                box = away, next(number), far, {**offsets, node.dim: gap * gap}
                heapq.heappush(boxes, box)
                node = near
            for slot in node:
                if slot not in seen:  # by another tree
                    seen[slot] = None
                    better = heapq.heappush if len(nearest) < self.K else heapq.heappushpop
                    better(nearest, -distance[slot])
        return list(seen)


def grown(points, slots, rng=None) -> tuple:
    """A tree over these slots of points (n, d + 1), split at the mean; without rng along the
    dimension of the largest variance."""
    if len(slots) < 2:
        return tuple(slots.tolist())
    x = points[slots]
    variance = x.var(0)
    largest = np.argsort(-variance, kind="stable")
    dim = int(largest[0] if rng is None else rng.choice(largest[:SPREAD]))
    at = float(x[:, dim].mean())
    left = x[:, dim] < at
    if not left.any() or left.all():  # all alike along it
        return grown(points, slots) if rng and variance.any() else tuple(slots.tolist())
    return Split(dim, at, grown(points, slots[left], rng), grown(points, slots[~left], rng))


def put_in(node: tuple, slot: int, x, points) -> tuple:
    """The tree with one point x (d + 1,) more; ``points(slots)`` gives those of a leaf."""
    if type(node) is not Split:
        leaf = np.array([*node, slot])
        return named(grown(points(leaf), np.arange(len(leaf))), leaf)
    if x[node.dim] < node.at:
        return node._replace(left=put_in(node.left, slot, x, points))
    return node._replace(right=put_in(node.right, slot, x, points))


def named(node: tuple, slots) -> tuple:
    """The tree with ``slots[i]`` for each i in its leaves."""
    if type(node) is Split:
        return node._replace(left=named(node.left, slots), right=named(node.right, slots))
    return tuple(int(slots[i]) for i in node)


def taken_out(node: tuple, slot: int, x) -> tuple:
    """The tree without the point x (d + 1,) in this slot."""
    if type(node) is not Split:
        return tuple(s for s in node if s != slot)
    if x[node.dim] < node.at:
        return node._replace(left=taken_out(node.left, slot, x))
    return node._replace(right=taken_out(node.right, slot, x))


# What trees are worth ----------------------------------------------------------------------------


class LookedAt(NamedTuple):
    """What a search looked at: share of the points, and of the K best how many were among them."""

    width: int
    exact: float  # share of points until the search is sure
    checked: float  # share of points with a limit
    recall: float  # with that limit


def looked_at(d: int, n=1000, K=8, checks=32, trees=1, queries=40, seed=0) -> LookedAt:
    """Random queries among n random keys of the width d."""
    rng = np.random.default_rng(seed)
    keys, q = rng.standard_normal((n, d)), rng.standard_normal((queries, d))
    best = np.argsort(-(q @ keys.T), -1)[:, :K]  # (queries, K)

    def run(checks):
        index = KDTrees(None, K, checks, trees, seed)
        forest = index.build(keys)
        seen = [index.search(forest, keys, row) for row in q]
        share = np.mean([len(s) for s in seen]) / n
        return float(share), float(np.mean([np.isin(b, s).mean() for b, s in zip(best, seen)]))

    sure, limited = run(None), run(checks)
    return LookedAt(d, sure[0], *limited)
