"""``minitx show --diff``: what techniques change in the tree of parts."""

import re

from tiny import tiny_lm

from minitx.pictures.tree_diff import ADDED, REMOVED, SAME, VALUES, tree_diff
from minitx.technique import apply
from minitx.tree import nbytes


def diffed(flags, family="llama"):
    dense = tiny_lm(family)
    return tree_diff(dense, apply(dense, flags))


def texts(found, mark):
    return [line.text for line in found.lines if line.mark == mark]


def test_same_model_has_no_diff():
    found = diffed({})
    assert not found.changed and str(found).startswith("The trees are the same.")


def test_replaced_parts_and_other_values_are_marked_in_blocks_folded_to_one():
    found = diffed({"fold_norms": {}})
    assert texts(found, REMOVED) == ["norm: RMSNorm(gain 16, eps=1e-05)"] * 3  # and the final norm
    assert texts(found, ADDED) == ["norm: WeightlessRMSNorm(eps=1e-05)"] * 3
    assert "qkv: QKV, with 3 parts: other values" in texts(found, VALUES)
    assert "blocks.0-1: Block" in texts(found, SAME)
    assert "down: Linear(w 24x16)" in texts(found, SAME), "what folding leaves alone"


def test_wrapped_part_stays_the_same_inside_its_wrapper():
    found = diffed({"early_exit": {"measure": "random"}})
    assert not texts(found, REMOVED)
    first, *others = texts(found, ADDED)
    assert first.startswith("stack: ExitingStack(") and len(others) == 3
    inner = next(line for line in found.lines if line.text.startswith("inner: "))
    assert (inner.mark, inner.text[:12]) == (SAME, "inner: Stack")
    assert inner.text.endswith(": as before")


def test_blocks_that_differ_are_not_folded():
    found = diffed({"layer_skip": {"drop": "1", "unit": "ffn"}})
    assert "blocks.0: Block, with 16 parts: as before" in texts(found, SAME)
    assert "blocks.1: Block" in texts(found, SAME)
    assert texts(found, ADDED) == ["ffn: Dropped"]
    removed = texts(found, REMOVED)
    assert removed[0] == "ffn: FFN" and removed[-1] == "down: Linear(w 24x16)"


def test_removed_block_and_another_decoding_loop():
    found = diffed({"layer_merge": {"size": 2, "first": 0}, "jacobi": {}})
    assert "blocks.1: Block" in texts(found, REMOVED)
    assert "blocks.0: Block, with 16 parts: other values" in texts(found, VALUES)
    assert "decode: Autoregressive" in texts(found, REMOVED)
    assert any(line.startswith("decode: Jacobi") for line in texts(found, ADDED))


def test_lines_are_marked_and_indented_like_the_tree():
    lines = str(diffed({"fold_norms": {}})).splitlines()
    assert lines[0] == "  model: Transformer" and lines[2] == "    stack: Stack"
    assert "-         norm: RMSNorm(gain 16, eps=1e-05)" in lines


def test_totals_are_those_of_the_models():
    dense = tiny_lm()
    changed = apply(dense, {"prune": {"sparsity": 0.5, "method": "magnitude"}})
    found = tree_diff(dense, changed)
    assert found.before["bytes in memory"] == nbytes(dense)
    assert found.before["zeros among the floats"] == 0 < found.after["zeros among the floats"]
    assert re.search(r"weights: ([\d,]+) -> \1 \(1.000x\)", str(found))
    assert found.as_dict()["changed"]
