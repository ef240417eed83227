"""Tutorial 3: before the first token. What can be done before the first token, so that there is
less to do for every token?

The weights of a trained model stand still. What follows from them alone can be computed once,
before anybody asks (offline), instead of for every token (online). Here are techniques that do so
and are exact. We count and measure what they bring, and then ask what "exact" means.

Letters: T new tokens, S all tokens so far, D width, H query heads, K key/value heads, d head width,
F hidden neurons, V vocabulary, L layers, and A = H d + 2 K d, the numbers of q, k and v together.
"""

# %% A model, some text, and helpers
import difflib
import textwrap
import time
from dataclasses import replace
from functools import partial

import numpy as np

import minitx
from minitx.build import random_model
from minitx.ledger import counting
from minitx.model import Linear, RMSNorm
from minitx.state import Layer, Tokens
from minitx.technique import apply, find, swap
from minitx.tree import walk, weights


def title(text):
    print(f"\n{text}\n{'-' * len(text)}")


def say(*sentences):
    print(textwrap.fill(" ".join(sentences), 100))


def fastest(*tasks, repeats=5):
    """Seconds of each task, in turns (so that a busy moment hits all), the best of the repeats."""
    best = [float("inf")] * len(tasks)
    for _ in range(repeats):
        for i, task in enumerate(tasks):
            began = time.perf_counter()
            task()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def verdict(ratio):
    """A ratio of measured times in words, so that nobody is tempted to flatter it."""
    return "gain" if ratio > 1.05 else "loss" if ratio < 0.95 else "no clear difference"


def error(found, expected):
    """The largest difference, relative to the largest number that was expected."""
    return abs(found - expected).max() / abs(expected).max()


def changes(before, after):
    """Two trees of parts as one: lines only before are marked "-", lines only after "+"."""
    lines = difflib.ndiff(repr(before).splitlines(), repr(after).splitlines())
    print("\n".join(line for line in lines if line[0] != "?"))


def check(changed):
    """Its error in float32; fails if that is large, or if it does not tell the same text."""
    found = error(changed.logits(ids), expected)
    assert found < 1e-5 and changed.generate(BEGINNING, 40) == told
    return found


def work(lm, T=1, S=64):
    """A ledger of what the newest T of S tokens take, by part."""
    state, text = lm.model.new_state(), (ids * S)[:S]
    if S > T:
        lm.model.next_logits(text[: S - T], state)
    with counting(lm.model) as counts:
        lm.model.next_logits(text[S - T :], state)
    return counts


lm = minitx.load("stories")
exact = minitx.load("stories", dtype=np.float64)  # the same weights; calculates with 16 digits
model, c = lm.model, lm.model.config
D, H, K, d, F, V, L = c.width, c.heads, c.kv_heads, c.head_width, c.hidden, c.vocab_size, c.layers
A = H * d + 2 * K * d
ids = lm.encode(
    "Once upon a time there was a boy named Tom. Tom was in the garden. Anna was in the kitchen. "
    "Tom went to the park. Where is Tom? Tom is in the"
)
T = len(ids)
expected, sharp = lm.logits(ids), exact.logits(ids)  # (T, V), the second with 16 digits
BEGINNING = "Once upon a time there was a girl named Anna. Anna"
told = lm.generate(BEGINNING, 40)
print(f"{lm.name}: D={D} H={H} K={K} d={d} F={F} V={V} L={L}; so A={A}")

# %% 1. The smallest example, by hand
# A norm ends with a gain: column i of every row is multiplied by g[i]. Then comes a matrix, which
# multiplies column i by its row i. Two multiplications by constants, one after the other: they can
# be one. (x / rms * g) @ W = (x / rms) @ (diag(g) W), and diag(g) W has been known since training.
title("1. A gain that need not be there")
print("The median gain of the two norms in each block, and the smallest and largest of both:")
for i, block in enumerate(model.stack.blocks):
    gains = block.attn.norm.gain, block.ffn.norm.gain  # (D,) each
    medians = "".join(f"{np.median(g):5.2f} {'#' * round(20 * np.median(g)):30}" for g in gains)
    print(f"block {i}  {medians} {np.min(gains):.2f} to {np.max(gains):.2f}")
