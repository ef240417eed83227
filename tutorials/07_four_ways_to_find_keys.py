"""Tutorial 7: four more ways to find the keys that matter. Which finds the best ones, and at what
price?

Tutorial 6 showed that a token can do with a fraction of the keys before it, if they are the right
ones, and one way to find them: ELSA compares the signs of random projections. Four other papers
had four other ideas. Here is each in one small example, and then all of them in the same model.

Letters: a query q (d numbers) sees S keys (d numbers each); its score for a key is their product
q . key. x is what queries and keys are made of: D numbers for each of T tokens.
"""

# %% Four keys, and what we want to know
import numpy as np
from helpers import (
    bar_chart,
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
from minitx.lab.attention_baselines import baseline
from minitx.ledger import counting

# One query and four keys of three columns. The exact scores take 4 * 3 products. Keys 0 and 2 have
# large scores; the others will get nearly no weight. How can one see that with less work?
q = np.array([2.0, -1.0, 1.0])
keys = np.array([[3.0, 1.0, 0.0], [-2.0, 0.0, 1.0], [1.0, -3.0, -1.0], [0.0, 2.0, -2.0]])
scores = keys @ q
weights = np.exp(scores) / np.exp(scores).sum()
print("scores ", scores)
print("weights", weights.round(3))

# %% 1. A3: the largest products first
# (Ham et al., HPCA 2020.) A score is a sum of d products, one for each column: q[j] * key[j]. A key
# with a large score has large products somewhere. So A3 looks at the most extreme products of all
# keys, the largest and the smallest in turn, and adds them up key by key. Here are all twelve:
title("1. A3: the largest products first")
table = []
for i in range(4):
    row = [f"{product:.0f}" for product in keys[i] * q + 0.0]
    table.append([f"key {i}", *row, f"{scores[i]:.0f}"])
print_table(["products", "column 0", "column 1", "column 2", "score"], table)

# How to find the extreme ones without multiplying all? Keep each column of the keys sorted; that
# can be done when keys come, before there is any query. Then the largest product of a column is at
# one end (if q[j] > 0, the end of the largest numbers) and the smallest product at the other. To
# find the next largest of all, compare d numbers, one for each column.


# %% ... from both ends of sorted columns
# One turn takes the largest product that is left, and then the smallest. Without the second, keys
# with one large product and many negative ones would look good.
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
            continue  # in all more negative than positive: skip the smallest (see below)
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
# Four of the twelve products were added, and the right keys are kept. (To find the first of them,
# the products at both ends of each column are needed, and one new product after each that is taken:
# here nearly all twelve, but few with hundreds of keys. The smallest product is skipped while the
# sum of all that was added is negative: otherwise, if most products are negative, no key would end
# above 0.) For the keys that are kept, exact scores and softmax follow, as in all these techniques:
# the search only decides which keys take part.

# %% 2. Predictive attention: scores in few bits
# (Chen et al., AICAS 2022; only its abstract is public, so this is our reconstruction.) To tell
# large scores from small ones, rough numbers will do. Write each vector as integers from -3 to 3,
# which take 3 bits, times a scale of its own: the largest |number| of the vector, divided by 3.
# Integer products of 3 bits are cheap in hardware.
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
# The predictions are off by up to 1.3, and the two best keys are still the best.

# %% 3. DOTA: a small detector that learns
# (Qu et al., ASPLOS 2022; reconstructed from its abstract and what others wrote about it.) Queries
# and keys are made of x, the D numbers of each token: q = x W_q and k = x W_k. DOTA puts a tiny
# pair of matrices beside these. First a fixed matrix P of -1, 0 and 1 reduces x to a few columns,
# y = x P, which takes additions only. Here from D = 4 to 2:
title("3. DOTA: a small detector that learns")
P = np.array([[1.0, 0.0], [0.0, -1.0], [1.0, 0.0], [0.0, 1.0]])
rng = np.random.default_rng(2)
x = rng.integers(-2, 3, (6, 4)).astype(float)  # six tokens
y = x @ P
print("x of the last token:", x[-1], " y:", y[-1])

# A head whose scores are to be estimated. W_q and W_k depend on x mostly through y: like in P,
# their rows 0 and 2 are nearly equal, and rows 1 and 3 nearly opposite. What is lost in y no
# detector can estimate. So in the paper model and detector are trained together, and the model
# learns heads for which this holds.
W_q = np.array([[1.0, 0.0, 0.2], [0.0, 1.0, 0.0], [1.0, 0.0, -0.2], [0.0, -1.0, 0.1]])
W_k = np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.2], [0.8, 1.0, 0.0], [-1.0, 1.0, 0.1]])
exact = (x @ W_q) @ (x @ W_k).T  # (6, 6)

