"""Tutorial 2: the KV cache. What does one more token cost, and why do we keep keys and values?

Tutorial 1 recomputed the whole text for every new token. No inference engine does that. Here we see
why it is not needed, first on an example that fits on paper, then on a trained model. Then we count
what a token still costs. Counts are the same on every machine; times are measured on yours.

You need matrix products, the softmax, and attention as in tutorial 1: queries are compared with
keys, and the result is a weighted sum of values.

Letters: S tokens so far (the newest included), D width, H query heads, K key/value heads, d head
width, F hidden width, V vocabulary, L layers. A multiply-add is one product added to a sum.
"""

# %% A model and some text to run it on
from functools import partial

import numpy as np
from helpers import (
    STORY,
    bar_chart,
    count_last,
    decode_last,
    load_stories,
    print_table,
    save_lines,
    say,
    speedup,
    time_side_by_side,
    title,
)

from minitx.tree import weights

lm = load_stories()
model, c = lm.model, lm.model.config
D, H, K, d, F, V, L = c.width, c.heads, c.kv_heads, c.head_width, c.hidden, c.vocab_size, c.layers
story = lm.encode(STORY)
text = (story * c.context)[: c.context]  # the story over and over, as long as the model can read

# %% 1. Three tokens and two heads, by hand
# The smallest attention with more than one head: D = 2, and each head owns one column. The queries
# are the rows of x, the keys are twice as large, the values ten times.
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

# %% ... and with a KV cache
# To check one result on paper: the third token has the query 1 in head 1, and the keys are 2, 0, 2.
# The exponentials of 2, 0, 2 are 7.39, 1, 7.39; divided by their sum they are 0.47, 0.06, 0.47. The
# values are 10, 0, 10, so the result is 4.7 + 0 + 4.7 = 9.4.
#
# Look at the keys above: the old ones are computed again in every step, and they come out the same
# every time. They must, for the row of an old token does not change when a new one arrives: the
# causal mask keeps it from looking there. So we append each new key and value to a cache, and
# compute one row per step.
print("with a cache: every step computes one row, and appends it")
cached_keys, cached_values = np.empty((0, 2)), np.empty((0, 2))
for S in (1, 2, 3):
    new = x[S - 1 : S]  # (1, 2) the new token alone
    cached_keys = np.concatenate([cached_keys, new @ to_key])
    cached_values = np.concatenate([cached_values, new @ to_value])
    result = attend((new @ to_query)[0], cached_keys, cached_values)
    print(f"  token {S}: computed key {(new @ to_key)[0, 0]}, result {result.round(2)}")
    assert np.array_equal(result, expected[S - 1])
# The results are equal, digit for digit: nothing is approximated. Rows computed: 1 + 2 + 3 without
# a cache, 1 + 1 + 1 with it. Queries are not cached, as nobody needs an old one: a token's query is
# used in its own step only, its key and value in all later ones.

# %% 2. The same on a trained model
# `state` holds the KV cache of all layers. First the whole prompt goes through the model, which is
# called prefill; then one token at a time, which is called decode.
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


# %% ... gives the same text
# Compare how many rows go through the blocks, and then the time: they do not shrink alike.
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
# Why is it not 33 times as fast? One row at a time is the slowest way to use a processor. Sections
# 5 and 6 are about that.

# %% 3. Multiply-adds: what one more token costs
# A row of `in` numbers times a matrix (in, out) takes in * out multiply-adds. In attention, a query
# takes d of them for the score of each key, and d more to add up each value. So with a KV cache,
# one more token after S - 1 others costs:
title("3. Multiply-adds of one token, by formula and counted")


def multiply_adds(S):
    return {
        "projections": L * (D * H * d + 2 * D * K * d + H * d * D),  # q, k and v, output
        "attention": L * S * H * 2 * d,
        "feed-forward": L * 3 * D * F,  # gate, up, down
        "head": D * V,
    }


# Look for the one column that depends on S.
LENGTHS = (1, 16, 64, 256, 512)
table = []
for S in LENGTHS:
    cost = multiply_adds(S)
    counted = count_last(lm, text[:S]).total().multiply_adds  # what the model really does
    assert counted == sum(cost.values())
    table.append([S, *cost.values(), counted])
print_table(["S", *cost, "counted in all"], table)
first, at_64, at_512 = (sum(multiply_adds(S).values()) for S in (1, 64, 512))
say(
    "Only attention grows with the text. Compared to the first token, the 64th costs",
    f"{at_64 / first - 1:.0%} more and the 512th {at_512 / first - 1:.0%} more.",
)

