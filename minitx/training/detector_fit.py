"""A detector for a model that is left as it is: least squares, after the model was trained.

Not DOTA's training, in which the model learns to be foretold (``minitx.training.detector``), and
so worth less: a substitute for models that come without one. Scores q.k / sqrt(d) are fitted over
all pairs of a query and a key that it sees, in calibration stories. S~ is linear in W~q when W~k is
given, and the other way round; each is k x k for a head, so the normal equations are small, and
their sums over pairs are cumulative sums over tokens.
"""

from collections.abc import Sequence

import numpy as np

from minitx.errors import MinitxError
from minitx.model import Rope
from minitx.skip.dota.detector import Detector, narrow_rope, projection
from minitx.state import Tokens
from minitx.training.detector import watch
from minitx.tree import Part

TEXTS = 8  # stories: about 1,600 tokens, a few seconds for the shipped models
RIDGE = 1e-9  # of the mean of the diagonal: so that equal columns can be told apart at all
ROUNDS = 2  # of W~k and W~q again, where positions rotate: more gain next to nothing


def fit(model, texts: Sequence, k: int, seed: int = 0) -> tuple[Detector, ...]:
    """A detector of rank k for each block of the model; texts: lists of ids."""
    if not texts:
        raise MinitxError("dota cannot fit a detector on nothing; give it a text.")
    watching, watched = watch(model)
    seen: list[list] = [[] for _ in watched]
    for ids in texts:
        watching.hidden(ids)
        for block, into in zip(watched, seen):
            into.append(block.last())
    rng = np.random.default_rng(seed)
    return tuple(
        fit_block(projection(model.config.width, k, rng), block.attn, found)
        for block, found in zip(watched, seen)
    )


def fit_block(p, attn, found: Sequence[tuple]) -> Detector:
    """The detector with the projection p (D, k) for what was seen of one block: x (T, D), q
    (H, T, d), k (K, T, d) of each text."""
    x, q, _ = found[0]
    rope = narrow_rope(attn.rope, p.shape[1], q.shape[-1])
    p = p.astype(x.dtype)
    groups = [
        fit_group([Text(p, attn, rope, seen, group) for seen in found], type(rope) is Rope)
        for group in range(attn.kv_heads)
    ]
    w_q = np.concatenate([w for w, _ in groups], axis=1).astype(x.dtype)
    w_k = np.concatenate([w for _, w in groups], axis=1).astype(x.dtype)
    return Detector(p, w_q, w_k)


class Text:
    """What the equations need of one text, for G heads that share their keys; in float64."""

    def __init__(self, p, attn, rope: Part, seen: tuple, group: int):
        x, q, k = (a.astype(np.float64) for a in seen)
        T, rank = len(x), p.shape[1]
        self.y = x @ p  # (T, k)
        mine = q.reshape(attn.kv_heads, -1, *q.shape[1:])[group]  # (G, T, d)
        self.s = np.tril(mine @ k[group].T) * attn.attend.scale  # (G, T, T), 0 where not seen
        unit = np.broadcast_to(np.eye(rank)[:, None], (rank, T, rank))
        self.turn = rope(unit, Tokens(slice(0, T))).swapaxes(
            0, 1
        )  # (T, k, k): a row y is turned to y turn[t]

    def turned(self, w):
        """y_t w turned to the angle of its place t: (T, k) for w (k, k)."""
        return np.einsum("tk,tkn->tn", self.y @ w, self.turn)

    def query_equations(self, w_k, head: int):
        """What ``solve`` needs to find the W~q of one head."""
        keys = self.turned(w_k)
        return self, squares(keys).cumsum(0), self.s[head] @ keys

    def key_equations(self, w_q):
        """What ``solve`` needs to find W~k, w_q being (G, k, k)."""
        queries = [self.turned(w) for w in w_q]
        square = sum(squares(rows) for rows in queries)[::-1].cumsum(0)[::-1]
        return self, square, sum(s.T @ rows for s, rows in zip(self.s, queries))


def squares(rows):
    """The products (T, k, k) of each row (T, k) with itself."""
    return rows[:, :, None] * rows[:, None, :]


def fit_group(texts: Sequence[Text], rotary: bool):
    """W~q (k, G*k) and W~k (k, k) of heads that share their keys.

    Without rotation W~k = I leaves nothing out, since only W~q W~k^T counts: one solution is the
    best there is, and the singular values are shared out between the two. With it, in turns.
    """
    rank, heads = texts[0].y.shape[1], range(len(texts[0].s))
    w_k = np.eye(rank)
    w_q = [solve([text.query_equations(w_k, head) for text in texts]) for head in heads]
    for _ in range(ROUNDS if rotary else 0):
        w_k = solve([text.key_equations(w_q) for text in texts])
        w_q = [solve([text.query_equations(w_k, head) for text in texts]) for head in heads]
    if not rotary:
        u, s, v = np.linalg.svd(np.concatenate(w_q), full_matrices=False)  # (G*k, k), (k,), (k, k)
        w_q, w_k = np.split(u * s**0.5, len(heads)), v.T * s**0.5
    return np.concatenate(w_q, axis=1), w_k


def solve(equations: Sequence[tuple]):
    """W (k, k) with the least sum over pairs of (S_ij - y_i W turn_i o_j)^2, for (text, for each i
    the sum over j of o_j o_j^T (T, k, k), and the sum over j of S_ij o_j (T, k)) of each text."""
    left, right = 0, 0
    for text, square, product in equations:
        y, turn = text.y, text.turn
        rank = y.shape[1]
        square = turn @ square @ turn.swapaxes(-1, -2)
        both = squares(y).reshape(-1, rank**2).T @ square.reshape(-1, rank**2)  # (aa', cc')
        left = left + both.reshape([rank] * 4).swapaxes(1, 2).reshape(rank**2, rank**2)
        right = right + y.T @ np.einsum("tkn,tn->tk", turn, product)
    left = left + RIDGE * np.trace(left) / len(left) * np.eye(len(left))
    return np.linalg.solve(left, right.reshape(-1)).reshape(right.shape)
