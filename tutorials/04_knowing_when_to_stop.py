# %% [markdown]
"""Tutorial 4: when does a model know the answer? And may it stop there?

A model runs each token, easy or hard, through all its layers (blocks in tutorial 1). Perhaps the
word that it will say is settled long before the last one. Then the remaining layers are work for
nothing, and the token could exit early. We look for the layer at which a model knows, for signs by
which it could notice that by itself, and for what goes wrong when a token stops.

Letters: L layers, D width (a token is D numbers between two layers), V vocabulary.
"""

# %% [markdown]
# ## The model

# %%
import numpy as np
from helpers import (
    ANSWER,
    QUESTION,
    STORY,
    bar,
    calibration_stories,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    save_lines,
    say,
    time_side_by_side,
    title,
)

from minitx.lab.learn_then_test import hoeffding_bentkus
from minitx.ledger import counting
from minitx.technique import apply

lm = load_stories()
c = lm.model.config
L = c.layers

# %% [markdown]
# ## 1. Three words and three layers, by hand
#
# After each layer, a token is a row of numbers, its hidden state h. At the end of the model the
# head compares h with a row for each word: the dot products are the logits, and their softmax is
# the probability of each word. (In a real model a norm comes first; the toy has none.) Nothing
# prevents us from asking the head after an earlier layer. In this toy, h has two numbers, and all
# of it can be done with a pocket calculator.

# %%
title("1. Three words and three layers, by hand")
WORDS = ("park", "kitchen", "garden")
word_rows = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # a row for each word
hidden = np.array([[1.0, 2.0], [3.0, 1.0], [4.0, 1.0]])  # h after layers 1, 2 and 3


def numbers(row, form):
    return "  ".join(f"{number:{form}}" for number in row)


table = []
for layer, h in enumerate(hidden, 1):
    logits = word_rows @ h
    exponentials = np.exp(logits)
    p = exponentials / exponentials.sum()
    second, first = np.sort(p)[-2:]  # the two largest probabilities
    cells = [numbers(h, ".0f"), numbers(logits, ".0f"), numbers(exponentials, ".2f")]
    cells += [numbers(p, ".2f"), WORDS[p.argmax()], f"{first - second:.2f}"]
    table.append([layer, *cells])
print_table(["layer", "h", "logits", "exponentials", "probabilities", "says", "gap"], table)

# %% [markdown]
# After layer 1 the model would say "kitchen". From layer 2 on it says "park", so layer 3 was not
# needed. How could it notice? The last column is a sign: the softmax gap, the largest probability
# minus the second largest. So the rule may be: exit after the first layer whose gap reaches a
# threshold. With the threshold 0.7 the token exits after layer 2, and says what layer 3 would have
# said. With 0.4 it exits after layer 1, and says something else.

# %% [markdown]
# ## 2. One question, layer by layer
#
# Now the trained model, with its 8 layers. The technique `early_exit` replaces the model by a copy
# whose tokens may exit. measure="random" with threshold=0 lets every token exit at the first chance
# (section 5 says what it is for), and `first=i` says that this is after layer i. So we see what the
# head makes of the hidden states there. Look for the layer from which on the answer is known.


# %%
def exiting(**options):
    return apply(lm, {"early_exit": options})  # a changed copy; lm itself stays as it is


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


title("2. One question, layer by layer")
stop_after = [exiting(measure="random", threshold=0, first=i) for i in range(1, L)]
stop_after.append(lm)  # after the last layer: the model as it is
ids = lm.encode(STORY + QUESTION)
(answer,) = lm.tokenizer.encode(ANSWER, special=False)
say(STORY + QUESTION, "...")

known = []
for i, stopped in enumerate(stop_after, 1):
    p = softmax(stopped.logits(ids)[-1])  # (V,) after the last token
    known.append(p[answer])
    says = lm.tokenizer.decode([int(p.argmax())]).strip()
    print(f"  layer {i} says {says:8}  probability of park {p[answer]:6.1%} {bar(p[answer], 1)}")
