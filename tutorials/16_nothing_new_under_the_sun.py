# %% [markdown]
"""Tutorial 16: nothing new under the sun? Much of what a model computes for a token it has computed
before, or nearly. When is an input similar enough to reuse an old result, and similar to what?

Five answers: close to the token before (delta networks); equal to an earlier token (dot-product
reuse); near one in a table that was filled beforehand (memoization); it need not be similar at all,
since a part of the work is simply left out (loop perforation); and: similar enough is whatever
keeps a measured error below a limit (a quality monitor).

Letters: T tokens, D width, L layers, x an input of a product or of a layer, W a matrix.
"""

# %% [markdown]
# ## The model

# %%
from collections import Counter
from dataclasses import fields, replace

import numpy as np
from helpers import (
    answers_in,
    bar_chart,
    calibration_stories,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    save_lines,
    time_side_by_side,
    title,
)

from minitx.ledger import counting
from minitx.model import Linear
from minitx.shared.observed_inputs import Rows, watch_inputs
from minitx.shared.quality_monitor import levels_of
from minitx.skip.memoize_ffn import MonitoredFFN, RandomHits, inputs_and_outputs
from minitx.technique import apply, wrap

lm = load_stories()
L = lm.model.config.layers

# %% [markdown]
# ## 1. One coordinate changed, by hand
#
# A product x W with three inputs and two outputs takes 6 multiply-adds. The next token has another
# x, which differs in one coordinate only. Then x' W = x W + (x' - x) W, and of the second product
# only one row of W is needed: how many multiply-adds?

# %%
title("1. One coordinate changed")
W = np.array([[1, 0], [2, 1], [0, 3]])
x = np.array([1, 2, 3])
y = x @ W
print(f"x  = {x}   y  = x W = {y}   with {W.size} multiply-adds")

x_new = np.array([1, 2, 5])
changed = np.flatnonzero(x_new != x)
y_new = y + (x_new - x)[changed] @ W[changed]
print(f"x' = {x_new}   y' = {y} + 2 * {W[2]} = {y_new}   with {W[changed].size}")
assert (y_new == x_new @ W).all()

# %% [markdown]
# That is a delta network (Neil et al., 2017). So far it is exact. In a real model hardly a number
# stays as it is, so a coordinate is only sent to the product if it changed by more than a
# threshold. But changed since when?

# %% [markdown]
# ## ... changed since when?
#
# One coordinate rises by 2 at every step, the threshold is 3, and W is 1: the output should be x.
# The naive way compares x with the previous x. The paper compares it with the value that was last
# sent. Watch the two errors.

# %%
title("... the threshold is 3, and x rises by 2")
values = [10, 12, 14, 16, 18]
naive, sent, table, errors = 10, 10, [], []
for step in range(1, 5):
    now, before = values[step], values[step - 1]
    if abs(now - before) > 3:
        naive = naive + (now - before)
    if abs(now - sent) > 3:
        sent = now
    errors.append((now - naive, now - sent))
    table.append([step, now, naive, now - naive, sent, now - sent])
print_table(["step", "x", "naive", "error", "last sent", "error"], table)
assert errors == [(2, 2), (4, 0), (6, 2), (8, 0)]

# %% [markdown]
# The naive output never moves: every single change is below the threshold and is forgotten, and the
# error grows as long as x does (drift). What is not sent must be remembered; then no coordinate is
# ever off by more than the threshold.

# %% [markdown]
# ## 2. How similar are the inputs of a transformer?
#
# Video and sound hardly change from step to step. A text? For each token we take the input x of a
# layer (after its norm) and look for another token whose input y is near: the distance is
# |x - y| / |y|. For two vectors of the same length at right angles, which is what vectors are that
# have nothing to do with each other, it is the root of 2, 1.41. First we record the inputs.

