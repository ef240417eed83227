# %% [markdown]
"""Answers to the questions of tutorial 1.

``borrow`` takes a function out of the tutorial, so that it need not be written twice.
"""

# %%
from dataclasses import replace

import numpy as np
from helpers import ANSWER, QUESTION, STORY, borrow, largest_error, load_stories, say, title

from minitx.tree import weights

lm = load_stories()
c, W = lm.model.config, weights(lm.model)
flat_forward = borrow("01", "flat_forward")
ids = lm.encode(STORY + QUESTION)
(answer,) = lm.tokenizer.encode(ANSWER, special=False)
logits, _ = flat_forward(ids, W, c)

# %% [markdown]
# ## Question 1
#
# What is left right without the causal mask?
#
# Nothing. In a model of one block the last row would be: its query sees all keys anyway, and these
# come from the embeddings, which no mask has changed. In the second block the keys come from rows
# that have looked at later tokens, so they are wrong, and the last row reads them.
#
# ``borrow`` leaves the line out; ``first_blocks`` is the configuration with fewer blocks.

# %%
title("Question 1. Without the causal mask")
unmasked_forward = borrow("01", "flat_forward", without="s[:, causal_mask] = -np.inf")


def first_blocks(blocks):
    return replace(c, layers=blocks)


errors = {}
for blocks in (1, 2, c.layers):
    masked, _ = flat_forward(ids, W, first_blocks(blocks))
    unmasked, _ = unmasked_forward(ids, W, first_blocks(blocks))
    errors[blocks] = abs(unmasked - masked).max(-1)  # (T,) of each row
    print(f"{blocks} blocks: {np.sum(errors[blocks] < 1e-3)} of {len(ids)} rows right,", end=" ")
    print(f"the last one is off by {errors[blocks][-1]:.4f}")
assert errors[1][-1] < 1e-3 and errors[1][:-1].min() > 1e-3
assert errors[c.layers].min() > 1e-3

# %% [markdown]
# ## Question 2
#
# Which block is missed least?
#
# Without block 5 the model still says "park", and its logits hardly move. But it also does without
# any other block than the first: one short question asks little. How far the logits move says more:
# they move least without block 7, and most without block 1. (Tutorial 12 measures this on many
# stories.)

# %%
title("Question 2. Without one block")
moved = []
for block in range(c.layers):
    changed = dict(W)
    for name in (f"stack.blocks.{block}.attn.out.w", f"stack.blocks.{block}.ffn.down.w"):
        changed[name] = 0 * W[name]
    found, _ = flat_forward(ids, changed, c)
    moved.append(largest_error(found[-1], logits[-1]))
    word = lm.tokenizer.decode([int(found[-1].argmax())])
    print(f"without block {block + 1}: {word!r:10} logits move by {moved[-1]:.0%} of the largest")
assert np.argmax(moved) == 0 and np.argmin(moved) == 6

# %% [markdown]
# ## Question 3
#
# Where is Anna: after which block is it known, and which head looks it up?
#
# Her place is known later than Tom's, for whom there was less to confuse: he is the one the story
# was about last. Another head of the same block finds it.

# %%
title("Question 3. Where is Anna?")
anna = lm.encode(STORY + " Where is Anna? Anna is in the")
(kitchen,) = lm.tokenizer.encode(" kitchen", special=False)
for label, text, word in (("Tom", ids, answer), ("Anna", anna, kitchen)):
    known = []  # by the number of blocks that ran
    for blocks in range(1, c.layers + 1):
        found, attention_weights = flat_forward(text, W, first_blocks(blocks))
        known.append(bool(found[-1].argmax() == word))
    on_word = np.stack(attention_weights)[:, :, -1, text.index(word)]  # (L, H)
    layer, head = np.unravel_index(on_word.argmax(), on_word.shape)
    first = next(b for b in range(c.layers) if all(known[b:])) + 1
    say(
        f"{label}: known after block {first} and from there on. Block {layer + 1}, head {head + 1}",
        f"puts {on_word[layer, head]:.0%} of its attention on the place.",
    )
assert first == 4 and layer == 3
