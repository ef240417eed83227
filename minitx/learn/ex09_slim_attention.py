"""Exercise 9: Keys are enough (30 minutes)

The KV cache holds a key and a value for every token so far: two rows of the same width. Both are
made from the same row n, the normalized hidden state of the token:

    key = n Wk          value = n Wv

If every query head has a key head of its own, Wk is square: (D, D). A square matrix can nearly
always be inverted, and then the key contains all of n:

    key Wk^-1 = n       so       value = key Wk^-1 Wv

Make the product of these two matrices once. Then the cache needs only keys: half of its memory.

    make_w_kv(Wk, Wv) -> W_kv          all (D, D), with Wk W_kv = Wv

But which keys? Attention rotates each head of a key to its position (exercise 2), and a key that is
rotated is no longer n Wk. So the cache holds the keys as they come out of the matrix, the raw keys.
When it is read, both are computed from them: keys by rotating, values by multiplying with W_kv.

    keys_and_values(raw, W_kv, H, rotate) -> k, v

    raw     (S, D)       raw keys of S tokens; H heads side by side, each d = D / H columns wide:
                         head 0 in the columns 0 ... d-1, head 1 in the columns d ... 2d-1, ...
    rotate  a function, which is given: rotate(x) takes raw keys split into heads, x (H, S, d), and
            returns them rotated, (H, S, d)
    k       (H, S, d)    rotated
    v       (H, S, d)    not rotated; the values of one head come from the keys of all heads

While text is generated, there is one query at a time, and it needs only the sum of the values,
weighted by its attention weights. To compute all S values for that takes S * D * D multiply-adds.
Sum the keys instead, and multiply the sum: that is one row, however long the text is.

    sum over s of  weight[s] (raw[s] W_kv)  =  (sum over s of  weight[s] raw[s]) W_kv

    attend(weights, raw, W_kv) -> out

    weights (H, S)       of one query, for each head
    out     (H, d)       for each head the weighted sum of its own values, d columns each

By hand, D = 2: with Wk = [[2, 0], [1, 1]] the token n = (1, 2) has the key (4, 2). The inverse of
Wk is [[0.5, 0], [-0.5, 1]], since Wk times that is the identity. With Wv = [[1, 0], [0, 3]], we get
W_kv = [[0.5, 0], [-0.5, 3]], and the value is key W_kv = (1, 6), which is n Wv.

    >>> Wk, Wv = np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 3.0]])
    >>> W_kv = make_w_kv(Wk, Wv)
    >>> W_kv.tolist()
    [[0.5, 0.0], [-0.5, 3.0]]

The same key with two heads of one column each, and a "rotation" that only changes the sign, so that
you see what was rotated:

    >>> k, v = keys_and_values(np.array([[4.0, 2.0]]), W_kv, 2, lambda x: -x)
    >>> k.tolist(), v.tolist()
    ([[[-4.0]], [[-2.0]]], [[[1.0]], [[6.0]]])

And with a second token, whose key is (2, 0), so its value is (1, 0). Head 0 gives both tokens the
same weight, 0.5 * 1 + 0.5 * 1 = 1; head 1 attends only to the first, 1 * 6 = 6.

    >>> weights = np.array([[0.5, 0.5], [1.0, 0.0]])
    >>> attend(weights, np.array([[4.0, 2.0], [2.0, 0.0]]), W_kv).tolist()
    [[1.0], [6.0]]

Source: Graef, Wasielewski and Clapp, "Slim attention: cut your context memory in half without
loss", 2025.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from minitx import ledger, ops
from minitx.learn.exercise import Exercise, Mistake
from minitx.learn.outcomes import unpack
from minitx.model import split_heads
from minitx.precompute.slim_attention import slim
from minitx.technique import wrap
from minitx.tree import Part, part


# solution
def make_w_kv(Wk, Wv):
    """Wk (D, D), Wv (D, D) -> W_kv (D, D) with Wk W_kv = Wv"""
    return np.linalg.solve(Wk, Wv)


def keys_and_values(raw, W_kv, H, rotate):
    """raw (S, D), W_kv (D, D), H heads, rotate: (H, S, d) -> (H, S, d); returns k, v (H, S, d)"""

    def heads(x):  # (S, D) -> (H, S, d)
        return x.reshape(len(x), H, -1).swapaxes(0, 1)

    return rotate(heads(raw)), heads(raw @ W_kv)


def attend(weights, raw, W_kv):
    """weights (H, S), raw (S, D), W_kv (D, D) -> (H, d)"""
    sums = weights @ raw  # (H, D): for each head a sum of whole keys
    H, D = sums.shape
    return np.einsum("hj,jhc->hc", sums, W_kv.reshape(D, H, D // H))


# end of solution


def w_kv_in_loops(Wk, Wv):
    """Wk^-1 Wv, product by product."""
    D, inverse = len(Wk), np.linalg.inv(Wk)
    return np.array(
        [[sum(inverse[i, j] * Wv[j, o] for j in range(D)) for o in range(D)] for i in range(D)]
    )


def keys_and_values_in_loops(raw, W_kv, H, rotate):
    """Number by number."""
    S, D = raw.shape
    d = D // H
    k, v = np.zeros((H, S, d)), np.zeros((H, S, d))
    for h in range(H):
        for s in range(S):
            for c in range(d):
                k[h, s, c] = raw[s, h * d + c]
                for j in range(D):
                    v[h, s, c] += raw[s, j] * W_kv[j, h * d + c]
    return rotate(k), v


def attend_in_loops(weights, raw, W_kv):
    """Number by number."""
    (H, S), D = weights.shape, len(W_kv)
    d = D // H
    out = np.zeros((H, d))
    for h in range(H):
        for j in range(D):
            summed = sum(weights[h, s] * raw[s, j] for s in range(S))
            for c in range(d):
                out[h, c] += summed * W_kv[j, h * d + c]
    return out


in_loops = SimpleNamespace(
    make_w_kv=w_kv_in_loops, keys_and_values=keys_and_values_in_loops, attend=attend_in_loops
)


def flawed_w_kv(Wk, Wv, *, product="inv(k) v"):
    inverse = np.linalg.inv
    return {
        "inv(k) v": lambda: inverse(Wk) @ Wv,
        "v inv(k)": lambda: Wv @ inverse(Wk),
        "inv(v) k": lambda: inverse(Wv) @ Wk,
        "transposed k v": lambda: Wk.T @ Wv,
    }[product]()


def flawed_keys_and_values(
    raw, W_kv, H, rotate, *, keys="rotated", values="raw", from_heads="all", split="columns"
):
    S, D = raw.shape
    d = D // H

    def heads(x):
        return x.reshape(S, H, d).swapaxes(0, 1) if split == "columns" else x.reshape(H, S, d)

    rotated = rotate(heads(raw))
    source = raw
    if values == "rotated keys":
        source = rotated.swapaxes(0, 1).reshape(S, D)
    if from_heads == "own":
        own = np.kron(np.eye(H), np.ones((d, d)))  # (D, D): 1 from a head to itself
        W_kv = W_kv * own
    v = heads(source @ W_kv)
    if values == "rotated":
        v = rotate(v)
    return rotated if keys == "rotated" else heads(raw), v


def flawed_attend(weights, raw, W_kv, *, sums_of="all", columns="own"):
    H, D = len(weights), len(W_kv)
    d = D // H
    out = []
    for h in range(H):
        own = slice(h * d, (h + 1) * d)
        rows = own if sums_of == "own" else slice(None)
        out.append(weights[h] @ raw[:, rows] @ W_kv[rows, own if columns == "own" else slice(d)])
    return np.array(out)


MISTAKES = (
    Mistake(
        "The inverse is on the wrong side: key W_kv = n Wk W_kv must be n Wv, so W_kv begins with "
        "the inverse of Wk.",
        product="v inv(k)",
    ),
    Mistake("You invert Wv; the matrix to invert is Wk.", product="inv(v) k"),
    Mistake(
        "You multiply by the transpose of Wk. It is the inverse only of a rotation; invert Wk.",
        product="transposed k v",
    ),
    Mistake(
        "The values are computed from rotated keys. Only the raw keys are n Wk.",
        values="rotated keys",
    ),
    Mistake("You rotate the values, too; values have no position.", values="rotated"),
    Mistake("The keys are not rotated: attention needs rotate(keys).", keys="raw"),
    Mistake(
        "Each head's values are computed from the keys of that head alone. All of n is needed, and "
        "only all heads together contain it: (S, D) @ (D, D).",
        from_heads="own",
    ),
    Mistake(
        "The heads are cut wrongly: reshape(H, S, d) gives a head some tokens instead of some "
        "columns. Reshape to (S, H, d), then swap the first two axes.",
        split="rows",
    ),
    Mistake(
        "In attend, each head sums its own columns of the keys. Its values come from all of them: "
        "sum whole raw keys, then multiply by the head's own columns of W_kv.",
        sums_of="own",
    ),
    Mistake(
        "In attend, all heads take the first d columns of W_kv; head h has the columns h * d to "
        "h * d + d - 1.",
        columns="first",
    ),
)


def turn(x):
    """A rotation for the cases: by an angle that grows with the position, in pairs of columns."""
    angle = np.arange(1.0, x.shape[1] + 1)[:, None]  # (S, 1)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1
    )


def observe(answer, Wk, Wv, raw, W_kv, H, rotate, weights):
    """Each function by itself: an error in W_kv does not show in the values."""
    k, v = unpack(answer.keys_and_values(raw, W_kv, H, rotate), "keys_and_values", "k", "v")
    out = answer.attend(weights, raw, W_kv)
    return {"W_kv": answer.make_w_kv(Wk, Wv), "k": k, "v": v, "out": out}


def cases(rng):
    """Wk that are easy to invert; more tokens than heads, and as many."""
    for S, H, d in ((3, 2, 2), (4, 3, 2), (2, 2, 4)):
        D = H * d
        Wk, Wv, W_kv = rng.standard_normal((3, D, D)) + 2 * np.eye(D)
        weights = rng.dirichlet(np.ones(S), H)  # (H, S), each row sums to 1
        yield Wk, Wv, rng.standard_normal((S, D)), W_kv, H, turn, weights


# In the model ------------------------------------------------------------------------------------


@part
class StudentAttend(Part):
    """Attention over cached raw keys: for a prompt, the student's function makes keys and values of
    them; for a single token, another one sums the keys first."""

    rope: Part
    w_kv: np.ndarray  # (D, D)
    scale: float
    heads: int
    answer: object

    def __call__(self, q, raw, v, layer):
        """q (H, T, d), raw keys (1, S, D), v of width 0 -> (H, T, d)"""

        def rotate(k):
            return self.rope(k.astype(q.dtype), layer.row_tokens())

        q = self.rope(q, layer.tokens)
        (H, T, d), (S, D) = q.shape, raw[0].shape
        keys, W_kv = raw[0].astype(np.float64), self.w_kv.astype(np.float64)
        ledger.count(H * T * S * d, self.w_kv.nbytes, raw.nbytes)  # scores
        if T == 1:
            ledger.count(H * S * D + D * D)
            k = rotate(split_heads(raw[0], H))
            weights = ops.softmax(self.scale * q @ k.swapaxes(1, 2))[:, 0]  # (H, S)
            return self.answer.attend(weights, keys, W_kv)[:, None].astype(q.dtype)
        ledger.count(S * D * D + H * T * S * d)
        k, v = self.answer.keys_and_values(keys, W_kv, H, rotate)
        return ops.plain_attention(q, k, v, self.scale, ops.causal_mask(T, S)).astype(q.dtype)


def into_model(lm, answer):
    """The library's slim attention, with the student's W_kv, keys, values and sums."""

    def change(attn, index):
        new = slim(attn, index, 1e4)  # which also moves the biases out of the way
        rope, scale = new.attend.rope, new.attend.scale
        Wk, Wv = (linear.w.astype(np.float64) for linear in (attn.qkv.k, attn.qkv.v))
        W_kv = answer.make_w_kv(Wk, Wv).astype(np.float32)
        return replace(new, attend=StudentAttend(rope, W_kv, scale, attn.heads, answer))

    return wrap(lm, "attn", change)


EXERCISE = Exercise(
    title="Keys are enough",
    minutes=30,
    difficulty="medium",
    names=("make_w_kv", "keys_and_values", "attend"),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed=dict(
        make_w_kv=flawed_w_kv, keys_and_values=flawed_keys_and_values, attend=flawed_attend
    ),
    mistakes=MISTAKES,
    axes=("head", "token", "column"),
    hints=(
        "W_kv solves Wk W_kv = Wv, which NumPy can do for you. In keys_and_values there are two "
        "ways from the raw keys: one rotates, the other multiplies, and neither does both. In "
        "attend, begin with weights @ raw: what is its shape, and which columns of W_kv meet which "
        "row of it?",
        "np.linalg.solve(Wk, Wv), or the inverse of Wk times Wv. The values of all heads are the "
        "product of raw (S, D) and W_kv (D, D); to split x (S, D) into heads, reshape it to "
        "(S, H, d) and swap the axes 0 and 1. The raw keys are split the same way, then rotated. "
        "attend: row h of weights @ raw times W_kv[:, h * d : (h + 1) * d] is row h of the result.",
    ),
    library="minitx/precompute/slim_attention.py: slim_attention",
    into_model=into_model,
    model="stories-parallel",
    saves=(
        "Half of the KV cache, for some multiply-adds more: the weighted sum is over keys, which "
        "are H times as wide as a head's values. In a long text that is what a token pays."
    ),
)
