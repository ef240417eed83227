# %% [markdown]
"""Tutorial 13: which heads matter? A layer of our model has four attention heads. What does each of
them do, and can some of them go?

We look at what single heads attend to, ask the gradient which of them the loss depends on, and
remove heads to see whether it was right, as Michel et al. did ("Are Sixteen Heads Really Better
than One?", 2019). Then we ask whether each token should have heads of its own (MoH, 2025).

Letters: L layers with H query heads each, K key/value heads (H / K query heads share one of them),
D width (a token is D numbers between two layers), d width of a head, T tokens, S cached tokens.
"""

# %% [markdown]
# ## The model

# %%
from collections import Counter

import numpy as np
from helpers import (
    QUESTION,
    STORY,
    answers_in,
    bar,
    calibration_stories,
    count_last,
    decode_last,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    save_picture,
    shade,
    time_side_by_side,
    title,
)

from minitx.ledger import counting
from minitx.model import split_heads
from minitx.precompute.head_prune import gated, importance, lowest, text_loss, without_heads
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.autograd import grad_of

lm = load_stories()
c = lm.model.config
L, H, K, D, d = c.layers, c.heads, c.kv_heads, c.width, c.head_width

# %% [markdown]
# ## 1. Two heads and two texts, by hand
#
# Each head fetches something from other tokens and writes a vector; the layer adds these vectors
# up. So a head can be left out: one term of a sum is missing. To ask how much the loss depends on
# it, put a gate in front of it, a factor that is 1 in the model as it is and 0 without the head.
#
# Our toy has a width of 1. Head A writes 2 and head B writes 1, so the output is y = 2 a + 1 b,
# with gates a and b. The loss of a text is half of the squared error, (y - target)^2 / 2, and its
# derivative with respect to a is (y - target) * 2. Now look at the last two columns: for each text,
# the derivatives of its loss with respect to a and to b, with both gates at 1.

# %%
title("1. Two heads and two texts")
writes = np.array([2, 1])  # what head A and head B write
targets = np.array([2, 4])  # of text 1 and text 2


def toy_losses(gates):
    """(2,): the loss of each text."""
    return (gates @ writes - targets) ** 2 / 2


y = writes.sum()  # both gates are 1
derivatives = (y - targets)[:, None] * writes  # (texts, heads)
table = []
for text in range(2):
    loss = toy_losses(np.array([1, 1]))[text]
    table.append([text + 1, targets[text], y, y - targets[text], loss, *derivatives[text]])
print_table(["text", "target", "y", "error", "loss", "dloss/da", "dloss/db"], table)

# %% [markdown]
# They cancel. A little more of head A would make text 1 worse and text 2 better, by as much. In a
# trained model that has to be so, for each head: if the mean over the texts were not 0, a little
# more (or less) of this head would lower the mean loss, and training would have done that.

# %% [markdown]
# ## ... the mean of what?
#
# So in the toy, the mean of the derivatives tells nothing: it is 0 for both heads. Michel et al.
# take the absolute value first, text by text, and then the mean. Compare both with the last column:
# how much the mean loss rises when the head is removed.

# %%
table, toy_cost = [], []
for head in range(2):
    gates = np.array([1, 1])
    gates[head] = 0
    toy_cost.append(toy_losses(gates).mean() - toy_losses(np.array([1, 1])).mean())
    slope = derivatives[:, head]
    means = f"{slope.mean():.1f}", f"{abs(slope).mean():.1f}"
    table.append(["AB"[head], *means, f"{toy_cost[head]:+.1f}"])
print_table(["head", "mean", "mean of |...|", "loss without it"], table)
assert toy_cost == [2.0, 0.5]

# %% [markdown]
# The mean of the absolute values puts A before B, which is right. It is called the importance of a
# head. It is not the rise of the loss itself (1 for B, where the loss rises by 0.5): a derivative
# says what a small change of the gate does, and from 1 to 0 is not small. What we hope for is the
# right order.

# %% [markdown]
# ## 2. What do the heads of our model look at?
#
# `look` runs a text through the layers, as in tutorial 1, and gives what each token attends to, and
# the lengths of its queries, which we need in section 5.


