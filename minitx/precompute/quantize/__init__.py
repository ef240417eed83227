"""Weights in 8 or 4 bits, and four ways to multiply by them in NumPy."""

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import numpy as np

from minitx import fast, ledger, ops
from minitx.errors import MinitxError
from minitx.model import Head, Linear, TiedHead, TokenEmbedding
from minitx.precompute.quantize.groups import Codes, in_groups
from minitx.precompute.quantize.scaling import search
from minitx.shared.symmetric import quantize_symmetric
from minitx.technique import swap, technique
from minitx.tree import Part, part

BLOCK = 1 << 17  # weights turned into floats at a time: 512 KB of float32, which a cache holds


@technique(level="matrices", exact=False, neutral={"bits": 32}, after=("low_rank", "lut"))
def quantize(
    lm,
    *,
    bits: Literal[8, 4, 32] = 8,
    group: int | None = 64,
    symmetric: bool = True,
    which: Literal["blocks", "all"] = "blocks",
    run: Literal["stream", "cast", "load", "integers"] = "stream",
    half_scales: bool = False,
    scaling: bool = False,
    stories: int = 16,
):
    """Keep weights as whole numbers of 8 or 4 bits, with a scale for every few of them.

    Paper: no single one for rounding to the nearest. Groups and run=integers: llama2.c (Karpathy,
        2023, export.py and runq.c, "Q8_0"). scaling: Lin et al., 2023, "AWQ: Activation-aware
        Weight Quantization", arXiv 2306.00978, as its code has it.
    Kind: approximate: each weight is off by up to half a scale.
    Skips or precomputes: 3 of 4 bytes of every matrix (7 of 8), in the file and in memory. No work.
    Offline: each output's inputs in groups of G <= group (None: all in one; see matrices/groups.py
        for rows that are no multiple). symmetric: s = max|w| / q with q = 127 or 7,
        code = rint(w / s). Else s = (high - low) / (2^bits - 1) over a range that holds 0, zero
        z = rint(-low / s), code = rint(w / s) + z, w = s (code - z). Four bits are packed two to a
        byte. Scales are float32, half_scales: float16, after which the codes are chosen.
        which=blocks: all matrices of the blocks. which=all: embedding and head too; a tied head
        is the embedding, so both change. Norms, biases and learned positions stay as they are.
        scaling: for ratios r = 0, 0.05 .. 0.95, c = mean|x|^r (at least 1e-4, divided by
        sqrt(max c min c)); the r is kept whose c gives the matrix the least squared output error on
        so many calibration stories: r = 0 among them, so never worse than without. Chosen here:
        each matrix of a block has its own c, judged where it ends (x^T x tells that without
        running the texts again), where AWQ's code judges the end of a block; and c is kept and x
        divided by it, not folded into the norm before.
    Online: run=stream, for memory: some groups at a time (one at least) become floats in a buffer
        that the cache holds, are multiplied, and are forgotten. Fewer rows than G:
        y = sum_g s_g (x_g code_g), so results are scaled and not weights; more: y = x (s code).
        With zeros, less sum(x_g) s_g z_g.
        run=cast: the same with a whole matrix at a time.
        run=load, for speed: floats are made once, at the first use, and then kept beside the codes;
        from then on it is the dense product.
        run=integers (W8A8): x_g is rounded to 8 bits too, s_x = max|x_g| / 127;
        y = sum_g s_g s_x (code_x code_g - z sum(code_x)), the brackets being exact, since whole
        numbers below 2^24 are exact in float32: so BLAS does it.
    Saves: with float32 scales bits / 8 + 4 / G bytes a weight in the place of 4 (float16: 2 / G;
        not symmetric: 1 / G more), a row of groups rounded up; that much is read for each product
        (run=load: all 4, and in memory both). No multiply-add: making floats of codes is no
        product and is not counted. In NumPy none of this is faster than float32: it has no fast
        product of small integers, so all are turned into floats first. load takes the dense
        model's time. stream and cast take little more than that for many rows, and several times
        that where a large matrix meets few, most of it for turning codes into floats; stream is
        the faster for matrices that no cache holds, and the same for smaller. Four bits take
        longer than eight, and integers longer than stream. So: load for speed, stream for memory,
        and a small file with both.
    Neutral: bits = 32: everything stays as it is.
    Not for: run=integers with groups so large that sums pass 2^24 (1,040 inputs at 8 bits, 1,032
        if not symmetric). A matrix that another technique keeps in its own way.
    """
    if bits == 32:
        return lm
    check(group, stories)

    def keep(w, c=None) -> Codes:
        return in_groups(w, bits, group, symmetric, half_scales, c)

    def product(kept: Codes, b) -> Part:
        if run == "load":
            return Loaded(kept, b)
        if run == "integers":
            need_exact_sums(kept)
            return Integers(kept, b)
        return Streamed(kept, b, BLOCK if run == "stream" else kept.inputs * kept.width * 2)

    read = {}
    if scaling:
        from minitx.training.calibration import matrix_inputs

        read = matrix_inputs("quantize", lm, stories)

    def replaced(linear: Linear) -> Part:
        w = linear.w
        if scaling:
            return product(search(w, read[id(linear)], lambda c: keep(w, c)), linear.b)
        return product(keep(w), linear.b)

    lm = swap(lm, Linear, replaced)
    return with_vocabulary(lm, keep, product) if which == "all" else lm


