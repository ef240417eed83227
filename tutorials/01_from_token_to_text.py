# %% [markdown]
"""Tutorial 1: from token to text. What does a language model compute?

Nothing is hidden: halfway down, the whole model stands as one page of NumPy, and it gives the same
numbers as the real one. You need matrix products and no knowledge of transformers. Run the file as
it is (``python tutorials/01_from_token_to_text.py``), or cell by cell in an editor that knows
``# %%``. Every figure in the output is computed here.

Letters, as everywhere in minitx: T tokens, D width, H query heads, K key/value heads, d head width,
F hidden width, V vocabulary, L layers.
"""

# %% [markdown]
# ## A model, and a short story that ends with a question

# %%
import inspect
import re

import numpy as np
from helpers import ANSWER, QUESTION, STORY, load_stories, print_vertically, say, shade, title

import minitx
from minitx.decode import Sampler
from minitx.state import Layer
from minitx.tree import weights

lm = load_stories()
model, c = lm.model, lm.model.config
W = weights(model)  # every weight array by its path in the model: {"embed.w": array, ...}
print(f"{sum(w.size for w in W.values()):,} weights in {len(W)} arrays")
say(STORY + QUESTION, "...")

# %% [markdown]
# ## 1. Text becomes tokens
#
# A model knows no letters. A tokenizer cuts the text into tokens from a fixed vocabulary, and each
# token has an id. Our stories use few words, so nearly every word is one token; a rare word is put
# together from smaller tokens, down to bytes. In front goes a special token, `<start>` here: every
# story of the training data came after one. The last line shows two rare words: one is one token,
# the other five.

# %%
title("1. Text becomes tokens")
ids = lm.encode(STORY + QUESTION)
words = ["<start>"] + [lm.tokenizer.decode([i]) for i in ids[1:]]
T = len(ids)
print(f"{len(STORY + QUESTION)} characters are {T} tokens:", *ids[:9], "...")
for first in range(0, T, 15):
    print("  " + "|".join(words[first : first + 15]))

rare = lm.tokenizer.encode(" kite Zürich", special=False)
pieces = [lm.tokenizer.token_bytes(i) for i in rare]
print("' kite' is one token, ' Zürich' is", len(pieces) - 1, "tokens:", pieces)
assert pieces[0] == b" kite"
assert lm.tokenizer.decode(ids[1:]) == STORY + QUESTION  # nothing was lost

# %% [markdown]
# ## 2. Tokens become vectors
#
# Each token looks up its row in the embedding table: D learned numbers. From here on the model only
# computes with these rows, one row x[t] for each token. x is called the residual stream, because
# everything that follows is added to it. Look at which words have similar rows: nobody told the
# model what a name, a place or a colour is.

# %%
title("2. Tokens become vectors")
table = W["embed.w"]  # (V, D)
x = table[ids]  # (T, D)
print(f"x has the shape {x.shape}: a row for each token")

unit = table / np.linalg.norm(table, axis=1, keepdims=True)
for word in (" Tom", " park", " red"):
    (token,) = lm.tokenizer.encode(word, special=False)
    cosines = unit @ unit[token]
    nearest = np.argsort(-cosines)[1:6]  # without the word itself
    print(f"  most similar to{word}:", ",".join(lm.tokenizer.decode([i]) for i in nearest))

# %% [markdown]
# ## 3. Attention on three tokens, by hand
#
# So far each row knows its own word only. Attention is how a token reads from the tokens before it.
# Every token has a query (what am I looking for?), a key (what can I be found by?) and a value
# (what do I hand over?). Here the third of three tokens looks back, and all numbers fit on paper.

# %%
title("3. Attention on three tokens, by hand")
query = np.array([2.0, 0.0])  # of the third token
keys = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])  # of all three tokens
values = np.array([[10.0, 0.0], [0.0, 10.0], [0.0, 0.0]])

