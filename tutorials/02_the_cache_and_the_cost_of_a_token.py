"""Tutorial 2: the cache, and the cost of a token. Why text is generated with a cache, what one
token then still costs, and where that cost sits.

Tutorial 1 computed the whole text anew for every word. Here we stop doing that, and count. Counts
are exact and the same on every machine; times are measured on yours, side by side, as ratios.

Letters: T new tokens, S all tokens so far, D width, H query heads, K key/value heads, d head width,
F hidden neurons, V vocabulary, L layers. A "multiply-add" is one product added to a sum.
"""

# %% A model, and some text to run it on
import textwrap
import time

import numpy as np

import minitx
from minitx.model import Attend
from minitx.tree import Part, part, rebuild, weights


def title(text):
    print(f"\n{text}\n{'-' * len(text)}")


def say(*sentences):
    print(textwrap.fill(" ".join(sentences), 100))


def bar(value, largest, width=40):
    return "#" * max(1, round(width * value / largest))


def fastest(*tasks, repeats=5):
    """Seconds of each task, in turns (so that a busy moment hits all), the best of the repeats."""
    best = [float("inf")] * len(tasks)
    for _ in range(repeats):
        for i, task in enumerate(tasks):
            began = time.perf_counter()
            task()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


lm = minitx.load("stories")
model, c = lm.model, lm.model.config
D, H, K, d, F, V, L = c.width, c.heads, c.kv_heads, c.head_width, c.hidden, c.vocab_size, c.layers
STORY = (
    "Once upon a time there was a boy named Tom. Tom was in the garden. Anna was in the kitchen. "
    "Tom went to the park."
)
story = lm.encode(STORY)
text = (story * c.context)[: c.context]  # the story again and again, as long as the model can read
print(f"{lm.name}: D={D} H={H} K={K} d={d} F={F} V={V} L={L}, context {c.context}")

# %% 1. The same words, read again and again
# To choose the next word, a model has to look at all the words before. But attention asks the older
# tokens for two things only, their keys and values, and as no token may look ahead, these never
# change again. So they are kept: that is the cache (`state` here), and only new tokens are run.
title("1. With and without a cache: the same text")


def without_cache(ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model.next_logits(ids).argmax()))  # every token, all over again
    return ids[-count:]


def with_cache(ids, count):
    state, new = model.new_state(), []
    for _ in range(count):
        ids = [int(model.next_logits(ids, state).argmax())]  # first the prompt, then one token each
        new += ids
    return new


N = 48
new = with_cache(story, N)
assert new == without_cache(story, N)
told = new[: new.index(c.eos[0])] if c.eos[0] in new else new  # up to the end of the story
say(f"...{STORY[-22:]} >>>{lm.tokenizer.decode(told)}")
long, short = fastest(lambda: without_cache(story, N), lambda: with_cache(story, N), repeats=2)
rows_long, rows_short = sum(range(len(story), len(story) + N)), len(story) + N - 1
say(
    f"{N} new tokens after {len(story)}, the same both ways. Rows run through the blocks:",
    f"{rows_long:,} without, {rows_short:,} with a cache, {rows_long / rows_short:.1f} times less.",
    f"Measured time: {long / short:.1f} times less; why not as much, 4. will show.",
)

# %% 2. Counting multiply-adds
# By hand: a product of a row (in) with a matrix (in, out) takes in * out multiply-adds. A query
# meets each key it may see in d of them, and takes d more to collect the value.
title("2. Multiply-adds, by hand and counted")


def by_hand(T, S):
    """To run the newest T of S tokens through the blocks, and the last one through the head."""
    pairs = sum(range(S - T + 1, S + 1))  # token number s sees s keys
    return {
        "projections": L * T * (D * H * d + 2 * D * K * d + H * d * D),  # q, k and v, out
        "scores": L * pairs * H * 2 * d,
        "feed-forward": L * T * 3 * D * F,  # gate, up, down
        "head": D * V,
    }


# Counted: into a copy of the model we put parts that look at what passes through them. A model is a
# tree, and `rebuild` swaps parts of it. The count knows only the arrays that really arrive.
count = dict.fromkeys(by_hand(1, 1), 0)


@part
class Counted(Part):
    """A part, and a note of the multiply-adds that each call of it needs."""

    inner: Part
    kind: str

    def __call__(self, x, *rest):
        if isinstance(self.inner, Attend):  # x (H, T, d) are the queries, then come keys (K, S, d)
            (heads, T, width), S = x.shape, rest[0].shape[-2]
            count[self.kind] += heads * 2 * width * sum(S - t for t in range(T))
        else:  # a product with a matrix: each row of x meets each of its numbers once
            count[self.kind] += x.size // x.shape[-1] * self.inner.w.size
        return self.inner(x, *rest)


