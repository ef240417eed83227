"""Exercise 3: Causal attention with grouped heads (30 minutes)

A token attends to the past: its query is compared with the keys of all tokens up to itself, which
gives each an attention weight, and the output is the weighted sum of their values. For one head,

    scores[t, s]  = q[t] . k[s] / sqrt(d)             for the keys s that query t may see
    weights[t, :] = softmax(scores[t, :])             exp(score) / sum of exp(score)
    out[t]        = sum over s of weights[t, s] v[s]

The T queries belong to the last T of S tokens; the earlier ones are in the KV cache. So query t
stands at position S - T + t, and sees the keys 0, 1, ..., S - T + t: itself and everything before,
nothing after (the causal mask).

There are H query heads, but only K heads of keys and values, where K divides H (grouped-query
attention, GQA). Each key head serves H / K neighbouring query heads: with H = 4 and K = 2, query
heads 0 and 1 use key head 0, query heads 2 and 3 use key head 1.

    q    (H, T, d)
    k    (K, S, d)
    v    (K, S, n)     values may be wider or narrower than keys
    out  (H, T, n)

Scores can be large: exp(1000) is infinite in float64. The softmax does not change if the largest
score of the row is subtracted from all of them first, and then nothing can overflow.

By hand, one head and one query that sees two keys: the scores are 2 / sqrt(4) = 1 and 0, so the
weights are e / (e + 1) = 0.731 and 0.269, and with values 10 and 0 the result is 7.31.

    >>> q = np.array([[[2.0, 0, 0, 0]]])
    >>> k = np.array([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    >>> v = np.array([[[10.0], [0.0]]])
    >>> attention(q, k, v).round(2).tolist()
    [[[7.31]]]

Sources: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Ainslie et al., "GQA", EMNLP
2023.
"""

import numpy as np

from minitx import ledger
from minitx.learn.exercise import Exercise, Mistake
from minitx.model import Attend
from minitx.technique import swap
from minitx.tree import Part, part


# solution
def attention(q, k, v):
    """q (H, T, d), k (K, S, d), v (K, S, n) -> (H, T, n)"""
    H, T, d = q.shape
    K, S, _ = k.shape
    k = k.repeat(H // K, axis=0)  # (H, S, d): key head j for the query heads j*H/K, j*H/K + 1, ...
    v = v.repeat(H // K, axis=0)  # (H, S, n)
    scores = q @ k.swapaxes(1, 2) / np.sqrt(d)  # (H, T, S)
    query_position = np.arange(S - T, S)
    later = np.arange(S) > query_position[:, None]  # (T, S): True where the key comes later
    scores = np.where(later, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights @ v


# end of solution


def in_loops(q, k, v):
    """The equations, number by number."""
    H, T, d = q.shape
    K, S, n = v.shape
    out = np.zeros((H, T, n))
    for h in range(H):
        j = h // (H // K)  # its key head
        for t in range(T):
            visible = range(S - T + t + 1)
            scores = [sum(q[h, t, c] * k[j, s, c] for c in range(d)) / d**0.5 for s in visible]
            largest = max(scores)
            exponentials = [np.exp(score - largest) for score in scores]
            for s, e in zip(visible, exponentials):
                out[h, t] += e / sum(exponentials) * v[j, s]
    return out


def flawed(q, k, v, *, scale=0.5, shift=0, first=False, heads="repeat", axis=-1, stable=True):
    H, T, d = q.shape
    K, S, n = v.shape
    times = [H // K, 1, 1]
    k, v = (np.tile(x, times) if heads == "tile" else x.repeat(H // K, 0) for x in (k, v))
    scores = q @ k.swapaxes(1, 2) / d**scale
    query_position = np.arange(T) + (0 if first else S - T)
    later = np.arange(S) > query_position[:, None] + shift
    scores = np.where(later, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis, keepdims=True) if stable else scores)
    return weights / weights.sum(axis, keepdims=True) @ v


MISTAKES = (
    Mistake("The scores are not scaled: divide q . k by sqrt(d).", scale=0),
    Mistake("You divide the scores by d instead of sqrt(d).", scale=1),
    Mistake(
        "Each query sees one key too many, the next token's: the mask must hide every key that "
        "comes after the query.",
        shift=1,
    ),
    Mistake("Each query is blind to its own key; a token may attend to itself.", shift=-1),
    Mistake(
        "The queries are aligned with the first T keys, but they are the last T of S tokens: query "
        "t stands at position S - T + t.",
        first=True,
    ),
    Mistake(
        "Query heads use the wrong key heads: the groups are neighbours (0 0 1 1: np.repeat), not "
        "a cycle (0 1 0 1: np.tile).",
        heads="tile",
    ),
    Mistake("The softmax sums over the queries; its weights must sum to 1 over the keys.", axis=-2),
    Mistake(
        "exp overflows when scores are large: subtract the largest score of each row first.",
        stable=False,
    ),
)


def cases(rng):
    """With and without a cache, one head and groups of heads, small and huge scores."""
    for H, K, T, S, d, n in ((1, 1, 4, 4, 4, 4), (4, 2, 3, 5, 4, 3), (6, 3, 2, 7, 6, 2)):
        yield tuple(rng.standard_normal(shape) for shape in ((H, T, d), (K, S, d), (K, S, n)))
    yield tuple(30 * rng.standard_normal(shape) for shape in ((2, 4, 4), (2, 4, 4), (2, 4, 4)))


# In the model ------------------------------------------------------------------------------------


@part
class StudentAttend(Part):
    """Attention that is computed by the student's function."""

    attention: object

    def __call__(self, q, k, v, layer):
        scores = q.size * k.shape[-2]  # what minitx counts for scores, and for the weighted sum
        ledger.count(scores // k.shape[-1] * (k.shape[-1] + v.shape[-1]))
        ledger.count(cache_bytes=k.nbytes + v.nbytes)
        wide = (x.astype(np.float64) for x in (q, k, v))
        return self.attention(*wide).astype(q.dtype)


def into_model(lm, answer):
    return swap(lm, Attend, lambda _: StudentAttend(answer.attention))


EXERCISE = Exercise(
    title="Causal attention with grouped heads",
    minutes=30,
    difficulty="medium",
    names=("attention",),
    cases=lambda rng: list(cases(rng)),
    flawed=flawed,
    mistakes=MISTAKES,
    axes=("head", "query", "column"),
    hints=(
        "Start with K = H and T = S. q @ k.swapaxes(1, 2) gives all scores at once, (H, T, S). A "
        "hidden key gets the score -inf, because exp(-inf) is 0.",
        "np.repeat(k, H // K, axis=0) gives each query head its key head. np.arange(S) > "
        "np.arange(S - T, S)[:, None] is True where the key comes after the query: np.where(that, "
        "-np.inf, scores). Subtract scores.max(-1, keepdims=True) before np.exp.",
    ),
    library="minitx/ops.py: plain_attention (and minitx/fast.py: attention, several times faster)",
    into_model=into_model,
    saves=(
        "All of it is needed: this is the dense attention that ELSA, A3, DOTA and the others try "
        "to avoid computing (exercises 14 and 15)."
    ),
)
