# %% [markdown]
"""Tutorial 10: tables instead of products. Can a table replace a product?

Children learn the multiplication table by heart and then look products up. A program can do the
same, if there are few different numbers to multiply. We look at three kinds of tables for matrix
products and at one for a function, then ask what decides whether a table pays: how much work does
one read replace?

Letters: x a row of inputs, W a matrix (inputs x outputs), T a table. A multiply-add is one
multiplication and one addition, the unit of all work in a product; a read fetches one number from a
table.
"""

# %% [markdown]
# ## A model, and text to judge it by

# %%
import numpy as np
from helpers import (
    QUESTION,
    STORY,
    count_last,
    decode_last,
    evaluate_stories,
    held_out_stories,
    largest_error,
    load_stories,
    print_table,
    save_picture,
    time_side_by_side,
    title,
    verdict,
)

import minitx
from minitx.tree import nbytes, weights

lm = load_stories()
ids = lm.encode(STORY + QUESTION)
read = held_out_stories(4)
plain_loss = evaluate_stories(lm, read).mean_loss
print(f"loss on {len(read)} held-out stories: {plain_loss:.3f} nats per token")

# %% [markdown]
# (The loss is the negative log-likelihood of the text: lower is better, and 0.1 more is a lot.)

# %% [markdown]
# ## 1. All products of two short vectors
#
# Let every number be -1, 0 or 1. Then there are only 9 different pairs, and only 9 x 9 dot products
# of two pairs. We compute all of them once. Check one entry: (-1, 1) with (1, 0) is -1 + 0 = -1.

# %%
title("1. A table of all products of two pairs")
PAIRS = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
T = np.array(PAIRS) @ np.array(PAIRS).T  # (9, 9)
print("             " + " ".join(f"{str(pair):>7}" for pair in PAIRS))
for pair, row in zip(PAIRS, T):
    print(f"    {str(pair):>8} " + " ".join(f"{entry:7}" for entry in row))

# Longer vectors are cut into pairs: one read for each pair, and the reads are added up.
x = (1, -1, 0, 1)
w = (1, 1, -1, 1)
first = T[PAIRS.index((1, -1)), PAIRS.index((1, 1))]
second = T[PAIRS.index((0, 1)), PAIRS.index((-1, 1))]
print(f"{x} . {w} = {first} + {second} = {first + second}, with 2 reads and no multiplication")
assert first + second == np.dot(x, w)

# %% [markdown]
# The table knows neither x nor w. The same 81 entries serve every vector of such numbers.

# %% [markdown]
# ## 2. A matrix of the model
#
# Real weights are no small integers, so they are rounded first: to 4 bits, the integers from -7 to
# 7 (-8 would fit, too, but is not used), times a scale (tutorial 8 is about that). With inputs in 4
# bits as well, a pair has a code from 0 to 16 x 16 - 1, one byte, and the table of all products of
# two pairs has 256 x 256 entries. Those in use are at most 7 x 7 + 7 x 7 = 98: one byte as well.

# %%
title("2. A matrix of 352 x 128 weights by table")
T4_PAIRS = [(a, b) for a in range(-8, 8) for b in range(-8, 8)]  # pair number 16 (a + 8) + (b + 8)
T4 = np.array(T4_PAIRS) @ np.array(T4_PAIRS).T  # (256, 256)
T4 = T4.clip(-98, 98).astype(np.int8)  # clips nothing but unused entries, those with -8

W = weights(lm.model)["stack.blocks.1.ffn.down.w"]  # (352, 128)
x = np.random.default_rng(0).standard_normal(352).astype(np.float32)
x_scale = abs(x).max() / 7
W_scale = abs(W).max(0) / 7  # (128,) one for each output
x_integers = np.rint(x / x_scale).astype(int)
W_integers = np.rint(W / W_scale).astype(int)

