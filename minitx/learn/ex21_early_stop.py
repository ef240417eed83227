"""Exercise 21: Early stop before a ReLU (30 minutes)

A ReLU turns every negative number into 0. So of a neuron

    h = max(0, b + x_1 w_1 + x_2 w_2 + ... + x_D w_D)

that ends below 0, only the sign is needed, and often the sign is certain long before the last
product. Let all inputs x be 0 or more, as they are after an earlier ReLU. Then a product is
negative only if its weight is. Add the products with positive weights first, and from then on the
sum can only fall: once it is 0 or less, ReLU makes it 0 whatever is left. SnaPEA stops there.

The order depends on the weights alone, so it is found once, before any input is known:

    sort_weights(w) -> order

    w      (D,)   the weights of one neuron
    order  (D,)   the indices of the weights in the order in which their products are added:
                  first those of positive weights, the largest weight first;
                  then all others, the largest absolute value first, so that the sum falls
                  steeply (weights that are 0 come last). Equal weights: the lower index first.

Then, for each input, the sum begins with the bias. All products with positive weights are added.
After that, look at the sum before you add the next product, and stop if it is 0 or less. If it
never is, all products are added.

    relu_dot(x, w, b, order) -> h, count

    x      (D,)   inputs, none negative
    b             the bias, a number
    h             the neuron after ReLU, a number
    count         how many products were computed, an integer (those with x = 0 count, too)

By hand: x = (1, 2, 3), w = (-2, 1, -1), b = 1. The order is 1, 0, 2. The sum begins with 1 and
becomes 1 + 2 * 1 = 3 after the only positive weight. It is above 0, so go on: 3 - 1 * 2 = 1, go on:
1 - 3 * 1 = -2. Nothing was saved. With b = -1 it is -1, 1, -1: stop after 2 of 3 products.

    >>> x, w = np.array([1.0, 2.0, 3.0]), np.array([-2.0, 1.0, -1.0])
    >>> order = sort_weights(w)
    >>> order.tolist()
    [1, 0, 2]
    >>> for b in (1.0, -1.0, 5.0):
    ...     h, count = relu_dot(x, w, b, order)
    ...     print(float(h), int(count))
    0.0 3
    0.0 2
    2.0 3

Source: Akhlaghi et al., "SnaPEA: Predictive Early Activation for Reducing Computation in Deep
Convolutional Neural Networks", ISCA 2018; its exact mode.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from minitx import ledger
from minitx.learn.exercise import Exercise, Mistake
from minitx.learn.outcomes import unpack
from minitx.technique import blocks_of
from minitx.tree import Part, part, rebuild


# solution
def sort_weights(w):
    """w (D,) -> order (D,): indices of positive weights, then of the others, each by size"""
    return np.lexsort((-abs(w), w <= 0))  # by the last key first


def relu_dot(x, w, b, order):
    """x (D,), w (D,), b, order (D,) -> relu(x . w + b), and how many products it took"""
    sums = np.concatenate([[b], (x * w)[order]]).cumsum()  # sums[k]: after k products
    positive = np.count_nonzero(w > 0)
    enough = sums[positive:] <= 0
    count = positive + enough.argmax() if enough.any() else len(w)
    return max(sums[count], 0), count


# end of solution


def sort_in_loops(w):
    """The largest of those that are left, again and again."""
    order, left = [], list(range(len(w)))
    while left:
        positive = [i for i in left if w[i] > 0]
        best = (positive or left)[0]
        for i in positive or left:
            if abs(w[i]) > abs(w[best]):
                best = i
        order.append(best)
        left.remove(best)
    return np.array(order)


def relu_dot_in_loops(x, w, b, order):
    """Product by product."""
    total, count = b, 0
    for i in order:
        if w[i] <= 0 and total <= 0:
            break
        total += x[i] * w[i]
        count += 1
    return (total if total > 0 else 0), count


in_loops = SimpleNamespace(sort_weights=sort_in_loops, relu_dot=relu_dot_in_loops)


def flawed_sort(
    w, *, first="positive", rest="largest", positives="largest", ascending=False, indices=True
):
    size = -abs(w)
    by_size = dict(largest=size, smallest=-size, unsorted=np.zeros(len(w)))
    group = dict(positive=w <= 0, neither=np.zeros(len(w)))[first]
    order = np.lexsort((np.where(w > 0, by_size[positives], by_size[rest]), group))
    if ascending:
        order = np.argsort(w, kind="stable")
    return order if indices else w[order]


def flawed_relu_dot(
    x,
    w,
    b,
    order,
    *,
    bias="first",
    begin="positive",
    stop="<= 0",
    look="before",
    relu=True,
    ordered=True,
):
    total, count = (b if bias == "first" else 0), 0
    for i in order if ordered else range(len(w)):
        may_stop = begin == "at once" or w[i] <= 0
        enough = {"<= 0": total <= 0, "< 0": total < 0, "never": False}[stop]
        if look == "before" and may_stop and enough:
            break
        total += x[i] * w[i]
        count += 1
        if look == "after" and may_stop and (total < 0 if stop == "< 0" else total <= 0):
            break
    total += b if bias == "last" else 0
    return (max(total, 0) if relu else total), count


MISTAKES = (
    Mistake(
        "The order is ascending, so it begins with the negative weights; the positive ones come "
        "first.",
        ascending=True,
    ),
    Mistake(
        "The order ignores the sign: first all positive weights, then all others, each part by "
        "absolute value.",
        first="neither",
    ),
    Mistake(
        "The others are ordered from the smallest absolute value: begin with the most negative "
        "weight, so that the sum falls steeply.",
        rest="smallest",
    ),
    Mistake(
        "Both parts are in the order of their indices: sort each by absolute value, the largest "
        "first.",
        rest="unsorted",
        positives="unsorted",
    ),
    Mistake(
        "sort_weights returns the sorted weights; return their indices (np.argsort or np.lexsort).",
        indices=False,
    ),
    Mistake(
        "relu_dot does not follow the order: the k-th product is that of weight order[k].",
        ordered=False,
    ),
    Mistake("The bias comes last; begin the sum with it, for it may settle the sign.", bias="last"),
    Mistake("The bias is missing: begin the sum with it.", bias="missing"),
    Mistake(
        "You stop while there are positive weights left, and these could lift the sum above 0 "
        "again.",
        begin="at once",
    ),
    Mistake(
        "You stop below 0 only; a sum of exactly 0 can only fall, too, so stop at 0.", stop="< 0"
    ),
    Mistake(
        "You never stop: the count is always D. Once the sum is 0 or less, and no positive weight "
        "is left, the products that are left are not needed.",
        stop="never",
    ),
    Mistake(
        "You look at the sum after a product only. It may be 0 or less before the first product "
        "of the others: look before you compute.",
        look="after",
    ),
    Mistake("ReLU is missing: a sum below 0 becomes 0.", relu=False),
)


def observe(answer, x, w, b, order):
    """Each function by itself: relu_dot gets an order that is right."""
    mine = answer.sort_weights(w)
    h, count = unpack(answer.relu_dot(x, w, b, order), "relu_dot", "h", "count")
    return {"order": mine, "h": h, "count": count}


def cases(rng):
    """Small integers, whose sums are exactly 0 at times, with equal weights and one that is 0; then
    neurons that end above 0 and below, early and late."""
    for weights, x, b in (
        ([1, -2, 2, 0, -1, -1], [2, 3, 1, 5, 0, 1], 2),  # 2 + 2 + 2 = 6, then 0 after one more
        ([-1, -3, -2], [1, 1, 1], 0),  # stops before the first product
        ([2, -1, 1, -4], [0, 1, 1, 0.25], -1),  # 0 after all positive weights
        ([1, -1, 1, -2], [3, 1, 2, 1], -4),  # below 0 amid the positive weights, 1 after them
        ([1, 3, 2, 2], [1, 1, 0, 2], -1),  # no other weights
        ([-2, 1, -1], [1, 3, 3], 1),  # 1 + 3 = 4, then 2, then -1: all are needed
        ([1, -2, 0], [1, 1, 1], 0),  # below 0 before a weight that is 0
    ):
        w = np.array(weights, float)
        yield np.array(x, float), w, float(b), sort_weights(w)
    for D, b in ((6, 0.0), (6, 1.0), (8, -2.0), (5, 0.3)):
        w, x = rng.standard_normal(D), rng.exponential(1, D)
        yield x, w, b, sort_weights(w)


# In the model ------------------------------------------------------------------------------------


@part
class StudentNeurons(Part):
    """relu(x @ w + b), neuron by neuron, by the student's function.

    The inputs of an FFN have both signs. With m the smallest, x - m is never negative, and
    x w + b = (x - m) w + (b + m sum(w))."""

    w: np.ndarray  # (D, F)
    b: np.ndarray  # (F,)
    orders: tuple  # of each neuron
    relu_dot: object

    def __call__(self, x):
        rows = x.reshape(-1, len(self.w))
        h = np.array([self.neurons(row.astype(np.float64)) for row in rows])
        return h.astype(x.dtype).reshape(*x.shape[:-1], -1)

    def neurons(self, x):
        """x (D,) -> (F,)"""
        m = min(x.min(), 0)
        w = self.w.astype(np.float64)
        b = self.b + m * w.sum(0)
        found = [
            self.relu_dot(x - m, column, bias, order)
            for column, bias, order in zip(w.T, b, self.orders)
        ]
        products = sum(int(count) for _, count in found)
        ledger.count(products + w.shape[1], self.w.nbytes)  # m sum(w): one for each neuron
        ledger.event("products", products)
        return [h for h, _ in found]


def into_model(lm, answer):
    """The neurons of the last layer."""
    last = blocks_of(lm)[-1].ffn
    up = last.expand.up
    orders = tuple(answer.sort_weights(column) for column in up.w.T.astype(np.float64))
    neurons = StudentNeurons(up.w, up.b, orders, answer.relu_dot)
    changed = replace(last, expand=neurons)
    return rebuild(lm, lambda node: changed if node is last else None)


def show(answer):
    """The share of products that the neurons of the last layer needed."""
    import minitx

    lm = into_model(minitx.load("stories-relu"), answer)
    ids = lm.encode("He put five nuts in his pocket.")
    with ledger.counting(lm) as counts:
        lm.logits(ids)
    D, F = blocks_of(lm)[-1].ffn.expand.w.shape
    products, all_products = counts.events["products"], len(ids) * D * F
    return (
        f"For {len(ids)} tokens of a text, the {F} neurons of the last layer needed "
        f"{products:,} of {all_products:,} products ({products / all_products:.0%})."
    )


EXERCISE = Exercise(
    title="Early stop before a ReLU",
    minutes=30,
    difficulty="medium",
    names=("sort_weights", "relu_dot"),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed={"sort_weights": flawed_sort, "relu_dot": flawed_relu_dot},
    mistakes=MISTAKES,
    hints=(
        "Sort the positive weights and the others apart and put one list behind the other. "
        "relu_dot can be a plain loop over the order, with a running sum and a counter: where in "
        "the loop is the only place at which you may stop?",
        "np.lexsort sorts by its last key first: is the weight not positive? Then by minus the "
        "absolute value. In the loop, before you add the product of weight i: if w[i] <= 0 and the "
        "sum is <= 0, break. In the end, return the sum or 0, whichever is larger, and the count.",
    ),
    library="minitx/skip/negative_skip.py: StoppedEarly (method=shift)",
    into_model=into_model,
    model="stories-relu",
    show=show,
    saves=(
        "Little in this model: its inputs have both signs, and must be shifted to be 0 or more, "
        "which lifts the sums. In the convolutional networks of the paper, inputs come from a ReLU."
    ),
)
