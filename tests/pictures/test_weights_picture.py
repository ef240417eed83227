"""``minitx weights``: the figures of a matrix, and the matrix that a technique multiplies by."""

import json
from xml.dom import minidom

import numpy as np
import pytest
from tiny import tiny_lm

from minitx.errors import MinitxError
from minitx.model import Linear, RMSNorm
from minitx.pictures.weights import Matrix, as_matrix, bar, matrices, shade, weights
from minitx.pictures.weights_svg import as_svg
from minitx.technique import apply

DOWN = "stack.blocks.1.ffn.down"


def compared(flags, part=DOWN, family="gpt2"):  # with biases
    dense = tiny_lm(family)
    return weights(dense, apply(dense, flags) if flags else None, "a title", part)


def test_singular_values_and_rank_by_hand():
    """diag(4, 3, 0): the squares are 16, 9, 0, so the first value holds 64 % of the energy."""
    m = Matrix(np.diag([3.0, 4.0, 0.0]), 0)
    assert np.allclose(m.singular_values, [4, 3, 0])
    assert (m.rank(0.6), m.rank(0.64), m.rank(0.65), m.rank(1.0)) == (1, 1, 2, 2)
    assert Matrix(np.zeros((2, 2)), 0).rank() == 0


def test_singular_values_are_those_of_the_svd():
    w = np.random.default_rng(0).standard_normal((5, 9))
    expected = np.linalg.svd(w, compute_uv=False)
    for one in (w, w.T):
        assert np.allclose(Matrix(one, 0).singular_values, expected)


def test_histogram_leaves_out_zeros_and_sums_to_the_others():
    m = Matrix(np.array([[-1.0, 0.0], [0.5, 1.0]]), 0)
    assert m.histogram(1.0, 4).tolist() == [0.25, 0, 0, 0.5]  # 1 of 4, 0.5 and 1 in the last


def test_zeros_of_a_patch_are_a_share():
    w = np.ones((4, 6))
    w[:2, :3] = 0
    w[3, 5] = 0
    assert np.allclose(Matrix(w, 0).zero_share(2, 2), [[1, 0], [0, 1 / 6]])
    assert Matrix(w, 0).zero_share(9, 9).shape == (4, 6), "no more patches than weights"
    assert [shade(s) for s in (0, 0.001, 0.5, 0.999, 1)] == [0, 1, 2, 3, 4]


def test_bar_shows_eighths():
    assert (bar(0), bar(1 / 28), bar(0.5 / 28), len(bar(2))) == ("", "█", "▌", 28)


def test_pruning_shows_its_zeros_and_nothing_else_changes():
    found = compared({"prune": {"sparsity": 0.5, "method": "magnitude"}})
    assert found.before.zeros.mean() == 0
    assert found.after.zeros.mean() == pytest.approx(0.5, abs=0.05)
    kept = ~found.after.zeros
    assert (found.after.w[kept] == found.before.w[kept]).all()
    assert "50.0%" in found.text() and "Share of zeros" in found.text()


@pytest.mark.parametrize(
    "flags, most",
    [
        ({"quantize": {"bits": 8}}, 0.01),
        ({"separate_signs": {}}, 1e-6),
        ({"pack_zeros": {}, "prune": {"sparsity": 0.5, "method": "magnitude"}}, 0.5),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_matrix_in_another_form_is_read_by_what_it_makes_of_unit_vectors(flags, most):
    found = compared(flags)
    off = np.linalg.norm(found.after.w - found.before.w) / np.linalg.norm(found.before.w)
    assert off <= most
    if "pack_zeros" in flags:
        assert found.after.zeros.mean() == pytest.approx(0.5, abs=0.05), "zeros are exact"
        assert found.after.bytes < found.before.bytes


def test_low_rank_cuts_the_spectrum():
    found = compared({"low_rank": {"rank": 4, "weighted": False}})
    s = found.after.singular_values
    assert s[3] > 0.1 and (s[4:] < 1e-4 * s[0]).all()


def test_part_that_is_no_matrix_is_refused():
    assert as_matrix(RMSNorm(np.ones(4), 1e-5), 4) is None, "not linear"
    linear = Linear(np.eye(3, 2), np.ones(2))
    assert np.allclose(as_matrix(linear, 3), np.eye(3, 2))
    with pytest.raises(MinitxError, match="of type CentroidLinear, which does not multiply by one"):
        options = {"centroids": 4, "stories": 2, "layers": None}
        compared({"lut_centroid": options}, "stack.blocks.1.attn.qkv.q")


def test_default_part_is_one_that_changed():
    assert compared({}, None).part == DOWN
    assert compared({"fold_norms": {}}, None).part == "stack.blocks.1.attn.qkv.q"
    assert compared({"layer_skip": {"drop": "1"}}, None).part == "stack.blocks.0.ffn.down"


@pytest.mark.parametrize(
    "flags, part, message",
    [
        ({}, "stack.blocks.1.ffn.dwn", f"did you mean '{DOWN}'"),
        ({}, "x", r"expected one of embed, .* stack.blocks.0.attn.out, .* \(and of other blocks\)"),
        ({"layer_skip": {"drop": "1"}}, DOWN, f"there is no part {DOWN} any more"),
    ],
)
def test_unknown_part_is_refused_in_one_sentence(flags, part, message):
    with pytest.raises(MinitxError, match=message):
        compared(flags, part)


def test_every_matrix_is_listed_once():
    found = matrices(tiny_lm())
    assert len(found) == 2 + 2 * 7 and {"embed", "head", DOWN} <= set(found)


def test_svg_and_json_are_complete():
    found = compared({"prune": {"sparsity": 0.5, "method": "magnitude"}})
    root = minidom.parseString(str(as_svg(found))).documentElement
    texts = [t.firstChild.data for t in root.getElementsByTagName("text")]
    assert {"before", "after", "singular values", "zeros: 50.0%"} <= set(texts)
    again = json.loads(json.dumps(found.as_dict()))
    assert sum(again["after"]["histogram"]) == pytest.approx(1 - again["after"]["zeros"])