# %%
def look(ids):
    """Attention weights (L, H, T, T), and lengths of the queries (L, H, T)."""
    x, T = lm.model.embed(ids, None), len(ids)
    causal_mask = np.triu(np.ones((T, T), bool), 1)
    weights, lengths = [], []
    for block in lm.model.stack.blocks:
        attn = block.attn
        cache = Layer.once(T)  # an empty cache for T tokens
        normed = attn.norm(x)
        q = attn.rope(split_heads(attn.qkv.q(normed), H), cache.tokens)  # (H, T, d)
        k = attn.rope(split_heads(attn.qkv.k(normed), K), cache.tokens)  # (K, T, d)
        scores = q @ k.repeat(H // K, 0).swapaxes(1, 2) / np.sqrt(d)
        scores[:, causal_mask] = -np.inf
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        weights.append(exponentials / exponentials.sum(-1, keepdims=True))
        lengths.append(np.linalg.norm(q, axis=-1))
        x = block(x, cache)
    return np.stack(weights), np.stack(lengths)


# %% [markdown]
# ## ... one fact
#
# The text ends with "Tom is in the", and the next word should be "park". For each head of each
# layer: which word does the last token attend to most? (A word that occurs twice counts with both
# weights; "-" means that no word gets half of the attention.) To answer, the model has to notice
# that the question is about Tom, and to look up where he is. Which heads do that?

# %%
title("2. What the last token looks at, in each head")


def main_words(text):
    """(L, H) strings: the word to which the last token of a text attends most."""
    ids = lm.encode(text)
    words = ["(start)", *(lm.tokenizer.decode([token]).strip() for token in ids[1:])]
    weights, _ = look(ids)
    found = np.full((L, H), "-", object)
    for layer, head in np.ndindex(L, H):
        totals = dict.fromkeys(words, 0)
        for word, weight in zip(words, weights[layer, head, -1]):
            totals[word] += weight
        word = max(totals, key=totals.get)
        if totals[word] >= 0.5:
            found[layer, head] = f"{word} {totals[word]:.0%}"
    return found


def print_heads(found, layers):
    rows = [[layer, *found[layer - 1]] for layer in layers]
    print_table(["layer", *(f"head {head}" for head in range(1, H + 1))], rows)


one_fact = main_words(STORY + QUESTION)
print_heads(one_fact, range(1, L + 1))
assert one_fact[2, 3].startswith("Tom") and one_fact[3, 3].startswith("park")

# %% [markdown]
# Head 4 of layer 3 fetches "Tom", and in the next layer heads 1 and 4 look at "park". (So does head
# 1 of layer 2, but it does not know yet what the question is about: it takes the newest place.)

# %% [markdown]
# ## ... how can they know which of the places?
#
# The word "garden" is also there, and "kitchen". What does the token "park" itself attend to? We
# end the text there, and print only layer 3.

# %%
print('\nIn layer 3, the token "park" of "Tom went to the park" looks at:')
park = main_words(STORY.removesuffix("."))
print_heads(park, [3])
assert park[2, 2].startswith("Tom") and park[2, 3].startswith("Tom")

# %% [markdown]
# Heads 3 and 4 of layer 3 look at "Tom". So after layer 3, the token "park" knows that it is the
# place of Tom, and the last token knows that the question is about Tom. Layer 4 brings the two
# together: the query of the last token is like the key of "park".

# %% [markdown]
# ## ... two facts
#
# A ball was put down with a person, and the question is where the ball is. First the model has to
# find the person, and then the place. We ask it twice: the ball is with Tom, then it is with Anna,
# who is in the kitchen. Only layers 2 to 6 are printed. What is the same in both, and what changes?

# %%
facts = {}
for person in ("Tom", "Anna"):
    ball = f" A ball was put down with {person}. Where is the ball? The ball is still there in the"
    answer = lm.tokenizer.decode([lm.model.next_argmax(lm.encode(STORY + ball))]).strip()
    print(f"\nThe ball is with {person}. The model says: {answer}")
    facts[person] = main_words(STORY + ball)
    print_heads(facts[person], range(2, 7))
    assert facts[person][2, 0].startswith(person) and facts[person][4, 0].startswith(answer)

# %% [markdown]
# Head 4 of layer 3 fetches what the question is about, as before: the ball. Head 1 of the same
# layer looks at the person who has it, head 1 of layer 5 and head 2 of layer 6 at the place of that
# person. So heads have jobs, and a chain of facts is followed from layer to layer. (Not all that we
# see makes sense: head 4 of layer 4 looks at Tom even if Anna has the ball.) Many heads look at
# "park". Are all of them needed? Where a head looks does not show it; removing the head does.

# %% [markdown]
# ## 3. The importance of all 32 heads
#
# Section 1 in our model: a gate in front of each head (`gated`), and the gradient of the loss with
# respect to all gates. `grad_of` runs a text forward and then backward, and gives the derivatives
# with respect to all 32 gates at once. We do this for 12 texts, and take the mean in both ways. (Of
# the plain mean we take the absolute value.)

# %%
title("3. Importance, and the loss without each head")
ones = np.ones((L, H), np.float32)


def slopes_of(ids):
    """(L, H): the derivative of one text's loss with respect to the gate of each head."""

    def loss(*gates):
        return text_loss(gated(lm, gates), ids)

    _, slopes = grad_of(loss, *ones)  # one argument for each layer: its H gates
    return np.array(slopes)


texts = [lm.encode(story.text) for story in calibration_stories(12)]
slopes = np.array([slopes_of(ids) for ids in texts])  # (texts, L, H)
by_importance = abs(slopes).mean(0)
by_plain_mean = abs(slopes.mean(0))

# %% [markdown]
# ## ... and the truth
#
# Now each of the 32 heads is removed, one at a time, and the model is judged on stories that it was
# not trained on: those of the first ten in which some answer takes three hops. (Hops are the facts
# that have to be put together for an answer: one for Tom, two for the ball.)

# %%
held_out, questions = [], Counter()
for story in held_out_stories(10):
    hops = [hops for _, _, hops in answers_in(lm, [story])]
    if "3 hops" in hops:
        held_out.append(story)
        questions.update(hops)
GROUPS = ("1 hop", "2 hops", "3 hops")
with counting(lm) as counts:
    dense = evaluate_stories(lm, held_out)
dense_work = counts.total().multiply_adds


def right(scores):
    return [f"{scores.accuracy[group]:.0%}" for group in GROUPS]


loss, one_hop = np.zeros((L, H)), np.zeros((L, H))
for layer, head in np.ndindex(L, H):
    alive = np.ones((L, H), bool)
    alive[layer, head] = False
    scores = evaluate_stories(without_heads(lm, alive), held_out)
    loss[layer, head] = scores.mean_loss - dense.mean_loss
    one_hop[layer, head] = scores.accuracy["1 hop"]

# %% [markdown]
# ## ... side by side
#
# A row is a layer, and the four characters of a map are its heads 1 to 4. Darker means a higher
# rank among all 32 ("@" are the first three, "." the last four). The first map is by importance,
# which takes one forward and one backward pass of each text; the second is by the rise of the loss
# without the head, which takes 32 forward passes of each. Do they look alike? Then there is the
# largest rise in the layer, and the last column has the answers with one hop that are right without
# head 1, 2, 3 or 4. (The dense model has all of them right.)


# %%
def ranks(scores):
    """(L, H): the rank of each head among all, from 0 for the lowest."""
    return scores.ravel().argsort().argsort().reshape(L, H)


def rank_correlation(a, b):
    """1: the same order. 0: no relation. -1: the opposite order."""
    return np.corrcoef(ranks(a).ravel(), ranks(b).ravel())[0, 1]


table = []
for layer in range(L):
    maps = [shade(ranks(scores)[layer] / (L * H)) for scores in (by_importance, loss)]
    worst = f"{loss[layer].max():+.4f}"
    table.append([layer + 1, *maps, worst, " ".join(f"{share:5.0%}" for share in one_hop[layer])])
headings = "layer", "rank by importance", "rank by loss", "largest rise", "1 hop without the head"
print_table(headings, table)
for name, scores in (("importance", by_importance), ("plain mean", by_plain_mean)):
    print(f"Rank correlation of the loss with the {name}: {rank_correlation(scores, loss):.2f}")
print(f"Head 4 of layer 3: loss {loss[2, 3]:+.4f}. Head 3 of layer 1: {loss[0, 2]:+.4f}.")
print(f"Questions: {', '.join(f'{questions[group]} with {group}' for group in GROUPS)}.")


def draw(axes):
    for layer in range(L):
        shown = np.maximum(loss[layer], 1e-4)
        axes.scatter(by_importance[layer], shown, color=f"C{layer}", label=f"layer {layer + 1}")
        for head in range(H):
            axes.annotate(f" {head + 1}", (by_importance[layer, head], shown[head]))
    axes.loglog()
    axes.set(xlabel="importance of the head", ylabel="loss without it (shown: 0.0001 or more)")
    axes.legend()


save_picture("13_importance_and_loss", draw)
assert rank_correlation(by_importance, loss) > 0.7 > rank_correlation(by_plain_mean, loss)
assert loss[0].min() > 10 * loss[4:].max() and by_importance[:4].mean() > by_importance[4:].max()
assert one_hop[2, 3] < 0.75 and loss[2, 3] < 0.2 * loss[0, 2] and one_hop[5, 1] > 0.95

# %% [markdown]
# The order is about right: heads of layers 1 to 4 matter, those of layers 5 to 8 hardly. The plain
# mean is further off. It still correlates (0.53), since over 12 texts the mean is not exactly 0,
# and what is left tends to be larger for heads with large derivatives.
#
# But look at layer 3. In section 2, head 3 took "Tom" to the place, and head 4 took "Tom" to the
# place and to the question. Without head 4, 48% of the one-hop answers are wrong. Yet the loss
# rises far less than without head 3 of layer 1: most words of a story have nothing to do with a
# question, and the loss is a mean over all of them. Importance is made from the loss, so it cannot
# see that either. And head 2 of layer 6, which looks at "park", is not missed at all: others look
# there, too.

# %% [markdown]
# ## 4. Without many heads
#
# If others stand in for a head, those others may not go as well. So Michel et al. remove heads in
# rounds, and before each round they measure the importance of the heads that are left again. Here a
# round removes six of the 32 heads (but never the last one of a layer). What is removed is gone:
# its columns of the query matrix, its rows of the output matrix, and a key/value head goes with the
# last query head that reads it. The technique `head_prune` does all this.

# %%
title("4. Without n of 32 heads")
everything = np.ones((L, H), bool)


def remove(alive, heads):
    alive = alive.copy()
    for layer, head in heads:
        alive[layer, head] = False
    return alive


at_once = {}
for n in (6, 12, 18):
    at_once[n] = remove(everything, lowest(by_importance, everything, n))
in_rounds = {6: remove(everything, lowest(by_importance, everything, 6))}
for n in (12, 18):
    left = in_rounds[n - 6]
    scores = np.array(importance(lm, left, texts))
    in_rounds[n] = remove(left, lowest(scores, left, 6))

print(f"heads left in layers 1 to {L}")
for n in (12, 18):
    print(f"  {n} removed, in rounds:", *in_rounds[n].sum(1), "  at once:", *at_once[n].sum(1))

# %% [markdown]
# ## ... what it costs
#
# We compare the rounds with two others: all heads at once, by the importances of section 3, and
# random heads. Look at the loss and at the answers, which need not agree. Work is multiply-adds,
# dense = 1.


# %%
def measure(changed):
    """The loss minus that of dense, the answers in per cent, and the multiply-adds."""
    with counting(changed) as counts:
        scores = evaluate_stories(changed, held_out)
    return scores.mean_loss - dense.mean_loss, right(scores), counts.total().multiply_adds


table = []
rises = {}
for n in (6, 12, 18):
    random = {"choose": "random", "share": n / (L * H)}
    for name, changed in (
        ("in rounds", without_heads(lm, in_rounds[n])),
        ("at once", without_heads(lm, at_once[n])),
        ("random", apply(lm, {"head_prune": random})),
    ):
        rises[name, n], answers, work = measure(changed)
        row = [n, name, f"{work / dense_work:.2f}", f"{rises[name, n]:+.4f}"]
        table.append([*row, *answers])
print_table(["n", "", "work", "loss", *GROUPS], table)
assert rises["in rounds", 12] < 0.02 and rises["random", 6] > 10 * rises["in rounds", 12]
assert rises["in rounds", 18] > 0.1

# %% [markdown]
# Twelve heads can go, three from each of layers 5 to 8, and all answers are still right. Then those
# layers have one head each, and what goes next is missed. At 18, the rounds have the higher loss
# and the better answers: they left two heads in layers 3 and 4, where facts are looked up, and took
# some of layers 1 and 2 instead. Random heads hit layer 1 early.
#
# Tutorial 12 found the same of whole layers: the last four are hardly missed. Our model was trained
# with LayerSkip's layer dropout: layers left out at random, late ones most often. Other models have
# less to spare.

# %% [markdown]
# ## 5. Other heads for each token
#
# So far a head is there for all tokens or for none. But head 4 of layer 3 is needed where a
# question is answered, and perhaps nowhere else. MoH (mixture of heads) lets each token run its own
# heads. To select them, it takes something that is known before attention: the length of the query.
# Why? A score is the product of query and key, so a query that is twice as long makes all scores
# twice as large, and the attention weights sharper. Take three keys that have the scores 1, 0 and 0
# with a query of length 1. How much weight does the first key get from a longer query?

# %%
title("5. The length of a query, and its attention weights")
for length in (0, 1, 4):
    exponentials = np.exp(length * np.array([1, 0, 0]))
    print(f"length {length}: weights {(exponentials / exponentials.sum()).round(2)}")

# %% [markdown]
# A query of length 0 gets the plain average of all values. So where the query of a head is short,
# the head is not looking for anything in particular, and the token may do without it. That is the
# idea; we will see what it costs.

# %% [markdown]
# ## ... in the model
#
# `look` has the lengths of all queries. Let each token leave out one head of each layer, that with
# the shortest query. Below, a row is a token of the question, a column is a layer, and the digit is
# the head that the token leaves out there. Then for each layer: of all tokens, how many leave out
# the head that is left out most? If they all agreed, it would be 100%.

# %%
ids = lm.encode(STORY + QUESTION)
_, lengths = look(ids)
left_out = lengths.argmin(1)  # (L, T)
print("\nThe head that each token leaves out:")
print("  layer  ", *range(1, L + 1))
for t in range(len(lm.encode(STORY)), len(ids)):
    print(f"  {lm.tokenizer.decode([ids[t]]).strip():7}", *(left_out[:, t] + 1))
most = [np.bincount(heads).max() / len(ids) for heads in left_out]
print("  the same head:", ", ".join(f"{share:.0%}" for share in most))
rare = np.sum(left_out[2] == 3)
print(f"  head 4 of layer 3 is left out by {rare} of {len(ids)} tokens")
assert rare < 6 and max(most[:5]) < 0.6

# %% [markdown]
# The tokens differ, above all in layers 1 to 5. And hardly any leaves out head 4 of layer 3, which
# we know to be needed: its queries are long.

# %% [markdown]
# ## ... beside the same heads for all tokens
#
# The technique is `head_router`. In the layers after the first few (`first`), each token runs a
# share of the heads (`active`), here half of them. There are two baselines: random heads for each
# token, and the same heads for all tokens, where each layer loses its two least important ones. We
# do this in layers 3 to 8, and then in layers 5 to 8. Where does it help to look at each token?

# %%
table = []
for first in (2, 4):
    same = everything.copy()
    for layer in range(first, L):
        same[layer, by_importance[layer].argsort()[: H // 2]] = False
    options = {"first": first, "active": 0.5}
    for name, changed in (
        ("longest queries", apply(lm, {"head_router": options})),
        ("random", apply(lm, {"head_router": options | {"choose": "random"}})),
        ("the same for all", without_heads(lm, same)),
    ):
        rises[name, first], answers, work = measure(changed)
        row = [f"{first + 1} to {L}", name, f"{work / dense_work:.2f}"]
        table.append([*row, f"{rises[name, first]:+.4f}", *answers])
print()
print_table(["in layers", "heads that run", "work", "loss", *GROUPS], table)
assert rises["longest queries", 2] < 0.7 * rises["the same for all", 2] < rises["random", 2]
assert max(rises[name, 4] for name in ("longest queries", "random", "the same for all")) < 0.02

# %% [markdown]
# Where layers 3 and 4 take part, it helps a lot: half of the heads give nearly all answers. In
# layers 5 to 8 any heads will do. But "the same for all" saves more work, since the router needs
# the queries of all heads to select some, and keys and values of all heads for later tokens. And if
# heads may be taken from any layer, section 4 has a lower loss with less work. (MoH trains the
# model with its router, which we have not done.)

# %% [markdown]
# ## 6. Two more, by SpAtten
#
# `head_cascade` decides which heads run in later layers: it adds up how large the outputs of heads
# 1, 2, 3 and 4 were so far, and from layer 5 on leaves out those with the smallest sums, one more
# in each layer until one is left. It decides for all tokens that run together, here those of a
# story.
# `value_prune` decides which values are read: of each query and head the 35% with the largest
# attention weights. All scores are still computed.

# %%
title("6. head_cascade and value_prune")
table = []
for name, technique in (
    ("head_cascade", {"head_cascade": {}}),
    ("... random heads", {"head_cascade": {"choose": "random"}}),
    ("value_prune", {"value_prune": {}}),
):
    rises[name], answers, work = measure(apply(lm, technique))
    table.append([name, f"{work / dense_work:.2f}", f"{rises[name]:+.4f}", *answers])
print_table(["", "work", "loss", *GROUPS], table)
assert max(rises["head_cascade"], rises["... random heads"], rises["value_prune"]) < 0.02

# %% [markdown]
# All three cost little. With random heads the loss rises twice as much as with those of the cascade
# (0.0046 against 0.0021), but both are small, and the answers are the same: in these layers any
# heads will do. And that head 1 of one layer wrote little says nothing about head 1 of the next,
# which has other weights.

# %% [markdown]
# ## 7. The price, in counts
#
# One token after 511 others. A query head has 2 D d weights (its parts of the query matrix and of
# the output matrix) and takes as many multiply-adds for them, and 2 S d more: d for each score, d
# for each value. A key/value head has 2 D d weights and adds 2 d numbers to the cache for each
# token. Which of the techniques saves all three: multiply-adds, weights and cache?

# %%
title(f"7. The price of one token after {c.context - 1} others")
models = {
    "dense": lm,
    "12 heads removed": without_heads(lm, in_rounds[12]),
    "head_router": apply(lm, {"head_router": {}}),
    "head_cascade": apply(lm, {"head_cascade": {}}),
    "value_prune": apply(lm, {"value_prune": {}}),
}
long_text = []
for story in held_out_stories(6):
    long_text += lm.encode(story.text)
long_text = long_text[: c.context]
S, counts, table = c.context, {}, []
for name, model in models.items():
    one = counts[name] = count_last(model, long_text).total()
    table.append([name, one.multiply_adds, one.weight_bytes, one.cache_bytes])
print_table(["", "multiply-adds", "weight bytes read", "cache bytes read"], table)

blocks = models["12 heads removed"].model.stack.blocks
key_heads = L * K - sum(block.attn.kv_heads for block in blocks)
print(f"With the 12 query heads, {key_heads} of {L * K} key/value heads went.")
saved = counts["dense"].multiply_adds - counts["12 heads removed"].multiply_adds
assert saved == 12 * (2 * D * d + 2 * S * d) + key_heads * 2 * D * d

# %% [markdown]
# Removing heads saves all three, and also the memory of the weights and of the cache. The others
# read fewer weights or less of the cache for this token, but have to keep all of it: the next token
# may want another head or another value.

# %% [markdown]
# ## ... and in time

# %%
steps = [decode_last(model, long_text) for model in models.values()]
best = time_side_by_side(*steps, repeats=10)
print("Speed of this token (dense = 1):")
for name, seconds in zip(models, best):
    print(f"  {name:16}  {best[0] / seconds:.2f} {bar(best[0] / seconds, 2)}")

# %% [markdown]
# What is decided while the model runs takes many small NumPy calls, and they cost more than they
# save in a model of this size. Heads that are removed beforehand cost nothing.

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 19`: Head importance
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/13_which_heads_matter.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 1, let head B write -1. Find the derivatives on paper. What would training do with
#    the two gates? Head B has an importance of 2: why does the loss fall without it?
# 2. In section 2, ask for three facts: print_heads(main_words(STORY + more), range(2, 7)) with
#    more = " A box was put down with Tom. A coin was put in the box, and it was pink. Where is the
#    coin? The coin is still there in the" (on one line). Which word does head 4 of layer 3 look at
#    now? Which head has found Tom?
# 3. In section 4, take the heads for at_once by the measured loss: lowest(loss, everything, n). It
#    is the truth about single heads (but it was measured on the very stories that judge it). Is it
#    better for 12 of them, and for 18? Then take by_plain_mean instead of loss.
# 4. In section 5, let the router begin in layer 1 and leave out one head of four: (0,) instead of
#    (2, 4), [:1] for `same`, and "active": 0.75. (Delete the two assertions after the table.) How
#    do the three compare now?
