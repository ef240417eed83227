"""Exercises 16, 17, 18, 22 and 24 do what the library does, in float64."""

import numpy as np
import pytest

from minitx.learn import ex16_speculative
from minitx.learn.exact import exact_distribution
from minitx.shared.draft_and_verify import accept_or_resample


class AsSampler:
    """A library's sampler that draws with an enumerating generator."""

    def __init__(self, rng):
        self.rng = rng

    def draw(self, p):
        return int(self.rng.choice(len(p), p=p))


@pytest.mark.parametrize("x", range(4))
def test_accept_has_the_distribution_of_the_librarys_rule(x):
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), 2), rng.dirichlet(np.ones(4), 1)
    ours = exact_distribution(lambda rng: ex16_speculative.accept(p, q, [x], rng)[0])
    theirs = exact_distribution(lambda rng: accept_or_resample(p[0], q[0], x, AsSampler(rng)))
    assert set(ours) == set(theirs)
    assert all(ours[token] == pytest.approx(theirs[token], abs=1e-12) for token in ours)


def test_accept_keeps_the_targets_distribution():
    """Averaged over what the draft proposes, the first token is distributed as p[0]."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(5), 3), rng.dirichlet(np.ones(5), 2)

    def run(rng):
        drafted = [int(rng.choice(5, p=row)) for row in q]
        return ex16_speculative.accept(p, q, drafted, rng)[0]

    found = exact_distribution(run)
    np.testing.assert_allclose([found[x] for x in range(5)], p[0], atol=1e-12)
