"""What lut_product, lut_centroid and lut_bit_serial have in common: which matrices get tables, the
same bits alone and in a batch, counted reads, and other techniques beside them."""

import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm

from minitx.errors import MinitxError
from minitx.lab.costs.lut_bit_serial import lut_bit_serial
from minitx.lab.costs.lut_centroid import lut_centroid
from minitx.lab.costs.lut_product import lut_product
from minitx.lab.lookup_work import Work
from minitx.ledger import Entry, counting
from minitx.model import Linear
from minitx.precompute import lut_bit_serial as bit_serial_file
from minitx.precompute import lut_centroid as centroid_file
from minitx.precompute.lut_bit_serial import BitSerialLinear
from minitx.precompute.lut_centroid import CentroidLinear, Codebook
from minitx.precompute.lut_product import ProductTable, ProductTableLinear
from minitx.precompute.lut_product.bit_search import IntegerLinear
from minitx.shared import table_lookup
from minitx.shared.table_lookup import TableHead, constant_matrices
from minitx.technique import apply, kinds
from minitx.tree import walk

RNG = np.random.default_rng(3)
IDS = np.random.default_rng(0).integers(0, 258, 30)
PARTS = {
    "lut_product": ProductTableLinear,
    "lut_centroid": CentroidLinear,
    "lut_bit_serial": BitSerialLinear,
}
OPTIONS = {
    "lut_product": {"input_bits": 4, "weight_bits": 4, "length": 2},
    "lut_centroid": {"stories": 2, "layers": None},
    "lut_bit_serial": {"bits": 4, "group": 4},
}
each = pytest.mark.parametrize("name", PARTS)


def with_tables(name, family="llama", dtype=np.float64, **options):
    return apply(tiny_lm(family, dtype=dtype), {name: OPTIONS[name] | options})


def every_part(w, b, rows):
    """One part of every kind for a matrix w (in, out)."""
    return {
        "vertical": ProductTableLinear.of(ProductTable.of(4, 3, 2, "vertical"), w, b),
        "horizontal": ProductTableLinear.of(ProductTable.of(4, 3, 2, "horizontal"), w, b),
        "integer": IntegerLinear.of(w, b, 4, 3),
        "centroid": CentroidLinear.of(Codebook.of(rows, 8, 3, 0), w, b),
        "bit-serial": BitSerialLinear.of(w, b, 3, 4),
    }


