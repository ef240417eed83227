"""Exercise 22: Delta networks without drift (25 minutes)

The inputs of a product x W often change little from one token to the next: in sound and in video
nearly always, in a language model after attention, which returns an average over many tokens. If
x changes in a few columns only, so does its product, and we need not multiply the others:

    x' W  =  x W + (x' - x) W

Let ref be the input for which the product is known so far: y = ref W. For the first token, ref =
x[0], and everything is multiplied: y = x[0] W. For every later token t = 1, 2, ...:

    send column i     if  |x[t, i] - ref[i]| > threshold
    y   = y + the sum over the columns i that are sent of (x[t, i] - ref[i]) W[i]
    ref[i] = x[t, i]  for the columns that are sent; the others keep their old value

The last line is the point of the exercise. A column that is not sent keeps its difference, which
can grow until it is sent. So no column of ref is ever further than the threshold from x[t], in
however long a text. If ref became x[t] in all columns, the differences that were not sent would be
forgotten, and would add up: the result drifts away.

    x          (T, D)   T >= 1 tokens
    W          (D, F)
    threshold  a number >= 0
    y          (T, F)   row t is the y of token t; row 0 is x[0] W
    sent       (T, D)   booleans: which columns were sent; all of row 0

By hand, with threshold 0.5 and W = [[1], [10]]:

    x[0] = [1.0  2.0]                                 y = 1 + 20        = 21     ref = [1.0  2.0]
    x[1] = [1.4  3.0]   differences [0.4  1.0]        y = 21 + 1.0 * 10 = 31     ref = [1.0  3.0]
    x[2] = [1.8  3.2]   differences [0.8  0.2]        y = 31 + 0.8 * 1  = 31.8   ref = [1.8  3.0]

The first column went up by 0.4 twice. After the second time the difference is 0.8, and it is sent.

    >>> x = np.array([[1.0, 2.0], [1.4, 3.0], [1.8, 3.2]])
    >>> y, sent = delta_product(x, np.array([[1.0], [10.0]]), 0.5)
    >>> y.round(2).tolist()
    [[21.0], [31.0], [31.8]]
    >>> sent.tolist()
    [[True, True], [False, True], [True, False]]

Source: Neil et al., "Delta Networks for Optimized Recurrent Network Computation", ICML 2017.
"""

import numpy as np

from minitx import ledger
from minitx.learn.exercise import Exercise, Mistake
from minitx.shared.products_with_layer import StatefulProduct, replace_products
from minitx.tree import part


# solution
def delta_product(x, W, threshold):
    """x (T, D), W (D, F), threshold -> y (T, F), sent (T, D) booleans"""
    ref = x[0].copy()
    y = np.empty((len(x), W.shape[1]))
    y[0] = ref @ W
    sent = np.ones(x.shape, bool)
    for t in range(1, len(x)):
        change = x[t] - ref
        sent[t] = np.abs(change) > threshold
        y[t] = y[t - 1] + change[sent[t]] @ W[sent[t]]  # only these rows of W are read
        ref[sent[t]] = x[t, sent[t]]
    return y, sent


# end of solution


def in_loops(x, W, threshold):
    """The rule, column by column."""
    (T, D), F = x.shape, W.shape[1]
    y, sent, ref = np.zeros((T, F)), np.zeros((T, D), bool), np.zeros(D)
    for t in range(T):
        if t > 0:
            y[t] = y[t - 1]
        for i in range(D):
            change = x[t, i] - ref[i]
            if t == 0 or abs(change) > threshold:
                for f in range(F):
                    y[t, f] += change * W[i, f]
                ref[i] = x[t, i]
                sent[t, i] = True
    return y, sent


def flawed(
    x,
    W,
    threshold,
    *,
    update="sent",
    absolute=True,
    inverted=False,
    adds="change",
    to="last",
    begin="all",
    against="ref",
    alias=False,
):
    T, D = x.shape
    ref, y, sent = x[0].copy(), np.empty((T, W.shape[1])), np.ones((T, D), bool)
    if begin == "zero":
        sent[0] = (np.abs(x[0]) if absolute else x[0]) > threshold
        ref = np.where(sent[0], x[0], 0)
    y[0] = ref @ W
    for t in range(1, T):
        change = x[t] - ref
        tested = x[t] if against == "zero" else change
        sent[t] = (np.abs(tested) if absolute else tested) > threshold
        if inverted:
            sent[t] = ~sent[t]
        add = {"change": change, "value": x[t], "all changes": change}[adds]
        add = add if adds == "all changes" else np.where(sent[t], add, 0)
        y[t] = {"last": y[t - 1], "first": y[0], "none": 0}[to] + add @ W
        moved = {"sent": sent[t], "all": True, "none": False}[update]
        ref = np.where(moved, x[t], ref)
    return np.broadcast_to(y[-1], y.shape) if alias else y, sent


