"""``minitx compare``: what techniques save and cost, side by side with the dense model.

Two measurements on the same held-out stories:

- reading: each story is read once with teacher forcing. Loss above the entropy of the text,
  accuracy by hops, the mean KL divergence of the next-token distributions KL(dense || changed),
  and how often the argmax agrees;
- generation: the beginning of each story is continued greedily. Multiply-adds and bytes read are
  counted per new token, part by part; then both models are timed in turns. The speed ratio is the
  median over the rounds, with the minimum and maximum. Caches that outlive a sequence are cleared
  before each round (``minitx first-token`` measures those).

Also reported: bytes of all arrays in memory, and bytes of KV cache per token.

A story is read in one pass, unless a technique decides per step what to skip: then it is read as
generation would run it, a prompt at once and the rest token by token. With chains, stories follow
one another until the context is full, for techniques whose effect shows on long texts.

The result is called identical if every argmax while reading and every continuation is the same;
anything else is approximate, whatever a technique claims.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from statistics import median

import numpy as np

from minitx import progress
from minitx.decode import Sampler, new_state
from minitx.lab.bench import timed
from minitx.lab.evaluate import (
    Encoded,
    Report,
    Tally,
    best_guess,
    chains,
    encode,
    held_out,
    hops_name,
    percent,
    report,
    table,
)
from minitx.ledger import Entry, Ledger, counting
from minitx.technique import decides
from minitx.tree import nbytes, walk

PROMPT, NEW = 32, 48  # tokens of a prompt, and new tokens generated after it


@dataclass(frozen=True)
class Workload:
    """How much to measure: stories to read (or chains of stories instead), prompts to continue, and
    rounds of timing."""

    stories: int = 100
    prompts: int = 10
    rounds: int = 5
    chains: int = 0


@dataclass(frozen=True)
class Reading:
    """Both models on the same stories."""

    dense: Report
    changed: Report
    divergence: float  # mean KL(dense || changed) in nats a token
    agreement: float  # share of tokens at which both would choose the same next one
    tokens: int


@dataclass(frozen=True)
class Generation:
    """Both models generating from the same prompts; costs are per new token, with the prompt's work
    divided among them."""

    same: int  # continuations that are the same
    prompts: int
    prompt_tokens: int  # of each prompt
    dense: dict[str, Entry]  # by part
    changed: dict[str, Entry]
    events: dict[str, int]  # events that the techniques counted
    speed: tuple[float, float, float]  # tokens a second over dense ones: median, lowest, highest
    dense_tokens_per_second: float


@dataclass(frozen=True)
class Size:
    """Bytes of memory that a model takes."""

    weights: int  # all arrays, including tables
    cache: int  # KV cache, per token

    @classmethod
    def of(cls, lm, ids) -> "Size":
        state = lm.model.new_state()
        for step in (ids[:-2], ids[-2:-1], ids[-1:]):  # rows are freed when a step begins
            lm.model.hidden(np.array(step), state)
        return cls(nbytes(lm), state.bytes_per_token)


@dataclass(frozen=True)
class Comparison:
    techniques: str
    reading: Reading
    generation: Generation
    dense_size: Size
    size: Size

    @property
    def identical(self) -> bool:
        return self.reading.agreement == 1 and self.generation.same == self.generation.prompts

    @property
    def multiply_adds(self) -> float:
        """Of the changed model, relative to the dense one."""
        changed, dense = (
            sum(part.values(), Entry()) for part in (self.generation.changed, self.generation.dense)
        )
        return changed.multiply_adds / dense.multiply_adds

    @property
    def memory(self) -> float:
        """Bytes of all arrays, relative to the dense model."""
        return self.size.weights / self.dense_size.weights

    @property
    def cache(self) -> float:
        """Bytes of the KV cache, relative to the dense model."""
        return self.size.cache / max(self.dense_size.cache, 1)

    def as_dict(self) -> dict:
        found = asdict(self)
        for name in ("dense", "changed"):
            found["reading"][name] = getattr(self.reading, name).as_dict()
        return found | {"identical": self.identical, "multiply_adds": self.multiply_adds}

    def __str__(self) -> str:
        return as_text(self)


def compare(
    dense, changed, techniques: str, plan: Workload = Workload(), grade="full", bar=True
) -> Comparison:
    """Compare two LMs that share a tokenizer. Raises MinitxError without one."""
    found = held_out(dense, plan.stories, grade)
    context = dense.model.config.context
    if plan.chains:
        endless = chains(dense.tokenizer, "evaluation", grade, context)
        encoded = list(islice(endless, plan.chains))
    else:
        encoded = encode(dense.tokenizer, found)
    beginning = context - NEW if plan.chains else PROMPT
    runs = len(encoded) + min(plan.prompts, len(encoded)) * 2 + plan.rounds
    with progress.bar(runs, "compare", unit="run", shown=bar) as shown:
        reading = read(dense, changed, encoded, best_guess(found), shown.update)
        prompts = [text.ids[:beginning] for text in encoded[: plan.prompts]]
        generation = generate(dense, changed, prompts, plan.rounds, shown.update)
    sizes = [Size.of(lm, encoded[0].ids[:context]) for lm in (dense, changed)]
    return Comparison(techniques, reading, generation, *sizes)


def read(dense, changed, encoded: Sequence[Encoded], guess: dict, tick) -> Reading:
    """Read one story after another: not every technique takes batches."""
    tallies = Tally.empty(), Tally.empty()
    divergence, same, tokens = 0.0, 0, 0
    for story in encoded:
        ids, targets, kinds = story.ids[:-1], np.array(story.ids[1:]), np.array(story.kinds)
        both = [logits_as_generated(lm, ids) for lm in (dense, changed)]
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


def logits_as_generated(lm, ids) -> np.ndarray:
    """Logits (T, V) of a text: in one pass if that makes no difference, otherwise a prompt at once
    and the rest token by token, as generation runs it."""
    if decides(lm.model) == "token":
        return lm.logits(ids)
    state, ids = lm.model.new_state(), np.array(ids)
    state.prompt = min(PROMPT, len(ids))
    found = [lm.model(ids[:PROMPT], state)]
    found += [lm.model(ids[t : t + 1], state) for t in range(PROMPT, len(ids))]
    return np.concatenate(found)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log of the next-token distributions (T, V), in float64."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def generate(dense, changed, prompts: Sequence[list[int]], rounds: int, tick) -> Generation:
    texts, ledgers = [], []
    for lm in (dense, changed):
        with counting(lm) as counts:
            texts.append([])
            forget(lm)
            for prompt in prompts:
                texts[-1].append(continuation(lm, prompt))
                tick()
        ledgers.append(counts)
    same = sum(a == b for a, b in zip(*texts))
    new = [sum(map(len, own)) or 1 for own in texts]  # tokens
    seconds = [], []
    for _ in range(rounds):
        for lm, found, tokens in zip((dense, changed), seconds, new):
            found.append(timed(partial(generate_all, lm, prompts), least=0) / tokens)
        tick()
    ratios = [a / b for a, b in zip(*seconds)]
    costs = [per_token(counts, tokens) for counts, tokens in zip(ledgers, new)]
    return Generation(
        same,
        len(prompts),
        max(map(len, prompts)),
        *costs,
        dict(ledgers[1].events),
        (median(ratios), min(ratios), max(ratios)),
        1 / median(seconds[0]),
    )


def generate_all(lm, prompts: Sequence[list[int]]) -> None:
    forget(lm)
    for prompt in prompts:
        continuation(lm, prompt)


def continuation(lm, prompt) -> list[int]:
    """The greedy continuation. It goes on past end-of-text, so that all models generate as much."""
    state = new_state(lm.model, prompt)
    return list(lm.decode(lm.model, state, prompt, Sampler(), room(lm, prompt)))


def forget(lm) -> None:
    """Clear caches that outlive a sequence (a prefix cache), so that every pass starts the same."""
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
    r, t = c.reading, c.generation
    word = "identical" if c.identical else "approximate"
    speed, low, high = t.speed
    lines = [
        f"{c.techniques or 'no technique'}: {word}. The argmax agrees at {percent(r.agreement)} of "
        f"{r.tokens:,} tokens, {t.same} of {t.prompts} greedy continuations are the same; "
        f"KL divergence {r.divergence:.2g} nats per token.",
        "",
        quality(r),
        "",
        f"Per new token (prompt of {t.prompt_tokens}, {NEW} new tokens, prefill included):",
        costs(t),
        "",
        sizes(c.dense_size, c.size),
        f"Speed: {speed:.2f}x the dense model's ({low:.2f}x to {high:.2f}x), which generates "
        f"{t.dense_tokens_per_second:,.0f} tokens/s.",
    ]
    if t.events:
        lines += [
            "",
            "Events: " + ", ".join(f"{n:,} {name}" for name, n in t.events.items()) + ".",
        ]
    return "\n".join(lines)


def sizes(dense: Size, changed: Size) -> str:
    arrays = f"{changed.weights / 1e6:.2f} MB of arrays ({cell(dense.weights, changed.weights)[1]})"
    cache = f"{changed.cache:,} bytes of KV cache per token ({cell(dense.cache, changed.cache)[1]})"
    return f"Memory: {arrays}, {cache}."


def quality(r: Reading) -> str:
    names = {hops: hops_name(hops) for hops in r.dense.by_hops}
    rows = [["", "loss", "above entropy", *names.values()]]
    for name, found in (("dense", r.dense), ("changed", r.changed)):
        accuracies = [percent(found.by_hops[hops]) for hops in names]
        rows.append([name, f"{found.loss:.4f}", f"{found.gap:.4f}", *accuracies])
    return table(rows)


def costs(t: Generation) -> str:
    rows = [["part", "multiply-adds", "", "weight bytes", "", "KV cache bytes", ""]]
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
