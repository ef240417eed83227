"""One block after another: what each is judged by, and that only one block's inputs are kept."""

import gc
import weakref

import numpy as np
import pytest
from same import assert_same
from tiny import tiny_lm

from minitx.model import Linear
from minitx.shared.block_by_block import block_by_block
from minitx.shared.linears import change_linears, linears
from minitx.shared.observed_inputs import Moments, Rows, watch_inputs

TEXTS = [[1, 2, 3, 4, 5], [6, 7, 8]]


def judged(after_changes: bool, factor: float):
    """What every matrix was judged by, while each block's FFN is scaled by ``factor``."""
    lm, found = tiny_lm(), {}
    ffn = linears(lm.model, "ffn")

    def change(block, seen):
        found.update({key: observer.all for key, observer in seen.items()})
        return change_linears(block, ffn, lambda linear: Linear(linear.w * np.float32(factor)))

    options = dict(label="test", after_changes=after_changes)
    return lm, block_by_block(lm, TEXTS, Rows, change, **options), found


def test_blocks_are_judged_by_the_dense_model_if_wanted():
    lm, _, found = judged(after_changes=False, factor=0.5)
    expected = watch_inputs(lm, Linear, TEXTS, Rows)
    assert found.keys() == expected.keys()
    for key, observer in expected.items():
        assert_same(found[key], observer.all, "not the dense model's inputs")


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_blocks_are_judged_after_the_earlier_ones_changed(factor):
    lm, changed, found = judged(after_changes=True, factor=factor)
    q = [block.attn.qkv.q for block in lm.model.stack.blocks]
    inputs = watch_inputs(changed, Linear, TEXTS, Rows)  # of the changed model
    second = inputs[id(changed.model.stack.blocks[1].attn.qkv.q)].all
    assert_same(found[id(q[1])], second, tolerance=1e-6)


def test_only_wanted_matrices_are_observed_and_one_block_is_kept_at_a_time():
    lm, alive, sizes = tiny_lm(), weakref.WeakSet(), []
    wanted = {id(block.ffn.down) for block in lm.model.stack.blocks}

    class Noted(Moments):
        __hash__ = object.__hash__

        def __init__(self):
            super().__init__()
            alive.add(self)

    def change(block, seen):
        gc.collect()
        sizes.append((len(seen), len(alive)))
        return block

    options = dict(label="test", wanted=wanted, after_changes=False)
    block_by_block(lm, TEXTS, Noted, change, **options)
    assert sizes == [(1, 1), (1, 1)], "statistics of an earlier block are still in memory"