# %%
held_out = held_out_stories(5)
texts = [lm.encode(story.text) for story in held_out]
known_texts = [lm.encode(story.text) for story in calibration_stories(8)]
blocks = lm.model.stack.blocks
inputs = [watch_inputs(lm, Linear, [ids], Rows) for ids in texts]  # {id(matrix): inputs}
known = watch_inputs(lm, Linear, known_texts, Rows)


def distances(xs, ys):
    """(n, m): |x - y| / |y| for each x of xs (n, D) and y of ys (m, D)."""
    x_squares, y_squares = (xs * xs).sum(1), (ys * ys).sum(1)
    squares = x_squares[:, None] + y_squares - 2 * xs @ ys.T
    return np.sqrt(np.maximum(squares, 0) / (y_squares + 1e-9))


# %% [markdown]
# ## ... which token is near?
#
# Four places to look: a random earlier token of the story, the previous one, the nearest of all
# earlier ones, and the nearest of eight calibration stories (texts that the model was not trained
# on, and on which we do not judge it). Which is near?

# %%
title("2. The distance of a token's input from that of another: the median in each layer")
rng = np.random.default_rng(0)
names = ("random", "previous", "nearest earlier", "calibration")
medians, table = {name: [] for name in names}, []
for layer in range(L):
    key = id(blocks[layer].attn.qkv.q)
    found = {name: [] for name in names}
    for text in inputs[:3]:
        xs = text[key].all  # (T, D)
        own, T = distances(xs, xs), len(xs)
        for t in range(1, T):
            found["random"].append(own[t, rng.integers(t)])
            found["previous"].append(own[t, t - 1])
            found["nearest earlier"].append(own[t, :t].min())
        found["calibration"] += distances(xs, known[key].all).min(1).tolist()
    for name in names:
        medians[name].append(np.median(found[name]))
    table.append([layer + 1, *(f"{medians[name][-1]:.2f}" for name in names)])
print_table(["layer", *names], table)
save_lines("16_how_similar", range(1, L + 1), medians, "layer", "distance |x - y| / |y|")
assert min(medians["previous"]) > 1.2 and max(medians["calibration"]) < 0.35

# %% [markdown]
# A text is no video: the previous token is about as far away as any. But a token somewhat like this
# one has occurred before in the same story, and one that is much like it in another story (where
# there are more to find it among). In layer 1 the nearest is the same word, at a distance of 0.

# %% [markdown]
# ## ... what do they have in common?
#
# A few tokens of a story in layer 5, each with the words before it, and the nearest token of the
# calibration stories.

