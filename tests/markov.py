"""Toy models for tests of decoding loops: the next token depends on the last two alone."""

from dataclasses import dataclass, field

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
            rows = [self.row(state.ids[: t + 1]) for t in range(first, len(state.ids))]
            return np.log(np.array(rows))

    def row(self, ids):
        """The distribution (V,) of the token after these."""
        before = ids[-2] if len(ids) > 1 else 0
        return self.w[before, ids[-1]]

    def next_logits(self, ids, state):
        return self(ids, state)[-1]

    def next_argmax(self, ids, state):
        return int(self.next_logits(ids, state).argmax())


def after_last(rows) -> Markov:
    """A model in which only the last token matters: ``rows[b]`` (V,) after token b."""
    rows = np.array(rows, float)
    return Markov(np.broadcast_to(rows, (len(rows), *rows.shape)))


def random_markov(V: int, seed: int, sharpness: float = 2.0) -> Markov:
    z = sharpness * np.random.default_rng(seed).standard_normal((V, V, V))
    p = np.exp(z)
    return Markov(p / p.sum(-1, keepdims=True))


def noisy(model: Markov, seed: int, noise: float) -> Markov:
    """A model that is nearly the same."""
    z = np.log(model.w) + noise * np.random.default_rng(seed).standard_normal(model.w.shape)
    p = np.exp(z)
    return Markov(p / p.sum(-1, keepdims=True))
