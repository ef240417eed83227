"""Tutorial 4: knowing when to stop. Some tokens are easy; how does a model know that it may stop?

Tutorial 3 was exact. Now something is given up: a token that seems decided skips the rest of the
work. What are the signs, what does such a token owe to later ones, and what is the price? It is not
the same for all tokens. Chance plays along for comparison.

Letters: T tokens, D width, V vocabulary, L layers; h_i is the stream, D numbers, after i blocks.
"""

# %% A model, stories it has not seen, and helpers
import textwrap
import time
from itertools import islice

import numpy as np
from minitx.shared.confidence import Probe, Saturation, SoftmaxGap
from minitx.training.exit_probe import logistic

import minitx
from minitx.lab.evaluate import Tally, encode, exit_profile, held_out, hops_name, report
from minitx.lab.learn_then_test import calibrate, hoeffding_bentkus, loss
from minitx.ledger import counting
from minitx.model import Block
from minitx.skip import ffn_skip
from minitx.state import Layer
from minitx.technique import apply, swap
from minitx.training.stories import stories
from minitx.tree import Part, part


def title(text):
    print(f"\n{text}\n{'-' * len(text)}")


def fastest(*tasks, repeats=5):
    """Seconds of each task, in turns (so that a busy moment hits all), the best of the repeats."""
    best = [float("inf")] * len(tasks)
    for _ in range(repeats):
        for i, task in enumerate(tasks):
            began = time.process_time()  # what the processor did for others does not count
            task()
            best[i] = min(best[i], time.process_time() - began)
    return best


lm = minitx.load("stories")
model, c = lm.model, lm.model.config
D, V, L = c.width, c.vocab_size, c.layers
held = held_out(lm, 24)  # for judging: nothing below is trained or chosen on these
encoded = encode(lm.tokenizer, held)  # ids, and for each target the kind of answer it is, or 0
many_kinds = sorted(encoded, key=lambda story: len(set(story.kinds)))[-7:]  # for the prices
texts = (lm.encode(story.text) for story in stories("calibration", "full", 0))
for_probe, for_signs, for_test = ([*islice(texts, n)] for n in (10, 6, 50))
print(f"{lm.name}: D={D} V={V} L={L}; {len(held)} held-out stories to judge by")

# %% 1. What each block would say
# Tutorial 1 asked the head after every block. Here we do that for every token of a story, and ask
# when the choice stands: from which block on it is the one that the last block will make.
title("1. What each block would say, if it were the last")


def streams(ids):
    """h_1 ... h_L of a text, (L, T, D)."""
    x, found = model.embed(np.array(ids), None), []
    for block in model.stack.blocks:
        x = block(x, Layer.once(len(ids)))
        found.append(x)
    return np.stack(found)


def chosen(h):
    return model.head(model.norm(h)).argmax(-1)


ids = lm.encode(
    "Once upon a time there was a boy named Tom. Tom was in the garden. Anna was in the kitchen. "
    "There was a sack with Anna. Tom went to the park. Where is the sack? The sack is still there "
    "in the kitchen. And then it was time for bed."
)
words = [lm.tokenizer.decode([i]).strip() for i in ids]
said = chosen(streams(ids[:-1]))  # (L, T): for each token but the first, what each block says
easy, hard = len(ids) - 2, len(ids) - 1 - words[::-1].index("kitchen")  # places of two words
print(f"{'':12}{'... was time for ...':22}... The sack is still there in the ...")
for i in range(L):
    one, two = (lm.tokenizer.decode([said[i, t - 1]]).strip() for t in (easy, hard))
    print(f"  block {i + 1:2}  {one:22}{two}")
print(f"  the story {words[easy]:22}{words[hard]} (two facts: who has it, where is she?)")
other = said != said[-1]
depth = np.where(other.any(0), L + 1 - other[::-1].argmax(0), 1)  # (T,)
print("\nAfter how many blocks the choice for each word stands (x: it is not the story's word):")
shown = range(17, len(ids))
for i in range(L, 0, -1):
    print(f"{i:7} | " + " ".join("#" if depth[t - 1] >= i else " " for t in shown).rstrip())
print(f"{'':8}| " + " ".join("x "[int(said[-1, t - 1] == ids[t])] for t in shown).rstrip())
for row in range(max(len(words[t]) for t in shown)):
    print(" " * 10 + " ".join(f"{words[t][row : row + 1]:1}" for t in shown).rstrip())