# %% ... and without a cache
# Without a KV cache the step runs all S tokens; only the head can be spared for all but the last.
title("What the next token costs without and with a KV cache, in million multiply-adds")


def without_cache_multiply_adds(S):
    blocks = sum(sum(multiply_adds(s).values()) - D * V for s in range(1, S + 1))
    return blocks + D * V


without = [without_cache_multiply_adds(S) / 1e6 for S in LENGTHS]
with_one = [sum(multiply_adds(S).values()) / 1e6 for S in LENGTHS]
labels = []
for S in LENGTHS:
    labels += [f"S = {S:3} without", f"S = {S:3} with"]
values = np.stack([without, with_one], -1).ravel()  # without, with, without, with, ...
bar_chart(labels, values, "{:.1f}", width=60)
lines = {"without a KV cache": without, "with a KV cache": with_one}
y_label = "million multiply-adds"
save_lines("02_cost_of_a_token", LENGTHS, lines, "tokens so far", y_label, log=True)
# Without a cache the cost of one token grows faster than the text; with it, it hardly grows at all.

# %% 4. Bytes: what one more token has to read
# Multiply-adds are half of the story. To multiply, numbers have to come from memory: all weights,
# whatever the text, and the keys and values of all tokens so far. Look at the last column.
title("4. Bytes read for one token")
table = []
for S in LENGTHS:
    counts = count_last(lm, text[:S]).total()
    assert counts.cache_bytes == L * 2 * K * d * 4 * S  # keys and values, 4 bytes a number
    everything = counts.weight_bytes + counts.cache_bytes
    intensity = counts.multiply_adds / everything
    weights_read = f"{counts.weight_bytes / 1e6:.2f} MB"
    cache_read = f"{counts.cache_bytes / 1e6:.2f} MB"
    table.append([S, weights_read, cache_read, f"{intensity:.2f}"])
print_table(["S", "weights", "KV cache", "multiply-adds per byte"], table)
per_token = L * 2 * K * d * 4
say(
    f"Each token adds {per_token:,} bytes to the KV cache; after",
    f"{counts.weight_bytes // per_token:,} tokens it is as large as the weights. A token does",
    "about one multiply-add for every four bytes: it uses each 4-byte number once.",
)

# %% 5. One row or many: memory-bandwidth bound
# Is that little? We multiply one row, and then several, by a matrix that is too large for the
# caches of the processor, so that it has to come from memory each time. Were arithmetic the limit,
# 64 rows would take 64 times as long as one. Look at the time per row.
big = np.ones((2048, 12288), np.float32)
title(f"5. Rows times a matrix of {big.nbytes / 1e6:.0f} MB")
ROWS = (1, 4, 16, 64)
tasks = [partial(np.matmul, np.ones((rows, 2048), np.float32), big) for rows in ROWS]
only_read = partial(np.vdot, big, big)  # a sum of squares: reads each number once
read_time, *times = time_side_by_side(only_read, *tasks, repeats=5)

table = []
for rows, time in zip(ROWS, times):
    intensity = f"{rows * big.size / big.nbytes:.2f}"
    bandwidth = f"{big.nbytes / time / 1e9:.1f} GB/s"
    relative = time / times[0]
    table.append([rows, intensity, f"{relative:.1f}", f"{relative / rows:.2f}", bandwidth])
print_table(["rows", "multiply-adds per byte", "time", "time per row", "matrix read at"], table)
say(
    f"Reading the matrix once, to sum its squares, takes {read_time / times[0]:.0%} of the time of",
    f"1 row. And 64 rows do 64 times the work in {times[-1] / times[0]:.0f} times the time.",
)
# One row reads the matrix about as fast as memory delivers it, and the arithmetic units wait. That
# is memory-bandwidth bound, and decode is like that. Many rows share what was read, until
# arithmetic is the limit (compute bound), and prefill is like that. (From 1 row to 4 the time jumps
# because a product of two matrices begins by rearranging the large one; further rows cost little.)

# %% 6. Prefill, decode, and batches
# So the same multiply-adds take less time if many rows go through the model in one pass. Two cases
# have such rows: a prompt, whose tokens are all known (prefill), and several texts that are decoded
# side by side (a batch). Before you run it: how much faster do you expect each to be?
title("6. The same work in fewer passes")


def prefill():
    model.next_logits(text[:256], model.new_state())


def token_by_token():
    state = model.new_state()
    for token in text[:256]:
        model.next_logits([token], state)


gain = speedup(token_by_token, prefill, repeats=3)
print(f"256 tokens of a prompt: one pass is {gain:.0f} times as fast as 256 passes")

