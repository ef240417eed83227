# %% [markdown]
"""Tutorial 9: fewer weights. Which weights of a trained model can go?

Tutorial 8 made each weight smaller. Here weights go altogether, in three ways: single weights
become zero (pruning), whole neurons and heads are cut out (structured pruning), and a matrix is
replaced by two thin ones (low rank). Each way comes with a score that says what will be missed
least. We compute it by hand first, then look at what a trained model says, and at what is saved:
that is not always what one would expect.

You need matrix products. Letters: X inputs, a row for each token; W a matrix (inputs, outputs), so
that the outputs are X W; D the model's width, F its hidden neurons; r the rank of a matrix.
"""

# %% [markdown]
# ## A model, and held-out stories to judge it by

# %%
from functools import partial

import numpy as np
from helpers import (
    bar_chart,
    count_last,
    decode_last,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    save_lines,
    say,
    speedup,
    time_side_by_side,
    title,
)

import minitx
from minitx.tree import nbytes, weights

lm = load_stories()
stories = held_out_stories(10)
ids = lm.encode(stories[0].text)[:64]


def loss_of(model):
    """Mean negative log-likelihood per token. Guessing among all 1,022 tokens: ln 1022 = 6.9."""
    return evaluate_stories(model, stories).mean_loss


dense_loss = loss_of(lm)
print(f"loss on {len(stories)} held-out stories: {dense_loss:.3f}")

# %% [markdown]
# ## 1. Which weight of each output? By hand
#
# Three inputs, three outputs, and two tokens to try them on. In each column of W, the weights of
# one output, one weight is to become zero. The oldest rule takes the smallest: magnitude.
# Wanda asks what the weight contributes: its size times the size of its input, |w| * ||x||, where
# ||x|| is the norm of the input over the tokens. Look at the norms: the first input is the largest.

# %%
title("1. Magnitude and Wanda, by hand")
X = np.array([[3.0, 0.6, 0.0], [4.0, -0.8, 2.0]])  # a row for each token
W = np.array([[0.3, 0.2, -0.7], [0.9, 0.4, 0.9], [0.5, -0.6, 0.2]])  # (inputs, outputs)
norms = np.sqrt((X**2).sum(0))
magnitude = abs(W)
wanda = abs(W) * norms[:, None]


def in_line(row):
    return " ".join(f"{number:5.1f}" for number in row)


table = []
for i in range(3):
    rows = in_line(W[i]), in_line(magnitude[i]), in_line(wanda[i])
    table.append([f"input {i + 1}", f"{norms[i]:.1f}", *rows])
print_table(["", "norm", "W", "magnitude", "wanda"], table)

# %% [markdown]
# ## ... and what their choices cost
#
# In each column the weight with the lowest score becomes zero. Which do the two rules choose, and
# how far does each output move? (Its error is a column with a number for each token: we take the
# norm.)

# %%
for name, score in (("magnitude", magnitude), ("wanda", wanda)):
    lowest = score.argmin(0)  # the input that each output loses
    pruned = W.copy()
    pruned[lowest, [0, 1, 2]] = 0
    error = np.linalg.norm(X @ pruned - X @ W, axis=0)
    dropped = W[lowest, [0, 1, 2]]
    print(f"{name:9} drops {dropped}, errors of the outputs {error.round(2)}")
    assert np.allclose(error, wanda[lowest, [0, 1, 2]])

# %% [markdown]
# Wanda drops 0.9 and keeps 0.3, and it is right: the error is exactly the dropped weight's Wanda
# score. If several weights of an output go, their errors may add up or cancel, so then the score is
# an estimate.

# %% [markdown]
# ## 2. Zeros in a trained model
#
# The technique `prune` does this to every matrix of the model, for any share of the weights; Wanda
# measures its norms on calibration stories, which are not those that we judge by (8 of them, to be
# quick). A random baseline tells what the scores are worth: the same share, drawn at random.

# %%
CALIBRATION = 8