# One story is an anecdote. The held-out ones, by how many facts an answer chains (counts add up):
profile = exit_profile(lm, lm.tokenizer, held)
HOPS = list(profile[-1].by_hops)
NAMES = "".join(f"{hops_name(h):>8}" for h in HOPS)
print(f"\nIf all left there: right answers, and the loss of other text\n{'':10}{NAMES}     loss")
for i, found in enumerate(profile, 1):
    shares = "".join(f"{found.by_hops[h]:8.0%}" for h in HOPS)
    print(f"  block {i:2}{shares}{found.loss:9.3f} {'#' * round(10 * found.loss)}")

# %% 2. Three signs of being sure
# Nobody tells a token whether its choice stands. It has to go by signs:
# - gap: by how much the likeliest word is ahead of the second, in shares. Needs the whole head.
# - saturation: the cosine between h_i and h_(i-1). Where nothing turns, nothing is being decided.
# - probe: D weights and a bias, trained on other stories to tell from h_i whether the choice after
#   block i is that of block L. (measure="probe" of early_exit trains one in this way.)
title("2. Three signs of being sure")
h = np.concatenate([streams(ids[:-1]) for ids in for_probe + for_signs], 1)  # (L, tokens, D)
said, after = chosen(h), np.concatenate([ids[1:] for ids in for_probe + for_signs])
n = sum(len(ids) - 1 for ids in for_probe)  # of them for the probe, the others to judge it by
w, b = logistic(h[:-1, :n].reshape(-1, D), (said[:-1, :n] == said[-1, :n]).ravel())
SIGNS = {"gap": SoftmaxGap(model.norm, model.head), "saturation": Saturation()}
SIGNS["probe"] = Probe(w.astype(h.dtype), b)
h, said, after = h[:, n:], said[:, n:], after[n:]
asked = range(2, L)  # after these blocks: the cosine needs one before, and after L it is too late
same = np.concatenate([said[i - 1] == said[-1] for i in asked])
print(f"Asked {len(same):,} times, after blocks 2 to {L - 1}: is it block {L}'s choice already?")
print("Share of yes, among the surest by each sign (by chance, all would be as the column 100%):")
SHARES = (0.1, 0.25, 0.5, 0.75, 1)
print(f"{'surest':>14}" + "".join(f"{share:8.0%}" for share in SHARES))
for name, sign in SIGNS.items():
    sure = np.concatenate([sign(h[i - 1], h[i - 2], i, None) for i in asked])
    order = np.argsort(-sure, kind="stable")
    kept = [same[order[: round(share * len(order))]].mean() for share in SHARES]
    print(f"{name:>14}" + "".join(f"{share:8.1%}" for share in kept))
# Sure is not right: a sign can only foresee what the last block will say. That fails at times, and
# what the last block says may be wrong, too.
for i, wanted, who in ((2, said[-1], f"block {L}"), (L, after, "the story")):
    gap = np.where(said[i - 1] != wanted, SIGNS["gap"](h[i - 1], h[i - 2], i, None), 0)
    says, truth = (lm.tokenizer.decode([k[gap.argmax()]]) for k in (said[i - 1], wanted))
    print(f"Sure and wrong: block {i} says {says!r}, gap {gap.max():.2f}, but {who} {truth!r}")

# %% 3. Leaving, and what one owes to the others
# A token that leaves after block i has no keys and values in the layers behind, but later tokens
# will look there. fill=copy makes them from h_i: two small products a layer instead of a block.
# fill=deferred runs the token through a layer later, when somebody gets there who needs it.
title("3. Leaving, and the hole in the cache")
early = minitx.load("stories", early_exit={"threshold": 0.9, "first": 2})
with counting(early) as counts:
    told = early.generate("Once upon a time there was a girl named Anna. Anna", 40)
print(textwrap.fill(f"... a girl named Anna. Anna >>>{told}", 100))
print("Left after:", {i: counts.events[f"tokens that left after {i}"] for i in range(2, L)})


def leaving(lm=lm, **options):
    return apply(lm, {"early_exit": {"first": 2} | options})


@part
class Careless(Part):
    """A block that does not care: zeros in the place of what those owe who pass it by."""

    block: Part

    def __call__(self, x, layer):
        return self.block(x, layer)

    def backfill(self, x, layer):
        zeros = np.zeros((*x.shape[:-2], c.kv_heads, x.shape[-2], c.head_width), x.dtype)
        layer.store(zeros, zeros)

    def attend_from(self, x, layer):
        return self.block.attend_from(x, layer)


