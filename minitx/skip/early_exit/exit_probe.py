"""Train the exit probe (measure=probe): logistic regression on hidden states, one for all layers.

CALM's early-exit classifier (Schuster et al., 2022, arXiv 2207.07061); the model itself is frozen.
"""

from collections.abc import Sequence

import numpy as np

from minitx.errors import MinitxError
from minitx.progress import bar
from minitx.shared.logistic_regression import fit_logistic
from minitx.technique import blocks_of
from minitx.training.layerskip import record

TEXTS = 24  # stories or passages: about 5,000 tokens, near a second for the shipped models
MOST_EXAMPLES = 40_000  # enough for any width; bounds memory and the runs of the head
RIDGE = 1.0  # L2 penalty on the weights of the standardized features


def train_exit_probe(lm, texts: Sequence) -> tuple[np.ndarray, float]:
    """w (D,) and b of the probe: for h after any layer, sigmoid(w . h + b) is the probability that
    argmax head(norm(h)) is already the token that the last layer would predict.

    texts: lists of ids, or strings; every token after every layer but the last is an example (of
    more than MOST_EXAMPLES, tokens at equal distances). Both classes have the same total weight.
    Deterministic. MinitxError if a class has no example.
    """
    h, same = examples(lm, texts)
    if same.all() or not same.any():
        raise MinitxError(
            "early_exit cannot train its probe: expected examples of both classes, but after "
            f"{'every' if same.any() else 'no'} layer the model predicts the same token as after "
            f"the last one, on all {len(same)} examples; use measure=softmax or saturation."
        )
    w, b = logistic_regression(h, same)
    return w.astype(h.dtype), b


def examples(lm, texts: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """The hidden states (n, D) after each layer but the last, and (n,) booleans: is the predicted
    token the same as after the last layer?"""
    model, recorded = record(lm.model)
    states, same = [], []
    encoded = [lm.encode(text) for text in texts]
    total = sum(map(len, encoded)) * (len(blocks_of(lm)) - 1)
    step = max(-(-total // MOST_EXAMPLES), 1)
    for ids in bar(encoded, "early exit: train the probe", unit="text", delay=1.0):
        recorded.clear()
        model.hidden(ids)
        some = [h[::step] for h in recorded]  # every step-th token
        predicted = [model.head(model.norm(h)).argmax(-1) for h in some]  # L times (T,)
        states += some[:-1]
        same += [tokens == predicted[-1] for tokens in predicted[:-1]]
    if not states:
        raise MinitxError("early_exit: expected at least one text to train the probe on; got none.")
    return np.concatenate(states), np.concatenate(same)


def logistic_regression(x, y, ridge: float = RIDGE) -> tuple[np.ndarray, float]:
    """Class-balanced logistic regression of y (n,) booleans on x (n, D): w (D,) in float64, and
    b."""
    weight = np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))  # each class sums to n / 2
    return fit_logistic(x, y, weight, ridge)
