# %% [markdown]
"""Answers to the questions of tutorial 10."""

# %%
from itertools import product

import numpy as np
from helpers import QUESTION, STORY, evaluate_stories, held_out_stories, load_stories, title

import minitx
from minitx.state import Layer
from minitx.tree import weights

lm = load_stories()

# %% [markdown]
# ## Question 1
#
# How large is the table for triples, and how many reads does it save?
#
# There are 3^3 = 27 triples of -1, 0 and 1, and an entry for each two of them: 729, which is 9
# times as many as for pairs. A dot product of 12 numbers takes 4 reads instead of 6. The reads fall
# in proportion to the length, and the table grows exponentially.

# %%
title("Question 1. Pairs and triples")
entries = {}
for length in (2, 3):
    parts = np.array(list(product((-1, 0, 1), repeat=length)))  # (3^length, length)
    T = parts @ parts.T
    entries[length] = T.size
    print(f"length {length}: {T.size} entries, {12 // length} reads for 12 numbers")
assert entries == {2: 81, 3: 729}

# %% [markdown]
# ## Question 2
#
# How large is the table if the weights are in it?
#
# The table has 176 pairs x 256 codes x 128 outputs = 5,767,168 entries, 128 times as many as the
# matrix has weights: a pair of inputs has 256 rows in place of its 2 rows of W. An output takes 176
# reads, as before. But the 128 entries that one code selects are a row of the table, so 176 rows
# are read in order and added up.

# %%
title("Question 2. The weights in the table")
W = weights(lm.model)["stack.blocks.1.ffn.down.w"]  # (352, 128)
W_integers = np.rint(W / (abs(W).max(0) / 7)).astype(int)
x_integers = np.random.default_rng(0).integers(-7, 8, 352)
codes = np.array(list(product(range(-8, 8), repeat=2)))  # (256, 2) all pairs of inputs
T = codes @ W_integers.reshape(176, 2, 128)  # (176, 256, 128) offline

x_codes = 16 * (x_integers[0::2] + 8) + (x_integers[1::2] + 8)  # (176,) online
rows = T[np.arange(176), x_codes]  # (176, 128)
print(f"{T.size:,} entries, {T.size // W.size} times as many as the {W.size:,} weights")
print(f"{len(rows)} reads for an output, {len(rows)} rows for all of them")
assert np.array_equal(rows.sum(0), x_integers @ W_integers)
assert T.size == 5_767_168 == 128 * W.size

# %% [markdown]
# ## Question 3
#
# How far is the result from the exact product, with 2 prototypes and with 3?
#
# (0.6, 0.5) lies between (1, 0) and (0, 1), and each of them is far away. The new prototype is
# near. The first output is now off by 0.5 instead of 1.5. But the second, which was right by
# chance, is off by 0.5 as well: a smaller error of x makes the result better on average, not in
# every number.
#
# For x = 0 the exact product is 0, and neither set of prototypes gives it. Zero has to be rounded
# to a prototype like everything else. (In the model they are learned from real inputs, so some
# prototype lies where inputs often are.)

# %%
title("Question 3. One prototype more")
TWO = np.array([[1.0, 0.0], [0.0, 1.0]])
THREE = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
W4 = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 2.0], [4.0, 1.0]])


def by_prototypes(x, prototypes):
    y = np.zeros(2)
    for part, W_part in ((x[0:2], W4[0:2]), (x[2:4], W4[2:4])):
        nearest = ((prototypes - part) ** 2).sum(1).argmin()
        y += (prototypes @ W_part)[nearest]
    return y


x = np.array([0.6, 0.5, 0.1, 1.1])
off = []
for prototypes in (TWO, THREE):
    y = by_prototypes(x, prototypes)
    off.append((y - x @ W4).round(2))
    print(f"{len(prototypes)} prototypes: {y}, off by {off[-1]}", end="")
    print(f"; for x = 0: {by_prototypes(np.zeros(4), prototypes)}")
assert off[0].tolist() == [-1.5, 0] and off[1].tolist() == [-0.5, -0.5]
assert by_prototypes(np.zeros(4), TWO).any() and by_prototypes(np.zeros(4), THREE).any()

# %% [markdown]
# ## Question 4
#
# Inputs or weights: which may be rounded more?
#
# The weights. All inputs of a token share one scale, which the largest sets, and the inputs of the
# down matrix are products of two numbers, a few large and most small: nearly all of them become
# zero. A column of weights has a scale of its own, and its numbers are of similar size.

# %%
title("Question 4. 3 bits for the inputs, or for the weights")
read = held_out_stories(2)
plain = evaluate_stories(lm, read).mean_loss
rise = {}
for bits in ((3, 4), (4, 3)):
    options = {"input_bits": bits[0], "weight_bits": bits[1], "length": 2}
    rounded = minitx.load("stories", lut_product=options)
    rise[bits] = evaluate_stories(rounded, read).mean_loss - plain
    print(f"inputs {bits[0]} bits, weights {bits[1]} bits: loss {rise[bits]:+.3f}")
assert rise[3, 4] > 2 * rise[4, 3] > 0


def share_of_zeros(numbers, axis):
    scale = abs(numbers).max(axis, keepdims=True) / 3  # 3 bits: the integers from -3 to 3
    return np.mean(np.rint(numbers / scale) == 0)


ids = lm.encode(STORY + QUESTION)
x, block = lm.model.embed(ids, None), lm.model.stack.blocks[0]
x = x + block.attn(x, Layer.once(len(ids)))
neurons = block.ffn.expand(block.ffn.norm(x))  # (T, F) the inputs of down
of_inputs, of_weights = share_of_zeros(neurons, 1), share_of_zeros(block.ffn.down.w, 0)
print(f"down in block 1, with 3 bits: {of_inputs:.0%} of the inputs become 0,", end=" ")
print(f"and {of_weights:.0%} of the weights")
assert of_inputs > 0.9 > 0.6 > of_weights

# %% [markdown]
# ## Question 5
#
# A read takes as long as 12 multiply-adds: from which length on does lut_product pay?
#
# From 13 on: one read replaces as many multiply-adds as the length says. With 4 bits its table
# would have 2^(2 * 13 * 4) = 2^104 entries, which no memory holds. With 1 bit it has 2^26, 67 MB in
# bytes: possible, but far larger than any cache near the processor, and a read from main memory
# takes longer than 12 multiply-adds.

# %%
title("Question 5. From which length on?")
READ = 12  # multiply-adds that take as long
pays = next(length for length in range(1, 100) if length > READ)
size = {bits: 2 ** (2 * pays * bits) for bits in (1, 4)}
print(f"length {pays}: {size[4]:.0e} entries with 4 bits, {size[1]:,} with 1 bit")
assert size == {1: 67_108_864, 4: 2**104}
