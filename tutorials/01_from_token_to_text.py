"""Tutorial 1: from token to text. What a language model computes, with nothing hidden.

You need NumPy and no idea of transformers. Run it as it is (``python tutorials/01_...py``), or cell
by cell in an editor that knows ``# %%``. The comments explain, the output shows; every figure in
the output is computed here. Half way down stands the whole model as one piece of NumPy.

Letters, as everywhere in minitx: T tokens, D width, H query heads, K key/value heads, d head width,
F hidden neurons, V vocabulary, L layers.
"""

# %% A model, and a short story with a question at its end
import inspect
import re
import textwrap

import numpy as np

import minitx
from minitx.decode import Sampler
from minitx.state import Layer
from minitx.tree import weights


def title(text):
    print(f"\n{text}\n{'-' * len(text)}")


lm = minitx.load("stories")
model, c = lm.model, lm.model.config
W = weights(model)  # every weight, by its path in the tree of parts: {"embed.w": array, ...}
STORY = (
    "Once upon a time there was a boy named Tom. Tom was in the garden. Anna was in the kitchen. "
    "Tom went to the park. Where is Tom? Tom is in the"
)
ANSWER = " park"  # words carry the space before them
print(f"{lm.name}: {sum(w.size for w in W.values()):,} weights in {len(W)} arrays, L={c.layers}")
print(f"D={c.width} H={c.heads} K={c.kv_heads} d={c.head_width} F={c.hidden} V={c.vocab_size}")

# %% 1. Text becomes numbers
# A model knows no letters. Text is cut into pieces from a fixed list, and each piece has a number.
# A word of our stories is one piece; others are put together from smaller ones, down to bytes. In
# front goes a special token, <start> here, which is no text: in training, a story came after it.
title("1. Text becomes tokens")
ids = lm.encode(STORY)
pieces = ["<start>", *(lm.tokenizer.decode([i]) for i in ids[1:])]
T = len(ids)
print(f"{len(STORY)} characters are {T} tokens:", " ".join(map(str, ids[:9])), "...")
for a in range(0, T, 15):
    print("  " + "|".join(pieces[a : a + 15]))
odd = lm.tokenizer.encode(" kite Zürich", special=False)
print("an unknown word falls into pieces:", [lm.tokenizer.token_bytes(i) for i in odd])
assert lm.tokenizer.decode(ids[1:]) == STORY  # nothing was lost

# %% 2. Numbers become vectors
# Each token picks its row of a table, D learned numbers. From here on the model is arithmetic on
# these rows. One row per token: we call x the stream, for everything is added to it on its way up.
title("2. Tokens become vectors")
x = W["embed.w"][ids]  # (T, D)
toms = [t for t, piece in enumerate(pieces) if piece == " Tom"]
print(f"x has the shape {x.shape}. Tom stands at {toms}, with the same row each time:", end=" ")
print(all(np.array_equal(x[t], x[toms[0]]) for t in toms))
unit = W["embed.w"] / np.linalg.norm(W["embed.w"], axis=1, keepdims=True)
for word in (" Tom", " park", " red"):
    cosines = unit @ unit[lm.tokenizer.encode(word, special=False)[0]]
    near = [lm.tokenizer.decode([i]) for i in np.argsort(-cosines)[1:6]]
    print(f"  rows that point most nearly the same way as{word}:{','.join(near)}")

# %% 3. The first block, step by step: attention
# Attention lets a token collect something from the tokens before it. Three products turn each row
# into a query (what am I looking for?), a key (what can I be found by?), a value (what do I give?).
title("3. The first block, step by step")
G, block = c.heads // c.kv_heads, "stack.blocks.0."
rms = np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)  # (T, 1) the size of each row
n = x / rms * W[block + "attn.norm.gain"]  # the RMS norm: all of one size, then a gain per column
after = np.sqrt(((x / rms) ** 2).mean(-1))
print(f"norm: rows of size {rms.min():.3f} to {rms.max():.3f}", end=" ")
print(f"come to {after.min():.3f} to {after.max():.3f}")
q = (n @ W[block + "attn.qkv.q.w"]).reshape(T, c.heads, -1).swapaxes(0, 1)  # (H, T, d)
k = (n @ W[block + "attn.qkv.k.w"]).reshape(T, c.kv_heads, -1).swapaxes(0, 1)  # (K, T, d)
v = (n @ W[block + "attn.qkv.v.w"]).reshape(T, c.kv_heads, -1).swapaxes(0, 1)  # (K, T, d)
print(f"queries {q.shape}, keys {k.shape}, values {v.shape}: {G} query heads share one key head")


