# %% [markdown]
"""Tutorial 5: does every token need every feed-forward network?

Our model spends two thirds of its work in feed-forward networks (FFNs), one in each layer. Some
change a token a lot, others hardly at all. If we knew beforehand which ones change little, we could
skip them. We measure the change by an angle, skip where it is small, and ask whether that is better
than skipping at random, or always in the same layers.

Letters: L layers (blocks in tutorial 1), D width (a token is D numbers between two layers), F
hidden neurons of an FFN.
"""

# %% [markdown]
# ## The model

# %%
import numpy as np
from helpers import (
    QUESTION,
    STORY,
    bar,
    bar_chart,
    calibration_stories,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    save_picture,
    time_side_by_side,
    title,
)

from minitx.ledger import counting
from minitx.skip.ffn_skip.calibration import similarities
from minitx.technique import apply

lm = load_stories()
c = lm.model.config
L = c.layers

# %% [markdown]
# ## 1. How much does an FFN change a token? By hand
#
# A layer has two parts: attention, which reads other tokens, and then the FFN, which looks at each
# token alone. The token's hidden state after attention is a, a vector of D numbers. What the FFN
# computes from it is added, so that the layer ends with y = a + FFN(a). The next part begins with a
# norm, which divides y by its length, so what counts is mainly the direction. Did y turn away from
# a? The cosine of the angle between them tells:
#
#     cosine = a . y / (|a| |y|)      a . y is the dot product, |a| the length
#
# which is 1 if they have the same direction. Here are three examples with D = 2. Compare the last
# two rows: an FFN adds (0, 4) to a short vector, and to a long one.

# %%
title("1. How much does an FFN change a token? By hand")
table = []
for a, f in (([3, 4], [3, 4]), ([3, 0], [0, 4]), ([30, 40], [0, 4])):
    a, f = np.array(a), np.array(f)
    y = a + f
    cosine = a @ y / (np.linalg.norm(a) * np.linalg.norm(y))
    lengths = f"{np.linalg.norm(a):.0f}", f"{np.linalg.norm(y):.1f}"
    table.append([str(a), f, y, *lengths, a @ y, f"{cosine:.3f}"])
print_table(["a", "FFN(a)", "y", "|a|", "|y|", "a . y", "cosine"], table)

# %% [markdown]
# The first FFN doubles the vector. The cosine is 1, and rightly so: the next norm would undo it.
# The second turns it by 53 degrees. The third adds the same, but to a vector that is 17 times as
# long, and turns it by less than 3 degrees. Keep that in mind: hidden states get longer from layer
# to layer, so the cosine rises by itself, even if the FFNs add vectors as long as before.

# %% [markdown]
# ## 2. The same in the model
#
# `similarities` reads some stories with the model as it is, and notes this cosine for each layer
# and each token. The table has the mean over all tokens (the bars show it), and the value that 10%
# of the tokens stay below. In which layers do the FFNs look dispensable?

# %%
title("2. The cosine of each layer")
texts = [lm.encode(story.text) for story in calibration_stories(12)]
cosines = similarities(lm, texts)  # (L, tokens)
means = cosines.mean(1)
table = []
for layer in range(1, L + 1):
    row = cosines[layer - 1]
    lowest = f"{np.quantile(row, 0.1):.3f}"
    table.append([layer, f"{row.mean():.3f}", lowest, bar(row.mean(), 1, 30).ljust(30)])
print_table(["layer", "mean", "10% are below", ""], table)
assert means[0] < 0.3 and min(means[4:7]) > 0.99

# %% [markdown]
# The FFN of layer 1 turns every token into a new direction. Those of layers 5, 6 and 7 hardly turn
# anything.

# %% [markdown]
# ## 3. Can an FFN be skipped where the cosine is high?
#
# The cosine is only a guess. What counts is the loss: the mean of -ln(probability of the right
# word), here over 24 stories that the model was not trained on. We skip the FFN of one layer for
# all tokens, and look how much larger the loss gets. The technique `ffn_skip` does it with the
# option choose="static", and `rate` is the share of all L FFNs to skip: 1 / L is one of them. It
# may skip in the layers after the first cold_start ones, up to layer cold_end: with cold_start=2
# and cold_end=3 that is layer 3 alone. Do the two columns agree?

