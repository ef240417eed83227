"""The exact distribution of a random algorithm: every way that its draws may go, weighted."""

import math
from collections import defaultdict

import numpy as np

from minitx.decode import Sampler


class Every(Sampler):
    """A sampler that follows a script of draws, then takes the first that can be."""

    def __init__(self, script, **options):
        super().__init__(**dict(temperature=1.0) | options)
        self.script, self.weights = script, []

    def draw(self, p):
        possible = np.flatnonzero(p)
        step = len(self.weights)
        if step == len(self.script):
            self.script.append(0)
        self.weights.append(([*p[possible] / p.sum()], self.script[step]))
        return int(possible[self.script[step]])


def law(run, **options):
    """{result: probability} of ``run(choose)``, over every way that its draws may go."""
    found, script = defaultdict(float), []
    while True:
        choose = Every(script, **options)
        result = run(choose)
        found[result] += math.prod(weights[i] for weights, i in choose.weights)
        while script and script[-1] + 1 == len(choose.weights[len(script) - 1][0]):
            script.pop()
        if not script:
            return found
        script[-1] += 1


def law_of_model(model, prompt, n: int, **options):
    """{n tokens after the prompt: probability}, from the model's own distributions."""
    warp, expected = Sampler(**options).probabilities, {(): 1.0}
    for _ in range(n):
        expected = {
            (*new, token): share * p
            for new, share in expected.items()
            for token, p in enumerate(warp(model([*prompt, *new])[-1]))
            if p
        }
    return expected


def distance(found, expected):
    """Total variation between two laws."""
    return sum(abs(found.get(k, 0) - expected.get(k, 0)) for k in {*found, *expected}) / 2