# %%
known_ids = [token for ids in known_texts for token in ids]
middle = id(blocks[L // 2].attn.qkv.q)
to_known = distances(inputs[0][middle].all, known[middle].all)


def with_words_before(ids, t):
    return lm.tokenizer.decode(ids[max(t - 5, 0) : t + 1]).strip()


table = []
for t in (12, 36, 60, 84, 108):
    nearest = int(to_known[t].argmin())
    words = with_words_before(texts[0], t), with_words_before(known_ids, nearest)
    table.append([words[0], words[1], f"{to_known[t, nearest]:.2f}"])
print()
print_table(["a token of a new story ...", "... and the nearest known one", "distance"], table)

# %% [markdown]
# The same word, or another name, in the same kind of sentence: what is similar is the situation. In
# the last two the words agree as well, and yet the distance is larger. By layer 5 a vector holds
# more than the sentence: attention has added what was read before, and that differs in the other
# story. (In layer 2 the same two pairs are at 0.14 and 0.22.)

# %% [markdown]
# ## ... and in other products?
#
# A block has four places where it multiplies. Their inputs are the normalized hidden state (q, k,
# v, and then gate, up), what attention returns (out), and the hidden neurons of the FFN (down). In
# which of them does the previous token come nearest?

# %%
title("... the distance from the previous token in each product, the mean over the layers")
previous = {}
for name in ("q, k, v", "out", "gate, up", "down"):
    found = []
    for block in blocks:
        products = {"q, k, v": block.attn.qkv.q, "out": block.attn.out}
        products |= {"gate, up": block.ffn.expand.up, "down": block.ffn.down}
        key = id(products[name])
        each = [distances(text[key].all, text[key].all).diagonal(-1) for text in inputs[:3]]
        found.append(np.median(np.concatenate(each)))
    previous[name] = np.mean(found)
bar_chart(previous, previous.values(), "{:.2f}")
assert previous["out"] < 1 < min(previous[name] for name in ("q, k, v", "gate, up", "down"))

# %% [markdown]
# In `out` only, and there not near, but nearer. What attention returns is an average over earlier
# tokens, which changes slowly, a little like the signals that delta networks are made for.

# %% [markdown]
# ## 3. Delta on the model
#
# From here on we judge models: we read five stories, and count multiply-adds (dense = 1), the rise
# of the loss above dense (the mean of -ln(probability of the next token)), and right answers to the
# questions in the stories. Five stories are few: a change of the loss by 0.005 says nothing.

# %%
questions = Counter(hops for _, _, hops in answers_in(lm, held_out))
models, results = {}, {}


def judge(name, model):
    """Read the stories. The result is kept by name; returns what the technique counted."""
    with counting(model) as counts:
        scores = evaluate_stories(model, held_out)
    right = sum(round(scores.accuracy[hops] * n) for hops, n in questions.items())
    models[name] = model
    results[name] = counts.total().multiply_adds, scores.mean_loss, right
    return counts.events


def work_of(name):
    return results[name][0] / results["dense"][0]


def rise_of(name):
    return results[name][1] - results["dense"][1]


def cells(name):
    return [name, f"{work_of(name):.3f}", f"{rise_of(name):+.4f}", results[name][2]]


HEADINGS = ["", "multiply-adds", "loss rise", f"right of {questions.total()}"]
judge("dense", lm)

# %% [markdown]
# ## ... and the baselines that reuse nothing
#
# Delta should pay for `out`, and not in the FFN. In `delta` the threshold is relative to the root
# mean square of x. The first baseline, choose=zero, compares x with 0 instead of with the value
# last sent: it drops the small inputs and reuses nothing. The second, for `out`, sends as many
# coordinates as delta, but random ones. Does delta beat them? "sent" is the share of the
# coordinates that is multiplied.

# %%
title("3. Delta, and the baselines that reuse nothing")
table = []
for where, threshold in (("ffn", 0.3), ("out", 0.5)):
    for choose in ("delta", "zero") if where == "ffn" else ("delta", "zero", "random"):
        options = {"where": where, "threshold": threshold, "choose": choose}
        counted = judge(f"{choose}, {where}", apply(lm, {"delta": options}))
        sent = counted["coordinates sent"] / counted["coordinates"]
        table.append([*cells(f"{choose}, {where}"), f"{sent:.0%}"])
print_table([*HEADINGS, "sent"], table)
assert work_of("zero, ffn") < work_of("delta, ffn") and rise_of("zero, ffn") < 0.006
assert work_of("delta, out") < work_of("zero, out") and rise_of("delta, out") < 0.006
assert rise_of("random, out") > 50 * rise_of("delta, out")

# %% [markdown]
# In the FFN it does not: delta saves a sixth of all work and loses nothing, but not because inputs
# stay the same. Dropping the small ones, without any memory, saves more. In `out` delta sends fewer
# coordinates than zero, and they must be the right ones: random ones ruin the answers. But `out` is
# a small part of the model, so there is little to save.

# %% [markdown]
# ## 4. Equal to an earlier token
#
# The other way to reuse is from all earlier tokens, not just the last. `dot_product_reuse` keeps a
# table from a vector to its product with W. A hit needs an equal vector, or (locality-sensitive
# hashing, LSH) one that is on the same side of 12 random planes. We look up the inputs of each
# layer. How many tokens are hits? And of the hits by hash, how many are another word than the one
# in the table?

# %%
title("4. Tokens whose vector, or its hash, has occurred earlier in the story")
planes = rng.standard_normal((lm.model.config.width, 12))


def hits(codes, ids):
    """How many codes have occurred before, and how many of these with another token."""
    first, count, other = {}, 0, 0
    for code, token in zip(codes, ids):
        count += code in first
        other += first.setdefault(code, token) != token
    return np.array([count, other])


table, equal, hashed = [], [], []
for layer in range(L):
    by_value, by_hash = np.zeros(2), np.zeros(2)
    for text, ids in zip(inputs, texts):
        xs = text[id(blocks[layer].attn.qkv.q)].all
        by_value += hits([x.tobytes() for x in xs], ids)
        by_hash += hits([bits.tobytes() for bits in xs @ planes > 0], ids)
    equal.append(by_value[0] / sum(map(len, texts)))
    hashed.append(by_hash[0] / sum(map(len, texts)))
    other = f"{by_hash[1] / by_hash[0]:.0%}"
    table.append([layer + 1, f"{equal[-1]:.0%}", f"{hashed[-1]:.0%}", other])
print_table(["layer", "equal vectors", "equal hashes", "hash hits of another word"], table)
assert equal[0] > 0.5 and max(equal[1:]) == 0

# %% [markdown]
# In the first layer a vector says which word it is and nothing else (RoPE rotates queries and keys
# later), so a word that comes again is a hit, and exact. From the second layer on no two vectors
# are equal, since each token has seen other ones. Equal hashes still occur, but about every third
# time the table answers with the product of another word.

# %% [markdown]
# ## ... on the model
#
# The exact form works on q, k, v of the first layer; LSH by default on all products from the fifth
# layer on. "reused" is the share of these products. What is gained where nothing is lost?

# %%
table = []
for name, options in {"equal vectors": {}, "equal hashes": {"form": "lsh"}}.items():
    counted = judge(name, apply(lm, {"dot_product_reuse": options}))
    table.append([*cells(name), f"{counted['products reused'] / counted['products']:.0%}"])
print()
print_table([*HEADINGS, "reused"], table)
assert abs(rise_of("equal vectors")) < 1e-5 and rise_of("equal hashes") < 0.03

# %% [markdown]
# A hundredth of the work, since only one layer has equal vectors. LSH saves an eighth, and the loss
# rises: a third of its hits are another word. That it does not rise more may be due to the hash, or
# to the late layers, which forgive much. Question 3 tells.

# %% [markdown]
# ## 5. Near one in a table
#
# A hash compares roughly. `memoize_ffn` looks for the nearest of 256 stored tokens itself, in each
# layer. They are taken from calibration text beforehand, and the table never changes. If the
# distance is at most a radius (a hit), the FFN does not run: its output is the stored one. So work
# is skipped because a result was precomputed: the two ideas of this project, as in tutorial 15.
# For each token of our stories we look up the distance from the nearest stored one, and by how much
# the stored output differs from the FFN's own. (`wrap` calls a function for the FFN of each layer;
# here it only collects them.)

# %%
memo = apply(lm, {"memoize_ffn": {"stories": 8}})
memos = {}
wrap(memo, "ffn", lambda ffn, index: memos.setdefault(index, ffn))
seen = inputs_and_outputs(lm, texts)  # by layer: the FFN's inputs and outputs
distance, error = [], []
for layer in range(1, L):
    xs, ys = seen[layer]
    entry, away = memos[layer].memo.nearest(xs)
    stored = memos[layer].values[entry]
    distance.append(away)
    error.append(np.linalg.norm(stored - ys, axis=1) / np.linalg.norm(ys, axis=1))
distance, error = np.concatenate(distance), np.concatenate(error)

# %% [markdown]
# ## ... how near is near enough?
#
# Now the model with the same table and several radii.


# %%
def same_table(kind=None, **options):
    """memo with another radius, or with parts of another kind."""

    def change(ffn, index):
        if index == 0:  # has no table
            return ffn
        if kind is None:
            return replace(ffn, **options)
        parts = {f.name: getattr(ffn, f.name) for f in fields(ffn)}
        return kind(**parts | options)

    return wrap(memo, "ffn", change)


# %% [markdown]
# ## ... several radii
#
# "hits" is the share of the tokens in layers 2 to 8, "their error" the mean relative error of what
# they get. A false hit is one with an error above 0.4. What happens as the radius grows? There are
# two random baselines. Random tokens: as many hits as at 0.35, but of any tokens, which get the
# entry nearest to them. Random entries: about as many hits as at 0.7, of any tokens, which get any
# entry.

# %%
title("5. The nearest of 256 stored tokens, in layers 2 to 8")
table = []
for radius in (0.25, 0.35, 0.5, 0.7):
    hit = distance <= radius
    name = f"radius {radius}"
    judge(name, same_table(radius=radius))
    shares = f"{hit.mean():.0%}", f"{error[hit].mean():.2f}", f"{(error[hit] > 0.4).mean():.0%}"
    table.append([*cells(name), *shares])
print_table([*HEADINGS, "hits", "their error", "false hits"], table)

scores = rng.random(lm.model.config.context)  # of a position; it hits if it is below a rate
rate = np.quantile(scores[: len(texts[0])], (distance <= 0.35).mean())
judge("random tokens", same_table(RandomHits, scores=scores, rate=rate))
judge("random entries", apply(lm, {"memoize_ffn": {"stories": 8, "choose": "random"}}))
print()
print_table(HEADINGS, [cells("random tokens"), cells("random entries")])
assert rise_of("radius 0.35") < 0.005 and work_of("radius 0.35") < 0.8
assert rise_of("random tokens") > 200 * abs(rise_of("radius 0.35"))
assert rise_of("random entries") > 10 * rise_of("radius 0.7")

# %% [markdown]
# At 0.35 two of five FFNs are looked up and no answer is lost. The error of a hit grows with the
# radius, and so do the false hits; at 0.7 the loss does, too. Random tokens for as much work as at
# 0.35 ruin the answers, and random entries even more so. So it is not that FFNs hardly matter: the
# token must be near an entry, and the entry must be that one.
#
# The FFN is a good place for a table: it sees one token. `memoize_attention` stores whom a token
# attends to. That depends on the token's input, too, but also on where in this story the answer
# stands, and only q and the scores are spared: see its card, no setting pays.

# %% [markdown]
# ## ... and on another kind of text?
#
# Stories are made by a grammar. How many tokens of this text are near a known one?

# %%
other_text = (
    "The engineer read a paper about caches. She wrote a test, ran it twice, and drank tea."
)
seen_there = inputs_and_outputs(lm, [lm.encode(other_text)])
near = [memos[layer].memo.nearest(seen_there[layer][0])[1] <= 0.35 for layer in range(1, L)]
print(f"Hits in a text of another kind: {np.mean(near):.0%}")
assert np.mean(near) < 0.1

# %% [markdown]
# Hardly any: then nothing is saved, the lookups are a loss, and hardly anything is spoiled.

# %% [markdown]
# ## ... how does one notice false hits?
#
# We could compare all hits with the FFN's own outputs, because we had them. In use that would take
# all the work that we want to save. An audit checks every 8th token only: if it is a hit, the FFN
# runs as well. Is its estimate of the false hits near the share that we know, and what does it
# cost?

# %%
title("... an audit of every 8th token, at radius 0.35")
audited = same_table(MonitoredFFN, every=8, limit=0.4, halvings=0)
counted = judge("audited", audited)
checks, false = counted["quality checks"], counted["checks above the limit"]
true_share = (error[distance <= 0.35] > 0.4).mean()
found = f"{false} of {checks} checked hits were false: {false / checks:.0%}."
print(f"{found} Of all hits: {true_share:.0%}.")
print(f"{checks} checks in {L - 1} layers, but of the same {sum(map(len, texts)) // 8} tokens.")
extra = work_of("audited") - work_of("radius 0.35")
print(f"It takes {extra:.3f} of the dense work, of the {1 - work_of('radius 0.35'):.3f} saved.")
assert abs(false / checks - true_share) < 0.1 and extra < 0.04

# %% [markdown]
# Roughly: it would notice 30%, but it cannot tell 8% from 13%. Every layer checks the same tokens,
# so the sample is smaller than it looks. (Two other sets of five stories gave 12% instead of 14%,
# and 18% instead of 13%.) It costs a seventh of what is saved. And it repairs the false hits that
# it checks; the others stay.

# %% [markdown]
# ## 6. Leave iterations out, by hand
#
# All of this looked for an old result. Loop perforation (Sidiroglou-Douskos et al., 2011) does not:
# the sum x_1 w_1 + x_2 w_2 + ... is a loop, and every second iteration is skipped, for good. What
# stands for the missing terms? Nothing; or the terms that we have, twice; or the mean of the
# missing terms over calibration text, a constant. Two sums, one with terms of the same sign, one
# without. Only the first and the third term are added. Which of the three comes nearest?

# %%
title("6. Every second term of a sum")
examples = {
    "same sign": (np.array([3, 5, 4, 4]), np.array([4.5, 4.2])),
    "both signs": (np.array([3, -5, 4, -1]), np.array([-4.5, -2])),
}
table = []
for name, (terms, usual) in examples.items():
    half = terms[::2].sum()
    table.append([name, terms, terms.sum(), half, 2 * half, f"{half + usual.sum():.1f}"])
print_table(["", "terms", "exact", "nothing", "doubled", "means"], table)

# %% [markdown]
# Doubling is right if the skipped terms are like the others. With both signs it is worse than
# nothing. The means are near in both cases (we chose terms that are near their means) and cost
# nothing: they are added to the bias beforehand.

# %% [markdown]
# ## ... on the model
#
# `perforate` with the same share in every matrix: one input in ten is skipped. First by three
# patterns: those that change the output least (norm), at equal distances (stride), and random ones
# (sample), all filled by their means. Then stride with nothing in their place (none), or with the
# rest times 1 / 0.9 (rate). What matters more, the pattern or what fills it?

# %%
title("... one input in ten of every matrix")


def perforate(**options):
    return apply(lm, {"perforate": {"rates": "uniform", "stories": 4} | options})


table = []
for pattern in ("norm", "stride", "sample"):
    judge(f"{pattern}, mean", perforate(rate=0.1, pattern=pattern))
    table.append(cells(f"{pattern}, mean"))
for fill in ("none", "rate"):
    judge(f"stride, {fill}", perforate(rate=0.1, pattern="stride", fill=fill))
    table.append(cells(f"stride, {fill}"))
print_table(HEADINGS, table)

# %% [markdown]
# The pattern: more than four times the loss if the inputs are skipped without looking, and equal
# distances are no better than chance. What stands for them matters less here. How much of an input
# does its mean explain?

# %%
share = []
for block in blocks:
    xs = known[id(block.attn.qkv.q)].all
    share.append((xs.mean(0) ** 2).sum() / (xs**2).mean(0).sum())
print(f"The squared means are {np.mean(share):.0%} of the mean squares (inputs of q, k, v).")
assert rise_of("stride, mean") > 3 * rise_of("norm, mean")

# %% [markdown]
# Little: behind a norm, inputs are now positive, now negative. So there is not much to fill in.

# %% [markdown]
# ## ... or elsewhere
#
# Every place was treated alike so far. Now half of the inputs of an FFN: in all layers, in layers 1
# to 4, or in layers 5 to 8. Then the FFNs of layers 5 to 8 as a whole, but at every second token
# only (`perforate_positions`), which adds nothing at the others, or copies the output of the token
# before; and, as a baseline, at a random half of the tokens. Last `perforate_keys`: attention with
# the first 4 keys, the last 64, and every fourth of those between. What costs little?

# %%
half_as_wide = perforate(rate=0.5, matrices="ffn")
halves = {}
wrap(half_as_wide, "ffn", lambda ffn, index: halves.setdefault(index, ffn))
early = wrap(lm, "ffn", lambda ffn, index: halves[index] if index < L // 2 else ffn)
late = wrap(lm, "ffn", lambda ffn, index: halves[index] if index >= L // 2 else ffn)
judge("half, all FFNs", half_as_wide)
judge("half, early FFNs", early)
judge("half, late FFNs", late)
judge("every 2nd token", apply(lm, {"perforate_positions": {}}))
judge("... copied", apply(lm, {"perforate_positions": {"fill": "copy"}}))
judge("random tokens run", apply(lm, {"perforate_positions": {"choose": "random"}}))
judge("every 4th key", apply(lm, {"perforate_keys": {"window": 64, "stride": 4}}))
names = ("half, all FFNs", "half, early FFNs", "half, late FFNs")
names += ("every 2nd token", "... copied", "random tokens run", "every 4th key")
print()
print_table(HEADINGS, [cells(name) for name in names])
assert rise_of("half, late FFNs") < 0.03 < 1 < rise_of("half, early FFNs")
assert rise_of("random tokens run") < 0.03
assert rise_of("... copied") > 5 * rise_of("every 2nd token")

# %% [markdown]
# Where matters most: half of the inputs in early FFNs ruins the model, in the late ones it costs
# little. (The default of `perforate` searches for a share of its own for each matrix, which takes
# a few seconds, and ends up in the late layers, too.) There it is as good to run every second
# token only, or any half of them: late FFNs hardly matter, so it takes no skill to skip them. But
# do not copy the output of the token before: it was for another word, as we saw in section 2. And
# keys cannot be skipped by their position: one of them holds the answer.

# %% [markdown]
# ## 7. The quality monitor as a control loop
#
# The audit told us the share of false hits. It could also act on it: that is the quality monitor of
# Mittal's survey of approximate computing (2016). A check above the limit halves the radius, one
# below half of the limit doubles it again, up to where it began; between the two it stays. By hand,
# with a limit of 0.4 and four radii, starting at the largest. Where does it end?

# %%
title("7. Five checks with a limit of 0.4")
RADII = (0.0875, 0.175, 0.35, 0.7)
level, table = 3, []
for check, off in enumerate((0.5, 0.6, 0.3, 0.1, 0.5), 1):
    before = level
    if off > 0.4:
        level = max(level - 1, 0)
    elif off <= 0.2:
        level = min(level + 1, 3)
    table.append([check, RADII[before], off, RADII[level]])
print_table(["check", "radius", "error", "radius after it"], table)
assert RADII[level] == 0.175

# %% [markdown]
# ## ... on the model
#
# It begins with a radius of 0.7, which was too much in section 5, and checks every 8th token. Watch
# the work and the loss as we allow less error.

# %%
names = ["radius 0.7"]
for limit in (0.8, 0.4, 0.2):
    names.append(f"limit {limit}")
    judge(names[-1], same_table(MonitoredFFN, radius=0.7, every=8, limit=limit, halvings=3))
names.append("radius 0.35")
print()
print_table(HEADINGS, [cells(name) for name in names])
assert rise_of("limit 0.2") < rise_of("limit 0.4") < rise_of("limit 0.8") < rise_of("radius 0.7")
assert work_of("radius 0.35") < work_of("limit 0.2")
assert rise_of("radius 0.35") < min(0.005, rise_of("limit 0.4"))

# %% [markdown]
# The limit works as a knob: less error, more work. But a fixed radius of 0.35 is better than any of
# these: where the loss is as low, it takes less work. Why?

# %% [markdown]
# ## ... and what it does in a story
#
# The radius at every fourth token in each layer, at a limit of 0.4: 3 is 0.7, 2 is 0.35, 1 is 0.175
# and 0 is 0.0875. Does it settle?

# %%
title("... the radius along a story, from 3 (0.7) down to 0 (0.0875)")
monitored = models["limit 0.4"]
state = monitored.model.new_state()
monitored.model.next_argmax(texts[1], state)
parts = {}
wrap(monitored, "ffn", lambda ffn, index: parts.setdefault(index, ffn))
for layer in range(1, L):
    changes = levels_of(parts[layer], state.layers[layer], 3).changes
    in_use = np.full(len(texts[1]), 3)
    for position, level in changes:
        in_use[position + 1 :] = level
    print(f"  layer {layer + 1}  {''.join(map(str, in_use[::4]))}")

# %% [markdown]
# In this story it settles, at 0.35 or below, which is what section 5 found. In others it goes up
# and down, or stays at 0.7 in a layer to the end (look at texts[2] and texts[3]): a check sees one
# token in eight, and the tokens between may differ from it. And each story begins at 0.7 again, and
# has read dozens of tokens before it has learned that this is too much. So if you know what the
# text will be like, choose the setting beforehand, as in section 5. The monitor is for text of
# which you do not know how near it is to the calibration text; and a table needs it least, since on
# text of another kind it has few hits anyway.

# %% [markdown]
# ## 8. The price list
#
# All of them in order of their multiply-adds, with the speed of decoding: 4 tokens after 40 others,
# dense = 1, above 1 is faster. (Speeds differ from run to run, on a busy machine a lot.) Which ones
# save most at no loss? And are they fast?

# %%
title("8. The price list")


def decode_four(model):
    """A function that decodes 4 tokens of a story, and can be called again and again."""
    state = model.model.new_state()
    model.model.next_argmax(texts[1][:40], state)

    def run():
        for token in texts[1][40:44]:
            model.model.next_argmax([token], state)
        state.rewind(40)

    return run


chosen = ["dense", "delta, ffn", "zero, ffn", "delta, out", "equal vectors", "equal hashes"]
chosen += ["radius 0.35", "limit 0.4", "norm, mean", "half, late FFNs", "every 2nd token"]
tasks = [decode_four(models[name]) for name in chosen]
seconds = dict(zip(chosen, time_side_by_side(*tasks, repeats=5)))
table = []
for name in sorted(chosen, key=work_of):
    table.append([*cells(name), f"{seconds['dense'] / seconds[name]:.2f}x"])
print_table([*HEADINGS, "speed"], table)
reuse = ["delta, ffn", "delta, out", "equal vectors", "equal hashes", "radius 0.35"]
assert min(reuse, key=work_of) == "radius 0.35"

# %% [markdown]
# So, similar to what? Not to the token before: that is for video. Hardly ever equal to anything.
# But a situation comes again, in this story or another one: of all that reuse something, the table
# of known tokens saves most at no loss, and the distance tells which hits to trust. It is the one
# whose results were precomputed: skipping work and precomputing, the two ideas of this project,
# meet there. Beside it stands what needs no past at all: drop what is small (`zero` here, `teal` in
# tutorial 15). And in late layers, which this model hardly needs, nothing has to be similar to
# anything.
#
# In NumPy none is clearly faster, and most lose time: looking up, hashing, or gathering rows takes
# longer than what it saves in so small a model. Only what leaves whole FFNs out, without a look at
# the token, is about as fast as dense. On hardware that skips single rows, and with wider layers,
# the first column is what counts.

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 22`: Delta networks without drift
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/16_nothing_new_under_the_sun.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 1, let x go up and down: 10, 12, 14, 12, 10. What is the naive error at the end? And
#    for 10, 12, 14, 10, which comes back to 10 at once? When is the naive error 0 again?
# 2. Let lm be minitx.load("stories-relu"). Does delta beat zero in its FFNs, at thresholds of 0.3
#    and 0.5?
# 3. In section 4, use {"form": "lsh", "choose": "random"}: the product of any earlier token. How
#    much of the result is due to the hash? Then {"form": "lsh", "first": 0}: what do the first four
#    layers say to another word's product?
# 4. In section 5, write other_text in the words of the stories (Tom went to the park ...), but of
#    things that do not happen in them. How many hits are there, and how many are false?
# 5. Let the monitor of section 7 begin at 0.35 instead of 0.7 (with two halvings). What does it
#    cost now beside the fixed radius, and what is it still good for?
