"""Table lookup instead of products with constant matrices: the choice among four kinds of it.

The arithmetic of each kind stands in matrices/: product_table.py (product, folded),
centroid_table.py (centroid), bit_serial.py (bit-serial).
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import Head, Linear, Stack, TiedHead
from minitx.precompute.lut.bit_search import Search, two_stages
from minitx.precompute.lut.bit_serial import BitSerialLinear
from minitx.precompute.lut.centroid_table import CentroidLinear, Codebook
from minitx.precompute.lut.product_table import (
    FoldedLinear,
    IntegerLinear,
    ProductTable,
    TableLinear,
    folded_bytes,
    table_bytes,
)
from minitx.shared.linears import linears
from minitx.technique import need, technique
from minitx.tree import Part, part, rebuild


@technique(level="matrices", exact=False, neutral={"layers": 0}, after=("low_rank",))
def lut(
    lm,
    *,
    kind: Literal["product", "folded", "centroid", "bit-serial"] = "product",
    ba: int = 4,
    bw: int = 4,
    d: int = 2,
    layout: Literal["vertical", "horizontal"] = "vertical",
    search: bool = False,
    drop: float = 0.01,
    cache: int = 65536,
    Kc: int = 16,
    V: int = 4,
    g: int = 4,
    half: bool = True,
    layers: int | None = None,
    head: bool = False,
    limit: float = 256.0,
    stories: int = 16,
    seed: int = 0,
):
    """Read sums out of tables instead of multiplying with the weights.

    Paper: Lin, Chen, Chang, Kuo and Li, 2024, "LUTIN", ISLPED 2024, doi 10.1145/3665314.3670804.
        Its text was not at hand. Its abstract and a reader's note give the options ba, bw and d
        (bits of inputs and weights, length of the vectors), the two layouts by name, and a search
        in two stages; that its table is the one of kind = product is our reading of that. The other
        kinds are not LUTIN: centroid is of the family of MADDNESS (arXiv 2106.10860), PECAN
        (2208.13571) and LUT-NN (2302.03213), bit-serial of that of LUT-GEMM (2206.09557) and T-MAC.
    Kind: approximate: product and folded round the inputs to ba bits, product and bit-serial round
        the weights to bw bits, centroid replaces inputs by prototypes. What they then compute is
        exact: product gives the integer product bit for bit, bit-serial too where x is whole
        numbers, and the others what they stand for, but for the order of sums.
    Skips or precomputes: every product with a matrix of the blocks (with head = true the output
        head's too). Not q k^T and p v, where both sides change.
    Offline: product: T[ca, cw] = the dot product of d inputs with code ca and d weights with code
        cw; one table for all layers, 2^(d (ba + bw)) entries of the smallest type that holds those
        that are read. Weights become codes, with a scale for each output.
        folded: T[s, ca, n] = the dot product of code ca with the weights of group s and output n;
        no rounding of weights, but larger than they are: refused beyond limit MiB in all.
        centroid: inputs are cut into C = D / V parts; Kc prototypes for each by k-means over
        calibration stories, and their products with the weights. A codebook for each input: q, k
        and v share theirs. bit-serial: for each of the bw bits, the bits of g weights as an index.
    Online: product and folded: xs = max |x| / (2^(ba-1) - 1) for each token by itself, xi =
        rint(x / xs) (halves to even), d of them packed into a code; the codes' entries are added
        up and multiplied by the scales. centroid: the nearest prototype of each part, then its
        rows are added up. bit-serial: all sums +-x_1 ... +-x_g of each group are made once a token
        (half: half of them, the others being their negatives); each bit of the weights reads one
        a group and output. layout says how the entries of product lie in memory (vertical: an
        input code's products together); that vertical and horizontal mean this is our reading.
        search (product only): ba and bw are lowered from 8, ba first, while the share of right
        next tokens in calibration stories falls by no more than drop, then d is the largest whose
        table takes no more than cache bytes; the tree shows what was found. When to stop is not
        known of the paper and was chosen here. python -m minitx.lab.lut_search prints all that is
        tried.
        Left out: fine-tuned prototypes, trees in the place of distances and tables in 8 bits of
        LUT-NN and MADDNESS, tables in 8 bits of T-MAC.
    Saves: of D N multiply-adds, product leaves D + 2 N multiplications (folded D + N) and D N / d
        reads, each with an addition; centroid D Kc multiplications and D N / V reads; bit-serial
        2 N and bw D N / g, which is no fewer than the dense ones at bw = g = 4: there, a read is
        cheaper than a product only on processors that shuffle bytes. NumPy gathers numbers many
        times slower than BLAS multiplies them, so every kind loses time here: read the counts, not
        the clock. Memory: product and bit-serial take less than the weights; centroid Kc / V times
        as much, and folded 2^(ba d) / d times.
    Neutral: layers = 0: so many blocks, counted from the last, have tables (None: all).
    Not for: models without a tokenizer where kind = centroid or search = true, which learn from
        stories. A codebook is of these stories: on other text it may be worse.
    """
    check(ba=(ba, 2, 8), bw=(bw, 1 if kind == "bit-serial" else 2, 8), d=(d, 1, 16))
    check(Kc=(Kc, 1, 65536), V=(V, 1, 4096), g=(g, 1, 8), stories=(stories, 1, 1000))
    check(layers=(layers or 0, 0, lm.model.config.layers))
    check(seed=(seed, 0, 2**32), drop=(drop, 0, 1))
    nodes = chosen(lm, layers, head)
    if search:
        if kind != "product":
            raise MinitxError(f"lut: search is for kind=product, not for kind={kind}.")
        found = find_bits(lm, nodes, drop, cache, stories)
        ba, bw, d = found.ba, found.bw, found.d
    if kind == "centroid":
        return with_tables(lm, nodes, centroids(lm, nodes, Kc, V, stories, seed))
    if kind == "bit-serial":
        return with_tables(lm, nodes, lambda node: BitSerialLinear.of(*matrix(node), bw, g, half))
    if kind == "folded":
        need_room(sum(folded_size(node, ba, d) for node in nodes), limit)
        return with_tables(lm, nodes, lambda node: FoldedLinear.of(*matrix(node), ba, d))
    need_room(table_bytes(ba, bw, d), limit)
    shared = ProductTable.of(ba, bw, d, layout)
    return with_tables(lm, nodes, lambda node: TableLinear.of(shared, *matrix(node)))


def check(**values: tuple) -> None:
    """Refuse options, given as name = (value, least, most), that are out of range."""
    for name, (value, least, most) in values.items():
        if not least <= value <= most:
            raise MinitxError(f"lut: {name} is {value}; it must be from {least} to {most}.")


# Which matrices ----------------------------------------------------------------------------------


def chosen(lm, layers: int | None, head: bool) -> list[Part]:
    """The matrices of the last ``layers`` blocks (None: of all), and of the head if wanted."""
    stack = lm.model.stack
    need(stack, Stack)
    blocks = stack.blocks if layers is None else stack.blocks[len(stack.blocks) - layers :]
    found: dict[int, Part] = {}
    for block in blocks:
        found |= linears(block, "all")
    if head:
        need(lm.model.head, Head, TiedHead)
        found[id(lm.model.head)] = lm.model.head
    return list(found.values())


def matrix(node: Part) -> tuple:
    """w (D, N) and bias (N,) or None of a ``Linear`` or a head."""
    return (node.w.T, None) if type(node) is TiedHead else (node.w, node.b)


def with_tables(lm, nodes: list[Part], make: Callable[[Part], Part]):
    """``make(node)`` in the place of each of these matrices."""
    made = {}
    for node in nodes:
        new = make(node)
        made[id(node)] = new if type(node) is Linear else TableHead(new)
    return rebuild(lm, lambda node: made.get(id(node)))


@part
class TableHead(Part):
    """A head whose logits come from tables."""

    logits: Part

    def __call__(self, x):
        return self.logits(x)  # (..., V)

    def argmax(self, x) -> int:
        """The id of the largest logit of one row x (D,)."""
        return ops.argmax_token(self(x))


# Sizes -------------------------------------------------------------------------------------------


def folded_size(node: Part, ba: int, d: int) -> int:
    w, _ = matrix(node)
    return folded_bytes(*w.shape, ba, d, w.itemsize)


def need_room(size: int, limit: float) -> None:
    """Refuse tables of more than ``limit`` MiB."""
    if size > limit * 2**20:
        raise MinitxError(
            f"lut: the tables would take {size / 2**20:,.1f} MiB and limit is {limit:g}; choose "
            "fewer bits or shorter vectors (smaller d), or a higher limit."
        )


# What is learned from stories --------------------------------------------------------------------


def find_bits(lm, nodes: list[Part], drop: float, cache: int, stories: int) -> Search:
    """Both stages of the search, by the share of next tokens that are right."""
    from minitx.training.calibration import texts_for

    texts = texts_for("lut", lm, stories)

    def accuracy(ba: int, bw: int) -> float:
        # The numbers of the tables, for every d, much sooner.
        def make(node: Part) -> Part:
            return IntegerLinear.of(*matrix(node), ba, bw)

        return right_tokens(with_tables(lm, nodes, make), texts)

    return two_stages(accuracy, right_tokens(lm, texts) - drop, cache)


def right_tokens(lm, texts: list[list[int]]) -> float:
    """The share of tokens that are the likeliest after those before them."""
    right = [lm.logits(ids[:-1]).argmax(-1) == ids[1:] for ids in texts]
    return float(np.concatenate(right).mean())


def centroids(lm, nodes: list[Part], Kc: int, V: int, stories: int, seed: int) -> Callable:
    """A function from a matrix to its part, after seeing what all of them read."""
    from minitx.training.calibration import Rows, texts_for, watch_inputs

    texts = texts_for("lut", lm, stories)
    read: dict[int, Rows] = {}
    for kind in {type(node) for node in nodes}:
        read |= watch_inputs(lm, kind, texts, Rows)
    books: dict[bytes, Codebook] = {}  # by the rows they are learned from, which q, k, v share

    def make(node: Part) -> Part:
        rows = read[id(node)].all  # (n, D)
        key = rows.tobytes()
        if key not in books:
            books[key] = Codebook.of(rows, Kc, V, seed)
        return CentroidLinear.of(books[key], *matrix(node))

    return make
