"""Tutorial 18: guessing without a draft model. Where can good guesses come from, if there is no
second model?

In tutorial 11 a small model guesses the next tokens, and one pass of the large model checks them
all. The check does not care who guesses: right guesses save passes, wrong ones change nothing. Here
are three other sources: the first layers of the model itself, the text so far, and the model's own
wrong guesses.

Letters: L layers; E layers that guess; M guesses in a pass. All decoding here is greedy.
"""

# %% The model, and text to continue
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

# %% 1. A model of three layers, by hand
# Three words, and a hidden state of three numbers, which start at 0. Each layer adds something to
# them, and the head simply takes the word with the largest number. We may ask the head after any
# layer: that is an early exit (tutorial 4). After how many layers does it say what it says in the
# end?
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
# Token A's guess is right after one layer, token B's after two. So the first layers can be the
# draft model: they cost less than all layers, and have been there all the time.

# %% ... and a round of guess and check
# One layer guesses two words: it reads the last word and guesses the next, then reads that guess
# and makes another. At last it reads the second guess, too, and layers 2 and 3 run for all three
# tokens at once. That is the check. Below is a column for each token and a row for each layer; the
# number says which run of a layer, in order, works there.
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
# n guesses take n E + L runs of a layer; without guessing, 3 tokens take 3 L = 9. And no layer runs
# twice for the same token: what layer 1 has computed, its rows of the KV cache and its output, is
# kept for the check. Weights and cache are shared. A second model, even one made of the same first
# layers, has a KV cache of its own, and the check runs layer 1 for all tokens once more.

# %% 2. How often do the first E layers know?
# In `stories`: norm and head after E of the 8 layers. How often is its most likely token the one of
# the whole model? (This model was trained so that its early layers can guess, as in LayerSkip.)
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

# %% 3. How many layers should guess?
# `self_speculative` does this. Later exits guess better, but cost more for each guess. Four guesses
# in a pass; look for the E with the fewest runs of a layer for a token. Without guessing, it is 8.
title("3. self_speculative with E layers, 4 guesses in a pass")
EXITS = (1, 2, 4, 6, 7)


def write(lm):
    """Continue all prompts by 48 tokens; returns the new tokens of each, and the ledger."""
    with counting(lm) as counts:
        new = [lm.generate(ids, 48) for ids in prompts]
    return new, counts


plain, plain_counts = write(lm)
TOKENS = sum(map(len, plain))


def cost(counts):
    """Tokens per pass; multiply-adds and bytes of weights per token, relative to plain decoding."""
    passes = counts.events["target passes"] or counts.events["passes"]
    work, plain_work = counts.total(), plain_counts.total()
    return (
        TOKENS / passes,
        work.multiply_adds / plain_work.multiply_adds,
        work.weight_bytes / plain_work.weight_bytes,
    )


# %% ... counted
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
# One layer is wrong too often: a pass brings few tokens. Seven layers are right most of the time,
# but four guesses and the check are 4 * 7 + 8 = 36 runs for at most five tokens, which take 40 runs
# without guessing: there is hardly anything to gain. The best E is in between.
#
# (Multiply-adds fall with E: a wrong guess costs a whole row of the check, and later exits are
# wrong less often. As in tutorial 11, they are above 1: what is saved are passes, not products.)

# %% 4. No model at all: the text so far
# Texts repeat themselves. Take the last words, look where the same words stood before, and guess
# what followed. Prefer a match of more words, then the latest one.
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
# The last two words stand at the beginning, too. Such a guess costs nothing. When will it be right?

# %% ... on stories
# `prompt_lookup` guesses 4 tokens in a pass. We continue the beginning of a story; then the same
# after 200 tokens of other stories, which have phrases to copy; and after the same beginning with
# 100 tokens that the model wrote itself, as if somebody asked again. Where are most guesses right?
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
# It needs text to copy from, and a model that repeats itself. This one tells new stories, so it
# seldom copies more than a few words. Where the task itself is to repeat (correct this text, change
# this program, answer from this page), prompt lookup is hard to beat: its guesses cost a search and
# nothing else.

# %% 5. Guess, and let the model correct: by hand
# Now from nothing at all. Greedy text solves a chain of equations: each token is a function of
# those before it. Let a "token" be an integer that depends on the one before it only: y = (2 x + 1)
# mod 11. After 1 come 3, 7, 4, 9, 8, 6. To find them one by one takes six steps. Jacobi's method
# guesses all six, and computes all right-hand sides at once, each from the guess before it. The
# results are the new guesses. If nothing changes, all equations hold. Check the first two passes by
# hand.
title("5. Jacobi's method on a chain of six integers")


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


passes_chain = solve(chain, 1, [5, 2, 8, 0, 6, 10])
assert passes_chain == 6
# The first result is computed from a known token, so it is right after one pass. Then the second is
# computed from a right one, and so on: each pass makes at least one more right, and the fixed point
# is the greedy text. But here it is exactly one per pass, so nothing is gained.

# %% ... and where it gains
# Another function: a quarter of x, rounded down, and 5 more. After 30 come 12, 8, 7, 6, 6, 6.
passes_forgetful = solve(forgetful, 30, [0, 0, 0, 0, 0, 0])
assert passes_forgetful == 3
# Three passes for six numbers. This function forgets most of its input: it gives the same result
# for a guess that is only nearly right. So Jacobi's method gains where a token hardly depends on
# those before it. How is that in a text?