assert known[2] < 0.6 and min(known[3:]) > 0.99

# %% [markdown]
# After layer 2 the model favours a place that the story named, but is not sure. Layer 4 settles it.
# The other four layers change nothing that matters here.

# %% [markdown]
# ## 3. Is it so for every question?
#
# To answer, a model must connect facts. "Where is Tom?" takes one fact: one hop. If Tom has the
# ball, "Where is the ball?" takes two (the ball is with Tom, Tom is in the park), and a ball in a
# box that Tom has takes three. Again all tokens stop after layer i, now on 24 stories that the
# model was not trained on. In each column, look for the layer at which the words become right.

# %%
title("3. All tokens stop after layer i: share of right words")
GROUPS = ("other text", "1 hop", "2 hops", "3 hops")
held_out = held_out_stories(24)

table, curves = [], {group: [] for group in GROUPS}
for i, stopped in enumerate(stop_after, 1):
    scores = evaluate_stories(stopped, held_out)
    for group in GROUPS:
        curves[group].append(scores.accuracy[group])
    table.append([i, *(f"{curves[group][-1]:.0%}" for group in GROUPS)])
print_table(["layer", *GROUPS], table)
save_lines(
    "04_accuracy_by_layer", range(1, L + 1), curves, "all tokens stop after layer", "share right"
)
assert curves["1 hop"][3] > 0.95 > 0.75 > curves["2 hops"][3]
assert min(curves["2 hops"][5], curves["3 hops"][5]) > 0.95

# %% [markdown]
# One hop is known after layer 4, two and three hops only after layer 5 or 6. Other text is as good
# as it gets after layer 2 or 3: most of its words follow from grammar. (It stays below 100% because
# nobody can know what a story tells next.) So one layer for all tokens is too early for the hardest
# words or too late for most others. Each token should decide by itself.

# %% [markdown]
# ## 4. Three signs that a token knows
#
# - The softmax gap, as in section 1. It needs the whole head: V D multiply-adds.
# - Saturation: has h stopped turning? It is the cosine between h after this layer and h after the
#   layer before. In the toy, (1, 2) and (3, 1) have lengths 2.24 and 3.16 and the cosine
#   (1 * 3 + 2 * 1) / (2.24 * 3.16) = 0.71; (3, 1) and (4, 1) have 0.997. It costs 3 D
#   multiply-adds.
# - The exit probe: a trained guess. D weights w and a number b are fitted on other stories, so that
#   1 / (1 + exp(-(w . h + b))) is near 1 where the later layers will not change the word, and near
#   0 where they will. It costs D multiply-adds.
# The table shows after which layer each token exits (8: it does not), if it may from layer 2 on. A
# token predicts the word after it, so a small number says: what follows this token is soon clear.


# %%
def exit_layers(changed, ids):
    """The layer after which each token exits, if the text is read token by token."""
    state, layers = changed.model.new_state(), []
    for token in ids:
        with counting(changed) as counts:
            changed.model.next_argmax([token], state)
        exited = [i for i in range(1, L) if counts.events[f"tokens exited after {i} layers"]]
        layers.append(exited[0] if exited else L)
    return layers


title("4. After which layer does each token exit?")
gap = exit_layers(exiting(measure="softmax", threshold=0.95, first=2), ids)
saturation = exit_layers(exiting(measure="saturation", threshold=0.95, first=2), ids)
probe = exit_layers(exiting(measure="probe", threshold=0.9, first=2), ids)
words = [lm.tokenizer.decode([token]).strip() for token in ids]
table = []
for t in range(words.index("went") - 1, len(ids)):
    table.append([words[t], gap[t], saturation[t], probe[t]])
print_table(["token", "softmax gap", "saturation", "exit probe"], table)
assert gap[words.index("park")] == 2

