"""The shapes of queries, keys and values inside a model, found by running one token.

A technique cannot take them from the configuration: prune_structure removes heads, and
absorb_products makes keys as wide as the hidden state. Whatever other techniques have done to the
projections, what arrives is what counts.
"""

from typing import NamedTuple

from minitx.model import Attend, Cache, Transformer
from minitx.state import Layer
from minitx.technique import swap
from minitx.tree import Part, part


class Shape(NamedTuple):
    """What reaches the scores of one block."""

    heads: int  # H, of queries
    kv_heads: int  # K, of keys
    width: int  # d, of a query and of a key


def score_shapes(model: Transformer) -> dict[int, Shape]:
    """What reaches each ``Attend``, by the id of that part. NoSuchPart if there is none."""
    seen: dict[int, Shape] = {}
    swap(model, Attend, lambda dense: WatchedAttend(dense, seen)).hidden([0])
    return seen


def cached_widths(model: Transformer) -> set[int]:
    """The widths of the keys and values that reach a ``Cache``; NoSuchPart if there is none."""
    seen: set[int] = set()
    swap(model, Cache, lambda cache: WatchedCache(cache, seen)).hidden([0])
    return seen


@part
class WatchedAttend(Part):
    """Notes the shapes of its queries and keys."""

    dense: Attend
    seen: dict

    def __call__(self, q, k, v, layer: Layer):
        self.seen[id(self.dense)] = Shape(q.shape[-3], k.shape[-3], q.shape[-1])
        return self.dense(q, k, v, layer)


@part
class WatchedCache(Part):
    """Notes the widths of what is stored."""

    cache: Cache
    seen: set

    def store(self, k, v, layer: Layer):
        self.seen.update((k.shape[-1], v.shape[-1]))
        self.cache.store(k, v, layer)

    def read(self, layer: Layer):
        return self.cache.read(layer)
