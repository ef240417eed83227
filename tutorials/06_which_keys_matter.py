# %% [markdown]
"""Tutorial 6: which keys matter? A token attends to every token before it. How few would do, and
can one know which, without computing all the scores?

Attention compares a query with the key of every earlier token, so a token costs more the longer the
text is (tutorial 2). Many of these scores hardly change what comes out. To skip them, one has to
know which, from something cheaper than the scores. ELSA (Ham et al., ISCA 2021) counts bits.

Letters: a query sees S keys, each a row of d numbers; r of them are kept. The model has L blocks,
each with H query heads and K key heads; H / K query heads share the keys of one key head.
"""

# %% [markdown]
# ## Setup

# %%
import numpy as np
from helpers import (
    count_last,
    decode_last,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    say,
    time_side_by_side,
    title,
    verdict,
)

import minitx
from minitx.lab.frontier.attention_baselines import baseline
from minitx.ledger import counting

lm = load_stories()
c = lm.model.config
L, H, K, d = c.layers, c.heads, c.kv_heads, c.head_width  # d = 32

# %% [markdown]
# ## 1. Six keys by hand
#
# Here is attention for one query. The scores are given: products of the query with each of six
# keys. The softmax turns them into positive weights whose sum is 1, and the result is the weighted
# sum of the values, one number per key here.

# %%
title("1. Six keys by hand")


def softmax(scores):
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


scores = np.array([4.0, 1.0, 0.0, 3.0, -1.0, 0.0])
values = np.array([10.0, 20.0, 0.0, 30.0, 40.0, 20.0])
weights = softmax(scores)
dense = weights @ values
print("weights    ", weights.round(3))

kept = np.array([True, False, False, True, False, False])  # the two largest
dropped = weights[~kept].sum()
sparse = weights[kept] @ values[kept] / weights[kept].sum()  # now these two have the sum 1
print(f"all six keys: {dense:.3f}. The two best, {1 - dropped:.1%} of the weight: {sparse:.3f}")

# The other four alone would have given the result `rest`. Then the error is exactly this:
rest = weights[~kept] @ values[~kept] / dropped
print(f"error {sparse - dense:.3f} = {dropped:.3f} * ({sparse:.3f} - {rest:.3f})")
assert np.isclose(sparse - dense, dropped * (sparse - rest))

# %% [markdown]
# A third of the keys gives nearly the same result. By the last line, the error is small in two
# cases: little weight was dropped, or the dropped values are about the same as the kept ones.

# %% [markdown]
# ## 2. Answers of a model that attends to r keys
#
# Every query keeps r keys, in all heads and blocks. `baseline` knows three ways to select them:
# - oracle: the r largest scores. It computes all scores to find them, so it saves little.
# - window: the newest keys and the first four, without looking. (Many models put much weight on the
#   first tokens whatever they say; these are called attention sinks.)
# - random: r of the keys, drawn at random.
# The stories contain questions. Some answers are one fact ("1 hop"); for others, two or three facts
# have to be put together: the ball is where Tom is, and Tom is in the park. The loss is the mean
# negative log-likelihood of all tokens; lower is better. Which lines would you accept?

# %%
title("2. Answers of a model that attends to r keys")


def row_of(name, kept, scores):
    hops = [f"{scores.accuracy[group]:.0%}" for group in ("1 hop", "2 hops", "3 hops")]
    return [name, kept, f"{scores.mean_loss:.3f}", *hops]


stories = held_out_stories(12)
dense_scores = evaluate_stories(lm, stories)
loss = {}
table = [row_of("dense", "all", dense_scores)]
for r in (32, 16, 8):
    for name in ("oracle", "window", "random"):
        found = evaluate_stories(baseline(lm, name, r), stories)
        loss[name, r] = found.mean_loss
        table.append(row_of(name, r, found))
print_table(["", "keys", "loss", "1 hop", "2 hops", "3 hops"], table)
assert loss["oracle", 32] < dense_scores.mean_loss + 0.02
assert loss["oracle", 8] < min(loss["window", 32], loss["random", 32])