scores = keys @ query / np.sqrt(2)  # one dot product per key, divided by sqrt(d)
exponentials = np.exp(scores)
attention_weights = exponentials / exponentials.sum()  # the softmax: positive, and the sum is 1
print("scores           ", scores.round(2))
print("exponentials     ", exponentials.round(2), " sum", exponentials.sum().round(2))
print("attention weights", attention_weights.round(2))
print("weighted sum of the values", (attention_weights @ values).round(2))

# %% [markdown]
# The first key points where the query points, so its value makes up most of the result. That is all
# of attention: a lookup that is soft. Now the same in the trained model.

# %% [markdown]
# ## 4. The first block of the model: norm, queries, keys, values
#
# First a norm: each row is divided by its size (the root of the mean square, RMS), then every
# column is multiplied by a learned gain. Three matrix products give queries, keys and values. They
# are cut into heads, small independent attentions side by side. To save memory, query heads share
# key heads.

# %%
title("4. The first block, step by step")
block = "stack.blocks.0."
rms = np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)  # (T, 1)
normed = x / rms * W[block + "attn.norm.gain"]  # (T, D)
print(f"norm: the RMS of the rows was {rms.min():.3f} to {rms.max():.3f},", end=" ")
print("after the division it is 1")

q = (normed @ W[block + "attn.qkv.q.w"]).reshape(T, c.heads, -1).swapaxes(0, 1)  # (H, T, d)
k = (normed @ W[block + "attn.qkv.k.w"]).reshape(T, c.kv_heads, -1).swapaxes(0, 1)  # (K, T, d)
v = (normed @ W[block + "attn.qkv.v.w"]).reshape(T, c.kv_heads, -1).swapaxes(0, 1)  # (K, T, d)
G = c.heads // c.kv_heads
print(f"queries {q.shape}, keys {k.shape}, values {v.shape}: {G} query heads share a key head")

# %% [markdown]
# ## ... positions
#
# A dot product of query and key does not know how far apart the two tokens are. Rotary position
# embedding (RoPE) tells it: pairs of columns are rotated by an angle proportional to the position,
# so that in a dot product only the distance of the two positions is left. Look at the first two
# lines below: other positions, the same distance, the same product.


# %%
def rotate(rows, positions):
    """Rotate rows (..., T, d) to their positions (T,)."""
    first, second = np.split(rows, 2, -1)  # pair i is (column i, column i + d/2)
    frequencies = c.rope_base ** -(np.arange(0, c.head_width, 2) / c.head_width)  # (d/2,)
    angles = np.outer(positions, frequencies)  # (T, d/2)
    cos, sin = np.cos(angles).astype(rows.dtype), np.sin(angles).astype(rows.dtype)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


for query_position, key_position in ((7, 5), (107, 105), (8, 5)):
    rotated_query = rotate(q[0, 7:8], [query_position])
    rotated_key = rotate(k[0, 5:6], [key_position])
    product = (rotated_query @ rotated_key.T).item()
    print(f"a query at position {query_position:3}, a key at {key_position:3}: {product:+.4f}")
q, k = rotate(q, np.arange(T)), rotate(k, np.arange(T))

# %% [markdown]
# ## ... attention
#
# As in the toy example, for all heads and all tokens at once. One thing is new: a token must not
# see the tokens after it, or predicting them would be trivial. The causal mask sets their scores to
# minus infinity, and exp(-infinity) is 0.

# %%
scores = q @ k.repeat(G, 0).swapaxes(1, 2) / np.sqrt(c.head_width).astype(q.dtype)  # (H, T, T)
causal_mask = np.triu(np.ones((T, T), bool), 1)  # True above the diagonal: key after query
scores[:, causal_mask] = -np.inf
exponentials = np.exp(scores - scores.max(-1, keepdims=True))  # the maximum: against overflow
attention_weights = exponentials / exponentials.sum(-1, keepdims=True)  # (H, T, T)
print(f"attention weights {attention_weights.shape}: a row sums to", end=" ")
print(f"{attention_weights[0, -1].sum():.6f},", end=" ")
print(f"later tokens get {attention_weights[:, causal_mask].max():.0f}")

