# %% [markdown]
"""Answers to the questions of tutorial 3."""

# %%
import numpy as np
from helpers import QUESTION, STORY, largest_error, print_table, say, title

import minitx
from minitx.tree import weights

# %% [markdown]
# ## Question 1
#
# What becomes of a norm's bias b?
#
# (x / rms * g + b) @ W = (x / rms) @ (g[:, None] * W) + b @ W. The product b @ W is known offline:
# it is a bias of the matrix, one number for each column.

# %%
title("Question 1. The bias of a norm")
x, g, b = np.array([3.0, -3.0]), np.array([2.0, 5.0]), np.array([1.0, -1.0])
W = np.array([[1.0, 3.0], [4.0, 2.0]])
rms = np.sqrt((x * x).mean())
folded_W = g[:, None] * W  # offline
folded_b = b @ W  # offline
print("online: ", (x / rms * g + b) @ W, "  offline: a bias of", folded_b)
print("folded: ", x / rms @ folded_W + folded_b)
assert np.allclose((x / rms * g + b) @ W, x / rms @ folded_W + folded_b)

# %% [markdown]
# ## Question 2
#
# How small may a mistake be?
#
# The error in the logits shrinks with the mistake, tenfold each time. In float64 it is lost in the
# rounding (1e-15 of the largest logit) for mistakes below about 1e-12. In float32 the rounding is
# at 5e-7, so a mistake must be about 1e-3 to stand out. Nine digits lie between the two.

# %%
title("Question 2. How small may a mistake be?")
PATH = "stack.blocks.4.attn.qkv.q.w"


def error_of(mistake, dtype):
    """The largest error of the logits if row 0 of the folded queries is wrong by this factor."""
    dense = minitx.load("stories", dtype=np.float64)
    ids = dense.encode(STORY + QUESTION)
    changed = minitx.load("stories", dtype=dtype, fold_norms=True)
    weights(changed.model)[PATH][0] *= 1 + mistake
    return largest_error(changed.logits(ids), dense.logits(ids))


table = []
for mistake in (1e-1, 1e-2, 1e-4, 1e-8, 1e-12, 1e-15):
    errors = error_of(mistake, np.float32), error_of(mistake, np.float64)
    table.append([f"{mistake:.0e}", *(f"{error:.0e}" for error in errors)])
none = error_of(0, np.float32), error_of(0, np.float64)
table.append(["none", *(f"{error:.0e}" for error in none)])
print_table(["mistake", "float32", "float64"], table)
assert error_of(1e-4, np.float32) < 3 * none[0] and error_of(1e-1, np.float32) > 30 * none[0]
assert error_of(1e-10, np.float64) > 30 * none[1] and error_of(1e-15, np.float64) < 3 * none[1]

# %% [markdown]
# ## Question 3
#
# When is a check blind?
#
# The gain that is nearest to 1 can be forgotten, and the error is about a tenth of that of number
# 0. If all gains are 1, as they are before training, a fold_norms that forgets every one of them is
# right. A test has to use weights that make the difference: minitx draws random gains for its
# tests.

# %%
title("Question 3. A blind check")
dense64 = minitx.load("stories", dtype=np.float64)
ids = dense64.encode(STORY + QUESTION)
gain = weights(dense64.model)["stack.blocks.4.attn.norm.gain"]
least = int(abs(gain - 1).argmin())
for column in (0, least):
    changed = minitx.load("stories", dtype=np.float64, fold_norms=True)
    weights(changed.model)[PATH][column] /= gain[column]
    error = largest_error(changed.logits(ids), dense64.logits(ids))
    print(f"gain {column} is {gain[column]:.4f}; forgotten, the logits differ by {error:.0e}")
assert error < 1e-4 and abs(gain[least] - 1) < 0.01 < abs(gain[0] - 1)

# %% [markdown]
# ## Question 4
#
# Which two tokens have the same row?
#
# " the" = [1, 1] and "ran" = [2, 2] have the same direction, and the norm divides by the length, so
# queries, keys and values are the same. The model still tells them apart, because the embedding
# itself goes on in the residual stream; that is why a row of the table in section 6 holds it too.

# %%
title("Question 4. Two tokens with the same row")
embedding = np.array([[3.0, -3.0], [2.0, 2.0], [7.0, 1.0], [1.0, 1.0]])  # Tom ran home the
rms = np.sqrt((embedding * embedding).mean(-1, keepdims=True))
rows = embedding / rms @ folded_W
for word, embedded, row in zip(("Tom", "ran", "home", "the"), embedding, rows):
    say(f"{word:5} embedding {embedded}  row {row.round(1)}")
assert np.array_equal(rows[1], rows[3]) and not np.array_equal(embedding[1], embedding[3])
