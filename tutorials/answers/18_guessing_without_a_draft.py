# %% [markdown]
"""Answers to the questions of tutorial 18."""

# %%
from itertools import product

import numpy as np
from helpers import borrow, held_out_stories, load_stories, print_table, title

import minitx
from minitx.ledger import counting

lm = load_stories()
L = lm.model.config.layers
prompts = [lm.encode(story.text)[:40] for story in held_out_stories(4)]

# %% [markdown]
# ## Question 1
#
# Which hidden states after layer 2 leave no doubt?
#
# If layer 3 adds [1, 3, 0] to token A instead of [1, 0, 0], the word is kitchen in the end, and the
# exit after layer 1 was wrong. If layer 3 adds 0, 1 or 2 to each number, another word can gain 2 on
# the first one. So a lead of more than 2 leaves no doubt. (2 is enough where the first one comes
# earlier in the list, since a tie goes to the lower index.) A and B lead by 1 only: both may
# change. We try all 27 additions.

# %%
title("Question 1. Exits that leave no doubt")
changed = np.cumsum([[2, 1, 0], [0, 0, 1], [1, 3, 0]], axis=0)
print(f"changed token A: {changed.argmax(-1)} (0 is park, 1 is kitchen)")
assert changed.argmax(-1).tolist() == [0, 0, 1]

additions = np.array(list(product((0, 1, 2), repeat=3)))  # (27, 3)
kept = {}
for name, hidden in (("A", [2, 1, 1]), ("B", [3, 2, 0]), ("a lead of 3", [4, 1, 1])):
    kept[name] = np.sum((hidden + additions).argmax(-1) == np.argmax(hidden))
    print(f"{name:12} {hidden}: the word stays for {kept[name]} of 27 additions")
assert kept["A"] < 27 and kept["B"] < 27 and kept["a lead of 3"] == 27

# %% [markdown]
# ## Question 2
#
# Which E is best with 1 guess, and with 8?
#
# E = 2 with one guess, as with 4, and E = 4 with 8. One guess only has to be right itself, which
# two layers manage in most cases, and most of the runs are the check. With 8 guesses, those at the
# end only count if all before them are right, so one mistake wastes the rest: it pays to guess
# better.
#
# All this can be counted without decoding. As long as the guesses are right, they were made from
# the model's own text; so they are what the exits say on that text, in one pass.

# %%
title("Question 2. Runs of a layer per token, by guesses and E")
exits = borrow("18", "exits", lm=lm, L=L)
texts = []
for ids in prompts:
    texts.append(ids + lm.generate(ids, 48))
said = [exits(ids) for ids in texts]  # (L, T) of each


def count(found, E, guesses, first=39, tokens=48):
    """(guesses made, passes of the whole model) for the tokens after position ``first``."""
    made, passes, at, end = 0, 0, first, first + tokens
    while at < end:
        proposed = min(guesses, end - at - 1)
        right = 0
        while right < proposed and found[E - 1, at + right] == found[-1, at + right]:
            right += 1
        made, passes, at = made + proposed, passes + 1, at + right + 1
    return made, passes


table, best = [], {}
for guesses in (1, 4, 8):
    runs = {}
    for E in range(1, L):
        counted = np.array([count(found, E, guesses) for found in said]).sum(0)
        runs[E] = float(counted @ (E, L)) / (48 * len(said))
    best[guesses] = min(runs, key=runs.get)
    table.append([guesses, *(f"{run:.1f}" for run in runs.values()), best[guesses]])
print_table(["guesses", *(f"E = {E}" for E in range(1, L)), "best E"], table)
assert best[1] < best[8]

guessing = minitx.load("stories", self_speculative={"layers": 2, "gamma": 4, "stop": 0})
with counting(guessing) as counts:
    assert guessing.generate(prompts[0], 48) == texts[0][40:]
real = counts.events["draft tokens proposed"], counts.events["target passes"]
print(f"E = 2, 4 guesses, first story: {real[0]} guesses, {real[1]} passes when decoded, ", end="")
print("and {} and {} as counted here".format(*count(said[0], 2, 4)))
assert real == count(said[0], 2, 4)

# %% [markdown]
# ## Question 3
#
# Which numbers are right after the first pass although the guess before them was wrong?
#
# Those after a guess with the right square. x and 7 - x have the same square mod 7, so the function
# forgets which of the two it was given. The chain is 2, 4, 2, 4, 2, 4; the second number is
# right if the first guess is 2 or 5, the third if the second guess is 4 or 3.

# %%
title("Question 3. Squares mod 7")


def square(x):
    return (x * x) % 7


solution = [square(3)]
while len(solution) < 6:
    solution.append(square(solution[-1]))
guesses = [5, 3, 1, 6, 2, 0]
after = [square(x) for x in [3, *guesses[:-1]]]
by_luck = []
for i in range(1, 6):
    if after[i] == solution[i] and guesses[i - 1] != solution[i - 1]:
        by_luck.append(i + 1)
print(f"solution {solution}\nguesses  {guesses}\npass 1   {after}")
print(f"right after a wrong guess: numbers {by_luck}")
print("squares of 0 to 6:", [square(x) for x in range(7)])
assert by_luck == [2, 3] and all(square(x) == square(7 - x) for x in range(1, 7))

# %% [markdown]
# ## Question 4
#
# What does a larger window bring, and what does it cost?
#
# A window of 8 brings a fifth more tokens per pass for nearly half as much work again: more guesses
# are improved in each pass, so there are more n-grams. With n-grams of 4 the work rises once more,
# and the tokens do not: each guess is longer, but its end is seldom right. (On two stories.)

# %%
title("Question 4. lookahead with more to do")
table, brought, work = [], [], []
with counting(lm) as plain:
    for ids in prompts[:2]:
        lm.generate(ids, 48)
for options in ({}, {"window": 8}, {"window": 8, "ngram": 4}):
    looking = minitx.load("stories", lookahead=options or True)
    with counting(looking) as counts:
        new = [looking.generate(ids, 48) for ids in prompts[:2]]
    assert new == [text[40:] for text in texts[:2]]
    brought.append(sum(map(len, new)) / counts.events["passes"])
    work.append(counts.total().multiply_adds / plain.total().multiply_adds)
    table.append([str(options or "default"), f"{brought[-1]:.2f}", f"{work[-1]:.2f}"])
print_table(["", "tokens per pass", "multiply-adds"], table)
assert work[0] < work[1] < work[2] and brought[0] < brought[1]
assert max(brought) / brought[0] < work[1] / work[0]
