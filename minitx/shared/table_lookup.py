"""What the lookup-table techniques share: which matrices they replace, and sums of table entries.

Sums are taken in the same order for any number of tokens, so a token gives exactly the same
outputs alone and in a batch; and for a few tokens at a time, so that the gathered entries fit in
the CPU's cache.
"""

from collections.abc import Callable

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import Head, Linear, Stack, TiedHead
from minitx.shared.linears import linears
from minitx.technique import need
from minitx.tree import Part, part, rebuild

READS = 1 << 16  # table entries gathered at a time: few enough for the CPU's cache

# Which matrices ----------------------------------------------------------------------------------


def last_blocks(name: str, count: int, layers: int | None) -> int:
    """How many of ``count`` blocks a technique changes: the option ``layers``, or all for None."""
    if layers is not None and layers > count:
        raise MinitxError(
            f"{name}: layers must be at most {count}, the blocks of this model; got {layers}."
        )
    return count if layers is None else layers


def constant_matrices(name: str, lm, layers: int | None, head: bool) -> list[Part]:
    """Every ``Linear`` of the last ``layers`` blocks (None: of all), and the head if ``head``. The
    other products of a block, q k^T and p v, have no constant side."""
    stack = lm.model.stack
    need(stack, Stack)
    blocks = stack.blocks[len(stack.blocks) - last_blocks(name, len(stack.blocks), layers) :]
    found: dict[int, Part] = {}
    for block in blocks:
        found |= linears(block, "all")
    if head:
        need(lm.model.head, Head, TiedHead)
        found[id(lm.model.head)] = lm.model.head
    return list(found.values())


def weight_and_bias(node: Part) -> tuple:
    """w (in, out) and b (out,) or None of a ``Linear`` or a head."""
    return (node.w.T, None) if type(node) is TiedHead else (node.w, node.b)


def replace_matrices(lm, nodes: list[Part], make: Callable[[Part], Part]):
    """A copy of the model with ``make(node)`` instead of each of these matrices."""
    made = {}
    for node in nodes:
        new = make(node)
        made[id(node)] = new if type(node) is Linear else TableHead(new)
    return rebuild(lm, lambda node: made.get(id(node)))


@part
class TableHead(Part):
    """An output head whose logits come from tables."""

    logits: Part

    def __call__(self, x):
        return self.logits(x)  # (..., V)

    def argmax(self, x) -> int:
        """The id of the largest logit of one row x (D,)."""
        return ops.argmax_token(self(x))


# Sums of table entries ---------------------------------------------------------------------------


def sum_entries(table, base, codes, dtype):
    """``y[i, o] = sum over g of table[base[i, g] + codes[g, o]]``, added up in ``dtype``.

    table: one-dimensional. base (n, groups) and codes (groups, out): integers.
    """
    groups, out = codes.shape
    columns = max(1, min(out, READS // groups))
    rows = max(1, READS // (groups * columns))
    y = np.empty((len(base), out), dtype)
    for a in range(0, out, columns):
        for i in range(0, len(base), rows):
            index = base[i : i + rows, :, None] + codes[:, a : a + columns]  # (rows, groups, cols)
            table.take(index).sum(1, dtype=dtype, out=y[i : i + rows, a : a + columns])
    return y  # (n, out)


def as_rows(x, width: int):
    """x (..., in) as contiguous rows (n, width), padded with zeros."""
    rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    if rows.shape[1] == width:
        return rows
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def count_reads(multiplications: int, reads: int, weight_bytes: int) -> None:
    """Count in the ledger. Every read is one addition too; the multiplications that remain count
    as multiply-adds."""
    ledger.count(multiplications, weight_bytes, additions=reads)
    ledger.event("table reads", reads)