# %% [markdown]
# A story has about 135 tokens. With its 32 best keys the model does all that it does with all keys,
# and with the 16 best nearly. The window loses what is further back than it reaches, and random
# keys are worse still: 8 good keys beat 32 random ones. So it matters which keys are kept.

# %% [markdown]
# ## 3. ELSA: an angle from bits
#
# The oracle computes all scores. Something cheaper must tell which are large. A score is
# q . key = |q| |key| cos(angle): the two lengths, and the cosine of the angle between them. The
# length of a key can be stored when the key comes. The angle is the hard part; ELSA estimates it
# from bits. Draw 32 random directions; each gives one bit: does the vector point that way (product
# with the direction 0 or more) or away from it? If two vectors are at 60 degrees, a bit differs
# with probability 60 / 180: it does if the line at right angles to the direction falls between the
# two vectors, and of the 180 degrees that it may have, 60 do.

# %%
title("3. An angle from 32 bits")
q_toy = np.array([1.0, 0.0])
key_toy = np.array([0.5, np.sqrt(0.75)])  # at 60 degrees
directions = np.random.default_rng(1).standard_normal((32, 2))

q_bits = directions @ q_toy >= 0
key_bits = directions @ key_toy >= 0
differing = np.sum(q_bits != key_bits)
print("bits of q:  ", "".join("#" if bit else "." for bit in q_bits))
print("bits of key:", "".join("#" if bit else "." for bit in key_bits))
print(f"{differing} of 32 bits differ: an angle of about 180 * {differing} / 32", end=" ")
print(f"= {180 * differing / 32:.0f} degrees (true: 60)")
assert 40 <= 180 * differing / 32 <= 80

# %% [markdown]
# The bits of a key (its hash) are computed once, when the key comes. From then on, its angle with
# any query costs one comparison of 32 bits: an XOR and a count. Its score costs d multiply-adds.

# %% [markdown]
# ## 4. Four keys by hand
#
# In the plane, with four fixed directions at 0, 45, 90 and 135 degrees, you can find the bits on
# paper: a bit is 1 if the vector is at most 90 degrees away from the direction. Each bit that
# differs counts 180 / 4 = 45 degrees. The query has length 1 and is at 20 degrees; the keys are at
# 30, 75, 100 and 190 degrees, with lengths 1, 2, 1 and 1.5. |q| is the same for all keys, so it can
# be left out: the similarity is |key| cos(estimated angle). A key is kept if its similarity is
# above a threshold t = 0.4 times the length of the longest key that the query sees, so above 0.8
# here. Which of the four are kept?

# %%
title("4. Four keys by hand")


def vector(degrees, length):
    return length * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def estimated_angles(q, keys, directions):
    """Between q and each of the keys (S, d), from one bit for each direction (bits, d)."""
    differing = np.sum((keys @ directions.T >= 0) != (directions @ q >= 0), -1)
    return np.pi / len(directions) * differing  # in radians


four_directions = np.array([vector(angle, 1) for angle in (0, 45, 90, 135)])
q_toy, t = vector(20, 1), 0.4
places = [(30, 1.0), (75, 2.0), (100, 1.0), (190, 1.5)]  # (degrees, length) of each key
keys_toy = np.array([vector(*place) for place in places])
lengths = np.linalg.norm(keys_toy, axis=-1)

angles = estimated_angles(q_toy, keys_toy, four_directions)
similarity = lengths * np.cos(angles)
exact = keys_toy @ q_toy  # = |key| cos(angle), since |q| = 1
kept = similarity > t * lengths.max()
table = []
for i, (degrees, length) in enumerate(places):
    row = [f"{degrees} degrees, {length}", f"{np.degrees(angles[i]):.0f}", degrees - 20]
    row += [f"{similarity[i]:.2f}", f"{exact[i]:.2f}", "kept" if kept[i] else "dropped"]
    table.append(row)
print_table(["key", "estimated angle", "true", "similarity", "exact", "above 0.8?"], table)
assert kept[:4].tolist() == [True, True, False, False]

