# %% [markdown]
"""Answers to the questions of tutorial 15."""

# %%
from dataclasses import replace

import numpy as np
from helpers import (
    calibration_stories,
    held_out_stories,
    print_table,
    say,
    time_side_by_side,
    title,
)

import minitx
from minitx.ledger import counting
from minitx.model import FFN
from minitx.shared.linears import linears
from minitx.shared.ordering import largest_first, positives_first
from minitx.shared.relu_ffn import inputs_of_up
from minitx.skip.negative_predict import Predicted, plan_of
from minitx.skip.teal import with_threshold
from minitx.skip.teal.allocation import JudgedBlock, greedy
from minitx.technique import apply, wrap
from minitx.tree import walk

lm = minitx.load("stories-relu")
texts = [lm.encode(story.text) for story in held_out_stories(6)]

# %% [markdown]
# ## Question 1
#
# For which input does rule 1 stop after two terms, and rule 2 only after three?
#
# For (1, 0, 2, 0). No input is negative, so rule 1 has nothing to shift. Both inputs with positive
# weights are 0, so after these two terms the sum is 0 and can only fall: it stops. (At 0, since
# ReLU makes 0 of 0.) Rule 2 does not look at the signs of the inputs. After two terms it still
# still fears the 2, whose weight is negative. (For (2, 0, 1, 0) it stops after one term.)
#
# Of all inputs from -3 to 3 whose sum is at most 0, how many does each rule stop sooner? With any
# sign, neither rule is much better. Without negative inputs, rule 1 is: it need not shift.


# %%
def shift(x, w):
    """The terms after which rule 1 stops."""
    m, order = min(x.min(), 0), positives_first(w[:, None])[:, 0]
    sums = m * w.sum() + np.cumsum((x - m)[order] * w[order])
    certain = (sums <= 0) & (np.arange(1, len(w) + 1) >= np.sum(w > 0))
    return np.argmax(certain) + 1 if certain.any() else len(w)


def bound(x, w):
    """The terms after which rule 2 stops."""
    order = largest_first(w[:, None])[:, 0]
    rest = np.sqrt(np.cumsum(w[order][::-1] ** 2)[::-1] - w[order] ** 2)  # |w_rest|
    certain = np.cumsum(x[order] * w[order]) + rest * np.linalg.norm(x) <= 0
    return np.argmax(certain) + 1 if certain.any() else len(w)


# %%
title("Question 1. Rule 1 before rule 2")
w = np.array([-2, 1, -1, 1])
for x in (np.array([4, -1, 2, 2]), np.array([2, 0, 1, 0]), np.array([1, 0, 2, 0])):
    print(f"inputs {x}: rule 1 stops after {shift(x, w)} terms, rule 2 after {bound(x, w)}")
assert (shift(x, w), bound(x, w)) == (2, 3) and bound(np.array([2, 0, 1, 0]), w) == 1
inputs = np.indices((7,) * 4).reshape(4, -1).T - 3  # all of -3 to 3
sooner = {}
for name, some in (("any sign", inputs), ("no negative", inputs[inputs.min(1) >= 0])):
    found = np.array([[shift(x, w), bound(x, w)] for x in some[some @ w <= 0]])
    sooner[name] = np.mean(found[:, 0] < found[:, 1]), np.mean(found[:, 1] < found[:, 0])
    print(
        f"{name}: rule 1 stops sooner for {sooner[name][0]:.0%}, rule 2 for {sooner[name][1]:.0%}"
    )
assert sooner["no negative"][0] > 1.5 * sooner["no negative"][1]

# %% [markdown]
# ## Question 2
#
# Why do terms and multiply-adds not have the same best setting?
#
# The more often a sum is checked, the sooner it stops: terms are fewest at 4. But a check is a
# product (|w_rest| |x|) and a comparison for each neuron that still runs. With 32 checks they are
# more than the terms that they save. In between, at 16, the sum of both is least.

# %%
title("Question 2. Terms between two checks")
with counting(lm) as dense:
    lm.logits(texts[0][:32])


def multiply_adds(counts, of):
    return sum(entry.multiply_adds for path, entry in counts.entries.items() if of in path)


table, terms, work = [], {}, {}
for every in (4, 8, 16, 32):
    changed = apply(lm, {"negative_skip": {"method": "bound", "every": every}})
    with counting(changed) as counts:
        changed.logits(texts[0][:32])
    terms[every] = counts.events["terms computed"] / counts.events["terms"]
    work[every] = multiply_adds(counts, "expand") / multiply_adds(dense, "expand")
    table.append([every, f"{terms[every]:.2f}", f"{work[every]:.2f}"])
print_table(["every", "terms of W_up", "multiply-adds of W_up"], table)
assert min(terms, key=terms.get) == 4 and min(work, key=work.get) == 16