heads = attention_weights @ v.repeat(G, 0)  # (H, T, d)
attention = heads.swapaxes(0, 1).reshape(T, -1) @ W[block + "attn.out.w"]  # (T, D)
h = x + attention  # added: the residual stream keeps what it had

# %% [markdown]
# ## ... and the feed-forward network
#
# It works on each row by itself: expand to F hidden neurons, silu(gate) * up with
# silu(x) = x * sigmoid(x), then project back to D. Here two thirds of the work happens. Look at the
# error at the end, which compares our few lines with the block of the model.

# %%
rms = np.sqrt((h * h).mean(-1, keepdims=True) + c.norm_eps)
normed = h / rms * W[block + "ffn.norm.gain"]
gate = normed @ W[block + "ffn.expand.gate.w"]  # (T, F)
up = normed @ W[block + "ffn.expand.up.w"]  # (T, F)
hidden = gate / (1 + np.exp(-gate)) * up  # (T, F); sigmoid(x) = 1 / (1 + exp(-x))
feed_forward = hidden @ W[block + "ffn.down.w"]  # (T, D)
print(f"hidden neurons {hidden.shape}: each row is expanded from {c.width} to {c.hidden} numbers")

ours = h + feed_forward
# None: embed needs no positions, as RoPE has them. Layer.once: an empty KV cache (tutorial 2).
theirs = model.stack.blocks[0](model.embed(ids, None), Layer.once(T))
error = abs(ours - theirs).max() / abs(theirs).max()
print(f"our first block against the model's: error {error:.0e} of the largest number")
assert error < 1e-5

# %% [markdown]
# ## 5. All the blocks, then the head
#
# The other blocks do the same with weights of their own. At the end come a last norm and the head:
# a dot product with every row of the embedding table. The results are the logits, one for each word
# of the vocabulary, and their softmax is the probability that this word comes next. Nothing forbids
# to ask the head earlier: look at which block finds the answer.

# %%
title(f"5. {c.layers} blocks, then the head: what comes after '{''.join(words[-4:]).strip()}'?")


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return exponentials / exponentials.sum()


(answer,) = lm.tokenizer.encode(ANSWER, special=False)
x = model.embed(ids, None)
for number, one_block in enumerate(model.stack.blocks, 1):
    x = one_block(x, Layer.once(T))  # (T, D)
    p = softmax(model.head(model.norm(x[-1:]))[0])  # (V,)
    best = int(p.argmax())
    print(f"after block {number}: {lm.tokenizer.decode([best])!r:11} {p[best]:4.0%}", end="")
    print(f"    probability of{ANSWER}: {p[answer]:6.1%}")
assert best == answer
print("The early blocks know that a place is due; from some block on, the model knows which one.")

# %% [markdown]
# ## 6. The whole model on one page
#
# Now everything in order, for all blocks, with nothing called but NumPy. A comment with a colon
# names the part of the model that does this line, and the shape of the result.


