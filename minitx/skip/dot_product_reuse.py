"""Dot-product reuse: tokens whose vectors have the same hash share one product with the matrix.

This file: the card and options, the product and the two hashes (online), its memory, notes.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import Linear, ParallelBlock, SkiplessParallelBlock
from minitx.shared.products_with_layer import WHERE, StatefulProduct, replace_products
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, between, blocks_of, technique
from minitx.tree import Part, float_type, part, table


@technique(
    level="ffn",
    exact=False,
    neutral={"size": 0},
    after=("delta", "function_tables"),
    demo={"form": "lsh", "bits": 2, "slices": 2, "first": 0},
    event=("products reused", "products"),
    presets={"deep-reuse": {"form": "lsh"}, "aggressive": {"form": "lsh", "bits": 8}},
)
def dot_product_reuse(
    lm,
    *,
    form: Annotated[
        Literal["exact", "lsh"],
        "which vectors share a product: equal ones, or those with the same sign bits (LSH)",
    ] = "exact",
    where: Annotated[
        Literal["all", "attention", "ffn", "down", "qkv"] | None,
        "which products: of attention (q, k, v, out), of the FFN, only its last one (down), or "
        "only q, k, v; default: qkv for form=exact in serial blocks, else all",
    ] = None,
    first: Annotated[
        int | None,
        "the first layer that reuses products; default: 0 for form=exact, L // 2 for form=lsh",
        at_least(0),
    ] = None,
    layers: Annotated[
        int | None,
        "how many layers from first on; default: 1 for form=exact, else all",
        at_least(0),
    ] = None,
    slices: Annotated[
        int, "slices of a vector, each of which has its own hash and table", at_least(1)
    ] = 1,
    bits: Annotated[int, "of form=lsh: sign bits in a hash", between(1, 64)] = 12,
    size: Annotated[
        int,
        "products that the table of a matrix and slice holds; 0: nothing is reused",
        at_least(0),
    ] = 512,
    choose: Annotated[
        Literal["hash", "random"],
        "reuse the product of the same hash, or, as a baseline, that of a random earlier token",
    ] = "hash",
    seed: Annotated[int, "of the sign bits and of choose=random", SEEDS] = 0,
):
    """Share one matrix product between tokens whose vectors have the same hash (Deep Reuse).

    Paper:     Ning and Shen, "Deep Reuse: Streamline CNN Inference On the Fly via Coarse-Grained
               Computation Reuse", ICS 2019 (form=lsh). The exact form is plain memoization.
    Fidelity:  a reconstruction from the abstract and from notes. Changed, to be causal: the paper
               multiplies the centroid of all vectors of a bucket, which in a text would include
               later tokens. Here the first token of a bucket gives the product for later ones.
    Kind:      approximate with form=lsh; form=exact, the default, is exact up to rounding.
    Idea:      Similar vectors have similar products with a matrix W. A hash that is often equal
               for similar vectors finds an earlier one, whose product is known. In layer 0 of a
               RoPE model, x depends on the token alone, so a repeated token has an equal vector.
    Offline:   form=lsh: R (s, bits), random, for each matrix and each slice of s inputs.
    Online:    x W = sum over slices i of x_i W_i, with s inputs and s rows of W in each; for each
               token in order and each slice, with one table per sequence, matrix and slice:
               code = the bits of x_i (form=exact), or the signs of x_i R_i (form=lsh)
               code in the table:  reuse the product that is stored there
               otherwise:          x_i W_i; stored if the table holds fewer than ``size``
               Nothing is evicted: later tokens, of this step or another, find what was stored.
    Saves:     s * out multiply-adds per product reused (W: in, out), less s (form=exact) or
               s * bits for each hash and, with several slices, out to add. Each stored product
               takes out numbers of memory, which a hit reads.
    In NumPy:  slower: decoding 0.9x as fast as dense with form=exact and 0.8x with form=lsh;
               prompts 0.75x and 0.3x, since they run token by token.
    Not for:   form=exact beyond layer 0, with learned positions (no two vectors are equal), or on
               texts that seldom repeat a token. form=lsh in the first layers (Notes).
    Proof:     tests/skip/test_dot_product_reuse.py; literal version:
               tests/skip/literal_dot_product_reuse.py
    Tutorial:  tutorials/16_nothing_new_under_the_sun.py
    """
    blocks, lsh = blocks_of(lm), form == "lsh"
    first = len(blocks) // 2 * lsh if first is None else first
    layers = (len(blocks) if lsh else 1) if layers is None else layers
    check_first(first, len(blocks))
    region = range(first, min(first + layers, len(blocks)))
    if size == 0 or not region:
        return lm
    parallel = type(blocks[0]) in (ParallelBlock, SkiplessParallelBlock)
    where = where or ("all" if lsh or parallel else "qkv")
    dtype = float_type(lm.model)

    def make(linear: Linear, name: str, index: int) -> Part:
        n = len(linear.w)
        check_slices(slices, n, name)
        seeds = (seed, index, WHERE["all"].index(name))
        hashed = ExactHash()
        if lsh:
            planes = np.random.default_rng(seeds).standard_normal((slices, n // slices, bits))
            hashed = SignHash(planes.astype(dtype))
        random = seeds if choose == "random" else None
        return ReusedLinear(linear.w, linear.b, hashed, slices, size, random)

    return replace_products(lm, where, make, region)


# Online ------------------------------------------------------------------------------------------


@part
class ReusedLinear(StatefulProduct):
    """x W + b, with the product of an earlier vector of the same hash where there is one."""

    matrix_layout = "column-major"
    w: np.ndarray  # (in, out)
    b: np.ndarray | None
    hash: Part
    slices: int
    size: int
    random: tuple | None = None  # seeds of the baseline

    @property
    def has_history(self) -> bool:
        """False: the result does not depend on what is remembered (tree.Part)."""
        return type(self.hash) is not ExactHash or self.random is not None

    def one(self, x, layer: Layer):
        """x (T, in) -> (T, out), for the tokens of one sequence in order."""
        known = layer.memory.recall(self, lambda: Products(self.slices))
        y = np.empty((len(x), self.w.shape[1]), x.dtype)
        for t, position in enumerate(layer.tokens.array.tolist()):
            if known.seen and position <= known.seen[-1]:  # later tokens have been here already
                y[t] = ops.linear(x[t], self.w)  # so this one is not part of their sequence
                continue
            known.seen.append(position)
            y[t] = self.slice_product(x[t], 0, known.tables[0], position)
            for i in range(1, self.slices):
                y[t] += self.slice_product(x[t], i, known.tables[i], position)
        return y if self.b is None else y + self.b

    def slice_product(self, x, i: int, stored: "Table", position: int):
        """Slice i of x (in,) times its rows of W -> (out,), from the table or computed."""
        s = len(x) // self.slices
        rows = slice(i * s, (i + 1) * s)
        code = self.hash(x[rows], i)
        ledger.event("products")
        if code not in stored.rows:
            product = ops.linear(x[rows], self.w[rows])
            if len(stored.rows) < self.size:
                stored.add(code, position, product)
            return product
        ledger.event("products reused")
        row = stored.rows[code]
        if self.random is not None:  # the baseline
            row = np.random.default_rng((*self.random, i, position)).integers(len(stored.rows))
        product = stored.products[row]
        additions = product.size if self.slices > 1 else 0  # to the sum over the slices
        ledger.count(additions, cache_bytes=product.nbytes)
        return product


@part
class ExactHash(Part):
    """All bits of a vector: only equal vectors have the same."""

    def __call__(self, x, i: int) -> bytes:
        ledger.count(x.size)
        return x.tobytes()


@part
class SignHash(Part):
    """Which side of some random planes a vector is on: vectors at a small angle often share it."""

    planes: np.ndarray = table()  # (slices, s, bits)

    def __call__(self, x, i: int) -> bytes:
        return np.packbits(ops.linear(x, self.planes[i]) > 0).tobytes()


# Memory ------------------------------------------------------------------------------------------


class Products:
    """What one sequence has computed with one matrix."""

    def __init__(self, slices: int):
        self.seen: list[int] = []  # the positions of its tokens
        self.tables = [Table() for _ in range(slices)]

    def rewind(self, position: int) -> None:
        while self.seen and self.seen[-1] >= position:
            self.seen.pop()
        for one in self.tables:
            one.rewind(position)


class Table:
    """The products of one slice. The first vector of each hash is stored, and nothing is evicted,
    so that rewinding gives back exactly what was there."""

    def __init__(self):
        self.rows: dict[bytes, int] = {}  # hash -> index of the product
        self.positions: list[int] = []  # of the token that computed it
        self.products: list[np.ndarray] = []  # (out,)

    def add(self, code: bytes, position: int, product) -> None:
        self.rows[code] = len(self.products)
        self.positions.append(position)
        self.products.append(product)

    def rewind(self, position: int) -> None:
        while self.positions and self.positions[-1] >= position:
            self.rows.popitem()  # the last one added
            self.positions.pop()
            self.products.pop()


# Checks ------------------------------------------------------------------------------------------


def check_first(first: int, L: int) -> None:
    if first > L:
        raise MinitxError(
            f"dot_product_reuse: first must be at most {L}, the number of layers; got {first}."
        )


def check_slices(slices: int, n: int, name: str) -> None:
    if n % slices:
        raise MinitxError(
            f"dot_product_reuse: slices is {slices}; expected a divisor of {n}, the number of "
            f"inputs of the product {name!r}."
        )


# Notes:
#
# - Where a vector is bit for bit that of an earlier token (python -m minitx.lab.layer_events
#   dot_product_reuse layers=4 --stories 6, and --parts): for q, k, v of layer 0, 61 % of the
#   products of six stories are reused, and in stories-parallel (-m stories-parallel) those of the
#   FFN, too; none anywhere else. A norm rounds a single row and several rows differently, so a
#   token of the prompt that comes again while decoding may miss, and is stored once more.
# - minitx sweep dot-product-reuse form=exact --stories 30 -m stories-parallel: 0.898x of the
#   multiply-adds, loss +0.0000. On stories, whose blocks are serial, 0.99x. first_layer, a table
#   of all tokens of the vocabulary, saves more; this needs no table beforehand, and in
#   stories-parallel 1,152 numbers for each different token of the text.
# - form=lsh on stories (minitx sweep dot-product-reuse form=lsh bits=8,12,16 --stories 30; then
#   bits=12 choose=random). Loss: above dense, in nats per token. Hops: % of answers that are right,
#   by the facts that they combine.
#
#       bits    choose    multiply-adds    loss       1 / 2 / 3 hops
#       dense                1.000x        0.0000     100 / 96 / 100
#       8       hash         0.792x       +0.0257      96 / 71 /  74
#       12      hash         0.868x       +0.0126      99 / 96 / 100
#       16      hash         0.906x       +0.0025     100 / 93 / 100
#       12      random       0.879x       +0.0354     100 / 86 / 100
#
# - Why not in the first layers: there a vector says which token it is, and to share a product is to
#   mistake one token for another. form=lsh first=0 bits=24: 0.881x, +0.54 nats (16 stories).
#   Deep layers change the residual stream little, so that even random products cost only +0.035.
# - Slices (minitx sweep dot-product-reuse form=lsh bits=12 slices=1,4,8 --stories 16): 0.868x at
#   +0.0156, 0.870x at +0.0070 and 0.875x at +0.0098: about as many products are shared, but seldom
#   all of a token with the same one. Time grows with their number.
# - The paper's centroids (``centroid_products`` in the literal version) are not offered: an early
#   token's product would contain later tokens, and depend on how a text is divided into steps.
# - The first of a bucket stays its product for the whole sequence. A token that reaches a layer
#   after later ones have (techniques that skip and revive tokens) is computed and not stored.