x_codes = 16 * (x_integers[0::2] + 8) + (x_integers[1::2] + 8)  # (176,) online
W_codes = 16 * (W_integers[0::2] + 8) + (W_integers[1::2] + 8)  # (176, 128) offline
by_table = T4[x_codes[:, None], W_codes].sum(0, dtype=int)  # (128,) 176 reads for each output
assert np.array_equal(by_table, x_integers @ W_integers)

y = by_table * x_scale * W_scale
error = largest_error(y, x @ W)
print(f"{W.size:,} multiply-adds became {W_codes.size:,} reads from {T4.size:,} entries")
print("against the product of the same integers: no error")
print(f"against the product before rounding: worst error {error:.0%} of the largest output")
assert 0 < error < 0.5

# %% [markdown]
# So the table itself is exact, and whatever is lost is lost by rounding to 4 bits. That is much for
# a single output. What does the whole model say to it?

# %% [markdown]
# ## ... in all blocks: lut_product
#
# The technique does it with every matrix of the blocks, all with the same table (LUT: look-up
# table). Each token has its own scale for x. Look at the memory: a pair of weights is one byte now,
# before it was two numbers of 4 bytes. The loss says what the rounding costs.

# %%
lut_product = minitx.load("stories", lut_product={"input_bits": 4, "weight_bits": 4, "length": 2})


def describe(name, one):
    """Print the model's memory, its loss, and its answer to where Tom is; returns the loss."""
    found = evaluate_stories(one, read).mean_loss
    answer = one.tokenizer.decode(one.generate(ids, 1)).strip()
    print(f"{name}: {nbytes(one.model) / 1e6:.2f} MB of arrays, loss {found:.3f}, says {answer!r}")
    return found


loss = {"plain": describe("plain", lm)}
loss["lut_product"] = describe("lut_product", lut_product)
assert nbytes(lut_product.model) < nbytes(lm.model) / 4
assert loss["plain"] < loss["lut_product"] < loss["plain"] + 0.2

# %% [markdown]
# Rounding errors have both signs and partly cancel in later sums: the model tolerates them.

# %% [markdown]
# ## 3. Why only pairs?
#
# Longer vectors would need fewer reads. But with b bits for an input and b for a weight, vectors of
# length n have 2^(n b) codes each, so the table has 2^(2 n b) entries. Look for the tables that fit
# into 32 KB, the usual size of a processor's fastest cache.

# %%
title("3. The size of the table, by bits and length")
LENGTHS = (1, 2, 3, 4)


