"""Tutorial 6: before the first token, part two. Fewer weights, fewer bits, tables, other orders.

Tutorial 3 folded norms, fused products and made the first layer a table. Here is what else can be
done to standing weights: what is exact, what is nearly the same, and what that "nearly" costs. One
model, one flag after another: what disappears from the tree, what the ledger counts, what memory,
loss and text say, and what the clock says, which often disagrees.

Letters: D width, K key/value heads, d head width, F hidden neurons, L layers.
"""

# %% A model, held-out stories, and helpers
import io
import tempfile
import time
from collections import namedtuple
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
from minitx.precompute.lut.product_table import IntegerLinear, ProductTable, TableLinear

import minitx
from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.technique import apply, find
from minitx.training.loss import token_losses
from minitx.tree import nbytes

ASK = "Tom was in the garden. Tom went to the park. Where is Tom? Tom is in the"
Row = namedtuple("Row", "lm work reads memory cache loss")


def title(text):
    print(f"\n{text}\n{'-' * len(text)}")


def verdict(ratio):
    """A ratio of measured times in words, so that nobody is tempted to flatter it."""
    return "gain" if ratio > 1.05 else "loss" if ratio < 0.95 else "no clear difference"


def error(found, expected):
    """The largest difference, relative to the largest number that was expected."""
    return abs(found - expected).max() / abs(expected).max()


def changes(before, after, part):
    """What differs in the tree of a part of block 1: "-" was there before, "+" is after."""
    a, b = (repr(getattr(one.model.stack.blocks[1], part)).splitlines() for one in (before, after))
    for mark, these, others in (("-", a, b), ("+", b, a)):
        print("\n".join(f"  {mark} {line}" for line in these if line not in others))


def with_flags(lm, words):
    """The model with techniques as the command line has them, "prune sparsity=0.5 + pack_zeros"."""
    flags = (flag.split() for flag in words.split(" + "))
    return apply(lm, {name: find(name).read(options) for name, *options in flags})


def measure(lm):
    """A row of figures; the likeliest token at each place of the stories; and a task to time: the
    last of 64 tokens, with the others in the cache."""
    logits = [lm.logits(story.ids[:-1]) for story in stories]
    losses = [token_losses(z, np.array(s.ids[1:])) for z, s in zip(logits, stories)]
    state = lm.model.new_state()
    lm.model.next_logits(ids[:63], state)
    with counting(lm) as counts:
        lm.model.next_argmax(ids[63:64], state)
    work, sizes = counts.total(), (nbytes(lm), state.bytes_per_token)
    row = Row(lm, work.multiply_adds, work.weight_bytes, *sizes, np.concatenate(losses).mean())
    likeliest = np.concatenate([z.argmax(-1) for z in logits])
    return row, likeliest, lambda: (state.rewind(63), lm.model.next_argmax(ids[63:64], state))


def versus(lm, lines):
    """Print and return rows by name: the dense model, and each "name: flags", parted by ";"."""
    rows, (dense, choices, plain) = {}, measure(lm)
    print(f"{lm.name:17}   work  reads memory  cache    loss    same  says       speed")
    for line in ["dense", *lines.split(";")]:
        name, _, words = line.strip().partition(": ")
        row, likeliest, task = measure(with_flags(lm, words)) if words else (dense, choices, plain)
        best = [np.inf, np.inf]
        for _ in range(15 if words else 0):  # in turns, so that a busy moment hits both
            for i, job in enumerate((plain, task)):
                began = time.perf_counter()
                job()
                best[i] = min(best[i], time.perf_counter() - began)
        print(f"{name:17} {row.work / 1e6:6.3f} {row.reads / 1e6:6.2f}", end=" ")
        print(f"{row.memory / 1e6:6.2f} {row.cache:6,} {row.loss:7.4f}", end=" ")
        print(f"{(likeliest == choices).mean():7.1%} {row.lm.generate(ASK, 1):10}", end=" ")
        print(f"{best[0] / best[1]:6.2f} {verdict(best[0] / best[1])}" if words else "  1.00 -")
        rows[name] = row
    return rows


lm, exact = (minitx.load("stories", dtype=kind) for kind in (np.float32, np.float64))
stories, c = encode(lm.tokenizer, held_out(lm, 6)), lm.model.config
ids, D, K, d, F, L = stories[0].ids, c.width, c.kv_heads, c.head_width, c.hidden, c.layers
print(f"""{lm.name}: D={D} K={K} d={d} F={F} L={L}. The columns of the tables below:
work: millions of multiply-adds, and reads: MB of weights, of one token with 63 before it (ledger);
memory: MB of all arrays; cache: bytes a token; loss: nats a token, six stories (thousandths are
luck); same: how often the likeliest next token is the dense model's; speed: of a token, dense = 1;
says: after "{ASK}".""")

