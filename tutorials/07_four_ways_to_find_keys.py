# %% [markdown]
"""Tutorial 7: four more ways to find the keys that matter. Which finds the best ones, and at what
price?

Tutorial 6 showed that a token can do with a fraction of the keys before it, if they are the right
ones, and one way to find them: ELSA compares the signs of random projections. Four other papers
had four other ideas. Here is each in one small example, and then all of them in the same model.

Letters: a query q (d numbers) sees S keys (d numbers each); its score for a key is their product
q . key. x is what queries and keys are made of: D numbers for each of T tokens.
"""

# %% [markdown]
# ## Four keys, and what we want to know

# %%
import numpy as np
from helpers import (
    decode_last,
    evaluate_stories,
    held_out_stories,
    load_stories,
    print_table,
    say,
    time_side_by_side,
    title,
)

import minitx
from minitx.lab.frontier.attention_baselines import baseline
from minitx.ledger import counting

# %% [markdown]
# One query and four keys of three columns. The exact scores take 4 * 3 products. Keys 0 and 2 have
# large scores; the others will get nearly no weight. How can one see that with less work?

# %%
q = np.array([2.0, -1.0, 1.0])
keys = np.array([[3.0, 1.0, 0.0], [-2.0, 0.0, 1.0], [1.0, -3.0, -1.0], [0.0, 2.0, -2.0]])
scores = keys @ q
weights = np.exp(scores) / np.exp(scores).sum()
print("scores ", scores)
print("weights", weights.round(3))

# %% [markdown]
# ## 1. A3: the largest products first
#
# (Ham et al., HPCA 2020.) A score is a sum of d products, one for each column: q[j] * key[j]. A key
# with a large score has large products somewhere. So A3 looks at the most extreme products of all
# keys, the largest and the smallest in turn, and adds them up key by key. Here are all twelve:

# %%
title("1. A3: the largest products first")
table = []
for i in range(4):
    row = [f"{product:.0f}" for product in keys[i] * q + 0.0]
    table.append([f"key {i}", *row, f"{scores[i]:.0f}"])
print_table(["products", "column 0", "column 1", "column 2", "score"], table)

# %% [markdown]
# How to find the extreme ones without multiplying all? Keep each column of the keys sorted, before
# there is any query. Then the largest product of a column is at one end (if q[j] > 0, the end of
# the largest numbers) and the smallest at the other. To find the next largest of all, compare d
# products, one for each column.

# %% [markdown]
# ## ... from both ends of sorted columns
#
# One turn takes the largest product that is left, and then the smallest. Without the second, keys
# with one large product and many negative ones would look good. (The smallest is left out while the
# sum of all that was added is negative: otherwise, when most products are negative, no key would
# end above 0. Here that never happens.)


# %%
def greedy_search(q, keys, M, show=False):
    """The sum for each key, after M turns."""
    S, d = keys.shape
    ascending = keys.argsort(0, kind="stable")  # (S, d): in each column, the keys in order
    best_first = np.where(q > 0, ascending[::-1], ascending)  # ... in order of their products
    column = np.arange(d)
    first, last = np.zeros(d, int), np.full(d, S - 1)  # what is left in each column
    sums, running = np.zeros(S), 0.0
    for _ in range(M):
        ends = best_first[first, column]  # for each column, the key with the largest product left
        j = (q * keys[ends, column]).argmax()
        product = max(q[j] * keys[ends[j], j], 0.0)  # add only if positive
        sums[ends[j]] += product
        running += product
        first[j] += 1
        if show:
            print(f"  largest:  {product:+.0f} in column {j}, added to key {ends[j]}: {sums}")
        if running < 0:
            continue  # leave out the smallest
        ends = best_first[last, column]
        j = (q * keys[ends, column]).argmin()
        product = min(q[j] * keys[ends[j], j], 0.0)  # add only if negative
        sums[ends[j]] += product
        running += product
        last[j] -= 1
        if show:
            print(f"  smallest: {product:+.0f} in column {j}, added to key {ends[j]}: {sums}")
    return sums


sums = greedy_search(q, keys, 2, show=True)
print("keys with a sum above 0 are kept:", np.flatnonzero(sums > 0))
assert np.flatnonzero(sums > 0).tolist() == [0, 2]

# %% [markdown]
# Four products were added, and the right keys found. (To find the four, one needs the products at
# the six ends of the columns, and after each that is taken the next one of its column. Here that is
# nearly all twelve; with hundreds of keys it is few.) Exact scores and softmax follow for the keys
# that are kept, as in all these techniques: the search only decides which keys take part.