def in_units(size):
    for unit in ("bytes", "KB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.0f} EB"  # 10^18 bytes


sizes = {}  # in bytes, one for each entry
for bits in (1, 2, 3, 4, 8):
    sizes[bits] = [2.0 ** (2 * length * bits) for length in LENGTHS]
table = [[f"{bits} bits", *map(in_units, sizes[bits])] for bits in sizes]
print_table(["", *(f"length {length}" for length in LENGTHS)], table)


def draw(axes):
    for bits in (1, 2, 3, 4):
        axes.semilogy(LENGTHS, sizes[bits], marker="o", label=f"{bits} bits")
    axes.axhline(2**15, color="gray", linestyle="--", label="32 KB")
    axes.set(xlabel="length (multiply-adds per read)", ylabel="bytes", xticks=LENGTHS)
    axes.legend()


save_picture("10_table_size", draw)

# %% [markdown]
# Each number more in a vector multiplies the size by 2^(2b). At 4 bits, a table of pairs (66 KB) is
# already twice the fastest cache; it fits into the next one.

# %% [markdown]
# ## 4. Tables of the inputs, indexed by bits
#
# Must both sides be rounded? Let only the weights be integers, and look at their bits. A bit of a
# weight says: add this input, or do not. Two inputs have only four such sums, and we compute all of
# them for this x. Then the weights' first bits say which sum counts twice, and their last bits
# which sum counts once. By hand: 3 * 2 + 5 * 3 = 21.

# %%
title("4. One table for each few inputs, read by the bits of the weights")
x = (3, 5)
sums = {"00": 0, "10": 3, "01": 5, "11": 3 + 5}  # "10": only the first input is added
w = (2, 3)  # in bits 10 and 11
first_bits, last_bits = "11", "01"  # of both weights
dot = 2 * sums[first_bits] + 1 * sums[last_bits]
print(f"{x} . {w} = 2 * {sums[first_bits]} + 1 * {sums[last_bits]} = {dot}")
assert dot == np.dot(x, w)

# %% [markdown]
# The table is new for every token, but it serves all outputs: 128 columns of W read the same four
# sums. This is lut_bit_serial; it takes 4 inputs together (16 sums) and weights of 4 bits.

# %%
bit_serial = minitx.load("stories", lut_bit_serial={"bits": 4, "group": 4})
loss["lut_bit_serial"] = describe("lut_bit_serial", bit_serial)
assert abs(loss["lut_bit_serial"] - loss["plain"]) < abs(loss["lut_product"] - loss["plain"])

# %% [markdown]
# Inputs stay as they are, so less is lost. But an output takes 4 reads (one for each bit) for 4
# inputs: in all as many reads as there were multiply-adds. (Negative weights: the stored integers u
# go from 0 to 15, and the weight is scale * (u - zero), so zero times the sum of x is subtracted
# from the result. An output has one scale and one zero.)

# %% [markdown]
# ## 5. Prototypes
#
# The third table needs no integers at all. Cut x into parts and replace each part by the nearest of
# a few prototypes, also called centroids. What W makes of a prototype is known in advance. Below
# are parts of 2 numbers and 2 prototypes. Which prototype is nearest to (0.9, 0.2)?

# %%
title("5. The nearest prototype")
PROTOTYPES = np.array([[1.0, 0.0], [0.0, 1.0]])
W = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 2.0], [4.0, 1.0]])  # 4 inputs, 2 outputs
# Offline: a table for each part, with a row for each prototype.
tables = [PROTOTYPES @ W[0:2], PROTOTYPES @ W[2:4]]

x = np.array([0.9, 0.2, 0.1, 1.1])
y = np.zeros(2)
for number, part in enumerate((x[0:2], x[2:4])):
    squared_distances = ((PROTOTYPES - part) ** 2).sum(1)
    nearest = squared_distances.argmin()
    y += tables[number][nearest]
    print(f"  {part}: nearest is {PROTOTYPES[nearest]}, its row of the table is", end=" ")
    print(tables[number][nearest])
print("sum of the rows:", y, "  the exact product:", (x @ W).round(2))
assert np.array_equal(y, [5, 3])

# %% [markdown]
# A row of the table serves all outputs, and it is read in order. All that is lost is lost by
# rounding x.

# %% [markdown]
# ## ... in the model: lut_centroid
#
# The prototypes are learned from the inputs that a matrix gets on a few stories set apart for that:
# k-means finds 16 centroids for each part of 4 numbers. Look at the loss if this is done in the
# last two blocks, and if it is done in all eight.

# %%
last_two = minitx.load("stories", lut_centroid={"stories": 4, "layers": 2})
lut_centroid = minitx.load("stories", lut_centroid={"stories": 4, "layers": None})
loss["lut_centroid, last 2"] = describe("lut_centroid, last 2 blocks", last_two)
loss["lut_centroid"] = describe("lut_centroid, all 8 blocks", lut_centroid)
assert loss["lut_centroid, last 2"] < loss["plain"] + 0.2
assert loss["lut_centroid"] > loss["plain"] + 1

# %% [markdown]
# In two blocks, little is lost; with all eight the model no longer works: each block rounds inputs
# that the blocks before have changed already. (The paper LUT-NN trains the prototypes together with
# the weights.) And the tables are 4 times as large as the weights: a table has 16 rows for each 4
# rows of W.

# %% [markdown]
# ## 6. A table for a function
#
# The activation SiLU, x / (1 + exp(-x)), takes an exponential and a division. An input in 16 bits
# has only 65,536 values, so we compute all of them. The index is the input's own bits, read as an
# integer. (float16 keeps 11 binary digits: the only thing that is lost.)