def zero_at_random(share):
    random = minitx.load("stories")
    rng = np.random.default_rng(1)
    for path, w in weights(random.model).items():
        if w.ndim == 2 and path != "embed.w":  # all matrices but the embedding table
            w[rng.random(w.shape) < share] = 0
    return random


def prune(share, method):
    options = {"sparsity": share, "method": method, "stories": CALIBRATION}
    return minitx.load("stories", prune=options)


# %% [markdown]
# ## ... how many can go?
#
# Before you run it: how large a share can go until the model fails?

# %%
title("2. The loss after setting a share of the weights to zero")
SHARES = (0.1, 0.3, 0.5)
headings = ["", *(f"{share:.0%} gone" for share in SHARES)]
magnitude_models = [prune(share, "magnitude") for share in SHARES]
wanda_models = [prune(share, "wanda") for share in SHARES]
loss = {
    "random weights": [loss_of(zero_at_random(share)) for share in SHARES],
    "magnitude": [loss_of(model) for model in magnitude_models],
    "wanda": [loss_of(model) for model in wanda_models],
}


def print_losses(*names):
    table = []
    for name in names:
        table.append([name, *(f"{one:.3f}" for one in loss[name])])
    print_table(headings, table)
    print(f"(nothing gone: {dense_loss:.3f})")


print_losses("random weights", "magnitude", "wanda")
assert loss["magnitude"][1] < dense_loss + 0.02 and loss["random weights"][1] > 3
assert abs(loss["magnitude"][1] - loss["wanda"][1]) < 0.01

# %% [markdown]
# Nearly a third of the weights can go, if they are the right ones; half hurts. Wanda is hardly
# better than magnitude here. Its norms matter where inputs differ in size, as in large language
# models; in this model the largest input is less than twice the median (tutorial 8, section 6).

# %% [markdown]
# ## 3. A pattern for hardware: 2 of 4
#
# Some GPUs can skip zeros, if they come in a fixed pattern: of each 4 consecutive weights of an
# output, 2 are kept (2:4). Then a kept weight needs only 2 bits to say where it was. Look at what
# the pattern costs: it must keep 0.2 and drop 0.7.

# %%
title("3. Half of eight weights: freely, and 2 of each 4")
column = np.array([0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.1, 0.0])
free = np.where(column >= np.sort(column)[4], column, 0)
pattern = []
for four in column.reshape(2, 4):
    pattern.extend(np.where(four >= np.sort(four)[2], four, 0))
print("freely   ", free, f"sum of what was dropped {column.sum() - free.sum():.1f}")
print("2 of 4   ", np.array(pattern), f"sum of what was dropped {column.sum() - sum(pattern):.1f}")

two_of_four = minitx.load("stories", prune={"scope": "2:4", "stories": CALIBRATION})
print(f"stories: loss {loss['wanda'][2]:.3f} freely, {loss_of(two_of_four):.3f} with 2 of 4")

# %% [markdown]
# ## 4. What do zeros save?
#
# Nothing, in a dense array. A zero is stored and multiplied like any other number. Packing helps
# memory: the technique `pack_zeros` stores one bit for each weight (zero or not) and the others one
# after another; but each product must unpack them first. Look at the last column.

# %%
title("4. Half of the weights are zero: what is saved (1 = the original model)")
original = count_last(lm, ids).total().multiply_adds
half = {"sparsity": 0.5, "method": "magnitude"}
packed = minitx.load("stories", prune=half, pack_zeros=True)
table = []
for name, model in (("zeros", magnitude_models[2]), ("packed zeros", packed)):
    work = count_last(model, ids).total().multiply_adds / original
    memory = nbytes(model.model) / nbytes(lm.model)
    speed = speedup(decode_last(lm, ids), decode_last(model, ids), repeats=20)
    table.append([name, f"{work:.2f}", f"{memory:.2f}", f"{speed:.2f}"])
    assert work == 1
print_table(["", "multiply-adds", "memory", "speed"], table)

