# %% [markdown]
"""Tutorial 18: guessing without a draft model. Where can good guesses come from, if there is no
second model?

In tutorial 11 a small model guesses the next tokens, and one pass of the large model checks them
all. The check does not care who guesses: right guesses save passes, wrong ones change nothing. Here
are three other sources: the first layers of the model itself, the text so far, and the model's own
wrong guesses.

Letters: L layers; E layers that guess; M guesses of Jacobi's method. All decoding here is greedy. A
pass is a run of the whole model, over one token or several.
"""

# %% [markdown]
# ## The model, and text to continue

# %%
import random
from functools import partial

import numpy as np
from helpers import (
    QUESTION,
    STORY,
    bar_chart,
    held_out_stories,
    load_stories,
    print_table,
    save_lines,
    time_side_by_side,
    title,
)

import minitx
from minitx.ledger import counting

lm = load_stories()
L = lm.model.config.layers
stories = [lm.encode(story.text) for story in held_out_stories(6)]
prompts = [ids[:40] for ids in stories]

# %% [markdown]
# ## 1. A model of three layers, by hand
#
# Three words, and for each token of a text a hidden state of three numbers, one for each word. They
# start at 0, and each layer adds something. The head says which word comes next: simply the one
# with the largest number. We may ask the head after any layer: that is an early exit (tutorial 4).
# After how many layers does it say what it says in the end?

# %%
title("1. Two tokens in a model of three layers")
WORDS = ("park", "kitchen", "garden")
added = {
    "token A": [[2, 1, 0], [0, 0, 1], [1, 0, 0]],
    "token B": [[1, 2, 0], [2, 0, 0], [1, 0, 0]],
}
table = []
for name, layers in added.items():
    hidden = np.cumsum(layers, axis=0)
    table.append([name, *(f"{h} {WORDS[np.argmax(h)]}" for h in hidden)])
print_table(["", "after layer 1", "after layer 2", "after layer 3"], table)

# %% [markdown]
# After token A one layer is enough, after token B two. So the first layers can be the draft model:
# they cost less than all layers, and no second model is needed.

# %% [markdown]
# ## ... and a round of guess and check
#
# Layer 1 guesses two words: it reads the last word of the text and guesses the next, then reads
# that guess and makes another. Now the check: layer 1 also reads the second guess (its output is
# the input of layer 2), and then layers 2 and 3 run for all three tokens at once. Below, a column
# is a token and a row is a layer. The number says which run works there: the first run of a layer
# is 1, the next 2, and so on. Follow them from 1 to 5.

# %%
title("Which run works on which token (1 of 3 layers guesses 2 words)")
layers, exit_after, guesses = 3, 1, 2
run = 0
grid = np.zeros((layers, guesses + 1), int)
for token in range(guesses + 1):  # the last word of the text, then the guesses
    for layer in range(exit_after):
        run += 1
        grid[layer, token] = run
for layer in range(exit_after, layers):
    run += 1
    grid[layer] = run  # all tokens at once
columns = ["", "last word", "guess 1", "guess 2"]
print_table(columns, [[f"layer {i + 1}", *map(str, grid[i])] for i in (2, 1, 0)])
assert run == guesses * exit_after + layers
print(f"{run} runs of a layer, one after another, for up to {guesses + 1} tokens.")

# %% [markdown]
# n guesses take n E + L runs of a layer, here 2 * 1 + 3. Without guessing, 3 tokens take 3 L = 9.
# No layer runs twice for the same token: what layer 1 has computed, its rows of the KV cache and
# its output, is kept for the check. (A second model, even a copy of these first layers, has a KV
# cache of its own, and the check runs layer 1 for all three tokens once more.)

# %% [markdown]
# ## 2. How often do the first E layers know?
#
# In `stories` we ask norm and head after E of the 8 layers. How often is the most likely token that
# of the whole model? (This model was trained so that its early layers can guess, as in LayerSkip.)

