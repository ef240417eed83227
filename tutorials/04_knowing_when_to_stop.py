"""Tutorial 4: knowing when to stop. Some tokens are easy; how does a model know that it may stop?

Tutorial 3 was exact. From here on something is given up: a token that seems to be decided skips the
rest of the work. What is there to skip, what are the signs, what does such a token owe to later
ones, and what is the price? Not the same for all tokens. Chance plays along for comparison.

Letters: T tokens, S all tokens so far, D width, V vocabulary, L layers; h_i is the stream, a row of
D numbers for each token, after i blocks.
"""

# %% A model, stories it has not seen, and helpers
import textwrap
import time
from itertools import islice

import numpy as np

import minitx
from minitx.confidence import Probe, Saturation, SoftmaxGap
from minitx.lab.evaluate import Tally, encode, exit_profile, held_out, hops_name, report
from minitx.lab.learn_then_test import calibrate, hoeffding_bentkus, loss
from minitx.ledger import counting
from minitx.model import Block
from minitx.skip import ffn_skip
from minitx.state import Layer
from minitx.technique import apply, swap
from minitx.training.exit_probe import logistic
from minitx.training.grades import HOPS, KINDS
from minitx.training.stories import stories
from minitx.tree import Part, part


def title(text):
    print(f"\n{text}\n{'-' * len(text)}")


def say(*sentences):
    print(textwrap.fill(" ".join(sentences), 100))


def fastest(*tasks, repeats=5):
    """Seconds of each task, in turns (so that a busy moment hits all), the best of the repeats."""
    best = [float("inf")] * len(tasks)
    for _ in range(repeats):
        for i, task in enumerate(tasks):
            began = time.process_time()  # what the processor did for others does not count
            task()
            best[i] = min(best[i], time.process_time() - began)
    return best


def verdict(ratio):
    """A ratio of measured times in words, so that nobody is tempted to flatter it."""
    return "gain" if ratio > 1.05 else "loss" if ratio < 0.95 else "no clear difference"


def answers(found):
    """Shares of right answers, by hops."""
    return "".join(f"{found.by_hops[h]:8.0%}" for h in hops)


lm = minitx.load("stories")
model, c = lm.model, lm.model.config
D, V, L = c.width, c.vocab_size, c.layers
held = held_out(lm, 24)  # for judging: nothing below is trained or chosen on these
encoded = encode(lm.tokenizer, held)  # ids, and for each target the kind of answer it is
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
        x = block(x, Layer(len(ids), remember=False))
        found.append(x)
    return np.stack(found)


def chosen(h):
    """The token that final norm and head would choose from streams h (..., D)."""
    return model.head(model.norm(h)).argmax(-1)


def stands_after(said):
    """(T,) of choices (L, T): the first block after which the choice never changes again."""
    other = said != said[-1]
    return np.where(other.any(0), L + 1 - other[::-1].argmax(0), 1)


ids = lm.encode(
    "Once upon a time there was a boy named Tom. Tom was in the garden. Anna was in the kitchen. "
    "Anna had a sack. Tom went to the park. Where is the sack? The sack is in the kitchen. "
    "And then it was time for bed."
)
words = [lm.tokenizer.decode([i]).strip() for i in ids]
said = chosen(streams(ids[:-1]))  # (L, T): for each token but the first, what each block says
easy, hard = len(ids) - 2, len(ids) - 1 - words[::-1].index("kitchen")  # places of two words
print(f"{'':12}{'... was time for ...':22}... The sack is in the ...")
for i in range(L):
    one, two = (lm.tokenizer.decode([said[i, t - 1]]).strip() for t in (easy, hard))
    print(f"  block {i + 1:2}  {one:22}{two}")
print(f"  the story {words[easy]:22}{words[hard]} (two facts: who has it, where is she?)")
depth = stands_after(said)
print("\nAfter how many blocks the choice for each word stands (x: it is not the story's word):")
shown = range(17, len(ids))
for i in range(L, 0, -1):
    print(f"{i:7} | " + " ".join("#" if depth[t - 1] >= i else " " for t in shown).rstrip())
print(f"{'':8}| " + " ".join("x "[int(said[-1, t - 1] == ids[t])] for t in shown).rstrip())
for row in range(max(len(words[t]) for t in shown)):
    print(" " * 10 + " ".join(f"{words[t][row : row + 1]:1}" for t in shown).rstrip())

