"""``minitx compare``: what a set of techniques costs and saves, beside the dense model.

Two readings of held-out stories, always the same ones:

- read: each story once, token by token as the text has it. Loss above the least possible, accuracy
  by hops, and how far the changed model's next-token distributions are from the dense ones: the
  mean Kullback-Leibler divergence KL(dense || changed), and how often both choose the same token;
- told: the beginning of each story is continued greedily. Multiply-adds and bytes read are counted
  for each new token, part by part; then both models are timed in turns, and the ratio is the median
  over the rounds, with the lowest and the highest beside it. What is kept between sequences is
  forgotten before each round (``minitx first-token`` is for that).

Both are also weighed: bytes of all arrays in memory, and of what one token leaves in the cache.

What is found to be the same is called identical: every greedy choice while reading, and every
continuation. Anything else is approximate, whatever a technique claims to be.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
from tqdm import tqdm

from minitx.lab.evaluate import (
    Encoded,
    Report,
    Tally,
    best_guess,
    encode,
    held_out,
    hops_name,
    percent,
    report,
    table,
)
from minitx.ledger import Entry, Ledger, counting
from minitx.tree import nbytes, walk

PROMPT, NEW = 32, 48  # tokens of a story's beginning, and how many are told after it


@dataclass(frozen=True)
class Plan:
    """How much is read and told: stories, continuations, and rounds of timing."""

    stories: int = 100
    told: int = 10
    rounds: int = 5


@dataclass(frozen=True)
class Reading:
    """Both models on the same stories."""

    dense: Report
    changed: Report
    divergence: float  # mean KL(dense || changed) in nats a token
    agreement: float  # share of tokens at which both would choose the same next one
    tokens: int


@dataclass(frozen=True)
class Telling:
    """Both models on the same beginnings; costs are for one new token, the prompt's share in it."""

    same: int  # continuations that are equal
    told: int
    dense: dict[str, Entry]  # by part
    changed: dict[str, Entry]
    events: dict[str, int]  # what the techniques counted about themselves
    speed: tuple[float, float, float]  # tokens a second over dense ones: median, lowest, highest
    dense_tokens_per_second: float


@dataclass(frozen=True)
class Size:
    """What a model takes in memory, in bytes."""

    weights: int  # all arrays, tables too
    cache: int  # keys and values of one token

    @classmethod
    def of(cls, lm, ids) -> "Size":
        state = lm.model.new_state()
        lm.model(np.array(ids), state)
        return cls(nbytes(lm), state.bytes_per_token)


@dataclass(frozen=True)
class Comparison:
    techniques: str
    reading: Reading
    telling: Telling
    dense_size: Size
    size: Size

    @property
    def identical(self) -> bool:
        return self.reading.agreement == 1 and self.telling.same == self.telling.told

    @property
    def multiply_adds(self) -> float:
        """Of the changed model, over those of the dense one."""
        changed, dense = (
            sum(part.values(), Entry()) for part in (self.telling.changed, self.telling.dense)
        )
        return changed.multiply_adds / dense.multiply_adds

    @property
    def memory(self) -> float:
        """Bytes of the changed model's arrays, over those of the dense one."""
        return self.size.weights / self.dense_size.weights

    def as_dict(self) -> dict:
        found = asdict(self)
        for name in ("dense", "changed"):
            found["reading"][name] = getattr(self.reading, name).as_dict()
        return found | {"identical": self.identical, "multiply_adds": self.multiply_adds}

    def __str__(self) -> str:
        return as_text(self)


def compare(
    dense, changed, techniques: str, plan: Plan = Plan(), grade="full", bar=True
) -> Comparison:
    """Compare two LMs that share a tokenizer. Raises MinitxError without one."""
    found = held_out(dense, plan.stories, grade)
    encoded = encode(dense.tokenizer, found)
    with tqdm(
        total=len(encoded) + plan.told * 2 + plan.rounds, unit="run", disable=not bar
    ) as progress:
        reading = read(dense, changed, encoded, best_guess(found), progress.update)
        prompts = [story.ids[:PROMPT] for story in encoded[: plan.told]]
        telling = tell(dense, changed, prompts, plan.rounds, progress.update)
    sizes = [Size.of(lm, prompts[0]) for lm in (dense, changed)]
    return Comparison(techniques, reading, telling, *sizes)


