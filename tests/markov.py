"""Models so small that the distribution of several tokens can be written down: Markov chains, in
which the next token depends on the last two alone."""

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
    vocab_size: int
    context: int = 10**6
    eos: tuple = ()


@dataclass(eq=False)
class Markov(Part):
    """``w[a, b]`` (V,) are the probabilities after tokens a, b. passes: the ids of each pass."""

    w: np.ndarray
    passes: list = field(default_factory=list)
    eos: tuple = ()
    frees_rows = False

    @property
    def config(self) -> Shape:
        return Shape(len(self.w), eos=self.eos)

    def new_state(self):
        return NotedState()

    def hidden(self, ids, state):
        state.ids += list(ids)
        state.position += len(ids)
        assert state.position == len(state.ids)
        self.passes.append(list(ids))

    def __call__(self, ids, state):
        self.hidden(ids, state)
        first = len(state.ids) - len(ids)
        with np.errstate(divide="ignore"):
            rows = [self.after(state.ids[: t + 1]) for t in range(first, len(state.ids))]
            return np.log(np.array(rows))

    def next_logits(self, ids, state):
        return self(ids, state)[-1]

    def next_argmax(self, ids, state):
        return int(self.next_logits(ids, state).argmax())

    def after(self, text):
        """The distribution (V,) of the token after this text."""
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
    return Markov(np.random.default_rng(seed).dirichlet([sharpness] * V, (V, V)))


def constant(p):
    """A model that gives the same probabilities after every text."""
    return Markov(np.broadcast_to(np.array(p), (3, 3, 3)))


def after_last(rows) -> Markov:
    """A model in which only the last token matters: ``rows[b]`` (V,) after token b."""
    rows = np.array(rows, float)
    return Markov(np.broadcast_to(rows, (len(rows), *rows.shape)))


def random_markov(V: int, seed: int, sharpness: float = 2.0) -> Markov:
    z = sharpness * np.random.default_rng(seed).standard_normal((V, V, V))
    return normalized(np.exp(z))


def noisy(model: Markov, seed: int, noise: float) -> Markov:
    """A model that is nearly the same."""
    z = np.log(model.w) + noise * np.random.default_rng(seed).standard_normal(model.w.shape)
    return normalized(np.exp(z))


def normalized(p) -> Markov:
    return Markov(p / p.sum(-1, keepdims=True))