# %%
def flat_forward(ids, W, c):
    """Token ids (T,) to logits (T, V), and the attention weights (H, T, T) of every block."""
    T, H, K, d = len(ids), c.heads, c.kv_heads, c.head_width
    table, attention_weights = W["embed.w"], []
    angles = np.outer(np.arange(T), c.rope_base ** -(np.arange(0, d, 2) / d))  # (T, d/2)
    cos, sin = np.cos(angles).astype(table.dtype), np.sin(angles).astype(table.dtype)
    causal_mask = np.triu(np.ones((T, T), bool), 1)  # (T, T)
    x = table[ids]  # embed: (T, D)
    for i in range(c.layers):
        w = {name.removeprefix(f"stack.blocks.{i}."): W[name] for name in W}  # this block's
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
        n = x / rms * w["attn.norm.gain"]  # attn.norm: (T, D)
        q = (n @ w["attn.qkv.q.w"]).reshape(T, H, d).swapaxes(0, 1)  # attn.qkv.q: (H, T, d)
        k = (n @ w["attn.qkv.k.w"]).reshape(T, K, d).swapaxes(0, 1)  # attn.qkv.k: (K, T, d)
        v = (n @ w["attn.qkv.v.w"]).reshape(T, K, d).swapaxes(0, 1)  # attn.qkv.v: (K, T, d)
        a, b = q[..., : d // 2], q[..., d // 2 :]
        q = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)  # attn.rope: (H, T, d)
        a, b = k[..., : d // 2], k[..., d // 2 :]
        k = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)  # attn.rope: (K, T, d)
        k, v = k.repeat(H // K, 0), v.repeat(H // K, 0)  # (H, T, d) one for each query head
        s = q @ k.swapaxes(1, 2) / d**0.5  # attn.attend: (H, T, T)
        s[:, causal_mask] = -np.inf
        p = np.exp(s - s.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)  # softmax: each row sums to 1
        attention_weights.append(p)
        heads = (p @ v).swapaxes(0, 1).reshape(T, H * d)  # the heads side by side
        x = x + heads @ w["attn.out.w"]  # attn.out: (T, D)
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
        n = x / rms * w["ffn.norm.gain"]  # ffn.norm: (T, D)
        gate = n @ w["ffn.expand.gate.w"]  # ffn.expand.gate: (T, F)
        up = n @ w["ffn.expand.up.w"]  # ffn.expand.up: (T, F)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["ffn.down.w"]  # ffn.down: (T, D)
    rms = np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
    n = x / rms * W["norm.gain"]  # norm: (T, D)
    return n @ table.T, attention_weights  # head: (T, V)


# %% [markdown]
# ## ... is the model
#
# Sums are added up in another order here and there, so the last digits may differ. That has to be
# rounding: in float64, with 16 digits instead of 7, the difference must shrink by 9 digits.

# %%
title("6. The whole model on one page")
for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
    precise = minitx.load("stories", dtype=dtype).model
    logits, attention_weights = flat_forward(ids, weights(precise), c)
    expected = precise(ids)  # the model's logits (T, V)
    error = abs(logits - expected).max() / abs(expected).max()
    print(f"{dtype.__name__}: flat_forward against the model, error {error:.0e}", end=" ")
    print(f"of the largest logit (tolerance {tolerance:.0e})")
    assert logits.dtype == dtype and error < tolerance

# %% [markdown]
# ## 7. The same thing as a tree
#
# minitx keeps the model as a tree of small parts, and each part does one of the lines above. That
# is what makes it easy to change: to skip work, a part is replaced by one that does less. (The part
# Cache does nothing in a single pass; tutorial 2 is about it.)

# %%
title("7. The same thing as a tree: print(lm.model)")
print(model)

print("\nWhich part does which line of flat_forward (in block 0):")
for line in inspect.getsource(flat_forward).splitlines():
    found = re.search(r"# ([a-z_.]+): \(", line)
    if found is None:
        continue
    in_block = line.startswith(" " * 8)
    part = model.stack.blocks[0] if in_block else model
    for name in found[1].split("."):
        part = getattr(part, name)
    code = line.partition("#")[0].strip()
    print(f"  {found[1]:16} {repr(part).splitlines()[0]:30} {code:.48}")

# %% [markdown]
# ## 8. A picture of attention
#
# Which head looks up the answer? The attention weights tell: of all heads of all blocks we take the
# one whose last row puts most weight on the answer's word in the story. Below, a row is a token
# that looks, a column one that is looked at. Look for the dark spot in the last row.

# %%
title("8. What one head looks at")
all_weights = np.stack(attention_weights)  # (L, H, T, T)
place = words.index(ANSWER)
on_answer = all_weights[:, :, -1, place]  # (L, H)
layer, head = np.unravel_index(on_answer.argmax(), on_answer.shape)
print(f"Block {layer + 1}, head {head + 1}: the last token puts", end=" ")
print(f"{on_answer[layer, head]:.0%} of its attention on{ANSWER}", end=" ")
print(f"(the median head: {np.median(on_answer):.0%}).")
print("Shades: '.' is below 10 %, then , : - = + * # % and '@' for 90 % and more")

print_vertically([word.strip() for word in words], indent=10)
for t in range(words.index(" Where"), T):
    row = all_weights[layer, head, t, : t + 1]  # the causal mask ends the row
    print(f"{words[t].strip():>8} |" + " ".join(shade(row)))

# %% [markdown]
# ## 9. Token by token to text
#
# Greedy decoding: take the most likely token, append it, start again, until the model predicts its
# end token. This loop recomputes everything for each token; tutorial 2 is about not doing that.

# %%
title("9. Token by token to text")
text, rows = list(ids), 0
for _ in range(24):
    logits, _ = flat_forward(text, W, c)
    rows += len(text)
    token = int(logits[-1].argmax())
    if token in c.eos:
        break
    text.append(token)
assert text[T:] == lm.generate(ids, 24)
say(f"{STORY}{QUESTION} >>>{lm.tokenizer.decode(text[T:])}")
count = len(text) - T
print(f"{count} new tokens, and lm.generate gives the same.")
print(f"The price: {rows:,} rows were run through every block; only {T + count - 1} were new.")

# %% [markdown]
# ## 10. Sampling
#
# Greedy text is always the same. To vary it, draw the next token by its probability. A temperature
# divides the logits first: below 1 the likely tokens get likelier, above 1 all become more equal.
# top_k keeps the k most likely tokens, top_p (nucleus sampling) the smallest set with probability
# p. For each setting, look at how many tokens are possible, and how probable the first of them is.

# %%
title("10. Sampling: how the story goes on after its first sentence")
opening = ids[: words.index(".") + 1]
logits = lm.logits(opening)[-1]
SETTINGS = (
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 2},
    {"temperature": 1, "top_k": 5},
    {"temperature": 1, "top_p": 0.5},
)
for setting in SETTINGS:
    p = Sampler(**setting).probabilities(logits)
    name = ", ".join(f"{key} {value}" for key, value in setting.items())
    print(f"{name:24}  possible tokens: {np.sum(p > 0):4}  the most likely: {p.max():4.0%}")
    for seed in (1, 2):
        new = lm.generate(opening, 12, seed=seed, **setting)
        print(f"    seed {seed}: {lm.tokenizer.decode(new)}")
