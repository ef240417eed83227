# %% [markdown]
"""Tutorial 3: before the first token. What can be computed before the first token, without changing
a single answer?

The weights of a trained model never change. Whatever follows from them alone can be computed once,
before anybody asks (offline), instead of again for every token (online). This tutorial goes through
the ways that leave every answer as it is. The question that decides each of them: how much of the
text does a result depend on? On nothing, on one token, on everything so far?

Letters, as everywhere in minitx: T tokens, D width, H query heads, K key/value heads, d head width,
V vocabulary, L layers (blocks).
"""

# %% [markdown]
# ## A model and a text

# %%
import numpy as np
from helpers import (
    QUESTION,
    STORY,
    bar,
    count_last,
    decode_last,
    largest_error,
    load_stories,
    print_table,
    save_lines,
    say,
    time_side_by_side,
    title,
    tree_changes,
    verdict,
)

import minitx
from minitx.state import Layer
from minitx.tree import weights

lm = load_stories()  # computes in float32: about 7 digits
lm64 = minitx.load("stories", dtype=np.float64)  # the same weights, computing with 16 digits
c = lm.model.config
ids = lm.encode(STORY + QUESTION)
T = len(ids)
answer = lm.generate(ids, 40)  # 40 tokens by greedy decoding: always the most likely one
say(STORY + QUESTION, ">>>" + lm.tokenizer.decode(answer))

# %% [markdown]
# ## 1. A gain and a matrix, by hand
#
# In front of a matrix stands a norm. It divides a row x by its size (the root of the mean square,
# RMS), then multiplies each number by a learned gain g. Then comes the matrix W:
#
#     y = (x / rms * g) @ W
#
# Two numbers, a 2 x 2 matrix: please check with a pencil. The gain multiplies number i of the row,
# and the matrix multiplies number i again, by row i of W. So why not multiply row i of W by g[i]?

# %%
title("1. A gain and a matrix, by hand")
x = np.array([3.0, -3.0])
g = np.array([2.0, 5.0])
W = np.array([[1.0, 3.0], [4.0, 2.0]])

rms = np.sqrt((x * x).mean())  # (9 + 9) / 2 = 9, and its root is 3
gained = x / rms * g
print("online:   x / rms =", x / rms, "  times the gain =", gained, "  times W =", gained @ W)

folded_W = g[:, None] * W  # offline, once: row i of W times g[i]
print("offline:  folded W =", folded_W[0], folded_W[1])
print("online:   x / rms =", x / rms, "  times folded W =", x / rms @ folded_W)
assert np.array_equal(gained @ W, (x / rms) @ folded_W)

# %% [markdown]
# The same result, and the multiplications by the gain are gone, for every x and not just this one.

# %% [markdown]
# ## 2. The same in every block of `stories`
#
# A block has two norms. One is read by three matrices (queries, keys, values), the other by two
# (gate and up, of the feed-forward network). The technique fold_norms multiplies the gain into all
# of their readers. Below is one block: "-" lines are before, "+" lines after. Look at what remains
# of the norms.

# %%
title("2. load('stories', fold_norms=True)")
folded = minitx.load("stories", fold_norms=True)
tree_changes(lm.model.stack.blocks[1], folded.model.stack.blocks[1])


def weight_count(lm):
    return sum(array.size for array in weights(lm.model).values())


gone = weight_count(lm) - weight_count(folded)
print(f"gone: {gone:,} weights, two gains of {c.width} numbers in each of {c.layers} blocks")
assert gone == 2 * c.layers * c.width
assert folded.generate(ids, 40) == answer
error = largest_error(folded.logits(ids), lm.logits(ids))
print(f"The answer is the same. The logits differ by {error:.0e} of the largest one.")

# %% [markdown]
# (The last norm, before the output head, keeps its gain: its reader is the embedding table, which
# is also read at the input, and there no gain is due.)

# %% [markdown]
# ## 3. "Exact" means: up to rounding
#
# In algebra nothing changed, and yet the logits differ a little. The reason is rounding: a computer
# keeps a few digits after each step, and our steps come in another order. You can see it with three
# numbers.

