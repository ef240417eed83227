# %% [markdown]
"""Tutorial 2: the KV cache. What does one more token cost, and why do we keep keys and values?

Tutorial 1 recomputed the whole text for every new token. No inference engine does that. Here we see
why it is not needed, first on an example that fits on paper, then on a trained model. Then we count
what a token still costs. Counts are the same on every machine; times are measured on yours.

You need matrix products, the softmax, and attention as in tutorial 1: queries are compared with
keys, and the result is a weighted sum of values.

Letters: S tokens so far (the newest included), D width, H query heads, K key/value heads, d head
width, F hidden width, V vocabulary, L layers. A multiply-add is one product added to a sum.
"""

# %% [markdown]
# ## A model and some text to run it on

# %%
from functools import partial

import numpy as np
from helpers import (
    STORY,
    bar_chart,
    count_last,
    load_stories,
    print_table,
    save_lines,
    say,
    speedup,
    time_side_by_side,
    title,
)

from minitx.ledger import counting
from minitx.tree import weights

lm = load_stories()
model, c = lm.model, lm.model.config
D, H, K, d, F, V, L = c.width, c.heads, c.kv_heads, c.head_width, c.hidden, c.vocab_size, c.layers
story = lm.encode(STORY)
text = (story * c.context)[: c.context]  # the story over and over, as long as the model can read

# %% [markdown]
# ## 1. Three tokens and two heads, by hand
#
# The smallest attention with more than one head: D = 2, and each head owns one column. The queries
# are the rows of x, the keys are twice as large, the values ten times.

# %%
title("1. Three tokens and two heads, by hand")
x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5]])  # a row for each token
to_query, to_key, to_value = np.eye(2), 2 * np.eye(2), 10 * np.eye(2)


def attend(query, keys, values):
    """One query (2,) over keys and values (S, 2); head h owns column h."""
    scores = query * keys  # (S, 2): heads are one number wide, so a dot product is a product
    attention_weights = np.exp(scores) / np.exp(scores).sum(0)  # softmax over the tokens
    return (attention_weights * values).sum(0)  # (2,)


print("without a cache: every step computes the keys and values of all tokens so far")
expected = []
for S in (1, 2, 3):
    queries, keys, values = x[:S] @ to_query, x[:S] @ to_key, x[:S] @ to_value
    expected.append(attend(queries[-1], keys, values))
    print(f"  token {S}: keys of head 1: {keys[:, 0]}, result {expected[-1].round(2)}")

# %% [markdown]
# ## ... and with a KV cache
#
# To check one result on paper: the third token has the query 1 in head 1, and the keys are 2, 0, 2.
# The exponentials of 2, 0, 2 are 7.39, 1, 7.39; divided by their sum they are 0.47, 0.06, 0.47. The
# values are 10, 0, 10, so the result is 4.7 + 0 + 4.7 = 9.4.
#
# Look at the keys above: the old ones are computed again in every step, and they come out the same
# every time. They must, for the row of an old token does not change when a new one arrives: the
# causal mask keeps it from looking there. So we append each new key and value to a cache, and
# compute one row per step.

# %%
print("with a cache: every step computes one row, and appends it")
cached_keys, cached_values = np.empty((0, 2)), np.empty((0, 2))
for S in (1, 2, 3):
    new = x[S - 1 : S]  # (1, 2) the new token alone
    cached_keys = np.concatenate([cached_keys, new @ to_key])
    cached_values = np.concatenate([cached_values, new @ to_value])
    result = attend((new @ to_query)[0], cached_keys, cached_values)
    print(f"  token {S}: computed key {(new @ to_key)[0, 0]}, result {result.round(2)}")
    assert np.array_equal(result, expected[S - 1])

# %% [markdown]
# The results are equal, digit for digit: nothing is approximated. Queries are not cached, as nobody
# needs an old one: a token's query is used in its own step only, its key and value in all later
# ones.