print("(Were all gains 1, what follows would prove nothing. We come back to that.)\n")
for one, tolerance in ((exact.model, 1e-14), (model, 1e-5)):
    attn, x = one.stack.blocks[0].attn, one.embed(ids, None)  # (T, D)
    g, rms = attn.norm.gain, np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)  # (D,), (T, 1)
    for letter in "qkv":
        W = getattr(attn.qkv, letter).w  # (D, H*d) or (D, K*d)
        # g[:, None] * W is diag(g) W, row i of W times g[i]: offline, once
        difference = error((x / rms) @ (g[:, None] * W), (x / rms * g) @ W)
        assert difference < tolerance
        print(f"{letter} of block 0 in {x.dtype}: error {difference:.1e}, allowed {tolerance:.0e}")
print("Equal in algebra; but rounded after each step, and the steps are others now.")

# %% 2. The same as a technique
# Each norm feeds matrices: q, k, v behind one, gate and up behind the other. The technique
# fold_norms does by swapping parts of the tree what we did by hand, in every block.
title("2. fold_norms: the tree before and after")
card = find("fold_norms").card  # what its file says of itself; all of it: minitx explain fold_norms
for text in (card.summary, *(f"{h}: {card.sections[h]}" for h in ("Offline", "Saves"))):
    print(textwrap.fill(text, 100, subsequent_indent="    "))
folded = minitx.load("stories", fold_norms=True)
print("\nOne block ('-' before, '+' after):")
changes(model.stack.blocks[1], folded.model.stack.blocks[1])
print(f"\nlogits of {T} tokens: error {check(folded):.1e} in float32,", end=" ")
print(f"{error(apply(exact, {'fold_norms': True}).logits(ids), sharp):.1e} in float64")
say(f"The greedy text is the same: {BEGINNING} >>>{told}")
sizes = [sum(w.size for w in weights(one.model).values()) for one in (lm, folded)]
assert sizes[0] - sizes[1] == 2 * L * D
print(f"Gone: {2 * L * D:,} weights, two gains of {D} in each of {L} blocks. The last norm keeps")
print("its own: its reader is the table of tokens, which is read elsewhere, too.")

# %% 3. Fewer, wider products
# Three matrices that read the same row can stand side by side as one: the same multiply-adds in
# fewer calls. A call has a price of its own (Python, checks, starting up), whatever its size.
title("3. fuse_projections: one product where there were three")
fused = minitx.load("stories", fuse_projections=True)
changes(model.stack.blocks[1], fused.model.stack.blocks[1])
print(f"\nerror {check(fused):.1e} in float32, and the same text. One token:")
for one in (lm, fused):
    products = sum(type(node) is Linear for _, node in walk(one.model.stack))
    print(f"  {products} products in the blocks, {work(one).total().multiply_adds:,} multiply-adds")
assert work(fused).total() == work(lm).total()  # of bytes, too
print("Speed of the fused product (separate ones = 1):")
pairs = [(b.attn.qkv, b.ffn.expand) for b in (model.stack.blocks[1], fused.model.stack.blocks[1])]
for rows in (1, 16, 256):
    x = np.ones((rows, D), np.float32)
    for name, a, b in zip(("q, k, v", "gate, up"), *pairs):
        slow, fast = fastest(partial(a, x), partial(b, x), repeats=50)
        print(f"  {rows:3} rows  {name:8} {slow / fast:5.2f} {verdict(slow / fast)}")
print("That calls are saved is certain. What that is worth is not, and may be less than nothing:")
print("a wider product can itself be slower, and halves of wide rows lie apart in memory.")