# %%
title("6. A function of one number")
every_float16 = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
with np.errstate(all="ignore"):  # Inf and NaN are among them
    silu_table = every_float16 / (1 + np.exp(-every_float16))

for number in (1.5, -0.1):
    index = int(np.float16(number).view(np.uint16))
    exact = number / (1 + np.exp(-number))
    print(f"  silu({number:4}): bits {index:016b} = entry {index:5}, reads", end=" ")
    print(f"{silu_table[index]:.6f} (exact: {exact:.6f})")
    assert abs(silu_table[index] - exact) < 1e-4

function_tables = minitx.load("stories", function_tables=True)
loss["function_tables"] = describe("function_tables", function_tables)
assert abs(loss["function_tables"] - loss["plain"]) < 1e-3

# %% [markdown]
# ## 7. The price: counts
#
# What one token takes, the others being in the KV cache (the stored keys and values): the
# multiply-adds that are left, the reads, and the bytes of the tables that they go to. Queries with
# keys, attention weights with values, and the output head are products as before: 208,640
# multiply-adds. The rest is what the tables themselves need. Look at the first column: which table
# needs most?

# %%
title("7. The price of one token: counts")
models = {
    "plain": lm,
    "lut_product": lut_product,
    "lut_bit_serial": bit_serial,
    "lut_centroid, last 2": last_two,
    "lut_centroid": lut_centroid,
    "function_tables": function_tables,
}
block = lm.model.stack.blocks[0]
block_weights = 8 * sum(w.size for w in weights(block).values() if w.ndim == 2)  # of 8 blocks
table_bytes = {
    "plain": 0,
    "lut_product": 2**16,  # one table for all matrices
    "lut_bit_serial": 352 // 4 * 16 * 4,  # new for each row: 16 sums of 4 bytes for each 4 inputs
    "lut_centroid, last 2": 2 / 8 * 4 * block_weights * 4,  # 4 times the weights, of 4 bytes each
    "lut_centroid": 4 * block_weights * 4,
    "function_tables": 2**16 * 4,
}
multiply_adds, reads, table = {}, {}, []
for name, one in models.items():
    counts = count_last(one, ids)
    multiply_adds[name] = counts.total().multiply_adds
    reads[name] = counts.events["table reads"] + counts.events["function table reads"]
    kilobytes = round(table_bytes[name] / 1000)
    table.append([name, multiply_adds[name], reads[name], kilobytes, f"{loss[name]:.3f}"])
print_table(["", "multiply-adds", "reads", "tables, KB", "loss"], table)
assert multiply_adds["lut_product"] < multiply_adds["plain"] / 5

inputs = 8 * sum(len(w) for w in weights(block).values() if w.ndim == 2)  # of all matrices
outputs = 8 * sum(w.shape[1] for w in weights(block).values() if w.ndim == 2)
as_before = multiply_adds["plain"] - block_weights
assert as_before == 208_640
assert multiply_adds["lut_product"] == as_before + inputs + 2 * outputs  # scales of x, then of y
assert multiply_adds["lut_bit_serial"] == as_before + 2 * outputs  # zero and scale of each output
assert multiply_adds["lut_centroid"] == as_before + 16 * inputs  # distances to 16 centroids

# %% [markdown]
# lut_centroid: to find the nearest of 16 centroids, each input takes 16 multiply-adds. lut_product
# multiplies by scales, lut_bit_serial by the scale and the zero of each output. (To make the sums
# of lut_bit_serial takes additions only.)

# %% [markdown]
# ## ... as a picture
#
# "#" are multiply-adds, "r" reads, drawn to the same scale.

# %%
print()
for name in models:
    products = "#" * round(40 * multiply_adds[name] / multiply_adds["plain"])
    lookups = "r" * round(40 * reads[name] / multiply_adds["plain"])
    print(f"  {name:20} {products}{lookups}")

# %% [markdown]
# Most multiplications are gone. lut_product leaves three fifths of the operations, lut_centroid two
# fifths; lut_bit_serial has exchanged one kind for the other. Is that faster?