# One story is an anecdote. The held-out ones, by how many facts an answer has to chain ("counts" are
# sums); the last column is all the text that is no answer.
stands, profile = {}, exit_profile(lm, lm.tokenizer, held)
hops = list(profile[-1].by_hops)
for story in encoded:
    for depth, kind in zip(stands_after(chosen(streams(story.ids[:-1]))), story.kinds):
        stands.setdefault(HOPS[KINDS[kind - 1]] if kind else "text", []).append(depth)
print("\nIf all left there: answers that are right, by hops, and the loss of the other text")
print(" " * 10 + "".join(f"{hops_name(h):>8}" for h in hops) + "     loss")
for i, found in enumerate(profile, 1):
    print(f"  block {i:2}{answers(found)}{found.loss:9.3f} {'#' * round(10 * found.loss)}")
means = "".join(f"{np.mean(stands[h]):8.1f}" for h in hops)
print(
    f"  stands  {means}{np.mean(stands['text']):9.1f} blocks, on average, until the choice stands"
)

# %% 2. Three signs of being sure
# Nobody tells a token whether its choice stands. It has to go by signs:
# - gap: by how much the likeliest word is ahead of the second, in shares. Needs the whole head.
# - saturation: the cosine between h_i and h_(i-1). Where nothing turns, nothing is being decided.
# - probe: D weights and a bias, trained on other stories to tell from h_i whether the choice after
#   block i is that of block L. (measure="probe" of early_exit trains one in this way.)
title("2. Three signs of being sure")


def examples(texts):
    """For all tokens of some texts: (h (L, n, D), choices (L, n), words of the text (n,))."""
    h = np.concatenate([streams(ids[:-1]) for ids in texts], 1)
    return h, chosen(h), np.concatenate([ids[1:] for ids in texts])


h, said, _ = examples(for_probe)
w, b = logistic(h[:-1].reshape(-1, D), (said[:-1] == said[-1]).ravel())
probe = Probe(w.astype(h.dtype), b)
SIGNS = {"gap": SoftmaxGap(model.norm, model.head), "saturation": Saturation(), "probe": probe}
h, said, after = examples(for_signs)
asked = range(2, L)  # after these blocks: the cosine needs one before, and after L it is too late
same = np.concatenate([said[i - 1] == said[-1] for i in asked])
print(
    f"Asked {len(same):,} times, after blocks 2 to {L - 1}: is the choice that of the last block?"
)
print(
    "Share, of the surest so many per cent by each sign (by chance it would be the same for all):"
)
SHARES = (0.1, 0.25, 0.5, 0.75, 1)
print(f"{'surest':>14}" + "".join(f"{share:8.0%}" for share in SHARES))
for name, sign in SIGNS.items():
    sure = np.concatenate([sign(h[i - 1], h[i - 2], i, None) for i in asked])
    order = np.argsort(-sure, kind="stable")
    kept = [same[order[: round(share * len(order))]].mean() for share in SHARES]
    print(f"{name:>14}" + "".join(f"{share:8.1%}" for share in kept))

# Sure is not right. A sign can only foresee what the deeper blocks will say, and may fail at that;
# and what they say may be wrong, too.
for i, wanted, text in ((2, said[-1], "the last block says"), (L, after, "the story says")):
    gap = np.where(said[i - 1] != wanted, SIGNS["gap"](h[i - 1], h[i - 2], i, None), 0)
    says, truth = (lm.tokenizer.decode([k[gap.argmax()]]) for k in (said[i - 1], wanted))
    print(
        f"Sure and wrong: after block {i} {says!r} with a gap of {gap.max():.2f}; {text} {truth!r}"
    )

# %% 3. Leaving, and what one owes to the others
# A token that leaves after block i has no keys and values in the layers behind, but later tokens
# will look there. fill=copy makes them from h_i: two small products a layer instead of a block.
# fill=deferred runs the token through a layer later, when somebody gets there who needs it.
title("3. Leaving, and the hole in the cache")
early = minitx.load("stories", early_exit={"threshold": 0.9, "first": 2})
BEGINNING = "Once upon a time there was a girl named Anna. Anna"
with counting(early) as counts:
    say(f"{BEGINNING} >>>{early.generate(BEGINNING, 40)}")
say(f"(The dense model: {lm.generate(BEGINNING, 40)})")
left = {i: counts.events[f"tokens that left after {i}"] for i in range(2, L)}
print("Tokens that left: " + ", ".join(f"{n} after {i}" for i, n in left.items() if n))


def leaving(lm=lm, **options):
    return apply(lm, {"early_exit": {"first": 2} | options})