# %% [markdown]
# ## 2. The same on a trained model
#
# `state` holds the KV cache of all layers. First the whole prompt goes through the model, which is
# called prefill; then one token at a time, which is called decode.

# %%
title("2. The same text, with and without a KV cache")


def without_cache(prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.next_logits(ids).argmax()))  # every token so far, all over again
    return ids[len(prompt) :]


def with_cache(prompt, count):
    state, new = model.new_state(), []
    ids = prompt
    for _ in range(count):
        new.append(int(model.next_logits(ids, state).argmax()))
        ids = new[-1:]  # from now on one token each time
    return new


# %% [markdown]
# ## ... gives the same text
#
# Compare how many rows go through the blocks, and then the time: they do not shrink alike.

# %%
N = 48
new = with_cache(story, N)
assert new == without_cache(story, N)
say(f"... Tom went to the park. >>>{lm.tokenizer.decode(new)}")

rows_without = sum(range(len(story), len(story) + N))
rows_with = len(story) + N - 1
gain = speedup(partial(without_cache, story, N), partial(with_cache, story, N), repeats=3)
say(
    f"{N} new tokens after a prompt of {len(story)}, the same both ways.",
    f"Rows through the blocks: {rows_without:,} without a cache, {rows_with} with one, so",
    f"{rows_without / rows_with:.0f} times fewer. Measured: {gain:.1f} times as fast.",
)

# %% [markdown]
# Why is it not 33 times as fast? One row at a time is the slowest way to use a processor: see
# sections 4 and 5.

# %% [markdown]
# ## 3. Multiply-adds: what one more token costs
#
# A row of `in` numbers times a matrix (in, out) takes in * out multiply-adds. In attention, a query
# takes d of them for the score of each key, and d more to add up each value. So one more token
# after S - 1 others costs, with a KV cache:

# %%
title("3. Multiply-adds of one token, by formula and counted")


def multiply_adds(S):
    return {
        "projections": L * (D * H * d + 2 * D * K * d + H * d * D),  # q, k and v, output
        "attention": L * S * H * 2 * d,
        "feed-forward": L * 3 * D * F,  # gate, up, down
        "head": D * V,
    }


# `count_last` counts the last token's step, with a KV cache. Look for the column that depends on S.
LENGTHS = (1, 64, 256, 512)
table, with_one, without = [], [], []
for S in LENGTHS:
    cost = multiply_adds(S)
    counted = count_last(lm, text[:S]).total().multiply_adds  # what the model really does
    assert counted == sum(cost.values())
    table.append([S, *cost.values(), counted])
    with_one.append(counted)
    # Without a cache all S tokens are run, of which token s attends to s tokens. Only the head can
    # be spared for all but the last.
    all_rows = sum(sum(multiply_adds(s).values()) for s in range(1, S + 1))
    without.append(all_rows - (S - 1) * D * V)
print_table(["S", *cost, "counted in all"], table)

# %% [markdown]
# ## ... and without a cache

# %%
print("Million multiply-adds of the next token:")
labels, bars = [], []
for S, all_tokens, one_token in zip(LENGTHS, without, with_one):
    labels += [f"S = {S:3} without", f"S = {S:3} with"]
    bars += [all_tokens / 1e6, one_token / 1e6]
bar_chart(labels, bars, "{:.1f}", width=60)
lines = {"without a KV cache": without, "with a KV cache": with_one}
save_lines("02_cost_of_a_token", LENGTHS, lines, "tokens so far", "multiply-adds", log=True)
assert without[-1] > 600 * without[0] and with_one[-1] < 1.66 * with_one[0]

# %% [markdown]
# From the first token to the 512th, the cost grows by 65 % with a KV cache, and more than 600 times
# without.

# %% [markdown]
# ## 4. Bytes: what one more token has to read
#
# Multiply-adds are half of the story. To multiply, numbers have to come from memory: all weights,
# whatever the text, and the keys and values of all tokens so far.

