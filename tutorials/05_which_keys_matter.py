"""Tutorial 5: which keys matter. A token looks at all keys before it, and needs few. Which ones?

To know what a key weighs one has to score it, which is half of the work that was to be saved. Five
published ways foretell it from something cheaper. Here all five get the same query and the same
keys of the trained model, in a few lines of NumPy each, and one sees what each keeps and misses.

Letters: a query q sees S keys k_j of width d; the softmax of q . k_j / sqrt(d) is the weights.
Of H query heads, G share the keys of one key head. r keys are to be kept.
"""

# %% A model, questions that it has not seen, and helpers
import textwrap
import time
from functools import reduce

import numpy as np
from numpy.linalg import norm

import minitx
from minitx.fast import attention_weights, newest_mask
from minitx.lab.compare_attention import bytes_read, without_projections
from minitx.lab.evaluate import chains, encode, held_out
from minitx.ledger import counting
from minitx.shared.sparse_attention import Visible
from minitx.skip.elsa.hashing import angle_bias, directions
from minitx.skip.sparse_memory.kd_trees import looked_at
from minitx.skip.sparse_memory.nearest import longest_key
from minitx.state import Layer, Tokens
from minitx.technique import apply
from minitx.training.detector import watch


def title(text):
    print(f"\n{text}\n{'-' * len(text)}")


def largest(p, r):  # booleans like p (S,)
    return np.isin(np.arange(len(p)), np.argsort(-p, kind="stable")[:r])


lm = minitx.load("stories")
model, c = lm.model, lm.model.config
d, G = c.head_width, c.heads // c.kv_heads
watching, watched = watch(model)  # a copy of the model that notes what its attention works with


def read(ids):
    """Logits (T, V); of each block its input (T, D), q (H, T, d), k (H / G, T, d); the weights."""
    logits, found, T = watching(ids), [block.last() for block in watched], len(ids)
    w = [attention_weights(q, k, d**-0.5, newest_mask(T)) for _, q, k in found]
    w = np.reshape(w, (c.layers, c.heads, T, T))
    return logits, found, w / w.sum(-1, keepdims=True)


def query(i, h):  # q (d,) of the last token and the keys (S, d) that it sees, head h of block i
    return found[i][1][h, -1], found[i][2][h // G]


def mass(choose, r, heads):  # the share of the weight that is on the keys kept, a mean over heads
    return float(np.mean([w[at][choose(*at, r)].sum() for at in heads]))


# %% 1. The question, and the head that looks up the answer
# Nobody types in where to look: of held-out stories we take the questions that the model answers
# rightly though the answer's word is far back, and the head that gives this word most weight.
ROOM, FAR = 68, 20  # tokens that a picture has room for; how far back the word has to be
questions, most = [], 0
for story in encode(lm.tokenizer, held_out(lm, 60, "two_hops")):
    text, kinds = story.ids[: ROOM + 1], np.array(story.kinds[:ROOM])
    logits, _, w = read(text[:-1])
    for t in np.flatnonzero(kinds > 1):  # kinds of questions
        places = [j for j in range(t + 1) if text[j] == text[t + 1]]
        if t < 2 * FAR or not places or places[-1] > t - FAR or logits[t].argmax() != text[t + 1]:
            continue
        questions.append(text[: t + 2])
        given = w[:, :, t, places].sum(-1)  # (L, H)
        if given.max() > most:
            most, ids, answer, place = given.max(), text[: t + 1], text[t + 1], places[-1]
            block, head = (int(i) for i in np.unravel_index(given.argmax(), given.shape))
_, found, w = read(ids)
S, w = len(ids), w[:, :, -1]  # (L, H, S): what the last token gives to each
title(f"1. {S} keys, and how many of them matter")
print(textwrap.fill(f"{lm.tokenizer.decode(ids[1:])} >>>{lm.tokenizer.decode([answer])}", 100))
words = ["", *(lm.tokenizer.decode([i]).strip() for i in ids[1:])]  # the first token is no text
letters = ("".join(f"{x[n : n + 1]:1}" for x in words) for n in range(max(map(len, words))))
HEADER = "\n".join(" " * 10 + line.rstrip() for line in letters)
print(f"Block {block + 1}, head {head + 1} gives {most:.1%} of its weight to the answer.\n{HEADER}")
print(f"weight   |{''.join('.,:-=+*#%@'[min(int(10 * x), 9)] for x in w[block, head])}|")
print("How many keys hold 90 % of the weight? The last token in all heads of all blocks:")
many = ((-np.sort(-w, -1)).cumsum(-1) < 0.9).sum(-1) + 1  # (L, H)
for low, high in ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, S)):
    heads = int(((many >= low) & (many <= high)).sum())
    print(f"  {low:3} to {high:2} keys {heads:3} {'#' * heads}")

