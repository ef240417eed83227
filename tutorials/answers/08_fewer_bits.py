# %% [markdown]
"""Answers to the questions of tutorial 8."""

# %%
import numpy as np
from helpers import borrow, evaluate_stories, held_out_stories, load_stories, print_table, title

import minitx
from minitx.tree import weights

lm = load_stories()
stories = held_out_stories(5)  # enough for the differences that we want to see
float32 = evaluate_stories(lm, stories).mean_loss
quantize_group = borrow("08", "quantize_group")

# %% [markdown]
# ## Question 1
#
# Which four weights have no error in 2 bits, and which have the largest in 4 bits?
#
# 2 bits have the codes -1, 0 and 1, so only -0.70, 0 and 0.70 are without an error. In 4 bits the
# scale is 0.10, and a weight half way between two multiples of it has the largest error, 0.05. The
# weight 0.70 has none, so the largest mean is three quarters of 0.05.

# %%
title("Question 1. The best and the worst weights")
mean_error = {}
for bits, w in ((2, [0.70, -0.70, 0.0, 0.70]), (4, [0.70, -0.35, 0.15, 0.05])):
    codes, scale = quantize_group(np.array(w), bits)
    mean_error[bits] = abs(codes * scale - w).mean()
    print(f"{bits} bits: {w} become {(codes * scale).round(2)}, mean error {mean_error[bits]:.4f}")
assert mean_error[2] == 0 and np.isclose(mean_error[4], 0.05 * 3 / 4)

# %% [markdown]
# ## Question 2
#
# What does clipping bring?
#
# In 2 bits with the factor 0.6, half of the weights become 0 instead of three quarters, and the
# loss falls by 2. In 3 bits a factor of 0.9 is best, and 0.6 does harm.
#
# A smaller factor makes the values finer, which lowers the error of the weights between them, and
# it cuts the largest weights, which adds an error. What is cut is the same for all bits. What is
# gained is smaller in 3 bits, as the values are three times as fine already. So in 3 bits the
# factor must stay closer to 1. The first table shows it: it has the sum of the squared errors, as a
# share of the sum of the squared weights.

# %%
title("Question 2. Clipping")


def round_weights(w, bits, factor, g=32):
    """As in the tutorial, with scales that are smaller by a factor. Also: which are clipped?"""
    groups = w.reshape(-1, g, w.shape[1])  # (groups in a column, weights, columns)
    m = 2 ** (bits - 1) - 1
    scales = factor * abs(groups).max(1, keepdims=True) / m
    codes = groups / scales
    return (np.rint(codes).clip(-m, m) * scales).reshape(w.shape), abs(codes).reshape(w.shape) > m


def rounded_model(bits, factor=1.0, path_has=""):
    """The model with rounded matrices, how many weights these have, and the share of zeros."""
    rounded, zeros, count = minitx.load("stories"), 0, 0
    for path, w in weights(rounded.model).items():
        if w.ndim == 2 and path != "embed.w" and path_has in path:
            w[...], _ = round_weights(w, bits, factor)
            zeros, count = zeros + np.sum(w == 0), count + w.size
    return rounded, count, zeros / count


matrix = weights(lm.model)["stack.blocks.4.ffn.down.w"]
table = []
for bits in (2, 3):
    for factor in (1.0, 0.9, 0.6):
        restored, clipped = round_weights(matrix, bits, factor)
        squares = (restored - matrix) ** 2 / np.sum(matrix**2)
        parts = squares[~clipped].sum(), squares[clipped].sum()
        table.append([f"{bits} bits, factor {factor}", *(f"{part:.3f}" for part in parts)])
print_table(["one matrix", "error of the rounded", "of the clipped"], table)

# %%
table, loss, zeros = [], {}, {}
for bits, factor in ((2, 1.0), (2, 0.6), (3, 1.0), (3, 0.9), (3, 0.6)):
    model, _, zeros[bits, factor] = rounded_model(bits, factor)
    loss[bits, factor] = evaluate_stories(model, stories).mean_loss
    row = f"{loss[bits, factor]:.3f}", f"{zeros[bits, factor]:.0%}"
    table.append([f"{bits} bits, factor {factor}", *row])
print_table(["all matrices", "loss", "zeros"], table)
assert loss[2, 0.6] < loss[2, 1.0] - 1.5 and zeros[2, 0.6] < 0.55 < 0.7 < zeros[2, 1.0]
assert loss[3, 0.9] < loss[3, 1.0] < loss[3, 0.6] - 0.2

# %% [markdown]
# ## Question 3
#
# Which ratio is best if the second input is the large one, and how can AWQ raise the loss?
#
# Ratio 0, of the four. The weight with the large input is the larger one already and has no error;
# any more makes it an outlier. (Between them, 0.146 is perfect: then the scale is 0.14.)
#
# AWQ lowers the error of one matrix on the calibration text, and the loss is something else. Other
# text has other inputs. And a smaller error can be the worse one: errors of 0.06 change which of
# two words is more likely, errors of 0.20 do not.

# %%
title("Question 3. Activation-aware scaling")
w, x = np.array([0.14, 0.70]), np.array([1.0, 10.0])
error = {}
for ratio in (0, 0.35, 0.7, 1, 0.146):
    c = x**ratio
    codes, scale = quantize_group(c * w, 4)
    output = (x / c) @ (codes * scale)
    error[ratio] = abs(output - x @ w)
    print(f"ratio {ratio:5}: codes {codes}, output {output:.3f}, error {error[ratio]:.3f}")
perfect = error.pop(0.146)
assert min(error, key=error.get) == 0 and perfect < 0.001

logits = np.array([2.0, 1.9])  # of two words
says = {}
for errors in ((-0.06, 0.06), (0.2, 0.2)):
    says[errors] = int((logits + errors).argmax())
    print(f"logits {logits}, errors {errors}: word {says[errors]} is the most likely")
assert says == {(-0.06, 0.06): 1, (0.2, 0.2): 0}

# %% [markdown]
# ## Question 4
#
# Which matrices need their bits most?
#
# For each weight, W_v and W_o, which make what a head adds to the residual stream: two query heads
# share each head of W_v, and an error of a query only moves attention weights. The gates need their
# bits least, and they are many: there, few bits save the most memory for the least loss.

# %%
title("Question 4. One kind of matrix in 2 bits")
table, per_million = [], {}
for kind in (".q.", ".v.", "attn.out", ".gate.", ".down."):
    model, count, _ = rounded_model(2, path_has=kind)
    added = evaluate_stories(model, stories).mean_loss - float32
    per_million[kind] = added / count * 1e6
    table.append([kind, count, f"{added:+.3f}", f"{per_million[kind]:.2f}"])
print_table(["", "weights", "loss", "loss per million weights"], table)
most = sorted(per_million, key=per_million.get)
assert set(most[-2:]) == {".v.", "attn.out"} and most[0] == ".gate."
