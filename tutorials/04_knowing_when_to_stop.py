"""Tutorial 4: knowing when to stop. Some tokens are easy; how does a model know that it may stop?

What tutorial 3 did was exact. From here on something is given up: a token that seems to be decided
skips the rest of the work. We look at what there is to skip, at signs that a token is decided, at
what it owes to those that come later, and at the price: not for all tokens the same, so never one
number. Costs are counted, times are measured, and chance plays along for comparison.

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
            began = time.perf_counter()
            task()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def verdict(ratio):
    """A ratio of measured times in words, so that nobody is tempted to flatter it."""
    return "gain" if ratio > 1.05 else "loss" if ratio < 0.95 else "no clear difference"


lm = minitx.load("stories")
model, c = lm.model, lm.model.config
D, V, L = c.width, c.vocab_size, c.layers
held = held_out(lm, 24)  # for judging: nothing below is trained or chosen on these
encoded = encode(lm.tokenizer, held)  # ids, and for each target the kind of answer it is
texts = (story.text for story in stories("calibration", "full", 0))  # for training and choosing
for_probe, for_signs, for_test = ([*islice(texts, n)] for n in (12, 6, 40))
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
depth, right = stands_after(said), said[-1] == ids[1:]
easy, hard = len(ids) - 3, len(ids) - 1 - words[::-1].index("kitchen")  # places of two words
print(f"{'':10}  ...{' '.join(words[easy - 3 : easy])} ...    ...{' '.join(words[hard - 5 : hard])}")
for i in range(L):
    one, two = (lm.tokenizer.decode([said[i, t - 1]]).strip() for t in (easy, hard))
    print(f"  block {i + 1:2}  {one:22}{two}")
print(f"  the story {words[easy]:22}{words[hard]} (a chain of two facts: who has it, where is she?)")

print("\nAfter how many blocks the choice for each word stands (x: it is not the story's word):")
shown = range(18, len(ids))
for i in range(L, 0, -1):
    print(f"{i:7} | " + " ".join("#" if depth[t - 1] >= i else " " for t in shown).rstrip())
print(f"{'':8}| " + " ".join(" " if right[t - 1] else "x" for t in shown).rstrip())
for row in range(max(len(words[t]) for t in shown)):
    print(" " * 10 + " ".join(f"{words[t][row : row + 1]:1}" for t in shown).rstrip())

# One story is an anecdote. The held-out ones, by what the word asks of the reader:
groups = {"end of the closing phrase": []} | {k: [] for k in ("other text", 1, 2, 3, 0)}
for story in encoded:
    for t, d in enumerate(stands_after(chosen(streams(story.ids[:-1])))):
        kind, closing = story.kinds[t], t >= len(story.kinds) - 3
        group = HOPS[KINDS[kind - 1]] if kind else "other text"
        groups["end of the closing phrase" if closing else group].append(d)
print("\nBlocks until the choice stands, on average:")
for name, found in groups.items():
    name = name if isinstance(name, str) else f"answers: {hops_name(name)}"
    mean = np.mean(found or [0])
    print(f"  {name:26} {mean:4.1f} of {L} {'#' * round(4 * mean):{4 * L}} ({len(found):,} words)")
print("\nAnd are they right? Share of answers, and loss of the other text, if all left there:")
profile = exit_profile(lm, lm.tokenizer, held)
hops = list(profile[-1].by_hops)
print(f"  {'after':8}" + "".join(f"{hops_name(h):>8}" for h in hops) + f"{'loss':>9}")
for i, found in enumerate(profile, 1):
    print(f"  block {i:2}" + "".join(f"{found.by_hops[h]:8.0%}" for h in hops), end="")
    print(f"{found.loss:9.3f} {'#' * round(10 * found.loss)}")

# %% 2. Three signs of being sure
# Nobody tells a token whether its choice stands. It has to go by signs:
# - gap: by how much the likeliest word is ahead of the second, in shares. Needs the whole head.
# - saturation: the cosine between h_i and h_(i-1). Where nothing turns, nothing is being decided.
# - probe: D weights and a bias, trained on other stories to tell from h_i whether the choice after
#   block i is that of block L. (measure="probe" of early_exit trains one in this way.)
title("2. Three signs of being sure")


def examples(some):
    """For all tokens of some texts: (h (L, n, D), choices (L, n), words of the text (n,))."""
    found = [(streams(ids[:-1]), ids[1:]) for ids in map(lm.encode, some)]
    h, after = (np.concatenate(parts, axis) for parts, axis in zip(zip(*found), (1, 0)))
    return h, chosen(h), after


h, said, after = examples(for_probe)
w, b = logistic(h[:-1].reshape(-1, D), (said[:-1] == said[-1]).ravel())
probe = Probe(w.astype(h.dtype), b)
SIGNS = {"gap": SoftmaxGap(model.norm, model.head), "saturation": Saturation(), "probe": probe}
h, said, after = examples(for_signs)
asked = range(2, L)  # after these blocks: the cosine needs one before, and after L it is too late
same = np.concatenate([said[i - 1] == said[-1] for i in asked])
print(f"{len(same):,} times asked, after blocks {asked[0]} to {asked[-1]}; for {same.mean():.1%}", end="")
print(" the choice was that of the last block already.")
print("Is it, among those that are surest by each sign? (Chance would give the last column always.)")
SHARES = (0.1, 0.25, 0.5, 0.75, 1)
print(f"{'surest':>14}" + "".join(f"{share:8.0%}" for share in SHARES))
signs = {}
for name, sign in SIGNS.items():
    signs[name] = np.concatenate([sign(h[i - 1], h[i - 2], i, None) for i in asked])
    order = np.argsort(-signs[name], kind="stable")
    kept = [same[order[: round(share * len(order))]].mean() for share in SHARES]
    assert kept[2] > same.mean() - 0.01
    print(f"{name:>14}" + "".join(f"{share:8.1%}" for share in kept))

# Sure is not right. A sign can only foresee what the deeper blocks will say, and may fail at that;
# and what they say may be wrong, too.
gaps = signs["gap"].reshape(len(asked), -1)  # (L - 2, n)
changed = said[1:-1] != said[-1]
i, t = np.unravel_index(np.where(changed, gaps, -1).argmax(), gaps.shape)
then, last = (lm.tokenizer.decode([said[k, t]]) for k in (i + 1, -1))
print(f"\nSurest of all that changed: gap {gaps[i, t]:.2f} for{then!r} after block {asked[i]},", end="")
print(f" but the last block says{last!r}.")
final = SIGNS["gap"](h[-1], h[-2], L, None)
wrong = said[-1] != after
t = np.where(wrong, final, -1).argmax()
says, truth = (lm.tokenizer.decode([k]) for k in (said[-1, t], after[t]))
print(f"Surest of all that were wrong at the end: gap {final[t]:.2f} for{says!r}, the story:{truth!r}.")

# %% 3. Leaving, and what one owes to the others
# A token that leaves after block i has no keys and values in the layers behind, but later tokens
# will look there. fill=copy makes them from h_i: two small products a layer instead of a block.
# fill=deferred runs the token through a layer later, when somebody gets there who needs it.
title("3. Leaving, and the hole in the cache")
FIRST = 2  # nobody leaves before
early = minitx.load("stories", early_exit={"threshold": 0.9, "first": FIRST})
BEGINNING = "Once upon a time there was a girl named Anna. Anna"
with counting(early) as counts:
    told = early.generate(BEGINNING, 40)
same_text = "the same" if told == lm.generate(BEGINNING, 40) else "not the same"
say(f"{BEGINNING} >>>{told} (The dense model's text is {same_text}.)")
left = {i: counts.events[f"tokens that left after {i}"] for i in range(FIRST, L)}
print("Tokens that left: " + ", ".join(f"{n} after {i}" for i, n in left.items() if n))


@part
class Careless(Part):
    """A block that does not care for those who pass it by: zeros in the place of what they owe."""

    block: Part

    def __call__(self, x, layer):
        return self.block(x, layer)

    def fill(self, x, layer):
        zeros = np.zeros((*x.shape[:-2], c.kv_heads, x.shape[-2], c.head_width), x.dtype)
        layer.extend(zeros, zeros)


def price(lm, count=10):
    """What reading stories costs in multiply-adds, and how well it is done."""
    tally = Tally.empty()
    with counting(lm) as counts:
        for story in encoded[:count]:
            tally.add(lm.logits(story.ids[:-1]), np.array(story.ids[1:]), np.array(story.kinds))
    return counts.total().multiply_adds, report(tally), counts.events


# To see the cache alone, let a lot decide who leaves: then the same tokens leave after the same
# blocks each time, and the only difference is what is found in their places.
lot = {"measure": "random", "threshold": 0.5, "first": FIRST}
careless = swap(lm, Block, Careless)
work, dense, _ = price(lm)
print("\nHalf of the tokens drop out after each block, by lot:   loss  of answers      work")
for name, root, options in (
    ("dense", lm, {}),
    ("fill=copy", lm, {"early_exit": lot}),
    ("fill=deferred", lm, {"early_exit": lot | {"fill": "deferred"}}),
    ("zeros instead: broken on purpose", careless, {"early_exit": lot}),
):
    cost, found, _ = price(apply(root, options))
    print(f"  {name:50} {found.loss:9.4f} {found.answer_loss:11.4f} {cost / work:8.0%}")
say(
    "A key of zeros has score 0 with every query: it draws a share of attention and gives nothing",
    "for it. Deferring keeps the cache exact, and what was deferred is done after all as soon as",
    "one later token goes deep; copying is an approximation, and cheap.",
)
