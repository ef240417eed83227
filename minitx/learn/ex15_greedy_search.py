"""Exercise 15: Greedy search (40 minutes)

A score q . key is a sum of d products, q[j] * key[j]. A3 predicts which keys have high scores from
the most extreme of these products alone. For one query it repeats M times:

1. Take the largest product that is left, of all keys and columns. If it is positive, add it to the
   sum of its key.
2. The gate: if the running total of everything added so far is 0 or more, take the smallest product
   that is left. If it is negative, add it to the sum of its key. While the running total is below
   0, leave this step out: otherwise queries whose products are mostly negative would be left
   without candidates.

A product that was taken is gone: it is never added twice. One that has the wrong sign is not added,
and stays. At first all sums and the running total are 0. The total includes what step 1 has just
added.

After M rounds, the keys with a sum above 0 are the candidates, whose scores are then computed
exactly. If there are none, the key with the largest sum is the only candidate (the first one, if
several have it).

A3 keeps each column of the keys sorted. So it finds the extreme products at the ends of the
columns: the largest product of column j is at its upper end if q[j] > 0, and at its lower end if
q[j] < 0. You may do it this way, or compute all S * d products and sort them: the result is the
same, and it is all that is checked. No two products are equal.

    q        (d,)
    keys     (S, d)
    M                a number of rounds, at most S * d
    result   (sums (S,), kept (S,)): a sum for each key, and booleans

By hand, with q = (1, -1), three keys and M = 2:

    key          products     rounds
    (5, 2)         5  -2      1. largest 5: key 0. Total 5. Smallest -8: key 1. Total -3.
    (3, 8)         3  -8      2. largest 4: key 2. Total 1. Smallest -6: key 2. Total -5.
    (-6, -4)      -6   4

The sums are 5, -8 and 4 - 6 = -2, so only key 0 is a candidate. The scores are 3, -5 and -2.

    >>> sums, kept = greedy(np.array([1.0, -1]), np.array([[5.0, 2], [3, 8], [-6, -4]]), 2)
    >>> sums.tolist(), kept.tolist()
    ([5.0, -8.0, -2.0], [True, False, False])

Source: Ham et al., "A3: Accelerating Attention Mechanisms in Neural Networks with Approximation",
HPCA 2020.
"""

import numpy as np

from minitx import ledger
from minitx.learn.exercise import Exercise, Mistake
from minitx.model import Attend
from minitx.shared.coarse import coarse
from minitx.shared.sparse_attention import SparseAttention
from minitx.technique import swap
from minitx.tree import Part, part