# %%
title("2. The most likely token after E layers is that of the whole model")


def exits(ids):
    """(L, T): the most likely next token after each of the ids, asked after each layer."""
    model, state = lm.model, lm.model.new_state()
    x = model.embed(np.array(ids), state.take(len(ids)).lookup)
    found = []
    for layer in range(L):
        x = model.stack.run(x, state, layer, layer + 1)
        found.append(model.head(model.norm(x)).argmax(-1))
    return np.array(found)


found = np.concatenate([exits(ids) for ids in stories], axis=1)
agreement = np.mean(found == found[-1], axis=1)
bar_chart([f"E = {E}" for E in range(1, L)], agreement[: L - 1], "{:.0%}")
assert agreement[0] < agreement[3] < agreement[6]

# %% [markdown]
# Two layers are right nearly four times in five. After four layers, not much is left to gain.

# %% [markdown]
# ## 3. How many layers should guess?
#
# `self_speculative` does what the grid of section 1 shows. Later exits guess better, but each guess
# costs more. We let it continue six stories, and count.

# %%
EXITS = (1, 2, 4, 6, 7)


def write(lm):
    """Continue all prompts by 48 tokens; returns the new tokens of each, and the ledger."""
    with counting(lm) as counts:
        new = [lm.generate(ids, 48) for ids in prompts]
    return new, counts


plain, plain_counts = write(lm)
TOKENS = sum(map(len, plain))


def cost(counts):
    """Tokens per pass; multiply-adds and bytes of weights read, relative to plain decoding (with
    the pass that reads the prompt, which is the same in both)."""
    passes = counts.events["target passes"] or counts.events["passes"]
    work, plain_work = counts.total(), plain_counts.total()
    return (
        TOKENS / passes,
        work.multiply_adds / plain_work.multiply_adds,
        work.weight_bytes / plain_work.weight_bytes,
    )


# %% [markdown]
# ## ... counted
#
# Four guesses for each check. A run of a layer is now for one token or several, as in the grid.
# Look for the E with the fewest runs for each token of the text. Without guessing, it is 8.

# %%
title("3. self_speculative with E layers, 4 guesses in a pass")
table, runs = [], []
for E in EXITS:
    guessing = minitx.load("stories", self_speculative={"layers": E, "gamma": 4, "stop": 0})
    new, counts = write(guessing)
    assert new == plain  # the model's own text
    proposed, passes = counts.events["draft tokens proposed"], counts.events["target passes"]
    runs.append((proposed * E + passes * L) / TOKENS)
    tokens, work, read = cost(counts)
    table.append([E, f"{tokens:.2f}", f"{runs[-1]:.1f}", f"{work:.2f}", f"{read:.2f}"])
print_table(["E", "tokens per pass", "runs of a layer", "multiply-adds", "weights read"], table)
save_lines("18_exits", EXITS, {"4 guesses": runs}, "layers that guess (E)", "layers run per token")
assert min(runs) < runs[0] and min(runs) < 0.9 * runs[-1]

# %% [markdown]
# One layer is wrong too often: a pass brings few tokens. Seven layers are right most of the time,
# but four guesses and the check are 4 * 7 + 8 = 36 runs for at most five tokens, which take 40 runs
# without guessing: there is little or nothing to gain. The best E is in between.
#
# (Multiply-adds are lower for a late exit: a wrong guess costs a whole row of the check, and late
# exits are seldom wrong. As in tutorial 11, they are above 1: passes are saved, not products.)

# %% [markdown]
# ## 4. No model at all: the text so far
#
# Texts repeat themselves. Take the last three words, look where the same words stood before, and
# guess what followed there. If they are nowhere, take the last two, or one. If they are in several
# places, take the latest.

# %%
title("4. Prompt lookup, by hand")