# %% 1a. Two matrices in a row
# x A B: what stands between them is nobody's business. With any M that has an inverse, A M and
# M^-1 B do the same; let M be a square block of B: it becomes the identity, which nobody stores.
title("1. Exact: what follows from two matrices in a row")
A = np.array([[1, 0], [2, 1], [0, 3], [1, 1]])  # (4, 2)
B = np.array([[1, 1, 2, 0], [1, 2, 0, 3]])  # (2, 4)
M = B[:, :2]
inverse = np.rint(np.linalg.inv(M)).astype(int)
print("A     B              A M   M^-1 B")
for four in zip(A, [*B, "", ""], A @ M, [*(inverse @ B), "", ""]):
    print("{!s:5} {!s:14} {!s:5} {!s:14}".format(*four).rstrip())
assert ((A @ M) @ (inverse @ B) == A @ B).all() and (inverse @ M == np.eye(2)).all()
print(f"The same product with {A.size + B.size} numbers, and with {A.size + B.size - M.size}.\n")

# %% 1b. The same as a technique
# In a head, W_v is followed by W_o, and between them is only a mixing of tokens.
rows = versus(lm, "shrink: shrink")
changes(lm, rows["shrink"].lm, "attn")
wrong = error(with_flags(exact, "shrink").logits(ids[:64]), exact.logits(ids[:64]))
assert wrong < 1e-9  # of the 16 digits of float64, cond takes some
assert rows["dense"].work - rows["shrink"].work == L * K * d * d
print(f"Gone: L K d^2 = {L * K * d * d:,} weights, but there are more calls. cond is how much M^-1")
print(f"enlarges what is rounded. In float64, logits are off by {wrong:.0e}.\n")

# %% 1c. Keys are enough
# If W_k is square, a token's key tells what its x was, so it tells its value: v = k W_k^-1 W_v.
try:
    with_flags(lm, "slim_attention")
except MinitxError as refusal:
    print(f"Not for this model: {str(refusal).partition(';')[0]}.")
other, sharp = (minitx.load("stories-parallel", dtype=kind) for kind in (np.float32, np.float64))
qkv, x = sharp.model.stack.blocks[0].attn.qkv, np.random.default_rng(0).normal(size=(50, D))
wrong = error(x @ qkv.k.w @ np.linalg.solve(qkv.k.w, qkv.v.w), x @ qkv.v.w)  # k W_k^-1 W_v and v
print(f"Next model: cond(W_k) is {np.linalg.cond(qkv.k.w):.0f}, values by hand off by {wrong:.0e}.")
slim = "slim_attention max_condition=1e9"  # we look at the error ourselves
rows = versus(other, f"slim_attention: {slim}; absorb_products: absorb_products")
wrong = max(wrong, error(with_flags(sharp, slim).logits(ids[:64]), sharp.logits(ids[:64])))
assert wrong < 1e-6 and rows["slim_attention"].cache * 2 == rows["dense"].cache
assert rows["slim_attention"].work > rows["dense"].work < rows["absorb_products"].work
print("Half the cache, for more work. absorb_products makes W_v W_o one matrix for each head:")
print("larger for narrow heads, but one sees what a head does. (merge_embeddings, for tiny")
print("tables: the sums of all tokens and learned positions.)\n")

# %% 1d. Without skips
# "x +" ties both ends of a block to one basis. Without, W_q goes into the FFN before it, W_o into
# the FFN behind it: whole products fall away. Only a model that was trained so allows it.
skipless = minitx.load("stories-skipless")
rows = versus(skipless, "remove_weights: remove_weights")
changes(skipless, rows["remove_weights"].lm, "attn")
gone = 2 * skipless.model.config.layers * skipless.model.config.width**2
assert rows["dense"].work - rows["remove_weights"].work == gone
print(f"Gone: 2 L D^2 = {gone:,} multiply-adds a token, and two calls in each block.")

# %% 2a. Fewer bits, by hand
# A number of b bits is a whole one from -q to q, q = 2^(b-1) - 1, times a scale that some share.
title("2. Fewer bits, first by hand on four numbers")
w = np.array([0.90, -0.35, 0.10, 0.02])
print(" " * 37 + "".join(f"{n:8.2f}" for n in w))
for bits, parts in ((8, 1), (4, 1), (2, 1), (4, 2)):
    q, groups = 2 ** (bits - 1) - 1, w.reshape(parts, -1)
    scales = abs(groups).max(-1, keepdims=True) / q
    codes = np.rint(groups / scales).astype(int)
    off, back = abs(codes * scales - groups), "".join(f"{n:8.3f}" for n in (codes * scales).flat)
    assert (off <= scales / 2 + 1e-12).all()
    print(f"{bits} bits, {parts} scale(s) {codes.ravel()!s:>18} {back}, off by {off.mean():.3f}")