# %% 4. The first layer as a table
# What else follows from the weights alone? The first block starts from a row of the embedding: one
# of V. Its norm, q, k and v follow from that row: let us write them down for each token once.
title("4. The first layer as a table")
tom = lm.tokenizer.encode(" Tom", special=False)[0]
attn, x = exact.model.stack.blocks[0].attn, exact.model.embed.w[tom]  # (D,)
n = x / np.sqrt((x * x).mean() + c.norm_eps) * attn.norm.gain
row = np.concatenate([x, n @ attn.qkv.q.w, n @ attn.qkv.k.w, n @ attn.qkv.v.w])  # (D + A,)
began = time.process_time()
first = apply(lm, {"first_layer": True})  # what load(..., first_layer=True) does
seconds = time.process_time() - began
table = first.model.embed.w  # (V, D + A)
assert table.shape == (V, D + A) and error(table[tom], row) < 1e-6
print(f"' Tom' is token {tom}; its row [x, q, k, v] of {D} + {H * d} + {K * d} + {K * d} numbers,")
print(f"by hand and in the table: error {error(table[tom], row):.1e}. Block 0, before and after:")
changes(model.stack.blocks[0], first.model.stack.blocks[0])
# Offline it costs time once, and memory from then on. Online, the ledger tells what is saved.
grown = sum(w.nbytes for w in weights(first.model).values()) - 4 * sizes[0]
assert grown == 4 * (V * (D + A) - D * A - D)  # the tied head keeps the embedding
print(f"\nerror {check(first):.1e} in float32. Offline: {seconds:.3f} s, and", end=" ")
print(f"{4 * sizes[0] / 1e6:.2f} MB of weights grow by {grown / 1e6:.2f} MB.")
print("Online, multiply-adds of one token with 63 before it (#: done, .: saved by the table):")
before, after = work(lm), work(first)
for name in [*(f"stack.blocks.{i}" for i in range(L)), "head"]:
    was, now = (counts.total(name).multiply_adds for counts in (before, after))
    print(f"  {name:15} {was:8,} {now:8,}  {'#' * (now // 5000):.<{was // 5000}}")
saved = before.total().multiply_adds - after.total().multiply_adds
assert saved == D * A == before.total("stack.blocks.0.attn.qkv").multiply_adds
share = saved / before.total().multiply_adds
print(f"Saved: D A = {saved:,}, {share:.1%} of the work of a token.")

# The other blocks keep all of their work, and there may be many: at most 1/L can be saved.
print("\nShare of a token's work that the table saves, if the model had other numbers of layers:")
ledgers = {}
for one in (lm, minitx.load("stories-parallel")):
    before, after = work(one), work(apply(one, {"first_layer": True}))
    block, head = (before.total(name).multiply_adds for name in ("stack.blocks.1", "head"))
    ledgers[one.name] = block, head, before.total().multiply_adds - after.total().multiply_adds
for layers in (1, 2, 4, 8, 16, 32):
    print(f"  L={layers:2}  at most {1 / layers:4.0%}", end="")
    for name, (block, head, gain) in ledgers.items():
        part = gain / (layers * block + head)
        print(f"   {name} {part:5.1%} {'#' * round(30 * part):18}", end="")
    print()
print("In stories-parallel, attention and feed-forward network read the same row, so all of the")
print("network goes into the table. In stories it reads what attention has added, and stays.")

# Why the first block only? And why must positions wait? Look at Tom, wherever he stands.
print("\n' Tom' at several places of the story: how much do the rows differ?")
where = [t for t, token in enumerate(ids) if token == tom]
block, x = model.stack.blocks[0], model.embed(ids, None)
q = block.attn.qkv.q(block.attn.norm(x)).reshape(T, H, d)
turned = block.attn.rope(q.swapaxes(0, 1), Tokens(slice(0, T))).swapaxes(0, 1)  # (T, H, d)
rows = {"x entering block 0": x, "q in block 0, before positions": q}
rows |= {
    "q in block 0, turned by its position": turned,
    "x entering block 1": block(x, Layer.once(T)),
}
for text, found in rows.items():
    print(f"  {text:37} {error(found[where], found[where[:1]]):.3f} of the largest number")
say(
    "What differs cannot stand in a row for ' Tom'. Rotary positions turn q and k after the",
    "products, so they do no harm. Learned positions are added to x: a row for each token at each",
    f"position would make {V * c.context * (D + A) * 4 / 1e9:.1f} GB with our sizes. (The card of",
    "first_layer knows a way for q, k, v, but not for the feed-forward network.) What enters block",
    "1 depends on all the words before: no table holds that.",
)