# %%
title("3. Rounding, or a mistake?")
first_two, last_two = (0.1 * 0.2) * 0.3, 0.1 * (0.2 * 0.3)
print("(0.1 * 0.2) * 0.3 =", first_two)
print("0.1 * (0.2 * 0.3) =", last_two)
assert first_two != last_two and abs(first_two - last_two) < 1e-15

# %% [markdown]
# ## ... how to tell one from the other
#
# How small must a difference be, if it is to pass as rounding? That is the wrong question. Compute
# with more digits: rounding shrinks by as many digits, a mistake stays. So we make mistakes on
# purpose, in the folded queries of block 4 (blocks are numbered from 0), and look at which columns
# notice.

# %%
PATH = "stack.blocks.4.attn.qkv.q.w"


def folded_with_mistake(dtype, mistake):
    """`stories` with fold_norms, and a mistake in one of the 40 matrices that it changes."""
    changed = minitx.load("stories", dtype=dtype, fold_norms=True)
    matrix = weights(changed.model)[PATH]  # (D, H * d)
    if mistake == "one gain wrong by 1/10,000":
        matrix[0] *= 1 + 1e-4
    if mistake == "one gain forgotten":
        matrix[0] /= weights(lm.model)["stack.blocks.4.attn.norm.gain"][0]
    return changed


table = []
for mistake in ("none", "one gain wrong by 1/10,000", "one gain forgotten"):
    changed = folded_with_mistake(np.float32, mistake)
    changed64 = folded_with_mistake(np.float64, mistake)
    error = largest_error(changed.logits(ids), lm.logits(ids))
    error64 = largest_error(changed64.logits(ids), lm64.logits(ids))
    same = changed.generate(ids, 40) == answer
    table.append([mistake, "yes" if same else "no", f"{error:.0e}", f"{error64:.0e}"])
    assert (error64 < 1e-12) == (mistake == "none")
print_table(["mistake", "same answer", "float32", "float64"], table)

# %% [markdown]
# The answer notices nothing, and float32 hides a small mistake in its rounding. Only float64 tells:
# without a mistake the error has 9 digits less, with one it stays where it is.

# %% [markdown]
# ## 4. Side by side
#
# Three matrices read the same row, one after another. Put side by side they are one wider matrix:
# the same multiplications and additions, in one call. A call costs something whatever its size:
# Python, checks, starting the product.

# %%
title("4. Three products in one call")
W_q = np.array([[1.0, 3.0], [4.0, 2.0]])
W_k = np.array([[1.0], [0.0]])
W_v = np.array([[0.0], [2.0]])
n = np.array([1.0, -1.0])
print("apart:       ", n @ W_q, n @ W_k, n @ W_v)
print("side by side:", n @ np.hstack([W_q, W_k, W_v]))

fused = minitx.load("stories", fuse_projections=True)
tree_changes(lm.model.stack.blocks[1], fused.model.stack.blocks[1])
assert fused.generate(ids, 40) == answer


def products(lm):
    """How many products with a matrix of weights one token takes."""
    entries = count_last(lm, ids).entries.values()
    return sum(entry.multiply_adds > 0 and entry.weight_bytes > 0 for entry in entries)


print(f"products for one token: {products(lm)} before, {products(fused)} after")
assert count_last(lm, ids).total().multiply_adds == count_last(fused, ids).total().multiply_adds

# %% [markdown]
# The multiply-adds are the same (a multiply-add: one multiplication and one addition, the unit of
# all work in a product). Seven matrices of a block became four. One more constant went into a
# matrix: scores are divided by sqrt(d), and now the queries' columns are, hence "scale=1".

# %% [markdown]
# ## 5. What depends on one token only: a table, by hand
#
# So far we used what depends on no token at all. What depends on one token has only V possible
# values, one for each token of the vocabulary. Take three tokens. Each has a row of two numbers in
# the embedding table; block 0 divides it by its RMS and multiplies it by the folded W of section 1.

# %%
title("5. A table with a row for each token, by hand")
VOCABULARY = ["Tom", "ran", "home"]
embedding = np.array([[3.0, -3.0], [2.0, 2.0], [7.0, 1.0]])  # (V, D)
rms = np.sqrt((embedding * embedding).mean(-1, keepdims=True))  # 3, 2 and 5
table = (embedding / rms) @ folded_W  # offline, once for each token
for word, row, ready in zip(VOCABULARY, embedding, table):
    print(f"  {word:5} embedding {row}  ->  ready in the table: {ready.round(1)}")

