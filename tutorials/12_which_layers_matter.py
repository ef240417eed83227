# %% [markdown]
"""Tutorial 12: which layers matter?

Our model has eight layers. Take one out, and seven run: an eighth of the work is gone, for every
token, for good. Which one can go? Does it matter in which order they run? Could two of them share
one set of weights? We find out with a vector of two numbers first, and then on stories.

Letters: L layers, D width (a token is D numbers between two layers), h the hidden state of a token,
a vector of D numbers.
"""

# %% [markdown]
# ## The model

# %%
import numpy as np
from helpers import (
    calibration_stories,
    count_last,
    decode_last,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    save_lines,
    speedup,
    title,
)

from minitx.skip.layer_skip import block_influence
from minitx.technique import apply
from minitx.tree import nbytes

lm = load_stories()
L = lm.model.config.layers

# %% [markdown]
# ## 1. How much does a layer change a token? By hand
#
# A layer reads the hidden state h and adds something to it: h + f(h). If it adds little, we could
# leave it out. ShortGPT (Men et al., 2024) measures "little" by the angle between h before and
# after, and calls it Block Influence:
#
#     influence = 1 - cos(h before, h after)        0: the same direction, 1: a right angle
#
# Take three toy layers that add the same vector to every token: A adds (0, 1), B adds (1, 1), and
# C adds (-2, 2). A token enters as (1, 0).

# %%
title("1. Three layers that add a vector")
toy = {"A": np.array([0, 1]), "B": np.array([1, 1]), "C": np.array([-2, 2])}


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


h = np.array([1, 0])
table = []
for name, added in toy.items():
    table.append([name, h, added, h + added, f"{1 - cosine(h, h + added):.3f}"])
    h = h + added
print_table(["layer", "h before", "adds", "h after", "influence"], table)

# %% [markdown]
# B has influence 0: it makes the vector longer and does not turn it. So by this measure B is the
# layer to drop. What comes out at the end without each of the layers?

# %% [markdown]
# ## ... and without each of them

# %%
end = h
table = [["none", end, "0 degrees"]]
for dropped in toy:
    left = sum((added for name, added in toy.items() if name != dropped), np.array([1, 0]))
    angle = np.degrees(np.arccos(min(cosine(left, end), 1)))
    table.append([dropped, left, f"{angle:.0f} degrees"])
print_table(["dropped", "h at the end", "turned by"], table)

# %% [markdown]
# Without A the end has the same direction as before. Without B, the layer of influence 0, it is
# turned by 18 degrees: a longer vector would have been turned less by what C adds. The influence
# looks at one place and not at what happens later. It is a guess, so we have to measure.

# %% [markdown]
# ## 2. The influence of each layer, and the loss without it
#
# `layer_skip` drops layers by number (from 0: drop=3 is the fourth). The loss is the mean of
# -ln(probability of the right word) over ten stories that the model was not trained on; printed is
# by how much it rises above the dense model, which drops nothing. Hops are how many facts of the
# story an answer has to combine. Does the influence predict the rise of the loss?

# %%
title("2. Without one layer")
held_out = held_out_stories(10)
texts = [lm.encode(story.text) for story in calibration_stories(8)]
GROUPS = ("1 hop", "2 hops", "3 hops")
dense = evaluate_stories(lm, held_out)


def right(scores):
    return [f"{scores.accuracy[group]:.0%}" for group in GROUPS]


def without(**options):
    return apply(lm, {"layer_skip": options})


influence = block_influence(lm, texts)  # (L,)
losses, table = [], [["none", "", "", *right(dense)]]
for layer in range(L):
    scores = evaluate_stories(without(drop=str(layer)), held_out)
    losses.append(scores.mean_loss - dense.mean_loss)
    table.append([layer + 1, f"{influence[layer]:.3f}", f"{losses[-1]:+.4f}", *right(scores)])
print_table(["layer", "influence", "loss rise", *GROUPS], table)
assert losses[0] > 5 and min(losses[1:4]) > 5 * max(losses[4:])

# %% [markdown]
# The influence tells three kinds of layers apart: 1, then 2 to 4, then 5 to 8. It does not tell
# the order within a kind: of 2 to 4, layer 4 has the largest influence and is missed least; of 5 to
# 8 it is layer 8. (A rise of 0.001 up or down is noise: there are few stories. And few questions:
# 12 with two hops and 7 with three, so one answer is 8% or 14%.)
#
# Without layer 1 nothing works. Any one of layers 5 to 8 can go. In between, the loss says little
# (0.03 to 0.05), the answers more: without layer 3, 43% of the one-hop questions are answered
# wrong. Most words of a story are easy, and the loss is a mean over all of them; an answer needs
# the layer that looks the fact up. That so many late layers can go is due to how this model was
# trained: late layers were left out at random, more often than early ones (LayerSkip).