# %% [markdown]
# So for speed, a product must become smaller, and that takes whole rows or columns.

# %% [markdown]
# ## 5. Whole neurons, by hand
#
# The hidden neurons of a feed-forward network are computed from x, then multiplied by W_down: each
# neuron adds its activation times its row of W_down. Here are the activations of three neurons on
# two tokens. Which neuron will be missed least? Not the one with small weights, nor the one with
# small activations: the one with the smallest product.

# %%
title("5. Three neurons, by hand")
hidden = np.array([[3.0, 0.06, 2.0], [4.0, 0.08, 0.0]])  # (tokens, neurons)
W_down = np.array([[0.2, 0.0], [3.0, 4.0], [0.6, 0.8]])  # (neurons, outputs)
activation_norms = np.linalg.norm(hidden, axis=0)
row_norms = np.linalg.norm(W_down, axis=1)
scores = activation_norms * row_norms
print("norms of the activations  ", activation_norms)
print("norms of the rows         ", row_norms)
print("scores, their product     ", scores)

keep = [0, 2]  # the first and the third; the second, neuron 2, has the lowest score
outputs = hidden @ W_down
smaller = hidden[:, keep] @ W_down[keep]
error = np.linalg.norm(smaller - outputs)
print("outputs of the two tokens ", *outputs.round(2))
print("the same without neuron 2 ", *smaller.round(2))
print(f"error                      {error:.2f}")
assert np.isclose(error, scores[1])

# %% [markdown]
# Again the error is the score. And this time the arrays are smaller: neuron 2 is gone from W_down,
# and its columns from the matrices that computed its activation. What is left is a plain model.

# %% [markdown]
# ## 6. Neurons and heads of the trained model
#
# The technique `prune_structure` removes the neurons with the lowest scores from every block. In a
# block of this model, 3 D F weights belong to neurons (two columns before each, and its row of
# W_down) and 3 D^2 to attention (D^2 each to W_q and W_o, half of that each to W_k and W_v), so
# neurons have 73 %. For 30 % of the blocks' weights, 30 / 73 of the neurons must go.
#
# If asked, it removes attention heads, too. A head is scored like a neuron: how large is what it
# adds to the outputs, its weighted sum of the values times its rows of W_o? In this model two heads
# share their keys and values, so these go together, with their keys and values.

# %%
title("6. The loss after removing neurons")
c = lm.model.config
in_neurons = 3 * c.width * c.hidden / (3 * c.width * c.hidden + 3 * c.width**2)


def prune_neurons(share):
    options = {"neurons": share / in_neurons, "stories": CALIBRATION}
    return minitx.load("stories", prune_structure=options)


smaller_models = [prune_neurons(share) for share in SHARES]
loss["neurons"] = [loss_of(model) for model in smaller_models]
print_losses("random weights", "wanda", "neurons")
options = {"neurons": 0, "heads": 0.5, "stories": CALIBRATION}
heads = minitx.load("stories", prune_structure=options)
print(f"half of the heads gone: loss {loss_of(heads):.3f}, and half of the KV cache")
assert loss["wanda"][1] < loss["neurons"][1] < loss["random weights"][1]

# %% [markdown]
# A neuron takes good weights along with bad ones, so the loss is higher than with zeros in the best
# places. And with only 4 heads in a block, none is redundant.

# %% [markdown]
# ## 7. Low rank: one matrix as two thin ones, by hand
#
# The third way: all rows of the matrix below are nearly multiples of one row. Such a matrix has
# nearly rank 1: it is nearly a column times a row, 3 + 3 numbers instead of 9. The singular value
# decomposition (SVD) finds them: it writes a matrix as a sum of such products, the largest first,
# and the singular values are their sizes. Look at how much smaller the second one is.