def price(name, lm, by_lot=None):
    """Reads stories and prints a row; returns work and loss, compared with those of dense."""
    tally = Tally.empty()
    with counting(lm) as counts:
        for story in many_kinds:
            tally.add(lm.logits(story.ids[:-1]), np.array(story.ids[1:]), np.array(story.kinds))
    found, count = report(tally), counts.total().multiply_adds
    dense_count, dense_loss = dense.setdefault("first row", (count, found.loss))
    work, harm = count / dense_count, found.loss - dense_loss
    shares = "".join(f"{found.by_hops.get(h, np.nan):8.0%}" for h in HOPS)
    lots = f"{np.interp(work, *zip(*sorted(by_lot))):+14.4f}" if by_lot else ""
    print(f"  {name:29}{shares}{work:9.1%}{harm:+9.4f}{lots}")
    return work, harm


# To see the cache alone, draw lots: then the same tokens leave after the same blocks each time.
LOT, dense = {"measure": "random", "threshold": 0.5}, {}
HEADER = f"{'':31}{NAMES}     work     loss"
print("\nHalf of the tokens leave after each block, by lot:\n" + HEADER)
price("dense", lm)
copied = price("fill=copy", leaving(**LOT))
deferred = price("fill=deferred", leaving(**LOT, fill="deferred"))
broken = price("zeros: broken on purpose", leaving(swap(lm, Block, Careless), **LOT))
print("A key of zeros has score 0: it takes a share of attention and gives nothing; that")
print(f"costs {broken[1] - copied[1]:+.4f}. fill=deferred still does {deferred[0]:.0%} of all work")

# %% 4. The price, by difficulty
# Now by signs. The last column is the loss that lots give at the same work: only below it is a sign
# worth something (its own work is counted). Read the hops one by one: answers that chain facts are
# few, so the loss hardly notices them.
title("4. The price of leaving early, by difficulty")


def run(tries, lots):
    """Rows, and a chart: work to the right, loss upwards, D the dense model."""
    print(HEADER + " lots, same work")
    by_lot = [(1.0, 0.0)] + [price(name, changed) for name, changed in lots.items()]
    points = np.array(by_lot + [price(name, changed, by_lot) for name, changed in tries.items()])
    low, size = points.min(0), np.ptp(points, 0) + 1e-12
    grid = [[" "] * 61 for _ in range(9)]
    for letter, (x, y) in zip("Dabc"[: len(by_lot)] + "ABCEFG", (points - low) / size):
        grid[8 - round(8 * y)][round(60 * x)] = letter
    print("\n" + "\n".join(f"{'':8}|" + "".join(row).rstrip() for row in grid))
    print(f"{'':8}+{'-' * 61}\n{'':9}{low[0]:<40.0%}{(low + size)[0]:>21.0%} of the work")
    beat = sum(y < np.interp(x, *zip(*sorted(by_lot))) for x, y in points[len(by_lot) :])
    print(f"a, b, ...: lots; A, B, ...: signs, in their order; {beat} of {len(tries)} beat lots.")


lots = {f"lot {s}": leaving(measure="random", threshold=s) for s in (0.9, 0.7, 0.4)}
tries = {f"gap {s}": leaving(threshold=s) for s in (0.95, 0.7)}
tries |= {f"saturation {s}": leaving(measure="saturation", threshold=s) for s in (0.97, 0.92)}
for s in (0.9, 0.7):  # our own part in the place of the measure
    other = leaving(measure="saturation", threshold=s)
    tries[f"probe {s}"] = swap(other, Saturation, lambda _: SIGNS["probe"])
run(tries, lots)

# %% 5. Skipping feed-forward networks
# ffn_skip leaves no hole: attention always runs, and only the networks are left out, where the one
# below hardly turned the stream. Its thresholds are quantiles of the cosines on other stories.
title("5. The same with ffn_skip")
lots = {
    f"lot, rate {r}": apply(lm, {"ffn_skip": dict(choose="random", rate=r)}) for r in (0.2, 0.4)
}
cosines, skips = ffn_skip.similarities(lm, for_signs, 25)[2:-1], {}  # layers that may be skipped
for q, threshold in zip((0.8, 0.4), np.quantile(cosines, (0.8, 0.4)).tolist()):
    skips[f"cosine, quantile {q}"] = apply(lm, {"ffn_skip": {"threshold": threshold}})