kinds = {model.head: "head"}
for block in model.stack.blocks:
    attn, ffn = block.attn, block.ffn
    kinds |= dict.fromkeys((attn.qkv.q, attn.qkv.k, attn.qkv.v, attn.out), "projections")
    kinds |= {attn.attend: "scores"}
    kinds |= dict.fromkeys((ffn.expand.gate, ffn.expand.up, ffn.down), "feed-forward")
counting = rebuild(model, lambda node: Counted(node, kinds[node]) if node in kinds else None)

print(f"{'new of all tokens':>17}" + "".join(f"{kind:>14}" for kind in [*count, "sum"]))
for T, S in ((1, 1), (1, 128), (128, 128), (100, 300), (1, c.context)):
    state = counting.new_state()
    if T < S:
        counting.next_logits(text[: S - T], state)
    count.update(dict.fromkeys(count, 0))
    counting.next_logits(text[S - T : S], state)
    assert count == by_hand(T, S)
    numbers = [*count.values(), sum(count.values())]
    print(f"{T:>8} of {S:>5}" + "".join(f"{n:>14,}" for n in numbers))
print("Counted from the arrays that arrived: the formulas give exactly the same.")

# %% 3. Bytes
# A product reads each number of its matrix once, however many rows it is for. One new token needs
# all the matrices, and besides them the keys and values of all the tokens so far.
title("3. Bytes read for one token")
matrices = {path: w for path, w in weights(model).items() if w.ndim == 2}
weight_bytes = sum(w.nbytes for w in matrices.values())  # the table of tokens is read as the head
state = model.new_state()
model.next_logits(text, state)
kept = [a for layer in state.layers for a in (layer.keys, layer.values)]  # each (K, context, d)
for S in (32, 128, c.context):
    cache_bytes = sum(a[:, :S].nbytes for a in kept)
    assert cache_bytes == L * 2 * K * S * d * 4  # in each layer keys and values, 4 bytes a number
    print(f"cache of {S:4} tokens {cache_bytes / 1e6:6.2f} MB {bar(cache_bytes, weight_bytes)}")
print(f"weights              {weight_bytes / 1e6:6.2f} MB {bar(weight_bytes, weight_bytes)}")
per_token = cache_bytes // c.context
say(
    f"A token adds {per_token:,} bytes; {weight_bytes // per_token:,} tokens weigh as much as the",
    f"weights. {H} query heads share {K} key/value heads; with {H} of those, the full cache would",
    f"be {H / K:.0f} times as large: {cache_bytes * H / K / 1e6:.2f} MB.",
)

# %% 4. One row or many: what binds
# Decoding pushes one row through each matrix: for each number that comes from memory there is one
# multiply-add to do. Reading a prompt pushes many rows at once, and does more with each number.
title("4. One row or many: reading and computing")
big = np.ones((2048, 12288), np.float32)  # 100 MB, too large for most processors' own caches
inputs = [np.ones((rows, len(big)), np.float32) for rows in (1, 4, 16, 64)]
plain, *taken = fastest(
    lambda: big.ravel() @ big.ravel(),  # one long sum: each number read once, nothing else to do
    *(lambda x=x: x @ big for x in inputs),
)
say(
    f"This machine reads {big.nbytes / plain / 1e9:.1f} GB/s when it only sums up squares.",
    f"Now some rows times a matrix of {big.nbytes / 1e6:.0f} MB:",
)
print("  rows  multiply-adds a byte  time (1 row = 1)  GB/s of matrix  1e9 multiply-adds/s")
for x, t in zip(inputs, taken):
    work = len(x) * big.size
    print(f"  {len(x):4} {work / big.nbytes:21.2f} {t / taken[0]:17.1f}", end=" ")
    print(f"{big.nbytes / t / 1e9:15.1f} {work / t / 1e9:20.1f}")
say(
    f"One row moves at {plain / taken[0]:.0%} of the speed of plain reading. 64 rows do 64 times",
    f"the work in {taken[-1] / taken[0]:.1f} times the time.",
)
used = [w.T if path == "embed.w" else w for path, w in matrices.items()]  # the head: transposed
pairs = [(np.ones((1, len(w)), np.float32), w) for w in used]
middle = c.context // 2
state.rewind(middle)


def one_token():
    model.next_logits(text[middle : middle + 1], state)
    state.rewind(middle)


products, step = fastest(lambda: [row @ w for row, w in pairs], one_token, repeats=30)
limit = weight_bytes / (big.nbytes / taken[0])
say(
    f"Our model: at one row's speed its {weight_bytes / 1e6:.1f} MB of weights take",
    f"{1e3 * limit:.2f} ms. All its products with one row take {1e3 * products:.2f} ms, a whole",
    f"token (S={middle}) {1e3 * step:.2f} ms: the rest is attention, norms, and Python in between.",
)
if products < limit:
    say("The products beat memory: so few weights stay in the processor's own cache.")