# %% [markdown]
# By the gap, "park" exits early: it is clear that a full stop follows. The first "the" does not
# exit: some place follows, and it could be any. Remember "park"; it will be important.

# %% [markdown]
# ## 5. A surprise: a good sign that is worse than chance
#
# A sign should be better than none. So we compare it with a random baseline, in which the sign is a
# random number between 0 and 1, different for each token and layer. With the threshold 0.9, one in
# ten checks ends in an exit, and this does about as much work as the softmax gap. Work is what is
# counted in multiply-adds, checks included, and the dense model (all tokens, all layers) is 1. The
# loss is the mean of -ln(probability of the right word), minus that of dense: 0 is as good as
# dense. Compare the last two rows first.

# %%
title("5. The softmax gap against random exits")


def measure(changed):
    """Read the held-out stories: the scores, and what the ledger counted."""
    with counting(changed) as counts:
        scores = evaluate_stories(changed, held_out)
    return scores, counts


dense, counts = measure(lm)
dense_work = counts.total().multiply_adds


def row_of(name, scores, counts):
    work, loss = counts.total().multiply_adds / dense_work, scores.mean_loss - dense.mean_loss
    accuracy = [f"{scores.accuracy[group]:.0%}" for group in GROUPS[1:]]
    return [name, f"{work:.2f}", f"{loss:+.4f}", *accuracy]


HEADINGS = ["", "work", "loss", *GROUPS[1:]]
dense_row = row_of("dense", dense, counts)
bold, bold_counts = measure(exiting(measure="random", threshold=0.7, first=2))
random, random_counts = measure(exiting(measure="random", threshold=0.9, first=2))
by_gap, gap_counts = measure(exiting(measure="softmax", threshold=0.95, first=2))
bold_row = row_of("random, threshold 0.7", bold, bold_counts)
random_row = row_of("random, threshold 0.9", random, random_counts)
gap_row = row_of("gap, threshold 0.95", by_gap, gap_counts)
print_table(HEADINGS, [dense_row, bold_row, random_row, gap_row])

for row, counts in ((bold_row, bold_counts), (random_row, random_counts), (gap_row, gap_counts)):
    share = counts.events["layers skipped"] / counts.events["skippable layers"]
    print(f"  {row[0]} skips {share:.0%} of layers 3 to 8")
assert by_gap.mean_loss > random.mean_loss and by_gap.accuracy["1 hop"] < bold.accuracy["1 hop"]

# %% [markdown]
# At the same work, the gap is far worse than chance. One reason: its checks are work, too, so to
# end up at the same amount it has to skip twice as many layers. But this cannot be all: random
# exits with the threshold 0.7 skip even more layers and still answer better. What else is wrong?

# %% [markdown]
# ## ... is it sure too early?
#
# The first suspicion: after layer 2 it is sure, and wrong. So take all tokens with a gap of at
# least 0.95 in the model that stops after layer 2. For how many does the unchanged model, after
# its last layer, say another word? (After layer 2 both have the same hidden states.)

# %%
total = sure = wrong = 0
for story in held_out:
    text = lm.encode(story.text)
    p = softmax(stop_after[1].logits(text))  # (T, V) after layer 2
    two_largest = np.sort(p, -1)[:, -2:]
    is_sure = two_largest[:, 1] - two_largest[:, 0] >= 0.95  # (T,)
    says_another = p.argmax(-1) != lm.logits(text).argmax(-1)  # (T,)
    total += len(text)
    sure += is_sure.sum()
    wrong += (is_sure & says_another).sum()
print(f"{sure:,} of {total:,} tokens are sure after layer 2; {wrong} of them are wrong.")
assert wrong / sure < 0.001

# %% [markdown]
# The suspicion is wrong. When the gap says that the word is settled, it is. Something else breaks
# the answers.