# %% [markdown]
# ## Question 3
#
# Do smaller steps leave more choice for W_k and W_v?
#
# Yes. A step drops 0.5 * 128 * 128 = 8,192 weights, whichever matrix takes it, and W_k has no more:
# it loses all (at most 95%) or nothing. Nothing is what it loses in this block. With steps of a
# quarter of the size, it loses what it can do without, and the error of the block is smaller. (In
# the whole model, KL falls from 0.0115 to 0.0069: TEAL has caught up with CATS, at 0.0071.)

# %%
title("Question 3. Smaller steps of greedy, in layer 3")
swiglu = minitx.load("stories")
ids = swiglu.encode(calibration_stories(1)[0].text)[:48]
x = [swiglu.model.embed(np.array(ids), slice(0, len(ids)))]
for index, block in enumerate(swiglu.model.stack.blocks[:3]):
    judged = JudgedBlock(block, index, x, linears(swiglu.model, "all"), with_threshold)
    x = judged.outputs
sizes = {key: linear.w.size for key, linear in judged.matrices.items()}
names = ("q", "k", "v", "out", "gate", "up", "down")
table, kept, errors = [], {}, {}
for step in (0.5, 0.125):
    shares = greedy(sizes, 0.4, step * 128 * 128, judged.error)
    kept[step] = {name: 1 - share for name, share in zip(names, shares.values())}
    errors[step] = judged.error(shares)
    table.append([step, *(f"{share:.2f}" for share in kept[step].values()), f"{errors[step]:.2f}"])
print_table(["step", *names, "error"], table)
assert kept[0.5]["k"] == 1 and kept[0.125]["k"] < 0.9 and errors[0.125] < errors[0.5]

# %% [markdown]
# ## Question 4
#
# What does a mean hide?
#
# Few tokens, and one above all. After "The map was" the model has to say a colour; in layer 1 some
# sums that are positive were taken for 0, and it says something else altogether: a KL of 9, where
# the median is below a thousandth. That token is half of the sum over this story, and a mean of
# many stories would only look a little high. With thresholds from 8 stories this does not happen.

# %%
title("Question 4. The largest KL, with 10% of misses")
story = texts[4][:208]
ups = [node.expand.up for _, node in walk(lm.model) if type(node) is FFN]
read = [lm.encode(story.text) for story in calibration_stories(8)]
recorded = inputs_of_up(lm, read, "inputs")


def log_probabilities(model):
    logits = model.logits(story).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # (tokens, V)


expected, table, largest = log_probabilities(lm), [], {}
for count in (4, 8):
    tokens = sum(map(len, read[:count]))
    plans = [plan_of(up, recorded[id(up)][:tokens], 48, 0.1) for up in ups]

    def predicting(ffn, layer, plans=plans):
        return replace(ffn, expand=Predicted.of(ffn.expand.up, plans[layer]))

    found = log_probabilities(wrap(lm, "ffn", predicting))
    kl = np.sum(np.exp(expected) * (expected - found), axis=-1)  # (tokens,)
    largest[count], at = kl.max(), int(kl.argmax())
    after = lm.tokenizer.decode(story[max(at - 3, 0) : at + 1])
    cells = f"{np.median(kl):.5f}", f"{kl.mean():.4f}", f"{kl.max():.3f}", repr(after)
    table.append([f"{count} stories", *cells])
    if count == 4:
        share = kl.max() / kl.sum()
print_table(["calibrated on", "median KL", "mean KL", "largest KL", "after"], table)
print(f"With 4 stories, that one token is {share:.0%} of the KL of this story.")
assert largest[4] > 5 and share > 0.5 and largest[8] < 0.1

# %% [markdown]
# ## Question 5
#
# Where is the break-even?
#
# With half of the rows, gathering takes 1.75 times as long as the dense product with all of them,
# so a gathered row takes g = 3.5 times as long as a row of the dense product. It breaks even when
# one row in 3.5 is left, at 71% of zeros. At 75% the table should say 3.5 * 0.25 = 0.88, and it
# said 0.81; at 90% it should say 0.35 (0.34). At 99% it should say 0.04 and said 0.09: to look for
# the zeros takes time, too, however few rows are left. The last line measures g on your machine.

# %%
title("Question 5. Break-even")
g = 1.75 / 0.5
for zeros in (0.5, 0.75, 0.9, 0.99):
    print(f"{zeros:.0%} of zeros: {g * (1 - zeros):.2f} of the time of the dense product")
assert round(1 - 1 / g, 2) == 0.71

rng = np.random.default_rng(0)
W = rng.random((2048, 512), np.float32)
column_major = np.asfortranarray(W)
h = rng.random(2048, np.float32)
h[rng.permutation(2048)[:1024]] = 0
nonzero = np.flatnonzero(h)
gathered, dense_time = time_side_by_side(
    lambda: h[nonzero] @ W.take(nonzero, axis=0), lambda: h @ column_major, repeats=25
)
g = gathered / dense_time / 0.5
say(f"Here, for 2,048 x 512: g = {g:.1f}, so it breaks even at {max(1 - 1 / g, 0):.0%} of zeros.")
assert np.allclose(h[nonzero] @ W[nonzero], h @ column_major, rtol=1e-4)
