"""Tutorial 15: which products of an FFN may be left out, because of a zero or a negative sum?

An FFN multiplies a token by two matrices, W_up and W_down. Between them stands an activation. If it
is a ReLU, most numbers that reach W_down are exactly 0, and products with 0 need not be computed.
Can we go further: know a zero before it is computed? And what if there is no ReLU, and numbers are
small, but not 0? We begin with one neuron and four inputs, and end with a price list.

Letters: D width, F hidden neurons of an FFN, x (D,) the input of an FFN, after its norm,
W_up (D, F), h = relu(x W_up + b) (F,) the neurons, W_down (F, D).
"""

# %% The model
# stories-relu is a small GPT-2 with ReLU in its FFNs. (No biases in the sums that we do by hand.)
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

# %% 1. One neuron with four inputs
# A neuron multiplies each input by a weight and adds up: its terms. ReLU turns a negative sum into
# 0. Do the sum in your head before you look.
title("1. One neuron, by hand")
x = np.array([1, -2, 3, 1])
w = np.array([2, 1, -1, -2])
print(f"inputs {x}, weights {w}: terms {x * w}")
print(f"sum {np.sum(x * w)}, after ReLU {max(np.sum(x * w), 0)}")
assert np.sum(x * w) == -5

# %% ... and three neurons
# Each column of W_up is a neuron, the one above is the first. Each row of W_down is what a neuron
# adds to the output, times its value. Which rows are needed?
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
# This is zero skipping, and it is exact: what is left out are products with 0. W_down costs 4
# instead of 12. W_up costs 12 as before: we had to compute each sum to see that it is negative.

# %% 2. Zeros in the model
# The same in the trained model, for all tokens of three stories. How many neurons are 0? And do the
# four layers differ?
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
# Three of four neurons are 0. Nobody asked for that: the loss of the training does not mention it.
# But each token has zeros of its own: 16 tokens together need five of six rows. So zeros save most
# where tokens are decoded one by one.

# %% ... skipped
# `zero_skip` does what section 1 did. The ledger counts what a token costs: 24 tokens decoded one
# by one, after 32 others. Are the logits the same?


