"""Tutorial 6: before the first token, part two. Fewer weights, fewer bits, tables, and another order.

Tutorial 3 folded norms, fused products and made the first layer a table. Here is everything else
that can be done to standing weights: what follows exactly, what is nearly the same, and what that
"nearly" costs. One model, one flag after another: what disappears from the tree, what the ledger
counts, what memory says, what loss and text say, and what the clock says, which often disagrees.

Letters: D width, H query heads, K key/value heads, d head width, F hidden neurons, L layers.
"""

# %% A model, held-out stories, and helpers
import difflib
import io
import tempfile
import textwrap
import time
from collections import namedtuple
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np

import minitx
from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.matrices.product_table import IntegerLinear, ProductTable, TableLinear
from minitx.technique import apply
from minitx.training.loss import token_losses
from minitx.tree import nbytes, weights

BEGINNING = "Once upon a time there was a girl named Anna. Anna"
Row = namedtuple("Row", "work read memory cache loss")


def title(text):
    print(f"\n{text}\n{'-' * len(text)}")


def say(*sentences):
    print(textwrap.fill(" ".join(sentences), 100))


def verdict(ratio):
    """A ratio of measured times in words, so that nobody is tempted to flatter it."""
    return "gain" if ratio > 1.05 else "loss" if ratio < 0.95 else "no clear difference"


def error(found, expected):
    """The largest difference, relative to the largest number that was expected."""
    return abs(found - expected).max() / abs(expected).max()


def changes(before, after):
    """Two trees as one, only the lines that differ: "-" was before, "+" is after."""
    lines = difflib.ndiff(repr(before).splitlines(), repr(after).splitlines())
    print("\n".join(line for line in lines if line[0] in "+-"))


def quality(lm):
    """Mean loss of all tokens of the held-out stories, and the most likely token at each place."""
    logits = [lm.logits(story.ids[:-1]) for story in stories]
    losses = [token_losses(z, np.array(s.ids[1:])) for z, s in zip(logits, stories)]
    return float(np.concatenate(losses).mean()), np.concatenate([z.argmax(-1) for z in logits])


def a_token(lm):
    """A task: one token, with 63 before it in the cache; and the state it works on."""
    state, ids = lm.model.new_state(), stories[0].ids[:64]
    lm.model.next_logits(ids[:-1], state)
    return lambda: (lm.model.next_best(ids[-1:], state), state.rewind(63)), state


def versus(dense, repeats=30, **changed):
    """Measure the models against the dense one and print a row for each; returns the rows."""
    _, choices = quality(dense)
    told, rows = dense.generate(BEGINNING, 40), {}
    print(f"{dense.name:17} multiply-adds  weights read   memory  cache    loss   same  text  speed")
    for name, one in {"dense": dense, **changed}.items():
        task, state = a_token(one)
        with counting(one) as counts:
            task()
        total, (loss, chosen) = counts.total(), quality(one)
        row = Row(total.multiply_adds, total.weight_bytes, nbytes(one), state.bytes_per_token, loss)
        best = [np.inf, np.inf]
        for _ in range(repeats if one is not dense else 0):  # in turns: a busy moment hits both
            for i, job in enumerate((a_token_of_dense, task)):
                began = time.perf_counter()
                job()
                best[i] = min(best[i], time.perf_counter() - began)
        ratio = best[0] / best[1] if one is not dense else 1
        a_token_of_dense = task if one is dense else a_token_of_dense
        same, text = (chosen == choices).mean(), one.generate(BEGINNING, 40) == told
        print(f"{name.replace('_', ' '):17} {row.work:13,} {row.read:12,}", end="  ")
        print(f"{row.memory / 1e6:4.2f} MB {row.cache:6,} {loss:7.4f} {same:6.1%}", end="  ")
        print(f"{'same' if text else 'new ':4} {ratio:5.2f}", verdict(ratio) if rows else "-")
        rows[name] = row
    return rows


lm = minitx.load("stories")
exact = minitx.load("stories", dtype=np.float64)
stories = encode(lm.tokenizer, held_out(lm, 6))
ids = stories[0].ids
c = lm.model.config
D, H, K, d, F, L = c.width, c.heads, c.kv_heads, c.head_width, c.hidden, c.layers
print(f"{lm.name}: D={D} H={H} K={K} d={d} F={F} L={L}; {sum(len(s.ids) for s in stories):,} tokens")

# %% 1a. Two matrices in a row
# x A B: what stands between them is nobody's business. With any M that has an inverse, A M and
# M^-1 B do the same; so let M be a square block of B: it becomes the identity, which nobody stores.
title("1. Exact: what follows from two matrices in a row")
A = np.array([[1, 0], [2, 1], [0, 3], [1, 1]])  # (4, 2)
B = np.array([[1, 1, 2, 0], [1, 2, 0, 3]])  # (2, 4)
M = B[:, :2]
inverse = np.rint(np.linalg.inv(M)).astype(int)
for left, right in zip((A, A @ M), (B, inverse @ B)):
    lines = [f"{a!s:8}   {b}" for a, b in zip(left, [*map(str, right), "", ""])]
    print("\n".join(line.rstrip() for line in lines), end="\n\n")
assert np.array_equal((A @ M) @ (inverse @ B), A @ B)
assert np.array_equal((inverse @ B)[:, :2], np.eye(2))
print(f"The same product with {A.size + B.size} numbers, and with {A.size + B.size - M.size}.\n")

