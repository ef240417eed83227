"""Attention that hands out its weights: the output is that of ``ops.attention``, the weights those
of the plain softmax."""

import numpy as np
import pytest
from same import assert_same

from minitx import fast, ops
from minitx.ledger import counting
from minitx.model import Attend
from minitx.shared.attention_weights import attend_in_blocks


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_output_and_weights_equal_plain_attention(monkeypatch, masked):
    monkeypatch.setattr(fast, "ROWS", 4)  # several blocks
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 5)) for n in (10, 13, 13))
    mask = ops.causal_mask(10, 13)
    if masked:
        mask = mask | (np.arange(13) == 2)
    out, weights = np.empty_like(q), np.zeros((2, 10, 13))
    with counting(Attend(0.3)) as counts:
        for a, b, end, p in attend_in_blocks(q, k, v, 0.3, mask if masked else None, out):
            weights[:, a:b, :end] = p
    with counting(Attend(0.3)) as expected:
        ops.attention(q, k, v, 0.3, mask if masked else None)
    assert_same(out, ops.plain_attention(q, k, v, 0.3, mask), atol=1e-12)
    scores = np.where(mask, fast.MASKED, 0.3 * q @ k.swapaxes(-1, -2))
    assert_same(weights, ops.softmax(scores), atol=1e-12)
    assert counts.total() == expected.total(), "it costs what attention costs"
