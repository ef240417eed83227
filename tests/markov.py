"""Models so small that the distribution of several tokens can be written down: Markov chains."""

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from minitx.state import State
from minitx.tree import Part


class NotedState(State):
    """A state that notes the ids, so that a Markov model can look them up."""

    def __init__(self):
        super().__init__(0, 10**6)
        self.ids = []

    def rewind(self, position):
        super().rewind(position)
        del self.ids[position:]


@dataclass
class Shape:
    vocab_size: int = 3
    context: int = 10**6


@dataclass(eq=False)
class Markov(Part):
    """A model in which the next token depends on the last two: ``w[a, b]`` (V,) are the
    probabilities after tokens a, b."""

    w: np.ndarray
    config: Shape = field(default_factory=Shape)

    def new_state(self):
        return NotedState()

    def hidden(self, ids, state):
        state.ids += list(ids)
        state.position += len(ids)

    def __call__(self, ids, state):
        assert state.position == len(state.ids)
        self.hidden(ids, state)
        n = len(state.ids)
        pairs = [state.ids[max(i - 2, 0) : i] for i in range(n - len(ids) + 1, n + 1)]
        return np.log(np.stack([self.after(pair) for pair in pairs]))

    def next_logits(self, ids, state):
        return self(ids, state)[-1]

    def after(self, text):
        a, b = (0, *text)[-2:]
        return self.w[a, b]

    def fractions(self, text):
        """The same as exact fractions, whose sum is exactly 1."""
        row = [Fraction(share) for share in self.after(text)]
        return [share / sum(row) for share in row]

    def distribution(self, text, n):
        """{n tokens after the text: probability}"""
        found = {(): 1.0}
        for _ in range(n):
            found = {
                (*new, token): share * p
                for new, share in found.items()
                for token, p in enumerate(self.after((*text, *new)))
            }
        return found


def markov(seed, sharpness=1.0, V=3):
    w = np.random.default_rng(seed).dirichlet([sharpness] * V, (V, V))
    return Markov(w, Shape(V))


def constant(p):
    """A model that gives the same probabilities after every text."""
    return Markov(np.broadcast_to(np.array(p), (3, 3, 3)))