# %% ... and how it learns
# The detector's scores are (y w_q) . (y w_k), with two matrices of 2 x 2 that start with small
# random numbers. On many tokens, gradient descent lowers the mean squared error of its scores. Look
# at the two largest scores of the last token: from which step on are they at the right places?
many = rng.integers(-2, 3, (200, 4)).astype(float)
many_y, many_exact = many @ P, (many @ W_q) @ (many @ W_k).T
w_q, w_k = 0.1 * rng.standard_normal((2, 2, 2))

table = []
for step in range(31):
    difference = (many_y @ w_q) @ (many_y @ w_k).T - many_exact  # (200, 200)
    if step in (0, 2, 5, 10, 30):
        estimated = (y[-1] @ w_q) @ (y @ w_k).T  # the last token against all six
        row = [f"{number:.1f}" for number in estimated.round(1) + 0.0]  # 0.0 instead of -0.0
        table.append([f"step {step}", f"{np.mean(difference**2):.2f}", *row])
    gradient_q = many_y.T @ difference @ (many_y @ w_k) / difference.size  # without the factor 2
    gradient_k = many_y.T @ difference.T @ (many_y @ w_q) / difference.size
    w_q, w_k = w_q - 0.02 * gradient_q, w_k - 0.02 * gradient_k
table.append(["exact", "", *(f"{number:.1f}" for number in exact[-1])])
print_table(["", "mean squared error", *(f"key {i}" for i in range(6))], table)
assert np.argsort(-estimated)[:2].tolist() == np.argsort(-exact[-1])[:2].tolist()
# Eight learned numbers are enough to select by, and an estimate takes 2 products instead of 3. In
# `stories`, where the detectors were trained with the model, it takes 16 instead of 32: y has 16
# columns, P is drawn at random for each block (two thirds of it are 0), and each query head has a
# w_q of its own, each key head a w_k.

# %% 4. Sparse memory: a fixed number of slots
# (Rae et al., NIPS 2016.) This one does not estimate scores; it limits how many keys there are. A
# memory has a fixed number of slots, and a query reads only the best of them. When the memory is
# full, a new key overwrites the slot that was not accessed for the longest time (least recently
# used, LRU): what nobody reads can go. Here 3 slots for 5 keys, and each query reads one. Which key
# goes when D comes, although it is not the oldest?
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
# B goes first: A is older, but was read all the time. Then C is read, A is not, and A goes, just
# when a query comes whose score with it would be 3. A memory cannot know what a later query wants.

# %% 5. All of them in one model
# Now every technique in all heads and blocks of `stories`, with settings at which each keeps about
# a fifth of the keys that a query sees. Beside them stand the three of tutorial 6: the oracle (the
# best keys, known from all scores), a sliding window with the first four keys, and random keys.
# Sparse memory is there twice: with a slot for every key, and with 64 slots, half of a story. The
# stories (of 135 tokens) ask for one fact, or for two that have to be put together.
title("5. At a fifth of the keys")
lm = load_stories()
c = lm.model.config
stories = held_out_stories(10, "two_hops")
ids = lm.encode(stories[0].text) + lm.encode(stories[1].text)  # for section 6


def models(keep):
    """The model with each technique; those that keep a fixed number of keys keep ``keep``."""
    # share: of the keys that a query sees, the best fifth is kept; threshold 0: no further limit.
    four_bits = {"bits": 4, "share": 0.2, "threshold": 0.0}
    # iterations: the turns M of section 1, as a share of the keys that a query sees (M = S / 4).
    quarter = {"iterations": 0.25, "threshold": 0.0}
    memory_of_64 = {"keep": keep, "slots": 64}
    # p (ELSA): a key is to be kept if its weight is above p / S.
    return {
        "oracle": baseline(lm, "oracle", keep),
        "sparse memory": minitx.load("stories", sparse_memory={"keep": keep}),
        "sparse memory, 64 slots": minitx.load("stories", sparse_memory=memory_of_64),
        "predictive attention": minitx.load("stories", predictive_attention=four_bits),
        "ELSA": minitx.load("stories", elsa={"p": 2.2}),
        "window": baseline(lm, "window", keep),
        "DOTA": minitx.load("stories", dota={"keep": keep}),
        "A3": minitx.load("stories", a3=quarter),
        "random": baseline(lm, "random", keep),
    }


