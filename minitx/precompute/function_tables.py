"""Activation functions out of a table that has their values for all inputs there are."""

from collections.abc import Callable
from dataclasses import replace

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import Activated, SwiGLU
from minitx.shared.function_table import FunctionTable
from minitx.technique import NoSuchPart, blocks_of, swap, technique, wrap
from minitx.tree import Part, float_type, part, walk


@technique(level="ffn", exact=False, neutral={"layers": 0})
def function_tables(lm, *, layers: int | None = None):
    """Look up SiLU, GELU or ReLU of every hidden neuron instead of computing it.

    Paper: no single one; tables of activation functions are as old as fixed-point networks. It
        stands beside the lookup of products (see lut), and does not need it.
    Kind: approximate: the input is rounded to float16 (11 significant bits). For every input that
        is a float16 the result is the function's own, bit for bit.
    Skips or precomputes: exp and division (SiLU), erf or tanh (GELU) of each hidden neuron. Not the
        exp of the softmax, which ops.attention does where the scores lie.
    Offline: tab = f(all 65,536 numbers of 16 bits), infinities and NaN too, in the model's own
        type: 256 KiB in float32, one table for all layers.
    Online: f(x) = tab[bits of float16(x)]; in a SwiGLU, silu(gate) of the table, times up.
    Saves: no multiply-add; the ledger counts none for an activation. It reads 4 bytes of the table
        a neuron. NumPy computes SiLU at least as fast as it rounds and gathers, and ReLU much
        faster: only GELU by erf, which takes many steps here, gains time.
    Neutral: layers = 0: so many blocks, counted from the last, use the table (None: all).
    Not for: gate and up in one product (fuse_projections), where there is no SwiGLU left.
    """
    L = len(blocks_of(lm))
    layers = L if layers is None else layers
    if not 0 <= layers <= L:
        raise MinitxError(f"function_tables: layers is {layers}; it must be from 0 to {L}.")
    tables: dict[Callable, FunctionTable] = {}

    def table_of(f) -> FunctionTable:
        if f not in tables:
            tables[f] = FunctionTable.make(f, float_type(lm))
        return tables[f]

    def swiglu(node: SwiGLU) -> Part:
        return TableSwiGLU(node.gate, node.up, table_of(ops.silu))

    def activated(node: Activated) -> Part:
        if isinstance(node.activation, Part):
            raise MinitxError("function_tables: the activation is another technique's already.")
        return replace(node, activation=table_of(node.activation))

    def change(ffn: Part, index: int) -> Part:
        if index < L - layers:
            return ffn
        ffn = swap(ffn, SwiGLU, swiglu, optional=True)
        return swap(ffn, Activated, activated, optional=True)

    changed = wrap(lm, "ffn", change)
    if not any(type(node) in (SwiGLU, TableSwiGLU, Activated) for _, node in walk(changed)):
        raise NoSuchPart(SwiGLU, Activated)
    return changed


@part
class TableSwiGLU(Part):
    """Hidden neurons silu(gate) * up, silu by a table."""

    gate: Part
    up: Part
    silu: FunctionTable

    def __call__(self, x):
        return self.silu(self.gate(x)) * self.up(x)  # (..., F)