# %% 2. The best choice, and two that do not look
# If r keys may be kept, none are better than the r heaviest; to know them, an oracle scores all.
# Two know nothing: a window keeps the first four keys and the newest others, and one draws lots.
title("2. The best there is, and the least one may expect")
ALL, rng = [*np.ndindex(w.shape[:2])], np.random.default_rng(0)
CHOOSE = {  # how each chooses r keys in head h of block i
    "oracle": lambda i, h, r: largest(np.dot(*query(i, h)[::-1]), r),
    "window": lambda i, h, r: largest((np.arange(S) - 4) % S, r),  # the first four come first
    "lots": lambda i, h, r: largest(rng.random(S), r),
}
print(f"   r{'this head':>27}{'all heads':>27}\n{'':4}" + "   oracle   window     lots" * 2)
for r in (4, 8, 16, 32):
    shares = [mass(f, r, heads) for heads in ([(block, head)], ALL) for f in CHOOSE.values()]
    print(f"{r:4}" + "".join(f"{share:9.1%}" for share in shares))
print(f"The answer's word is {S - 1 - place} tokens back; a window that ends before misses it.")

# %% 3a. Short codes
# (Chen et al. 2022, as far as is known.) A vector becomes whole numbers of b bits and one scale:
# xc = rint(x / sx), sx = max|x| / (2^(b-1) - 1). Products of these need small multipliers only.
title("3. Five ways to foretell a score")
R = 8  # keys to be kept from here on
q, k = query(block, head)
exact = k @ q  # sqrt(d) changes no order
shown = np.argsort(-exact)[:4]


def row(name, p):
    right = (largest(p, R) & largest(exact, R)).sum()
    print(f"{name:>24} " + "".join(f"{p[j]:14.2f}" for j in shown) + f"{right:14}")


def codes(q, k, b=4):
    sq, sk = (abs(x).max(-1) / (2 ** (b - 1) - 1) for x in (q, k))
    return np.rint(k / sk[:, None]) @ np.rint(q / sq) * sk * sq  # (S,)


print(f"{'The heaviest keys:':25}" + "".join(f"{words[j]:>14}" for j in shown) + f"{f'of {R}':>14}")
row("q . k_j, exact", exact)
for b in (8, 4, 3, 2):
    row(f"codes of {b} bits", codes(q, k, b))

# %% 3b. ELSA: sign bits and an angle
# The rows of A stand at right angles; h(x) = (A x >= 0) are d bits. In these, vectors at an angle
# a differ in a share a / pi on average, so pi / d * ham is a guess at it. One too large loses a
# key: theta_bias is subtracted, so that most are too small. |k| cos(angle) stands for the score.
A, theta_bias = reduce(np.kron, directions(d, d, 0)[0]), angle_bias(d, d)


def elsa(q, k):
    """How many bits differ (S,), and "sim" (S,), which times |q| is a guess at q . k."""
    ham = ((k @ A.T >= 0) != (q @ A.T >= 0)).sum(-1)
    return ham, norm(k, axis=-1) * np.cos(np.maximum(0, np.pi / d * ham - theta_bias))


ham, sim = elsa(q, k)
row(f"- bits of {d} that differ", -ham)
row("|q| |k| cos(angle)", norm(q) * sim)
error = np.pi / d * ham - np.arccos(exact / norm(q) / norm(k, axis=-1))
small = [f"{(error < x).mean():.0%}" for x in (0, theta_bias)]
print(f"{'':6}Angles guessed too small: {small[0]}, less theta_bias {small[1]}.")