# %%
title("7. A 3 x 3 matrix of nearly rank 1")
largest = np.outer([1, 2, 2], [2, 2, 1])  # size: the norms multiplied, 3 * 3 = 9
second = 0.1 * np.outer([2, 1, -2], [1, -2, 2])  # size 0.1 * 3 * 3 = 0.9
W = largest + second
left, singular_values, right = np.linalg.svd(W)
print("W", *W.round(1), sep="\n  ")
print("singular values:", singular_values.round(2))
assert np.allclose(singular_values, [9, 0.9, 0])

# Truncate: keep the first product only (r = 1), and multiply from left to right.
column = left[:, :1] * singular_values[0]  # (3, 1)
row = right[:1]  # (1, 3)
assert np.allclose(column @ row, largest)
x = np.array([1.0, 1.0, 1.0])
print("x W            ", (x @ W).round(2), " 9 multiply-adds")
print("(x column) row ", ((x @ column) @ row).round(2), " 3 + 3 multiply-adds")
squares = singular_values**2
share = squares[0] / squares.sum()
sizes = f"{squares[0]:.3g} / ({squares[0]:.3g} + {squares[1]:.3g})"
print(f"share of the squares that is kept: {sizes} = {share:.0%}")
missing = np.linalg.norm(W - column @ row)
assert np.isclose(missing, singular_values[1])  # what is missing is the second one

# %% [markdown]
# ## 8. Are trained matrices of low rank?
#
# A matrix (in, out) at rank r becomes (in, r) and (r, out): r (in + out) weights instead of in *
# out. For a square matrix that is less only if r is below half of the full rank. So we look at what
# the larger half of the singular values keeps of the sum of squares, and compare with a matrix of
# random numbers of the same shape. Look for a difference.

# %%
title("8. Kept by half of the rank")
rng = np.random.default_rng(0)


