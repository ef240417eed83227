"""Activation functions from a table of their values at all 65,536 float16 inputs.

The card and the options, the parts that run (online) and the table (offline), notes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import Activated, SwiGLU
from minitx.shared.table_lookup import last_blocks
from minitx.technique import NoSuchPart, at_least, blocks_of, swap, technique, wrap
from minitx.tree import Part, float_type, part, table, walk


@technique(level="ffn", exact=False, neutral={"layers": 0}, event="function table reads")
def function_tables(
    lm,
    *,
    layers: Annotated[
        int | None, "blocks changed, the last ones; default: all", at_least(0)
    ] = None,
):
    """Look up SiLU, GELU or ReLU in a table over all float16 inputs instead of computing it.

    Paper:     none in particular: tables of activation functions are as old as fixed-point
               networks.
    Fidelity:  our own choice of format: float16 in, the model's own type out.
    Kind:      approximate: the input is rounded to float16 (11 significant bits). At every input
               that is a float16 the result is the function's own, bit for bit.
               It saves nothing that is counted, and costs no accuracy on the shipped models.
    Idea:      A 16-bit input has 65,536 values: compute the function at each of them once. The bits
               of the input, read as an integer, are the index.
    Offline:   table[i] = f(the float16 with the bits i)      one table for all layers
    Online:    f(x)   = table[bits of float16(x)]      where |x| > 65,504: f(x) itself, computed
               SwiGLU = table[bits of float16(x W_gate)] * (x W_up)
    Saves:     exp and division (SiLU), erf or tanh (GELU) of each hidden neuron; the ledger counts
               no multiply-adds for them. It costs 256 KiB (float32), and 4 bytes read per neuron.
    In NumPy:  a read costs about as much as SiLU and much more than ReLU, so only GELU by erf,
               which takes many steps here, gains time.
    Not for:   the exp of softmax. FFNs with gate and up in one product (fuse_projections).
    Proof:     tests/precompute/test_function_tables.py; literal version:
               tests/precompute/literal_function_tables.py
    Tutorial:  tutorials/10_tables_instead_of_products.py
    """
    blocks = len(blocks_of(lm))
    first = blocks - last_blocks("function_tables", blocks, layers)
    tables: dict[Callable, FunctionTable] = {}

    def table_of(f) -> FunctionTable:
        if f not in tables:
            tables[f] = FunctionTable.make(f, float_type(lm))
        return tables[f]

    def swiglu(node: SwiGLU) -> Part:
        return TableSwiGLU(node.gate, node.up, table_of(ops.silu))

    def activated(node: Activated) -> Part:
        if isinstance(node.activation, Part):
            raise MinitxError(
                "function_tables cannot replace this activation, which another technique has "
                "replaced; use one of the two."
            )
        return replace(node, activation=table_of(node.activation))

    def change(ffn: Part, index: int) -> Part:
        if index < first:
            return ffn
        ffn = swap(ffn, SwiGLU, swiglu, optional=True)
        return swap(ffn, Activated, activated, optional=True)

    changed = wrap(lm, "ffn", change)  # change(ffn, block number) for the FFN of each block
    if not any(type(node) in (SwiGLU, TableSwiGLU, Activated) for _, node in walk(changed)):
        raise NoSuchPart(SwiGLU, Activated)
    return changed


@part
class FunctionTable(Part):
    """f(x) for x rounded to float16."""

    values: np.ndarray = table()  # (65536,) f at the float16 with the bits i, in the model's type
    f: Callable

    @classmethod
    def make(cls, f: Callable, dtype) -> "FunctionTable":
        inputs = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(dtype)
        values, numbers = inputs.copy(), ~np.isnan(inputs)  # a NaN input is its own value
        with np.errstate(all="ignore"):  # exp of large numbers, Inf / Inf
            values[numbers] = f(inputs[numbers])
        return cls(values, f)

    def __call__(self, x):
        ledger.count(weight_bytes=x.size * self.values.itemsize)
        ledger.event("function table reads", x.size)
        with np.errstate(over="ignore"):  # an input beyond float16 becomes Inf
            half = x.astype(np.float16)
        y = self.values[half.view(np.uint16)].astype(x.dtype, copy=False)
        beyond = np.isinf(half)
        if beyond.any():  # rare: the function itself, which may be finite where a table has NaN
            with np.errstate(over="ignore", invalid="ignore"):  # of Inf itself, Inf / Inf
                y[beyond] = self.f(x[beyond])
        return y


@part
class TableSwiGLU(Part):
    """Hidden neurons silu(gate) * up with silu from a table."""

    gate: Part
    up: Part
    silu: FunctionTable

    def __call__(self, x):
        return self.silu(self.gate(x)) * self.up(x)  # (..., F)


# Notes:
#
# - Rounding to the nearest float16: an input up to 3e-8 counts as 0. One from 65,520 on would be
#   Inf, where silu gives Inf and, at the other end, -Inf / Inf = NaN. So the function itself is
#   computed there. No trained model that we know has such activations.
# - The exp of softmax is not looked up: attention computes it in place, block by block.
