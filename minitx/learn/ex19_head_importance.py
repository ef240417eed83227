"""Exercise 19: Head importance (25 minutes)

Some attention heads can be removed, and the model hardly notices. Which ones? Put a gate g_h in
front of what head h adds to the attention output y, and ask how much the loss L depends on it:

    y[t] = sum over h of  g_h * out[h, t] @ W_h          all gates are 1

W_h are the rows of the output matrix that belong to head h. A gate of 0 would remove the head.
The derivative of L with respect to g_h says what a small change of the gate does to the loss:

    dL/dg_h = sum over t of  (out[h, t] @ W_h) . grad[t]      grad[t] = dL/dy[t]

A head is important if the derivative is large, whatever its sign. On one text a head may raise the
loss and on another one lower it, and these must not cancel. So the importance is

    importance_h = mean over texts of |dL/dg_h|

One backward pass gives grad for all layers, and so the importance of every head. This function is
for one layer.

    outs   a list with an array (H, T, d) for each text: the outputs of the heads. T differs.
    grads  a list with an array (T, D) for each text: grad
    w_out  (H * d, D); rows h * d to (h + 1) * d - 1 are W_h
    importance (H,)

By hand, H = 2 heads of width d = 1, and D = 2: head 0 writes column 0, and head 1 column 1. The
first text has two tokens. There the derivatives are 1 * 2 + 2 * 1 = 4 and 3 * 1 + 1 * (-3) = 0. The
second text has one: 1 * (-2) = -2 and 2 * 1 = 2. So the importances are (4 + 2) / 2 = 3 and
(0 + 2) / 2 = 1: head 1 would go first.

    >>> outs = [np.array([[[1.0], [2.0]], [[3.0], [1.0]]]), np.array([[[1.0]], [[2.0]]])]
    >>> grads = [np.array([[2.0, 1.0], [1.0, -3.0]]), np.array([[-2.0, 1.0]])]
    >>> importance(outs, grads, np.eye(2)).tolist()
    [3.0, 1.0]

Source: Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019.
"""

from dataclasses import replace

import numpy as np

from minitx.calibration import calibration_ids
from minitx.learn.exercise import Exercise, Mistake
from minitx.model import Attention
from minitx.precompute.head_prune import attention_of, prune_in_rounds, text_loss, without_heads
from minitx.shared.share import share_of
from minitx.state import Layer
from minitx.technique import blocks_of, wrap
from minitx.tree import Part, float_type, part


# solution
def importance(outs, grads, w_out):
    """outs: arrays (H, T, d), grads: arrays (T, D), w_out (H * d, D) -> (H,)"""
    total = 0
    for out, grad in zip(outs, grads):
        H, T, d = out.shape
        w = w_out.reshape(H, d, -1)  # (H, d, D)
        added = out @ w  # (H, T, D): what each head adds to y
        derivative = (added * grad).sum((1, 2))  # (H,)
        total = total + abs(derivative)
    return total / len(outs)


# end of solution


def in_loops(outs, grads, w_out):
    """The derivative from its definition, number by number."""
    H, _, d = outs[0].shape
    found = np.zeros(H)
    for h in range(H):
        for out, grad in zip(outs, grads):
            derivative = 0.0
            for t in range(len(grad)):
                for column in range(grad.shape[1]):
                    added = sum(out[h, t, c] * w_out[h * d + c, column] for c in range(d))
                    derivative += added * grad[t, column]
            found[h] += abs(derivative) / len(outs)
    return found


def flawed(
    outs,
    grads,
    w_out,
    *,
    absolute="text",
    square=False,
    texts="mean",
    tokens="sum",
    rows="blocks",
    transpose=False,
    use_grad=True,
):
    found = []  # of each text, (H,)
    for out, grad in zip(outs, grads):
        H, T, d = out.shape
        back = grad @ (w_out if transpose else w_out.T)  # (T, H * d): dL/d out
        if rows == "blocks":
            back = back.reshape(T, H, d).swapaxes(0, 1)
        elif rows == "interleaved":
            back = back.reshape(T, d, H).transpose(2, 0, 1)
        else:
            back = back.reshape(H, T, d)
        each = out * back  # (H, T, d)
        if not use_grad:
            each = abs(out @ w_out.reshape(H, d, -1))
        by_token = abs(each).sum(-1) if absolute == "number" else each.sum(-1)  # (H, T)
        by_token = abs(by_token) if absolute == "token" else by_token
        derivative = getattr(by_token, tokens)(-1)
        found.append(abs(derivative) if absolute == "text" else derivative)
    found = np.array(found) ** 2 if square else np.array(found)
    total = getattr(found, texts)(0)
    return abs(total) if absolute == "end" else total