assert Sampler(temperature=2).probabilities(logits).max() < 0.1

# %% [markdown]
# At temperature 0 one token is possible, so the seed does not matter. At temperature 2 no token has
# even a tenth, and the sentences are still good: most of the later words have one likely candidate.

# %% [markdown]
# ## Exercises
#
# Write it yourself: these exercises continue the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 1`: RMS norm
# - `minitx learn 2`: Rotary positions
# - `minitx learn 3`: Causal attention with grouped heads
# - `minitx learn 4`: Sampling
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/01_from_token_to_text.py`.
#
# 1. Remove the line `s[:, causal_mask] = -np.inf` from flat_forward, and in section 6 replace the
#    assertion by print(abs(logits - expected).max(-1)). (The script will stop at the assertion in
#    section 9: the text is another one.) Is any row still right? Why would the last row be right in
#    a model of one block, and is not in this one?
# 2. Switch off block 5: copy the weights, changed = dict(W), and set the matrices by which its
#    attention and its feed-forward network write to the residual stream to 0:
#    changed["stack.blocks.4.attn.out.w"] and changed["stack.blocks.4.ffn.down.w"] (0 * W[...]).
#    Does flat_forward(ids, changed, c) still answer the question, and how far do its logits move?
#    Try every block: which one is missed least?
# 3. Ask for Anna: set QUESTION = " Where is Anna? Anna is in the" and ANSWER = " kitchen" after the
#    imports. After which block is the answer known, and is it the same head that looks it up?