def work_of(model, ids):
    """The ledger of decoding 24 tokens of a text."""
    state = model.model.new_state()
    model.model.next_argmax(ids[:32], state)
    with counting(model) as counts:
        for token in ids[32:56]:
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
    table.append([name, before // 24, after // 24, f"{after / before:.2f}"])
print_table(["multiply-adds", "dense", "zero_skip", "share"], table)
error = abs(lm.logits(texts[0]) - zero_skip.logits(texts[0])).max()
print(f"Largest difference of a logit: {error:.6f}")
assert error < 1e-4 and multiply_adds(skipped) < 0.82 * multiply_adds(dense)
# A quarter of W_down is left, and a fifth of the whole model is saved; the logits differ by
# rounding only.

# %% ... and the time
# A row is skipped by gathering: the other rows are copied, then multiplied. BLAS multiplies them
# all without a copy, so gathering only wins when few rows are left. How few? Two sizes: the W_down
# of our model, and one of 4,096 x 1,024.
title("Time of one token's product with W_down: gathered rows, dense = 1")
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

        with_rows, dense_time = time_side_by_side(gathered, all_rows, repeats=40)
        found.append(with_rows / dense_time)
    return found


shares = (0.5, 0.75, 0.9, 0.99)
small, large = relative_times(512, 128, shares), relative_times(4096, 1024, shares)
table = []
for share, *ratios in zip(shares, small, large):
    table.append([f"{share:.0%}", *(f"{ratio:.2f}" for ratio in ratios)])
print_table(["zeros", "512 x 128", "4,096 x 1,024"], table)
ids = texts[0][:64]
speed = speedup(decode_last(lm, ids), decode_last(zero_skip, ids))
print(f"Decoding a token of our model with zero_skip: {speed:.2f}x the speed, {verdict(speed)}")
assert small[0] > 1.2 and large[3] < 0.7
# Above 1, gathering loses. For the large matrix it breaks even at about three quarters, and at 99%
# it is several times as fast. (OPT-175B, which has a ReLU, is said to have 95% of zeros.) The small
# one does not win even at 90%: to find and copy rows takes as long as to multiply them all. So our
# model saves a fifth of the multiply-adds and loses time. Where each multiply-add costs energy, it
# is the count that matters; in NumPy, it is not.

# %% 3. A zero that is known before the sum is complete
# W_up is still computed in full. But of a negative sum ReLU only needs the sign! First, let the
# inputs be >= 0, as they are behind another ReLU. Below are the running sums of one neuron, in the
# order as stored, and with positive weights first, then the others, the largest first in both.
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
# Both end at -9. As stored, the sum is negative at once, but it may rise again; indeed it does. In
# the other order it can only fall after the first term, since from there on weights are negative.
# So at -2 we know that the neuron is 0: two terms of four. This is SnaPEA's exact mode (2018).
#
# The order depends on the weights alone, so it is found offline, once. `order_products` computes
# the same one. This project began with two web pages of David Spuler, one about precomputing
# weights and one about skipping calculations. Here they meet: an order that is precomputed from the
# weights makes it possible to skip work.

# %% ... and why this is wrong for a transformer
# The input of an FFN comes from a norm, and has both signs. Two terms are enough to see what goes
# wrong: weights 1 and -1, inputs -1 and -3.
title("The same rule with signed inputs")
x = np.array([-1, -3])
w = np.array([1, -1])
print(f"after the positive weight: {x[0] * w[0]}; in the end: {np.sum(x * w)}")
assert x[0] * w[0] < 0 < np.sum(x * w)
# The rule would stop at -1 and make it 0. But a negative weight times a negative input is positive,
# so the sum could rise after all. Two rules that are right follow.

# %% Rule 1: shift the inputs
# Subtract the least input m from all of them: x' = x - m >= 0, and since x = x' + m,
#
#     sum of x_i w_i = sum of x'_i w_i + m r        with r = the sum of the weights, found offline
#
# So start at m r and add x'_i w_i, positive weights first. Now the sum can only fall again.
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
# After three terms the sum is -6, and only a negative weight is left: stop. One term is saved.

# %% Rule 2: bound what is left
# Add the terms of the largest weights first. Those that are left have the weights w_rest and the
# inputs x_rest, and add at most |w_rest| |x_rest|, the product of the lengths of the two vectors
# (Cauchy-Schwarz). |w_rest| is found offline, and |x| >= |x_rest| is computed once for a token.
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
# After two terms the sum is certain to end below 0: two terms are saved, and the order is again
# offline work. Both rules are exact, but for rounding. Which one stops earlier in the model?

# %% 4. Negative sums in the model
# `negative_skip` has both rules, and checks after every 16 of 128 terms. Here is how many terms of
# W_up it computes for 32 tokens of a story, and the multiply-adds with all checks and preparation.
# In the third row the weights are added in the order as stored. In the last one the mean input,
# measured on other stories, is subtracted first (its product is in b), so that inputs are smaller.
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
    exact_work = multiply_adds(counts) / multiply_adds(dense)  # of the last row, for section 7
    table.append([name, f"{terms[name]:.2f}", f"{work:.2f}", f"{error:.6f}"])
    assert error < 1e-4
print_table(["rule", "terms of W_up", "multiply-adds of W_up", "largest error of a logit"], table)
assert terms["bound, centered"] < terms["bound"] < terms["shift"] < 0.96
assert terms["bound, as stored"] > 0.99
# It is exact, and it saves little: three of four sums are negative, and yet nine tenths of the
# terms are computed. A bound thinks of the worst case, which hardly ever happens. In the order as
# stored hardly anything is certain before the end, and the checks are a loss.

# %% Predict instead: prefix and threshold
# SnaPEA's predictive mode does not wait for certainty. It adds the k terms with the largest weights
# (the prefix), and if their sum is below a threshold, it takes the neuron for 0. Each neuron has a
# threshold of its own, as high as possible while at most the share `miss` of its positive values is
# lost on four calibration stories. A positive value that is predicted to be 0 is a false negative.
# We do it for layer 3, on our three stories. "terms" is the share that is computed: which k is best?
title("Predict from a prefix, layer 3")
layer = 2  # from 0
up, x = ups[layer], inputs[layer]
others = [lm.encode(story.text) for story in calibration_stories(4)]
calibration = inputs_of_up(lm, others, "inputs")[id(up)]
rank = np.argsort(largest_first(up.w), axis=0)  # of each weight within its neuron
sums = x @ up.w + up.b  # (tokens, F)
table, lost = [], {}
for k in (16, 48, 80):
    for miss in (0.02, 0.1):
        threshold = plan_of(up, calibration, k, miss).threshold  # (F,)
        prefix_sums = x @ np.where(rank < k, up.w, 0) + up.b
        predicted = prefix_sums < threshold
        computed = (k + (D - k) * np.mean(~predicted)) / D
        wrong = predicted & (sums > 0)
        count = np.sum(wrong) / np.sum(sums > 0)
        of_sum = np.sum(sums[wrong]) / np.sum(sums[sums > 0])
        lost[k, miss] = computed, count, of_sum
        shares = [f"{share:.1%}" for share in (np.mean(predicted), count, of_sum)]
        table.append([k, miss, f"{computed:.2f}", *shares])
print(f"Neurons that are really 0: {np.mean(sums <= 0):.1%}")
print_table(["k", "miss", "terms", "predicted 0", "false negatives", "of the sum of all h"], table)
assert lost[48, 0.02][0] < min(0.65, lost[16, 0.02][0], lost[80, 0.02][0])
assert lost[48, 0.1][2] < 0.3 * lost[48, 0.1][1]
# A longer prefix finds more zeros, but has cost more before: the best is in between. With k = 48
# and 2% of misses, 60% of the terms are computed: compare that with the 90% above. The last
# column says why mistakes cost little: the values that are lost are small. A sum that is far below
# 0 after its largest terms hardly ends far above.

# %% ... a picture of one neuron
# Each point is a token: the sum after 48 terms, and the sum in the end. What lies left of the
# threshold is taken for 0: below the horizontal line rightly so, above it by mistake.
plan = plan_of(up, calibration, 48, 0.1)
prefix_sums = x @ np.where(rank < 48, up.w, 0) + up.b
wrong = (prefix_sums < plan.threshold) & (sums > 0)
neuron = int(np.argmax(wrong.sum(0)))


def draw(axes):
    axes.scatter(prefix_sums[:, neuron], sums[:, neuron], s=6)
    axes.axhline(0, color="gray")
    axes.axvline(plan.threshold[neuron], color="darkorange", label="threshold")
    axes.set(xlabel="sum after 48 of 128 terms", ylabel="sum after all terms")
    axes.legend()


save_picture("15_prefix_and_sum", draw)