# %%
title("4. Bytes read for one token")
counts = count_last(lm, text).total()  # S = 512
per_token = L * 2 * K * d * 4  # a key and a value in every layer, 4 bytes a number
assert counts.cache_bytes == per_token * 512
read = counts.weight_bytes + counts.cache_bytes
print(f"weights {counts.weight_bytes / 1e6:.2f} MB, KV cache at S = 512", end=" ")
print(f"{counts.cache_bytes / 1e6:.2f} MB ({per_token:,} bytes a token)")
print(f"multiply-adds per byte: {counts.multiply_adds / read:.2f}")

# %% [markdown]
# About one multiply-add for a number of 4 bytes. Is that little? We multiply one row by a matrix
# that is too large for the caches of the processor, so that it has to come from memory, and then 64
# rows. Were arithmetic the limit, they would take 64 times as long.

# %%
big = np.ones((2048, 12288), np.float32)
one_row, many_rows = np.ones((1, 2048), np.float32), np.ones((64, 2048), np.float32)
tasks = partial(np.matmul, one_row, big), partial(np.matmul, many_rows, big)
one_time, many_time = time_side_by_side(*tasks, repeats=5)
print(f"times a matrix of {big.nbytes / 1e6:.0f} MB: 64 rows are 64 times the work of one", end=" ")
print(f"and take {many_time / one_time:.0f} times as long")

# %% [markdown]
# So arithmetic is not the limit for one row: the processor waits until the matrix has come from
# memory. That is called memory-bandwidth bound, and the decoding of a large model is like that.
# Many rows share what was read, until arithmetic is the limit (compute bound), and the prefill of a
# long prompt is like that.

# %% [markdown]
# ## 5. Passes: several rows at once
#
# So it should be cheap to run several rows through the model in one pass. Three cases have such
# rows: a prompt (all its tokens are known), several texts that are decoded side by side (a batch),
# and a text whose next tokens somebody has guessed (tutorial 11). First a function for each:

# %%
title("5. One pass of the model, by its number of rows")
state, batch_state = model.new_state(), model.new_state()
model.next_logits(text[:128], state)  # fills the KV cache with 128 tokens
model.next_logits(np.array([text[:128]] * 8), batch_state)  # 8 KV caches


def next_tokens(count):
    model(text[128 : 128 + count], state)  # the logits of `count` rows
    state.rewind(128)  # forget them, so that the pass can be repeated


def batch_of_8():
    model(np.array([text[128:129]] * 8), batch_state)
    batch_state.rewind(128)


# %% [markdown]
# ## ... what it reads, and how long it takes
#
# A pass reads the weights once for all of its rows. Look at the 4 rows: how many times as long as
# one do they take?

# %%
passes = {
    "1 token": partial(next_tokens, 1),
    "4 tokens of one text": partial(next_tokens, 4),
    "1 token of each of 8 texts": batch_of_8,
    "64 tokens of a prompt": partial(next_tokens, 64),
}
times = time_side_by_side(*passes.values(), repeats=30)
table, weights_read = [], []
for (name, run), rows, time in zip(passes.items(), (1, 4, 8, 64), times):
    with counting(lm) as counts:
        run()
    weights_read.append(counts.total().weight_bytes)
    relative = time / times[0]
    megabytes = f"{weights_read[-1] / 1e6:.1f} MB"
    table.append([name, rows, megabytes, f"{relative:.2f}", f"{relative / rows:.2f}"])
print_table(["", "rows", "weights read", "time of the pass", "time per row"], table)
assert weights_read[-1] < 1.01 * weights_read[0]

# %% [markdown]
# ## ... and why so much
#
# `stories` is small: its matrices fit into the caches of many processors. Is reading them the limit
# here, too? We time the products of one token by themselves.


# %%
def products():
    for row, matrix in pairs:
        row @ matrix