# %% 3c. A3: a greedy search from both ends
# A score is a sum of d products. Each column of the keys is kept sorted: its largest product with q
# stands at one end, its smallest at the other. M times, the largest that is left anywhere is added
# to its key's sum; then the smallest, unless the total is negative. Sums > 0 are kept.
def a3(q, k, M):
    order = k.argsort(0, kind="stable")  # (S, d): each column's keys, ascending
    keys = np.where(q > 0, order[::-1], order)  # and by the product, descending
    p = np.take_along_axis(k * q, keys, 0)
    top, bottom, column = np.zeros(d, int), np.full(d, len(k) - 1), np.arange(d)
    greedy, total = np.zeros(len(k)), 0.0
    for turn in range(2 * M):
        end, best, sign = ((top, np.argmax, 1), (bottom, np.argmin, -1))[turn % 2]
        if sign > 0 or total >= 0:
            j = best(p[end, column])
            s = sign * max(sign * p[end[j], j], 0)  # the largest product may be negative
            greedy[keys[end[j], j]] += s
            total += s
            end[j] += sign
    return greedy  # (S,)


for M in (1, 2, 4, 8, 16, 32):
    row(f"sums, M = {M}, {(a3(q, k, M) > 0).sum()} > 0", a3(q, k, M))

# %% 3d. DOTA: a small detector
# It looks at x, of which q and k are made: Y = X P, P random and of few columns, Q~ = Y W~q, K~ =
# Y W~k. W~ are learned with the model ("trained") or by least squares ("post-hoc"). Here in floats.
detecting = apply(lm, {"dota": {"bits": None}}).model.stack.blocks