# %% ... the answers
# Those with a fixed number keep 14 keys: a query of a story of 135 tokens sees 68 on average. The
# loss is the mean negative log-likelihood of all tokens, lower is better; then comes the share of
# answers that are right. Who is near the oracle, and who is no better than the window?
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
print(f"\nLoss above that of dense attention ({dense.mean_loss:.3f}), nats per token:")
ranking = sorted(loss, key=loss.get)
bar_chart(ranking, [loss[name] - dense.mean_loss for name in ranking], "{:.2f}")
assert loss["oracle"] < dense.mean_loss + 0.1
assert abs(loss["oracle"] - loss["sparse memory"]) < 0.001
assert loss["sparse memory"] < loss["sparse memory, 64 slots"] < loss["ELSA"]
assert loss["predictive attention"] < dense.mean_loss + 0.1
assert loss["predictive attention"] < loss["ELSA"] < min(loss["DOTA"], loss["A3"])
assert max(loss["DOTA"], loss["A3"]) < loss["random"]
assert min(right["DOTA"], right["A3"]) > max(right["window"], right["random"])
# Four bits predict so well that predictive attention is as good as the oracle. (It is even a little
# better: it keeps a fifth of what each query sees, up to 27 keys, and the oracle 14 throughout.)
# Sparse memory with all slots is the oracle: it scores every key and keeps the best. With half of
# the slots it loses little, since keys that nobody reads are the ones that go. ELSA follows. By
# their loss, DOTA and A3 are worse than the window, which knows nothing; but look at the answers.
# Most words of a story follow from the words just before them, which the window always has and the
# others may miss. An answer has to be looked up far back, and that the window cannot do.

# %% 6. The price, in counts
# The last token of two stories. Dense attention takes 2 d multiply-adds for each key and head: d
# for its score, and d for its value. The projections are the same for all, and subtracted.
title(f"6. The price of one token after {len(ids) - 1} others")
projections = c.layers * c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
steps = {"dense": decode_last(lm, ids)}
with counting(lm) as counts:
    steps["dense"]()
all_work = counts.by_group()["blocks.attn"].multiply_adds - projections
assert all_work == c.layers * c.heads * 2 * len(ids) * c.head_width

table, work = [["dense", "100%", all_work, "1.00"]], {}
for name, model in models(keep=len(ids) // 5).items():
    steps[name] = decode_last(model, ids)
    with counting(model) as counts:
        steps[name]()
    share = counts.events["keys kept"] / counts.events["keys seen"]
    work[name] = counts.by_group()["blocks.attn"].multiply_adds - projections
    table.append([name, f"{share:.0%}", work[name], f"{work[name] / all_work:.2f}"])
print_table(["", "keys kept", "multiply-adds", "dense = 1"], table)
assert max(work.values()) < all_work
# The kept keys cost a fifth of dense attention. What comes on top is the price of finding them:
# - Window and random keys do not look. ELSA compares bits, which are no multiply-adds (and here it
#   keeps fewer keys than in section 5: a threshold decides, not a number).
# - A3 multiplies little, but keeps every column sorted: a new key moves half of it, on average.
# - DOTA computes an estimate of 16 products for each key (0.25 of dense attention), and y, y w_q
#   and y w_k of the new token (0.05).
# - Predictive attention and the oracle compute d products for each key, half of dense attention
#   (and those of the kept keys once more). For predictive attention they are products of 4 bits,
#   for hardware that has such multipliers.
# - Sparse memory with 64 slots has only 64 keys to look at. Without a limit, it would need an index
#   that finds near neighbours (option `index` of sparse_memory: k-d trees or hashing).

# %% ... and in time
# The same step, timed side by side. Above 1 would be faster than dense attention.
best = time_side_by_side(*steps.values(), repeats=15)
speedups = {name: best[0] / seconds for name, seconds in zip(steps, best)}
del speedups["dense"]
print("\nSpeed of the same step (dense attention = 1):")
bar_chart(list(speedups), list(speedups.values()), "{:.2f}")
faster = [name for name, ratio in speedups.items() if ratio > 1.05]
print("faster than dense attention:", ", ".join(faster) or "none")
say(
    "In NumPy, selecting costs more time than it saves at this length. Dense attention is two",
    "matrix products; each of these makes many small NumPy calls, and A3 pops its products one by",
    "one in Python. The papers of ELSA, A3 and DOTA build hardware for it. `minitx",
    "compare-attention` times longer texts.",
)

# %% Try this
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
# 1. Keys 1 and 3 alone, whose scores are negative: greedy_search(q, keys[[1, 3]], 2, show=True).
#    (They are numbered 0 and 1 then.) If no sum is above 0, A3 keeps the key with the largest sum.
#    Has it the larger score, too?
# 2. In section 2, use 2 bits: integers from -1 to 1, so divide by 1 instead of 3. Which keys can no
#    longer be told apart? Then the same in the model: "bits": 2 in section 5. Is predictive
#    attention still near the oracle?
# 3. In section 3, let P read the first two columns only: [[1, 0], [0, 1], [0, 0], [0, 0]], and take
#    300 steps: range(301), with 100 and 300 among the steps that are printed. Where does the error
#    stop, and are the two largest scores still found?
# 4. In section 4, change the query of token 3 to (1, 0). Which key goes when E comes, and what does
#    the last query read? And with the queries as they were, which key is overwritten if there are 4
#    slots? (Were two accessed at the same time, it is the one in the first slot.)