def read(dense, changed, encoded: Sequence[Encoded], guess: dict, tick) -> Reading:
    """One story after another, since not every technique takes batches."""
    tallies = Tally.empty(), Tally.empty()
    divergence, same, tokens = 0.0, 0, 0
    for story in encoded:
        ids, targets, kinds = story.ids[:-1], np.array(story.ids[1:]), np.array(story.kinds)
        both = [lm.logits(ids) for lm in (dense, changed)]
        for tally, logits in zip(tallies, both):
            tally.floor += story.nats
            tally.add(logits, targets, kinds)
        p, q = map(log_softmax, both)
        divergence += float((np.exp(p) * (p - q)).sum())
        same += int((both[0].argmax(-1) == both[1].argmax(-1)).sum())
        tokens += len(ids)
        tick()
    ours = [report(tally, guess) for tally in tallies]
    return Reading(*ours, max(divergence / tokens, 0.0), same / tokens, tokens)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log of the next-token distributions (T, V), in float64."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def tell(dense, changed, prompts: Sequence[list[int]], rounds: int, tick) -> Telling:
    texts, ledgers = [], []
    for lm in (dense, changed):
        with counting(lm) as counts:
            texts.append([])
            forget(lm)
            for prompt in prompts:
                texts[-1].append(list(lm.tokens(prompt, room(lm, prompt))))
                tick()
        ledgers.append(counts)
    same = sum(a == b for a, b in zip(*texts))
    seconds = [], []
    for _ in range(rounds):
        for lm, found, own in zip((dense, changed), seconds, texts):
            forget(lm)
            began = time.process_time()
            for prompt in prompts:
                list(lm.tokens(prompt, room(lm, prompt)))
            new = sum(map(len, own)) or 1
            found.append((time.process_time() - began) / new)
        tick()
    ratios = [a / b for a, b in zip(*seconds)]
    costs = [per_token(counts, sum(map(len, own)) or 1) for counts, own in zip(ledgers, texts)]
    return Telling(
        same,
        len(prompts),
        *costs,
        dict(ledgers[1].events),
        (median(ratios), min(ratios), max(ratios)),
        1 / median(seconds[0]),
    )


def forget(lm) -> None:
    """Empty what outlives a sequence (a store of prefixes), so that every pass begins alike."""
    for _, node in walk(lm):
        node.forget()


def room(lm, prompt) -> int:
    return min(NEW, lm.model.config.context - len(prompt))


def per_token(counts: Ledger, tokens: int) -> dict[str, Entry]:
    return {
        group: Entry(*(round(n / tokens) for n in (e.multiply_adds, e.weight_bytes, e.cache_bytes)))
        for group, e in counts.by_group().items()
    }


# Text --------------------------------------------------------------------------------------------


def as_text(c: Comparison) -> str:
    r, t = c.reading, c.telling
    word = "identical" if c.identical else "approximate"
    speed, low, high = t.speed
    lines = [
        f"{c.techniques or 'no technique'}: {word}. {percent(r.agreement)} of {r.tokens:,} next "
        f"tokens are the same, {t.same} of {t.told} continuations; "
        f"KL {r.divergence:.2g} nats a token.",
        "",
        quality(r),
        "",
        f"For each new token ({PROMPT} of prompt, up to {NEW} new, the prompt's work shared out):",
        costs(t),
        "",
        sizes(c.dense_size, c.size),
        f"{speed:.2f}x the tokens a second of the dense model ({low:.2f}x to {high:.2f}x), "
        f"which does {t.dense_tokens_per_second:,.0f}.",
    ]
    if t.events:
        lines += [
            "",
            "Counted: " + ", ".join(f"{n:,} {name}" for name, n in t.events.items()) + ".",
        ]
    return "\n".join(lines)


def sizes(dense: Size, changed: Size) -> str:
    arrays = f"{changed.weights / 1e6:.2f} MB of arrays ({cell(dense.weights, changed.weights)[1]})"
    cache = f"{changed.cache:,} bytes of cache a token ({cell(dense.cache, changed.cache)[1]})"
    return f"In memory: {arrays}, {cache}."


def quality(r: Reading) -> str:
    names = {hops: hops_name(hops) for hops in r.dense.by_hops}
    rows = [["", "loss", "above least", *names.values()]]
    for name, found in (("dense", r.dense), ("changed", r.changed)):
        accuracies = [percent(found.by_hops[hops]) for hops in names]
        rows.append([name, f"{found.loss:.4f}", f"{found.gap:.4f}", *accuracies])
    return table(rows)


def costs(t: Telling) -> str:
    rows = [["part", "multiply-adds", "", "weights read", "", "cache read", ""]]
    groups = list(dict.fromkeys([*t.dense, *t.changed]))
    entries = [(g, t.dense.get(g, Entry()), t.changed.get(g, Entry())) for g in groups]
    entries.append(("all", sum(t.dense.values(), Entry()), sum(t.changed.values(), Entry())))
    for group, before, after in entries:
        row = [group]
        for name in ("multiply_adds", "weight_bytes", "cache_bytes"):
            row += cell(getattr(before, name), getattr(after, name))
        rows.append(row)
    return table(rows)


def cell(before: int, after: int) -> list[str]:
    return [f"{after:,}", f"{after / before:.2f}x" if before else "-"]
