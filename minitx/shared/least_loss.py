"""The mean loss on calibration texts, and which of several models has the lowest."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minitx.progress import bar


def mean_loss(lm, texts: Sequence[list[int]]) -> float:
    """The mean negative log-likelihood of the texts' tokens, in nats."""
    from minitx.training.loss import token_losses  # training imports techniques

    losses = [token_losses(lm.logits(ids[:-1]), np.array(ids[1:])) for ids in texts]
    return float(np.concatenate(losses).mean(dtype=np.float64))


def least_loss(name: str, candidates: Sequence, make: Callable[[Any], Any], texts) -> Any:
    """The candidate with the lowest mean loss of ``make(candidate)``, a language model; losses that
    agree to six digits are ties, which go to the earlier candidate. name: of the progress bar."""
    shown = bar(candidates, f"{name}: choose", unit="candidate", delay=1.0)
    losses = [round(mean_loss(make(candidate), texts), 6) for candidate in shown]
    return candidates[int(np.argmin(losses))]