def check(group: int | None, stories: int) -> None:
    if group is not None and group < 2:
        raise MinitxError(
            f"quantize: group is {group}; it must be at least 2, or None for one scale an output."
        )
    if stories < 1:
        raise MinitxError(f"quantize: stories is {stories}; it must be at least 1.")


def need_exact_sums(kept: Codes) -> None:
    """Refuse groups whose whole-number sums could pass 2^24, from where float32 rounds them."""
    largest = 2 ** (kept.bits - 1) - (kept.zeros is None)
    if kept.group * largest * 127 >= 1 << 24:
        raise MinitxError(
            f"quantize: run=integers adds up to {kept.group} products of 8-bit numbers, which is "
            f"exact up to {(1 << 24) // (largest * 127)}; set group to less."
        )


def with_vocabulary(lm, keep: Callable, product: Callable):
    """Embedding and head, each table (D, V) by groups along D; once, where both have the same."""
    made: dict[int, tuple] = {}

    def table(w) -> Codes:
        if id(w) not in made:
            made[id(w)] = w, keep(w.T)
        return made[id(w)][1]

    lm = swap(lm, TokenEmbedding, lambda embed: CodedEmbedding(table(embed.w)), optional=True)
    lm = swap(lm, TiedHead, lambda h: CodedHead(product(table(h.w), None)), optional=True)
    return swap(lm, Head, lambda h: CodedHead(product(keep(h.w), h.b)), optional=True)


# Online ------------------------------------------------------------------------------------------


@part
class Streamed(Part):
    """x @ w + b, where so many weights at a time become floats, or a group if that is more."""

    kept: Codes
    b: np.ndarray | None
    block: int

    def __call__(self, x):
        kept = self.kept
        count(x, kept)
        rows = kept.grouped(x)  # (T, n, G)
        T, n, G = rows.shape
        y = np.zeros((T, kept.width), x.dtype)
        step = max(1, self.block // (G * kept.width), T // G)  # or as much as the results take
        for a in range(0, n, step):
            some = slice(a, a + step)
            w, s = kept.whole_numbers(some, x.dtype), kept.scales[some]  # (m, G, out), (m, out)
            if T < G:  # fewer results to scale than weights
                sums = rows[:, some].swapaxes(0, 1) @ w  # (m, T, out)
                sums *= s[:, None]
                y += sums[0] if len(sums) == 1 else sums.sum(0)
            else:
                w *= s[:, None]
                y += rows[:, some].reshape(T, -1) @ w.reshape(-1, kept.width)
        if kept.zeros is not None:
            y -= rows.sum(-1) @ (kept.zeros * kept.scales.astype(x.dtype))
        return finished(y, x, self.b)

    def outputs(self, x, columns):
        return self(x)[..., columns]


@part
class Loaded(Part):
    """x @ w + b with floats that are made of the codes once."""

    kept: Codes
    b: np.ndarray | None

    @cached_property  # a frozen part computes no more than what follows from its fields
    def w(self) -> np.ndarray:
        w = self.kept.floats()
        return np.asfortranarray(w) if w.size > fast.LARGE else w  # as in memory_layout.py

    def __call__(self, x):
        return ops.linear(x, self.w, self.b)

    def outputs(self, x, columns):
        return ops.linear(x, self.w[:, columns], None if self.b is None else self.b[columns])


@part
class Integers(Part):
    """x @ w + b with x rounded to 8 bits by groups: sums of whole numbers, then scaled."""

    kept: Codes
    b: np.ndarray | None

    def __call__(self, x):
        kept = self.kept
        count(x, kept)
        codes, scales = quantize_symmetric(kept.grouped(x), 8)  # (T, n, G), (T, n)
        T, n, G = codes.shape
        y = np.zeros((T, kept.width), x.dtype)
        step = max(1, BLOCK // (max(T, G) * kept.width))
        for a in range(0, n, step):  # (m, T, out) whole numbers of m groups at a time
            some = slice(a, a + step)
            sums = codes[:, some].swapaxes(0, 1) @ kept.whole_numbers(some, x.dtype)
            if kept.zeros is not None:
                sums -= codes[:, some].sum(-1).T[..., None] * kept.zeros[some, None]
            sums *= kept.scales[some, None]
            sums *= scales[:, some].T[..., None]
            y += sums.sum(0)
        return finished(y, x, self.b)

    def outputs(self, x, columns):
        return self(x)[..., columns]


def count(x, kept: Codes) -> None:
    ledger.count(x.size * kept.width, kept.stored_bytes)


def finished(y, x, b):
    """y (T, out) in the shape of x (..., in), and with the bias."""
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if b is None else y + b


@part
class CodedEmbedding(Part):
    """A row of the table per token, made of its codes."""

    kept: Codes  # (D, V)

    def __call__(self, ids, where):
        kept = self.kept
        ledger.count(weight_bytes=np.size(ids) * kept.stored_bytes // kept.width)
        return kept.columns(ids, np.result_type(kept.scales, np.float32))  # (..., T, D)


@part
class CodedHead(Part):
    """Logits from a table in few bits."""

    product: Part

    def __call__(self, x):
        return self.product(x)  # (..., V)

    def argmax(self, x) -> int:
        """The id of the largest logit of one row x (D,)."""
        return ops.argmax_token(self(x))
