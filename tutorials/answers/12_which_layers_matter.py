# %% [markdown]
"""Answers to the questions of tutorial 12."""

# %%
import numpy as np
from helpers import (
    answers_in,
    borrow,
    calibration_stories,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    title,
)

from minitx.ledger import counting
from minitx.skip.layer_skip import block_influence
from minitx.technique import apply

lm = load_stories()
L = lm.model.config.layers

# %% [markdown]
# ## Question 1
#
# What must C add for the influence to be right?
#
# Something that does not turn the vector: (2, 2), for example. Then nothing after B depends on how
# long the vector is, and dropping B changes the length only, while without A the vector is turned
# by 8 degrees. The influence of a layer says what the layer does to h; it is right if later layers
# do not turn a shorter vector further than a long one.

# %%
title("Question 1. A third layer that does not turn the vector")
cosine = borrow("12", "cosine")
A, B, h = np.array([0, 1]), np.array([1, 1]), np.array([1, 0])


def turned_without_a_and_b(C):
    """By how many degrees the end is turned without A, and without B."""
    end = h + A + B + C
    cosines = [min(cosine(left, end), 1) for left in (h + B + C, h + A + C)]
    return np.degrees(np.arccos(cosines))


for C in ((-2, 2), (0, 2), (2, 2)):
    without_a, without_b = turned_without_a_and_b(np.array(C))
    print(f"C adds {C}: turned by {without_a:.0f} without A, by {without_b:.0f} without B")
assert without_b < 1e-3 and round(without_a) == 8

# %% [markdown]
# ## Question 2
#
# At which n is "last" clearly worse than the influence?
#
# At n = 4. "last" never drops layer 8, so its fourth is layer 4, the one that reads what layer 3
# has looked up, and influence takes layer 8 instead. The answers with three hops say the opposite:
# with layer 8, 6 of 7 are right, without it only 2. Its share of the loss is small, since such
# answers are few, but it is where the last facts of a chain come together. (At n = 1 and 3 both
# drop the same layers.)

# %%
title("Question 2. The last layers, or those of lowest influence")
held_out = []  # those of the first ten stories in which some answer takes three hops
for story in held_out_stories(10):
    if any(hops == "3 hops" for _, _, hops in answers_in(lm, [story])):
        held_out.append(story)
GROUPS = ("1 hop", "2 hops", "3 hops")


def measure(technique):
    """Multiply-adds, the mean loss, and the share of right answers with 1, 2 and 3 hops."""
    changed = apply(lm, technique)
    with counting(changed) as counts:
        scores = evaluate_stories(changed, held_out)
    answers = [scores.accuracy[group] for group in GROUPS]
    return counts.total().multiply_adds, scores.mean_loss, answers


dense_work, dense_loss, _ = measure({})


def line(name, measured):
    work, loss, answers = measured
    cells = f"{work / dense_work:.2f}", f"{loss - dense_loss:+.4f}"
    return [name, *cells, *(f"{share:.0%}" for share in answers)]


influence = block_influence(lm, [lm.encode(story.text) for story in calibration_stories(4)])
table, found = [], {}
for n in (1, 2, 3, 4):
    chosen = {"last": range(L - 1 - n, L - 1), "influence": influence.argsort()[:n]}
    layers = {name: sorted(map(int, chosen[name])) for name in chosen}
    if layers["last"] == layers["influence"]:
        print(f"n = {n}: both drop the same layers")
        continue
    for name in layers:
        drop = ",".join(map(str, layers[name]))
        found[name, n] = measure({"layer_skip": {"drop": drop}})
        numbers = " ".join(str(layer + 1) for layer in layers[name])
        table.append(line(f"n = {n}, {name}: {numbers}", found[name, n]))
print_table(["layers dropped", "work", "loss", *GROUPS], table)
assert found["last", 4][1] > found["influence", 4][1] + 0.02
assert found["last", 4][2][2] > 0.8 > 0.3 > found["influence", 4][2][2]
assert abs(found["last", 2][1] - found["influence", 2][1]) < 0.005

# %% [markdown]
# ## Question 3
#
# Which layers may run backwards?
#
# Section 5 answers it beforehand. Layers 5 to 7 commute, so in reverse order nothing happens. All
# middle layers backwards means that layer 4 runs before layer 3, and layer 2 after both: they read
# what is not there yet, and the model is broken. (5 of the 7 answers with three hops are right even
# so. With so few questions, and few places in a story to guess from, that means little.)

# %%
title("Question 3. Backwards")
backwards = measure({"layer_reorder": {"order": "reverse"}})
late = measure({"layer_reorder": {"order": "reverse", "first": 4, "last": 1}})
rows = [line("2 to 7 backwards", backwards), line("5 to 7 backwards", late)]
print_table(["", "work", "loss", *GROUPS], rows)
assert backwards[1] - dense_loss > 1 and abs(late[1] - dense_loss) < 0.002

# %% [markdown]
# ## Question 4
#
# Layers, FFNs or attentions: what may be dropped at the same share of multiply-adds?
#
# At three quarters, whole layers and FFNs cost next to nothing. Attentions are so little of the
# work that six of them have to go, among them those that look facts up. At a half it depends on
# what you look at. Without layers 5 to 8 the loss is low, but most answers with three hops are
# gone. Without six FFNs the loss is far higher, and nearly all answers are right: attention looks
# the facts up, and FFNs help with the other words. No technique is best at every share and by every
# measure.

# %%
title("Question 4. The same share of multiply-adds")
candidates = (
    ("layers 6 and 7", "layer", "5,6"),
    ("FFNs of 6 to 8", "ffn", "5,6,7"),
    ("attentions of 3 to 8", "attention", "2,3,4,5,6,7"),
    ("layers 5 to 8", "layer", "4,5,6,7"),
    ("FFNs of 3 to 8", "ffn", "2,3,4,5,6,7"),
)
found, table = {}, []
for name, unit, drop in candidates:
    found[name] = measure({"layer_skip": {"unit": unit, "drop": drop}})
    table.append(line(name, found[name]))
print_table(["dropped", "work", "loss", *GROUPS], table)
loss = {name: measured[1] - dense_loss for name, measured in found.items()}
assert max(loss["layers 6 and 7"], loss["FFNs of 6 to 8"]) < 0.01 < loss["attentions of 3 to 8"]
assert loss["layers 5 to 8"] < 0.1 * loss["FFNs of 3 to 8"]
assert found["layers 5 to 8"][2][2] < 0.5 < 0.9 < found["FFNs of 3 to 8"][2][2]
