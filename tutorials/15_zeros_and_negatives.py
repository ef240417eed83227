# %% [markdown]
"""Tutorial 15: which products of an FFN may be left out, because of a zero or a negative sum?

An FFN multiplies a token by two matrices, W_up and W_down. Between them stands an activation. If it
is a ReLU, most numbers that reach W_down are exactly 0, and products with 0 need not be computed.
Can we go further: know a zero before it is computed? And what if there is no ReLU, and numbers are
small, but not 0? We begin with one neuron and four inputs, and end with a price list.

Letters: D width, F hidden neurons of an FFN, x (D,) the input of an FFN, after its norm,
W_up (D, F), h = relu(x W_up + b) (F,) the neurons, W_down (F, D).
"""

# %% [markdown]
# ## The model
#
# stories-relu is a small GPT-2 with ReLU in its FFNs. (No biases in the sums that we do by hand.)

# %%
from typing import NamedTuple

import numpy as np
from helpers import (
    bar_chart,
    calibration_stories,
    decode_last,
    held_out_stories,
    print_table,
    save_lines,
    save_picture,
    speedup,
    time_side_by_side,
    title,
    verdict,
)

import minitx
from minitx import ops
from minitx.ledger import counting
from minitx.model import FFN
from minitx.shared.ordering import largest_first, positives_first
from minitx.shared.relu_ffn import inputs_of_up
from minitx.skip.contextual_sparsity import shipped
from minitx.skip.negative_predict import plan_of
from minitx.technique import apply
from minitx.tree import walk

lm = minitx.load("stories-relu")
D, F = lm.model.config.width, lm.model.config.hidden
L = lm.model.config.layers

# %% [markdown]
# ## 1. One neuron with four inputs
#
# A neuron multiplies each input by a weight and adds up: its terms. ReLU turns a negative sum into
# 0. Do the sum in your head before you look.

# %%
title("1. One neuron, by hand")
x = np.array([1, -2, 3, 1])
w = np.array([2, 1, -1, -2])
print(f"inputs {x}, weights {w}: terms {x * w}")
print(f"sum {np.sum(x * w)}, after ReLU {max(np.sum(x * w), 0)}")
assert np.sum(x * w) == -5

# %% [markdown]
# ## ... and three neurons
#
# Each column of W_up is a neuron, the one above is the first. Each row of W_down is what a neuron
# adds to the output, times its value. Which rows are needed?

# %%
W_up = np.array([[2, 1, -1], [1, 0, 1], [-1, 1, -1], [-2, -1, 2]])
W_down = np.array([[1, 2, -1, 3], [2, -1, 1, 0], [4, 1, -2, 1]])
h = np.maximum(x @ W_up, 0)
nonzero = np.flatnonzero(h)
print(f"sums {x @ W_up}, neurons {h}: only row {nonzero + 1} of W_down is needed")
print(f"all rows: {h @ W_down}   only those: {h[nonzero] @ W_down[nonzero]}")

dense_work = W_up.size + W_down.size
skip_work = W_up.size + len(h) + len(nonzero) * W_down.shape[1]
print(f"multiply-adds: dense {dense_work}; skipping, with a comparison for each h: {skip_work}")
assert (dense_work, skip_work) == (24, 19)

# %% [markdown]
# This is zero skipping, and it is exact: what is left out are products with 0. W_down costs 4
# instead of 12. W_up costs 12 as before: we had to compute each sum to see that it is negative.

# %% [markdown]
# ## 2. Zeros in the model
#
# The same in the trained model, for all tokens of three stories. How many neurons are 0? And do the
# four layers differ?

# %%
title("2. Neurons that are 0, by layer")
texts = [lm.encode(story.text) for story in held_out_stories(3)]
ups = [node.expand.up for _, node in walk(lm.model) if type(node) is FFN]
recorded = inputs_of_up(lm, texts, "inputs")
inputs = [recorded[id(up)] for up in ups]  # for each layer, x of all tokens: (tokens, D)
neurons = [np.maximum(x @ up.w + up.b, 0) for x, up in zip(inputs, ups)]  # (tokens, F)

zeros = [np.mean(h == 0) for h in neurons]
bar_chart([f"layer {layer}" for layer in range(1, L + 1)], zeros, "{:.0%}")
together = np.mean([(h[:16] != 0).any(0).mean() for h in neurons])
print(f"All: {np.mean(zeros):.0%}. Rows that a token needs: {1 - np.mean(zeros):.0%}.")
print(f"Rows that at least one of the first 16 tokens needs: {together:.0%}.")
assert 0.7 < np.mean(zeros) < 0.8 and together > 0.6

# %% [markdown]
# Three of four neurons are 0: from two thirds in layer 4 to seven of eight in layer 2. Nobody asked
# for that: the loss of the training does not mention it. But each token has zeros of its own: 16
# tokens together need five of six rows. So zeros save most where tokens are decoded one by one.