# %% 6. The same on a story
# One pass of the model computes all right-hand sides: the most likely token after the text and each
# of the guesses. The first guesses are random words of the text. Each line is a pass; what is right
# stands left of the bar. Look to the right of it, too.
title("6. Jacobi decoding of the next 8 tokens")
M = 8


def jacobi_pass(text, guesses):
    """The model's tokens after the text and after each guess (M + 1)."""
    return lm.logits(text + guesses)[len(text) - 1 :].argmax(-1).tolist()


def words(ids):
    return " ".join(f"{lm.tokenizer.decode([token]).strip()[:9]:9}" for token in ids)


def jacobi_block(text, show=False):
    """Solve for the next M tokens. Returns them, the number of passes, and all pairs (guess, token
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


text = lm.encode(STORY + QUESTION)
solution, passes, pairs = jacobi_block(text, show=True)
print(f"{M} tokens in {passes} passes")
# Hardly better than one token per pass, as in the chain. A token depends on all tokens before it,
# and a wrong one among them is enough: what stands right of the bar answers another question.

# %% 7. Keep what is wrong: n-grams
# But there are pieces of good language among it, right in themselves, only not in this place. So
# collect them: each guess, and the token that the model put after it. (Here pairs; `lookahead`
# collects n-grams of 3 tokens.) How many pairs of neighbors in the 24 tokens that come after these
# 8 have been collected by then? Some of them stand in the text already, where prompt lookup would
# find them, so the others are counted apart. The last bar is for as many random pairs of words.
title("7. Pairs of neighbors in the tokens that follow")
followed, collected, new_ones, by_chance = 0, 0, 0, 0
rng = random.Random(0)
for ids in prompts:
    solution, _, pairs = jacobi_block(ids)
    after = lm.generate(ids + solution, 24)
    neighbors = list(zip([solution[-1], *after], after))
    text = ids + solution
    known = set(zip(text, text[1:]))
    drawn = {(rng.choice(ids), rng.choice(ids)) for _ in pairs}
    followed += len(neighbors)
    collected += sum(pair in pairs for pair in neighbors)
    new_ones += sum(pair in pairs - known for pair in neighbors)
    by_chance += sum(pair in drawn for pair in neighbors)
labels = ["collected", "... and not in the text so far", "random pairs"]
bar_chart(labels, [n / followed for n in (collected, new_ones, by_chance)], "{:.0%}")
assert collected > 2 * by_chance
# Each of these pairs could have been a right guess, though in stories most of them stand in the
# text, too. Lookahead decoding makes use of them: in each pass, a window of guesses is corrected as
# above, and the n-grams that begin with the text's last token are checked, side by side as branches
# of a tree (minitx/shared/token_tree.py).

# %% 8. All of them
# The same prompts with each; `speculative` has the draft model of tutorial 11. The last row is a
# baseline: lookahead that checks as many n-grams, but random ones of its pool. Look at tokens per
# pass first, then at what they cost. The speed is that of one text.
title("8. What a pass brings, and what it costs (without guessing = 1)")
ALL = {
    "speculative": {"speculative": True},
    "self_speculative": {"self_speculative": True},
    "prompt_lookup": {"prompt_lookup": True},
    "jacobi": {"jacobi": True},
    "lookahead": {"lookahead": True},
    "random n-grams": {"lookahead": {"choose": "random"}},
}
table, brought, tasks = [], {}, [partial(lm.generate, prompts[0], 40)]
for name, flags in ALL.items():
    guessing = minitx.load("stories", **flags)
    new, counts = write(guessing)
    assert new == plain
    brought[name], *price = cost(counts)
    table.append([name, *(f"{number:.2f}" for number in (brought[name], *price))])
    tasks.append(partial(guessing.generate, prompts[0], 40))
plain_time, *times = time_side_by_side(*tasks, repeats=3, own_time=True)
for row, seconds in zip(table, times):
    row.append(f"{plain_time / seconds:.2f}")
print_table(["", "tokens per pass", "multiply-adds", "weights read", "speed"], table)
assert brought["jacobi"] < 1.2 < brought["lookahead"]
assert brought["random n-grams"] < brought["lookahead"]
# All write the same text. jacobi gains next to nothing. lookahead brings about as many tokens as
# prompt_lookup, since most of the n-grams that fit stand in the text as well. But its passes have
# some 10 rows, most of them for nothing: several times the multiply-adds. It is for machines on
# which rows are free, and in NumPy they are not (tutorial 11, section 8). The other speeds are near
# 1 because `stories` is small: reading weights is not what takes its time.
#
# Which one, then? A draft model if there is a good one. self_speculative if the model was trained
# for early exits: there is nothing else to store, and no second cache. prompt_lookup where texts
# repeat. The others teach us what a pass can do.

# %% Try this
# 1. In section 1, change one number so that token A's exit after layer 1 is wrong. If you know that
#    a layer adds 0, 1 or 2 to each word: which hidden states after layer 2 leave no doubt about the
#    result? Do those of A and B?
# 2. In section 3, set gamma to 1 and to 8. Which E is best then, and why does it move?
# 3. In section 5, solve the chain y = (x * x) mod 7 from 3 with your own guesses. Which guesses are
#    right after the first pass although the one before them was wrong? (Which x have the same
#    square?)
# 4. In section 8, give lookahead more to do: {"window": 8}, then {"window": 8, "ngram": 4}. What
#    does one more token per pass cost in multiply-adds?