@part
class Careless(Part):
    """A block that does not care: zeros in the place of what those owe who pass it by."""

    block: Part

    def __call__(self, x, layer):
        return self.block(x, layer)

    def fill(self, x, layer):
        zeros = np.zeros((*x.shape[:-2], c.kv_heads, x.shape[-2], c.head_width), x.dtype)
        layer.extend(zeros, zeros)


def price(name, lm, by_lot=None):
    """Reads stories and prints a row; returns work and loss, compared with those of dense."""
    tally = Tally.empty()
    with counting(lm) as counts:
        for story in encoded[:8]:
            tally.add(lm.logits(story.ids[:-1]), np.array(story.ids[1:]), np.array(story.kinds))
    found, count = report(tally), counts.total().multiply_adds
    dense.setdefault("loss", found.loss), dense.setdefault("count", count)  # the first is dense
    work, harm = count / dense["count"], found.loss - dense["loss"]
    print(f"  {name:29}{answers(found)}{work:9.1%}{harm:+9.4f}", end="")
    print("" if by_lot is None else f"{np.interp(work, *zip(*sorted(by_lot))):+14.4f}")
    return work, harm


# To see the cache alone, let a lot decide who leaves: then the same tokens leave after the same
# blocks each time, and the only difference is what is found in their places.
lot = {"measure": "random", "threshold": 0.5}
HEADER = f"{'':31}" + "".join(f"{hops_name(h):>8}" for h in hops) + "     work     loss"
dense = {}
print("\nAfter each block half of the tokens leave, by lot:\n" + HEADER)
price("dense", lm)
copied = price("fill=copy", leaving(**lot))
price("fill=deferred", leaving(**lot, fill="deferred"))
broken = price("zeros: broken on purpose", leaving(swap(lm, Block, Careless), **lot))
say(
    "A key of zeros has score 0 with every query: it draws a share of attention and gives nothing.",
    f"That makes {broken[1] - copied[1]:+.4f} nats a token on top of copying. Deferring keeps the",
    "cache exact, but does the work after all as soon as one later token goes deep.",
)

# %% 4. The price, by difficulty
# Now by signs. The last column is the loss that lots give at the same work: a sign is worth
# something only if it is below. (A lot costs nothing to draw, a sign does; all of it is counted.)
title("4. The price of leaving early, by difficulty")


def chart(points):
    """{letter: (work, loss)}: work to the right, loss upwards, D the dense model."""
    grid, both = [[" "] * 61 for _ in range(11)], np.array([*points.values()])
    low, size = both.min(0), np.ptp(both, 0) + 1e-12
    for letter, (x, y) in zip(points, np.rint((both - low) / size * (60, 10)).astype(int)):
        grid[10 - y][x] = letter
    print("\n" + "\n".join(f"{'':8}|" + "".join(row).rstrip() for row in grid))
    print(f"{'':8}+{'-' * 61}\n{'':9}{low[0]:<40.0%}{(low + size)[0]:>21.0%} of the work")


def run(tries, lots):
    """A row and a letter for each {name: model}; small letters are lots."""
    by_lot = [(1.0, 0.0)] + [price(name, changed) for name, changed in lots.items()]
    found = [price(name, changed, by_lot) for name, changed in tries.items()]
    better = sum(y < np.interp(x, *zip(*sorted(by_lot))) for x, y in found)
    chart({"D": (1.0, 0.0)} | dict(zip("abc", by_lot[1:])) | dict(zip("ABCEFG", found)))
    print(
        f"a, b, c: lots, A, B, ...: signs, in their rows' order; {better} of {len(found)} beat lots."
    )


print(HEADER + " lots, same work")
lots = {f"lot {s}": leaving(measure="random", threshold=s) for s in (0.9, 0.7, 0.4)}
tries = {f"gap {s}": leaving(threshold=s) for s in (0.95, 0.7)}
tries |= {f"saturation {s}": leaving(measure="saturation", threshold=s) for s in (0.97, 0.92)}
for s in (0.9, 0.7):  # our own part in the place of the measure
    other = leaving(measure="saturation", threshold=s)
    tries[f"probe {s}"] = swap(other, Saturation, lambda _: probe)
run(tries, lots)

# %% 5. Skipping feed-forward networks
# ffn_skip leaves no hole: attention always runs, and only the networks are left out, where the one
# below hardly turned the stream. Its thresholds are calibrated for a share of networks to skip.
title("5. The same with ffn_skip")
print(HEADER + " lots, same work")
RATES = (0.15, 0.3)
lots = {f"lot {r}": apply(lm, {"ffn_skip": dict(choose="random", rate=r)}) for r in RATES}
settings = [ffn_skip.calibrate(lm, [ids[:90] for ids in for_signs[:4]], r) for r in RATES]
skips = {f"cosine {o['threshold']:.3f}": apply(lm, {"ffn_skip": o}) for o in settings}
run(skips, lots)

