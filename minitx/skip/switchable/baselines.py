"""Baselines of switchable: as much work is skipped, without looking at what the prompt says."""

import numpy as np

from minitx.tree import Part, part, table


@part
class FixedPlan(Part):
    """The same units run for every prompt."""

    keep: np.ndarray = table()  # (U,) booleans

    def __call__(self, s):
        return self.keep


@part
class RandomPlans(Part):
    """Random units run, drawn once for each prompt. Which ones follows from the seed and the signs
    of s (D,), so that the same prompt always gets the same."""

    costs: np.ndarray = table()  # (U,)
    share: float = 1.0
    seed: int = 0

    def __call__(self, s):
        rng = np.random.default_rng([self.seed, *np.packbits(s > 0)])
        return units_within(rng.permutation(len(self.costs)), self.costs, self.share)


def units_within(order, costs, share: float) -> np.ndarray:
    """(U,) booleans: without units in this order of removal, but never so many that the others'
    costs are less than ``share`` of all."""
    keep, left, least = np.ones(len(costs), bool), costs.sum(), share * costs.sum() * (1 - 1e-6)
    for u in order if share < 1 else ():  # 1 keeps units that cost nothing, too
        if left - costs[u] >= least:
            keep[u], left = False, left - costs[u]
    return keep