# %% 5. All of them together
# Flags combine in any order: they are put in from the inside out, so the table is made from
# matrices that are folded and fused already.
title("5. All the exact ones together")
ALL = {"fold_norms": True, "fuse_projections": True, "first_layer": True}
lms = {"dense": lm, "fold_norms": folded, "fuse_projections": fused, "first_layer": first}
lms["all three"] = minitx.load("stories", **ALL)


def last_token(lm):
    """A task to time: the last token of the text, with all the others in the cache."""
    state = lm.model.new_state()
    lm.model.next_logits(ids[:-1], state)
    return lambda: (lm.model.next_argmax(ids[-1:], state), state.rewind(T - 1))


times = fastest(*map(last_token, lms.values()), repeats=60)
print(f"{'':17} multiply-adds    weights    error  speed (dense = 1)")
for (name, one), t in zip(lms.items(), times):
    size = sum(w.size for w in weights(one.model).values())
    print(f"{name:17} {work(one).total().multiply_adds:13,} {size:10,}", end="  ")
    print(f"{check(one):7.1e} {times[0] / t:6.2f} {'-' if one is lm else verdict(times[0] / t)}")
gained = times[0] - times[3]  # seconds a token
pays = f"after {seconds / gained:,.0f} tokens" if gained > 0 else "never"
print(f"All tell the same text. Counted, first_layer is {1 / (1 - share):.2f} times as fast;")
print(f"it also saves calls. Measured, its {seconds:.3f} s offline are earned back {pays}.")

# %% 6. What "exact" means, and how to notice that it is not true
# Exact in real arithmetic: the formulas are equal, the digits nearly. How small must a difference
# be to pass as rounding? Better ask how it behaves: with more digits rounding shrinks, a mistake
# stays. So we make mistakes on purpose, as if the folding had made them, and see what notices.
title("6. Rounding or a mistake? Ask float64")


def with_gain(lm, change):
    """The model, but one norm in the middle has the gain change(g)."""
    one = lm.model.stack.blocks[L // 2].attn.norm
    new = replace(one, gain=change(one.gain))
    return swap(lm, RMSNorm, lambda norm: new if norm is one else norm)


mistakes = {
    "none": lambda g: g,
    "one number wrong by 1/10,000": lambda g: np.where(g == g.max(), g * 1.0001, g),
    "the gain of one norm forgotten": lambda g: np.ones_like(g),
}
print(f"{'mistake':31} float32 {'':10} float64 {'':18} same text  below 1e-12")
for name, change in mistakes.items():
    print(f"{name:31}", end="")
    for one, goal in ((lm, expected), (exact, sharp)):
        wrong = error(apply(with_gain(one, change), ALL).logits(ids), goal)
        print(f" {wrong:.1e} {'#' * round(-np.log10(wrong)):{10 if one is lm else 18}}", end="")
    same = apply(with_gain(lm, change), ALL).generate(BEGINNING, 40) == told
    print(f" {'yes' if same else 'no':10} {'yes' if wrong < 1e-12 else 'NO: caught'}")
    assert (wrong < 1e-12) == (name == "none")
say(
    "(#: digits that are right.) Without a mistake, float64 brings its digits; with one it cannot.",
    "Text notices little, for greedy choice only asks which logit is largest; and a small mistake",
    "may be no larger than what float32 rounds away: compare the first two rows.",
)
# A check can also be blind. Take a model as it is before training: its gains are all 1.
fresh = replace(lm, model=random_model(c, dtype=np.float64))
blind = apply(with_gain(fresh, mistakes["the gain of one norm forgotten"]), ALL).logits(ids)
blind = error(blind, fresh.logits(ids))
assert blind < 1e-12
print(
    f"The gain forgotten, on fresh random weights: error {blind:.1e}. The check passes, for there"
)
print("was nothing to be seen. Before you trust a check, try it on a mistake.")

# %% Exercises
# 1. fold_norms leaves the last norm alone, since the head is the table of tokens. Fold it by hand
#    (a head of its own: Head(w) with w = diag(g) E.T) and check it. What does it cost in memory?
# 2. work(lm, B, B).total().weight_bytes counts what one pass over B tokens reads. From which B on
#    does the model with the table read more than the dense one? Find it, then derive it.
# 3. Which is the smallest mistake that cell 6 catches in float64? And in float32?
# 4. Why is k in the table not turned by its position? For which tokens could that be done?