# A product of query and key would not know where the two stand. Rotary positions turn each pair of
# columns by an angle that grows with the position: what is left in a product is their distance.
def turned(rows, where):
    """Rows (..., T, d) turned as if they stood at the positions where (T,)."""
    first, second = np.split(rows, 2, -1)  # pair i is (column i, column i + d/2)
    angle = np.outer(where, c.rope_base ** -(np.arange(0, c.head_width, 2) / c.head_width))
    cos, sin = np.cos(angle).astype(rows.dtype), np.sin(angle).astype(rows.dtype)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


for t, s in ((7, 5), (107, 105), (8, 5)):
    product = (turned(q[0, 7:8], [t]) @ turned(k[0, 5:6], [s]).T).item()
    print(f"the same query and key, put at positions {t} and {s}: product {product:+.4f}")
q, k = turned(q, np.arange(T)), turned(k, np.arange(T))
# Products become shares by the softmax: exp, then divided by the sum. No token may look ahead.
scores = q @ k.repeat(G, 0).swapaxes(1, 2) / c.head_width**0.5  # (H, T, T)
scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf  # the future: exp(-inf) is 0
share = np.exp(scores - scores.max(-1, keepdims=True))
share /= share.sum(-1, keepdims=True)
print(f"scores {scores.shape}; a row sums to {share[0, -1].sum():.6f},", end=" ")
print(f"the largest share that goes to the future is {np.triu(share, 1).max():.0f}")
mixed = (share @ v.repeat(G, 0)).swapaxes(0, 1).reshape(T, -1)  # (T, H*d) heads side by side
attention = mixed @ W[block + "attn.out.w"]  # (T, D)
h = x + attention  # added: the stream keeps what it had

# %% ... and the feed-forward network
# It looks at each token by itself. F hidden neurons each measure the row twice (gate and up) and
# multiply the two, gate being bent by silu; then each neuron writes its own row back.
n = h / np.sqrt((h * h).mean(-1, keepdims=True) + c.norm_eps) * W[block + "ffn.norm.gain"]
gate, up = n @ W[block + "ffn.expand.gate.w"], n @ W[block + "ffn.expand.up.w"]  # (T, F)
hidden = gate / (1 + np.exp(-gate)) * up  # (T, F)
ffn = hidden @ W[block + "ffn.down.w"]  # (T, D)
squares = -np.sort(-(hidden[-1] ** 2))
half = int((squares.cumsum() < squares.sum() / 2).sum()) + 1
print(f"hidden {hidden.shape}: in the last row, {half} neurons have half the sum of squares")
for name, change, base in (("attention", attention, x), ("feed-forward", ffn, h)):
    ratio = np.linalg.norm(change) / np.linalg.norm(base)
    print(f"{name} adds to the stream {ratio:.2f} times its size")
theirs = model.stack.blocks[0](model.embed(ids, None), Layer.once(T))
error = abs(h + ffn - theirs).max()
assert error < 1e-5 * abs(theirs).max()
print(f"our first block against the model's: largest difference {error:.1e}")

# %% 4. All the blocks, and what the stream would say on its way
# The other blocks do the same with weights of their own. A last norm, and then the head: a product
# with every row of the table again: the word whose row fits best scores highest (these scores are
# the logits). We may ask the head after any block, early as that is, and watch what it says.
title(f"4. {c.layers} blocks, then the head: what comes after '{''.join(pieces[-4:]).strip()}'?")


