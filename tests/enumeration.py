"""The exact distribution of what a random algorithm returns: enumerate every outcome of its draws.

No statistics and no tolerance for bad luck: two distributions are compared number by number.
"""

import math
from collections import defaultdict

import numpy as np

from minitx.decode import Sampler


class ScriptedSampler(Sampler):
    """A sampler whose draws follow a script: ``script[i]`` is the index, among the tokens of
    nonzero probability, that draw i returns. After the end of the script it returns the first."""

    def __init__(self, script: list[int], **options):
        super().__init__(**dict(temperature=1.0) | options)
        self.script = script
        self.draws = []  # (probabilities of the possible tokens, index returned)

    def draw(self, p):
        possible = np.flatnonzero(p)
        i = len(self.draws)
        if i == len(self.script):
            self.script.append(0)
        self.draws.append(([*p[possible] / p.sum()], self.script[i]))
        return int(possible[self.script[i]])


def exact_distribution(run, **options) -> dict:
    """{result: probability} of ``run(sampler)``, over every outcome of its draws."""
    found, script = defaultdict(float), []
    while True:
        sampler = ScriptedSampler(script, **options)
        result = run(sampler)
        found[result] += math.prod(p[i] for p, i in sampler.draws)
        while script and script[-1] + 1 == len(sampler.draws[len(script) - 1][0]):
            script.pop()  # that draw has no further outcome
        if not script:
            return found
        script[-1] += 1


def model_distribution(model, prompt, n: int, **options) -> dict:
    """{n tokens after the prompt: probability}, from the model's own next-token distributions."""
    probabilities, expected = Sampler(**options).probabilities, {(): 1.0}
    for _ in range(n):
        expected = {
            (*new, token): share * p
            for new, share in expected.items()
            for token, p in enumerate(probabilities(model([*prompt, *new])[-1]))
            if p
        }
    return expected


def total_variation(found: dict, expected: dict) -> float:
    """The total variation distance between two distributions: 0 if equal, 1 if disjoint."""
    return sum(abs(found.get(k, 0) - expected.get(k, 0)) for k in {*found, *expected}) / 2
