"""The token loop: run the model, choose a token, feed it back."""

from collections.abc import Iterator, Sequence

import numpy as np

from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.tree import Part, part


@part
class Autoregressive(Part):
    """One token at a time, each from the logits after everything before it."""

    def __call__(
        self, model: Transformer, prompt: Sequence[int], choose, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` new tokens after ``prompt`` (at least one id).

        ``choose(logits (V,)) -> id`` is the sampler. The caller stops by not asking for more, so
        the last token that is looked at is never run through the model.
        """
        state = model.new_state()
        ids = prompt
        for _ in range(limit):
            token = choose(model.next_logits(ids, state))
            yield token
            ids = (token,)

    def batch(
        self, model: Transformer, prompts: Sequence[Sequence[int]], choosers: Sequence, limit: int
    ) -> Iterator[np.ndarray]:
        """The same for B prompts in step: yields (B,) ids, one for each row.

        Shorter prompts are padded on the left; the state knows where each row really starts.
        """
        longest = max(map(len, prompts))
        start = np.array([longest - len(p) for p in prompts])
        ids = np.zeros((len(prompts), longest), int)
        for row, p, s in zip(ids, prompts, start):
            row[s:] = p
        state = model.new_state(start if start.any() else None)
        for _ in range(limit):
            logits = model.next_logits(ids, state)  # (B, V)
            ids = np.array([[choose(row)] for choose, row in zip(choosers, logits)])  # (B, 1)
            yield ids[:, 0]


class Sampler:
    """Chooses the next token from logits (V,), by greedy choice or by chance.

    temperature 0 takes the largest logit (the smallest id among equals). Otherwise the logits are
    divided by the temperature, ``top_k`` keeps the k largest, ``top_p`` keeps the fewest tokens
    whose probabilities reach p (Holtzman et al., 2020), and one is drawn. The same seed draws the
    same tokens.
    """

    def __init__(self, temperature=0.0, top_k=None, top_p=None, seed=None):
        if not temperature >= 0 or temperature == float("inf"):
            raise MinitxError(f"The temperature is {temperature}; a finite number >= 0 is needed.")
        if top_k is not None and (top_k != int(top_k) or top_k < 1):
            raise MinitxError(f"top_k is {top_k}; a whole number of at least 1 is needed.")
        if top_p is not None and not 0 < top_p <= 1:
            raise MinitxError(f"top_p is {top_p}; a number above 0 and at most 1 is needed.")
        if seed is not None and (seed != int(seed) or seed < 0):
            raise MinitxError(f"The seed is {seed}; a whole number of at least 0 is needed.")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.rng = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        p = self.probabilities(logits)
        # searchsorted on the running sum: one uniform number per token, whatever V is
        total = p.cumsum()
        return int(total.searchsorted(self.rng.random() * total[-1], side="right"))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The distribution (V,) that a token is drawn from, in float64; temperature 0 puts
        everything on the greedy token."""
        if self.temperature == 0:
            return np.eye(1, logits.shape[-1], int(logits.argmax()))[0]
        z = logits.astype(np.float64) / self.temperature
        if self.top_k is not None and self.top_k < z.size:
            kept = np.argsort(-z, kind="stable")[: self.top_k]
            z = _only(kept, z)
        p = np.exp(z - z.max())
        p /= p.sum()
        if self.top_p is not None:
            order = np.argsort(-p, kind="stable")
            before = p[order].cumsum() - p[order]  # mass of the tokens that rank higher
            p = np.where(np.isin(np.arange(p.size), order[before < self.top_p]), p, 0.0)
            p /= p.sum()
        return p


def _only(kept: np.ndarray, z: np.ndarray) -> np.ndarray:
    out = np.full_like(z, -np.inf)
    out[kept] = z[kept]
    return out