print("A large number makes the steps coarse for all who share its scale: hence small groups.\n")

# %% 2b. The whole model
FEWER_BITS = """8 bits: quantize bits=8; 4 bits: quantize bits=4;
    4, all tables: quantize bits=4 which=all; 4, one scale: quantize bits=4 group=None;
    4, 1% in full: separate_magnitudes bits=4 share=0.01; 4, run=load: quantize bits=4 run=load;
    cache, 8 bits: quantize_cache bits=8; cache, 4 bits: quantize_cache bits=4"""
rows = points = versus(lm, FEWER_BITS)
changes(lm, rows["4 bits"].lm, "ffn")
for less, more in (("8 bits", "dense"), ("4 bits", "8 bits"), ("4, all tables", "4 bits")):
    assert rows[less].memory < rows[more].memory and rows[less].work == rows[more].work
assert rows["cache, 4 bits"].cache < rows["cache, 8 bits"].cache < rows["dense"].cache
print("NumPy has no fast product of small integers: codes become floats again, for each product")
print("or once (run=load: then the products are dense, and off 1.00 is just this clock's error).")

# %% 3a. Fewer weights: zeros that buy nothing, and neurons that do
# Wanda drops weights of small |w| |x|, wherever they are. A dense array keeps the zeros and
# multiplies them. prune_structure cuts whole neurons or heads: an ordinary model, but smaller.
# low_rank makes two thin matrices of one. All learn from four calibration stories, to be quick.
title("3. Fewer weights")
FEWER_WEIGHTS = """half zeros: prune stories=4; half, packed: prune stories=4 + pack_zeros;
    2 of 4 zeros: prune scope=2:4 stories=4; neurons - 1/4: prune_structure stories=4;
    neurons - 1/2: prune_structure neurons=0.5 stories=4; rank, 80%: low_rank share=0.8 stories=4;
    heads - 1/2: prune_structure neurons=0 heads=0.5 stories=4"""
rows = versus(lm, FEWER_WEIGHTS)
for name in ("half zeros", "neurons - 1/4", "rank, 80%"):
    print(f"{name}:")
    changes(lm, rows[name].lm, "ffn")
points, dense = points | rows, rows["dense"]
assert rows["half zeros"][1:5] == dense[1:5]  # half of the weights gone, and nothing gained
assert rows["half, packed"].memory < dense.memory and rows["half, packed"].work == dense.work
assert abs(rows["half, packed"].loss - rows["half zeros"].loss) < 1e-5
assert dense.work - rows["neurons - 1/4"].work == 3 * D * int(F / 4) * L
assert rows["neurons - 1/2"].memory < rows["neurons - 1/4"].memory < dense.memory
assert rows["heads - 1/2"].cache * 2 == dense.cache and rows["rank, 80%"].work < dense.work

# %% 3b. The picture
MARKS = {name[0]: name for name in ("half zeros", "neurons - 1/4", "rank, 80%", "8 bits", "4 bits")}
MARKS |= {"p": "half, packed", "N": "neurons - 1/2", "H": "heads - 1/2", "2": "2 of 4 zeros"}
MARKS |= {"a": "4, all tables", "s": "4, one scale", "D": "dense"}
HIGH, WIDE, losses = 12, 40, [points[name].loss for name in MARKS.values()]
low, top = min(losses), min(max(losses), min(losses) + 0.3)
lines = np.full((HIGH + 1, 2 * WIDE + 5), " ")
lines[:, WIDE + 3] = "|"
for mark, name in MARKS.items():
    y = round(HIGH * (top - min(points[name].loss, top)) / (top - low))
    for left, axis in ((0, "memory"), (WIDE + 4, "work")):  # from 0 to the dense model's
        share = getattr(points[name], axis) / getattr(dense, axis)
        lines[y, left + min(round(WIDE * share), WIDE)] = mark
print("\nLoss (at the top: or more) against memory, left, and multiply-adds, right, both from 0:")
for i, line in enumerate(lines):
    print(f"{top - i / HIGH * (top - low):5.2f} |{''.join(line)}".rstrip())
print(f"{'':6}+{'-' * (WIDE + 3)}+{'-' * (WIDE + 1)}")
names = [f"{mark} {name}" for mark, name in MARKS.items()]
print(" | ".join(names[:6]), " | ".join(names[6:]), sep="\n")
print("Bits save memory and no work. Zeros save what is packed. What is cut out saves both.")