# %%
title("3. The loss if the FFN of one layer is skipped for all tokens")
held_out = held_out_stories(24)


def skipping(**options):
    return apply(lm, {"ffn_skip": {"warm_up": 0} | options})  # warm_up: see section 7


def measure(changed):
    """Read the held-out stories: the scores, and what the ledger counted."""
    with counting(changed) as counts:
        scores = evaluate_stories(changed, held_out)
    return scores, counts


dense, counts = measure(lm)
dense_work = counts.total().multiply_adds
losses, table = [], []
for layer in range(1, L + 1):
    changed = skipping(choose="static", rate=1 / L, cold_start=layer - 1, cold_end=layer)
    losses.append(evaluate_stories(changed, held_out).mean_loss - dense.mean_loss)
    table.append([layer, f"{means[layer - 1]:.3f}", f"{losses[-1]:+.4f}"])
print_table(["layer skipped", "mean cosine", "loss, minus that of dense"], table)
assert losses[0] > 5 and min(losses[1:4]) > 5 * max(losses[4:])


def draw(axes):
    axes.plot(range(1, L + 1), means, marker="o", label="mean cosine")
    axes.bar(
        range(1, L + 1),
        np.minimum(losses, 0.05) / 0.05,
        alpha=0.4,
        label="loss (full height: 0.05 or more)",
    )
    axes.set(xlabel="layer", ylim=(0, 1.05))
    axes.legend()


save_picture("05_cosine_and_loss", draw)

# %% [markdown]
# Roughly they agree: the three lowest cosines after layer 1 are the three largest losses. Without
# the first FFN the model is ruined; layers 2, 3 and 4 cost 0.01 to 0.03, and the others next to
# nothing. So it makes sense to protect some layers: FFN-SkipLLM, the paper of this technique, never
# skips in the first layers, nor in the last ones. It calls them cold.

# %% [markdown]
# ## 4. The rule for one token, by hand
#
# Should all tokens skip the same FFNs? The paper lets each token decide. But the cosine of an FFN
# is known only after it has run, and then it is too late to skip it. So the rule goes: if an FFN
# turned the token by little (the cosine reaches a threshold), then skip the FFNs of the next few
# layers, `skip` of them, for this token. Cold layers are left out: their FFNs always run, and their
# cosines do not count. Attention always runs, too. As a toy, take a token that has the mean cosines
# of section 2, and go through its layers.

# %%
title("4. Threshold 0.9, skip = 2, layers 1 to 3 are cold")
to_skip = 0
ran = []
for layer in range(1, L + 1):
    if to_skip > 0:
        to_skip -= 1
        print(f"  layer {layer}: FFN skipped")
        continue
    ran.append(layer)
    print(f"  layer {layer}: FFN runs, cosine {means[layer - 1]:.2f}", end="")
    if layer <= 3:
        print(", cold")
    elif means[layer - 1] >= 0.9 and layer < L:  # after the last there is nothing to skip
        to_skip = 2
        print(", reaches 0.9: skip the next 2")
    else:
        print()
assert ran == [1, 2, 3, 4, 5, 8]

# %% [markdown]
# With skip = 8, more than are left, the FFN of layer 8 would be skipped as well.

# %% [markdown]
# ## ... and with the flag
#
# Now with real tokens, and skip=8: after one high cosine, all FFNs to the end are skipped. The
# chart shows how many that is for each token.

# %%
title("... and in the model: how many of its 8 FFNs does each token skip?")
CHOSEN = {"threshold": 0.9, "skip": 8, "cold_start": 3, "cold_end": 8}
by_cosine = skipping(**CHOSEN)
ids = lm.encode(STORY + QUESTION)
state, words, skipped = by_cosine.model.new_state(), [], []
for token in ids:
    with counting(by_cosine) as counts:
        by_cosine.model.next_argmax([token], state)
    words.append(lm.tokenizer.decode([token]).strip())
    skipped.append(counts.events["FFNs skipped"])