text = [0, 1, 2, 0, 1, 0]  # Tom ran home Tom ran Tom
x = embedding[text]
computed = x / np.sqrt((x * x).mean(-1, keepdims=True)) @ folded_W
assert np.array_equal(table[text], computed)
print(f"{len(text)} tokens: {len(text)} products if computed, {len(text)} reads from the table")

# %% [markdown]
# Three products were made for the table, however long the text is.

# %% [markdown]
# ## 6. The first layer of `stories` as a table
#
# The technique first_layer does this with the queries, keys and values of block 0. A row of its
# table holds the embedding (which is read too), q, k and v. The chart shows the work for one
# more token, the others being in the KV cache (the stored keys and values of earlier tokens): "#"
# is still done, "." is saved.

# %%
title("6. load('stories', first_layer=True)")
first = minitx.load("stories", first_layer=True)
assert first.generate(ids, 40) == answer
before, after = count_last(lm, ids), count_last(first, ids)
for part in [f"stack.blocks.{i}" for i in range(c.layers)] + ["head"]:
    was = before.total("model." + part).multiply_adds
    now = after.total("model." + part).multiply_adds
    print(f"  {part:14} {was:8,} {now:8,}  {bar(now, was, was // 4000):.<{was // 4000}}")

numbers = c.heads * c.head_width + 2 * c.kv_heads * c.head_width  # of q, k and v together
saved = before.total().multiply_adds - after.total().multiply_adds
assert saved == c.width * numbers
print(f"saved: {c.width} x {numbers} = {saved:,} of", end=" ")
print(f"{before.total().multiply_adds:,} multiply-adds, {saved / before.total().multiply_adds:.1%}")

table = weights(first.model)["embed.w"]
assert table.shape == (c.vocab_size, c.width + numbers)
offline = c.vocab_size * saved / before.total().multiply_adds
print(f"the table: {c.vocab_size:,} rows of {c.width} + {numbers} numbers,", end=" ")
print(f"{table.nbytes / 1e6:.2f} MB, made once by the work of {offline:.0f} tokens")

# %% [markdown]
# ## ... why only the first, and what about the position?
#
# The same word stands at several places of our text. A table can hold only what is equal at all of
# them. Look at how far the rows for " Tom" differ from the first of them, relative to its largest
# number.

# %%
(tom,) = lm.tokenizer.encode(" Tom", special=False)
places = [t for t in range(T) if ids[t] == tom]
print(f"\n' Tom' stands at {len(places)} places. Largest difference of their rows:")
x = lm.model.embed(ids, None)  # (T, D); None: no positions, which this model needs only later
for number in range(4):
    difference = largest_error(x[places], x[places[:1]])
    print(f"  entering block {number}: {difference:4.0%} {bar(difference, 1, 40)}")
    assert (difference == 0) == (number == 0)
    x = lm.model.stack.blocks[number](x, Layer.once(T))  # T tokens, and an empty KV cache

# %% [markdown]
# Attention in block 0 has added what came before, and from there on a row depends on all the words
# so far. The position matters too, but later: rotary positions rotate q and k after the product
# with W, so the table holds them unrotated.

# %% [markdown]
# ## 7. How many rows would a table need?
#
# The rule behind all of this: a result can be prepared only for every value of what it depends on,
# and each of them has to be stored. One token: V rows. A token and its position: V rows for each
# position. Two tokens: V x V. All T tokens so far: V to the power of T.

# %%
title("7. Rows of a table, by what the result depends on")
V = c.vocab_size
relu = minitx.load("stories-relu")  # a model that adds a learned row for each position
context = relu.model.config.context  # the number of positions
print_table(
    ["depends on", "rows", f"MB, at {c.width} numbers of 4 bytes"],
    [
        ["a token", V, f"{V * 4 * c.width / 1e6:.1f}"],
        ["a token and its position", V * context, f"{V * context * 4 * c.width / 1e6:,.0f}"],
        ["two tokens", V**2, f"{V**2 * 4 * c.width / 1e6:,.0f}"],
        ["three tokens", V**3, f"{V**3 * 4 * c.width / 1e6:,.0f}"],
    ],
)

