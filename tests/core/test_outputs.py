"""Some columns of a projection: ``outputs(x, columns)`` of every part that has it, against the same
columns of the whole result."""

import numpy as np
import pytest
from same import assert_same
from tiny import tiny_lm

from minitx import ledger
from minitx.lm import LM
from minitx.model import Linear
from minitx.precompute.lut_bit_serial import BitSerialLinear
from minitx.precompute.lut_centroid import CentroidLinear
from minitx.precompute.lut_product import ProductTableLinear
from minitx.precompute.lut_product.bit_search import IntegerLinear
from minitx.precompute.order_products import OrderedLinear
from minitx.precompute.order_products.accumulator import SaturatingLinear
from minitx.precompute.quantize.products import IntegerSumLinear, StreamedLinear
from minitx.precompute.separate_magnitudes import OutlierLinear
from minitx.precompute.separate_signs import UnsignedLinear
from minitx.precompute.shrink import ShrunkKeys, ShrunkOutput
from minitx.technique import apply, swap, techniques
from minitx.tree import Part, walk

# Techniques of the two levels, first as they are, then with the options that bring other parts.
CASES = [
    *({t.name: True} for t in techniques() if t.level in ("weights", "matrices")),
    *({"quantize": {"run": run}} for run in ("cast", "load", "integers")),
    {"quantize": {"bits": 4, "symmetric": False, "group_size": 8}},
    {"quantize": {"bits": 4, "symmetric": False, "group_size": 8, "run": "integers"}},
    {"lut_product": {"layout": "horizontal"}},
    {"separate_signs": {"bits": 8}},
    {"order_products": {"order": "largest_rows_first"}},
    {"order_products": {"accumulator_bits": 12}},
    {"prune": {"sparsity": 0.5}, "pack_zeros": True},
    {"teal": {"prompts": "skip"}},
    {"shrink": True, "low_rank": {"share": 0.75}},
]
# What these compute for some columns they compute as for all, in the same order: the same bits.
SAME_BITS = (
    *(SaturatingLinear, BitSerialLinear, CentroidLinear, IntegerLinear, ProductTableLinear),
    *(
        IntegerSumLinear,
        StreamedLinear,
        OutlierLinear,
        UnsignedLinear,
        ShrunkKeys,
        ShrunkOutput,
        OrderedLinear,
    ),
)
# These compute all columns and select.
SELECT = (
    SaturatingLinear,
    IntegerSumLinear,
    StreamedLinear,
    OutlierLinear,
    UnsignedLinear,
    ShrunkKeys,
    ShrunkOutput,
)
IDS = np.random.default_rng(0).integers(0, 258, 7)
COLUMNS = {
    "slice(1, 4)": slice(1, 4),
    "slice(2, None)": slice(2, None),
    "slice(None)": slice(None),
    "indices": np.array([4, 0, 2, 2, -1, 1]),
    "one index": np.array([4]),
    "no index": np.array([], int),
}


def with_techniques(case: dict) -> LM:
    """A model of the kind that the techniques fit, without RoPE where there is one such."""
    family = "skipless" if "remove_weights" in case else "llama" if "cats" in case else "gpt2"
    return apply(tiny_lm(family, np.float64), case)


def with_integer_products() -> LM:
    """lut_product's search alone uses these parts."""
    return swap(tiny_lm(), Linear, lambda m: IntegerLinear.of(m.w, m.b, 4, 4))


def parts_and_inputs(lm: LM) -> list[tuple[Part, np.ndarray]]:
    """The parts that have ``outputs``, each with what it reads when the model reads IDS."""
    found = {id(node): node for _, node in walk(lm.model) if hasattr(node, "outputs")}
    read = {}

    def watched(call):
        def noted(self, x):
            read.setdefault(id(self), x)
            return call(self, x)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(node) for node in found.values()}:
            patch.setattr(kind, "__call__", watched(kind.__call__))
        lm.model(IDS)
    return [(node, read[key]) for key, node in found.items()]


def work(node: Part, method: str, *args) -> tuple[int, int]:
    """Multiply-adds and bytes of weights that a call of the part takes."""
    with ledger.counting(node) as counts:
        getattr(node, method)(*args)
    return counts.total().multiply_adds, counts.total().weight_bytes


def has_same_bits(node: Part) -> bool:
    shared = isinstance(node, OrderedLinear) and node.order.shape[1] == 1  # one product by BLAS
    return isinstance(node, SAME_BITS) and not shared


@pytest.fixture(scope="module")
def parts() -> list[tuple[Part, np.ndarray]]:
    models = [*map(with_techniques, CASES), with_integer_products()]
    return [pair for lm in models for pair in parts_and_inputs(lm)]


def test_every_part_that_has_outputs_is_tested(parts):
    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    shipped = {kind for kind in below(Part) if kind.__module__.startswith("minitx.")}
    missing = {kind for kind in shipped if hasattr(kind, "outputs")} - {type(n) for n, _ in parts}
    assert not missing


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_outputs_are_columns_of_the_whole_result(parts, columns):
    for node, x in parts:
        for rows in (x, x[:1], x[None]):
            whole = node(rows)
            expected, found = whole[..., columns], node.outputs(rows, columns)
            assert found.shape == expected.shape and found.dtype == expected.dtype
            same = has_same_bits(node) and expected.shape[-1] > 1  # of one, NumPy adds pairwise
            tolerance = 0 if same else 1e-12 if x.dtype == np.float64 else 1e-5
            largest = abs(whole).max()
            assert_same(found, expected, type(node).__name__, atol=tolerance * largest)


@pytest.mark.parametrize("columns", [slice(1, 4), np.array([4, 0, 2])], ids=["slice", "indices"])
def test_fewer_columns_take_less_work(parts, columns):
    for node, x in parts:
        whole, some = work(node, "__call__", x), work(node, "outputs", x, columns)
        if isinstance(node, SELECT):
            assert some == whole, type(node).__name__
        else:
            less = [a < b for a, b in zip(some, whole)]
            assert any(less) and all(a <= b for a, b in zip(some, whole)), type(node).__name__