first = words.index("went") - 1
bar_chart(words[first:], skipped[first:], width=20)
assert set(skipped) <= {3, 4}

# %% [markdown]
# Most run the FFN of layer 5 and skip the three after it. A few reach the threshold one layer
# earlier and skip four.

# %% [markdown]
# ## 5. Is it better than chance? Is it better than a fixed choice?
#
# We compare with two baselines that skip as many FFNs, 40% of all, and also in layers 4 to 8.
# Random: for each token and each of these five layers, a random number decides. It skips 64% of
# them, which is 40% of all eight. Static: all tokens skip the FFNs of the same layers, 6, 7 and 8
# (and some tokens that of layer 5 too, to arrive at 40%). Work is counted in multiply-adds; the
# dense model, which skips nothing, is 1. The loss is again the difference from dense. The last
# columns show the share of right answers to questions for which one must connect one, two or three
# facts of the story (hops).

# %%
title("5. 40% of all FFNs skipped: by cosine, at random, always the last")
GROUPS = ("1 hop", "2 hops", "3 hops")
ffns = L * sum(len(lm.encode(story.text)) for story in held_out)


def row_of(name, scores, counts):
    share, work = counts.events["FFNs skipped"] / ffns, counts.total().multiply_adds / dense_work
    loss = scores.mean_loss - dense.mean_loss
    accuracy = [f"{scores.accuracy[group]:.0%}" for group in GROUPS]
    return [name, f"{share:.0%}", f"{work:.2f}", f"{loss:+.4f}", *accuracy]


HEADINGS = ["", "skipped", "work", "loss", *GROUPS]
scores, counts = measure(by_cosine)
cosine_row = row_of("by cosine", scores, counts)
random, counts = measure(skipping(choose="random", rate=0.4, cold_start=3, cold_end=8))
random_row = row_of("random", random, counts)
static, counts = measure(skipping(choose="static", rate=0.4, cold_start=3, cold_end=8))
static_row = row_of("static", static, counts)
print_table(HEADINGS, [cosine_row, random_row, static_row])
loss = scores.mean_loss - dense.mean_loss
assert random.mean_loss - dense.mean_loss > 2 * loss
assert abs(static.mean_loss - scores.mean_loss) < 0.1 * loss

# %% [markdown]
# By the loss, the cosine is far better than chance, and no better than always skipping the same.
# (The answers hardly differ: there are 23 with two hops, so 91% and 96% are one answer apart.)
# Without the static baseline, we would now believe that it pays to look at each token.

# %% [markdown]
# ## 6. Why does it not pay to look at each token?
#
# The rule relies on this: a token that one FFN turns by little is turned by little in the next
# layer, too. Is that so? For each layer, we take the tokens whose cosine reaches 0.9 there, and ask
# how many of these reach 0.9 in the next layer as well.

# %%
title("6. If the cosine reaches 0.9 in a layer, does it in the next one?")
high = cosines >= 0.9  # (L, tokens)
table = []
for layer in range(2, L):
    here, after = high[layer - 1], high[layer]
    table.append([layer, f"{here.mean():.0%}", f"{after[here].mean():.0%}"])
print_table(["layer", "reach 0.9", "of these, in the next layer too"], table)
assert high[3][high[2]].mean() < 0.5 and high[4].mean() > 0.99

# %% [markdown]
# In layers 5 to 7 all tokens do, and in layer 8 nearly all. There is nothing to decide, so static
# does as well. In the layers before, tokens differ, but there the rule fails. Of those that reach
# 0.9 in layer 2, 78% do in layer 3, but so do 71% of all; and most that reach it in layer 3 do not
# in layer 4.

# %% [markdown]
# ## ... what if skipping may begin there?
#
# Let only layer 1 be cold, and raise the threshold to 0.98 to be careful. Static gets the same
# freedom, and skips the last four FFNs. Compare the two losses.