# %% [markdown]
# ## ... token and position: a table that is exact and no use
#
# The second line exists: stories-relu starts with embedding[token] + positions[position], and the
# technique merge_embeddings adds them in advance for every pair. It is the same addition made
# earlier, so here even the last bit is the same. Is it faster, too?

# %%
merged = minitx.load("stories-relu", merge_embeddings=True)
relu_ids = relu.encode(STORY + QUESTION)
assert np.array_equal(merged.logits(relu_ids), relu.logits(relu_ids))
times = time_side_by_side(decode_last(relu, relu_ids), decode_last(merged, relu_ids), repeats=60)
megabytes = [4 * weight_count(one) / 1e6 for one in (relu, merged)]
print(f"merge_embeddings: {megabytes[0]:.1f} MB of weights become {megabytes[1]:.1f} MB", end=", ")
print(f"and a token takes {times[1] / times[0]:.2f} times as long")
assert megabytes[1] > 20 * megabytes[0]

# %% [markdown]
# One addition of two rows is nothing compared with the blocks. Exact is not the same as useful.

# %% [markdown]
# ## 8. The price
#
# Now all that is worth having, alone and together (techniques combine in any order). Counts first:
# what must be computed and stored. Then the time of one token, the others in the cache, as a ratio
# within this run: above 1 is faster than the plain model.

# %%
title("8. The price: counts, then time")
together = minitx.load("stories", fold_norms=True, fuse_projections=True, first_layer=True)
together64 = minitx.load(
    "stories", dtype=np.float64, fold_norms=True, fuse_projections=True, first_layer=True
)
models = {"plain": lm, "fold_norms": folded, "fuse_projections": fused, "first_layer": first}
models["all three"] = together

tasks = [decode_last(one, ids) for one in models.values()]
times = time_side_by_side(*tasks, repeats=80)
table = []
for name, one, seconds in zip(models, models.values(), times):
    ratio = times[0] / seconds
    work = count_last(one, ids).total().multiply_adds
    size = f"{4 * weight_count(one) / 1e6:.2f}"
    table.append([name, work, products(one), size, f"{ratio:.2f}", verdict(ratio)])
    assert one.generate(ids, 40) == answer
table[0][-1] = "-"
print_table(["", "multiply-adds", "products", "weights, MB", "speed", ""], table)
error64 = largest_error(together64.logits(ids), lm64.logits(ids))
print(f"all three in float64: the logits differ by {error64:.0e} of the largest one")
assert error64 < 1e-12

# %% [markdown]
# Every answer is the same, as promised. But only 2 % of the multiply-adds are gone; and that nearly
# half of the products are gone, too, saves calls, not work. Alone, each of the three changes the
# time by hardly more than a busy machine does from run to run. All three together are faster by
# about a tenth, mostly for making fewer calls.

# %% [markdown]
# ## ... when is it more?
#
# first_layer removes part of one block of L, so at most 1/L. It can be nearly all of a block in a
# model with parallel blocks, where attention and feed-forward network read the same row: there the
# feed-forward network of block 0 depends on one token, too. The chart asks what the share would be,
# if the two models had other numbers of blocks.

# %%
parallel = minitx.load("stories-parallel")
parallel_first = minitx.load("stories-parallel", first_layer=True)
LAYERS = (1, 2, 4, 8, 16, 32)
lines = {}
for name, one, tabled in (("stories", lm, first), ("stories-parallel", parallel, parallel_first)):
    counts, counts_after = count_last(one, ids), count_last(tabled, ids)
    saved = counts.total().multiply_adds - counts_after.total().multiply_adds
    block = counts.total("model.stack.blocks.1").multiply_adds
    head = counts.total("model.head").multiply_adds
    lines[name] = [saved / (layers * block + head) for layers in LAYERS]
    for layers, share in zip(LAYERS, lines[name]):
        print(f"  {name:16} {layers:2} blocks  {share:5.1%} {bar(share, 1, 60)}")
save_lines("03_first_layer", LAYERS, lines, "blocks (L)", "share of multiply-adds saved")

