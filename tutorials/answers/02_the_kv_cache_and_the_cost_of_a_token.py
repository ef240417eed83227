# %% [markdown]
"""Answers to the questions of tutorial 2."""

# %%
import numpy as np
from helpers import borrow, load_stories, say, time_side_by_side, title

lm = load_stories()
model, c = lm.model, lm.model.config
D, H, K, d, F, V, L = c.width, c.heads, c.kv_heads, c.head_width, c.hidden, c.vocab_size, c.layers

# %% [markdown]
# ## Question 1
#
# Why can a model without a causal mask have no KV cache?
#
# If the first token sees all three, its result changes from (10, 0) to another one as soon as the
# next token arrives. In a second layer its key is computed from that result, so the key in the
# cache would be out of date after every step: all of it has to be computed again.

# %%
title("Question 1. Without a causal mask")
attend = borrow("02", "attend")
x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5]])
keys, values = 2 * x, 10 * x
results = [attend(x[0], keys[:S], values[:S]) for S in (1, 2, 3)]
for S, result in enumerate(results, 1):
    print(f"the first token, when there are {S}: {result.round(2)}")
assert np.array_equal(results[0], [10, 0])
assert not np.allclose(results[1], results[0]) and not np.allclose(results[2], results[1])

# %% [markdown]
# ## Question 2
#
# From which S on does attention cost more than the feed-forward networks?
#
# L S H 2 d > L 3 D F, so S > 3 D F / (2 H d). As H d = D here, that is 3 F / 2 = 528: longer than
# the context of 512. In this model feed-forward networks always cost more.

# %%
title("Question 2. When attention costs more")
multiply_adds = borrow("02", "multiply_adds", L=L, D=D, H=H, K=K, d=d, F=F, V=V)
S = 3 * D * F / (2 * H * d)
print(f"S > 3 D F / (2 H d) = {S:.0f}, and the context is {c.context}")
at, after = multiply_adds(int(S)), multiply_adds(int(S) + 1)
assert at["attention"] == at["feed-forward"] and after["attention"] > after["feed-forward"]
assert S > c.context

# %% [markdown]
# ## Question 3
#
# How many tokens must a pass of 4 rows bring to pay?
#
# As many as it takes longer than a pass of one row, as that brings one token. Both are timed here,
# so the number depends on your machine. (Tutorial 11 goes on from here.)

# %%
title("Question 3. A pass of 4 rows")
state = model.new_state()
model(np.arange(128), state)


def rows(count):
    def run():
        model(np.arange(count), state)
        state.rewind(128)

    return run


one, four = time_side_by_side(rows(1), rows(4), repeats=10)
say(
    f"A pass of 4 rows takes {four / one:.2f} times as long as one of 1, so it has to bring more",
    f"than {four / one:.2f} tokens: one is certain, and {max(four / one - 1, 0):.2f} of the 3",
    "guesses have to be right on average.",
)
assert state.position == 128
