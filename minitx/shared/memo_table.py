"""A table of vectors that were seen before, for memoization: find the stored key nearest to a new
input, and how far away it is. The technique keeps the values, what it stores for each key.

Offline: ``cover`` selects which inputs to store, ``MemoTable.of`` makes the table. It never changes
afterwards, so a result depends only on the input and not on what was run before it. Under a quality
monitor (``RadiusMonitor``) the radius within which a key is near enough also depends on that.

Letters: N stored keys of width D, r principal components by which they are compared.
"""

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.shared.quality_monitor import levels_of, pieces, relative_error
from minitx.state import Layer
from minitx.technique import blocks_of
from minitx.tree import Part, part, table

STEPS = 1 << 20  # distances are multiples of 1 / STEPS
BLOCK = 512  # rows of a distance matrix at a time


@part
class MemoTable(Part):
    """N keys. The nearest one is found by r principal components, for D r + N r multiply-adds
    instead of N D; the distance to that one is then measured exactly."""

    basis: np.ndarray = table()  # (D, r) orthonormal columns
    short: np.ndarray = table()  # (N, r) = keys @ basis
    half: np.ndarray = table()  # (N,) |short|^2 / 2
    keys: np.ndarray = table()  # (N, D)
    sizes: np.ndarray = table()  # (N,) |keys|

    @classmethod
    def of(cls, keys, basis) -> "MemoTable":
        short = keys @ basis
        half = (short * short).sum(-1) / 2
        sizes = np.maximum(norms(keys), np.finfo(keys.dtype).tiny).astype(keys.dtype)
        return cls(basis, short, half, keys, sizes)

    def nearest(self, x):
        """x (..., D) -> the indices (...) of the nearest keys, and the distances |x - key| / |key|
        (...)."""
        short = ops.linear(x, self.basis)  # (..., r)
        # For s = short and a short key k: |s - k|^2 / 2 = |k|^2 / 2 - s . k + |s|^2 / 2,
        # where the last term is the same for all keys.
        entry = (self.half - ops.linear(short, self.short.T)).argmin(-1)
        return entry, self.distance(x, entry)

    def nearest_of(self, x, first: int, end: int):
        """The same for one x (D,), among the keys first .. end - 1 (at least one) only."""
        short = ops.linear(x, self.basis)
        near = self.half[first:end] - ops.linear(short, self.short[first:end].T)
        entry = first + near.argmin()
        return entry, self.distance(x, entry)

    def distance(self, x, entry):
        """|x - key| / |key|, rounded so that comparing it does not depend on the last bits."""
        ledger.count(x.size)
        away = norms(x - ops.rows(self.keys, entry)) / self.sizes[entry]
        return np.rint(away * STEPS) / STEPS


@part
class RadiusMonitor(Part):
    """Mixin: a memoized sub-layer under the quality monitor, which halves the radius after a false
    hit. The sub-layer has a ``radius`` and three methods:

    answer(x, entry, hit, layer)    its outputs, stored ones where ``hit``
    exact(x, layer)                 what it computes without the table
    stored(entry, layer)            the stored outputs
    """

    has_history = True  # the radius in use

    every: int = 1  # n: every n-th token that hits also runs exactly
    limit: float = 0.0  # of the relative error
    halvings: int = 0  # at most

    def adapted(self, x, entry, distance, layer: Layer):
        """The outputs (T, D) of normalized tokens x (T, D) of one sequence, from the nearest keys
        (T,) and their distances (T,)."""
        tokens, y = layer.tokens, np.empty_like(x)
        levels = levels_of(self, layer, self.halvings)
        for some, checked in pieces(tokens.array, self.every):
            layer.tokens = tokens.only(some)
            hit = distance[some] <= self.radius * 0.5 ** (levels.top - levels.level)
            if checked and hit[0]:
                y[some] = self.exact(x[some], layer)  # and computed anyway
                error = relative_error(self.stored(entry[some], layer), y[some])
                levels.note(int(layer.tokens.array[0]), error, self.limit)
            else:
                y[some] = self.answer(x[some], entry[some], hit, layer)
        layer.tokens = tokens
        return y


def norms(x):
    x = x.astype(np.float64)  # in float32 the squares of tiny numbers are 0
    return np.sqrt(np.vecdot(x, x))


# Checks ------------------------------------------------------------------------------------------


def check_options(name: str, lm, first: int, choose: str, monitor: int) -> None:
    """Refuse options of the technique ``name`` that do not go together."""
    L = len(blocks_of(lm))
    if first > L:
        raise MinitxError(f"{name}: first must be at most {L}, the number of layers; got {first}.")
    if monitor and choose != "nearest":
        raise MinitxError(
            f"{name}: monitor={monitor} adapts the radius, which choose={choose} does not have; "
            "use monitor=0 or choose=nearest."
        )


# Offline -----------------------------------------------------------------------------------------


def principal(x, r: int):
    """The first r principal components (D, r) of x (n, D); fewer if D is smaller."""
    need_finite_inputs(x)
    centered = x - x.mean(0, dtype=np.float64)
    _, directions = np.linalg.eigh(centered.T @ centered)  # ascending
    return np.ascontiguousarray(directions[:, ::-1][:, :r]).astype(x.dtype)


def need_finite_inputs(x) -> None:
    if not np.isfinite(x).all():
        raise MinitxError(
            "Memoization stores what the model computes on calibration text, and some of that is "
            "NaN or Inf; check the model's weights, or calibrate on another text."
        )


def cover(keys, radius: float, size: int) -> np.ndarray:
    """The indices of at most ``size`` of the keys (n, D), selected greedily: each time the one with
    most keys within its radius that are within the radius of none selected before. Ties go to the
    lower index; it ends early if no key is left."""
    near = within(keys, radius)  # (n, n)
    count = near.sum(0)  # (n,) for each key, how many of ``left`` are within its radius
    left, chosen = np.ones(len(keys), bool), []
    while len(chosen) < size and left.any():
        chosen.append(int(count.argmax()))
        new = np.flatnonzero(near[:, chosen[-1]] & left)
        left[new] = False
        count -= near[new].sum(0)
    return np.array(chosen)


def within(keys, radius: float) -> np.ndarray:
    """(n, n) booleans: is |keys[i] - keys[j]| <= radius |keys[j]|? Every key is near itself."""
    keys = keys.astype(np.float64)
    squares = (keys * keys).sum(1)
    found = np.empty((len(keys), len(keys)), bool)
    for a in range(0, len(keys), BLOCK):
        rows = slice(a, a + BLOCK)
        away = squares[rows, None] + squares - 2 * keys[rows] @ keys.T
        found[rows] = away <= (radius * radius + 1e-12) * squares  # 1e-12: rounding
    np.fill_diagonal(found, True)
    return found
