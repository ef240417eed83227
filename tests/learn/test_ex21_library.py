"""Exercise 21: the solution orders weights and stops as minitx's own parts do, in float64."""

import numpy as np
from same import assert_same

from minitx import ledger
from minitx.learn import ex21_early_stop as ex21
from minitx.model import Linear
from minitx.shared.ordering import positives_first
from minitx.skip.negative_skip import StoppedEarly

RNG = np.random.default_rng(0)


def test_early_stop_equals_the_library():
    w, b, x = RNG.standard_normal((9, 12)), RNG.standard_normal(12), RNG.exponential(1, 9)
    orders = [ex21.sort_weights(column) for column in w.T]
    assert_same(np.array(orders).T, positives_first(w), "orders of the weights")
    library = StoppedEarly.of(Linear(w, b), "shift", positives_first, every=1)
    with ledger.counting(library) as counts:
        expected = library(x)
    found = [ex21.relu_dot(x, *args) for args in zip(w.T, b, orders)]
    assert_same([h for h, _ in found], expected, "neurons", tolerance=1e-12)
    # The library first looks at the sum after one product; a neuron may stop before that.
    products = sum(max(count, 1) for _, count in found)
    assert products == counts.events["terms computed"], "another number of products"
