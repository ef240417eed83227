"""Exercise 1: RMS norm (10 minutes)

Between its layers, a transformer adds to the residual stream, so the numbers in it grow. Before
each layer reads a token, a norm brings the token's row back to a common size: it divides the row by
its root mean square (RMS). Then a learned gain scales the columns.

    rms(x) = sqrt(mean(x_1^2, ..., x_D^2) + eps)
    y_j    = x_j / rms(x) * gain_j

eps is a tiny number, such as 1e-5, that keeps us from dividing by 0. Each row of x is a token, and
is normalized by itself:

    x     (T, D)   T tokens, D columns
    gain  (D,)
    y     (T, D)

A row to check by hand: the squares of 3 and 4 are 9 and 16, their mean is 12.5, and its root is
3.5355. With a gain of 1 and 2, the row becomes 3 / 3.5355 = 0.8485 and 4 / 3.5355 * 2 = 2.2627.

    >>> rms_norm(np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), 0.0).round(4).tolist()
    [[0.8485, 2.2627]]

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
"""

import numpy as np

from minitx.learn.exercise import Exercise, Mistake
from minitx.model import RMSNorm
from minitx.technique import swap
from minitx.tree import Part, part


# solution
def rms_norm(x, gain, eps):
    """x (T, D), gain (D,), eps -> (T, D): each row of x divided by its RMS, times the gain."""
    mean_square = (x**2).mean(-1, keepdims=True)  # (T, 1)
    return x / np.sqrt(mean_square + eps) * gain


# end of solution


def in_loops(x, gain, eps):
    """The equation, number by number."""
    y = np.empty_like(x)
    T, D = x.shape
    for t in range(T):
        total = 0.0
        for j in range(D):
            total += x[t, j] ** 2
        rms = (total / D + eps) ** 0.5
        for j in range(D):
            y[t, j] = x[t, j] / rms * gain[j]
    return y


def flawed(
    x,
    gain,
    eps,
    *,
    average="mean",
    eps_at="inside",
    center=False,
    axis=-1,
    keep=True,
    use_gain=True,
):
    if center:
        x = x - x.mean(axis, keepdims=True)
    size = getattr(np, average)(x**2, axis, keepdims=keep)
    rms = np.sqrt(size + eps) if eps_at == "inside" else np.sqrt(size) + eps
    return x / rms * gain if use_gain else x / rms


MISTAKES = (
    Mistake("You divide by the root of the sum of the squares; take their mean.", average="sum"),
    Mistake("You add eps to the root; it belongs inside, under the root.", eps_at="outside"),
    Mistake(
        "You subtract the mean first. That is what LayerNorm does; RMS norm only divides.",
        center=True,
    ),
    Mistake("You normalize the columns; each row (token) is normalized by itself.", axis=0),
    Mistake(
        "You take one mean over all tokens; each row is normalized by itself (axis=-1).", axis=None
    ),
    Mistake(
        "The means have the shape (T,), so they are divided along the columns; keepdims=True makes "
        "them (T, 1), one for each row.",
        keep=False,
    ),
    Mistake("The gain is missing: multiply column j by gain[j].", use_gain=False),
)


def cases(rng):
    """Rows of very different size, and an eps that is not too small to be seen."""
    for T, D in ((4, 4), (3, 6), (1, 5)):
        x = rng.standard_normal((T, D)) * rng.uniform(0.1, 10, (T, 1)) + 0.5
        yield x, rng.uniform(0.5, 2, D), 0.1


# In the model ------------------------------------------------------------------------------------


@part
class StudentNorm(Part):
    """A norm that is computed by the student's function."""

    gain: np.ndarray
    eps: float
    rms_norm: object

    def __call__(self, x):
        rows = x.reshape(-1, x.shape[-1])  # (T, D), also for a single row
        y = self.rms_norm(rows.astype(np.float64), self.gain.astype(np.float64), self.eps)
        return y.astype(x.dtype).reshape(x.shape)


def into_model(lm, answer):
    return swap(lm, RMSNorm, lambda norm: StudentNorm(norm.gain, norm.eps, answer.rms_norm))


EXERCISE = Exercise(
    title="RMS norm",
    minutes=10,
    difficulty="easy",
    names=("rms_norm",),
    cases=lambda rng: list(cases(rng)),
    flawed=flawed,
    mistakes=MISTAKES,
    axes=("token", "column"),
    hints=(
        "x**2 squares every number. Which axis runs over the columns of one token, and what does "
        "keepdims=True do to the shape of a mean?",
        "The mean of the squares over the last axis has the shape (T, 1) with keepdims=True. Add "
        "eps to it, take np.sqrt, divide x by that, and multiply by the gain.",
    ),
    library="minitx/ops.py: rms_norm",
    into_model=into_model,
    saves="Your norm saves nothing yet. In exercise 7 its gain disappears into the next matrix.",
)