def softmax(z):
    p = np.exp(z.astype(np.float64) - z.max())
    return p / p.sum()


x = model.embed(ids, None)
answer = lm.tokenizer.encode(ANSWER, special=False)[0]
for i, one in enumerate(model.stack.blocks, 1):
    x = one(x, Layer.once(T))  # (T, D)
    p = softmax(model.head(model.norm(x[-1:]))[0])  # (V,) shares of the next word
    best = int(p.argmax())
    print(f"after block {i:2}: {lm.tokenizer.decode([best])!r:12} {p[best]:4.0%}", end="")
    print(f"   ({ANSWER.strip()} is number {1 + (p > p[answer]).sum()} with {p[answer]:.1%})")
print("\nThe five likeliest words after the last block:")
for i in np.argsort(-p)[:5]:
    print(f"  {lm.tokenizer.decode([i])!r:12} {p[i]:6.1%} {'#' * round(50 * p[i])}")
says = "the story says the same" if best == answer else f"but the story says{ANSWER}"
print(f"Greedy choice: {lm.tokenizer.decode([best])!r} ({says})")


# %% 5. The whole model, flat
# Now everything at once, for all blocks, in order, with nothing called but NumPy. A comment with a
# colon names the part of the model whose work its line does, and the shape that comes out.
def flat_forward(ids, W, c):
    """Token ids (T,) to logits (T, V), and the attention shares (H, T, T) of every block."""
    T, H, K, d = len(ids), c.heads, c.kv_heads, c.head_width
    table, shares = W["embed.w"], []
    angle = np.outer(np.arange(T), c.rope_base ** -(np.arange(0, d, 2) / d))  # (T, d/2)
    cos, sin = np.cos(angle).astype(table.dtype), np.sin(angle).astype(table.dtype)
    future = np.triu(np.ones((T, T), bool), 1)  # (T, T)
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
        s[:, future] = -np.inf
        p = np.exp(s - s.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)  # softmax: each row sums to 1
        shares.append(p)
        mixed = (p @ v).swapaxes(0, 1).reshape(T, H * d)  # heads side by side
        x = x + mixed @ w["attn.out.w"]  # attn.out: (T, D)
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
        n = x / rms * w["ffn.norm.gain"]  # ffn.norm: (T, D)
        gate = n @ w["ffn.expand.gate.w"]  # ffn.expand.gate: (T, F)
        up = n @ w["ffn.expand.up.w"]  # ffn.expand.up: (T, F)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["ffn.down.w"]  # ffn.down: (T, D)
    rms = np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
    n = x / rms * W["norm.gain"]  # norm: (T, D)
    return n @ table.T, shares  # head: (T, V)


title("5. The flat forward")
lines = inspect.getsource(flat_forward).splitlines()
print("\n".join(f"{number:2} {line}" for number, line in enumerate(lines, 1)))
print()
# The same numbers are added up in another order here and there, so the last digits may differ. In
# float64 that must shrink with the rounding error, else it is not rounding but a mistake.
for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
    same = minitx.load("stories", dtype=dtype).model
    logits, shares = flat_forward(ids, weights(same), c)
    theirs = same(ids)  # the model's logits (T, V)
    error = abs(logits - theirs).max() / abs(theirs).max()
    assert logits.dtype == dtype and error < tolerance
    print(f"{dtype.__name__}: flat against model, error {error:.1e} of the largest logit", end=" ")
    print(f"(tolerance {tolerance:.0e}) - equal")

# %% 6. The same thing as a tree
# minitx keeps the model as a tree of small parts, each doing one of those lines. That is what makes
# it easy to change: to skip work, a part is swapped for one that does less.
title("6. The same thing as a tree: print(lm.model)")
print(model)
print("\nWhich part does which line (blocks drawn once, as block 0):")
for number, line in enumerate(lines, 1):
    if match := re.search(r"# ([a-z_.]+): \(", line):
        part = model.stack.blocks[0] if line.startswith(" " * 8) else model
        for name in match[1].split("."):
            part = getattr(part, name)
        print(f"  line {number:2}  {match[1]:16} {repr(part).splitlines()[0]}")