# %% 6. The clock
# Work that is left out is no time yet: a check is calls, too, and the gap needs all of the head.
title("6. Multiply-adds and the clock")
ids = encoded[0].ids[:64]
x, layer = streams(ids)[1, -1:], Layer(c.context)
model.stack.blocks[2](streams(ids)[1], layer)
layer.position = len(ids) - 1  # a single row behind 63 others
tasks = {"a block": lambda: model.stack.blocks[2](x, layer)}
tasks |= {name: lambda sign=sign: sign(x, x, 2, None) for name, sign in SIGNS.items()}
times = fastest(*(lambda task=task: [task() for _ in range(300)] for task in tasks.values()))
print(", ".join(f"{name} {1e6 * t / 300:.0f} us" for name, t in zip(tasks, times)), end="; ")
block = 2 * D * (c.heads + c.kv_heads) * c.head_width + 3 * D * c.hidden
print(f"in multiply-adds, the gap (V D) is {V * D / block:.2f} blocks.")


def step_by_step(lm):
    state = lm.model.new_state()
    for i in ids:
        lm.model.next_best([i], state)


print(f"{len(ids)} tokens, one by one:  multiply-adds saved    speed (dense = 1)")
timed = {"dense": lm} | {name: one for name, one in (tries | skips).items()}
times = fastest(*(lambda one=one: step_by_step(one) for one in timed.values()))
whole = None
for (name, one), t in zip(timed.items(), times):
    with counting(one) as counts:
        step_by_step(one)
    whole = whole or counts.total().multiply_adds
    saved = 1 - counts.total().multiply_adds / whole
    print(f"  {name:23}{saved:17.1%}{times[0] / t:12.2f} {verdict(times[0] / t)}")

# %% 7. A threshold with a guarantee
# A threshold that looks safe on a few stories may have been lucky. Learn then Test asks how likely
# such luck is: a p-value for "the mean loss is above delta". The loss of a text is here the share
# of its tokens after which the choice is not the dense model's.
title("7. A threshold with a guarantee: Learn then Test")
DELTA, EPSILON, GRID = 0.2, 0.05, (0.98, 0.9, 0.7, 0.4)  # written down before we look
few = [ids[:32] for ids in for_test]
tested = calibrate(lm, few, DELTA, EPSILON, GRID, first=2)
for threshold, risk, p in tested.tested:
    passed = "passes" if p <= EPSILON else "fails, and ends it"
    print(f"  gap {threshold:4}: {risk:6.1%} changed in {len(few)} texts, p = {p:.4f} {passed}")
safe = apply(lm, {"early_exit": tested.options})
risk = np.mean([loss(safe, s.ids[:32], lm.logits(s.ids[:32]).argmax(-1)) for s in encoded])
say(
    f"Chosen: {tested.options['threshold']} (1.1: nobody leaves). On held-out stories {risk:.1%} is",
    f"changed. The promise: at most {DELTA:.0%} on average over such texts, unless our {len(few)} were",
    f"drawn unluckily, chance {EPSILON:.0%}. None for a single text, for other texts, or for truth.",
)
# Why a fixed list, and why stop at the first failure? Let 30 settings all be a hair too risky, and
# draw calibration texts for them again and again.
n, draws = len(few), 2000
losses = np.random.default_rng(0).binomial(n, DELTA + 0.001, (draws, 30))  # texts with loss 1
small = np.array([hoeffding_bentkus(k / n, n, DELTA) <= EPSILON for k in range(n + 1)])[losses]
print("30 settings that are all too risky; how often is one of them declared safe?")
for rule, fooled in (
    ("one has a mean loss of at most delta", (losses <= DELTA * n).any(1)),
    ("one has a small p-value", small.any(1)),
    ("the first has a small p-value, else stop", small[:, 0]),
):
    print(f"  {rule:42}{fooled.mean():6.1%} {'#' * round(40 * fooled.mean())}")

# %% Exercises
# 1. Let every=2 ask after every other block only. What happens to the work of the gap, and why?
# 2. The gap of two words says little of the others. Try a sign of your own: the entropy, say.
# 3. Fill the hole with right keys but values of zeros, then the other way round. What is worse?
# 4. Put 10 texts in cell 7. Why can no threshold pass, however good? How many does delta = 1 % take?
# 5. A vocabulary of 32,000 and D = 4096: what does the gap cost in blocks there? (A block: 12 D D.)
