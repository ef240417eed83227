"""Exercise 14: Sign hashes (40 minutes)

A query gets most of its attention from a few keys. If we knew beforehand which keys will have high
scores, the others would not have to be scored. ELSA predicts them from bits. It projects a vector
onto k random directions (the rows of A) and keeps only the signs, which are the hash of the vector:

    hash(x) = (A x >= 0)              k booleans

The further two vectors point apart, the more of their bits differ: at 180 degrees all k. So the
number of differing bits (the Hamming distance) estimates the angle in radians:

    angle = max(0, pi / k * distance(hash(q), hash(key)) - bias)

The bias is a small angle. Subtracting it makes most estimates too small rather than too large, so
that a key is more often kept needlessly than lost. No angle is below 0, hence the max. The score of
a key depends on its length too, so its estimated similarity is

    sim(key) = |key| * cos(angle)     an estimate of q . key / |q|

Write two functions. ``similarity`` returns sim of each key. ``select`` returns which keys to score,
as booleans:

- those with sim(key) > t * (the largest |key| of all S keys);
- if there are none, only the key with the largest sim (the first one, if several have it).

    q        (d,)
    keys     (S, d)
    A        (k, d)     k may differ from d
    bias, t             numbers

By hand: A has the rows (1, 0), (0, 1), (1, -1), so k = 3. The query (3, 1) has the hash 1 1 1. The
keys (2, 1), (-1, 2) and (-3, -4) have the hashes 1 1 1, 0 1 0 and 0 0 1. The distances are 0, 2, 2.
With a bias of 0.2 the angles are max(0, -0.2) = 0 and 2 pi / 3 - 0.2 = 1.894, with the cosines 1
and -0.318. The lengths are 2.236, 2.236 and 5. So the similarities are 2.236, -0.710 and -1.589.
With t = 0.3 a key needs more than 0.3 * 5 = 1.5: only the first is kept.

    >>> A = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    >>> keys = np.array([[2.0, 1.0], [-1.0, 2.0], [-3.0, -4.0]])
    >>> similarity(np.array([3.0, 1.0]), keys, A, 0.2).round(2).tolist()
    [2.24, -0.71, -1.59]
    >>> select(np.array([3.0, 1.0]), keys, A, 0.2, 0.3).tolist()
    [True, False, False]

Source: Ham et al., "ELSA: Hardware-Software Co-design for Efficient, Lightweight Self-Attention
Mechanism in Neural Networks", ISCA 2021.
"""

from types import SimpleNamespace

import numpy as np

from minitx import ledger
from minitx.learn.exercise import Exercise, Mistake
from minitx.model import Attend
from minitx.shared.sparse_attention import SparseAttention
from minitx.skip.elsa import sign_hash, simulate_angle_bias
from minitx.technique import swap
from minitx.tree import Part, part, table


# solution
def similarity(q, keys, A, bias):
    """q (d,), keys (S, d), A (k, d), bias -> (S,): the estimate of q . key / |q| for each key"""
    distance = ((A @ q >= 0) != (keys @ A.T >= 0)).sum(-1)  # (S,): how many of k bits differ
    angle = np.maximum(0, np.pi / len(A) * distance - bias)
    return np.linalg.norm(keys, axis=-1) * np.cos(angle)


def select(q, keys, A, bias, t):
    """q (d,), keys (S, d), A (k, d), bias, t -> (S,) booleans: which keys are scored"""
    sim = similarity(q, keys, A, bias)
    kept = sim > t * np.linalg.norm(keys, axis=-1).max()
    if not kept.any():
        kept[sim.argmax()] = True
    return kept


# end of solution


def similarity_in_loops(q, keys, A, bias):
    sims = []
    for key in keys:
        distance = 0
        for row in A:
            a = sum(row[c] * q[c] for c in range(len(q))) >= 0
            b = sum(row[c] * key[c] for c in range(len(q))) >= 0
            distance += a != b
        angle = max(0.0, np.pi / len(A) * distance - bias)
        sims.append(sum(x * x for x in key) ** 0.5 * np.cos(angle))
    return np.array(sims)


