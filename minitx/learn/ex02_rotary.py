"""Exercise 2: Rotary positions (20 minutes)

Attention compares a query with keys by dot products, which do not depend on where a token stands.
Rotary position embedding (RoPE) changes that: it rotates each query and each key by an angle that
grows with its position. The dot product of two rotated rows depends on the difference of the
angles, and so on the distance between the two tokens.

A row has d columns, d even. Column i of the first half and column i + d/2 of the second half are
the coordinates of a point in the plane. The point is rotated counterclockwise:

    angle    = position * base^(-2i / d)              in radians, for i = 0, 1, ..., d/2 - 1
    y[i]     = x[i] * cos(angle) - x[i + d/2] * sin(angle)
    y[i+d/2] = x[i] * sin(angle) + x[i + d/2] * cos(angle)

The first pair (i = 0) turns by 1 radian per position, later ones more and more slowly. Row t stands
at positions[t]. A text that is continued does not begin at 0, so these are any integers >= 0:

    x          (T, d)
    positions  (T,)
    y          (T, d)

By hand: d = 4 and base = 100, so pair 0 turns by 1 radian per position, and pair 1 by 100^(-2/4) =
0.1 radians. The row (1, 1, 0, 0) consists of the points (1, 0) and (1, 0): columns 0 and 2, columns
1 and 3. At position 2 they move to (cos 2, sin 2) = (-0.416, 0.909) and (cos 0.2, sin 0.2) =
(0.98, 0.199).

    >>> x = np.array([[1.0, 1.0, 0.0, 0.0]])
    >>> rotate(x, np.array([2]), 100.0).round(3).tolist()
    [[-0.416, 0.98, 0.909, 0.199]]

The paper pairs neighbouring columns, 0 with 1, 2 with 3. Here, as in the model files of Hugging
Face, column i is paired with column i + d/2.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

import numpy as np

from minitx.learn.exercise import Exercise, Mistake
from minitx.model import Rope
from minitx.technique import swap
from minitx.tree import Part, part


# solution
def rotate(x, positions, base):
    """x (T, d), positions (T,), base -> (T, d): each row rotated to its position."""
    half = x.shape[-1] // 2
    frequency = base ** (-np.arange(half) / half)  # (d/2,) radians per position
    angle = positions[:, None] * frequency  # (T, d/2)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


# end of solution


def in_loops(x, positions, base):
    """The equations, pair by pair."""
    T, d = x.shape
    y = np.empty_like(x)
    for t in range(T):
        for i in range(d // 2):
            j = i + d // 2
            angle = positions[t] * base ** (-2 * i / d)
            y[t, i] = x[t, i] * np.cos(angle) - x[t, j] * np.sin(angle)
            y[t, j] = x[t, i] * np.sin(angle) + x[t, j] * np.cos(angle)
    return y


def flawed(
    x,
    positions,
    base,
    *,
    direction=1,
    minus=True,
    pairs="halves",
    exponent=2.0,
    begin="given",
    radians=True,
    overwrites=False,
):
    T, d = x.shape
    half = d // 2
    i = np.arange(half)
    where = {"given": positions, "one later": positions + 1, "row": np.arange(T)}[begin]
    angle = direction * where[:, None] * base ** (-exponent * i / d)  # (T, d/2)
    angle = angle if radians else np.deg2rad(angle)
    cos, sin = np.cos(angle), np.sin(angle)
    sign = -1 if minus else 1
    if pairs == "torn":
        cos, sin = cos.repeat(2, -1), sin.repeat(2, -1)
        return x * cos + np.concatenate([sign * x[:, half:], x[:, :half]], -1) * sin
    columns = (slice(0, d, 2), slice(1, d, 2)) if pairs == "adjacent" else (i, i + half)
    first, second = x[:, columns[0]], x[:, columns[1]]
    if pairs == "read apart":
        first, second = x[:, ::2], x[:, 1::2]
    y = np.empty_like(x)
    y[:, columns[0]] = first * cos + sign * second * sin
    if overwrites:
        first = y[:, columns[0]]
    y[:, columns[1]] = first * sin + second * cos
    return y


MISTAKES = (
    Mistake(
        "You rotate in the wrong direction: the minus sign belongs to x[i + d/2] * sin in the "
        "first half.",
        direction=-1,
    ),
    Mistake(
        "That is no rotation, for it changes the length of the row: one of the four products has a "
        "minus sign, x[i + d/2] * sin in the first half.",
        minus=False,
    ),
    Mistake(
        "You pair neighbouring columns (0 with 1, 2 with 3); here column i is paired with column "
        "i + d/2.",
        pairs="adjacent",
    ),
    Mistake(
        "The two columns of a pair turn by different angles: columns i and i + d/2 share angle i, "
        "so repeat the angles with np.concatenate([angle, angle], -1), not with np.repeat.",
        pairs="torn",
    ),
    Mistake(
        "You read neighbouring columns as pairs (x[:, ::2] and x[:, 1::2]), and write the results "
        "as halves; column i is paired with column i + d/2 on both sides.",
        pairs="read apart",
    ),
    Mistake("The exponent is i/d; it must be 2i/d, from 0 to nearly 1.", exponent=1.0),
    Mistake(
        "Later pairs turn faster instead of slower: the exponent must be negative, base^(-2i/d).",
        exponent=-2.0,
    ),
    Mistake("All pairs turn at the same speed: pair i turns by base^(-2i/d).", exponent=0.0),
    Mistake(
        "The formula gives angles in radians, which np.cos and np.sin expect: do not convert them "
        "from degrees.",
        radians=False,
    ),
    Mistake("Your positions are one too large: the first token has position 0.", begin="one later"),
    Mistake(
        "You count the rows instead of using positions: row t stands at positions[t], which need "
        "not be t.",
        begin="row",
    ),
    Mistake(
        "The second half is computed from the new first half: keep the old columns until both "
        "halves are computed.",
        overwrites=True,
    ),
)


def cases(rng):
    """From the beginning, in the middle of a text, and in no order."""
    for T, d, base in ((4, 4, 100.0), (3, 8, 10000.0), (2, 2, 10000.0), (5, 6, 50.0)):
        positions = np.arange(T) if T == 4 else rng.permutation(20)[:T]
        yield rng.standard_normal((T, d)), positions, base


# In the model ------------------------------------------------------------------------------------


@part
class StudentRope(Part):
    """A rotation that is computed by the student's function."""

    base: float
    rotate: object

    def __call__(self, x, tokens):
        heads, T, d = x.shape[-3:]
        rows = x.reshape(heads * T, d).astype(np.float64)
        y = self.rotate(rows, np.tile(tokens.array, heads), self.base)
        return y.astype(x.dtype).reshape(x.shape)


def into_model(lm, answer):
    base = lm.model.config.rope_base
    return swap(lm, Rope, lambda _: StudentRope(base, answer.rotate))


EXERCISE = Exercise(
    title="Rotary positions",
    minutes=20,
    difficulty="medium",
    names=("rotate",),
    cases=lambda rng: list(cases(rng)),
    flawed=flawed,
    mistakes=MISTAKES,
    axes=("token", "column"),
    hints=(
        "First make the table of all angles, (T, d/2): one row per token, one column per pair. "
        "What shape must positions have, so that it times a row of d/2 frequencies is that table?",
        "The frequencies are base ** (-2 * np.arange(d // 2) / d), the angles positions[:, None] * "
        "frequencies. Split x into x[:, : d // 2] and x[:, d // 2 :], compute both new halves from "
        "these two, and join them with np.concatenate along the last axis.",
    ),
    library="minitx/ops.py: rope_tables and rotate",
    into_model=into_model,
    saves=(
        "A key is rotated once, when it is cached, and never again (exercise 5). No position is "
        "learned, and no row is added to the embedding. The bytes saved here are minitx's tables "
        "of cosines and sines: your function computes them each time."
    ),
)