# %% [markdown]
# ## 8. The price: time
#
# Now the same token with a clock. Above 1 is faster than the plain model.

# %%
title("8. The price of one token: speed (plain = 1)")
tasks = [decode_last(one, ids) for one in models.values()]
times = time_side_by_side(*tasks, repeats=20)
for name, seconds in zip(models, times):
    if name != "plain":
        print(f"  {name:20} {times[0] / seconds:.2f}  {verdict(times[0] / seconds)}")
assert times[1] > times[0] and times[2] > times[0]

# %% [markdown]
# In NumPy the tables of products lose, clearly. Why? Let us time the two operations alone.

# %% [markdown]
# ## ... what does a read cost?
#
# The same 352 x 128 matrix as in section 2: its product, and its reads.

# %%
W = weights(lm.model)["stack.blocks.1.ffn.down.w"]
x = np.random.default_rng(0).standard_normal(352).astype(np.float32)
flat = T4.reshape(-1)
index = 256 * x_codes[:, None] + W_codes  # which entries to read: (176, 128)


def multiply():
    return x @ W


def fetch():
    return flat.take(index)


product_time, reading_time = time_side_by_side(multiply, fetch, repeats=200)
cost = (reading_time / index.size) / (product_time / W.size)
print(f"\none read takes the time of {cost:.0f} multiply-adds")
assert cost > 2

# %% [markdown]
# The product goes through memory in order, and one instruction multiplies 8 or 16 numbers at once.
# Each read has an address of its own. So here a table pays only if one read replaces more
# multiply-adds than that (the additions of what was read are not even in it): lut_product replaces
# 2, lut_bit_serial 1, lut_centroid 4. It is a matter of the machine. Processors can read 16 or 32
# entries in one instruction, if the table fits into a register (the byte shuffle, for which
# lut_bit_serial is made), and chips have been designed around such tables. NumPy reaches neither.

# %% [markdown]
# ## 9. Where a table wins
#
# In tutorial 3, one read of a ready row replaces whole products, and in stories-parallel, where it
# replaces nearly a whole block, that pays. And GELU, another activation, takes dozens of operations
# for one number; SiLU takes few. Which of the two does a table make faster?

# %%
title("9. One read for much work")
gelu = minitx.load("stories-parallel")  # a model with GELU
gelu_table = minitx.load("stories-parallel", function_tables=True)
for name, plain, tabled in (("SiLU", lm, function_tables), ("GELU", gelu, gelu_table)):
    before, after = time_side_by_side(decode_last(plain, ids), decode_last(tabled, ids), repeats=60)
    print(f"  {name} by table: {before / after:.2f}  {verdict(before / after)}")

# %% [markdown]
# For SiLU, rounding and reading take NumPy as long as the function itself, or longer. So, can a
# table replace a product? Yes, and exactly, once the numbers are small integers. Whether it should
# depends on how much work one read replaces, and on what a read costs on your machine.

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 11`: Lookup tables
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/10_tables_instead_of_products.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. Section 1: how many entries has the table for triples of {-1, 0, 1}? And how many reads does a
#    dot product of 12 numbers take, with pairs and with triples?
# 2. Section 2: put the weights into the table, too: for each pair of inputs, each of its 256 codes
#    and each of the 128 outputs, the finished sum. How many entries are that for 352 inputs, and
#    how many times the 45,056 weights? How many reads does one output take? (It is what section 5
#    does with 256 prototypes for 2 numbers.)
# 3. Section 5: take x = (0.6, 0.5, 0.1, 1.1). How far is the result from the exact product? Add the
#    prototype (0.5, 0.5): how far now? And what comes out for x = 0?
# 4. Inputs or weights: which may be rounded more? Load lut_product with input_bits 3 and
#    weight_bits 4, then the other way round, and compare the losses with `describe`. Look at the
#    inputs of down in a block for the reason: how many of them does rounding turn into 0?
# 5. A read takes as long as 12 multiply-adds, say. From which length on would lut_product pay, and
#    how large is its table then, with 4 bits? With 1 bit? (Section 3 has the formula.)
