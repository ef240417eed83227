"""The token loop: run the model, choose a token, feed it back. And how a token is chosen.

The loop is a part of the language model, so a technique that skips whole passes of the model
(speculation, a cache of prefixes or answers) replaces it by another ``TokenLoop``. Text,
end-of-text tokens and the limit of the context are not handled here: see lm.py.
"""

import math
import random
from collections.abc import Iterator, Sequence
from numbers import Integral, Real

import numpy as np

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.state import State
from minitx.tree import Part, part, walk


class Sampler:
    """Chooses the next token from logits (V,): ``choose(logits) -> id``.

    temperature 0 takes the largest logit. Otherwise logits are divided by the temperature,
    ``top_k`` keeps the k largest, ``top_p`` the fewest of those whose probabilities reach p
    (Holtzman et al., 2020, arXiv:1904.09751), and one is drawn. Among equals the smallest ids come
    first, everywhere. The same seed draws the same numbers on every machine; without one they
    differ from run to run.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ):
        if not (isinstance(temperature, Real) and 0 <= temperature < math.inf):
            _refuse("The temperature", temperature, "a finite number >= 0")
        if not (top_k is None or isinstance(top_k, Integral) and top_k >= 1):
            _refuse("top_k", top_k, "a whole number of at least 1")
        if not (top_p is None or isinstance(top_p, Real) and 0 < top_p <= 1):
            _refuse("top_p", top_p, "a number above 0 and at most 1")
        if not (seed is None or isinstance(seed, Integral) and seed >= 0):
            _refuse("The seed", seed, "a whole number of at least 0")
        self.temperature, self.top_k, self.seed = float(temperature), top_k, seed
        self.top_p = None if top_p is None else float(top_p)
        # Numbers in [0, 1). Python guarantees this stream for ever, NumPy only until a new version.
        self.uniform = random.Random(None if seed is None else int(seed)).random

    def __call__(self, logits: np.ndarray) -> int:
        if self.temperature == 0:
            return ops.argmax_token(logits)
        return self.draw(self.probabilities(logits))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The distribution (V,) that a token is drawn from, in float64; at temperature 0 all of it
        is on one token."""
        best = ops.argmax_token(logits)
        if self.temperature == 0:
            return np.eye(1, logits.size, best)[0]
        z = logits.astype(np.float64)
        z -= z[best]  # now <= 0, so that exp cannot overflow
        z /= max(self.temperature, 1e-99)  # colder is all the same, but the quotient could overflow
        p = np.exp(z, out=z)
        if self.top_k is not None and self.top_k < p.size:
            p[~among_largest(logits, self.top_k)] = 0
        p /= p.sum()
        if self.top_p is not None and self.top_p < 1:
            p[~nucleus(p, self.top_p)] = 0
            p /= p.sum()
        return p

    def draw(self, p: np.ndarray) -> int:
        """One of the tokens by their probabilities p (V,), whose sum need not be 1."""
        total = p.cumsum()
        # uniform() < 1, so this is below the last sum; "right" passes by tokens of probability 0.
        return int(total.searchsorted(self.uniform() * total[-1], side="right"))


def among_largest(x: np.ndarray, k: int) -> np.ndarray:
    """(V,) booleans: exactly the k largest of x (V,), of equals those with the smallest ids."""
    least = np.partition(x, -k)[-k]  # without sorting all the rest
    kept = x > least
    kept[np.flatnonzero(x == least)[: k - kept.sum()]] = True
    return kept


def nucleus(p: np.ndarray, mass: float) -> np.ndarray:
    """(V,) booleans: the fewest tokens, likeliest first, whose probabilities p (V,) reach ``mass``;
    always at least one."""
    # What a kept token and all behind it weigh is more than 1 - mass, so its own p is more than
    # the V-th part of that; the many below need not be sorted. (Half, to be safe from rounding.)
    likely = np.flatnonzero(p >= 0.5 * (1 - mass) / p.size)
    order = likely[np.argsort(-p[likely], kind="stable")]
    reached = p[order].cumsum().searchsorted(mass)  # the place of the first sum >= mass
    kept = np.zeros(p.size, bool)
    kept[order[: reached + 1]] = True
    return kept


def _refuse(name: str, value, needed: str):
    raise MinitxError(f"{name} is {value!r}; {needed} is needed.")


def next_token(model: Transformer, ids, state: State, choose: Sampler) -> int:
    """The token after the ids, which continue the sequence of ``state``."""
    if choose.temperature == 0:
        return model.next_argmax(ids, state)
    return choose(model.next_logits(ids, state))


class TokenLoop(Part):
    """Base of every token loop."""

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` new tokens after the prompt ``ids``.

        The state is given: it may hold the first tokens of the prompt already, but not all of them
        (``state.position < len(ids)``). The caller stops by not asking for more, so a token is run
        through the model only when the next one is wanted. Every loop yields tokens of the same
        distribution, for which ``choose.probabilities`` and ``choose.draw`` are there.
        """
        raise NotImplementedError

    def batch(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        choosers: Sequence[Sampler],
        limit: int,
    ) -> Iterator[list[int]]:
        """The same for B prompts: yields B tokens at a time, one for each. By default each prompt
        is decoded by itself, in turns: right for every loop, but nothing is shared."""
        rows = [
            self(model, new_state(model, prompt), prompt, choose, limit)
            for prompt, choose in zip(prompts, choosers, strict=True)
        ]
        return map(list, zip(*rows, strict=True))


def new_state(model: Transformer, prompt: Sequence[int]) -> State:
    """The empty state of a sequence that begins with this prompt."""
    state = model.new_state()
    state.prompt = len(prompt)
    return state


@part
class Autoregressive(TokenLoop):
    """One token at a time, each from the logits after everything before it."""

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        ids = ids[state.position :]
        for _ in range(limit):
            token = next_token(model, ids, state, choose)
            yield token
            ids = (token,)

    def batch(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        choosers: Sequence[Sampler],
        limit: int,
    ) -> Iterator[list[int]]:
        """B prompts in step, in one batch. Shorter prompts are padded on the left; the state knows
        where each row really starts."""
        if any(node.one_sequence for _, node in walk(model)):
            yield from super().batch(model, prompts, choosers, limit)
            return
        longest = max(map(len, prompts))
        start = np.array([longest - len(prompt) for prompt in prompts])
        ids = np.zeros((len(prompts), longest), int)
        for row, prompt, first in zip(ids, prompts, start):
            row[first:] = prompt
        state = model.new_state(start if start.any() else None)
        state.prompt = longest
        for _ in range(limit):
            logits = model.next_logits(ids, state)  # (B, V)
            tokens = [choose(row) for choose, row in zip(choosers, logits)]
            yield tokens
            ids = np.array(tokens)[:, None]  # (B, 1)