# %% [markdown]
# ## 3. Half a layer
#
# A layer is attention, which fetches something from other tokens, and then an FFN, which works on
# each token alone. We drop only one of the two. Compare each row with the whole layer: should half
# of a layer not cost less than all of it?

# %%
title("3. Without a layer, its attention, or its FFN")
table, cost = [], {}
for layer in range(L):
    for unit in ("attention", "ffn"):
        changed = evaluate_stories(without(unit=unit, drop=str(layer)), held_out)
        cost[unit, layer] = changed.mean_loss - dense.mean_loss
    halves = f"{cost['attention', layer]:+.4f}", f"{cost['ffn', layer]:+.4f}"
    table.append([layer + 1, f"{losses[layer]:+.4f}", *halves])
print_table(["layer", "rise without it", "without attention", "without FFN"], table)
assert cost["attention", 1] > 10 * losses[1]

# %% [markdown]
# Look at layer 2: without its attention the loss is far higher than without the whole layer. Its
# FFN was trained to read what its attention has fetched; without that it adds nonsense, and
# nonsense is worse than nothing. In layers 5 to 8 either half can go. In large models much of the
# attention is like that: LLM-Drop (He et al., 2024) leaves out half of the attention sub-layers of
# Llama-2-70B for 2.4% of its accuracy.

# %% [markdown]
# ## 4. Without several layers
#
# Now we drop n layers at once, chosen in three ways: those of lowest influence, all judged in the
# dense model; greedily, where after each removal the loss without each of the others is measured
# again; and at random (the mean of two draws). Watch two things: the rise of the loss, and the
# answers to the 7 questions with three hops.

# %%
title("4. Without n layers")
curves = {"influence": [], "greedy": [], "random": []}
table = []
for n in range(1, 5):
    row = [n]
    for choose in ("influence", "greedy"):
        scores = evaluate_stories(without(choose=choose, count=n, stories=4), held_out)
        curves[choose].append(scores.mean_loss - dense.mean_loss)
        row += [f"{curves[choose][-1]:+.4f}", right(scores)[2]]
    drawn = [
        evaluate_stories(without(choose="random", count=n, seed=seed), held_out) for seed in (0, 1)
    ]
    curves["random"].append(np.mean([scores.mean_loss for scores in drawn]) - dense.mean_loss)
    three = np.mean([scores.accuracy["3 hops"] for scores in drawn])
    table.append([*row, f"{curves['random'][-1]:+.4f}", f"{three:.0%}"])
print_table(["n", "influence", "3 hops", "greedy", "3 hops", "random", "3 hops"], table)
assert curves["influence"][3] < 0.03 and curves["random"][3] > 1
save_lines("12_layers", range(1, 5), curves, "layers dropped", "loss, minus that of dense")

# %% [markdown]
# Three of eight layers can go, and hardly an answer changes. The fourth takes most of the answers
# with three hops, although the loss is still low: the last facts of a chain are put together in one
# of the late layers, and now all of these are gone. Greedy needs 26 measurements of the loss where
# influence needs one pass. It takes layer 8 first, which influence takes last, and the loss rises
# half as much at n = 3. Random is a warning: from n = 2 on, one of the two draws includes layer 1,
# and the mean is half of that disaster.

# %% [markdown]
# ## 5. In another order
#
# All eight layers run again, but some in another order. `layer_reorder` takes the list of layers
# (again from 0). We swap two neighbours, each pair in turn. What do you expect?

# %%
title("5. Two neighbouring layers swapped")
table = []
swapped = []
for layer in range(L - 1):
    order = list(range(L))
    order[layer], order[layer + 1] = layer + 1, layer
    numbers = ",".join(map(str, order))
    scores = evaluate_stories(apply(lm, {"layer_reorder": {"layers": numbers}}), held_out)
    swapped.append(scores.mean_loss - dense.mean_loss)
    table.append([f"{layer + 1} and {layer + 2}", f"{swapped[-1]:+.4f}", *right(scores)])
print_table(["swapped", "loss rise", *GROUPS], table)
assert swapped[0] > 5 and max(swapped[4:6]) < 0.01

# %% [markdown]
# Layers 5 to 7 commute: each adds its little bit to the hidden state, whatever came before. Then
# two of them may as well read the same input and run side by side, on two machines or cores: that
# is order=parallel. Layer 4 reads what layer 3 has looked up, so there the order counts. Layer 1
# turns words into something that the others can read at all. Layer 8 is not missed (section 2), yet
# run before layer 7 it costs 0.02: layer 7 has not learned to read what it writes.