# One part ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", every_part(np.ones((3, 2)), None, np.ones((9, 3))))
@pytest.mark.parametrize("out", [1, 9, 64])
def test_a_token_alone_equals_the_token_in_a_batch(kind, dtype, out, monkeypatch):
    x, w, b = (RNG.normal(size=s).astype(dtype) for s in ((4, 25, 22), (22, out), (out,)))
    part = every_part(w, b, x.reshape(-1, 22))[kind]
    whole = part(x)
    assert whole.shape == (4, 25, out) and whole.dtype == dtype
    single = [part(x[i, t]) for i in range(4) for t in range(25)]
    assert_same(single, whole.reshape(100, out))
    assert_same(part(x[2]), whole[2])
    strided = np.concatenate([x, x], -1)[..., :22]  # not contiguous
    assert_same(part(strided), whole)
    for first in {0, out // 2}:
        assert_same(
            part.outputs(x, slice(first, None)), whole[..., first:], tolerance=1e-4, atol=1e-5
        )
    for module in (table_lookup, centroid_file, bit_serial_file):  # a few tokens or columns a step
        monkeypatch.setattr(module, "READS", 300)
    assert_same(part(x), whole, tolerance=1e-4, atol=1e-5)
    assert_same([part(row) for row in x[0]], part(x)[0])


def test_weights_of_zero_give_zeros():
    for kind, part in every_part(np.zeros((5, 3)), None, RNG.normal(size=(9, 5))).items():
        assert_same(part(np.ones((2, 5))), np.zeros((2, 3)), kind)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_inf_spoil_their_own_token_alone(bad):
    """Not with centroids: there a token with NaN has a nearest centroid like any other."""
    x, w = RNG.normal(size=(3, 5)), RNG.normal(size=(5, 4))
    for kind, part in every_part(w, None, x).items():
        if kind == "centroid":
            continue
        expected = part(x)
        damaged = x.copy()
        damaged[1, 2] = bad
        found = part(damaged)
        assert not np.isfinite(found[1]).any(), f"{kind} hides a {bad}"
        assert_same(found[::2], expected[::2], kind)


# In a model --------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_and_the_head_get_tables_and_run_in_steps_and_batches(name, family):
    lm = with_tables(name, family, head=True)
    assert Linear not in kinds(lm) and type(lm.model.head) is TableHead
    assert type(lm.model.head.logits) is PARTS[name]
    whole = lm.logits(IDS)
    state = lm.model.new_state()
    found = [lm.model(IDS[a:b], state) for a, b in ((0, 11), (11, 12), (12, 30))]
    assert_same(np.concatenate(found), whole, atol=1e-9)
    assert_same(lm.logits(np.stack([IDS, IDS[::-1]]))[0], whole, atol=1e-9)
    assert lm.generate(IDS[:5], 8) == lm.generate([IDS[:5], IDS[:3]], 8)[0]


@each
def test_every_array_stays_float32(name):
    lm = with_tables(name, dtype=np.float32, head=True)
    assert lm.logits(IDS).dtype == np.float32
    for path, node in walk(lm):
        for field, value in vars(node).items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                assert value.dtype == np.float32, f"{path}.{field}"


@each
def test_layers_counts_blocks_from_the_last(name):
    lm = with_tables(name, layers=1)
    assert PARTS[name] not in kinds(lm.model.stack.blocks[0]), "the first block has tables"
    assert Linear not in kinds(lm.model.stack.blocks[1]), "the last block has weights left"
    dense = tiny_lm(dtype=np.float64).model
    zero = with_tables(name, layers=0).model
    assert zero.stack.blocks == dense.stack.blocks and zero.head is dense.head


# Counting ----------------------------------------------------------------------------------------

WORK = {
    "lut_product": lambda inputs, outputs: lut_product(inputs, outputs, 4, 2),
    "lut_centroid": lambda inputs, outputs: lut_centroid(inputs, outputs, 16, 4, 8),
    "lut_bit_serial": lambda inputs, outputs: lut_bit_serial(inputs, outputs, 4, 4),
}


@each
@pytest.mark.parametrize("tokens", [1, 7])
def test_counted_work_equals_the_cost_formula(name, tokens):
    lm = with_tables(name)
    shapes = [node.w.shape for node in constant_matrices(name, tiny_lm(), None, False)]
    with counting(lm) as counts:
        lm.logits(IDS[:tokens])
    work = sum((WORK[name](*shape) for shape in shapes), Work())
    ours = [path for path in counts.entries if not path.endswith(("attend", "head", "embed"))]
    found = sum((counts.entries[path] for path in ours), Entry())
    assert len(ours) == 14
    assert found.multiply_adds == tokens * work.multiplications
    assert counts.events["table reads"] == tokens * work.reads
    assert counts.events["table entries computed"] == tokens * work.computed
    if name == "lut_product":  # a byte a code, once; a byte an entry, for each token
        assert found.weight_bytes == work.weight_bytes + tokens * work.reads
    if name == "lut_bit_serial":  # a byte for each index of 4 bits
        assert found.weight_bytes == 2 * work.weight_bytes


# Beside other techniques -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", ["fold_norms", "fuse_projections", "first_layer", "early_exit"])
def test_lut_product_runs_beside_others_or_is_refused(other, family):
    lm = tiny_lm(family)
    try:
        both = apply(lm, {"lut_product": True, other: True})
    except MinitxError as error:
        assert other in str(error) and "\n" not in str(error)
        return
    assert "ProductTableLinear" in repr(both) and len(both.generate(IDS[:5], 8)) <= 8
    if other == "fuse_projections":  # columns have their scales as before, q a factor more
        found = both.logits(IDS)
        alone = apply(lm, {"lut_product": True}).logits(IDS)
        assert_same(found, alone, atol=1e-4 * abs(alone).max())


@each
def test_exact_head_beside_a_table_head_is_refused(name):
    with pytest.raises(MinitxError, match=f"^exact_head needs .* which {name} has replaced"):
        apply(tiny_lm(), {name: dict(head=True), "exact_head": True})


def test_two_lookup_techniques_are_refused():
    with pytest.raises(MinitxError) as error:
        apply(tiny_lm(), {"lut_product": True, "lut_bit_serial": True})
    assert "lut_product" in str(error.value) and "lut_bit_serial" in str(error.value)
