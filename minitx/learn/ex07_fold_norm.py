"""Exercise 7: Folding a norm (15 minutes)

A norm divides each row x by its size; call the result n, a row of D numbers. Then it multiplies
column j by a learned gain_j and adds a learned bias_j, and a matrix with a bias of its own reads
what comes out:

    z = (n * gain + bias) W + b

Gain and bias are the same for every token, and so are W and b. So why multiply by the gain again
for each token? Find another matrix W* and another bias b*, once and for all, with

    n W* + b* = z        for every row n

and the norm needs neither gain nor bias any more. Write z out as a sum over j to see what happens
to row j of W. (W is stored (inputs, outputs): row j belongs to column j of n.)

    gain, bias  (D,)      bias is all zeros for an RMS norm, which has none (exercise 1)
    W           (D, F)
    b           (F,)
    fold(gain, bias, W, b) -> W* (D, F), b* (F,)

By hand, with two inputs, one output, gain = 2 and 3, bias = 1 and 0, W = 10 and 1, b = 5:

    z = (2 n_1 + 1) * 10 + (3 n_2 + 0) * 1 + 5
      = 20 n_1 + 3 n_2 + 15

so W* is 20 and 3, and b* is 15.

    >>> gain, bias = np.array([2.0, 3.0]), np.array([1.0, 0.0])
    >>> W, b = np.array([[10.0], [1.0]]), np.array([5.0])
    >>> new_W, new_b = fold(gain, bias, W, b)
    >>> new_W.tolist(), new_b.tolist()
    ([[20.0], [3.0]], [15.0])

Source: Graef, Wasielewski and Clapp, "FlashNorm: fast normalization for LLMs", 2024.
"""

from dataclasses import replace

import numpy as np

from minitx.learn.exercise import Exercise, Mistake
from minitx.model import FFN, Attention, Linear
from minitx.precompute.fold_norms import WeightlessLayerNorm
from minitx.technique import swap
from minitx.tree import children


# solution
def fold(gain, bias, W, b):
    """gain (D,), bias (D,), W (D, F), b (F,) -> the new W (D, F) and the new b (F,)"""
    return gain[:, None] * W, bias @ W + b


# end of solution


def in_loops(gain, bias, W, b):
    """z = sum over j of (n_j gain_j + bias_j) W_jo, plus b_o, sorted by what has an n_j."""
    D, F = W.shape
    new_W, new_b = np.empty((D, F)), np.empty(F)
    for o in range(F):
        new_b[o] = b[o]
        for j in range(D):
            new_W[j, o] = gain[j] * W[j, o]
            new_b[o] += bias[j] * W[j, o]
    return new_W, new_b


def flawed(gain, bias, W, b, *, by="rows", bias_meets="W", keep_b=True):
    new_W = {
        "rows": lambda: gain[:, None] * W,
        "columns": lambda: gain * W,
        "dividing": lambda: W / gain[:, None],
    }[by]()
    from_bias = {
        "W": lambda: bias @ W,
        "new W": lambda: bias @ new_W,
        "W from the other side": lambda: W @ bias,
        "no matrix": lambda: bias,
        "nothing": lambda: 0,
    }[bias_meets]()
    return new_W, from_bias + (b if keep_b else np.zeros_like(b))


MISTAKES = (
    Mistake(
        "The gain scales the columns of W; gain_j belongs to input j, which is row j of W.",
        by="columns",
    ),
    Mistake("You divide W by the gain; multiply by it.", by="dividing"),
    Mistake(
        "The norm's bias is lost. The matrix multiplies it, too; that product belongs into b*.",
        bias_meets="nothing",
    ),
    Mistake(
        "The gain is applied to the bias, too. The norm adds its bias after the gain, so the bias "
        "meets the old W, not the new one.",
        bias_meets="new W",
    ),
    Mistake(
        "You multiply W by the norm's bias from the wrong side: it is a row, as n is, so bias @ W.",
        bias_meets="W from the other side",
    ),
    Mistake(
        "You add the norm's bias as it is. It goes through the matrix, as everything does that the "
        "norm puts out.",
        bias_meets="no matrix",
    ),
    Mistake("The matrix's own bias b is lost; it is part of the new bias.", keep_b=False),
)


def cases(rng):
    """Square matrices, in which rows and columns can be mixed up unnoticed, and others."""
    for D, F in ((4, 4), (3, 5), (5, 2), (3, 3)):
        shapes = (D,), (D,), (D, F), (F,)
        gain, bias, W, b = (rng.standard_normal(shape) for shape in shapes)
        yield np.exp(gain), bias, W, b


# In the model ------------------------------------------------------------------------------------


def into_model(lm, answer):
    """Every norm before attention and before an FFN folded by the student's function."""

    def fold_into(linear: Linear, norm) -> Linear:
        arrays = norm.gain, norm.bias, linear.w, linear.b
        W, b = answer.fold(*(array.astype(np.float64) for array in arrays))
        return replace(linear, w=W.astype(np.float32), b=b.astype(np.float32))

    def folded(node, reader: str):
        old, norm = getattr(node, reader), node.norm
        new = {name: fold_into(linear, norm) for name, linear in children(old)}
        return replace(node, norm=WeightlessLayerNorm(norm.eps), **{reader: replace(old, **new)})

    lm = swap(lm, Attention, lambda attn: folded(attn, "qkv"))
    return swap(lm, FFN, lambda ffn: folded(ffn, "expand"))


EXERCISE = Exercise(
    title="Folding a norm",
    minutes=15,
    difficulty="easy",
    names=("fold",),
    cases=lambda rng: list(cases(rng)),
    flawed=flawed,
    mistakes=MISTAKES,
    hints=(
        "Multiply (n * gain + bias) W out: one part contains n, the other does not. The first part "
        "is n W*. Everything else is the new bias.",
        "n_j meets gain_j and then row j of W: scale the rows, and gain[:, None] has the shape "
        "(D, 1) for that. The norm's bias meets the old W, as a row from the left, and b stays.",
    ),
    library="minitx/shared/folding.py: fold_into (and minitx/precompute/fold_norms.py: fold_norms)",
    into_model=into_model,
    model="stories-relu",
    saves=(
        "The gains and biases of 8 norms are gone. That is little, but a norm without weights only "
        "divides, and FlashNorm divides after the product, so that a GPU can do both at once."
    ),
)