# %% [markdown]
# ## 6. What an exit leaves behind, by hand
#
# A token is not only there to predict the next word. Later tokens attend to it, in every layer: to
# its key and its value, two vectors that it left in the KV cache of that layer (tutorial 2). They
# are computed from the hidden state that enters the layer. But a token that has exited never enters
# the later layers. What should their caches hold for it? The usual way is to backfill: compute its
# keys and values for these layers from the hidden state at the exit, as if that had entered.
#
# In the toy, let the value simply be the hidden state that enters, and let the token exit after
# layer 1, with h = (1, 2). A later token reads the value in layer 3. Which word does it find?

# %%
title("6. What an exit leaves behind, by hand")
table = []
for name, h in (("real: h after layer 2", hidden[1]), ("backfilled: h after layer 1", hidden[0])):
    logits = word_rows @ h
    table.append([name, numbers(h, ".0f"), numbers(logits, ".0f"), WORDS[logits.argmax()]])
print_table(["value in layer 3", "", "logits", "the reader finds"], table)

# %% [markdown]
# The value in layer 2 is right: what enters layer 2 is h after layer 1, exit or not. From the layer
# after that on, the values are out of date.

# %% [markdown]
# ## ... and in the model
#
# In "Tom went to the park", the token "park" is sure that a full stop follows, so it exits after
# layer 2. But the later question needs to find out who went there, and perhaps it is layer 3 that
# adds this to the hidden state of "park". We can test that. Let the same tokens exit by the same
# rule, but give the cache the real keys and values: then the answers must come back. The option
# kv_fill="deferred" does it. A skipped layer is not run at the exit, but later, as soon as another
# token enters that layer and reads its cache.

# %%
title("... and in the model: is it the KV cache?")
backfilled = exiting(measure="softmax", threshold=0.95, first=2, kv_fill="copy")  # as before
deferred = exiting(measure="softmax", threshold=0.95, first=2, kv_fill="deferred")
print("Tom is in the ...")
for name, changed in (("dense", lm), ("backfilled", backfilled), ("deferred", deferred)):
    p = softmax(changed.logits(ids)[-1])[answer]
    print(f"  {name:11} probability of park {p:6.1%} {bar(p, 1)}")

by_deferred, counts = measure(deferred)
deferred_row = row_of("gap, deferred", by_deferred, counts)
from_three, counts = measure(exiting(measure="softmax", threshold=0.95, first=3))
three_row = row_of("gap, first exit after 3", from_three, counts)
print_table(HEADINGS, [dense_row, gap_row, deferred_row, three_row])
assert min(by_deferred.accuracy["1 hop"], from_three.accuracy["1 hop"]) > 0.95

# %% [markdown]
# It is the cache: with real keys and values, all answers are back. The last row is a second test.
# By section 3, layer 4 finds the one-hop answers. Its keys and values are made from h after layer
# 3. If no token exits before that, they are all real, so these answers should be right. And they
# are.
#
# So a token may be easy for itself and needed by others. Random exits spoil the cache as well, but
# after layer 2 they take one token in ten. The gap takes half of all tokens, and always the same:
# the place at the end of a fact is among them, because a full stop is sure to follow.
#
# Deferring is no bargain here. As soon as one token runs all layers, it takes along all earlier
# ones that had been deferred. Hardly a layer is saved in the end, and the checks come on top.

# %% [markdown]
# ## 7. The price in multiply-adds
#
# The cheaper cure: every token runs 4 layers, and only then may exit. Are the signs worth their
# price now? We ask for the loss of random exits at the same work. For that we measure three random
# baselines (and dense, with loss 0), and draw a straight line between neighbouring ones. Compare
# the last two columns.

# %%
title("7. First exit after layer 4: loss, and that of random exits at the same work")
random_work, random_loss = [1.0], [0.0]
for threshold in (0.9, 0.7, 0.5):
    scores, counts = measure(exiting(measure="random", threshold=threshold, first=4))
    random_work.append(counts.total().multiply_adds / dense_work)
    random_loss.append(scores.mean_loss - dense.mean_loss)