# %%
bold, counts = measure(skipping(threshold=0.98, skip=8, cold_start=1, cold_end=8))
bold_row = row_of("by cosine", bold, counts)
static, counts = measure(skipping(choose="static", rate=0.5, cold_start=1, cold_end=8))
print_table(HEADINGS, [bold_row, row_of("static", static, counts)])
assert bold.mean_loss - dense.mean_loss > 5 * (static.mean_loss - dense.mean_loss)

# %% [markdown]
# A token that reaches 0.98 in layer 2 now skips all FFNs after it, also those of layers 3 and 4,
# which it needed. So it was right to call these layers cold. This is one small model. In another,
# tokens may differ more; the comparison with static will tell.

# %% [markdown]
# ## 7. Are the first tokens of a text special?
#
# In large models they often are: later tokens attend to them a lot, whatever they say. So the paper
# lets the first tokens run everything, the warm-up; in `ffn_skip` it is 25 tokens by default. It
# means that less is skipped, so it should lower the loss.

# %%
title("7. With and without warm-up")
warm, counts = measure(skipping(**CHOSEN, warm_up=25))
warm_row = row_of("warm_up = 25", warm, counts)
cosine_row[0] = "warm_up = 0"
print_table(HEADINGS, [cosine_row, warm_row])

# %% [markdown]
# Less is skipped, and the loss is about the same. This model needs no warm-up.

# %% [markdown]
# ## 8. The price
#
# First the counts, for one token. Then the time: we read 60 tokens one after the other, as in
# generating text, with three models in one run: dense, by cosine, and one in which all tokens skip
# the FFNs of layers 6 to 8. A number above 1 is faster than dense.

# %%
title("8. The price")
ffn, one_cosine = 3 * c.width * c.hidden, 3 * c.width
print(f"multiply-adds: an FFN (3 D F) {ffn:,}, a cosine (3 D) {one_cosine:,}")

text = lm.encode(held_out[0].text)[:60]


def reader(changed):
    def read():
        state = changed.model.new_state()
        for token in text:
            changed.model.next_argmax([token], state)

    return read


always_last = skipping(choose="static", rate=3 / L, cold_start=5, cold_end=8)
seconds = time_side_by_side(reader(lm), reader(by_cosine), reader(always_last), repeats=8)
print("Speed, token by token (dense = 1):")
for name, time in zip(("dense", "by cosine", "layers 6 to 8"), seconds):
    print(f"  {name:13}  {seconds[0] / time:.2f} {bar(seconds[0] / time, 2)}")

# %% [markdown]
# A quarter of the multiply-adds is gone, and little or no time. The FFNs here are so small that
# NumPy computes one about as fast as it is called, and deciding whether to skip takes calls, too.
# In a large model, most of the time of an FFN goes into reading its 3 D F weights from memory,
# which a skipped one need not do. But several texts in a batch share the weights that are read:
# then an FFN saves time only if all of them skip it.
#
# Early exit (tutorial 4) skips whole layers. Here attention always runs, so less is saved, but
# every layer has its own keys and values of every token, and later tokens find all they look for.

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 13`: FFN skipping
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/05_skipping_feed_forward_networks.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 1, find an FFN(a) for a = (3, 4) so that the cosine is 0, and one so that it is -1.
#    How long must such an FFN(a) be?
# 2. Set "skip": 1 in CHOSEN. How many FFNs does each token skip now, and why not more? In section
#    5, give both baselines the same rate (0.25). Which of the three has the lowest loss?
# 3. How many FFNs can you skip for all tokens, from the last downwards? Use choose="static",
#    cold_start=1 and cold_end=8 as at the end of section 6, with rate=1 / L, 2 / L and so on. When
#    does the loss jump? And when do the answers with one hop get worse?
# 4. In a batch of B texts, an FFN saves time only if all B tokens skip it. If each does with
#    probability 0.4, independently of the others, how often is that for B = 1, 2, 4 and 8? Look at
#    section 4 again: are the tokens of this model independent?
