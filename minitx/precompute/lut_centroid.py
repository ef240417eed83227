"""Product quantization (MADDNESS, LUT-NN): inputs become centroids whose products are in tables.

The card and the options, the parts that run (online), centroids by k-means and tables (offline),
notes.
"""

from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Annotated

import numpy as np

from minitx.calibration import calibration_ids
from minitx.shared.block_by_block import block_by_block
from minitx.shared.observed_inputs import watch_inputs
from minitx.shared.table_lookup import (
    READS,
    as_rows,
    constant_matrices,
    count_reads,
    replace_matrices,
    weight_and_bias,
)
from minitx.technique import SEEDS, at_least, between, technique
from minitx.tree import Part, part

ROWS = 1024  # most inputs that centroids are learned from, evenly spread over the texts


@technique(
    level="matrices",
    exact=False,
    neutral={"layers": 0},
    after=("low_rank", "perforate"),
    demo={"centroids": 4, "stories": 2, "layers": None},
    presets={"paper": {"layers": None}},
    event="table reads",
)
def lut_centroid(
    lm,
    *,
    centroids: Annotated[int, "centroids of each input segment", between(1, ROWS)] = 16,
    length: Annotated[int, "numbers in an input segment", between(1, 4096)] = 4,
    layers: Annotated[int | None, "blocks changed, the last ones; None: all", at_least(0)] = 2,
    head: Annotated[bool, "replace the output head too"] = False,
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", between(1, 1000)
    ] = 16,
    seed: Annotated[int, "seed of k-means", SEEDS] = 0,
):
    """Replace input segments by their nearest k-means centroids and look up their products.

    Paper:     Blalock and Guttag, "Multiplying Matrices Without Multiplying" (MADDNESS), ICML 2021,
               arXiv 2106.10860; Tang et al., "LUT-NN", 2023, arXiv 2302.03213; "PECAN", 2022,
               arXiv 2208.13571.
    Fidelity:  a reconstruction from abstracts and summaries: the plain form of product
               quantization, which the papers improve (Notes).
    Kind:      approximate: replaces x by its nearest centroids. The product with those is exact.
               By default in the last 2 blocks only, whose price is small; in all of them a model
               that was not trained for it breaks down (Notes).
    Idea:      Round each segment of an input to one of a few vectors, whose products are known.
    Offline:   cut calibration inputs x into segments x_c of `length` numbers, c = 0, 1, ...
               centroid[c, j] = k-means of x_c, j < centroids
               table[c, j]    = centroid[c, j] @ W[rows of segment c]     W (in, out), a row (out,)
    Online:    code[c] = argmin over j of |x_c - centroid[c, j]|^2
               y       = b + sum over c of table[c, code[c]]              one row per segment
    Saves:     in * out multiply-adds become in * out / length reads and as many additions, and
               in * centroids multiplications. Tables take centroids / length times the weights.
    In NumPy:  0.6x the speed of dense, 0.3x in all blocks: gathering rows is slower than BLAS.
    Not for:   saving memory. All blocks of a model that was not trained for it. q k^T and p v,
               where both sides change; models without a tokenizer, unless calibrate gives ids. On
               text unlike the calibration text, centroids may be worse.
    Proof:     tests/precompute/test_lut_centroid.py; literal version:
               tests/precompute/literal_lut_centroid.py
    Tutorial:  tutorials/10_tables_instead_of_products.py
    """
    nodes = constant_matrices("lut_centroid", lm, layers, head)
    if not nodes:
        return lm
    texts = calibration_ids("lut_centroid", lm, stories)
    step = -(-sum(map(len, texts)) // ROWS)
    learn = Codebooks(centroids, length, seed)

    def change(block, seen):
        own = [node for node in nodes if id(node) in seen]
        learn.forget()  # no other block reads the same inputs
        return replace_matrices(block, own, lambda node: looked_up(node, learn(seen[id(node)])))

    def sample() -> EveryRow:
        return EveryRow(step)

    wanted = {id(node) for node in nodes}
    options = dict(label="lut centroid", wanted=wanted, after_changes=False)
    changed = block_by_block(lm, texts, sample, change, **options)
    if not head:
        return changed
    seen = watch_inputs(lm, type(lm.model.head), texts, sample, "lut centroid: head")
    return replace(changed, model=replace(changed.model, head=change(lm.model.head, seen)))


def looked_up(node: Part, codebook: "Codebook") -> "CentroidLinear":
    return CentroidLinear.of(codebook, *weight_and_bias(node))


# Online ------------------------------------------------------------------------------------------


@part
class CentroidLinear(Part):
    """x @ w + b, each segment of x replaced by its nearest centroid: reads rows of tables."""

    codebook: "Codebook"
    tables: np.ndarray  # (segments, centroids, out)
    b: np.ndarray | None = None

    @classmethod
    def of(cls, codebook: "Codebook", w, b) -> "CentroidLinear":
        """From w (in, out) and a bias (out,) or None."""
        segments, _, length = codebook.centroids.shape
        padded = np.zeros((segments * length, w.shape[1]))
        padded[: len(w)] = w
        # (segments, centroids, length) @ (segments, length, out)
        tables = codebook.centroids.astype(np.float64) @ padded.reshape(segments, length, -1)
        return cls(codebook, tables.astype(w.dtype), b)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        rows = as_rows(x, x.shape[-1])  # (n, in)
        y = sum_rows(self.tables, self.codebook(rows), columns)  # (n, out)
        multiplications = len(rows) * self.codebook.centroids.size
        reads = len(self.tables) * y.size
        read_bytes = self.codebook.centroids.nbytes + reads * self.tables.itemsize
        count_reads(multiplications, reads, read_bytes)
        if self.b is not None:
            y += self.b[columns]
        return y.reshape(*x.shape[:-1], y.shape[1])


@part
class Codebook(Part):
    """The centroids of each segment of a matrix's inputs."""

    centroids: np.ndarray  # (segments, centroids, length)
    half_squares: np.ndarray  # (segments, centroids): |centroid|^2 / 2

    @classmethod
    def of(cls, rows, count: int, length: int, seed: int) -> "Codebook":
        """Learned from rows (n, in). The last segment is padded with zeros."""
        segments = -(-rows.shape[1] // length)
        cut = as_rows(rows, segments * length).reshape(-1, segments, length)
        centroids = kmeans(cut.swapaxes(0, 1), count, seed)
        half_squares = (centroids**2).sum(-1) / 2
        return cls(centroids.astype(rows.dtype), half_squares.astype(rows.dtype))

    def __call__(self, x):
        """x (n, in) -> codes (n, segments): the index of each segment's nearest centroid. Ties go
        to the lower index.

        |x - m|^2 is smallest for the centroid m for which x.m - |m|^2 / 2 is largest. Added up
        number by number instead of by BLAS, so that a token has the same code alone and in a batch.
        """
        segments, _, length = self.centroids.shape
        cut = as_rows(x, segments * length).reshape(-1, segments, length)
        near = np.repeat(-self.half_squares[None], len(cut), 0)  # (n, segments, centroids)
        for j in range(length):
            near += cut[:, :, j, None] * self.centroids[:, :, j]
        return near.argmax(-1)

    def reconstruct(self, x):
        """x (n, in) with each segment replaced by its nearest centroid."""
        segments, _, length = self.centroids.shape
        nearest = self.centroids[np.arange(segments), self(x)]  # (n, segments, length)
        return nearest.reshape(len(x), segments * length)[:, : x.shape[1]]


def sum_rows(tables, codes, columns=slice(None)):
    """``y[i] = sum over c of tables[c, codes[i, c]]``, only these columns (a slice or indices).

    tables (segments, centroids, out); codes (n, segments) -> (n, columns).
    """
    segments, centroids, out = tables.shape
    entries = tables.reshape(segments * centroids, out)[:, columns]
    index = codes + np.arange(segments) * centroids  # (n, segments)
    step = max(1, READS // (segments * out))
    y = np.empty((len(codes), entries.shape[1]), tables.dtype)
    for i in range(0, len(codes), step):
        entries[index[i : i + step]].sum(1, out=y[i : i + step])
    return y


# Offline: centroids ------------------------------------------------------------------------------

ROUNDS = 10  # of k-means; later ones move the centroids little


class EveryRow:
    """Observer: stores every ``step``-th input row."""

    def __init__(self, step: int):
        self.step, self.seen, self.pieces = step, 0, []

    def add(self, rows) -> None:
        self.pieces.append(rows[-self.seen % self.step :: self.step].copy())
        self.seen += len(rows)

    @property
    def all(self) -> np.ndarray:
        return np.concatenate(self.pieces)  # (n, in)


@dataclass
class Codebooks:
    """Learns codebooks. Matrices that read the same inputs (q, k and v; gate and up) share one."""

    centroids: int
    length: int
    seed: int
    learned: dict[bytes, Codebook] = field(default_factory=dict)  # by the inputs

    def __call__(self, inputs: EveryRow) -> Codebook:
        rows = inputs.all
        key = sha256(rows.tobytes()).digest()
        if key not in self.learned:
            self.learned[key] = Codebook.of(rows, self.centroids, self.length, self.seed)
        return self.learned[key]

    def forget(self) -> None:
        self.learned.clear()


def kmeans(points, count: int, seed: int):
    """k-means (Lloyd's method): points (segments, n, length) -> centroids (segments, count,
    length), in float64.

    The first centroids are drawn from the points, each with a probability that grows with its
    squared distance from those drawn before (k-means++), so no two are equal while there are
    different points left. Then, in each round, every centroid moves to the mean of the points
    nearest to it; one without points stays.
    """
    points = np.asarray(points, np.float64)
    centroids = first_centroids(points, count, np.random.default_rng(seed))
    for _ in range(ROUNDS):
        # (segments, count, n): 1 where the point is nearest to the centroid
        assigned = nearest(points, centroids)[:, None, :] == np.arange(count)[:, None]
        assigned = assigned.astype(np.float64)
        size = assigned.sum(-1, keepdims=True)
        means = assigned @ points / np.maximum(size, 1)
        centroids = np.where(size > 0, means, centroids)
    return centroids


def first_centroids(points, count: int, rng):
    """k-means++: ``count`` points of each segment, (segments, n, length) -> (segments, count,
    length)."""
    segments = np.arange(len(points))
    drawn = [points[segments, rng.integers(0, points.shape[1], len(points))]]
    distance = None  # squared, of each point from the nearest one drawn
    while len(drawn) < count:
        from_last = ((points - drawn[-1][:, None]) ** 2).sum(-1)  # (segments, n)
        distance = from_last if distance is None else np.minimum(distance, from_last)
        # draw a point with probability proportional to its distance: invert the cumulative sum
        cumulative = distance.cumsum(-1)
        threshold = rng.random(len(points)) * cumulative[:, -1]
        drawn.append(points[segments, (cumulative > threshold[:, None]).argmax(-1)])
    return np.stack(drawn, 1)


def nearest(points, centroids):
    """The index (segments, n) of the centroid that is nearest to each point."""
    near = points @ centroids.swapaxes(-1, -2) - (centroids**2).sum(-1)[:, None] / 2
    return near.argmax(-1)


# Notes:
#
# - On ``stories`` (minitx sweep lut-centroid preset=default,paper --stories 20; preset=paper with
#   centroids=64, and with centroids=256 length=2), loss above dense in nats per token:
#
#       layers  centroids  length  multiply-adds   memory     loss   argmax agrees  speed
#       2          16         4        0.80x        1.7x    +0.0027      93 %      0.6x
#       all        16         4        0.19x        3.8x    +2.7678      44 %      0.3x
#       all        64         4        0.45x       14.8x    +0.3913      75 %      0.2x
#       all       256         2        1.50x      116.5x    +0.0064      93 %      0.1x
#
# - SmolLM2-135M-Instruct (not shipped), calibrated on 4,096 tokens of text, loses 0.44 nats per
#   token of another text if its last block is changed, 0.58 if its last two are: its inputs are far
#   from few centroids.
# - A segment with NaN gets code 0, so the outputs are finite; lut_product, lut_bit_serial and
#   function_tables give NaN.
# - A segment with no more different values than centroids is reconstructed exactly, up to rounding.
# - Left out: LUT-NN's fine-tuning of the centroids by back-propagation (softmax over distances with
#   a learned temperature) and its int8 tables; MADDNESS's decision tree, which finds a code with 4
#   comparisons instead of 16 distances, and its ridge regression of the table.
# - LUT-NN uses 16 centroids (8 as well), and segments of 9 numbers for 3x3 convolutions, of 4 for
#   1x1 ones, of 16 or 32 for BERT (from its repository).