# %% [markdown]
# ## 6. Two layers, one set of weights
#
# Instead of dropping a layer we could run another one twice. Then no multiply-add is saved, but the
# weights of one layer need not be stored: that is layer fusion (ALBERT shares one set among all
# layers). Each still has its own keys and values. Below, `layer_fusion` lets two, three or four
# neighbours share the weights of the first of them, at the place where that costs least on
# calibration stories. Next to it, the same layers are dropped instead, all but the first.

# %%
title("6. Neighbours that share one set of weights, or are dropped")
whole = nbytes(lm)
fused, table = {}, []
for size in (2, 3, 4):
    changed = apply(lm, {"layer_fusion": {"size": size}})
    blocks = changed.model.stack.blocks
    place = next(i for i in range(L - 1) if blocks[i] is blocks[i + 1])
    scores = evaluate_stories(changed, held_out)
    fused[size] = scores.mean_loss - dense.mean_loss
    gone = ",".join(str(layer) for layer in range(place + 1, place + size))
    dropped = evaluate_stories(without(drop=gone), held_out)
    layers = f"{place + 1} to {place + size}"
    memory = f"{nbytes(changed) / whole:.2f}x"
    loss = f"{dropped.mean_loss - dense.mean_loss:+.4f}"
    table.append([layers, memory, f"{fused[size]:+.4f}", right(scores)[2], loss, right(dropped)[2]])
print_table(["layers", "memory", "shared", "3 hops", "dropped", "3 hops"], table)
assert fused[4] < 0.05

# %% [markdown]
# Both store the same weights. Sharing runs all eight layers, dropping only some of them, and yet
# dropping costs less: for these layers, doing nothing is better than doing what another layer does.
# Sharing pays where a layer cannot be left out; but there it has to be trained. In
# weights/recipes/layer_fusion.json the first four layers run, and then the same four again: half
# of the weights. At first 57% of the one-hop questions are answered, and of those with three hops
# none. After 150 training steps it is 98% and 72%:
#
#     minitx train weights/recipes/layer_fusion.json --out runs/layer_fusion
#     minitx evaluate -m runs/layer_fusion --stories 60

# %% [markdown]
# ## 7. The price
#
# First the counts: what a token costs in multiply-adds (after 100 others), and what the model takes
# in memory. Then the time of decoding that token, as a ratio. A number above 1 is faster.

# %%
title("7. The price")
text = lm.encode(held_out[0].text)[:100]
models = {
    "dense": lm,
    "3 layers dropped": without(drop="4,5,6"),
    "3 attentions dropped": without(unit="attention", drop="4,5,6"),
    "4 layers share weights": apply(lm, {"layer_fusion": {"size": 4}}),
}
table = []
for name, changed in models.items():
    work = count_last(changed, text).total().multiply_adds
    memory = f"{nbytes(changed) / whole:.2f}x"
    faster = f"{speedup(decode_last(lm, text), decode_last(changed, text), 15):.2f}x"
    table.append([name, f"{work:,}", memory, faster])
print_table(["", "multiply-adds", "memory", "speed"], table)

# %% [markdown]
# Layers that are gone save time nearly in proportion to their multiply-adds. An attention has few
# of these, but takes many small steps, so dropping it saves more time than one would think.
#
# Could the decision be made for each text? `layer_router` lets a gate for each layer read the
# prompt, `switchable` a small network that decides about all sub-layers. On stories, which are much
# alike, the former is no better than a fixed list of layers, and the latter is better at one of its
# settings: see the notes at the end of their files in minitx/skip/.

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 18`: The budget
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/12_which_layers_matter.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 1, choose what C adds so that the influence is right: dropping B should do less harm
#    than dropping A.
# 2. In section 4, let choose be "last" (it keeps the very last layer, so `count` layers before that
#    go). At which n is its loss first clearly higher than that of influence, and which layer is to
#    blame? And the answers with three hops?
# 3. Run all middle layers backwards: apply(lm, {"layer_reorder": {"order": "reverse"}}). Then only
#    5 to 7: {"order": "reverse", "first": 4, "last": 1}. Can you say beforehand what happens?
# 4. Which costs least at about three quarters of the multiply-adds: without layers 6 and 7 (drop is
#    "5,6"), without the FFNs of layers 6 to 8, or without the attentions of 3 to 8? And at about a
#    half, without layers 5 to 8 or without the FFNs of 3 to 8? Look at the answers, too. (`minitx
#    frontier structure` does this with many techniques. It takes long.)
