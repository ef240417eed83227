"""The decoding loop (run the model, sample a token, feed it back) and the sampler.

The loop is a part of the language model, so a technique that skips whole forward passes
(speculative decoding, a prefix cache) replaces it by another ``TokenLoop``. Text, end-of-text
tokens and the length of the context are handled in lm.py."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from minitx import ops
from minitx.errors import MinitxError, abbreviate
from minitx.model import Transformer
from minitx.state import State
from minitx.tree import Part, part, walk
from minitx.values import Range, above, as_number, at_least


class Sampler:
    """Samples the next token from logits (V,): ``sampler(logits) -> id``.

    temperature 0 is greedy decoding: the argmax. Otherwise logits are divided by the temperature,
    ``top_k`` keeps the k largest, ``top_p`` keeps the smallest set with probability mass p (nucleus
    sampling, Holtzman et al., 2020, arXiv:1904.09751), and one token is drawn. Ties go to the lower
    id. The same seed draws the same numbers on every machine; without one, runs differ.

    Without a temperature, the other options decide: who gives top_k, top_p or a seed wants to
    sample, so the temperature is 1; with none of them it is 0. MinitxError for an option that has
    the wrong type (any Python or NumPy number will do) or is out of range.
    """

    def __init__(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ):
        if temperature is None:
            temperature = 0 if top_k is None and top_p is None and seed is None else 1
        self.temperature: float = number("temperature", temperature)
        # None stays None: keep all, do not cut, or draw other numbers in each run.
        self.top_k = None if top_k is None else number("top_k", top_k)
        self.top_p = None if top_p is None else number("top_p", top_p)
        self.seed = None if seed is None else number("seed", seed)
        # Numbers in [0, 1). Python keeps this stream the same in all versions; NumPy may change it.
        self.uniform = random.Random(self.seed).random

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
            p[~nucleus(p, self.top_p, np.result_type(logits, np.float32))] = 0
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


def nucleus(p: np.ndarray, mass: float, precision=np.float64) -> np.ndarray:
    """(V,) booleans: the smallest set of tokens whose probabilities p (V,) reach ``mass``, most
    likely first; at least one token.

    A sum reaches the mass also if only rounding keeps it below: of ten equal probabilities nine
    reach 0.9, although nine times 0.1 adds up to 0.8999999999999999 in floats. precision: the type
    of the logits that p comes from."""
    # V additions in float64 are off by V units in the last place at most. A logit z was rounded by
    # about |z| units of its own type, so its probability is off by as many: 8 are allowed for.
    unit = max(np.finfo(dtype).eps for dtype in (precision, p.dtype))
    slack = p.size * np.finfo(np.float64).eps + 8 * unit
    # A kept token and all less likely ones together have more than 1 - mass. It is the most likely
    # of these at most V tokens, so its own p is above (1 - mass) / V: tokens below that need not be
    # sorted. (Half of that, to be safe from rounding.)
    likely = np.flatnonzero(p >= 0.5 * (1 - mass) / p.size)
    order = likely[np.argsort(-p[likely], kind="stable")]
    total = p[order].cumsum(dtype=np.float64)
    reached = total.searchsorted(mass - slack)  # index of the first sum that reaches the mass
    kept = np.zeros(p.size, bool)
    kept[order[: reached + 1]] = True
    return kept


OPTIONS = {  # of generation: the kind of number, its range, and both in words
    "max_new_tokens": (int, at_least(0, limit=math.inf), "an integer >= 0"),
    "temperature": (float, Range(0, math.inf, open_high=True), "a finite number >= 0"),
    "top_k": (int, at_least(1, limit=math.inf), "an integer >= 1"),
    "top_p": (float, above(0, 1), "above 0 and at most 1"),
    "seed": (int, at_least(0, limit=math.inf), "an integer >= 0"),
}


def number(name: str, value):
    """An option of generation as a Python ``int`` or ``float``; MinitxError if it is none or is out
    of range. Converted once, here: arithmetic with NumPy's unsigned integers would wrap around."""
    kind, allowed, words = OPTIONS[name]
    try:
        found = as_number(value, kind)
    except ValueError:
        found = None
    if found is None or found not in allowed:
        raise MinitxError(f"{name} must be {words}, got {abbreviate(value)}.")
    return found


def next_token(model: Transformer, ids, state: State, choose: Sampler) -> int:
    """The next token after the ids, which continue the sequence of ``state``."""
    if choose.temperature == 0:
        return model.next_argmax(ids, state)
    return choose(model.next_logits(ids, state))


def prefill(model: Transformer, text: Sequence[int], state: State) -> None:
    """Run what the state does not hold yet of the prompt, except the last token: the first pass of
    the loop runs that, together with guesses of what follows. No logits are needed."""
    if state.position < len(text) - 1:
        model.hidden(text[state.position : -1], state)


def up_to_end(tokens: Iterable[int], eos: Sequence[int]) -> list[int]:
    """The tokens up to the first end-of-text id, that one included."""
    found: list[int] = []
    for token in tokens:
        found.append(token)
        if token in eos:
            break
    return found


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
        """The same for B prompts: yields B tokens at a time, one per prompt; after the end of its
        text (``config.eos``) a row may yield anything. The default decodes them separately, taking
        turns: correct for every loop, but without any batching."""
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
