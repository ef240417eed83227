# %% [markdown]
"""Answers to the questions of tutorial 6."""

# %%
import numpy as np
from helpers import (
    borrow,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    title,
)

import minitx
from minitx.lab.frontier.attention_baselines import baseline
from minitx.ledger import counting

lm = load_stories()
stories = held_out_stories(6)  # enough for the differences that we want to see
softmax = borrow("06", "softmax")

# %% [markdown]
# ## Question 1
#
# When is nothing lost, although weight is dropped?
#
# If the dropped values have the weighted mean of the kept ones. By the formula, the error is the
# dropped weight times the difference of the two means, and that is 0 now. Adding the difference to
# each dropped value does it; so does setting all of them to 15.379.

# %%
title("Question 1. Dropped weight without an error")
values = np.array([10.0, 20.0, 0.0, 30.0, 40.0, 20.0])
weights = softmax(np.array([4.0, 1.0, 0.0, 3.0, -1.0, 0.0]))
kept = np.array([True, False, False, True, False, False])


def mean_of(chosen):
    """The weighted mean of the chosen values."""
    return weights[chosen] @ values[chosen] / weights[chosen].sum()


before = mean_of(kept) - weights @ values
values[~kept] += mean_of(kept) - mean_of(~kept)
after = mean_of(kept) - weights @ values
print("values", values.round(2))
print(f"weight dropped {weights[~kept].sum():.3f}, error {before:.3f} before, {abs(after):.3f} now")
assert abs(before) > 0.1 and abs(after) < 1e-12

# %% [markdown]
# ## Question 2
#
# Is the key at 60 degrees kept?
#
# The query at 20 degrees is within 90 degrees of the directions at 0, 45 and 90, but not of that at
# 135: its bits are 1 1 1 0. The key is within 90 degrees of all four: 1 1 1 1. One bit differs, so
# the estimated angle is 45 degrees (the true one 40), and the similarity 0.5 cos 45 = 0.35 is not
# above 0.8. It would be from the length 0.8 / cos 45 = 1.13 on.

# %%
title("Question 2. A key at 60 degrees")
vector = borrow("06", "vector")
estimated_angles = borrow("06", "estimated_angles")
directions = np.array([vector(angle, 1) for angle in (0, 45, 90, 135)])
threshold = 0.4 * 2  # t times the length of the longest key
needed = threshold / np.cos(np.radians(45))
for name, toy in (("query", vector(20, 1)), ("key", vector(60, 0.5))):
    print(f"{name:5}  bits {(directions @ toy >= 0).astype(int)}")
above = []
for length in (0.5, needed - 0.01, needed + 0.01):
    key = vector(60, length)
    (angle,) = estimated_angles(vector(20, 1), key[None], directions)
    similarity = length * np.cos(angle)
    above.append(bool(similarity > threshold))
    print(
        f"length {length:.2f}: {np.degrees(angle):.0f} degrees, similarity {similarity:.2f}", end=""
    )
    print(", kept" if above[-1] else ", dropped")
assert above == [False, False, True]

# %% [markdown]
# ## Question 3
#
# How many of the best keys are enough?
#
# 64: the loss is that of the dense model to within 0.001. With 100 it is as near, on the other
# side: differences that small are chance. The longest of these stories has 233 tokens, and its last
# words get by with a quarter of the keys that they see.

# %%
title("Question 3. The best 32, 64 or 100 keys")
dense = evaluate_stories(lm, stories).mean_loss
difference = {}
for r in (32, 64, 100):
    difference[r] = evaluate_stories(baseline(lm, "oracle", r), stories).mean_loss - dense
    print(f"oracle, {r:3} keys: loss {dense + difference[r]:.4f}, {difference[r]:+.4f}")
print(f"dense, all keys:  loss {dense:.4f}")
assert difference[32] > 0.002 and max(abs(difference[64]), abs(difference[100])) < 0.001

# %% [markdown]
# ## Question 4
#
# What do twice the bits bring?
#
# A lower loss with as many keys. The estimates are better (by section 5, four times the bits at
# least halve the error), so more of the keys that are kept are the right ones. The price is paid
# for every key, kept or not: twice the bits are stored and compared.

# %%
title("Question 4. 32 and 64 bits, a fifth of the keys kept")
table, loss, compared = [], {}, {}
for bits, p in ((32, 2.0), (64, 1.5)):
    model = minitx.load("stories", elsa={"p": p, "bits": bits, "min_visible": 1})
    with counting(model) as counts:
        loss[bits] = evaluate_stories(model, stories).mean_loss
    share = counts.events["keys kept"] / counts.events["keys seen"]
    compared[bits] = counts.events["bits compared"]
    table.append([f"{bits} bits, p = {p}", f"{share:.0%}", f"{loss[bits]:.3f}", compared[bits]])
    assert 0.18 < share < 0.22
print_table(["", "keys kept", "loss", "bits compared"], table)
print(f"(dense: {dense:.3f})")
assert dense < loss[64] < loss[32] - 0.05
assert compared[64] == 2 * compared[32]