# %% [markdown]
# ## 2. Predictive attention: scores in few bits
#
# (Chen et al., AICAS 2022; only its abstract is public, so this is our reconstruction.) To tell
# large scores from small ones, rough numbers will do. Write each vector as integers from -3 to 3,
# which take 3 bits, times a scale of its own: its largest |number| divided by 3. Products of such
# integers are cheap in hardware.

# %%
title("2. Predictive attention: scores in 3 bits")
q_scale = np.abs(q).max() / 3
q_code = np.rint(q / q_scale)
key_scales = np.abs(keys).max(1) / 3  # one for each key
key_codes = np.rint(keys / key_scales[:, None])
print("code of q:", q_code, "scale", q_scale.round(2))

predicted = (key_codes @ q_code) * key_scales * q_scale
table = []
for i in range(4):
    numbers = key_codes[i], f"{key_scales[i]:.2f}", f"{predicted[i]:+.2f}", f"{scores[i]:+.2f}"
    table.append([f"key {i}", *numbers])
print_table(["", "code", "scale", "predicted", "exact"], table)
best = np.argsort(-predicted, kind="stable")[:2]
assert sorted(best.tolist()) == [0, 2]

# %% [markdown]
# The predictions are off by up to 1.3, and the two best keys are still the best.

# %% [markdown]
# ## 3. DOTA: a small detector that learns
#
# (Qu et al., ASPLOS 2022; reconstructed from its abstract and what others wrote about it.) Queries
# and keys are made of x, the D numbers of each token: q = x W_q and k = x W_k. DOTA puts a tiny
# pair of matrices beside these. First a fixed matrix P of -1, 0 and 1 (drawn at random: 0 with
# probability 2/3) reduces x to a few columns, y = x P, which takes additions only. Here P is chosen
# by hand, from D = 4 columns to 2:

# %%
title("3. DOTA: a small detector that learns")
P = np.array([[1.0, 0.0], [0.0, -1.0], [1.0, 0.0], [0.0, 1.0]])
rng = np.random.default_rng(2)
x = rng.integers(-2, 3, (6, 4)).astype(float)  # six tokens
y = x @ P
print("x of the last token:", x[-1], " y:", y[-1])

# %% [markdown]
# A head whose scores are to be estimated. It depends on x mostly through y: as in P, rows 0 and 2
# of W_q and W_k are nearly equal, and rows 1 and 3 nearly opposite. What is lost in y no detector
# can estimate. So in the paper model and detector are trained together, and the model learns heads
# for which little is lost.

# %%
W_q = np.array([[1.0, 0.0, 0.2], [0.0, 1.0, 0.0], [1.0, 0.0, -0.2], [0.0, -1.0, 0.1]])
W_k = np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.2], [0.8, 1.0, 0.0], [-1.0, 1.0, 0.1]])
exact = (x @ W_q) @ (x @ W_k).T  # (6, 6)

# %% [markdown]
# ## ... and how it learns
#
# The detector's scores are (y w_q) . (y w_k), with two matrices of 2 x 2 that start with small
# random numbers. On many tokens, gradient descent lowers the mean squared error of its scores. Look
# at the two largest scores of the last token: from which step on are they at the right places?

# %%
many = rng.integers(-2, 3, (200, 4)).astype(float)
many_y, many_exact = many @ P, (many @ W_q) @ (many @ W_k).T
w_q, w_k = 0.1 * rng.standard_normal((2, 2, 2))

table, shown = [], (0, 2, 5, 10, 30)
for step in range(max(shown) + 1):
    difference = (many_y @ w_q) @ (many_y @ w_k).T - many_exact  # (200, 200)
    if step in shown:
        estimated = (y[-1] @ w_q) @ (y @ w_k).T  # the last token against all six
        row = [f"{number:.1f}" for number in estimated.round(1) + 0.0]  # 0.0 instead of -0.0
        table.append([f"step {step}", f"{np.mean(difference**2):.2f}", *row])
    gradient_q = 2 * many_y.T @ difference @ (many_y @ w_k) / difference.size
    gradient_k = 2 * many_y.T @ difference.T @ (many_y @ w_q) / difference.size
    w_q, w_k = w_q - 0.01 * gradient_q, w_k - 0.01 * gradient_k
table.append(["exact", "", *(f"{number:.1f}" for number in exact[-1])])
print_table(["", "mean squared error", *(f"key {i}" for i in range(6))], table)
assert np.argsort(-estimated)[:2].tolist() == np.argsort(-exact[-1])[:2].tolist()