# solution
def greedy(q, keys, M):
    """q (d,), keys (S, d), M rounds -> (sums (S,), kept (S,) booleans)"""
    products = q * keys  # (S, d)
    order = products.argsort(axis=None)  # indices into the flat products, the smallest first
    smallest, largest = iter(order), iter(order[::-1])
    sums, total = np.zeros(len(keys)), 0.0
    for _ in range(M):
        for side, sign in ((largest, 1), (smallest, -1)):
            if sign < 0 and total < 0:  # the gate
                continue
            index = next(side)
            product = products.flat[index]
            if sign * product > 0:  # if not, no later one of this side has the right sign either
                sums[index // len(q)] += product
                total += product
    kept = sums > 0
    if not kept.any():
        kept[sums.argmax()] = True
    return sums, kept


# end of solution


def in_loops(q, keys, M):
    """Look at all products in each step."""
    S, d = keys.shape
    sums, total, taken = [0.0] * S, 0.0, set()
    for _ in range(M):
        left = [(q[j] * keys[i, j], i, j) for i in range(S) for j in range(d)]
        left = [entry for entry in left if entry[1:] not in taken]
        product, i, j = max(left)
        if product > 0:
            sums[i], total = sums[i] + product, total + product
            taken.add((i, j))
        if total >= 0:
            product, i, j = min(left)
            if product < 0:
                sums[i], total = sums[i] + product, total + product
                taken.add((i, j))
    candidates = [i for i in range(S) if sums[i] > 0] or [sums.index(max(sums))]
    return np.array(sums), np.array([i in candidates for i in range(S)])


def flawed(
    q,
    keys,
    M,
    *,
    once=True,
    gate="after",
    order="value",
    negatives=True,
    signs=True,
    keep="positive",
    fallback="largest",
):
    take = (from_columns if order == "unflipped" else from_all)(q, keys, once)
    signs_of_round = {"absolute": (0,)}.get(order, (1, -1) if negatives else (1,))
    sums, total = np.zeros(len(keys)), 0.0
    for _ in range(M):
        before = total
        for sign in signs_of_round:
            looked_at = before if gate == "before" else total
            closed = looked_at <= 0 if gate == "strict" else looked_at < 0
            if sign < 0 and closed and gate != "none":
                continue
            product, key = take(sign)
            if sign * product > 0 or not signs or sign == 0:
                sums[key] += product
                total += product
    kept = {"positive": sums > 0, "not negative": sums >= 0, "M": largest_of(sums, M)}[keep]
    if not kept.any() and fallback != "none":
        kept[sums.argmax() if fallback == "largest" else slice(None)] = True
    return sums, kept


def largest_of(sums, M):
    kept = np.zeros(len(sums), bool)
    kept[np.argsort(-sums, kind="stable")[:M]] = True
    return kept


def from_all(q, keys, once):
    """take(sign): the largest (1) or smallest (-1) product that is left, or that of the largest
    absolute value (0), and its key."""
    products = q * keys
    left = np.ones(products.shape, bool)

    def take(sign):
        size = abs(products) if sign == 0 else sign * products
        best = np.unravel_index(np.where(left, size, -np.inf).argmax(), left.shape)
        left[best] = not once
        return products[best], best[0]

    return take


def from_columns(q, keys, once):
    """The same from sorted columns, but always from their upper ends for the largest product and
    from their lower ends for the smallest one."""
    S, columns = len(keys), range(len(q))
    rows = keys.argsort(0)
    taken = {1: [0] * len(q), -1: [0] * len(q)}

    def take(sign):
        fronts = []
        for j in columns:
            n = taken[sign][j]
            row = rows[S - 1 - n if sign > 0 else n, j] if n < S else 0
            fronts.append((sign * q[j] * keys[row, j] if n < S else -np.inf, row))
        j = max(columns, key=lambda j: fronts[j][0])
        taken[sign][j] += once
        return sign * fronts[j][0], fronts[j][1]

    return take


MISTAKES = (
    Mistake(
        "Where q[j] is negative, the largest product of a column is at its lower end: flip the "
        "ends of these columns.",
        order="unflipped",
    ),
    Mistake("A product is added again and again: one that was taken is gone.", once=False),
    Mistake(
        "The gate is missing: take a smallest product only while the running total is not below 0.",
        gate="none",
    ),
    Mistake(
        "The gate looks at the running total before step 1; the total includes the product that "
        "was just added.",
        gate="before",
    ),
    Mistake("The gate is open at a running total of 0, too: >= 0, not > 0.", gate="strict"),
    Mistake(
        "You take the products of the largest absolute value. Take one from each end: the largest, "
        "then the smallest.",
        order="absolute",
    ),
    Mistake(
        "Negative products are never added: step 2 takes the smallest product that is left.",
        negatives=False,
    ),
    Mistake(
        "Products of the wrong sign are added: step 1 adds only positive ones, step 2 only "
        "negative ones.",
        signs=False,
    ),
    Mistake(
        "You keep the M keys with the largest sums; keep all keys with a sum above 0, and no "
        "others.",
        keep="M",
    ),
    Mistake(
        "Keys with a sum of 0 are kept: none of their products was taken, so they are no "
        "candidates.",
        keep="not negative",
    ),
    Mistake(
        "A query may be left without any candidate: then keep the key with the largest sum.",
        fallback="none",
    ),
    Mistake(
        "If there is no candidate, you keep all keys; keep the one with the largest sum.",
        fallback="all",
    ),
)


def cases(rng):
    """Products of both signs, mostly negative ones, only negative ones, and only positive ones."""
    for d, S, M in ((3, 4, 2), (4, 5, 4)):
        yield rng.standard_normal(d), rng.standard_normal((S, d)), M
    # the running total falls below 0, and the next product lifts it again
    products = np.array([5, 4, 3, -6, -2.5, -1]) * rng.uniform(0.95, 1.05, 6)
    q = np.array([1, -1]) * rng.uniform(0.5, 2, 2)
    yield q, rng.permutation(products).reshape(3, 2) / q, 2
    q = np.where(rng.random(3) < 0.5, -1, 1) * rng.uniform(0.5, 2, 3)
    size = np.sign(q) * rng.uniform(0.5, 2, (5, 3))
    mostly = size * np.where(np.arange(15).reshape(5, 3) % 4 == 1, -0.2, 1)
    yield q, -mostly, 4
    yield q, -size, 3
    yield q, size, 3


# In the model ------------------------------------------------------------------------------------

ROUNDS = 0.5  # of the search, for each key that the query sees


@part
class StudentSelector(Part):
    """Keeps, for each query and head, the candidates of the student's search."""

    greedy: object
    rounds: float

    def keeps_all(self, S: int) -> bool:
        return False

    def remember(self, k, layer):
        """Nothing: the student's function gets the keys themselves."""

    def __call__(self, q, k, known, visible):
        """q (H, T, d), k (K, S, d) -> (K, H / K, T, S) booleans"""
        (H, T, d), (K, S, _) = q.shape, k.shape
        kept = np.zeros((H, T, S), bool)
        q, k = coarse(q), coarse(k)  # as the library does; float64
        for h in range(H):
            for t, own in enumerate(visible.own):
                n = own + 1
                M = max(1, round(self.rounds * n))
                # in sorted columns, a search reads at most this many products: value and row
                ledger.count(2 * (d + M), cache_bytes=2 * (d + M) * 8)
                kept[h, t, :n] = self.greedy(q[h, t], k[h // (H // K), :n], M)[1]
        return kept.reshape(K, H // K, T, S)


def into_model(lm, answer):
    def change(dense: Attend) -> SparseAttention:
        return SparseAttention(StudentSelector(answer.greedy, ROUNDS), dense.scale)

    return swap(lm, Attend, change)


EXERCISE = Exercise(
    title="Greedy search",
    minutes=40,
    difficulty="hard",
    names=("greedy",),
    cases=lambda rng: list(cases(rng)),
    flawed=flawed,
    mistakes=MISTAKES,
    hints=(
        "q * keys gives all products at once, (S, d). Sort them once; then one index walks up from "
        "the smallest and another one down from the largest.",
        "products.argsort(axis=None) sorts the flattened products; index // d is the key of one. "
        "In each round look at the next one from the top, add it if it is positive, then check the "
        "running total, and look at the next one from the bottom. argmax finds the largest sum.",
    ),
    library="minitx/skip/a3/__init__.py: greedy_search",
    into_model=into_model,
    same_as={"a3": {"iterations": ROUNDS, "threshold": 0.0}},
    saves=(
        "The search needs no multiplications but those of the products that it takes, and hardware "
        "does one round per cycle. In NumPy, computing all scores is many times faster."
    ),
)