MISTAKES = (
    Mistake(
        "The absolute value is missing: a head on which the loss depends strongly is important "
        "whatever the sign.",
        absolute="none",
    ),
    Mistake(
        "You take the absolute value after the mean over texts, so texts with different signs "
        "cancel; take it of each text's derivative.",
        absolute="end",
    ),
    Mistake(
        "You take the absolute value of each token's part. The gate is the same for all tokens of "
        "a text: sum over them first.",
        absolute="token",
    ),
    Mistake(
        "You take the absolute value of every product; first sum over all columns and tokens of "
        "the text.",
        absolute="number",
    ),
    Mistake("You square the derivatives; take their absolute values.", square=True),
    Mistake("You sum over the texts; take the mean.", texts="sum"),
    Mistake(
        "You take the mean over the tokens; the derivative is the sum over all tokens of a text.",
        tokens="mean",
    ),
    Mistake(
        "The rows of w_out go to the wrong heads: head h has the d rows from h * d on, so reshape "
        "to (H, d, D), not (d, H, D).",
        rows="interleaved",
    ),
    Mistake(
        "(T, H * d) is reshaped to (H, T, d), which mixes tokens and heads: reshape to (T, H, d), "
        "then exchange the first two axes.",
        rows="mixed",
    ),
    Mistake("w_out is used transposed: out[h] @ W_h, with H * d rows.", transpose=True),
    Mistake(
        "You measure how much a head adds to y. What counts is whether the loss depends on it: "
        "multiply by grad.",
        use_grad=False,
    ),
)


def cases(rng):
    """Several texts of different lengths, in which derivatives have both signs."""
    for H, d, D, lengths in ((2, 3, 6, (2, 3, 1)), (3, 2, 6, (4, 2)), (4, 2, 3, (1, 3, 2, 5))):
        outs = [rng.standard_normal((H, T, d)) for T in lengths]
        grads = [rng.standard_normal((T, D)) for T in lengths]
        yield outs, grads, rng.standard_normal((H * d, D))


# In the model ------------------------------------------------------------------------------------

SHARE, STORIES = 0.25, 2  # of all heads to remove; calibration texts


@part
class Probe(Part):
    """Attention that records the outputs of its heads, and adds ``shift`` to its own output: 0, but
    the gradient with respect to it is that at the attention output."""

    inner: Part  # Attention
    shift: object  # (T, D)

    def __call__(self, x, layer: Layer):
        return self.inner(x, layer) + self.shift


@part
class Recorder(Part):
    """Softmax attention that records its result (H, T, d) in a list."""

    inner: Part  # Attend
    found: list

    def __call__(self, q, k, v, layer: Layer):
        from minitx.training.autograd.array import value_of  # training imports skip

        out = self.inner(q, k, v, layer)
        self.found.append(value_of(out))
        return out


def outs_and_grads(lm, ids) -> tuple[list, list]:
    """For one text, in each layer: the outputs of the heads (H, T, d), and the gradient of the
    text's loss with respect to the attention output (T, D)."""
    from minitx.training.autograd import grad_of  # training imports skip

    outs: list = []
    shape = len(ids) - 1, lm.model.config.width
    shifts = [np.zeros(shape, float_type(lm.model)) for _ in blocks_of(lm)]

    def loss(*shifts):
        def change(attn: Attention, index: int) -> Part:
            return Probe(replace(attn, attend=Recorder(attn.attend, outs)), shifts[index])

        return text_loss(wrap(lm, "attn", change), ids)

    _, grads = grad_of(loss, *shifts)
    return [out.astype(np.float64) for out in outs], [g.astype(np.float64) for g in grads]


def scores_of(lm, answer, texts) -> list[np.ndarray]:
    """The student's importances (H,) for each layer."""
    found = [outs_and_grads(lm, ids) for ids in texts]
    scores = []
    for index, block in enumerate(blocks_of(lm)):
        outs, grads = ([both[which][index] for both in found] for which in (0, 1))
        scores.append(answer.importance(outs, grads, block.attn.out.w.astype(np.float64)))
    return scores


def into_model(lm, answer):
    """The model without the least important heads, by the student's scores."""
    scores = scores_of(lm, answer, calibration_ids("head_prune", lm, STORIES, ""))
    alive = [np.ones(attention_of(block).heads, bool) for block in blocks_of(lm)]
    count = share_of(sum(map(len, alive)), SHARE)
    return without_heads(lm, prune_in_rounds(lambda _: scores, alive, count, 1.0, False))


EXERCISE = Exercise(
    title="Head importance",
    minutes=25,
    difficulty="medium",
    names=("importance",),
    cases=lambda rng: list(cases(rng)),
    flawed=flawed,
    mistakes=MISTAKES,
    axes=("head",),
    hints=(
        "Begin with one text and one head: out[h] @ W_h is (T, D), and so is grad. What is left to "
        "do to get one number? Where in this does the absolute value belong?",
        "w_out.reshape(H, d, D)[h] is W_h, so out @ w_out.reshape(H, d, D) does all heads at once, "
        "(H, T, D). Multiply by grad, sum over the last two axes, take abs; average over texts.",
    ),
    library="minitx/precompute/head_prune.py: importance",
    into_model=into_model,
    same_as={"head_prune": {"share": SHARE, "stories": STORIES, "recompute": False}},
    saves=(
        "A quarter of all heads is gone, by your importances on two stories: with their columns "
        "of W_q, their rows of W_o, and where a key head serves no other query, its keys and "
        "values."
    ),
)