# %% 7. A picture of attention
# Which head looks up the answer? We let the shares decide: of all heads of all blocks, we take the
# one whose last row gives most to the answer's word in the story. A row for each token that looks,
# a column for each that is looked at; the right end of the rows is where the future begins.
title("7. What one head looks at")
P = np.stack(shares)  # (L, H, T, T)
where = [t for t, piece in enumerate(pieces) if piece == ANSWER]
given = P[:, :, -1, where].sum(-1)  # (L, H) what the last token gives to the answer
i, head = np.unravel_index(given.argmax(), given.shape)
print(f"Block {i + 1}, head {head + 1}: the last row gives {given[i, head]:.0%} to{ANSWER}", end="")
print(f" (the median head: {np.median(given):.0%}).")
SHADES = ".,:-=+*#%@"
print(f"Shades, a tenth each: {SHADES}  ('.' is below 10 %, '@' is 90 % and more)")
names = [piece.strip() for piece in pieces]
for row in range(max(map(len, names))):
    print(" " * 10 + " ".join(f"{name[row : row + 1]:1}" for name in names).rstrip())
for t in range(pieces.index(" Where"), T):
    shade = (SHADES[min(int(10 * share), 9)] for share in P[i, head, t, : t + 1])
    print(f"{names[t]:>8} |" + " ".join(shade))

# %% 8. Loop to text
# Greedy text: take the likeliest word, put it behind the others, begin again, until the special
# token comes. For each word this loop computes everything anew, which tutorial 2 will not do.
title("8. Loop to text")
text = list(ids)
for _ in range(24):
    token = int(flat_forward(text, W, c)[0][-1].argmax())
    if token in c.eos:
        break
    text.append(token)
assert text[T:] == lm.generate(ids, 24)
story = f"{STORY} >>>{lm.tokenizer.decode(text[T:])}"
print(textwrap.fill(story, 100))
print(f"{len(text) - T} new tokens; lm.generate gives the same.")

# %% 9. Chance
# Greedy text is always the same. To vary it, draw the word by its share. A temperature divides the
# logits first: below 1 the likely get likelier, above 1 the shares even out. top_k keeps only the k
# likeliest words, top_p the fewest that together reach p. The seed fixes what is drawn.
title("9. Chance: how the story goes on after its first sentence")
opening = ids[: pieces.index(".") + 1]
logits = lm.logits(opening)[-1]
print(f"{'setting':27} {'possible tokens':>15} {'as if equal*':>13} {'likeliest':>11}")
for options in (
    {"temperature": 0},
    {"temperature": 0.5},
    {"temperature": 1},
    {"temperature": 2},
    {"temperature": 1, "top_k": 5},
    {"temperature": 1, "top_p": 0.5},
):
    p = Sampler(**options).probabilities(logits)
    real = p[p > 0]
    name = ", ".join(f"{key} {value}" for key, value in options.items())
    print(f"{name:27} {len(real):15} {np.exp(-(real * np.log(real)).sum()):13.1f} {p.max():11.0%}")
    for seed in (1, 2):
        new = lm.generate(opening, 12, seed=seed, **options)
        assert new == lm.generate(opening, 12, seed=seed, **options)  # the same seed, the same text
        print(f"    seed {seed}: {lm.tokenizer.decode(new)!r}")
print("* as many equally likely tokens would leave as much open: exp of the entropy")

# %% Exercises
# 1. Call flat_forward with dataclasses.replace(c, rope_base=10_000.0) in cell 5 and watch the
#    assertion. How many of the T greedy choices change? Is a base of 101 close enough?
# 2. Leave out `s[:, future] = -np.inf`. Which rows of the logits are still right? Why would the
#    last row of a model with one single block be right, but not here?
# 3. Skip block 5 (`if i == 4: continue`). How far do the logits move, and does the answer change?
#    Try every block. Which one is missed least?
# 4. Ask for Anna instead. Is it the same head that looks up the answer?
