# %% [markdown]
"""Answers to the questions of tutorial 4."""

# %%
import numpy as np
from helpers import (
    GROUPS,
    borrow,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    say,
    title,
)

from minitx.ledger import counting
from minitx.technique import apply

lm = load_stories()
c = lm.model.config
softmax = borrow("04", "softmax")
held_out = held_out_stories(6)


def exiting(**options):
    return apply(lm, {"early_exit": options})


def measure(changed):
    with counting(changed) as counts:
        scores = evaluate_stories(changed, held_out)
    return scores, counts.total().multiply_adds


# %% [markdown]
# ## Question 1
#
# Which thresholds let the token exit with "park", if layer 3 says "kitchen"?
#
# Layers 1, 2 and 3 have the gaps 0.45, 0.76 and 0.90. "park" is what layer 2 says, so the threshold
# must be above 0.45 (layer 1 is not sure enough) and at most 0.76. In this case exiting early is a
# mistake: the gap says how sure a layer is, not whether it is right.

# %%
title("Question 1. A confident layer that is wrong")
WORDS = ("park", "kitchen", "garden")
word_rows = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
hidden = np.array([[1.0, 2.0], [3.0, 1.0], [1.0, 4.0]])
p = softmax(hidden @ word_rows.T)  # (3, V)
gaps = np.sort(p, -1)[:, -1] - np.sort(p, -1)[:, -2]
says = [WORDS[i] for i in p.argmax(-1)]
for layer, (word, gap) in enumerate(zip(says, gaps), 1):
    print(f"layer {layer} says {word:7} with a gap of {gap:.2f}")
print(f"thresholds above {gaps[0]:.2f} and up to {gaps[1]:.2f} exit after layer 2, with park")
assert says == ["kitchen", "park", "kitchen"] and gaps.round(2).tolist() == [0.45, 0.76, 0.9]

# %% [markdown]
# ## Question 2
#
# Does deferring bring back the answers if tokens may exit after layer 1?
#
# The answers come back, and most of the loss. With real keys and values every later token sees what
# it needs. But after layer 1 a few tokens are sure of a wrong word, which is their own mistake, and
# no cache can mend it: the last line counts them. A few such tokens cost a lot each.

# %%
title("Question 2. First exit after layer 1")
dense, dense_work = measure(lm)
table = [["dense", f"{dense.mean_loss:.4f}", *(f"{dense.accuracy[g]:.0%}" for g in GROUPS[1:3])]]
found = {}
for name, first, fill in (
    ("backfilled, first=1", 1, "copy"),
    ("deferred, first=1", 1, "deferred"),
    ("deferred, first=2", 2, "deferred"),
):
    found[name], _ = measure(exiting(measure="softmax", threshold=0.95, first=first, kv_fill=fill))
    accuracy = [f"{found[name].accuracy[group]:.0%}" for group in GROUPS[1:3]]
    table.append([name, f"{found[name].mean_loss:.4f}", *accuracy])
print_table(["", "loss", *GROUPS[1:3]], table)

stopped = exiting(measure="random", threshold=0, first=1)  # all tokens stop after layer 1
sure = wrong = 0
for story in held_out:
    text = lm.encode(story.text)
    p = softmax(stopped.logits(text))
    two_largest = np.sort(p, -1)[:, -2:]
    is_sure = two_largest[:, 1] - two_largest[:, 0] >= 0.95
    sure += is_sure.sum()
    wrong += (is_sure & (p.argmax(-1) != lm.logits(text).argmax(-1))).sum()
print(f"{sure} tokens are sure after layer 1; {wrong} of them are wrong")
assert found["deferred, first=1"].accuracy["1 hop"] > found["backfilled, first=1"].accuracy["1 hop"]
assert found["deferred, first=1"].mean_loss > found["deferred, first=2"].mean_loss + 0.01
assert wrong > 0

# %% [markdown]
# ## Question 3
#
# When does a check cost more than a layer?
#
# V D > 12 D^2 means V > 12 D: 49,152 for D = 4096. Many vocabularies are larger than that, so there
# a check of the softmax costs more than the layer that it may save. With every=2 the gap checks
# half as often, and saves more work, although tokens exit a layer later.

# %%
title("Question 3. The price of a check")
print(f"12 D = {12 * 4096:,} for D = 4096; in stories a check is {c.vocab_size * c.width:,}")
work = {}
for every in (1, 2):
    changed = exiting(measure="softmax", threshold=0.95, first=4, every=every)
    scores, multiply_adds = measure(changed)
    work[every] = multiply_adds / dense_work
    loss = scores.mean_loss - dense.mean_loss
    say(f"every={every}: {work[every]:.2f} of the work, loss {loss:+.4f}")
assert work[2] < work[1]

# %% [markdown]
# ## Question 4
#
# How many stories does a limit of 1% take?
#
# Without any changed word, (1 - 0.01)^n must be at most 5%: 299 stories instead of 29. If 0.5% of
# the words change, it takes 1,937: what we see lies closer to the limit, and it takes
# more stories to tell the two apart.

# %%
title("Question 4. A stricter limit")
p_value = borrow("04", "p_value", DELTA=0.01)
for r in (0, 0.005):
    stories = next(n for n in range(1, 10_000) if p_value(r, n) <= 0.05)
    print(f"{r:.1%} of the words change: {stories:,} stories")
assert (0.99**299 <= 0.05 < 0.99**298) and stories == 1937
