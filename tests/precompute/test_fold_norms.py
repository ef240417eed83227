"""fold_norms: gains and biases of norms in the matrices behind them, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_lm

from minitx.errors import MinitxError
from minitx.model import QKV, SwiGLU
from minitx.precompute.low_rank import low_rank
from minitx.technique import apply, swap


def test_a_bias_too_goes_through_the_matrix():
    """z = (y g + b) W + c = y (diag(g) W) + (b W + c), number by number."""
    before = tiny_lm("gpt2").model.stack.blocks[1].attn
    after = apply(tiny_lm("gpt2"), {"fold_norms": True}).model.stack.blocks[1].attn
    g, b, (w, c) = before.norm.gain, before.norm.bias, (before.qkv.k.w, before.qkv.k.b)
    for o in range(w.shape[1]):
        column = [float(g[i]) * float(w[i, o]) for i in range(len(g))]
        bias = sum(float(b[i]) * float(w[i, o]) for i in range(len(b))) + float(c[o])
        np.testing.assert_allclose(after.qkv.k.w[:, o], column, rtol=1e-6)
        assert after.qkv.k.b[o] == pytest.approx(bias, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind, child", [(QKV, "v"), (SwiGLU, "up")])
def test_a_reader_that_is_no_plain_matrix_is_refused_and_not_left_without_its_gain(kind, child):
    thin = low_rank(tiny_lm(), share=0.5).model.stack.blocks[0].attn.out
    lm = swap(tiny_lm(), kind, lambda part: replace(part, **{child: thin}))
    with pytest.raises(MinitxError, match="fold_norms needs a part of type Linear"):
        apply(lm, {"fold_norms": True})