MODELS = {
    "softmax gap": exiting(measure="softmax", threshold=0.95, first=4),
    "saturation": exiting(measure="saturation", threshold=0.95, first=4),
    "exit probe": exiting(measure="probe", threshold=0.9, first=4),
}
table, better = [], []
for name, changed in MODELS.items():
    scores, counts = measure(changed)
    work, loss = counts.total().multiply_adds / dense_work, scores.mean_loss - dense.mean_loss
    by_chance = np.interp(work, random_work[::-1], random_loss[::-1])  # wants rising work
    three_hops = f"{scores.accuracy['3 hops']:.0%}"
    table.append([name, f"{work:.2f}", three_hops, f"{loss:+.4f}", f"{by_chance:+.4f}"])
    better.append(loss < by_chance)
print_table(["sign", "work", "3 hops", "loss", "loss of random"], table)
assert all(better)
# Now all three beat chance. The gap saves least of the three, because its checks are expensive:
layer_work = 2 * c.width * (c.heads + c.kv_heads) * c.head_width + 3 * c.width * c.hidden
gap_work = c.vocab_size * c.width
print(f"multiply-adds: a layer {layer_work:,} (without attention to the cache), a gap {gap_work:,}")

# %% [markdown]
# A token that never exits pays for four checks, after layers 4 to 7: nearly three layers of work.

# %% [markdown]
# ## 8. The price in time
#
# Multiply-adds that are left out are not yet time. We read 60 tokens one after the other, as in
# generating text, and measure all four models in one run. A number above 1 is faster than dense.

# %%
title("8. Speed, token by token (dense = 1)")
text = lm.encode(held_out[0].text)[:60]


def reader(changed):
    def read():
        state = changed.model.new_state()
        for token in text:
            changed.model.next_argmax([token], state)

    return read


names = ["dense", *MODELS]
seconds = time_side_by_side(reader(lm), *map(reader, MODELS.values()), repeats=3)
for name, time in zip(names, seconds):
    print(f"  {name:12} {seconds[0] / time:.2f} {bar(seconds[0] / time, 2)}")

# %% [markdown]
# The gap gains nothing: its checks take the time that its exits save, and with a larger vocabulary
# they would take more. The two cheap signs are faster than dense, in most runs by less than the
# multiply-adds promise (1 / 0.68 = 1.47 and 1 / 0.74 = 1.35). A check and a backfill are small
# products, and for those NumPy needs about as long to be called as to compute.

# %% [markdown]
# ## 9. Is the threshold safe, or were we lucky?
#
# We chose thresholds by looking at some stories, and may have been lucky with them. How likely is
# such luck? Suppose a bad threshold ruins one story in ten. On n stories we may by luck see only
# good ones: with probability 0.9^n. This is the p-value: if the threshold were bad, how likely
# would we see what we saw? If it is below 5%, we say that the threshold is safe.

# %%
title("9. A threshold with a guarantee: Learn then Test")
DELTA, LIMIT = 0.1, 0.05  # what is bad, and how much luck we accept: chosen before we look
for n in (10, 20, 30):
    print(f"  {n} good stories in a row: p = 0.9^{n} = {(1 - DELTA) ** n:.3f}")

# %% [markdown]
# With 10 stories nothing can be shown, however good they are. It takes 29.

# %% [markdown]
# ## ... if some words do change
#
# Now each story gets a number between 0 and 1, its changed words: the share of its words that are
# not those of the dense model. (The paper of this method calls it a loss.) A threshold is bad if
# the true mean of changed words is delta = 10% or more. On n stories we find the mean r. How likely
# is a mean of r or less, if the threshold is bad? Hoeffding's inequality (in its sharper form, with
# the KL divergence) says that for r below delta the p-value is at most
#
#     exp(-n KL)   with   KL = r ln(r / delta) + (1 - r) ln((1 - r) / (1 - delta))
#
# For r = 0 that is (1 - delta)^n, as above. The further r is below delta, the larger is KL.