# %% ... a batch of 8 texts
texts = np.array([text[start : start + 128] for start in range(8)])  # (8, 128)
state = model.new_state()
model.next_logits(texts[:, :-1], state)  # fills 8 KV caches
single_step = decode_last(lm, list(texts[0]))  # a function that decodes the last token


def batch_step():
    model.next_logits(texts[:, -1:], state)
    state.rewind(127)  # forget this token, so that the step can be repeated


def eight_single_steps():
    for _ in range(8):
        single_step()


gain = speedup(eight_single_steps, batch_step, repeats=40)
print(f"8 texts, one token each: one pass is {gain:.1f} times as fast as 8 passes")


# %% ... and why so much
# `stories` is small: its matrices fit into the caches of many processors. Is reading them the limit
# here, too? We time the products of one token by themselves, and the whole step.
def products():
    for row, matrix in pairs:
        row @ matrix


matrices = [w for w in weights(model).values() if w.ndim == 2]
pairs = [(np.ones(len(w), np.float32), w) for w in matrices]
products_alone, step = time_side_by_side(products, single_step, repeats=30)
say(
    f"All products of a token take {1e3 * products_alone:.2f} ms, the whole step",
    f"{1e3 * step:.2f} ms: {step / products_alone:.1f} times as long.",
)
# The rest is attention, norms, and Python calling NumPy: a fixed cost of each pass, however many
# rows it has. In a large model the reading of weights is nearly everything. In both, decode gets
# faster by making fewer passes. (Tutorial 11 makes fewer passes for a single text.)

# %% 7. The price: memory
# A KV cache buys time with memory. Weights are shared by all texts of a batch, but each text has a
# KV cache of its own. Look at the last column for a model of 8 billion weights (the shape of Llama
# 3 8B, 2 bytes a number, texts of 8,192 tokens).
title("7. The price: memory")


def cache_megabytes(layers, kv_heads, head_width, tokens, bytes_per_number):
    return 2 * layers * kv_heads * head_width * tokens * bytes_per_number / 1e6  # keys and values


small = cache_megabytes(L, K, d, c.context, 4)
large = cache_megabytes(32, 8, 128, 8192, 2)
table = [
    ["stories", f"{counts.weight_bytes / 1e6:,.1f}", f"{small:,.1f}", f"{32 * small:,.1f}"],
    ["8 billion weights", f"{8030 * 2:,.1f}", f"{large:,.1f}", f"{32 * large:,.1f}"],
]
print_table(["MB", "weights", "KV cache of one text", "of 32 texts"], table)
say(
    "With 32 long texts the KV cache is larger than the weights, in both models. If every query",
    f"head had its own key head, it would be {H // K} times as large in stories and 4 times in the",
    "large model.",
    "Tutorial 8 stores it in fewer bits.",
)

# %% 8. What is left to save
# The KV cache saves work and changes no result. The other techniques start from here. Each works on
# one part of a token, so look at how large that part is before you expect much of it.
title("8. Where the multiply-adds of a token are, and which tutorial is about them")
NEXT = {
    "projections": "3: compute before the first token what the weights alone decide",
    "feed-forward": "5: skip networks that would change little",
    "attention": "6, 7: find the keys that matter without scoring all of them",
    "one layer": "4: stop at the first layer that is sure",
    "everything": "8, 9, 10: fewer bits, fewer weights, tables; 11: fewer passes",
}
print("                S = 16  S = 512  tutorial")
for part, tutorial in NEXT.items():
    shares = []
    for S in (16, 512):
        cost = multiply_adds(S)
        total = sum(cost.values())
        cost["everything"] = total
        cost["one layer"] = (total - cost["head"]) / L
        shares.append(cost[part] / total)
    print(f"  {part:13} {shares[0]:6.0%}  {shares[1]:7.0%}  {tutorial}")
# Half of the feed-forward network at S = 16 is a third of the work: skipping it makes a token at
# most 1 / (1 - 0.33) = 1.5 times as fast, however clever the skipping.

# %% Try this
# 1. In section 1, let the first token see all three: attend(x[0] @ to_query, keys, values). Compare
#    with its result in the first step. A second layer would compute its keys from these results.
#    Why can a model without a causal mask have no KV cache?
# 2. From which S on does attention cost more than the feed-forward networks? Solve it on paper with
#    the formulas of multiply_adds, then check with the function. Can this model read so many
#    tokens?
# 3. A small model guesses 3 tokens, and the large one checks them in one pass of 4 rows. Take the
#    time of 4 rows from section 5, and suppose that the guesses cost nothing. How many tokens has
#    such a pass to bring on average to be faster than one token per pass? (At least 1, at most 4.)
