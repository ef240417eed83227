"""The decoding loop (run the model, sample a token, feed it back) and the sampler.

The loop is a part of the language model, so a technique that skips whole forward passes
(speculative decoding, a prefix cache) replaces it by another ``TokenLoop``. Text, end-of-text
tokens and the length of the context are handled in lm.py."""

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
    """Samples the next token from logits (V,): ``sampler(logits) -> id``.

    temperature 0 is greedy decoding: the argmax. Otherwise logits are divided by the temperature,
    ``top_k`` keeps the k largest, ``top_p`` keeps the smallest set with probability mass p (nucleus
    sampling, Holtzman et al., 2020, arXiv:1904.09751), and one token is drawn. Ties go to the lower
    id. The same seed draws the same numbers on every machine; without one, runs differ.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ):
        if not (isinstance(temperature, Real) and 0 <= temperature < math.inf):
            _refuse("temperature", temperature, "a finite number >= 0")
        if not (top_k is None or isinstance(top_k, Integral) and top_k >= 1):
            _refuse("top_k", top_k, "an integer >= 1")
        if not (top_p is None or isinstance(top_p, Real) and 0 < top_p <= 1):
            _refuse("top_p", top_p, "above 0 and at most 1")
        if not (seed is None or isinstance(seed, Integral) and seed >= 0):
            _refuse("seed", seed, "an integer >= 0")
        self.temperature, self.top_k, self.seed = float(temperature), top_k, seed
        self.top_p = None if top_p is None else float(top_p)
        # Numbers in [0, 1). Python keeps this stream the same in all versions; NumPy may change it.
        self.uniform = random.Random(None if seed is None else int(seed)).random

    def __call__(self, logits: np.ndarray) -> int:
        if self.temperature == 0:
            return ops.argmax_token(logits)
        return self.draw(self.probabilities(logits))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The distribution (V,) that a token is drawn from, in float64; at temperature 0,
        one-hot."""
        best = ops.argmax_token(logits)
        if self.temperature == 0:
            return np.eye(1, logits.size, best)[0]
        z = logits.astype(np.float64)
        z -= z[best]  # <= 0, so exp cannot overflow
        z /= max(self.temperature, 1e-99)  # a lower temperature could overflow
        p = np.exp(z, out=z)
        if self.top_k is not None and self.top_k < p.size:
            p[~top_k_mask(logits, self.top_k)] = 0
        p /= p.sum()
        if self.top_p is not None and self.top_p < 1:
            p[~nucleus(p, self.top_p)] = 0
            p /= p.sum()
        return p

    def draw(self, p: np.ndarray) -> int:
        """Draw a token with probabilities p (V,), which need not sum to 1."""
        total = p.cumsum()
        # uniform() < 1, so this is below the last sum; "right" skips tokens of probability 0.
        return int(total.searchsorted(self.uniform() * total[-1], side="right"))


def top_k_mask(x: np.ndarray, k: int) -> np.ndarray:
    """(V,) booleans: exactly the k largest of x (V,); ties go to the lower id."""
    least = np.partition(x, -k)[-k]  # without sorting the rest
    kept = x > least
    kept[np.flatnonzero(x == least)[: k - kept.sum()]] = True
    return kept


def nucleus(p: np.ndarray, mass: float) -> np.ndarray:
    """(V,) booleans: the smallest set of tokens whose probabilities p (V,) reach ``mass``, most
    likely first; at least one token."""
    # A kept token and all less likely ones together have more than 1 - mass. It is the most likely
    # of these at most V tokens, so its own p is above (1 - mass) / V: tokens below that need not be
    # sorted. (Half of that, to be safe from rounding.)
    likely = np.flatnonzero(p >= 0.5 * (1 - mass) / p.size)
    order = likely[np.argsort(-p[likely], kind="stable")]
    reached = p[order].cumsum().searchsorted(mass)  # index of the first sum >= mass
    kept = np.zeros(p.size, bool)
    kept[order[: reached + 1]] = True
    return kept


def _refuse(name: str, value, expected: str):
    raise MinitxError(f"{name} must be {expected}, got {value!r}.")


def next_token(model: Transformer, ids, state: State, choose: Sampler) -> int:
    """The next token after the ids, which continue the sequence of ``state``."""
    if choose.temperature == 0:
        return model.next_argmax(ids, state)
    return choose(model.next_logits(ids, state))


class TokenLoop(Part):
    """Base class of decoding loops."""

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` new tokens after the prompt ``ids``.

        The state may already hold a prefix of the prompt, but not all of it (``state.position <
        len(ids)``). The caller stops by not asking for more tokens, so a token is fed to the model
        only when the next one is wanted. Every loop yields tokens of the same distribution,
        ``choose.probabilities``."""
        raise NotImplementedError

    def batch(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        choosers: Sequence[Sampler],
        limit: int,
    ) -> Iterator[list[int]]:
        """The same for B prompts: yields B tokens at a time, one per prompt. The default decodes
        them separately, taking turns: correct for every loop, but without any batching."""
        rows = [
            self(model, new_state(model, prompt), prompt, choose, limit)
            for prompt, choose in zip(prompts, choosers, strict=True)
        ]
        return map(list, zip(*rows, strict=True))


def new_state(model: Transformer, prompt: Sequence[int]) -> State:
    """An empty state for a sequence that begins with this prompt."""
    state = model.new_state()
    state.prompt = len(prompt)
    return state


@part
class Autoregressive(TokenLoop):
    """One forward pass per token."""

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
        """B prompts in one batch. Shorter prompts are padded on the left; the state knows where
        each sequence really starts."""
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
