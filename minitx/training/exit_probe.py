"""A read-out of the stream that says whether the deeper blocks will change the next token any more.

Logistic regression, one for all depths: CALM's early exit classifier (Schuster et al., 2022, arXiv
2207.07061), with the model itself left as it is. ``minitx.skip.early_exit`` asks it.
"""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from minitx.errors import MinitxError
from minitx.shared.confidence import sigmoid
from minitx.training.layerskip import record

TEXTS = 24  # stories: about 5,000 tokens, which keeps it near a second for the shipped models
NEWTON_STEPS = 8  # each about doubles the digits that are right
RIDGE = 1.0  # added to the curvature: as sure as one example more in each direction
SHOWN_AFTER = 2.0  # seconds before a progress bar appears


def train_probe(lm, texts: Sequence) -> tuple[np.ndarray, float]:
    """w (D,) and b, so that 1 / (1 + exp(-(h w + b))) says how likely it is that final norm
    and head read the same token from a stream h after some block as after the last one.

    texts: lists of ids, or strings; the examples are all their tokens after each block but the
    last. The two outcomes weigh alike, however often each occurs. The same texts give the same
    numbers. Raises MinitxError if one of the outcomes never occurs.
    """
    h, same = examples(lm, texts)
    if same.all() or not same.any():
        raise MinitxError(
            f"early_exit cannot train its probe: after {'every' if same.any() else 'no'} block the "
            f"head reads what it reads after the last, on all {len(same)} examples."
        )
    w, b = logistic(h, same)
    return w.astype(h.dtype), b


def examples(lm, texts: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Streams (n, D) after each block but the last, and whether (n,) the head reads from each what
    it reads after the last."""
    model, found = record(lm.model)
    streams, same = [], []
    for text in tqdm(texts, desc="probe", unit="text", delay=SHOWN_AFTER):
        found.clear()
        model.hidden(lm.encode(text))
        best = [model.head(model.norm(x)).argmax(-1) for x in found]  # L times (T,)
        streams += found[:-1]
        same += [tokens == best[-1] for tokens in best[:-1]]
    if not streams:
        raise MinitxError("early_exit cannot train its probe on nothing; give it a text.")
    return np.concatenate(streams), np.concatenate(same)


def logistic(x, y, ridge: float = RIDGE) -> tuple[np.ndarray, float]:
    """w (D,) in float64 and b of the balanced logistic regression of y (n,) booleans on x (n, D).

    Newton's method (iteratively reweighted least squares) on columns scaled to mean 0 and spread 1,
    minimising sum_i weight_i log(1 + exp(-+ z_i)) + ridge |w|^2 / 2.
    """
    x = x.astype(np.float64)
    mean, spread = x.mean(0), x.std(0) + 1e-12
    x = np.concatenate([(x - mean) / spread, np.ones((len(x), 1))], axis=1)  # (n, D + 1)
    weight = np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))  # each outcome weighs n / 2
    penalty = np.full(x.shape[1], ridge)
    penalty[-1] = 1e-9  # b is free, but for what keeps the equations solvable
    w = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = sigmoid(x @ w)
        slope = x.T @ (weight * (p - y)) + penalty * w
        curvature = (x.T * (weight * p * (1 - p))) @ x + np.diag(penalty)
        w -= np.linalg.solve(curvature, slope)
    scaled = w[:-1] / spread
    return scaled, float(w[-1] - scaled @ mean)