# %% 4. Tables instead of products
# Few bits are few possibilities: all products of two short vectors of 2-bit numbers fit on a page.
title("4. Tables: two reads and an addition in the place of four multiply-adds")
vectors = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
T = np.array(vectors) @ np.array(vectors).T  # (9, 9), made once, whatever the weights are
print("x \\ w  " + "".join(f"{a:2},{b:2} " for a, b in vectors).rstrip())
for (a, b), line in zip(vectors, T):
    print(f"{a:2},{b:2} " + "".join(f"{n:6}" for n in line))
x, w = [1, -1, 0, 1], [1, 1, -1, 1]
found = [T[vectors.index((*x[i : i + 2],)), vectors.index((*w[i : i + 2],))] for i in (0, 2)]
assert sum(found) == np.dot(x, w)
print(f"{x} . {w} = {found[0]} + {found[1]} = {np.dot(x, w)}\n")
W, shared = lm.model.stack.blocks[1].ffn.down.w, ProductTable.of(4, 4, 2, "vertical")
x = np.random.default_rng(0).normal(size=(20, F)).astype(np.float32)
assert (TableLinear.of(shared, W, None)(x) == IntegerLinear.of(W, None, 4, 4)(x)).all()
print(f"{F}x{D} weights in 4 bits, inputs too, two at a time: a table of {shared.entries.nbytes:,}")
print("bytes, and bit for bit their product. Two blocks so, or by prototypes; and a table of SiLU:")
TABLES = """lut, product: lut layers=2; function_tables: function_tables;
    lut, centroid: lut kind=centroid layers=2 stories=2"""
rows = versus(lm, TABLES)
assert rows["lut, product"].work < dense.work == rows["function_tables"].work
assert rows["lut, product"].memory < dense.memory < rows["function_tables"].memory
print("Multiplications are gone; but NumPy fetches numbers one by one, BLAS multiplies many at")
print("once. On a processor that shuffles bytes, or a chip made for it, that is another matter.")

# %% 5. Order
# Sums may be added in any order. Inputs >= 0 and positive weights first: the sum rises, then falls,
# and once it is below 0 it stays there. If a ReLU comes next, the rest need not be added at all.
title("5. Another order of the same numbers")
x, w = np.random.default_rng(3).random(12), np.array([-1, 1, -2, -1, 1, -1, 2, -1, -2, 1, 1, -3])
for name, order in {"as stored": range(12), "positives first": np.argsort(-w)}.items():
    sums = np.cumsum([x[i] * w[i] for i in order])
    print(f"{name:16}" + "".join(f"{total:6.2f}" for total in sums))
certain = np.argmax(sums < 0) + 1  # in the second order
assert (sums[certain - 1 :] < 0).all()
print(f"Below 0 for certain after {certain} of 12 products; as stored, after the last.\n")
ORDERS = """order_products: order_products matrices=attention;
    largest rows 1st: order_products order=largest_rows_first; separate_signs: separate_signs"""
rows = versus(lm, ORDERS)
assert all(abs(row.loss - dense.loss) < 1e-4 for row in rows.values())
assert rows["separate_signs"].work > rows["order_products"].work == dense.work
print("Exact, and nothing saved yet: these are for stopping early, and for narrow accumulators.")

# %% 6. Offline work once: the command writes the changed tree, and load() reads it
title("6. minitx precompute: written once, loaded as it is")
words = "fold_norms + first_layer + quantize bits=4 scaling=true stories=4"
options = words.replace("fold_norms + first_layer + q", "--fold-norms --first-layer --q").split()
with tempfile.TemporaryDirectory() as folder:
    out, figures = Path(folder) / "small", io.StringIO()
    with redirect_stderr(figures):
        assert main(["precompute", str(out), *options]) == 0
    print("minitx precompute small", *options)
    print(figures.getvalue().strip().replace(f"{folder}/", ""))
    print("; ".join(f"{file.name} {file.stat().st_size:,} bytes" for file in sorted(out.iterdir())))
    began = time.perf_counter()
    loaded = minitx.load(out)
    seconds = time.perf_counter() - began
made = with_flags(lm, words)
assert np.array_equal(loaded.logits(ids), made.logits(ids)) and nbytes(loaded) < nbytes(lm)
print(f"Loading takes {seconds:.3f} s; the logits are identical, bit for bit.")
print(f"In memory: {nbytes(loaded):,} bytes; the dense model: {nbytes(lm):,}.")

# %% Exercises
# 1. shrink choice=first takes the first d columns of W_o. What becomes of cond, and of the error in
#    float32? Make two of these columns nearly the same: who notices?
# 2. Four bits with group=16, 32, 64, 128: loss against memory. Which would you take?
# 3. Cut neurons and keep the rest in 8 bits, until it is as small as all in 4. Which is better?
# 4. lut with ba=3, then with bw=3: which harms more? Why cannot the weights alone tell?