def select_in_loops(q, keys, A, bias, t):
    sims = similarity_in_loops(q, keys, A, bias)
    longest = max(sum(x * x for x in key) ** 0.5 for key in keys)
    kept = [sim > t * longest for sim in sims]
    if True not in kept:
        kept[list(sims).index(max(sims))] = True
    return np.array(kept)


in_loops = SimpleNamespace(similarity=similarity_in_loops, select=select_in_loops)


def flawed_similarity(
    q,
    keys,
    A,
    bias,
    *,
    sign=-1,
    clamp=True,
    length="own",
    turn=np.pi,
    per="k",
    same=False,
):
    q_hash, hashes = A @ q >= 0, keys @ A.T >= 0
    distance = (q_hash == hashes if same else q_hash != hashes).sum(-1)
    angle = turn / {"k": len(A), "d": len(q), "1": 1}[per] * distance + sign * bias
    angle = np.maximum(0, angle) if clamp else angle
    lengths = np.linalg.norm(keys, axis=-1 if length == "own" else None) if length else 1
    return lengths * np.cos(angle)


def flawed_select(
    q,
    keys,
    A,
    bias,
    t,
    *,
    limit="longest",
    fallback="best",
    above=True,
    sign=-1,
    clamp=True,
    length="own",
    turn=np.pi,
    per="k",
    same=False,
):
    flags = dict(sign=sign, clamp=clamp, length=length, turn=turn, per=per, same=same)
    sim = flawed_similarity(q, keys, A, bias, **flags)
    lengths = np.linalg.norm(keys, axis=-1)
    least = t * {"longest": lengths.max(), "1": 1, "own": lengths, "sim": sim.max()}[limit]
    kept = sim > least if above else sim < least
    if not kept.any() and fallback == "best":
        kept[sim.argmax()] = True
    if not kept.any() and fallback == "all":
        kept[:] = True
    return kept


MISTAKES = (
    Mistake("The bias is added; subtract it from the estimated angle.", sign=1),
    Mistake("The bias is missing: subtract it from the estimated angle.", sign=0),
    Mistake(
        "Angles become negative: take max(0, ...) after the bias is subtracted. Otherwise a key "
        "whose bits all agree looks less similar than it is.",
        clamp=False,
    ),
    Mistake(
        "The length of the key is missing: the similarity is |key| * cos(angle), since a long key "
        "has higher scores.",
        length=False,
    ),
    Mistake(
        "You take the length of the whole matrix of keys; each key has a length of its own: the "
        "norm over the last axis.",
        length="all",
    ),
    Mistake("pi is missing: all k bits differ at an angle of pi.", turn=1),
    Mistake("np.cos expects radians: all k bits differ at pi, not at 180.", turn=180),
    Mistake("You divide by d; k, the number of bits, is the number of rows of A.", per="d"),
    Mistake("The distance is not divided by k, so it is no share of the bits.", per="1"),
    Mistake("You count the bits that agree; the distance counts those that differ.", same=True),
    Mistake(
        "The threshold is relative: compare sim with t times the largest |key|, not with t.",
        limit="1",
    ),
    Mistake(
        "Each key is compared with t times its own length; take the largest length of all keys.",
        limit="own",
    ),
    Mistake(
        "You compare with t times the largest similarity; take the largest |key|.", limit="sim"
    ),
    Mistake("You keep the keys below the threshold; keep those above.", above=False),
    Mistake(
        "A query may be left without any key, and softmax over nothing is 0 / 0: if none passes, "
        "keep the key with the largest sim.",
        fallback="none",
    ),
    Mistake(
        "If no key passes, you keep all; keep only the one with the largest sim.", fallback="all"
    ),
)