# %% [markdown]
# Eight learned numbers are enough to select by, and an estimate takes 2 products instead of 3. In
# `stories`, where the detectors were trained with the model, it takes 16 instead of 32. (There is a
# P for each block, a w_q for each query head and a w_k for each key head.)

# %% [markdown]
# ## 4. Sparse memory: a fixed number of slots
#
# (Rae et al., NIPS 2016.) This one does not estimate scores; it limits how many keys there are. A
# memory has a fixed number of slots, and a query reads only the best of them. When the memory is
# full, a new key overwrites the slot that was not accessed for the longest time (least recently
# used, LRU): what nobody reads can go. Here 3 slots for 5 keys, and each query reads one. Which key
# goes when D comes, although it is not the oldest?

# %%
title("4. Sparse memory: 3 slots for 5 keys")
stream_keys = {"A": (3, 0), "B": (0, 3), "C": (2, 2), "D": (-3, 0), "E": (0, -3)}
stream_queries = [(1, 0), (1, 0), (1, -1), (0, 1), (1, 0)]
slots, last_access, log = [], [], []
for now, (name, query) in enumerate(zip(stream_keys, stream_queries)):
    gone = ""
    if len(slots) < 3:
        slots.append(name)
        last_access.append(now)
    else:
        oldest = int(np.argmin(last_access))
        gone, slots[oldest], last_access[oldest] = slots[oldest], name, now
    slot_scores = [np.dot(query, stream_keys[slot]) for slot in slots]
    best = int(np.argmax(slot_scores))
    last_access[best] = now
    log.append([f"token {now}", gone, " ".join(slots), slots[best], max(slot_scores)])
print_table(["", "overwritten", "slots", "reads", "score"], log)
assert [row[1] for row in log] == ["", "", "", "B", "A"]

# %% [markdown]
# B goes first: A is older, but was read all the time. Then C is read, A is not, and A goes, just
# when a query comes whose score with it would be 3. A memory cannot know what a later query wants.

# %% [markdown]
# ## 5. All of them in one model
#
# Now every technique in all heads and blocks of `stories`, with settings at which each keeps about
# a fifth of the keys that a query sees. Beside them stand the three of tutorial 6: the oracle (the
# best keys, known from all scores), a window (the newest keys and the first four), and random keys.
# The stories have about 135 tokens, so that a query sees 68 keys on average; 14 are a fifth of
# them. They ask for one fact ("1 hop"), or for two that have to be put together.

# %%
title("5. At a fifth of the keys")
lm = load_stories()
c = lm.model.config
stories = held_out_stories(7, "two_hops")
ids = lm.encode(stories[0].text) + lm.encode(stories[1].text)  # for section 6


def models(keep):
    """The model with each technique; those that keep a fixed number of keys keep ``keep``.

    Threshold 0: no more keys are dropped after that. The p of ELSA: tutorial 6, section 6.
    """
    four_bits = {"bits": 4, "share": 0.2, "threshold": 0.0}  # the best fifth of each query's keys
    quarter = {"iterations": 0.25, "threshold": 0.0}  # M = S / 4 turns
    memory_of_64 = {"keep": keep, "slots": 64}
    return {
        "oracle": baseline(lm, "oracle", keep),
        "sparse memory": minitx.load("stories", sparse_memory=memory_of_64),
        "predictive attention": minitx.load("stories", predictive_attention=four_bits),
        "ELSA": minitx.load("stories", elsa={"p": 2.2, "min_visible": 1}),
        "window": baseline(lm, "window", keep),
        "DOTA": minitx.load("stories", dota={"keep": keep}),
        "A3": minitx.load("stories", a3=quarter),
        "random": baseline(lm, "random", keep),
    }


# %% [markdown]
# ## ... the answers
#
# The loss is the mean negative log-likelihood of all tokens, lower is better; then the share of
# answers that are right. Who is near the oracle, and who is no better than the window?

# %%
dense = evaluate_stories(lm, stories)
table, loss, right = [], {}, {}
for name, model in models(keep=14).items():
    with counting(model) as counts:
        found = evaluate_stories(model, stories)
    share = counts.events["keys kept"] / counts.events["keys seen"]
    assert 0.18 < share < 0.22
    loss[name], right[name] = found.mean_loss, found.accuracy["1 hop"]
    hops = [f"{found.accuracy[group]:.0%}" for group in ("1 hop", "2 hops")]
    table.append([name, f"{share:.0%}", f"{found.mean_loss:.3f}", *hops])