def kept_by_half(w):
    squares = np.linalg.svd(w, compute_uv=False) ** 2
    return squares[: len(squares) // 2].sum() / squares.sum()


table = []
all_weights = weights(lm.model)
for name in ("attn.qkv.q.w", "attn.qkv.v.w", "attn.out.w", "ffn.expand.gate.w", "ffn.down.w"):
    w = all_weights["stack.blocks.4." + name]
    trained, random = kept_by_half(w), kept_by_half(rng.standard_normal(w.shape))
    table.append([name, str(w.shape), f"{trained:.0%}", f"{random:.0%}"])
    assert random < trained < random + 0.1
print_table(["matrix of block 5", "shape", "trained", "random"], table)

# %% [markdown]
# There is little: this small model uses all of its directions, and low rank will be expensive.

# %% [markdown]
# ## ... low rank in the trained model
#
# The technique `low_rank` factorizes every matrix for which two factors are smaller. "plain" is the
# truncated SVD of the weights. "weighted" has the outputs in mind, like Wanda's score: it minimizes
# their error on calibration stories, for what never occurs in the inputs need not be kept. To do
# so, it takes a square matrix C with C C^T = X^T X, truncates the SVD of C^T W instead of W, and
# multiplies the left factor by the inverse of C^T.

# %%
title("... and the loss with factors instead of matrices")


def low_rank(share, weighted):
    options = {"share": 1 - share, "weighted": weighted, "stories": CALIBRATION}
    return minitx.load("stories", low_rank=options)


loss["low rank, plain"] = [loss_of(low_rank(share, False)) for share in SHARES]
weighted_models = [low_rank(share, True) for share in SHARES]
loss["low rank, weighted"] = [loss_of(model) for model in weighted_models]
print_losses("random weights", "low rank, plain", "low rank, weighted")
assert loss["neurons"][1] < loss["low rank, weighted"][1] < loss["low rank, plain"][1]

# %% [markdown]
# It takes many inputs to know which directions never occur: exercise 3 gives it more stories.

# %% [markdown]
# ## 9. All together
#
# The same share gone, 30 % of the blocks' weights, in five ways and at random. The longer the bar,
# the more the model has lost.

# %%
title(f"9. The loss with 30 % of the weights gone (nothing gone: {dense_loss:.3f})")
names = ["magnitude", "wanda", "neurons"]
names += ["low rank, weighted", "low rank, plain", "random weights"]
bar_chart(names, [loss[name][1] for name in names], "{:.3f}", width=50)
lines = {name: [dense_loss, *loss[name]] for name in names}
save_lines("09_loss_by_weights_gone", (0, *SHARES), lines, "share of the weights gone", "loss")

# %% [markdown]
# ## ... and the price: counts, then time
#
# What each saves for one token, with 63 before it. The last line is for comparison: all weights
# stay, in 8 bits (tutorial 8). The original model is 1 in all columns but the loss.

# %%
title("... and what 30 % fewer weights save (1 = the original model)")
candidates = {
    "wanda": wanda_models[1],
    "neurons": smaller_models[1],
    "low rank, weighted": weighted_models[1],
    "8 bits": minitx.load("stories", quantize={"bits": 8}),
}
table = []
for name, model in candidates.items():
    work = count_last(model, ids).total().multiply_adds / original
    memory = nbytes(model.model) / nbytes(lm.model)
    speed = speedup(decode_last(lm, ids), decode_last(model, ids), repeats=30)
    table.append([name, f"{work:.2f}", f"{memory:.2f}", f"{speed:.2f}", f"{loss_of(model):.3f}"])
print_table(["", "multiply-adds", "memory", "speed", "loss"], table)
say(
    "Zeros keep the model good and save nothing. Neurons save work and memory, and the model gets",
    "worse; but they save little time, because a matrix as narrow as this takes more time to",
    "call than to multiply. Low rank saves as much, and two products instead of one take the time",
    "that was saved. If it is memory that you lack, fewer bits give more for less.",
)

# %% [markdown]
# ## ... in a wide matrix
#
# In wide matrices calls hardly count, and the multiply-adds that are gone are time that is gone. A
# row times a matrix of 1024 x 4096, and what remains of it with half of the weights gone, in the
# three ways.

# %%
title("... and in a matrix of 1024 x 4096, half of its weights gone (time, whole matrix = 1)")
x = rng.standard_normal((1, 1024)).astype(np.float32)
W = rng.standard_normal((1024, 4096)).astype(np.float32)
zeros = np.where(rng.random(W.shape) < 0.5, W, 0)
half_of_columns = W[:, :2048].copy()
r = W.size // 2 // (1024 + 4096)  # 409
left, right = W[:, :r].copy(), W[:r].copy()  # only the shapes matter for the time


def two_products():
    return (x @ left) @ right


tasks = [partial(np.matmul, x, matrix) for matrix in (W, zeros, half_of_columns)]
times = time_side_by_side(*tasks, two_products, repeats=25)
for name, time in zip(("half zeros", "half of the columns", f"rank {r}"), times[1:]):
    print(f"  {name:20} {time / times[0]:.2f}")

# %% [markdown]
# One thing is missing on this page: a model that has lost weights is usually trained a little
# further, so that the others make up for them. That wins back part of the loss.

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 18`: The budget
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/09_fewer_weights.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 1, change X so that all three norms are equal. What does Wanda choose now, and why?
#    Then make Wanda drop the -0.7.
# 2. Give prune_neurons a random baseline. Removing a neuron is the same as a zero row of W_down:
#    overwrite rows of the weights whose path ends with "ffn.down.w", for 0.3 / in_neurons of the
#    neurons. What is the score of section 5 worth?
# 3. The scores come from 8 calibration stories. Try CALIBRATION = 1, 4 and 16. Which of the
#    techniques needs many stories, which score needs none, and what else is paid for more stories?
# 4. In section 7, make the second product as large as the first (1 instead of 0.1). What is
#    the share that rank 1 keeps? What must a matrix look like for rank 1 to be as bad as possible?
# 5. With 4 bits the model has 1,498,624 bytes. Combine two flags, quantize={"bits": 8} and
#    prune_structure={"neurons": ..., "stories": CALIBRATION}, to come as low. Which of the two
#    models has the lower loss?
