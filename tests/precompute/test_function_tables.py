"""Tables of functions: bit for bit the function itself on every float16."""

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx import ops
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.precompute.function_tables import TableSwiGLU
from minitx.shared.function_table import FunctionTable
from minitx.technique import apply
from minitx.tree import nbytes, walk

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
IDS = np.random.default_rng(0).integers(0, 258, 30)
FUNCTIONS = [ops.silu, ops.relu, ops.gelu, np.exp, *ops.ACTIVATIONS.values()]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_all_65536_patterns(f, dtype):
    found = FunctionTable.make(f, dtype)(EVERY.astype(dtype))
    numbers = ~np.isnan(EVERY)
    with np.errstate(all="ignore"):
        expected = f(EVERY[numbers].astype(dtype))
    bits = np.uint32 if dtype == np.float32 else np.uint64
    assert found.dtype == dtype and numbers.sum() == 65536 - 2 * 1023
    np.testing.assert_array_equal(found[numbers].view(bits), expected.view(bits))
    given = EVERY[~numbers].astype(dtype)  # NaN stays what it is
    np.testing.assert_array_equal(found[~numbers].view(bits), given.view(bits))


def test_other_numbers_are_rounded_to_float16():
    x = np.random.default_rng(1).normal(0, 3, (5, 7)).astype(np.float32)
    found = FunctionTable.make(ops.silu, np.float32)(x)
    np.testing.assert_array_equal(found, ops.silu(x.astype(np.float16).astype(np.float32)))
    assert 0 < abs(found - ops.silu(x)).max() < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_uses_one_table(family):
    dense = tiny_lm(family, dtype=np.float32)
    lm = apply(dense, {"function_tables": True})
    tables = {id(node): node for _, node in walk(lm) if type(node) is FunctionTable}
    assert len(tables) == 1 and nbytes(*tables.values()) == 256 << 10
    expected = dense.logits(IDS)
    error = abs(lm.logits(IDS) - expected).max() / abs(expected).max()
    assert 0 < error < 0.01
    half = apply(dense, {"function_tables": dict(layers=1)})
    changed = [type(node) is FunctionTable for _, node in walk(half.model.stack.blocks[0])]
    assert not any(changed)


def test_swiglu_is_that_of_the_rounded_gate():
    expand = apply(tiny_lm(), {"function_tables": True}).model.stack.blocks[0].ffn.expand
    assert type(expand) is TableSwiGLU
    x = np.random.default_rng(2).normal(size=(4, 16)).astype(np.float32)
    gate = expand.gate(x).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(expand(x), ops.silu(gate) * expand.up(x))


def test_reads_are_counted():
    lm = apply(tiny_lm(), {"function_tables": True})
    with counting(lm) as counts:
        lm.logits(IDS)
    assert counts.events["function table reads"] == 30 * 2 * 24  # tokens, layers, neurons
    table = sum(e.weight_bytes for p, e in counts.entries.items() if p.endswith("silu"))
    assert table == 4 * 30 * 2 * 24


def test_with_lut_and_refusals():
    both = apply(tiny_lm(), {"function_tables": True, "lut": True})
    assert "TableLinear" in repr(both) and "FunctionTable" in repr(both)
    with pytest.raises(MinitxError, match="^function_tables needs .* fuse_projections"):
        apply(tiny_lm(), {"function_tables": True, "fuse_projections": True})
    for layers in (-1, 3):
        with pytest.raises(MinitxError, match=f"^function_tables: layers is {layers}; "):
            apply(tiny_lm(), {"function_tables": dict(layers=layers)})
