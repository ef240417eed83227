# %% [markdown]
"""Answers to the questions of tutorial 5."""

# %%
import numpy as np
from helpers import evaluate_stories, held_out_stories, load_stories, print_table, say, title

from minitx.ledger import counting
from minitx.technique import apply

lm = load_stories()
L = lm.model.config.layers
held_out = held_out_stories(8)  # enough for the differences that we want to see
tokens = sum(len(lm.encode(story.text)) for story in held_out)


def skipping(**options):
    return apply(lm, {"ffn_skip": {"warm_up": 0, "cold_end": 8} | options})


# %% [markdown]
# ## Question 1
#
# Which FFN(a) turns a = (3, 4) by 90 degrees, and which by 180? How long must it be?
#
# For a cosine of 0, what is left must be at right angles to a: FFN(a) = -a + (-4, 3), for example.
# For -1 it must point the other way: FFN(a) = -1.5 a. Either can be shortened, but it always has to
# be longer than a itself, as it must first cancel a. (With a length of 5 exactly, y = 0 has no
# direction.) That is why the long hidden states of the later layers hardly turn.

# %%
title("Question 1. Longer than a")
a = np.array([3.0, 4.0])


def cosine_and_length(f):
    y = a + f
    cosine = y @ a / (np.linalg.norm(a) * np.linalg.norm(y, axis=-1))
    return cosine, np.linalg.norm(f, axis=-1)


for f in (-a + [-4, 3], -a + [-0.4, 0.3], -1.5 * a, -1.1 * a):
    cosine, length = cosine_and_length(f)
    print(f"FFN(a) {f.round(2)}, length {length:.2f}: cosine {cosine.round(2) + 0.0:.0f}")
many = 10 * np.random.default_rng(0).standard_normal((10_000, 2))
cosines, lengths = cosine_and_length(many)
turned = lengths[cosines <= 0]
say(
    f"Of {len(many):,} random vectors, {np.sum(lengths < 5):,} are shorter than a. The shortest",
    f"that turns a by 90 degrees or more has the length {turned.min():.2f}.",
)
assert np.isclose(cosine, -1) and np.isclose(cosine_and_length(-a + [-0.4, 0.3])[0], 0)
assert turned.min() > 5

# %% [markdown]
# ## Question 2
#
# How many FFNs does each token skip with skip = 1, and which choice has the lowest loss?
#
# Two. After one that is skipped, the next has to run: its cosine is what decides about the one
# after it. So at most every second one is skipped, which is two of layers 4 to 8: 5 and 7, or 6 and
# 8. Static skips as many, those of layers 7 and 8, and again it has the lowest loss: every layer
# from 5 on is dispensable for all tokens, and the later ones most of all.

# %%
title("Question 2. A quarter of all FFNs skipped")
dense = evaluate_stories(lm, held_out)
found, table = {}, []
for name, model in (
    ("by cosine", skipping(threshold=0.9, skip=1, cold_start=3)),
    ("random", skipping(choose="random", rate=0.25, cold_start=3)),
    ("static", skipping(choose="static", rate=0.25, cold_start=3)),
):
    with counting(model) as counts:
        found[name] = evaluate_stories(model, held_out)
    per_token = counts.events["FFNs skipped"] / tokens
    loss = found[name].mean_loss - dense.mean_loss
    table.append([name, f"{per_token:.2f}", f"{loss:+.4f}"])
print_table(["", "skipped per token", "loss"], table)
assert table[0][1] == "2.00"
assert found["static"].mean_loss < found["by cosine"].mean_loss < found["random"].mean_loss

# %% [markdown]
# ## Question 3
#
# How many FFNs can all tokens skip, from the last downwards?
#
# Four, those of layers 5 to 8. The fifth is that of layer 4, and with it the loss jumps: it was one
# of the three with a low cosine. The answers with one hop are all right even then. They get worse
# when six of the eight FFNs are gone: it is attention that finds the place in the story.

# %%
title("Question 3. The last FFNs skipped for all tokens")
losses, one_hop, table = {2: found["static"].mean_loss}, {2: found["static"].accuracy["1 hop"]}, []
for count in range(3, L):
    model = skipping(choose="static", rate=count / L, cold_start=1)
    scores = evaluate_stories(model, held_out)
    losses[count], one_hop[count] = scores.mean_loss, scores.accuracy["1 hop"]
for count in losses:
    row = [f"layers {L - count + 1} to {L}", f"{losses[count] - dense.mean_loss:+.4f}"]
    table.append([*row, f"{one_hop[count]:.0%}"])
print_table(["skipped", "loss", "1 hop"], table)
assert losses[4] - dense.mean_loss < 0.02 and losses[5] - losses[4] > 0.05
assert one_hop[5] == 1 and one_hop[6] < 1

# %% [markdown]
# ## Question 4
#
# How often do all B tokens of a batch skip an FFN?
#
# 0.4^B: 8 texts would hardly ever agree. But tokens are not independent. In section 4 of the
# tutorial each skipped three or four FFNs, and these were always the last ones. Then all of a batch
# skip the last three, however large it is: what is skipped for everyone saves time for everyone.

# %%
title("Question 4. All tokens of a batch")
often = {B: 0.4**B for B in (1, 2, 4, 8)}
for B, probability in often.items():
    print(f"B = {B}: independent tokens {probability:8.3%}")
by_cosine = skipping(threshold=0.9, skip=8, cold_start=3)
state, skipped = by_cosine.model.new_state(), []
for token in lm.encode(held_out[0].text)[:40]:
    with counting(by_cosine) as counts:
        by_cosine.model.next_argmax([token], state)
    skipped.append(counts.events["FFNs skipped"])
say(
    f"{len(skipped)} real tokens skip {min(skipped)} to {max(skipped)} FFNs each, the last ones:",
    f"as one batch they would skip {min(skipped)} of {L}, which is {min(skipped) / L:.0%}.",
)
assert min(skipped) == 3 and often[8] < 0.001