# %% [markdown]
# Four bits are crude, but good enough to drop two keys. The estimate only decides which keys take
# part: their weights come from exact scores. (If no key is above the threshold, ELSA keeps the one
# with the largest similarity.)

# %% [markdown]
# ## 5. How many bits, and a precaution
#
# ELSA takes as many bits as a vector has numbers (d = 32 in `stories`) unless told otherwise. Its
# directions are at right angles to each other, since two that are nearly parallel would give the
# same bit twice: the rows of a random orthogonal matrix A of d x d, and for more bits several such
# matrices. How far are the estimated angles off, for random vectors?

# %%
title("5. Errors of the estimated angle, by the number of bits")
rng = np.random.default_rng(0)
orthogonal = [np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(4)]
A = np.concatenate(orthogonal)  # (128, d)
x, y = rng.standard_normal((2, 300, d))

table, mean_error = [], {}
for bits in (8, 32, 128):
    errors = []
    for one in x:
        cosines = y @ one / (np.linalg.norm(one) * np.linalg.norm(y, axis=-1))
        errors.append(np.degrees(estimated_angles(one, y, A[:bits]) - np.arccos(cosines)))
    mean_error[bits] = np.mean(np.abs(errors))
    bias = np.quantile(errors, 0.8)  # 80 % of the errors are below this
    table.append([bits, f"{mean_error[bits]:.1f} degrees", f"{bias:.1f} degrees"])
print_table(["bits", "mean error", "bias"], table)
assert mean_error[8] > 1.5 * mean_error[32] > 2 * mean_error[128]

# %% [markdown]
# Four times the bits at least halve the error. The last column is a precaution. An angle that is
# estimated too large loses a key that matters; one too small only costs a score that was not
# needed. So ELSA subtracts a bias from all estimated angles, so large that 80 % of them become too
# small (and takes 0 where an angle would become negative).

# %% [markdown]
# ## 6. Where to put the threshold?
#
# Every head has lengths and angles of its own, so ELSA learns a threshold t for each, from text. If
# all n keys that a query sees were alike, each would have the weight 1/n. Say that a key matters if
# its weight is above p/n. (In section 1, n = 6: with p = 1, those with 0.684 and 0.252.) For each
# query, take the key with the smallest weight that still matters. Its exact similarity, divided by
# the length of the longest key, is what t should be for this query; t is the mean over the queries.
# What one sets is p. Here for the four keys of section 4 and three queries of length 1 (and, for
# brevity, without dividing the scores by sqrt(d) as the model does):

# %%
title("6. A threshold, learned from three queries")
p, best_t = 1, []
for degrees in (20, 90, 170):
    exact = keys_toy @ vector(degrees, 1)
    weights, n = softmax(exact), len(exact)
    just_matters = np.where(weights > p / n, weights, np.inf).argmin()
    best_t.append(exact[just_matters] / lengths.max())
    print(f"query at {degrees} degrees: weights {weights.round(2)},", end=" ")
    print(f"key {just_matters} just matters: {exact[just_matters]:.2f} / 2 = {best_t[-1]:.2f}")
print(f"t = {np.mean(best_t):.2f}")

# %% [markdown]
# A larger p keeps fewer keys. (If no weight is above p/n, ELSA takes the key with the largest.)

# %% [markdown]
# ## 7. With the flag
#
# `elsa` does this in all heads of all blocks: hashes and lengths stand beside the KV cache, and t
# is learned for each head when the model is loaded, from stories kept for that (min_visible=1: from
# all of their queries, also those that see few keys). The ledger notes "keys kept" of "keys seen".
# Compare the losses with those of section 2.

# %%
title("7. load('stories', elsa=...)")
table = [row_of("dense", "100%", dense_scores)]
selected = {}
for p in (0.5, 1.0, 2.0, 4.0):
    selected[p] = minitx.load("stories", elsa={"p": p, "min_visible": 1})
    with counting(selected[p]) as counts:
        found = evaluate_stories(selected[p], stories)
    loss[p] = found.mean_loss
    share = counts.events["keys kept"] / counts.events["keys seen"]
    table.append(row_of(f"p = {p}", f"{share:.0%}", found))