MISTAKES = (
    Mistake(
        "You update ref in all columns. What was not sent is forgotten then, and the result "
        "drifts: only the columns that were sent get their new value.",
        update="all",
    ),
    Mistake(
        "You never update ref: after a column was sent, ref must hold the value that was sent.",
        update="none",
    ),
    Mistake(
        "You send only columns that grew. Take the absolute value of the difference.",
        absolute=False,
    ),
    Mistake(
        "You send the columns that changed little, and leave out the others: it is the other way "
        "round.",
        inverted=True,
    ),
    Mistake(
        "You add x[t, i] W[i]. y contains the old value already: add only the difference, "
        "(x[t, i] - ref[i]) W[i].",
        adds="value",
    ),
    Mistake(
        "You add the differences of all columns, also of those that are not sent.",
        adds="all changes",
    ),
    Mistake(
        "You start from nothing at each token. Add the changes to the y of the token before.",
        to="none",
    ),
    Mistake(
        "You add the changes to the y of the first token; add them to that of the token before.",
        to="first",
    ),
    Mistake(
        "You compare the first token with 0. It is always sent in all columns: ref = x[0].",
        begin="zero",
    ),
    Mistake(
        "You compare x[t] itself with the threshold; compare its difference from ref.",
        against="zero",
    ),
    Mistake(
        "All rows of your y are the same array: y += ... changes the rows that are stored already. "
        "Write y = y + ... instead.",
        alias=True,
    ),
)


def cases(rng):
    """Inputs that move slowly and drift, of different widths; a single token; a threshold of 0."""
    for T, D, F, threshold in ((6, 5, 3, 0.5), (12, 4, 2, 0.8), (1, 3, 2, 0.5), (4, 3, 4, 0.0)):
        steps = rng.uniform(-0.45, 0.6, (T, D))
        steps[:, 0] = rng.uniform(0.25, 0.35, T)  # too little to be sent at once
        steps[:, 1] = rng.choice([-1.3, 0.1], T)
        start = rng.uniform(-2, 2, D)
        start[0] = 0.2  # below the thresholds
        yield start + np.cumsum(steps, 0) - steps[0], rng.standard_normal((D, F)), threshold


# In the model ------------------------------------------------------------------------------------

THRESHOLD = 0.5  # of the rms of the input


@part
class StudentDelta(StatefulProduct):
    """A product that is computed by the student's function, from one token to the next."""

    w: np.ndarray
    b: np.ndarray | None
    delta_product: object

    def one(self, x, layer):
        """x (T, in) -> (T, out), for the tokens of one sequence in order."""
        seen = layer.memory.recall(self, Reference)
        y = np.empty((len(x), self.w.shape[1]), x.dtype)
        for t, row in enumerate(x.astype(np.float64)):
            y[t] = self.token(row, seen)
        return y if self.b is None else y + self.b

    def token(self, x, seen: "Reference"):
        """Two rows are enough: what was sent so far, of which the product is known, and x."""
        before = seen.ref[-1] if seen.ref else None
        rows = x[None] if before is None else np.array([before, x])
        threshold = THRESHOLD * np.sqrt((x**2).mean())
        y, sent = self.delta_product(rows, self.w.astype(np.float64), threshold)
        seen.ref.append(x if before is None else np.where(sent[-1], x, before))
        count = int(np.sum(sent[-1]))
        ledger.count(count * self.w.shape[1], count * self.w[:1].nbytes)
        if before is not None:
            ledger.count(2 * x.size)  # the rms and the comparisons
        return y[-1]


class Reference:
    """ref after each token, so that ``rewind`` can go back."""

    def __init__(self):
        self.ref: list[np.ndarray] = []

    def rewind(self, position: int) -> None:
        del self.ref[position:]

    def __deepcopy__(self, memo) -> "Reference":
        other = Reference()
        other.ref = list(self.ref)  # arrays are never changed
        return other


def into_model(lm, answer):
    """In the products after attention, whose inputs change least from token to token."""

    def make(linear, name, index):
        return StudentDelta(linear.w, linear.b, answer.delta_product)

    return replace_products(lm, "out", make)


EXERCISE = Exercise(
    title="Delta networks without drift",
    minutes=25,
    difficulty="medium",
    names=("delta_product",),
    cases=lambda rng: list(cases(rng)),
    flawed=flawed,
    mistakes=MISTAKES,
    axes=("token", "column"),
    hints=(
        "Keep two things from token to token: ref, and the last y. A boolean array selects "
        "columns: change[sent] are the changes that are sent, W[sent] are their rows of W.",
        "ref = x[0].copy(), or your function changes its input. For each later token: change = "
        "x[t] - ref; sent[t] = np.abs(change) > threshold; y[t] = y[t - 1] + change[sent[t]] @ "
        "W[sent[t]]; then ref = np.where(sent[t], x[t], ref).",
    ),
    library="minitx/skip/delta.py: DeltaLinear",
    into_model=into_model,
    same_as={"delta": {"where": "out", "threshold": THRESHOLD, "refresh": 512}},
    saves=(
        "It saves the products of columns that do not change, and reading their weights. In text "
        "much changes from token to token, so it saves little; in sound and video, a lot."
    ),
)