# %%
def p_value(r, n):
    if r >= DELTA:
        return 1.0
    first = r * np.log(r / DELTA) if r > 0 else 0.0
    return np.exp(-n * (first + (1 - r) * np.log((1 - r) / (1 - DELTA))))


means = (0.01, 0.02, 0.03, 0.04)
row = ["p-value at most", *(f"{p_value(r, 80):.3f}" for r in means)]
print_table(["changed words in 80 stories", *(f"{r:.0%}" for r in means)], [row])

# %% [markdown]
# So with 80 stories, a mean of 2% changed words is low enough to call a threshold safe, and 3% is
# not.

# %% [markdown]
# ## ... a threshold that passes, and one that fails
#
# We test thresholds of the exit probe on 80 new stories (the probe was trained on the first 24),
# from the safest threshold to the boldest, and stop at the first that fails. Why stop? Each bad
# threshold has a chance of up to 5% to pass by luck. Testing 20 bad ones, you are
# fooled by at least one of them with a probability of up to 1 - 0.95^20 = 64% (if their tests were
# independent).
# Of each story we take the first 64 tokens, so that all fit into one array; the guarantee is for
# these.

# %%
fresh = np.array([lm.encode(story.text)[:64] for story in calibration_stories(104)[24:]])
dense_words = lm.logits(fresh).argmax(-1)  # (80, 64) all stories at once
table, safe = [], None
for threshold in (0.9, 0.8, 0.7, 0.6):
    changed = exiting(measure="probe", threshold=threshold, first=4)
    changed_words = (changed.logits(fresh).argmax(-1) != dense_words).mean(1)  # (80,)
    r = changed_words.mean()
    p = p_value(r, len(fresh))
    table.append([threshold, f"{r:.1%}", f"{p:.4f}", "passes" if p <= LIMIT else "fails: stop"])
    if p > LIMIT:
        break
    safe = changed
print_table(["threshold", "changed words", "p-value", ""], table)
assert safe is not None and p > LIMIT
assert hoeffding_bentkus(r, len(fresh), DELTA) <= p  # of minitx: the smaller one of two bounds

# %% [markdown]
# ## ... and what has been shown
#
# One more look at the last threshold that passed, on stories that had no part in the choice (again
# their first 64 tokens):

# %%
others = np.array([lm.encode(story.text)[:64] for story in held_out])
share = (safe.logits(others).argmax(-1) != lm.logits(others).argmax(-1)).mean()
print(f"{share:.1%} of the words in held-out stories change.")
assert share < DELTA

# %% [markdown]
# The threshold that failed may be safe, too: with 80 stories it could not be shown. And what has
# been shown is true of the mean, over stories like these. It says nothing about a single story, and
# little about answers, which are few among the words. (The method is called Learn then Test;
# minitx.lab.learn_then_test.calibrate does what the last two cells do, for any technique.)

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 12`: Early exit
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/04_knowing_when_to_stop.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 1, change the last row of `hidden` to (1, 4), so that layer 3 says "kitchen". Which
#    thresholds on the gap would let the token exit with "park"?
# 2. In section 6, set first=1 in the two lines that make `backfilled` and `deferred`. (In the
#    table, the row "gap, threshold 0.95" stays that of first=2.) Does deferring bring back the
#    answers, and the loss? Predict before you try. Why is the loss larger than with first=2,
#    although the cache is right? To find out, put stop_after[0] into the last cell of section 5.
# 3. A check costs V D, a layer about 12 D^2. From which V on does a check cost more than a layer if
#    D = 4096? Then, in section 7, add every=2 (check after every other layer only) to the random
#    exits and to all three of MODELS. Does the gap save more or less than before?
# 4. In section 9, set DELTA = 0.01. How many stories without any change does it take now? And how
#    many if 0.5% of the words change? (Its first two cells are enough; 80 stories no longer are.)
