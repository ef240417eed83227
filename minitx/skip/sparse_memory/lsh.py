"""Locality-sensitive hashing: the candidates are the keys that share a bucket with the query.

A hash table draws ``bits`` random hyperplanes. The bucket of a vector is the bit string that tells
on which side of each plane it lies; two vectors agree in one bit with probability 1 - angle / pi.
More bits make buckets smaller, more tables give a key more chances to be found. What is hashed is
the augmented key (inner_product.py), whose angle to the query decreases with q . k.

In practice it misses many of the best keys: the bound R is several times the length of most keys,
so all angles are near 90 degrees. With augment=false the keys themselves are hashed, that is, only
their directions: on a text of ``stories`` that found more of the best keys, from somewhat more
candidates. The default is augment=true because only that is right for any keys: hashed as it is, a
long key with the largest q . k may be harder to find than a short one at a smaller angle.
"""

import numpy as np

from minitx import ledger
from minitx.skip.sparse_memory.inner_product import augment_keys
from minitx.tree import Part, part, table


@part
class LSH(Part):
    """Hash tables over the keys. R=None: keys are hashed as they are, without augmentation."""

    planes: np.ndarray = table()  # (tables * bits, d + 1): normal vectors (``table``: no weight)
    R: np.ndarray | None = table()  # (K,): bounds of the key lengths
    bits: int  # per hash table
    tables: int  # hash tables

    def precompute(self, k) -> tuple:
        """The bucket of each key k (..., K, n, d) in each table: (..., K, n, tables)."""
        if self.R is None:
            return (self.buckets(k),)
        return (self.buckets(augment_keys(k, self.R[:, None])),)

    def __call__(self, q, k, codes, built=None):
        (of_keys,) = codes  # (..., K, S, tables)
        of_queries = self.buckets(q)  # (..., K, G, T, tables); a query's last coordinate is 0
        ledger.count(cache_bytes=of_keys.nbytes)
        same = np.zeros((*of_queries.shape[:-1], of_keys.shape[-2]), bool)  # (..., K, G, T, S)
        for i in range(self.tables):  # all tables at once would take that much more memory
            same |= of_queries[..., i, None] == of_keys[..., None, None, :, i]
        return same

    def buckets(self, x):
        """Bucket numbers (..., tables) of x (..., d) or (..., d + 1): ``bits`` bits each."""
        planes = self.planes[:, : x.shape[-1]]
        ledger.count(x.size * len(planes), planes.nbytes)
        signs = (x @ planes.T > 0).reshape(*x.shape[:-1], self.tables, self.bits)
        packed = np.packbits(signs, axis=-1)  # (..., tables, 1 or 2) bytes
        return np.ascontiguousarray(packed).view(f"u{packed.shape[-1]}")[..., 0]


def random_lsh(d: int, bits: int, tables: int, R, seed: int, dtype) -> LSH:
    """Hash tables with hyperplanes in random directions of d + 1 coordinates."""
    planes = np.random.default_rng(seed).standard_normal((tables * bits, d + 1))
    return LSH(planes.astype(dtype), R, bits, tables)
