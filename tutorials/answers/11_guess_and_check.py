# %% [markdown]
"""Answers to the questions of tutorial 11."""

# %%
from fractions import Fraction
from functools import partial

import numpy as np
from helpers import (
    borrow,
    held_out_stories,
    load_stories,
    print_table,
    time_side_by_side,
    title,
)

import minitx
from minitx.decode import Sampler
from minitx.ledger import counting

# %% [markdown]
# ## Question 1
#
# How often is a guess of a bad draft model accepted, and when always?
#
# The sum of min(p, q) is 3/10, and p still comes out, exactly: the rule holds for any q. A bad
# draft model costs time but never changes the text. The closer q is to p, the more is accepted, but
# all guesses are accepted only if q = p. The numbers of both sum to 1, so if q differs, it gives
# too much to some word, and that word is rejected at times. (Here p has a 0, so a q without a 0
# cannot be p.)

# %%
title("Question 1. A bad draft model, and a good one")


def guess_and_check(p, q):
    """How often a guess is accepted, and how often each word comes out."""
    accepted = [min(p_x, q_x) for p_x, q_x in zip(p, q)]  # q(x) min(1, p(x) / q(x))
    excess = [max(Fraction(0), p_x - q_x) for p_x, q_x in zip(p, q)]
    rejected = 1 - sum(accepted)
    residual = [e / (sum(excess) or 1) for e in excess]
    return sum(accepted), [a + rejected * r for a, r in zip(accepted, residual)]


p = [Fraction(percent, 100) for percent in (60, 30, 10, 0)]
acceptance = []
for percents in ((10, 10, 10, 70), (58, 29, 12, 1), (60, 30, 9, 1), (60, 30, 10, 0)):
    q = [Fraction(percent, 100) for percent in percents]
    accepted, output = guess_and_check(p, q)
    acceptance.append(accepted)
    print(f"q = {percents} / 100: accepted {accepted}; comes out:", *output)
    assert output == p
assert acceptance[0] == Fraction(3, 10) and max(acceptance[1:3]) < 1 == acceptance[3]

# %% [markdown]
# ## Question 2
#
# How many guesses are best?
#
# 13 if the rows of the check are free, and 5 if each costs 0.13 (and a guess 0.24). Guess n brings
# 0.92^n tokens. It pays as long as that is more than the same time brings otherwise, its cost times
# the speedup: guess 13 brings 0.34 and costs 0.08 * 4.2 = 0.34, guess 14 only 0.31. The curve is
# flat: 8 guesses are not far from the best in either case.

# %%
title("Question 2. The best gamma")
tokens_per_pass = borrow("11", "tokens_per_pass")


def speedup(gamma, c, row):
    return tokens_per_pass(0.92, gamma) / (gamma * c + 1 + row * gamma)


free = [speedup(gamma, 0.08, 0) for gamma in range(1, 21)]
paid = [speedup(gamma, 0.24, 0.13) for gamma in range(1, 9)]
best_free, best_paid = 1 + np.argmax(free), 1 + np.argmax(paid)
print(f"rows are free: gamma = {best_free}, {max(free):.2f} times as fast (8: {free[7]:.2f})")
print(f"a row costs 0.13: gamma = {best_paid}, {max(paid):.2f} times as fast (8: {paid[7]:.2f})")
assert (best_free, best_paid) == (13, 5) and free[7] > 0.9 * max(free)

# %% [markdown]
# ## Question 3
#
# Is the first half of the target a better draft model?
#
# It agrees with the target more often, since after 4 blocks it knows where Tom is (one hop;
# tutorial 4). A pass brings a little more. But a guess takes about half of the target's
# multiply-adds where the draft model takes a twelfth, and that is far more than it brings.

# %%
title("Question 3. The first half of the model as its own draft model")
target = load_stories()
stories = [target.encode(story.text) for story in held_out_stories(8)]
half = minitx.load("stories", layer_skip={"drop": "4,5,6,7"})  # the same model, to look at alpha
models = {"stories-draft": minitx.load("stories-draft"), "self": half}


def write(lm):
    with counting(lm) as counts:
        new = [lm.generate(ids[:40], 20) for ids in stories]
    return new, counts


alone, counts_alone = write(target)
alpha, work, table = {}, {}, []
for draft, model in models.items():
    sampler = Sampler(temperature=1)
    agreement = borrow("11", "agreement", target=target, draft=model, sampler=sampler)
    alpha[draft] = np.mean(np.concatenate([agreement(ids) for ids in stories[:4]]))
    guessing = minitx.load("stories", speculative={"gamma": 8, "stop": 0, "draft": draft})
    new, counts = write(guessing)
    assert new == alone
    tokens = sum(map(len, new)) / counts.events["target passes"]
    work[draft] = counts.total().multiply_adds / counts_alone.total().multiply_adds
    table.append([draft, f"{alpha[draft]:.2f}", f"{tokens:.2f}", f"{work[draft]:.2f}"])
print_table(["draft", "alpha", "tokens per pass", "multiply-adds (alone = 1)"], table)
assert alpha["self"] > alpha["stories-draft"] + 0.02
assert work["self"] > 1.2 * work["stories-draft"]

# %% [markdown]
# ## Question 4
#
# Which heights are too small, and which too large?
#
# With 40 rows of W, NumPy is called 4,000 times for five rows of x. A call itself takes a few
# microseconds, about as long as to multiply by the 46 KB of its block. With 4,000 rows a block has
# 4.6 MB, more than most L2 caches (0.25 to 2 MB a core), and with 32,000 it is all of W: then each
# row of x reads it from memory (or the L3 cache) again. Look at the times on your machine: the best
# height lies in between.

# %%
title("Question 4. Blocks of other heights")
W = np.random.default_rng(0).random((32_000, 288), np.float32)
x = W[:5]
block_by_block = borrow("11", "block_by_block", W=W)
HEIGHTS = (40, 400, 4_000, 32_000)
times = time_side_by_side(*(partial(block_by_block, x, height) for height in HEIGHTS), repeats=2)
table, calls = [], []
for height, seconds in zip(HEIGHTS, times):
    calls.append(len(x) * len(W) // height)
    table.append([height, f"{height * 288 * 4 / 1e6:.2f} MB", calls[-1], f"{1e3 * seconds:.1f} ms"])
print_table(["height", "a block", "calls of NumPy", "five rows take"], table)
assert calls == [4_000, 400, 40, 5]
assert np.allclose(block_by_block(x, 40), x @ W.T, rtol=1e-4)