def cases(rng):
    """More bits than columns and fewer; thresholds that some keys pass, and that none passes; two
    keys like the query beside a far longer one that is not; short keys."""
    for d, k, S, bias, t, size in (
        (3, 5, 6, 0.3, 0.1, 1),
        (4, 3, 7, 0.2, 2.0, 1),
        (4, 9, 8, 0.5, 0.6, 1),
        (3, 4, 8, 0.4, 0.6, 0.1),
    ):
        q, keys = rng.standard_normal(d), rng.standard_normal((S, d))
        keys *= rng.uniform(0.5, 1, (S, 1)) / np.linalg.norm(keys, axis=-1, keepdims=True)
        keys[0] = q / np.linalg.norm(q)
        if t == 0.6:
            keys[1:3] = 1.2 * keys[0], -3 * keys[0]
        yield q, size * keys, rng.standard_normal((k, d)), bias, t
    # Projections that are exactly 0, one of the query and two of keys: their bit is True.
    keys = np.array([[2.0, 0.0], [1.0, -1.0], [0.0, 3.0]])
    yield np.array([1.0, 1.0]), keys, np.array([[1.0, -1.0], [1.0, 0.0], [0.0, 1.0]]), 0.1, 0.3


def observe(answer, q, keys, A, bias, t):
    return {
        "similarity": answer.similarity(q, keys, A, bias),
        "select": answer.select(q, keys, A, bias, t),
    }


# In the model ------------------------------------------------------------------------------------

BITS, THRESHOLD = 16, 0.25


@part
class StudentSelector(Part):
    """Keeps, for each query and head, the keys that the student's function selects."""

    select: object
    bias: float
    threshold: float
    A: np.ndarray = table()  # (k, d)

    def keeps_all(self, S: int) -> bool:
        return False

    def remember(self, k, layer):
        """Nothing: the student's function hashes all keys again. Counted is what is needed once
        for each new key: its hash and its length."""
        ledger.count(k[..., -len(layer.tokens) :, :].size * (len(self.A) + 1))

    def __call__(self, q, k, known, visible):
        """q (H, T, d), k (K, S, d) -> (K, H / K, T, S) booleans"""
        (H, T, d), (K, S, _) = q.shape, k.shape
        hashes_and_lengths = K * S * (-(-len(self.A) // 8) + 4)  # bytes
        # the query's hash; |key| * cos
        ledger.count(H * T * (d * len(self.A) + S), cache_bytes=hashes_and_lengths)
        kept = np.zeros((H, T, S), bool)
        q, k = q.astype(np.float64), k.astype(np.float64)
        for h in range(H):
            for t, own in enumerate(visible.own):
                keys = k[h // (H // K), : own + 1]  # those that the query sees
                kept[h, t, : own + 1] = self.select(
                    q[h, t], keys, self.A, self.bias, self.threshold
                )
        return kept.reshape(K, H // K, T, S)


def library_projection(d: int, bits: int) -> tuple[np.ndarray, float]:
    """The library's random A (bits, d) as a plain matrix, and its bias. bits: at most d."""
    (project,) = sign_hash(d, bits, seed=0).projections
    return project(np.eye(d)).T[:bits], simulate_angle_bias(d, bits)


def into_model(lm, answer):
    A, bias = library_projection(lm.model.config.head_width, BITS)

    def change(dense: Attend) -> SparseAttention:
        return SparseAttention(StudentSelector(answer.select, bias, THRESHOLD, A), dense.scale)

    return swap(lm, Attend, change)


EXERCISE = Exercise(
    title="Sign hashes",
    minutes=40,
    difficulty="hard",
    names=("similarity", "select"),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed={"similarity": flawed_similarity, "select": flawed_select},
    mistakes=MISTAKES,
    hints=(
        "A @ q gives the k projections of the query, keys @ A.T those of all keys, (S, k). "
        "Comparing two arrays of booleans with != says where they differ.",
        "(A @ q >= 0) != (keys @ A.T >= 0) has the shape (S, k); its sum over the last axis is the "
        "distance. Then np.maximum(0, np.pi / k * distance - bias), np.cos, and "
        "np.linalg.norm(keys, axis=-1). In select, kept.any() tells whether a key passed.",
    ),
    library="minitx/skip/elsa.py: HashSelector",
    into_model=into_model,
    same_as={"elsa": {"threshold": THRESHOLD, "bits": BITS}},
    saves=(
        "Fewer keys are scored, but hashes and estimates cost something too, so it pays with many "
        "keys. Here all heads have the same threshold; minitx learns one for each."
    ),
)