tasks = decode_last(parallel, ids), decode_last(parallel_first, ids)
times = time_side_by_side(*tasks, repeats=80)
print(f"stories-parallel has 4 blocks; measured: {times[0] / times[1]:.2f} times as fast")

# %% [markdown]
# In a model with 32 blocks the share is small for both. The card of first_layer (python -m minitx
# explain first_layer) says so: "at most 1/L of the work".

# %% [markdown]
# ## 9. Outlook: whole matrices can go
#
# If two matrices follow each other with nothing in between, their product is one matrix. Below, h
# goes through A, then through W_q for the query and W_k for the key. Let A absorb W_q: then x is
# already the query. The key must not have W_q in it, so its matrix first undoes it: the new one is
# W_q^-1 W_k, since (h A W_q) (W_q^-1 W_k) = h A W_k.

# %%
title("9. Outlook: a matrix that another one absorbs")
h = np.array([1.0, 2.0])
A = np.array([[1.0, 0.0], [2.0, 1.0]])
W_q = np.array([[1.0, 1.0], [0.0, 1.0]])
W_k = np.array([[2.0, 0.0], [1.0, 1.0]])
x = h @ A
print("three matrices: query", x @ W_q, " key", x @ W_k)

new_A = A @ W_q  # offline
new_W_k = np.linalg.inv(W_q) @ W_k  # offline; the inverse of W_q is [[1, -1], [0, 1]]
x = h @ new_A
print("two matrices:   query", x, " key", x @ new_W_k)
assert np.array_equal(x, h @ A @ W_q) and np.array_equal(x @ new_W_k, h @ A @ W_k)

# %% [markdown]
# ## ... in a model where nothing is in between
#
# In most models there is something in between: a norm, and x is added to what each network gives.
# stories-skipless was trained without both. There remove_weights merges two matrices of each block.

# %%
skipless = minitx.load("stories-skipless")
removed = minitx.load("stories-skipless", remove_weights=True)
assert removed.generate(ids, 40) == skipless.generate(ids, 40)
skipless64 = minitx.load("stories-skipless", dtype=np.float64)
removed64 = minitx.load("stories-skipless", dtype=np.float64, remove_weights=True)
error64 = largest_error(removed64.logits(ids), skipless64.logits(ids))
assert error64 < 1e-10
tasks = decode_last(skipless, ids), decode_last(removed, ids)
times = time_side_by_side(*tasks, repeats=80)
for name, one in (("plain", skipless), ("remove_weights", removed)):
    work = count_last(one, ids).total().multiply_adds
    print(f"  {name:15} {work:7,} multiply-adds in {products(one)} products")
print(f"{times[0] / times[1]:.2f} times as fast; in float64 the logits differ by {error64:.0e}")

# %% [markdown]
# 19 products became 13: two fewer in each of the 3 blocks. This is work, and the time shows it. A
# warning: an inverse enlarges what was rounded
# before, the more the closer W_q is to a matrix that has none. Other merges of this kind: shrink,
# slim_attention and absorb_products (python -m minitx explain shrink).

# %% [markdown]
# ## Exercises
#
# Write it yourself: these exercises continue the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 7`: Folding a norm
# - `minitx learn 8`: The first layer is a table
# - `minitx learn 9`: Keys are enough
# - `minitx learn 17`: Test the test
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/03_before_the_first_token.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. Section 1: a norm may also add a bias b after the gain, y = (x / rms * g + b) @ W. What becomes
#    of b @ W, which is known offline? Write the two lines and check them with b = [1, -1].
# 2. Section 3: make the mistake of 1/10,000 (1e-4) smaller, tenfold each time: from where on does
#    float64 no longer tell it from rounding? And how large must it be, to be
#    clearly seen in float32? How many digits lie between the two?
# 3. Section 3: a check can be blind. Which of the 128 gains is nearest to 1? Forget that one, not
#    number 0: what is left of the error? Before training, all gains are 1. What would the check say
#    of a fold_norms that forgets every gain, on such a model?
# 4. Section 5: let a fourth token " the" have the embedding [1, 1]. Which two tokens get the same
#    row in the table, and why may the model still tell them apart? (What else is in a row of
#    section 6?)
