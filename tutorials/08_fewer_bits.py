# %% [markdown]
"""Tutorial 8: fewer bits. How few bits does a weight need?

A weight is a float32: 32 bits, about seven decimal digits. To decode one token, every weight is
read from memory once (tutorial 2), so in a large model the bits of the weights decide how long a
token takes. Quantization stores each weight as a small integer, a code, and a float that many codes
share, the scale. First we do it to four numbers by hand, then to a trained model, bit by bit until
it breaks.

You need matrix products, and attention with a KV cache as in tutorial 2. Letters: b bits per code,
m the largest code, g weights in a group that shares a scale, S tokens in the KV cache.
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
from minitx.state import Layer
from minitx.tree import nbytes, weights

lm = load_stories()
stories = held_out_stories(24)
ids = lm.encode(stories[0].text)
count = sum(w.size for w in weights(lm.model).values())
print(f"{count:,} weights in float32: {4 * count / 1e6:.2f} MB")

# %% [markdown]
# ## 1. Four weights, by hand
#
# With 4 bits the codes are -7, -6, ..., 7. The scale is chosen so that the largest weight gets the
# code 7. Then a weight is divided by the scale and rounded to the nearest integer: that is its
# code. To dequantize, multiply by the scale again.

# %%
title("1. Four weights in 4 bits")
w = np.array([0.70, -0.34, 0.12, 0.03])
scale = abs(w).max() / 7
codes = np.rint(w / scale).astype(int)
restored = codes * scale
print("scale        ", scale.round(4))
print("w / scale    ", (w / scale).round(2))
print("codes        ", codes)
print("code * scale ", restored.round(2))
print("error        ", (restored - w).round(2))
assert codes.tolist() == [7, -3, 1, 0]
assert np.all(abs(restored - w) <= scale / 2 + 1e-12)

# %% [markdown]
# No error is larger than half a scale, 0.05. The largest weight has none; the smallest becomes 0.

# %% [markdown]
# ## ... and in fewer bits
#
# With b bits the codes go from -m to m, where m = 2^(b - 1) - 1: 127, 7, 3 and 1 for 8, 4, 3 and 2
# bits. In the picture, "|" are the values that there are, and "o" our four weights, each of which
# must move to the nearest "|". Look at how soon the values become few.


# %%
def quantize_group(w, bits):
    """Codes and scale of weights that share one scale."""
    m = 2 ** (bits - 1) - 1
    scale = abs(w).max() / m
    return np.rint(w / scale).astype(int), scale


title("... and the values that 4, 3 and 2 bits have between -0.7 and 0.7")
for bits in (4, 3, 2):
    codes, scale = quantize_group(w, bits)
    line = [" "] * 85
    m = 2 ** (bits - 1) - 1
    for code in range(-m, m + 1):
        line[round(42 + 42 * code / m)] = "|"
    print(f"  {bits} bits  {''.join(line)}")
    line = [" "] * 85
    for weight in w:
        line[round(42 + 60 * weight)] = "o"
    print(f"          {''.join(line).rstrip()}")
    error = abs(codes * scale - w).mean()
    print(f"          become {(codes * scale).round(2)}, mean error {error:.3f}")

# %% [markdown]
# With 2 bits there are only -1, 0 and 1, so whatever is below half of the largest weight becomes 0.

# %% [markdown]
# ## 2. One outlier ruins its group
#
# Here are eight weights, one of them much larger than the others: an outlier. It sets the scale for
# all that share it. Compare the errors of the first four with one scale for all eight, and with one
# scale for each group of four.

# %%
title("2. One outlier among eight weights, 4 bits")
w = np.array([0.70, -0.34, 0.12, 0.03, 0.25, -0.41, 2.80, 0.09])
for name, groups in (("one group", w.reshape(1, 8)), ("two groups", w.reshape(2, 4))):
    restored = []
    for group in groups:
        codes, scale = quantize_group(group, 4)
        restored.extend(codes * scale)
    error = abs(np.array(restored) - w)
    print(f"{name:10}  {np.array(restored).round(2)}")
    print(f"    mean error of the first four {error[:4].mean():.4f}, of the others", end=" ")
    print(f"{error[4:].mean():.4f}")
# %% [markdown]
# In a group of its own, the first half has the errors of section 1 again. But each scale has to be
# stored too. If it is a float32, a weight costs b + 32 / g bits:

# %%
table = []
for g in (4, 16, 32, 128):
    table.append([g, *(f"{bits + 32 / g:.2f}" for bits in (8, 4, 3))])
print_table(["weights in a group (g)", "8 bits", "4 bits", "3 bits"], table)

# %% [markdown]
# Groups of four would triple a weight of 4 bits. 32 to 128 weights in a group are usual.

# %% [markdown]
# ## 3. Zero point: codes that do not lie around 0
#
# If nearly all weights of a group are positive, the negative codes are wasted. Asymmetric
# quantization lets the codes go from 0 to 15 and stores one more integer per group, the zero point:
# the code of the weight 0. Look at the scale: it is half as large, so the errors should be too.

# %%
title("3. A group of mostly positive weights, 4 bits")
w = np.array([-0.10, 0.33, 0.82, 1.40])
codes, scale = quantize_group(w, 4)
symmetric = codes * scale
print(f"symmetric:  scale {scale:.2f}, codes {codes}")
print(f"            restored {symmetric.round(2)}, mean error {abs(symmetric - w).mean():.4f}")

scale = (w.max() - w.min()) / 15
zero_point = int(np.rint(-w.min() / scale))  # 1: the weight 0 gets this code
codes = np.rint(w / scale).astype(int) + zero_point
asymmetric = (codes - zero_point) * scale
print(f"asymmetric: scale {scale:.2f}, zero point {zero_point}, codes {codes}")
print(f"            restored {asymmetric.round(2)}, mean error {abs(asymmetric - w).mean():.4f}")
assert abs(asymmetric - w).mean() < abs(symmetric - w).mean() / 2

# %% [markdown]
# In a trained matrix the weights of most groups lie around 0, so there it brings less.

# %% [markdown]
# ## 4. How a model is judged
#
# By its loss on 24 held-out stories: the mean negative log-likelihood per token. A model that knew
# nothing about the vocabulary's 1,022 tokens would have ln 1022 = 6.9. The stories also ask
# questions, whose answers follow from one, two or three sentences (hops); we count the share
# answered correctly. Of 2 hops there are only 23 questions, of 3 hops 15, so one answer changes a
# share by 4 or 7 %.

# %%
HOPS = ("1 hop", "2 hops", "3 hops")
losses = {}


def judge(name, model, size):
    """A row of a table: name, size, loss and shares. The loss is also kept in ``losses``."""
    scores = evaluate_stories(model, stories)
    losses[name] = scores.mean_loss
    answers = [f"{scores.accuracy[hops]:.0%}" for hops in HOPS]
    return [name, size, f"{scores.mean_loss:.4f}", *answers]


# %% [markdown]
# ## ... a trained model in 8 bits, and in 4
#
# The technique `quantize` does this to every matrix of the model: each column (the weights of one
# output) is cut into groups of at most 64. Zero points come with symmetric=False. Norms stay as
# they are, and so does the embedding table, unless we say embeddings=True. The bytes are those of
# all arrays: the weights, and 131,072 bytes of tables for rotary positions. Where do you expect the
# first damage?

# %%
title("4. load('stories', quantize=...)")
int8 = minitx.load("stories", quantize={"bits": 8})
int4 = minitx.load("stories", quantize={"bits": 4})
int4_zero = minitx.load("stories", quantize={"bits": 4, "symmetric": False})
int4_all = minitx.load("stories", quantize={"bits": 4, "embeddings": True})
assert nbytes(lm.model) == 4 * count + 131_072
table = [
    judge("float32", lm, nbytes(lm.model)),
    judge("8 bits", int8, nbytes(int8.model)),
    judge("4 bits", int4, nbytes(int4.model)),
    judge("4 bits, zero points", int4_zero, nbytes(int4_zero.model)),
    judge("4 bits, embedding too", int4_all, nbytes(int4_all.model)),
]
print_table(["", "bytes", "loss", *HOPS], table)
assert abs(losses["8 bits"] - losses["float32"]) < 0.001
assert losses["4 bits, embedding too"] - losses["float32"] < 0.015

# %% [markdown]
# 8 bits cannot be told from float32, in a third of the bytes. 4 bits cost less than 0.01 of loss
# and hardly an answer. Zero points lower the loss a little, because they make use of the 16th code;
# that an answer of 2 hops is lost is chance. (In thousandths, the loss depends on which stories one
# reads.)

# %% [markdown]
# ## 5. How few?
#
# The flag stops at 4 bits, because codes of 3 bits do not fill bytes. But the loss does not care
# how codes are stored: we can round a model's weights ourselves and leave them floats. So we load
# fresh copies of the model and overwrite their matrices.


# %%
def round_weights(w, bits, g):
    """The matrix w (in, out) after quantizing and dequantizing it."""
    inputs, outputs = w.shape
    groups = w.reshape(-1, g or inputs, outputs)  # (groups in a column, weights, columns)
    m = 2 ** (bits - 1) - 1
    scales = abs(groups).max(1, keepdims=True) / m  # one for each group and column
    return (np.rint(groups / scales) * scales).reshape(inputs, outputs)


def rounded_model(bits, g):
    rounded = minitx.load("stories")
    for path, w in weights(rounded.model).items():
        if w.ndim == 2 and path != "embed.w":
            w[...] = round_weights(w, bits, g)
    return rounded


# %% [markdown]
# ## ... the loss by bits and group size
#
# Group size None means one scale for a whole column, which is 128 or 352 weights here. Half of the
# stories are enough for this. In the bar chart, for groups of 32, look at where the bars begin to
# grow.

# %%
title("5. The loss by bits and group size")
BITS = (5, 4, 3, 2)
half = stories[:12]
float32 = evaluate_stories(lm, half).mean_loss
table, lines = [], {}
for g in (16, 32, None):
    found = [evaluate_stories(rounded_model(bits, g), half).mean_loss for bits in BITS]
    lines[f"groups of {g}" if g else "whole columns"] = found
for i, bits in enumerate(BITS):
    table.append([f"{bits} bits", *(f"{line[i]:.3f}" for line in lines.values())])
print_table(["", *lines], table)
print("\nGroups of 32:")
labels, values = [f"{bits} bits" for bits in BITS], lines["groups of 32"]
bar_chart(["float32", *labels], [float32, *values], "{:.3f}", width=60)
save_lines("08_loss_by_bits", BITS, lines, "bits per code", "loss")

at_5, at_4, at_3, at_2 = lines["groups of 32"]
assert at_5 < at_4 < float32 + 0.01 < at_3 < float32 + 0.05 and at_2 > 2
assert lines["whole columns"][2] > lines["groups of 16"][2] + 0.03  # 3 bits
assert lines["whole columns"][0] < lines["groups of 16"][1] + 0.001  # 5 bits, and 4

# %% [markdown]
# Down to 4 bits hardly anything happens, 3 bits can be noticed, and with 2 the model is gone: each
# bit less at least doubles the scale, and the errors with it. Small groups help most where bits are
# few. Are they worth their scales? By section 2, 4 bits in groups of 16 are 6 bits per weight. 5
# bits in whole columns are at most 5.25, and no worse here. (Scales in float16 halve that price.)

# %% [markdown]
# ## ... why 2 bits are not enough
#
# The codes -1, 0 and 1 are left. How many weights get the code 0?

# %%
zeros, count = 0, 0
for path, w in weights(rounded_model(2, 32).model).items():
    if w.ndim == 2 and path != "embed.w":
        zeros += np.sum(w == 0)
        count += w.size
print(f"With 2 bits in groups of 32, {zeros / count:.0%} of the weights become 0.")
assert zeros / count > 0.7

# %% [markdown]
# The largest weight of a group decides what is small. Which weights can be set to 0 without such
# harm is the question of tutorial 9; exercise 2 below saves some of them.

# %% [markdown]
# ## 6. Which errors matter? Activation-aware scaling
#
# An error in a weight is multiplied by the weight's input. So weights with large inputs should be
# rounded more carefully. AWQ (activation-aware weight quantization) does it with a trick: multiply
# those weights by c before rounding, and divide their input by c. The product is the same, but
# relative to the weight the rounding is finer. Each input has its own c = (mean |input|)^ratio, so
# ratio 0 is plain rounding. (Here there is one row, so the mean is |x| itself.) The output is
# 10 * 0.14 + 1 * 0.70 = 2.10. Which ratio gets it right?

# %%
title("6. Activation-aware scaling, two weights in 4 bits")
x = np.array([10.0, 1.0])  # two inputs, the first one large
w = np.array([0.14, 0.70])
table = []
for ratio in (0, 0.35, 0.7, 1):
    c = x**ratio
    codes, scale = quantize_group(c * w, 4)
    output = (x / c) @ (codes * scale)
    table.append([ratio, c.round(2), f"{scale:.2f}", codes, f"{output:.2f}"])
    if ratio == 0.7:
        assert abs(output - x @ w) < 0.01
print_table(["ratio", "c", "scale", "codes", "output"], table)

# %% [markdown]
# With plain rounding, 0.14 becomes 0.1, and ten times the difference is lost. With c = 5 the two
# weights are equally large. With more, the first one becomes an outlier, and the other one suffers.
# So AWQ tries several ratios on calibration text and keeps the best, for each matrix. The division
# of the inputs by c is not free when the model runs: `quantize` does it before each product. The
# authors divide the gain of the norm before by c instead, once and for all.

# %% [markdown]
# ## ... on the model
#
# That pays where some inputs are much larger than the others. Large language models have such
# inputs. How is it here? Look at the inputs of the attention of each block: mean |input| of the
# largest one, compared to the median.

# %%
aware = minitx.load("stories", quantize={"bits": 4, "awq": True})
judge("4 bits, awq", aware, nbytes(aware.model))
print(f"loss in 4 bits {losses['4 bits']:.4f}, with awq {losses['4 bits, awq']:.4f}")

# %% [markdown]
# What enters block 1: a row of the embedding table for each token. (None: rotary positions come
# later, in attention.) Layer.once(T) stands for a KV cache that is used for one pass over T tokens.

# %%
ratios, x = [], lm.model.embed(ids, None)
for block in lm.model.stack.blocks:
    size = abs(block.attn.norm(x)).mean(0)  # mean |input| for each input
    ratios.append(size.max() / np.median(size))
    x = block(x, Layer.once(len(ids)))  # what enters the next block
print(f"the largest input of a block is {min(ratios):.1f} to {max(ratios):.1f} times the median")
assert max(ratios) < 3 and abs(losses["4 bits, awq"] - losses["4 bits"]) < 0.005

# %% [markdown]
# All inputs are of about the same size, so awq finds little to do in this model.

# %% [markdown]
# ## 7. The KV cache in few bits
#
# The weights stay the same, but the KV cache grows with every token, and in long texts and large
# batches it can become larger than they are. It can be quantized too: each new key and value when
# it is stored. Here a group is the key (or value) of one head, 32 numbers. Look at the bytes of 500
# tokens.

# %%
title("7. load('stories', quantize_cache=...)")
S = 500
text = (ids * S)[:S]
cache8 = minitx.load("stories", quantize_cache={"bits": 8})
cache4 = minitx.load("stories", quantize_cache={"bits": 4})
table = []
for name, model in (("float32", lm), ("cache in 8 bits", cache8), ("cache in 4 bits", cache4)):
    state = model.model.new_state()
    model.model.next_logits(text, state)
    table.append(judge(name, model, S * state.bytes_per_token))
print_table(["", f"cache bytes, S = {S}", "loss", *HOPS], table)
assert abs(losses["cache in 8 bits"] - losses["float32"]) < 0.001
assert losses["cache in 4 bits"] - losses["float32"] < 0.005

# %% [markdown]
# 4 bits and a float32 scale for 32 numbers are 5 bits a number instead of 32. The answers of
# questions are looked up in this cache, and they are still found.

# %% [markdown]
# ## 8. The price: one product
#
# So far we counted bytes. Now the time. The codes are stored as int8, but they cannot be multiplied
# as int8: 127 is the largest number there, and products overflow (see the first line that is
# printed). So each product has to convert them first. Either to floats, for which NumPy has a fast
# library, BLAS: how much longer does that take than the product of floats alone? Or to int32, for
# which NumPy has only a plain loop: how long does that take, even without the conversion?

# %%
title("8. The price, in time: one row times a matrix of 1024 x 1024")
product = np.array([100], np.int8) @ np.array([100], np.int8)
print(f"100 * 100 in int8 is {product}")

rng = np.random.default_rng(0)
codes = rng.integers(-127, 128, (1024, 1024)).astype(np.int8)  # as they are stored
x = rng.integers(-127, 128, (1, 1024))
floats, float_x = codes.astype(np.float32), x.astype(np.float32)
integers, integer_x = codes.astype(np.int32), x.astype(np.int32)  # four times the bytes of codes


def dequantize_and_multiply():
    return float_x @ codes.astype(np.float32)


float_product = partial(np.matmul, float_x, floats)
integer_product = partial(np.matmul, integer_x, integers)
assert np.array_equal(integer_product(), float_product())  # the same numbers, all below 2^24
times = time_side_by_side(float_product, dequantize_and_multiply, integer_product)
print(f"int8 to floats, then the product: {times[1] / times[0]:.1f} times as long as the product")
print(f"the product of integers (int32): {times[2] / times[0]:.0f} times as long")

# %% [markdown]
# ## ... and the model
#
# First how many bytes of weights are read for one token (float32 = 1), and the speedup if reading
# them were all that takes time. Then what is measured here: one token, with 63 before it, and a
# prompt of 300 tokens in one pass. `quantize` has several ways to run: "stream" dequantizes each
# matrix for every pass, "load" once for all, and keeps the floats.

# %%
title("... and of the model (float32 = 1)")
int4_load = minitx.load("stories", quantize={"bits": 4, "run": "load"})


def prompt_pass(model):
    return lambda: model.model.next_logits(text[:300], model.model.new_state())


table, ratios = [], {}
read = count_last(lm, text[:64]).total().weight_bytes
for name, model in (("8 bits", int8), ("4 bits", int4), ("4 bits, run=load", int4_load)):
    ratios[name] = count_last(model, text[:64]).total().weight_bytes / read
    token = speedup(decode_last(lm, text[:64]), decode_last(model, text[:64]), repeats=40)
    prompt = speedup(prompt_pass(lm), prompt_pass(model), repeats=5)
    possible = f"{1 / ratios[name]:.1f}"
    table.append([name, f"{ratios[name]:.2f}", possible, f"{token:.2f}", f"{prompt:.2f}"])
print_table(["", "bytes read", "speedup by bytes", "one token", "prompt"], table)
assert ratios["4 bits"] < ratios["8 bits"] < 0.35
say(
    "Here NumPy loses. No multiply-add is saved, and for one token each matrix is dequantized to",
    "be used once. A prompt uses it for 300 rows, so there it hardly counts. And this model's 6.4",
    "MB of weights fit into the cache of many processors: reading them is not what takes the time.",
)

# %% [markdown]
# ## ... and where it pays
#
# Few bits save memory everywhere. They save time where decoding is memory-bandwidth bound: where
# the processor can multiply faster than memory delivers weights, as with large models. There the
# product itself must dequantize, in the processor's registers (a fused kernel), so that only codes
# travel. Then the bytes give the speedup. For 8 billion weights, and a memory of 1,000 GB per
# second:

# %%
title("... and of 8 billion weights: the least time for one token")
table = []
for bits in (16, 8 + 16 / 64, 4 + 16 / 64):  # float16; codes with a float16 scale for 64 weights
    gigabytes = 8 * bits / 8  # 8 billion weights, 8 bits to a byte
    table.append([f"{bits:.2f}", f"{gigabytes:.2f} GB", f"{gigabytes:.2f} ms", f"{16 / bits:.1f}"])
print_table(["bits per weight", "weights", "time to read them", "speedup"], table)
say(
    "So, how few bits does a weight need? In this model 8 cost nothing, 4 next to nothing, 3 a",
    "little; and 2 are too few if one only rounds.",
)

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 10`: Quantization
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/08_fewer_bits.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 1, find four weights, the largest 0.70, that 2 bits restore without any error. Then
#    four, 0.70 among them again, with the largest mean error that is possible in 4 bits.
# 2. A smaller scale, and what is too large gets the largest code (clipping): in round_weights,
#    multiply `scales` by a factor below 1, and use np.rint(groups / scales).clip(-m, m). With the
#    factor 0.6, the loss of 2 bits in groups of 32 falls from 4.0 to about 1.9. How many weights
#    are 0 then? Try 0.9 and 0.6 for 3 bits, too: why is the best factor closer to 1 there?
# 3. In section 6, exchange the two inputs: x = np.array([1.0, 10.0]). Which of the ratios is best?
#    As AWQ tries ratio 0 too, it never increases the error of a matrix on its calibration text. How
#    can the loss of the model be larger nevertheless?
# 4. Which matrices need their bits most? In rounded_model, round only those whose path contains
#    ".q.", ".v.", "attn.out", ".gate." or ".down.", to 2 bits. Divide what is added to the loss of
#    float32 by the number of weights that were rounded: then the comparison is fair.