print_table(["", "keys kept", "loss", "1 hop", "2 hops"], table)
print(f"Dense attention, with all keys: loss {dense.mean_loss:.3f}")
assert loss["oracle"] < dense.mean_loss + 0.1
assert loss["oracle"] < loss["sparse memory"] < loss["ELSA"]
assert loss["predictive attention"] < dense.mean_loss + 0.1
assert loss["predictive attention"] < loss["ELSA"] < min(loss["DOTA"], loss["A3"])
assert max(loss["DOTA"], loss["A3"]) < loss["random"]
assert min(right["DOTA"], right["A3"]) > max(right["window"], right["random"])

# %% [markdown]
# Four bits predict so well that predictive attention is as good as the oracle. (It is even a little
# better: it keeps a fifth of what each query sees, up to 27 keys; the oracle keeps 14 throughout.)
# Sparse memory scores every key in its slots and keeps the best, so with a slot for every key it
# would be the oracle. With 64 slots it loses little: keys that nobody reads are the ones that go.
# ELSA follows. By their loss, DOTA and A3 are worse than the window, which knows nothing; but look
# at the answers. Most words of a story follow from the words just before them, which the window
# always has. An answer has to be looked up far back, and that the window cannot do.

# %% [markdown]
# ## 6. The price, in counts and in time
#
# The last token of two stories. Dense attention takes 2 d multiply-adds for each key and head: d
# for its score, and d for its value. The projections are the same for all, and subtracted. The last
# column is the speed of the same step, all timed side by side: above 1 would be faster than dense.

# %%
title(f"6. The price of one token after {len(ids) - 1} others")
projections = c.layers * c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
all_models = {"dense": lm, **models(keep=len(ids) // 5)}
steps = [decode_last(model, ids) for model in all_models.values()]
seconds = time_side_by_side(*steps, repeats=8)

table, work = [], {}
for i, (name, model) in enumerate(all_models.items()):
    with counting(model) as counts:
        steps[i]()
    share = 1.0
    if name != "dense":
        share = counts.events["keys kept"] / counts.events["keys seen"]
    work[name] = counts.by_group()["blocks.attn"].multiply_adds - projections
    part_of_dense = f"{work[name] / work['dense']:.2f}"
    speed = f"{seconds[0] / seconds[i]:.2f}"
    table.append([name, f"{share:.0%}", work[name], part_of_dense, speed])
print_table(["", "keys kept", "multiply-adds", "dense = 1", "speed, dense = 1"], table)
assert work["dense"] == c.layers * c.heads * 2 * len(ids) * c.head_width
assert max(work[name] for name in work if name != "dense") < work["dense"]

# %% [markdown]
# The kept keys cost a fifth of dense attention. What comes on top is the price of finding them:
# - Window and random keys do not look. ELSA compares bits, which are no multiply-adds (and here it
#   keeps fewer keys than in section 5: a threshold decides, not a number).
# - A3 multiplies little, but keeps every column sorted: a new key moves half of it, on average.
# - DOTA computes 16 products for each key (0.25), and y, y w_q and y w_k of the new token (0.05).
# - Predictive attention and the oracle compute d products for each key, half of dense attention,
#   and those of the kept keys once more. For predictive attention they are products of 4 bits,
#   for hardware that has such multipliers.
# - Sparse memory has only 64 keys to look at. With more slots, an index of near neighbours can tell
#   which to score (its option `index`: k-d trees or hashing).

# %%
say(
    "In NumPy, selecting costs more time than it saves at this length: many small calls instead",
    "of two matrix products, and A3 pops its products one by one in Python. The papers of ELSA, A3",
    "and DOTA build hardware for it. `minitx frontier attention` times longer texts.",
)

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 15`: Greedy search
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/07_four_ways_to_find_keys.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. Keys 1 and 3 alone, whose scores are negative: greedy_search(q, keys[[1, 3]], 2, show=True).
#    They are called key 0 and key 1 then. If no sum is above 0, A3 keeps the key with the largest
#    sum. Has it the larger score, too?
# 2. In section 2, use 2 bits: integers from -1 to 1, so divide by 1 instead of 3. Which keys can no
#    longer be told apart? Then the same in the model: "bits": 2 in section 5.
# 3. In section 3, let P read the first two columns only: [[1, 0], [0, 1], [0, 0], [0, 0]], and add
#    100 and 300 to the steps that are shown. Where does the error stop, and are the two largest
#    scores still found?
# 4. In section 4, change the query of token 3 to (1, 0). Which key does E overwrite then, and what
#    does the last query read? And with 4 slots and the queries as they were? (Of two keys that were
#    last accessed at the same time, the one in the first slot goes.)