# %% 5. In one go, in chunks, one by one
# What a token gives must not depend on who came along with it. Sums may be rounded in another
# order, so "the same" means within rounding.
title("5. The prompt in one go, in chunks, or token by token")
prompt = text[:100]
whole = model(prompt)  # (T, V)
for size in (1, 7, 64):
    state = model.new_state()
    rows = [model(prompt[a : a + size], state) for a in range(0, len(prompt), size)]
    error = abs(np.concatenate(rows) - whole).max() / abs(whole).max()
    assert error < 1e-5
    print(f"chunks of {size:2}: error {error:.1e} of the largest logit (tolerance 1e-05) - equal")

# %% 6. Rewind
# To forget the newest tokens, the cache just steps back: the older keys and values are still right.
# One story, read once, can be asked several questions; and who guesses words can take them back.
title("6. Rewind: one story, two questions")
state = model.new_state()
model.next_logits(story, state)
for who in ("Tom", "Anna"):
    question = lm.tokenizer.encode(f" Where is {who}? {who} is in the", special=False)
    logits = model.next_logits(question, state)
    state.rewind(len(story))
    replayed = model.next_logits(question, state)
    state.rewind(len(story))
    anew = model.next_logits([*story, *question])
    error = max(abs(other - logits).max() for other in (replayed, anew)) / abs(anew).max()
    assert error < 1e-5
    print(f"...{lm.tokenizer.decode(question)} >>>{lm.tokenizer.decode([int(logits.argmax())])}")
    print(f"   {len(question)} tokens run instead of {len(story) + len(question)};", end=" ")
    print(f"replayed and read anew: error {error:.1e} (tolerance 1e-05) - equal")

# %% 7. How the cost grows
# With a cache only the scores grow with the text, without one everything does.
title("7. The next token, as the text gets longer")
print("    tokens  multiply-adds with a cache                without: times the work, the time")
largest = sum(by_hand(1, c.context).values())
for S in (16, 64, 128, 256, c.context):
    state = model.new_state()
    model.next_logits(text[: S - 1], state)

    def cached_step(S=S, state=state):
        model.next_logits(text[S - 1 : S], state)
        state.rewind(S - 1)

    slow, fast = fastest(lambda S=S: model.next_logits(text[:S]), cached_step)
    work, all_work = sum(by_hand(1, S).values()), sum(by_hand(S, S).values())
    print(f"{S:10} {work:10,} {bar(work, largest, 30):30}", end=" ")
    print(f"{all_work / work:18.0f} {slow / fast:9.1f}")
anew = sum(sum(by_hand(S, S).values()) for S in range(1, c.context + 1))
kept = sum(sum(by_hand(1, S).values()) for S in range(1, c.context + 1))
print(f"All {c.context} in turn: {anew / 1e9:.1f}e9 without, {kept / 1e9:.1f}e9 with a cache.")

# %% 8. What is left to save
# The cache is the first technique of this kind: nothing is approximated, work that was done once is
# not done again. From here on it is about the rest. Where is it?
title("8. Where the cost of a token sits, and what could be done about it")
IDEAS = {
    "projections": "fold or precompute matrices; first block: a table of all tokens",
    "scores": "look at fewer keys, or share what is similar",
    "feed-forward": "leave out neurons that are 0, or whole calls that change little",
    "head": "score only words that have a chance",
    "one block": "leave early, or step over a block",
    "all of it": "guess with a small model, and check several tokens at once",
}
near, far = by_hand(1, 16), by_hand(1, c.context)
for cost in (near, far):
    total = sum(cost.values())
    cost |= {"one block": (total - cost["head"]) / L, "all of it": total}
print(f"{'part':14} {'S=16':>6} {f'S={c.context}':>6}   what could be skipped or precomputed")
for kind, idea in IDEAS.items():
    shares = [cost[kind] / cost["all of it"] for cost in (near, far)]
    print(f"{kind:14} {shares[0]:6.0%} {shares[1]:6.0%}   {idea}")
say(
    "No part is everything: without half of the feed-forward, a token at S=16 can become",
    f"{1 / (1 - near['feed-forward'] / near['all of it'] / 2):.2f} times as fast at most.",
)

# %% Exercises
# 1. by_hand counts what is needed. Our attention (ops.py) computes up to 64 rows in one product and
#    masks the future afterwards. How many scores is that for a prompt of 64? How many are needed?
# 2. Give by_hand as many key/value heads as query heads (K = H). Which counts change, which bytes?
# 3. From which S on do the scores cost more than the feed-forward? Can this model read so much?
# 4. A small model guesses 3 words, and this one checks them in one go with the word before. When is
#    that faster than 4 steps? The table in cell 4 knows about 4 rows.
