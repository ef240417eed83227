"""The methods of ``minitx frontier attention``: techniques that select keys, and three baselines.

Each keeps a share of the keys that a query sees, by its knob (knobs.py).
"""

import numpy as np

from minitx.lab.frontier.attention_baselines import baseline
from minitx.lab.frontier.knobs import Knob, Method


def keys(name: str) -> Knob:
    return Knob(name, 1, 4096, keys=True)


def baseline_method(name: str) -> Method:
    return Method(name, keys("r"), make=lambda lm, r: baseline(lm, name, r))


METHODS = (
    baseline_method("oracle"),
    # a3's greedy search alone: its second filter comes after the scores. With few iterations about
    # as many keys stay.
    Method("a3", Knob("iterations", 1 / 256, 8.0, start=1.2), {"threshold": 0.0}),
    Method("elsa", Knob("p", 1 / 64, 64.0, start=0.25, falling=True), {"min_visible": 1}),
    Method("dota", keys("keep")),
    Method(
        "perforate_keys",
        Knob("stride", 1, 512, start=1.0, falling=True, integer=True),
        {"window": 16},
    ),
    Method(
        "predictive_attention",
        Knob("share", 0.001, 1.0, start=1.0),
        {"threshold": 0.0, "min_keys": 1},
    ),
    Method("sparse_memory", keys("keep")),
    baseline_method("window"),
    baseline_method("random"),
)


def first_guess(knob: Knob, share: float, T: int) -> float:
    """A value that should keep about this share of all keys that T tokens see."""
    if not knob.keys:
        return knob.guess(share)
    r = np.arange(1, T + 1)  # the first r queries see no more keys than r
    kept = (r * T - r * (r - 1) / 2) / (T * (T + 1) / 2)
    return float(r[abs(kept - share).argmin()])