# %% [markdown]
# ## ... skipped
#
# `zero_skip` does what section 1 did. Each part of a model writes its multiply-adds down, and a
# ledger adds them up. Here it does so for 16 tokens that are decoded one by one, after 32 others.
# What does a token cost, and are the logits the same?


# %%
def work_of(model, ids):
    """The ledger of decoding 16 tokens of a text."""
    state = model.model.new_state()
    model.model.next_argmax(ids[:32], state)
    with counting(model) as counts:
        for token in ids[32:48]:
            model.model.next_argmax([token], state)
    return counts


def multiply_adds(counts, of=""):
    """Those of the parts whose path contains ``of``."""
    return sum(entry.multiply_adds for path, entry in counts.entries.items() if of in path)


zero_skip = apply(lm, {"zero_skip": {}})
dense, skipped = work_of(lm, texts[0]), work_of(zero_skip, texts[0])
table = []
for name, part in (("W_up", "expand.up"), ("W_down", "ffn.down"), ("all", "")):
    before, after = multiply_adds(dense, part), multiply_adds(skipped, part)
    table.append([name, before // 16, after // 16, f"{after / before:.2f}"])
print_table(["multiply-adds", "dense", "zero_skip", "share"], table)
error = abs(lm.logits(texts[0]) - zero_skip.logits(texts[0])).max()
print(f"Largest difference of a logit: {error:.6f}")
assert error < 1e-4 and multiply_adds(skipped) < 0.82 * multiply_adds(dense)

# %% [markdown]
# A quarter of W_down is left, and a fifth of the whole model is saved; the logits differ by
# rounding only.

# %% [markdown]
# ## ... and the time
#
# A row is skipped by gathering: the other rows are copied, then multiplied. BLAS, the library that
# NumPy uses for products, multiplies them all without a copy. So gathering only wins when few rows
# are left. How few? First the measurement:

# %%
rng = np.random.default_rng(0)


def relative_times(inputs, outputs, shares):
    """For each share of zeros, the time with gathered rows over the time of the dense product."""
    w = rng.random((inputs, outputs), np.float32)
    column_major = np.asfortranarray(w)  # the faster layout for the dense product
    found = []
    for share in shares:
        h = rng.random(inputs, np.float32)
        h[rng.permutation(inputs)[: round(share * inputs)]] = 0

        def gathered(h=h):
            nonzero = np.flatnonzero(h)
            return h[nonzero] @ w.take(nonzero, axis=0)

        def all_rows(h=h):
            return h @ column_major

        with_rows, dense_time = time_side_by_side(gathered, all_rows, repeats=25)
        found.append(with_rows / dense_time)
    return found


# %% [markdown]
# ## ... for a small matrix and a large one
#
# The W_down of our model, and one of 4,096 x 1,024. Above 1, gathering loses. Where does it win?

# %%
title("Time of one token's product with W_down: gathered rows, dense = 1")
shares = (0.5, 0.75, 0.9, 0.99)
small, large = relative_times(512, 128, shares), relative_times(4096, 1024, shares)
table = []
for share, *ratios in zip(shares, small, large):
    table.append([f"{share:.0%}", *(f"{ratio:.2f}" for ratio in ratios)])
print_table(["zeros", "512 x 128", "4,096 x 1,024"], table)
ids = texts[0][:64]
speed = speedup(decode_last(lm, ids), decode_last(zero_skip, ids))
print(f"Decoding a token of our model with zero_skip: {speed:.2f}x the speed, {verdict(speed)}")

# %% [markdown]
# For the large matrix it breaks even between 50% and 75% of zeros, and at 99% it is about ten times
# as fast. (OPT-175B, which has a ReLU, is said to have 95% of zeros.) The small one does not win
# even at 99%: to find the few rows takes as long as to multiply them all. So our model saves a
# fifth of the multiply-adds and no time. On a chip where each multiply-add costs energy, it is the
# count that matters; in NumPy, it is not.

# %% [markdown]
# ## 3. A zero that is known before the sum is complete
#
# W_up is still computed in full. But of a negative sum ReLU only needs the sign! First, let the
# inputs be >= 0, as they are behind another ReLU. Below are the running sums of one neuron, in the
# order as stored, and with positive weights first, then the others, the largest first in both.

# %%
title("3. Running sums, inputs >= 0")
x = np.array([1, 2, 1, 3])
w = np.array([-4, 1, -1, -2])
order = positives_first(w[:, None])[:, 0]
table = []
for name, found in (("as stored", np.arange(4)), ("positive weights first", order)):
    terms = x[found] * w[found]
    table.append([name, w[found], terms, np.cumsum(terms)])
print_table(["order", "weights", "terms", "running sums"], table)
assert list(np.cumsum(x[order] * w[order])) == [2, -2, -8, -9]

# %% [markdown]
# Both end at -9. As stored, the sum is negative at once, but it may rise again; indeed it does. In
# the other order it can only fall after the first term, since from there on weights are negative.
# So at -2 we know that the neuron is 0: two terms of four. This is SnaPEA's exact mode (2018).
#
# The order depends on the weights alone, so it is found offline, once. This project began with two
# web pages of David Spuler, one about precomputing weights and one about skipping calculations.
# Here they meet. `order_products` is from the first page: it stores weights in such an order, and
# still adds all products, so alone it saves nothing. `negative_skip` is from the second: it stops
# early, which in the order as stored it hardly ever could. The order makes the skipping possible.

# %% [markdown]
# ## ... and why this is wrong for a transformer
#
# The input of an FFN comes from a norm, and has both signs. Two terms are enough to see what goes
# wrong: weights 1 and -1, inputs -1 and -3.

# %%
title("The same rule with signed inputs")
x = np.array([-1, -3])
w = np.array([1, -1])
print(f"after the positive weight: {x[0] * w[0]}; in the end: {np.sum(x * w)}")
assert x[0] * w[0] < 0 < np.sum(x * w)

# %% [markdown]
# The rule would stop at -1 and make it 0. But a negative weight times a negative input is positive,
# so the sum could rise after all. Two rules that are right follow.

# %% [markdown]
# ## Rule 1: shift the inputs
#
# Subtract the least input m from all of them: x' = x - m >= 0, and since x = x' + m,
#
#     sum of x_i w_i = sum of x'_i w_i + m r        with r = the sum of the weights, found offline
#
# So start at m r and add x'_i w_i, positive weights first. Now the sum can only fall again.

# %%
title("Rule 1: shift")
x = np.array([4, -1, 2, 2])
w = np.array([-2, 1, -1, 1])
m = min(x.min(), 0)
order = positives_first(w[:, None])[:, 0]
sums = m * w.sum() + np.cumsum((x - m)[order] * w[order])
print(f"inputs {x}, weights {w}, sum {np.sum(x * w)}")
print(f"m = {m}, shifted inputs {x - m}, r = {w.sum()}, start at {m * w.sum()}")
print(f"weights in order {w[order]}, running sums {sums}")
assert list(sums) == [1, 4, -6, -9] and np.sum(x * w) == -9

# %% [markdown]
# After three terms the sum is -6, and only a negative weight is left: stop. One term is saved.

# %% [markdown]
# ## Rule 2: bound what is left
#
# Add the terms of the largest weights first. Those that are left have the weights w_rest and the
# inputs x_rest, and add at most |w_rest| |x_rest|, the product of the lengths of the two vectors
# (Cauchy-Schwarz). |w_rest| is found offline, and |x| >= |x_rest| is computed once for a token.

# %%
title("Rule 2: bound")
order = largest_first(w[:, None])[:, 0]
length = np.linalg.norm(x)
sums, table = np.cumsum(x[order] * w[order]), []
for terms in range(1, 5):
    most = np.linalg.norm(w[order[terms:]]) * length
    end = f"{sums[terms - 1] + most:.2f}"
    table.append([terms, w[order[terms - 1]], sums[terms - 1], f"{most:.2f}", end])
print(f"inputs {x}, |x| = {length:.0f}, weights in order {w[order]}")
print_table(["terms", "weight", "sum so far", "the rest adds at most", "highest end"], table)
assert table[0][-1] == "0.66" and table[1][-1] == "-1.93"

# %% [markdown]
# After two terms the sum is certain to end below 0: two terms are saved, and the order is again
# offline work. Both rules are exact, but for rounding. Which one stops earlier in the model?

# %% [markdown]
# ## 4. Negative sums in the model
#
# `negative_skip` has both rules, and checks after every 16 of 128 terms. Here is the share of the
# terms of W_up that it computes for 32 tokens of a story, and that of the multiply-adds, with all
# checks and preparation. In the third row the weights are added in the order as stored, in which
# nothing is precomputed. In the last one the mean input, measured on other stories, is subtracted
# first (its product is in b), so that inputs are smaller. Three of four sums are negative: how many
# of the terms can be left out?

# %%
title("4. Exact: stop when it is certain. Dense = 1")
ids = texts[0][:32]
with counting(lm) as dense:
    exact_logits = lm.logits(ids)

settings = {
    "shift": {"method": "shift"},
    "bound": {"method": "bound"},
    "bound, as stored": {"method": "bound", "order": "original"},
    "bound, centered": {"method": "bound", "center": True},
}
table, terms = [], {}
for name, options in settings.items():
    changed = apply(lm, {"negative_skip": options})
    with counting(changed) as counts:
        error = abs(changed.logits(ids) - exact_logits).max()
    terms[name] = counts.events["terms computed"] / counts.events["terms"]
    work = multiply_adds(counts, "expand") / multiply_adds(dense, "expand")
    table.append([name, f"{terms[name]:.2f}", f"{work:.2f}", f"{error:.6f}"])
    assert error < 1e-4
print_table(["rule", "terms of W_up", "multiply-adds of W_up", "largest error of a logit"], table)
exact_work = multiply_adds(counts) / multiply_adds(dense)  # `counts` and `changed`: the last row
speed = speedup(decode_last(lm, ids), decode_last(changed, ids), repeats=5)
print(f"The last row leaves {exact_work:.2f} of the work of the whole model.")
print(f"Decoding with it: {speed:.2f}x the speed, {verdict(speed)}")
assert terms["bound, centered"] < terms["bound"] < terms["shift"] < 0.96
assert terms["bound, as stored"] > 0.99

# %% [markdown]
# It is exact, and it saves little: nine tenths of the terms are computed. A bound thinks of the
# worst case, which hardly ever happens. In the order as stored hardly anything is certain before
# the end, and the checks are a loss. And NumPy loses time in any order: each neuron gathers its
# inputs in an order of its own, which takes far longer than to multiply them all.

# %% [markdown]
# ## Predict instead, by hand
#
# SnaPEA's predictive mode does not wait for certainty. It adds the k terms with the largest weights
# (the prefix), and if their sum is below a threshold, it takes the neuron for 0. A positive sum
# that is predicted to be 0 is a false negative. Here are the sums of one neuron for five tokens.
# Which threshold is the highest that loses none of the three positive sums? And which loses one?

# %%
title("A threshold for the sum of a prefix")
after_prefix = np.array([-4, -2, -1, 1, 3])
after_all = np.array([-6, 1, -3, 2, 5])
print(f"sums after the prefix {after_prefix}, after all terms {after_all}")
table = []
for threshold in (-2, 1):
    below = after_prefix < threshold
    lost = after_all[below & (after_all > 0)]
    table.append([threshold, np.sum(below), len(lost), np.sum(lost)])
print_table(["threshold", "predicted 0", "of these false", "sum lost, of 8"], table)
assert table == [[-2, 1, 0, 0], [1, 3, 1, 1]]

# %% [markdown]
# -2 stops one token early, and 1 stops three. (A sum at the threshold itself goes on.) What is lost
# is the smallest of the positive sums.

# %% [markdown]
# ## ... prefix and threshold in the model
#
# Each neuron has a threshold of its own, as high as possible while at most the share `miss` of its
# positive sums is lost on four calibration stories (texts to tune on, others than those we judge
# by). We do it for layer 3, on our three stories. "terms" is the share that is computed: k terms of
# every neuron, and the rest of those that are not predicted to be 0. Which k is best?

# %%
title("Predict from a prefix, layer 3")
layer = 2  # from 0
up, x = ups[layer], inputs[layer]
others = [lm.encode(story.text) for story in calibration_stories(4)]
calibration = inputs_of_up(lm, others, "inputs")[id(up)]
rank = np.argsort(largest_first(up.w), axis=0)  # of each weight within its neuron
sums = x @ up.w + up.b  # (tokens, F)
table, measured = [], {}
for k in (16, 48, 80):
    for miss in (0.02, 0.1):
        threshold = plan_of(up, calibration, k, miss).threshold  # (F,)
        prefix_sums = x @ np.where(rank < k, up.w, 0) + up.b
        predicted = prefix_sums < threshold
        computed = (k + (D - k) * np.mean(~predicted)) / D
        wrong = predicted & (sums > 0)
        count = np.sum(wrong) / np.sum(sums > 0)
        of_sum = np.sum(sums[wrong]) / np.sum(sums[sums > 0])
        measured[k, miss] = computed, count, of_sum
        shares = [f"{share:.1%}" for share in (np.mean(predicted), count, of_sum)]
        table.append([k, miss, f"{computed:.2f}", *shares])
print(f"Neurons that are really 0: {np.mean(sums <= 0):.1%}")
headings = ["k", "miss", "terms", "predicted 0", "positive sums lost", "of the sum of all h"]
print_table(headings, table)
terms = {setting: numbers[0] for setting, numbers in measured.items()}
assert terms[48, 0.02] < min(0.65, terms[16, 0.02], terms[80, 0.02])
assert measured[48, 0.1][2] < 0.3 * measured[48, 0.1][1]

# %% [markdown]
# A longer prefix finds more zeros, but has cost more before. With 2% of misses the best is in
# between: at k = 48 six tenths of the terms are computed, where certainty took nine tenths. With
# 10%, k = 16 needs as few, but loses more. The last column says why mistakes cost little: the
# sums that are lost are small ones. What is far below 0 after its largest terms hardly ends far
# above.

# %% [markdown]
# ## ... a picture of one neuron
#
# The neuron with the most mistakes. Each point of the picture is a token: its sum after 48 terms,
# and in the end. What lies left of the threshold is taken for 0: below the horizontal line rightly
# so, above it by mistake. How far above do the mistakes lie?

# %%
plan = plan_of(up, calibration, 48, 0.1)
prefix_sums = x @ np.where(rank < 48, up.w, 0) + up.b
wrong = (prefix_sums < plan.threshold) & (sums > 0)
neuron = int(np.argmax(wrong.sum(0)))


def draw(axes):
    mistake = wrong[:, neuron]
    axes.scatter(prefix_sums[~mistake, neuron], sums[~mistake, neuron], s=6)
    axes.scatter(prefix_sums[mistake, neuron], sums[mistake, neuron], s=6, c="red", label="lost")
    axes.axhline(0, color="gray")
    axes.axvline(plan.threshold[neuron], color="darkorange", label="threshold")
    axes.set(xlabel="sum after 48 of 128 terms", ylabel="sum after all terms")
    axes.legend()


save_picture("15_prefix_and_sum", draw)
positive = sums[sums[:, neuron] > 0, neuron]
lost = sums[wrong[:, neuron], neuron]
print(f"Neuron {neuron}: {len(lost)} of {len(positive)} positive sums are lost.")
print(f"Their median is {np.median(lost):.2f}, that of all is {np.median(positive):.2f}.")
assert np.median(lost) < 0.5 * np.median(positive)

# %% [markdown]
# Not far: the cloud is narrow, since 48 of 128 terms, the largest, are most of a sum.

# %% [markdown]
# ## How a price is measured
#
# From here on we judge whole models. The loss is the mean of -ln(probability of the next word). KL,
# the KL divergence, says how far the probabilities of all words have moved from those of the dense
# model; 0 is not at all. `price` puts both into one row, with work, bytes and speed.


# %%
class Price(NamedTuple):
    work: float  # multiply-adds per decoded token, dense = 1
    read: float  # bytes of weights, dense = 1
    loss: float  # nats per token, above that of the dense model
    kl: float  # mean KL divergence from the dense model
    speed: float  # of decoding a token, dense = 1


def log_probabilities(model, ids):
    logits = model.logits(ids[:-1]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # (tokens, V)


class Dense:
    """A dense model, with which others are compared, and what it says on some texts."""

    def __init__(self, lm, texts):
        self.lm, self.texts, self.work = lm, texts, work_of(lm, texts[0]).total()
        self.expected = [log_probabilities(lm, ids) for ids in texts]


def price(model, dense):
    few, work = dense.texts[0][:20], work_of(model, dense.texts[0]).total()
    rises, divergences = [], []
    for ids, expected in zip(dense.texts, dense.expected):
        found = log_probabilities(model, ids)
        rises.append((expected - found)[np.arange(len(ids) - 1), ids[1:]])
        divergences.append(np.sum(np.exp(expected) * (expected - found), axis=-1))
    return Price(
        work.multiply_adds / dense.work.multiply_adds,
        work.weight_bytes / dense.work.weight_bytes,
        np.mean(np.concatenate(rises)),
        np.mean(np.concatenate(divergences)),
        speedup(decode_last(dense.lm, few), decode_last(model, few), repeats=6),
    )


def print_prices(prices):
    table = []
    for name, p in prices.items():
        table.append([name, f"{p.work:.2f}", f"{p.loss:+.4f}", f"{p.kl:.4f}"])
    print_table(["", "work", "loss", "KL"], table)


# %% [markdown]
# ## The price of predictions
#
# Now all layers, with k = 48 (0.375 of 128) and on two of the stories. "work" is what is left of
# the multiply-adds of a decoded token, "loss" by how much the loss has risen. Random takes as many
# neurons of each token for 0, but others. Is the price low only because most neurons do not matter?

# %%
title("Predictions in all layers")
relu, prices = Dense(lm, texts[:2]), {}
for name, options in (
    ("2% of misses", {"miss": 0.02}),
    ("10% of misses", {"miss": 0.1}),
    ("2% of misses, random", {"miss": 0.02, "choose": "random"}),
):
    changed = apply(lm, {"negative_predict": {"prefix": 0.375, "stories": 4, **options}})
    prices[f"negative_predict, {name}"] = price(changed, relu)
print_prices(prices)
assert prices["negative_predict, 2% of misses"].kl < 0.001
assert prices["negative_predict, 2% of misses, random"].kl > 1

# %% [markdown]
# A tenth of the model's work is saved at next to no price, and as many random neurons ruin it. Five
# times as many misses save only a little more. (The loss of two stories is noisy to about 0.01. KL
# is the better witness, since it looks at all words and is never below 0.)

# %% [markdown]
# ## 5. Without a ReLU: small, but not zero
#
# Most models today have SwiGLU instead. A neuron is h = silu(gate) * up, where gate and up are
# products of x with two matrices, W_gate and W_up, and silu(g) = g / (1 + e^-g). Nothing is exactly
# 0, but numbers are small. To drop those is approximate. And which number has to be small? Here are
# three neurons, and a threshold for each of two rules.

# %%
title("5. Three neurons of a SwiGLU")
gate, up = np.array([2, -0.1, -3]), np.array([0.1, 5, 1])
act = ops.silu(gate)
table = []
for name, numbers in (("silu(gate)", act), ("up", up), ("h", act * up)):
    table.append([name, *(f"{number:.2f}" for number in numbers)])
print_table(["neuron", "1", "2", "3"], table)
print(f"|silu(gate)| > 0.1: neurons {np.flatnonzero(abs(act) > 0.1) + 1}")
print(f"|h| > 0.15:         neurons {np.flatnonzero(abs(act * up) > 0.15) + 1}")
assert list(abs(act) > 0.1) == [True, False, True]
assert list(abs(act * up) > 0.15) == [True, True, False]

# %% [markdown]
# CATS (2024) looks at silu(gate). A neuron that it drops needs neither its column of W_up nor its
# row of W_down. But it drops neuron 2, whose h is the largest in magnitude: it cannot know `up`.
# TEAL (2024) looks at the input of a matrix. Here that is h, the input of W_down: it drops neuron
# 3, which is right, but saves a row of W_down only. It does so before every matrix, also where no
# activation function has made anything small: the inputs of W_gate and W_up, and of attention.

# %% [markdown]
# ## ... small numbers in the model
#
# The model `stories` has SwiGLU. How large is each |h|, compared with the largest one of its token
# and layer?

# %%
swiglu = minitx.load("stories")
ffns = [node for _, node in walk(swiglu.model) if type(node) is FFN]
recorded = inputs_of_up(swiglu, texts, "inputs")
relative = []
for ffn in ffns:
    x = recorded[id(ffn.expand.up)]
    h = abs(ops.silu(x @ ffn.expand.gate.w) * (x @ ffn.expand.up.w))
    relative.append(h / h.max(-1, keepdims=True))
title("|h| of SwiGLU, relative to the largest of its token")
edges = [0, 0.001, 0.01, 0.1, 1.001]
shares = np.histogram(np.concatenate(relative), edges)[0] / np.size(relative[0]) / len(ffns)
bar_chart(["below 0.1%", "0.1% to 1%", "1% to 10%", "above 10%"], shares, "{:.1%}")
zero = np.mean(np.concatenate(relative) == 0)
print(f"exactly 0: {zero:.1%}")
assert zero < 0.001 and shares[0] + shares[1] > 0.35

# %% [markdown]
# No neuron is exactly 0, but four of ten are below a hundredth of the largest. To drop them is
# approximate now: how much does it cost?

# %% [markdown]
# ## ... and their price
#
# Thresholds are quantiles: the sparsity, say 0.5, is the share that is dropped on calibration
# stories. TEAL has a threshold for each matrix. With "uniform" all matrices drop the same share of
# their inputs. "greedy" goes in steps: in each, one matrix drops more, the one for which that
# damages the output of its block least. Random drops as many neurons or inputs of each token, but
# others. We compare at the same work, first 0.79, then 0.66. Look at KL.

# %%
title("CATS and TEAL at the same work, on stories")
UNIFORM = {"allocation": "uniform", "stories": 1}
settings = {
    "cats 0.5": {"cats": {"sparsity": 0.5, "stories": 2}},
    "cats 0.5, random": {"cats": {"sparsity": 0.5, "stories": 2, "choose": "random"}},
    "teal 0.25, greedy": {"teal": {"sparsity": 0.25, "stories": 1}},
    "teal 0.25, uniform": {"teal": UNIFORM | {"sparsity": 0.25}},
    "teal 0.25, random": {"teal": UNIFORM | {"sparsity": 0.25, "choose": "random"}},
    "cats 0.8": {"cats": {"sparsity": 0.8, "stories": 2}},
    "teal 0.4, greedy": {"teal": {"sparsity": 0.4, "stories": 1}},
    "teal 0.4, uniform": {"teal": UNIFORM | {"sparsity": 0.4}},
}
gated, models, small_numbers = Dense(swiglu, texts), {}, {}
for name, options in settings.items():
    models[name] = apply(swiglu, options)
    small_numbers[name] = price(models[name], gated)
print_prices(small_numbers)
kl = {name: p.kl for name, p in small_numbers.items()}
assert kl["teal 0.25, greedy"] < kl["teal 0.25, uniform"]
assert kl["cats 0.8"] < kl["teal 0.4, greedy"] < kl["teal 0.4, uniform"]
assert kl["cats 0.5, random"] > 500 * kl["cats 0.5"]
assert kl["teal 0.25, random"] > 500 * kl["teal 0.25, uniform"]

# %% [markdown]
# Random neurons cost about a thousand times as much as those that CATS drops, and random inputs
# about as many times what TEAL's cost: small numbers are indeed what can be left out. The
# allocation matters: with the same share everywhere, TEAL costs more at both. At 0.66 CATS is ahead
# of greedy TEAL. At 0.79 greedy TEAL is, but by so little that other stories may tell otherwise.
# (Three stories are few. Do not believe a difference of a tenth, nor the sign of a loss.)

# %% [markdown]
# ## ... what greedy drops
#
# Where is the work that teal 0.4 saves? For each kind of matrix, the multiply-adds that are left,
# dense = 1, all layers together. With uniform, it would be about 0.6 for each.

# %%
title("TEAL 0.4, greedy: what is left of each matrix")
before, after = work_of(swiglu, texts[0]), work_of(models["teal 0.4, greedy"], texts[0])
matrices = ("qkv.q", "qkv.k", "qkv.v", "attn.out", "expand.gate", "expand.up", "ffn.down")
left = [multiply_adds(after, matrix) / multiply_adds(before, matrix) for matrix in matrices]
bar_chart(matrices, left, "{:.2f}")
assert min(left) == left[-1] < 0.35

# %% [markdown]
# W_down drops three quarters: its inputs are the numbers of the chart above, most of them small.
# W_k and W_v drop nothing at all (above 1, since comparisons are counted, too), which is partly an
# accident: they are half as large as W_q, and one step of this quick greedy would empty them. The
# paper takes steps a tenth as large, which takes ten times as long. Question 3 tries smaller ones.

# %% [markdown]
# ## 6. Guess the active neurons before W_up
#
# Back to ReLU. Could a cheap product guess which neurons will be active, before any of their sums?
# Then both matrices shrink. Take the three neurons of section 1: the predictor first makes one
# number of the four inputs (its rank is 1), and of that a score for each neuron. That is 4 + 3
# multiply-adds; W_up takes 12. Does it find neuron 2, the one that is active?

# %%
title("6. A predictor of rank 1, by hand")
x = np.array([1, -2, 3, 1])
a, b = np.array([-1, 1, 1, 1]), np.array([-1, 1, -1])
scores = (x @ a) * b
print(f"x a = {x @ a}, scores {scores}; the real sums are {x @ W_up}")
print(f"predicted: neuron {np.flatnonzero(scores > 0) + 1}")
print(f"multiply-adds: {len(a) + len(b)} to predict, {4 + 4} for neuron 2, 24 in the dense FFN")
assert list(scores > 0) == [False, True, False]

# %% [markdown]
# It does, and 15 multiply-adds are enough, where zero skipping took 19. But a and b are chosen so
# that it works, and they may be wrong about the next token.

# %% [markdown]
# ## ... recall
#
# Deja Vu (2023) trains such predictors, here of rank 32, on texts. Ours are in a file beside the
# weights. A token runs the neurons with the highest scores, say the top 30%. Recall: of the active
# neurons, how many run? Two functions say that.

# %%
predictors = shipped(lm, "ffn", None)


def highest(scores, count):
    """Booleans (tokens, F): the count highest of each token."""
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, np.argpartition(-scores, count)[:, :count], True, axis=-1)
    return found


def recalls(scores_by_layer, count):
    """Of the active neurons, the share that runs; and their share of the sum of all h."""
    found = []
    for scores, h in zip(scores_by_layer, neurons):
        run = highest(scores, count)
        found.append([np.sum(run & (h > 0)) / np.sum(h > 0), np.sum(h[run]) / np.sum(h)])
    return np.mean(found, axis=0)


# %% [markdown]
# ## ... of the predictor, of chance, and the best possible
#
# Random neurons of the same number are the baseline, and the best that is possible is to know h
# beforehand. It is below 1 where fewer neurons run than are active. The last column weights each
# active neuron by its value. Is the predictor nearer to the baseline, or to the best?

# %%
title("Recall of active neurons, mean of the layers")
predicted = [predictor(x) for predictor, x in zip(predictors, inputs)]
by_chance = [rng.random(h.shape) for h in neurons]
curves, of_sum = {"random": [], "predictor": [], "best possible": []}, []
runs = (0.1, 0.2, 0.3, 0.5)
for share in runs:
    count = round(share * F)
    of_sum.append(recalls(predicted, count)[1])
    for name, scores in zip(curves, (by_chance, predicted, neurons)):
        curves[name].append(recalls(scores, count)[0])
table = []
for i, share in enumerate(runs):
    cells = [f"{curve[i]:.2f}" for curve in curves.values()]
    table.append([f"{share:.0%}", *cells, f"{of_sum[i]:.2f}"])
print_table(["neurons run", *curves, "predictor, of the sum of h"], table)
save_lines("15_recall", runs, curves, "share of the neurons that run", "recall of active neurons")
assert curves["predictor"][2] > 0.8 and curves["predictor"][0] > 4 * curves["random"][0]

# %% [markdown]
# With 30% of the neurons, the predictor runs 88% of the active ones, and those make 96% of the sum
# of all h: what it misses is small again. It is close to the best possible.

# %% [markdown]
# ## ... and what comes out
#
# In the model: a fixed share of the neurons for each token and layer; random ones at the same work
# (45%, since they need no predictor); or all neurons with a score above a threshold, which may be
# many for one token and layer and few for another. Which selection is best at 0.7 of the work?

# %%
title("Predicted neurons")
settings = {
    "top 30%": {"neurons": 0.3},
    "random 45%": {"neurons": 0.45, "choose": "random"},
    "score > 0": {"threshold": 0.0},
    "score > 1": {"threshold": 1.0},
}
guessed = {}
for name, options in settings.items():
    changed = apply(lm, {"contextual_sparsity": options})
    guessed[f"contextual_sparsity, {name}"] = price(changed, relu)
print_prices(guessed)
kl = {name: p.kl for name, p in guessed.items()}
assert 3 * kl["contextual_sparsity, score > 0"] < kl["contextual_sparsity, top 30%"] < 0.02
assert kl["contextual_sparsity, random 45%"] > 1

# %% [markdown]
# The threshold: with "score > 0", KL is a fifth of what it is with the top 30%, or less. Section 2
# showed that layers need from 12% to 35% of their neurons, and tokens differ, too. Now both
# matrices have shrunk, and the predictor is paid for: three tenths of the model's work are saved.

# %% [markdown]
# ## 7. The price list
#
# All of them once more, each compared with its own dense model. "bytes" is what a token reads of
# the weights, "speed" that of decoding in NumPy: below 1 is slower. At the same work, which has the
# least KL? And is one of them faster than dense?

# %%
title("7. The price list: dense = 1")
pair = apply(lm, {"zero_skip": {}, "negative_predict": {"prefix": 0.375, "stories": 4}})
on_relu = {
    "zero_skip": price(zero_skip, relu),
    **prices,
    "negative_predict and zero_skip": price(pair, relu),
    **guessed,
}
for model, found in (("on stories-relu", on_relu), ("on stories", small_numbers)):
    table = []
    for name, p in found.items():
        cells = f"{p.work:.2f}", f"{p.read:.2f}", f"{p.loss:+.4f}", f"{p.kl:.4f}", f"{p.speed:.2f}"
        table.append([name.ljust(38), *cells])
    print_table([model, "work", "bytes", "loss", "KL", "speed"], table)
    print()
print(f"negative_skip with inputs centered is exact; section 4: work {exact_work:.2f}")
both, deja_vu = on_relu["negative_predict and zero_skip"], on_relu["contextual_sparsity, score > 0"]
assert abs(both.work - deja_vu.work) < 0.04 and both.kl < deja_vu.kl
assert on_relu["zero_skip"].kl < 1e-6

# %% [markdown]
# With ReLU, zero_skip comes first: exact, and a fifth of the work is gone. With negative_predict
# beside it, seven tenths are left, and so they are with contextual_sparsity, whose KL is several
# times as high: a score comes from 32 numbers, where negative_predict adds real terms. But look at
# bytes and speed. In negative_predict each neuron reads inputs in an order of its own, and the
# orders are read, too; it was made for chips that add term by term. contextual_sparsity leaves out
# whole rows of both matrices, which suits any machine. Without ReLU, a fifth of the work can go at
# a KL of 0.002.
#
# And the speed? None is clearly faster than dense, and negative_predict is a third as fast. In
# NumPy, copying the rows of such small matrices takes longer than multiplying them all. Section 2
# showed when that changes: with larger matrices, and with more zeros.
#
# All of these but zero_skip have something precomputed: an order, a bound, a threshold, a
# predictor. It is always the same bargain: work that is done once, offline, tells which work can be
# skipped at every token.

# %% [markdown]
# ## ... as a picture
#
# Left is less work, low is nearer to the dense model. What is in the lower left corner?


# %%
def draw_prices(axes):
    for found, marker in ((on_relu, "o"), (small_numbers, "^")):
        points = {}
        for name, p in found.items():
            technique = "random" if "random" in name else name.split(",")[0]
            points.setdefault(technique, []).append((p.work, max(p.kl, 1e-5)))
        for technique, each in points.items():
            axes.scatter(*zip(*each), marker=marker, label=technique)
    axes.set(xlabel="multiply-adds, dense = 1 (triangles: on stories)", yscale="log")
    axes.set(ylabel="KL divergence, at least 1e-5")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


save_picture("15_prices", draw_prices)

# %% [markdown]
# Nothing: less work has its price. But random choices cost a hundred times as much or more.

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 21`: Early stop before a ReLU
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/15_zeros_and_negatives.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 3, keep the weights of rule 1 and find an input for which rule 1 stops after two
#    terms and rule 2 only after three. (What if no input is negative, and most are 0?)
# 2. In section 4, check after every 4, 8 or 32 terms: add "every": 4 to the options of "bound".
#    Terms and multiply-adds do not have the same best setting: why?
# 3. In section 5, W_k has 8,192 weights, and a step of greedy drops half as many as W_q has. What
#    can greedy do to W_k, and what with steps a quarter as large, in layer 3 on 48 tokens? (In the
#    whole model: add "step": 0.125 to "teal 0.4, greedy", which takes a while. Does TEAL catch up
#    with CATS?)
# 4. In section 4, the thresholds of negative_predict come from 4 stories only. Take 10% of misses
#    and the fifth held-out story, and look for the largest KL of a single token. Then calibrate on
#    8 stories. What does a mean hide?
# 5. In section 2, gathering half of the rows of the large matrix took 1.75 times as long as the
#    dense product. How long does a gathered row take, then? Where is the break-even? And what does
#    that predict for 75%, 90% and 99%? (On your machine:
#    python -m minitx.lab.product_times zero_skip 4096 1024)
