"""Sign hashes: of a vector k bits, each saying on which side of a plane through 0 it lies.

The planes stand at right angles to each other, in random directions. The share of bits in which two
hashes differ estimates the angle between their vectors. Here: the directions as a product that is
cheap to multiply by, packed bits and their distance, and by how much the estimate is too large.
What is made of the angle is up to the techniques.
"""

import math
from functools import lru_cache

import numpy as np

from minitx import ops
from minitx.tree import Part, part, table

# Directions --------------------------------------------------------------------------------------


def factor_sizes(d: int) -> list[int]:
    """Small whole numbers whose product is d, in rising order: its prime factors, but 4 for 2 * 2,
    which is as many multiplies and a step less. So [4, 4, 4] for 64, and [7] for 7."""
    sizes, rest = [], d
    for size in (4, 2, *range(3, d + 1, 2)):
        while rest % size == 0:
            sizes.append(size)
            rest //= size
    return sorted(sizes) or [1]


def orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    """A random matrix (n, n) whose rows have length 1 and stand at right angles: what Gram-Schmidt
    makes of standard normal rows."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)).T)
    return (q * np.sign(np.diag(r))).T  # Gram-Schmidt leaves the diagonal of r positive


@lru_cache(maxsize=8)
def directions(d: int, k: int, seed: int) -> tuple[tuple[np.ndarray, ...], ...]:
    """Random factors for k directions in d dimensions, by batches: d directions are all that can
    stand at right angles, so more of them come in independent batches of d."""
    rng = np.random.default_rng(seed)
    sizes = factor_sizes(d)
    return tuple(tuple(orthogonal(n, rng) for n in sizes) for _ in range(math.ceil(k / d)))


@part
class Factor(Part):
    """A small orthogonal matrix."""

    a: np.ndarray = table()  # (n, n)


@part
class Kronecker(Part):
    """The product with A = A1 (x) A2 (x) ..., which is orthogonal since its factors are, at the
    price of d (n1 + n2 + ...) multiplies for each x and not d^2."""

    factors: tuple  # of Factor

    def __call__(self, x):
        """x (..., d) -> A x (..., d)"""
        y = x.reshape(-1, x.shape[-1])
        for factor in reversed(self.factors):
            # The last index is multiplied by its factor and goes first, until all have their turn.
            y = y.reshape(len(y), -1, len(factor.a))  # (N, d / n, n)
            y = ops.linear(y, factor.a.T).swapaxes(1, 2)  # (N, n, d / n)
        return y.reshape(x.shape)


# Bits --------------------------------------------------------------------------------------------


@part
class SignHash(Part):
    """k bits for each vector: which of the directions it points along, rather than against."""

    k: int
    batches: tuple  # of what multiplies by up to d directions

    def __call__(self, x):
        """x (..., d) -> hashes (..., W), words of as many bits as divide k (see ``pack``)"""
        sides = [batch(x) >= 0 for batch in self.batches]
        bits = sides[0] if len(sides) == 1 else np.concatenate(sides, -1)
        return pack(bits[..., : self.k])


def sign_hash(d: int, k: int, seed: int, dtype=np.float64) -> SignHash:
    """The hash of k bits for vectors of d numbers of this type that belongs to the seed."""
    batches = tuple(
        Kronecker(tuple(Factor(a.astype(dtype, copy=False)) for a in factors))
        for factors in directions(d, k, seed)
    )
    return SignHash(k, batches)


def pack(bits):
    """Booleans (..., k) as bytes with 8 of them each, filled up with 0, and these together as the
    longest words (..., W) that hold a whole number of them: uint64, or down to uint8."""
    packed = np.packbits(bits, -1)
    bytes_each = math.gcd(packed.shape[-1], 8)  # 1, 2, 4 or 8
    return packed.view(f"u{bytes_each}")


def distance(a, b):
    """In how many bits hashes a and b (..., W) differ: whole numbers (...)."""
    differ = np.bitwise_count(a[..., 0] ^ b[..., 0])  # uint8
    for word in range(1, a.shape[-1]):  # few: a word holds up to 64 bits
        differ = differ.astype(np.uint16, copy=False)
        differ += np.bitwise_count(a[..., word] ^ b[..., word])
    return differ


# Angles ------------------------------------------------------------------------------------------

DRAWN = 1 << 19  # numbers on each side: with k = d the bias is then right to about 0.003 at any d


@lru_cache
def angle_bias(d: int, k: int, seed: int = 0, percentile: float = 0.8) -> float:
    """What to subtract from the angle pi / k * distance so that it is too small in so large a share
    of all cases (radians): that percentile of estimated minus true angle, over pairs of standard
    normal vectors of d numbers."""
    x, y = np.random.default_rng((seed, 1)).standard_normal((2, max(DRAWN // d, 1), d))
    hash_of = sign_hash(d, k, seed)
    estimated = math.pi / k * distance(hash_of(x), hash_of(y))
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    true = np.arccos((np.einsum("nd,nd->n", x, y) / lengths).clip(-1, 1))
    return float(np.quantile(estimated - true, percentile))


def cosines(k: int, bias: float) -> np.ndarray:
    """cos(max(0, pi / k * distance - bias)) for each distance from 0 to k: (k + 1,)."""
    return np.cos(np.maximum(0, math.pi / k * np.arange(k + 1) - bias))