def lookup(text, longest=3):
    """What followed the last 3, 2 or 1 tokens of the text where they occurred before."""
    for n in range(longest, 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                return text[start + n :]
    return []


toy = ["I", "am", "what", "I", "am"]
print("text: ", " ".join(toy))
print("guess:", " ".join(lookup(toy)))
assert lookup(toy) == ["what", "I", "am"]

# %% [markdown]
# "what I am" has no other place, but "I am" stands at the beginning, too. Such a guess costs next
# to nothing. When will it be right?

# %% [markdown]
# ## ... on stories
#
# `prompt_lookup` guesses 4 tokens in a pass. We continue the beginning of a story; then the same
# after 200 tokens of other stories, which have phrases to copy; and after the same beginning with
# 100 tokens that the model wrote itself, as if somebody asked again. Where are most guesses right?

# %%
title("Tokens per pass, by what stands before (prompt_lookup)")
looking = minitx.load("stories", prompt_lookup=True)
before = {
    "nothing": [[] for i in range(6)],
    "other stories": [(stories[i - 2] + stories[i - 1])[-200:] for i in range(6)],
    "its own continuation": [ids + lm.generate(ids, 100) for ids in prompts],
}
tokens_per_pass = []
for texts in before.values():
    with counting(looking) as counts:
        new = [looking.generate(t + ids, 40) for t, ids in zip(texts, prompts)]
    tokens_per_pass.append(sum(map(len, new)) / counts.events["target passes"])
bar_chart(before, tokens_per_pass, "{:.2f}")
assert 1 < tokens_per_pass[0] < tokens_per_pass[2]

# %% [markdown]
# More text to copy from helps, and it helps most if the model repeats itself. This one tells new
# stories, so it seldom copies more than a few words. Where the task itself is to repeat (correct
# this text, change this program, answer from this page), prompt lookup is hard to beat: its guesses
# cost a search and nothing else.

# %% [markdown]
# ## 5. Guess, and let the model correct: by hand
#
# Now guess without any source. Each token of a greedy text is a function of those before it. Let a
# "token" be an integer, and let it depend on the one before it only: the token after x is
# (2 x + 1) mod 11. After 1 come 3, 7, 4, 9, 8, 6. To find them one by one takes six steps.
#
# Jacobi's method guesses all six, however badly, and applies the function to all at once: to the
# known 1 and to the first five guesses. The six results are the new guesses, and so on. Once a pass
# changes nothing, each number fits the one before it, so all are right. (`solve` knows the
# solution, and so stops one pass earlier.)


# %%
def chain(x):
    return (2 * x + 1) % 11


def forgetful(x):
    return x // 4 + 5


def solve(function, first, guesses):
    """Print the guesses pass by pass; returns the number of passes until they are right."""
    solution, y = [], first
    for _ in guesses:
        y = function(y)
        solution.append(y)
    passes = 0
    print(f"  guesses {guesses}")
    while guesses != solution:
        guesses = [function(y) for y in [first, *guesses[:-1]]]
        passes += 1
        print(f"  pass {passes}  {guesses}")
    assert guesses == [function(y) for y in [first, *guesses[:-1]]]  # a fixed point
    return passes


# %% [markdown]
# ## ... pass by pass
#
# The first guesses are 5, 2, 8, 0, 6, 10. Pass 1 applies the function to 1, 5, 2, 8, 0, 6: 2 * 1 +
# 1 = 3, then 2 * 5 + 1 = 11, which is 0 mod 11. Check the rest of it, and pass 2.

# %%
title("5. Jacobi's method on a chain of six integers")
passes_chain = solve(chain, 1, [5, 2, 8, 0, 6, 10])
assert passes_chain == 6

# %% [markdown]
# The first number comes from the known 1, so it is right after pass 1. The second comes from a
# right one in pass 2, and so on: each pass makes at least one more right. But here it is exactly
# one per pass. Six passes for six numbers: nothing is gained.

# %% [markdown]
# ## ... and where it gains
#
# Another function: a quarter of x, rounded down, and 5 more. After 30 come 12, 8, 7, 6, 6, 6.

# %%
print("  ... and a function that forgets")
passes_forgetful = solve(forgetful, 30, [0, 0, 0, 0, 0, 0])
assert passes_forgetful == 3

# %% [markdown]
# Three passes for six numbers. This function forgets most of its input, so a guess that is only
# nearly right can give the right result: in pass 2, the fourth number comes from 5 instead of 7,
# and is 6 all the same. Jacobi's method gains where a token hardly depends on those before it. How
# is that in a text?

# %% [markdown]
# ## 6. The same on a story
#
# Now the function is the model. One pass over the text and the guesses gives the most likely token
# after the text and after each guess. The first guesses are random words of the text.

# %%
M = 8


def jacobi_pass(text, guesses):
    """The model's tokens after the text and after each guess (M + 1)."""
    return lm.logits(text + guesses)[len(text) - 1 :].argmax(-1).tolist()


def words(ids):
    return " ".join(f"{lm.tokenizer.decode([token]).strip()[:9]:9}" for token in ids)


def jacobi_block(text, show=False):
    """The next M tokens, the number of passes until they were right, and all pairs (guess, token
    that the model put after it) that came up on the way."""
    guesses = random.Random(1).choices(text, k=M)
    solution, passes, pairs = lm.generate(text, M), 0, set()
    while guesses != solution:
        new = jacobi_pass(text, guesses)
        pairs |= set(zip(guesses, new[1:]))
        guesses = new[:-1]
        passes += 1
        right = 0
        while right < M and guesses[right] == solution[right]:
            right += 1
        if show:
            line = f"  {passes}  {words(guesses[:right])} | {words(guesses[right:])}"
            print(line.rstrip())
        assert right >= min(passes, M)
    return guesses, passes, pairs


# %% [markdown]
# ## ... pass by pass
#
# Each line is a pass. Left of the bar are the tokens that are right. How many more are right after
# each pass? And does what stands right of the bar make sense?

# %%
title("6. Jacobi decoding of the next 8 tokens")
text = lm.encode(STORY + QUESTION)
solution, passes, pairs = jacobi_block(text, show=True)
print(f"{M} tokens in {passes} passes")

# %% [markdown]
# About one token per pass, as in the chain. A token depends on all tokens before it, and one wrong
# token among them can make it wrong.

# %% [markdown]
# ## 7. Keep what is wrong: n-grams
#
# Right of the bar are pieces of good language ("Anna was", "still in"), only not in this place.
# They may be right later. So keep them: each guess, together with the token that the model put
# after it. (Here pairs; `lookahead` keeps n-grams of 3 tokens.)
#
# Then the model writes 24 more tokens. How many of its pairs (a token and the next) have we kept?
# Many stand in the text before, where prompt lookup would find them, so the second bar leaves those
# out. The third is a baseline: as many pairs of random words of the text.

# %%
title("7. Which pairs of the next 24 tokens have been kept?")
followed, kept, new_ones, by_chance = 0, 0, 0, 0
rng = random.Random(0)
for story in held_out_stories(12):
    ids = lm.encode(story.text)[:40]
    solution, _, pairs = jacobi_block(ids)
    after = lm.generate(ids + solution, 24)
    neighbors = list(zip([solution[-1], *after], after))
    text = ids + solution
    known = set(zip(text, text[1:]))
    drawn = {(rng.choice(ids), rng.choice(ids)) for _ in pairs}
    followed += len(neighbors)
    kept += sum(pair in pairs for pair in neighbors)
    new_ones += sum(pair in pairs - known for pair in neighbors)
    by_chance += sum(pair in drawn for pair in neighbors)
labels = ["kept", "... and not in the text so far", "random pairs"]
bar_chart(labels, [n / followed for n in (kept, new_ones, by_chance)], "{:.0%}")
assert kept > 2 * by_chance and kept > 2 * new_ones

# %% [markdown]
# Each of these pairs could have been a right guess, though in stories most of them stand in the
# text, too. Lookahead decoding makes use of them. Each of its passes does two things: it improves
# a few guesses by Jacobi's method, which gives new n-grams, and it checks the n-grams kept so far
# that begin with the text's last token. There may be several of these, so they are checked side by
# side, as branches of a tree (minitx/shared/token_tree.py).

# %% [markdown]
# ## 8. All of them
#
# The same prompts with each. `speculative` has the draft model of tutorial 11. The last one is a
# baseline: lookahead that checks as many of its n-grams, but random ones.

# %%
ALL = {
    "speculative": {"speculative": True},
    "self_speculative": {"self_speculative": True},
    "prompt_lookup": {"prompt_lookup": True},
    "jacobi": {"jacobi": True},
    "lookahead": {"lookahead": True},
    "random n-grams": {"lookahead": {"choose": "random"}},
}
table, brought, tasks = [], {}, [partial(lm.generate, prompts[0], 30)]
for name, flags in ALL.items():
    guessing = minitx.load("stories", **flags)
    new, counts = write(guessing)
    assert new == plain
    brought[name], *price = cost(counts)
    table.append([name, *(f"{number:.2f}" for number in (brought[name], *price))])
    tasks.append(partial(guessing.generate, prompts[0], 30))

# %% [markdown]
# ## ... side by side
#
# Look at tokens per pass first, then at what they cost. The speed is that of one short text.

# %%
title("8. What a pass brings, and what it costs (without guessing = 1)")
plain_time, *times = time_side_by_side(*tasks, repeats=3, own_time=True)
for row, seconds in zip(table, times):
    row.append(f"{plain_time / seconds:.2f}")
print_table(["", "tokens per pass", "multiply-adds", "weights read", "speed"], table)
assert brought["jacobi"] < 1.2 < brought["lookahead"]
assert brought["random n-grams"] < brought["lookahead"]

# %% [markdown]
# All write the same text. jacobi gains next to nothing. lookahead brings only a few more tokens
# than prompt_lookup, since most of the n-grams that fit stand in the text as well. But its passes
# have many rows, most of them for nothing: several times the multiply-adds. It is for machines on
# which rows are free, and in NumPy they are not (tutorial 11, section 8). No speed is near the
# number of tokens per pass: `stories` is small, so reading weights is not what takes its time.
# (Random n-grams are better than jacobi, since lookahead checks its new guesses, too.)
#
# Which one, then? A draft model if there is a good one. self_speculative if the model was trained
# for early exits: there is nothing else to store, and no second cache. prompt_lookup where texts
# repeat. lookahead where none of these is possible and rows are free.

# %% [markdown]
# ## Exercises
#
# Write it yourself: these exercises continue the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 16`: Speculative decoding
# - `minitx learn 24`: Big-little decoding's rollback
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/18_guessing_without_a_draft.py`.
#
# 1. In section 1, change one number so that token A's exit after layer 1 is wrong. Then say that
#    layer 3 is known to add 0, 1 or 2 to each number. Which hidden states after layer 2 leave no
#    doubt about the result? Do those of A and B?
# 2. In section 3, set gamma to 1 and to 8. Which E takes the fewest runs of a layer then, and why
#    does it move? (What section 2 measures is enough to count them: all guesses that are kept were
#    made from the model's own text.)
# 3. In section 5, add a function that returns (x * x) % 7, and solve its chain from 3 with your own
#    six guesses. Which numbers are right after the first pass although the guess before them was
#    wrong? (Which x have the same square mod 7?)
# 4. In section 8, give lookahead more to do: {"window": 8}, then {"window": 8, "ngram": 4}. What
#    does that do to tokens per pass, and to the multiply-adds?