matrices = [w for w in weights(model).values() if w.ndim == 2]
pairs = [(np.ones(len(w), np.float32), w) for w in matrices]
products_alone, step = time_side_by_side(products, passes["1 token"], repeats=30)
print(f"All products of a token are {products_alone / step:.0%} of the time of its pass.")

# %% [markdown]
# No. The rest is attention, norms, and Python calling NumPy, which takes hardly longer for a few
# rows than for one. In a large model the reading of weights is nearly everything. In both, decode
# gets faster by making fewer passes.

# %% [markdown]
# ## 6. The price: memory
#
# A KV cache buys time with memory. All texts of a batch share the weights, but each text has a KV
# cache of its own. Look at the last column, also for a model of 8 billion weights (the shape of
# Llama 3 8B: 32 layers, 8 key/value heads of 128; 2 bytes a number, texts of 8,192 tokens).

# %%
title("6. The price: memory")


def cache_megabytes(layers, kv_heads, head_width, tokens, bytes_per_number):
    return 2 * layers * kv_heads * head_width * tokens * bytes_per_number / 1e6  # keys and values


small = cache_megabytes(L, K, d, c.context, 4)
large = cache_megabytes(32, 8, 128, 8192, 2)
table = [
    ["stories", f"{weights_read[0] / 1e6:,.1f}", f"{small:,.1f}", f"{32 * small:,.1f}"],
    ["8 billion weights", f"{8030 * 2:,.1f}", f"{large:,.1f}", f"{32 * large:,.1f}"],
]
print_table(["MB", "weights", "KV cache of one text", "of 32 texts"], table)

# %% [markdown]
# With 32 long texts the KV cache is larger than the weights, in both models.

# %% [markdown]
# ## 7. What is left to save
#
# The KV cache saves work and changes no result. The other techniques start from here. Each works on
# one part of a token's cost, so look at how large that part is before you expect much of it.

# %%
title("7. Where the multiply-adds of a token are, and which tutorial is about them")
SUBJECTS = {
    "projections": "3: compute before the first token what the weights alone decide",
    "attention": "6, 7: find the keys that matter without scoring all of them",
    "feed-forward": "5: skip networks that would change little",
    "head": "",
}
at_64, at_512 = multiply_adds(64), multiply_adds(512)
print("                S = 64  S = 512  tutorial")
for part, tutorial in SUBJECTS.items():
    shares = at_64[part] / sum(at_64.values()), at_512[part] / sum(at_512.values())
    print(f"  {part:12}  {shares[0]:6.0%}  {shares[1]:7.0%}  {tutorial}".rstrip())

# %% [markdown]
# Tutorial 4 stops at the first layer that is sure; 8, 9 and 10 make all products cheaper; 11 makes
# fewer passes. What to expect, for example: half of the feed-forward network is 31 % of the work at
# S = 64, so skipping it makes a token at most 1 / (1 - 0.31) = 1.45 times as fast.

# %% [markdown]
# ## Exercises
#
# Write it yourself: these exercises continue the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 5`: The KV cache
# - `minitx learn 6`: What a token costs
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/02_the_kv_cache_and_the_cost_of_a_token.py`.
#
# 1. Why can a model without a causal mask have no KV cache? At the end of section 1, let the first
#    token see all three: print(attend(x[0] @ to_query, cached_keys, cached_values)), and compare it
#    with expected[0]. What would have to happen to the keys of a second layer?
# 2. From which S on does attention cost more than the feed-forward networks? Solve it on paper with
#    the formulas of multiply_adds, then check with the function. Can this model read so many
#    tokens?
# 3. A small model guesses 3 tokens, and the large one checks them in one pass of 4 rows. Take the
#    time of that pass from section 5, and suppose that the guesses cost nothing. How many tokens
#    must such a pass bring on average to be faster than one token per pass? (It brings at least 1,
#    at most 4.)