print_table(["", "keys", "loss", "1 hop", "2 hops", "3 hops"], table)
assert dense_scores.mean_loss < loss[0.5] < loss[1.0] < loss[2.0] < loss[4.0]
assert loss[2.0] < min(loss["window", 16], loss["random", 16])

# %% [markdown]
# With half of the keys (p = 1), little is lost. With a fifth (p = 2), ELSA loses about as much as
# the oracle with 8 keys: its keys are good, but not the best. (p = 0 keeps every key: exact.)

# %% [markdown]
# ## 8. The price, in counts
#
# The last token of a text that fills the context, with all others in the KV cache. Per block, dense
# attention takes 2 S d multiply-adds for each query head: d for the score of each key, d for its
# value. ELSA takes 2 d for each key kept, and S for the similarities. It also hashes H new queries
# and K new keys, with 320 multiply-adds each: instead of an A of 32 * 32 = 1,024 random numbers it
# multiplies by three small orthogonal matrices (2 x 2, 4 x 4 and 4 x 4), whose Kronecker product is
# A. The length of a new key takes d. The projections are the same for both, and subtracted.

# %%
title(f"8. The price of one token after {c.context - 1} others")
long_ids = []
for story in stories:
    long_ids += lm.encode(story.text)
long_ids = long_ids[: c.context]
S = len(long_ids)
projections = L * c.width * d * (2 * H + 2 * K)  # q and out; k and v

models = {"dense": lm, "p = 1": selected[1.0], "p = 4": selected[4.0]}
table, work = [], {}
for name, model in models.items():
    counts = count_last(model, long_ids)
    entry, events = counts.by_group()["blocks.attn"], counts.events
    work[name] = entry.multiply_adds - projections
    kept = L * H * S  # in all heads of all blocks
    if name != "dense":
        kept = events["keys kept"]
        assert work[name] == 2 * d * kept + L * (H * S + (H + K) * 320 + K * d)
    table.append([name, kept, work[name], events["bits compared"], entry.cache_bytes])
print_table(["", "keys kept", "multiply-adds", "bits compared", "cache bytes read"], table)
assert work["dense"] == 2 * d * L * H * S
assert work["p = 4"] < work["p = 1"] < work["dense"]

# %% [markdown]
# The bytes fall less than the multiply-adds: all hashes are read, and two query heads that share
# their keys keep different ones, so a key may be read twice.

# %% [markdown]
# ## ... and in time
#
# On ELSA's own hardware, comparing bits costs next to nothing. NumPy is another matter.

# %%
steps = [decode_last(model, long_ids) for model in models.values()]
best = time_side_by_side(*steps, repeats=20)
for name, seconds in zip(list(models)[1:], best[1:]):
    ratio = best[0] / seconds
    print(f"{name}: {ratio:.2f} times as fast as dense ({verdict(ratio)})")
say(
    "NumPy loses. Dense attention is two matrix products in an optimized library; ELSA makes many",
    "small NumPy calls for each layer, and gathering rows from the cache is slower than reading",
    "them in order. `minitx frontier attention` times longer texts: it takes thousands of keys",
    "before ELSA breaks even.",
)

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 14`: Sign hashes
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/06_which_keys_matter.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 1, change the dropped values so that their weighted mean is that of the kept ones.
#    What is the error, although the dropped weight is the same?
# 2. In section 4, add a key at 60 degrees of length 0.5: (60, 0.5). Find its bits on paper, and say
#    whether it is kept, before you run the cell. From which length on would it be?
# 3. How many of the best keys are enough? Add 64 and 100 to the numbers of keys in section 2. When
#    does the oracle have the loss of the dense model, to within 0.001?
# 4. Hash with twice the bits: elsa={"p": p, "bits": 64} in section 7. The bias is smaller then, and
#    fewer keys are kept. Add p = 1.5 to the list: it keeps about a fifth of the keys now. Compare
#    its loss with that of p = 2 and 32 bits.