# %% 1b. The same as a technique
# In a head, W_v is followed by W_o, and between them is only a mixing of tokens.
shrunk = apply(lm, {"shrink": True})
changes(lm.model.stack.blocks[1].attn, shrunk.model.stack.blocks[1].attn)
wrong = error(apply(exact, {"shrink": True}).logits(ids[:64]), exact.logits(ids[:64]))
assert wrong < 1e-9  # float64 has 16 digits, and cond takes some of them
print(f"\ncond is how much M^-1 may enlarge a rounding. In float64, logits are off by {wrong:.0e}.")
rows = versus(lm, shrink=shrunk)
assert rows["dense"].work - rows["shrink"].work == L * K * d * d
print(f"Gone: L K d^2 = {L * K * d * d:,} weights and multiply-adds; but more calls than before.")

# %% 1c. Keys are enough
# If W_k is square, a token's key tells what its x was, so it tells its value: v = k W_k^-1 W_v.
print()
try:
    apply(lm, {"slim_attention": True})
except MinitxError as refusal:
    say("Here:", str(refusal))
other, other64 = (minitx.load("stories-parallel", dtype=t) for t in (np.float32, np.float64))
qkv, x = other64.model.stack.blocks[0].attn.qkv, np.random.default_rng(0).normal(size=(50, D))
k, v = x @ qkv.k.w, x @ qkv.v.w  # (50, D) each, but for biases
W_kv = np.linalg.solve(qkv.k.w, qkv.v.w)  # W_k^-1 W_v, offline
print(f"stories-parallel, by hand: cond(W_k) is {np.linalg.cond(qkv.k.w):.0f}, and", end=" ")
print(f"values from keys are off by {error(k @ W_kv, v):.0e} in float64.")
assert error(k @ W_kv, v) < 1e-6
flags = {"slim_attention": {"max_condition": 1e9}}  # we look at the error ourselves
wrong = error(apply(other64, flags).logits(ids[:64]), other64.logits(ids[:64]))
assert wrong < 1e-6
rows = versus(other, slim_attention=apply(other, flags), absorb_products=apply(other, {"absorb_products": True}))
assert rows["slim_attention"].cache * 2 == rows["dense"].cache
assert rows["slim_attention"].work > rows["dense"].work < rows["absorb_products"].work
say(
    "slim_attention halves the cache and pays with work. absorb_products makes W_v W_o one",
    "matrix for each head: with several narrow heads it pays nothing back, but shows what a head",
    f"is. (merge_embeddings adds learned positions to every token beforehand: V context D numbers,",
    "for tiny tables only.)",
)

# %% 1d. Without skips
# x + ... ties both ends of a block to one basis. Without the "x +", W_q goes into the FFN before
# it, and W_o into the FFN behind it: whole products fall away. Only a model trained so has that.
print()
skipless = minitx.load("stories-skipless")
removed = apply(skipless, {"remove_weights": True})
changes(skipless.model.stack.blocks[1].attn, removed.model.stack.blocks[1].attn)
rows = versus(skipless, remove_weights=removed)
gone = 2 * skipless.model.config.layers * skipless.model.config.width ** 2
assert rows["dense"].work - rows["remove_weights"].work == gone
print(f"Gone: 2 L D^2 = {gone:,} multiply-adds a token, and two calls in each block.")

# %% 2a. Fewer bits, by hand
# A number of b bits is a whole one from -q to q, q = 2^(b-1) - 1, times a scale that some share.
title("2. Fewer bits: four numbers by hand")
w = np.array([0.90, -0.35, 0.10, 0.02])


def rounded(w, bits):
    """Codes and scale: w is about code * scale, off by half a scale at most."""
    q = 2 ** (bits - 1) - 1
    scale = abs(w).max() / q
    return np.rint(w / scale).astype(int), scale


print(f"{'':26}" + "".join(f"{number:8.2f}" for number in w))
for bits, parts in ((8, [w]), (4, [w]), (2, [w]), (4, [w[:2], w[2:]])):
    codes, scales = zip(*(rounded(part, bits) for part in parts))
    back = np.concatenate([code * scale for code, scale in zip(codes, scales)])
    assert all((abs(p - q * s) <= s / 2 + 1e-12).all() for p, q, s in zip(parts, codes, scales))
    print(f"{bits} bits, {len(parts)} scale{'s' * (len(parts) > 1):1} {np.concatenate(codes)!s:>15}", end=" ")
    print("".join(f"{number:8.3f}" for number in back), f"  off by {abs(back - w).max():.3f}")
print("One large number makes a coarse scale for all who share it: so small groups, or few shares.")

# %% 2b. The whole model
title("2. Fewer bits: memory against loss")
bits = {
    "8 bits": {"quantize": {"bits": 8}},
    "4 bits": {"quantize": {"bits": 4}},
    "4, one scale": {"quantize": {"bits": 4, "group": None}},
    "4, 1% apart": {"separate_magnitudes": {"bits": 4, "share": 0.01}},
    "4, all": {"quantize": {"bits": 4, "which": "all"}},
    "4, run=load": {"quantize": {"bits": 4, "run": "load"}},
    "cache 8": {"quantize_cache": {"bits": 8}},
    "cache 4": {"quantize_cache": {"bits": 4}},
}
bits = {name: apply(lm, flags) for name, flags in bits.items()}
changes(lm.model.stack.blocks[1].ffn, bits["4 bits"].model.stack.blocks[1].ffn)
rows = points = versus(lm, **bits)
assert rows["dense"].memory > rows["8 bits"].memory > rows["4 bits"].memory > rows["4, all"].memory
assert rows["dense"].cache > rows["cache 8"].cache > rows["cache 4"].cache
assert all(row.work == rows["dense"].work for row in rows.values())