def dota(i, h):
    detect, x = detecting[i].attn.detect, found[i][0]
    P, W_q, W_k = detect.p, detect.w_q, detect.w_k
    q, k = ((x @ P @ W).reshape(S, -1, P.shape[1]).swapaxes(0, 1) for W in (W_q, W_k))
    where = Tokens(slice(0, S))
    return detect.rope(k, where)[h // G] @ detect.rope(q, where)[h, -1]  # (S,)


row(f"{detecting[block].attn.fit} detector", dota(block, head) * d**0.5)


# %% 3e. Sparse memory: an index of nearest keys
# An index finds what is near, attention wants large products: |q - k|^2 = |q|^2 + |k|^2 - 2 q.k is
# against long keys. One number more, k^ = [k, sqrt(R^2 - |k|^2)], gives all keys the length R (a
# bound from the weights), so that the nearest has the largest product; q^ = [R q / |q|, 0].
def augmented(i, h):
    (q, k), R = query(i, h), longest_key(model.stack.blocks[i].attn)[h // G]
    return np.append(R * q / norm(q), 0), np.c_[k, np.sqrt(R**2 - norm(k, axis=-1) ** 2)]


for name, make in (("- |q - k|, raw", query), ("- |q^ - k^|", augmented)):
    near = {at: -norm(np.subtract(*make(*at)), axis=-1) for at in ALL}  # (S,)
    right = np.mean([CHOOSE["oracle"](*at, R)[largest(near[at], R)] for at in ALL])
    row(name, near[block, head])
    print(f"{'':6}All heads: of the {R} nearest, {right:.0%} are among the {R} best.")
print("A k-d tree finds the nearest by looking at few keys. Does it? Of 500 random ones, 8 wanted:")
for width in (2, 8, d):
    seen = looked_at(width, n=500, queries=8)
    print(f"  d = {width:2}: sure after {seen.exact:4.0%}; of the 8 {seen.recall:4.0%} after 32")


# %% 4. The picture
# All keep R keys; for A3, M is turned until about so many are left. LSH (hashing by place) is an
# index that looks at the keys in the query's buckets; we ask the technique's own part.
def theirs(i, h, lm):  # what a technique's part chooses, asked about the same query and keys
    choose = lm.model.stack.blocks[i].attn.attend.choose
    q, k = found[i][1][:, -1:], found[i][2]
    known = choose.remember(k, Layer.once(S))
    return choose(q, k, known, Visible(1, S)).reshape(-1, S)[h]


lsh = apply(lm, {"sparse_memory": {"K": R, "index": "lsh"}})
CHOOSE = {
    "oracle": CHOOSE["oracle"],
    "codes": lambda i, h, r: largest(codes(*query(i, h)), r),
    "ELSA": lambda i, h, r: largest(elsa(*query(i, h))[1], r),
    "A3": lambda i, h, r: min(
        (a3(*query(i, h), M) > 0 for M in range(r, 3 * r)), key=lambda kept: abs(kept.sum() - r)
    ),
    "DOTA": lambda i, h, r: largest(dota(i, h), r),
    "LSH": lambda i, h, r: theirs(i, h, lsh),
} | CHOOSE
title(f"4. Of {S} keys: # one of the {R} heaviest, kept; o such a one missed; - kept for nothing")
for i, h in ((block, head), np.unravel_index(many.argmax(), many.shape)):
    print(f"Block {i + 1}, head {h + 1}: 90 % on {many[i, h]} (last: weight, keys kept)\n{HEADER}")
    for name, choose in CHOOSE.items():
        kept, best = choose(i, h, R), CHOOSE["oracle"](i, h, R)
        marks = np.where(kept, np.where(best, "#", "-"), np.where(best, "o", " "))
        print(f"{name:8} |{''.join(marks)}| {w[i, h][kept].sum():6.1%}{kept.sum():3}")
print("All heads:", "; ".join(f"{name} {mass(f, R, ALL):.0%}" for name, f in CHOOSE.items()))
# The techniques choose what we chose by hand (ELSA's t is put between two keys):
t = float(np.sort(sim)[-R - 1 : -R + 1].mean() / norm(k, axis=-1).max())
for kept, flags in (
    (largest(sim, R), {"elsa": {"t": t}}),
    (a3(q, k, R) > 0, {"a3": {"M": R / S, "T": 0.0}}),
):
    assert np.array_equal(kept, theirs(block, head, apply(lm, flags)))

# %% 5. The same as flags
# minitx.load("stories", elsa={"p": 2.0}): all tokens and heads keep what ELSA finds. Here only the
# last token of a full context is decoded with the flags. (DOTA reads all: its detector has to.)
n, runs, seconds = c.context - 1, {}, {}
title(f"5. The same as flags: the last of {n + 1} tokens, in all heads of all blocks")
FLAGS = {
    "dense": {},
    "codes": {"predictive_attention": {"tau": 0.0, "rho": 1 / 8}},
    "ELSA": {"elsa": {"p": 2.0, "stories": 2}},  # learned from two stories, to be quick
    "A3": {"a3": {"M": 0.15, "T": 0.0}},
    "DOTA": {"dota": {"kappa": n // 8}},
    "linear": {"sparse_memory": {"K": n // 8}},  # an index of all keys: the oracle
}
before = next(chains(lm.tokenizer, "evaluation", "full", n)).ids  # other stories
texts = [[*before[: n + 2 - len(text)], *text] for text in (*questions[:5], [*ids, answer])]
for name, flags in FLAGS.items():
    one, said = minitx.load("stories", **flags).model, []
    for text in texts:
        state = one.new_state()
        (one if name == "DOTA" else model).hidden(text[:-2], state)
        said.append(one.next_argmax(text[-2:-1], state))
    state.rewind(n)
    with counting(one) as counts:
        one.next_argmax(ids[-1:], state)
    runs[name] = one, state, said, without_projections(lm, counts), counts.events
for name, (one, state, *_) in [*runs.items()] * 12:  # in turns
    state.rewind(n)
    began = time.process_time()
    one.next_argmax(ids[-1:], state)
    seconds[name] = min(seconds.get(name, np.inf), time.process_time() - began)
print(f"{'':8}the question  same of {len(texts)}  keys kept  multiply-adds  bytes  time, token")
full = runs["dense"][3]
for name, (_, _, said, cost, events) in runs.items():
    same = sum(a == b for a, b in zip(said, runs["dense"][2]))
    kept = events["keys kept"] / events["keys seen"] if events else 1
    work, memory = cost.multiply_adds / full.multiply_adds, bytes_read(cost) / bytes_read(full)
    word, slow = lm.tokenizer.decode(said[-1:]), seconds[name] / seconds["dense"]
    print(f"{name:7} {word:14}{same:8}{kept:11.1%}{work:15.2f}{memory:7.2f}{slow:13.2f}")
print("NumPy takes longer to choose than BLAS for all keys. `minitx compare-attention` measures it")
print("properly: the same share for all, long chains, answers by hops, times at up to 4,096 keys.")

# %% Exercises
# 1. Let R be 2, then 16. Who finds the answer's word in the first picture, and who does not?
# 2. Give ELSA twice the bits: a second A behind the first. What becomes of the angles' error?
# 3. What does A3 keep if all scores are negative? Try a3(-q, k, M), with the gate and without.
# 4. One scale for all keys in cell 3a: what becomes of old codes when a longer key comes?
