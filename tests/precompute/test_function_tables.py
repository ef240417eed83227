"""function_tables: bit for bit the function itself at every float16."""

import math

import literal_function_tables as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm

from minitx import ops
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.precompute.function_tables import FunctionTable, TableSwiGLU
from minitx.technique import apply
from minitx.tree import nbytes, walk

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
IDS = np.random.default_rng(0).integers(0, 258, 30)
FUNCTIONS = [ops.silu, ops.relu, ops.gelu, np.exp, *ops.ACTIVATIONS.values()]


def test_worked_example_by_hand():
    """1.5 = 1.1b * 2^0: sign 0, exponent 0 + 15 = 01111b, fraction 1000000000b. Read as an integer,
    0 01111 1000000000b = 0011 1110 0000 0000b = 0x3E00; with the sign of -1.5, 0xBE00."""
    table = FunctionTable.make(ops.relu, np.float64)
    assert (table.values[0x3E00], table.values[0xBE00]) == (1.5, 0)
    assert_same(table(np.array([1.5, -1.5])), [1.5, 0])


def test_function_table_equals_the_literal_version():
    def square(x):
        return x * x

    expected = literal.function_table(square)
    found = FunctionTable.make(square, np.float64)
    numbers = [x is not None for x in expected]
    assert_same(found.values[numbers], [x for x in expected if x is not None])
    assert np.isnan(found.values[~np.array(numbers)]).all()
    x = [*np.random.default_rng(1).normal(0, 30, 500), 1e-9, 65519.0, math.inf, -math.inf]
    looked_up = [literal.look_up(expected, a, square) for a in x]
    assert_same(found(np.array(x)), looked_up)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_all_65536_float16_inputs_give_the_bits_of_the_function(f, dtype):
    found = FunctionTable.make(f, dtype)(EVERY.astype(dtype))
    numbers = ~np.isnan(EVERY)
    with np.errstate(all="ignore"):
        expected = f(EVERY[numbers].astype(dtype))
    bits = np.uint32 if dtype == np.float32 else np.uint64
    assert found.dtype == dtype and numbers.sum() == 65536 - 2 * 1023
    assert_same(found[numbers].view(bits), expected.view(bits))
    given = EVERY[~numbers].astype(dtype)
    assert_same(found[~numbers].view(bits), given.view(bits), "NaN stays the same NaN")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("f", ops.ACTIVATIONS.values(), ids=ops.ACTIVATIONS)
def test_inputs_beyond_float16_give_the_function_itself(f, dtype):
    """65,520 is the first number that float16 rounds to Inf; silu(-Inf) = -Inf / Inf is NaN."""
    ends = np.array([65504, 65519.5, 65520, 7e4, 1e6, 1e30], dtype)
    x = np.stack([ends, -ends, np.ones_like(ends)])
    with np.errstate(over="ignore"):
        found, expected = FunctionTable.make(f, dtype)(x), f(x)
    inside = abs(x) < 65520
    assert np.isfinite(found).all() and found.dtype == dtype
    assert_same(found[~inside], expected[~inside], "beyond float16")
    assert_same(found[inside], expected[inside], tolerance=5e-4, atol=1e-7)


def test_other_inputs_are_rounded_to_float16():
    x = np.random.default_rng(1).normal(0, 3, (5, 7)).astype(np.float32)
    found = FunctionTable.make(ops.silu, np.float32)(x)
    assert_same(found, ops.silu(x.astype(np.float16).astype(np.float32)))
    assert 0 < abs(found - ops.silu(x)).max() < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_shares_one_table(family):
    dense = tiny_lm(family, dtype=np.float32)
    lm = apply(dense, {"function_tables": True})
    tables = {id(node): node for _, node in walk(lm) if type(node) is FunctionTable}
    assert len(tables) == 1 and nbytes(*tables.values()) == 256 << 10
    expected = dense.logits(IDS)
    error = abs(lm.logits(IDS) - expected).max() / abs(expected).max()
    assert 0 < error < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_counts_blocks_from_the_last(family):
    lm = apply(tiny_lm(family), {"function_tables": dict(layers=1)})
    first, last = (
        any(type(node) is FunctionTable for _, node in walk(block))
        for block in lm.model.stack.blocks
    )
    assert not first and last


def test_swiglu_looks_up_the_rounded_gate():
    expand = apply(tiny_lm(), {"function_tables": True}).model.stack.blocks[0].ffn.expand
    assert type(expand) is TableSwiGLU
    x = np.random.default_rng(2).normal(size=(4, 16)).astype(np.float32)
    gate = expand.gate(x).astype(np.float16).astype(np.float32)
    assert_same(expand(x), ops.silu(gate) * expand.up(x))


def test_table_reads_are_counted():
    lm = apply(tiny_lm(), {"function_tables": True})
    with counting(lm) as counts:
        lm.logits(IDS)
    assert counts.events["function table reads"] == 30 * 2 * 24  # tokens, layers, neurons
    table = sum(e.weight_bytes for p, e in counts.entries.items() if p.endswith("silu"))
    assert table == 4 * 30 * 2 * 24


def test_function_tables_run_beside_lut_product():
    both = apply(tiny_lm(), {"function_tables": True, "lut_product": True})
    assert "ProductTableLinear" in repr(both) and "FunctionTable" in repr(both)


def test_fused_gate_and_up_are_refused():
    with pytest.raises(MinitxError, match="^function_tables needs .* fuse_projections"):
        apply(tiny_lm(), {"function_tables": True, "fuse_projections": True})


@pytest.mark.parametrize(
    "layers, words",
    [(-1, "layers must be an integer, at least 0, or None; got -1"), (3, "at most 2, .*; got 3")],
)
def test_bad_options_are_refused(layers, words):
    with pytest.raises(MinitxError, match=f"^function_tables: .*{words}"):
        apply(tiny_lm(), {"function_tables": dict(layers=layers)})
