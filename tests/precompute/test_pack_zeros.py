"""pack_zeros: the bitmask, exact products, memory, which matrices are packed."""

import warnings

import literal_pack_zeros as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm

from minitx.errors import MinitxError, MinitxWarning
from minitx.ledger import counting
from minitx.model import Linear
from minitx.precompute.pack_zeros import BitmaskLinear, sparsity
from minitx.shared.linears import linears
from minitx.technique import apply
from minitx.tree import nbytes, walk

IDS = np.random.default_rng(3).integers(0, 258, 30)


def pruned(lm, **options):
    return apply(lm, {"prune": options | {"method": "magnitude"}})


def matrices(lm):
    return [linear.w for linear in linears(lm.model, "all").values()]


def test_bitmask_by_hand():
    """Row by row 0 2 | 0 0 | .5 0: values 2 and .5, bits 010010 and two that fill the byte:
    01001000 = 64 + 8 = 72."""
    w = np.array([[0, 2], [0, 0], [0.5, 0]], np.float32)
    packed = BitmaskLinear.of(Linear(w))
    assert packed.values.tolist() == [2, 0.5] and packed.mask.tolist() == [72]
    assert_same(packed.w, w)
    assert_same(packed(np.array([[1.0, 10, 100]], np.float32)), [[50, 2]])


@pytest.mark.parametrize("shape", [(4, 3), (8, 8), (1, 1), (5, 7)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_packed_matrix_equals_the_literal_version(shape, sparsity):
    rng = np.random.default_rng(0)
    w = np.where(rng.random(shape) < sparsity, 0, rng.normal(size=shape))
    packed = BitmaskLinear.of(Linear(w))
    values, mask = literal.pack(w.tolist())
    assert packed.values.tolist() == values and packed.mask.tolist() == mask
    assert packed.w.tolist() == literal.unpack(values, mask, *shape) == w.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_matrices_multiply_bit_for_bit_like_dense_ones(family):
    lm = pruned(tiny_lm(family), scope="2:4")
    packed = apply(lm, {"pack_zeros": True})
    assert_same(packed.logits(IDS), lm.logits(IDS))
    found, expected = (m.next_logits(IDS[:1], m.new_state()) for m in (packed.model, lm.model))
    assert_same(found, expected)
    found = [node for _, node in walk(packed) if type(node) is BitmaskLinear]
    for part, w in zip(found, matrices(lm), strict=True):
        assert_same(part.w, w)
        assert part.values.nbytes + part.mask.nbytes == w.size * (2 + 1 / 8)
        x = np.ones((2, len(w)), np.float32)
        some = slice(3, None)
        assert_same(part.outputs(x, some), Linear(w, part.b).outputs(x, some))


def test_memory_and_bytes_read_are_those_of_the_formula():
    """4 bytes for each nonzero weight and a bit for each weight; as many multiply-adds as dense."""
    lm = pruned(tiny_lm(), sparsity=0.75)
    packed = apply(lm, {"pack_zeros": True})
    size = sum(w.size for w in matrices(lm))
    nonzero = sum(np.count_nonzero(w) for w in matrices(lm))
    saved = 4 * size - (4 * nonzero + size / 8)
    assert nbytes(lm) - nbytes(packed) == saved
    with counting(lm) as before:
        lm.logits(IDS)
    with counting(packed) as after:
        packed.logits(IDS)
    assert before.total().weight_bytes - after.total().weight_bytes == saved
    assert before.total().multiply_adds == after.total().multiply_adds


def test_only_matrices_with_min_sparsity_are_packed():
    lm = pruned(tiny_lm(), matrices="ffn", sparsity=0.5)
    packed = apply(lm, {"pack_zeros": {"min_sparsity": 0.1}})
    for path, node in walk(packed.model):
        assert type(node) is not Linear or ".attn." in path
        assert type(node) is not BitmaskLinear or ".ffn." in path


def test_packing_a_matrix_without_zeros_takes_a_bit_per_weight_more():
    dense = tiny_lm()
    size = sum(w.size for w in matrices(dense))
    packed = apply(dense, {"pack_zeros": {"min_sparsity": 0.0}})
    assert nbytes(packed) - nbytes(dense) == size / 8


def test_a_model_without_zeros_is_left_as_it_is_and_that_is_said():
    with pytest.warns(MinitxWarning, match="packed nothing: no matrix has a share of 0.04 or more"):
        packed = apply(tiny_lm(), {"pack_zeros": True})
    assert not [node for _, node in walk(packed) if type(node) is BitmaskLinear]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for nothing, got nothing
        apply(tiny_lm(), {"pack_zeros": {"min_sparsity": 1.1}})


def test_every_matrix_that_the_default_packs_gets_smaller():
    """A bit more for each weight and 4 bytes less for each zero: less from 1/32 of zeros on."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 100)).astype(np.float32)
    w.ravel()[:64] = 0  # 4 %
    assert 0.04 <= sparsity(w) < 0.05 and nbytes(BitmaskLinear.of(Linear(w))) < w.nbytes


def test_a_matrix_of_zeros_is_packed_without_values():
    packed = BitmaskLinear.of(Linear(np.zeros((4, 3), np.float32)))
    assert packed.values.size == 0
    assert_same(packed.w, np.zeros((4, 3), np.float32))


def test_bad_options_are_refused():
    message = "pack_zeros: min_sparsity must be a number, at least 0; got -1.0"
    with pytest.raises(MinitxError, match=message):
        apply(tiny_lm(), {"pack_zeros": {"min_sparsity": -1.0}})