run(skips, lots)

# %% 6. The clock
# Work that is left out is no time yet: a check is calls, too, and the gap needs all of the head.
title("6. Multiply-adds and the clock")
ids = encoded[0].ids[:64]
x = streams(ids)[1, -1:]  # one row
tasks = {"a block": lambda: model.stack.blocks[2](x, Layer.once(1))}
tasks |= {name: lambda sign=sign: sign(x, x, 2, None) for name, sign in SIGNS.items()}
times = fastest(*(lambda task=task: [task() for _ in range(300)] for task in tasks.values()))
print("One row: " + ", ".join(f"{name} {1e6 * t / 300:.0f} us" for name, t in zip(tasks, times)))
share = V / (2 * (c.heads + c.kv_heads) * c.head_width + 3 * c.hidden)  # both times D
print(f"Counted, the gap (V D) costs {share:.2f} blocks, on the clock {times[1] / times[0]:.2f}.")


def step_by_step(lm):
    state = lm.model.new_state()
    for i in ids:
        lm.model.next_argmax([i], state)


print(f"{len(ids)} tokens, one by one:  multiply-adds saved    speed (dense = 1)")
timed = {"dense": lm} | tries | skips
times = fastest(*(lambda one=one: step_by_step(one) for one in timed.values()), repeats=3)
whole = None  # the dense model's count, which comes first
for (name, one), t in zip(timed.items(), times):
    with counting(one) as counts:
        step_by_step(one)
    whole = whole or counts.total().multiply_adds
    speed, saved = times[0] / t, 1 - counts.total().multiply_adds / whole
    word = "gain" if speed > 1.05 else "loss" if speed < 0.95 else "no clear difference"
    print(f"  {name:23}{saved:17.1%}{speed:12.2f} {word if saved else '-'}")

# %% 7. A threshold with a guarantee
# A threshold that looks safe on a few stories may have been lucky. Learn then Test asks how likely
# such luck is: a p-value for "the mean loss is above delta", a text's loss being here the share of
# its tokens after which the choice is not the dense model's.
title("7. A threshold with a guarantee: Learn then Test")
DELTA, EPSILON, GRID = 0.2, 0.05, (0.98, 0.9, 0.7, 0.4)  # written down before we look
few, fresh = [ids[:32] for ids in for_test], [story.ids[:32] for story in encoded]
tested = calibrate(lm, few, DELTA, EPSILON, GRID, first=2)
for threshold, risk, p in tested.tested:
    passed = "passes" if p <= EPSILON else "fails, and ends it"
    print(f"  gap {threshold:4}: {risk:6.1%} changed in {len(few)} texts, p = {p:.4f} {passed}")
safe = apply(lm, {"early_exit": tested.options})
risk = np.mean([loss(safe, ids, lm.logits(ids).argmax(-1)) for ids in fresh])
print(f"Chosen: {tested.options['threshold']} (1.1: nobody leaves). Held out, {risk:.1%} changed.")
print(
    f"Promised: at most {DELTA:.0%} on average over such texts, unless luck is bad ({EPSILON:.0%})."
)
print("Nothing is promised about a single text, other texts, or that what is said is right.")
# Why a list fixed beforehand, and why stop at the first failure? Let 30 settings all be a hair too
# risky, and draw texts for them again and again: who looks for long finds luck.
n = len(few)
losses = np.random.default_rng(0).binomial(n, DELTA + 0.001, (2000, 30))  # texts with loss 1
small = np.array([hoeffding_bentkus(k / n, n, DELTA) <= EPSILON for k in range(n + 1)])[losses]
print("30 settings that are all too risky: how often is one declared safe, by which rule?")
rules = "any mean loss of at most delta", "any small p-value", "first p-value small, else stop"
for rule, fooled in zip(rules, ((losses <= DELTA * n).any(1), small.any(1), small[:, 0])):
    print(f"  {rule:35}{fooled.mean():6.1%} {'#' * round(40 * fooled.mean())}")

# %% Exercises
# 1. Let every=2 ask after every other block only. What happens to the work of the gap, and why?
# 2. Fill the hole with right keys and values of zeros, then the other way round. What is worse?
# 3. Put 10 texts in cell 7. Why can no threshold pass, however good? How many for delta = 1 %?
# 4. A vocabulary of 32,000 and D = 4096: what does the gap cost in blocks there? (A block: 12 D D.)
