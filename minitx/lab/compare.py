"""``minitx compare``: what techniques save and cost, side by side with the dense model.

Two measurements on the same texts, held-out stories or any text (reading.py):

- reading: each text is read once with teacher forcing. Loss (of stories above their entropy, with
  accuracy by hops; of any text per token and per byte), the mean KL divergence of the next-token
  distributions KL(dense || changed), and how often the argmax agrees;
- generation: the beginning of each text is continued greedily. Multiply-adds and bytes read are
  counted per new token, part by part; then both models are timed in turns. The speed ratio is the
  median over the rounds, with the minimum and maximum. Caches that outlive a sequence are cleared
  before each round (``minitx first-token`` measures those).

Also reported: bytes of all arrays in memory, bytes of KV cache per token and, if asked for, an
estimate of the energy (energy.py). With chains, stories
follow one another until the context is full, for techniques whose effect shows on long texts.

The result is called identical if every argmax while reading and every continuation is the same;
anything else is approximate, whatever a technique claims.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median

import numpy as np

from minitx import progress
from minitx.decode import Sampler, new_state
from minitx.lab.bench import elapsed, timed
from minitx.lab.energy import Constants, Estimate
from minitx.lab.evaluate import Report, Tally, percent, table
from minitx.lab.reading import (
    NEW,
    TOKENS,
    Material,
    TextReport,
    hidden_as_generated,
    logits_of,
    pieces,
    stories_to_read,
    text_to_read,
    warn_if_calibrated_otherwise,
    warn_if_stories_are_unknown,
)
from minitx.ledger import Entry, Ledger, counting
from minitx.shared.log_softmax import log_softmax
from minitx.text import Text
from minitx.tree import nbytes, walk

LONGEST_TIMING = 20.0  # seconds after which no further round of timing begins


@dataclass(frozen=True)
class Workload:
    """How much to measure: stories to read (or chains of stories, or a text instead and how many of
    its tokens), prompts to continue, and rounds of timing, at most."""

    stories: int = 100
    prompts: int = 10
    rounds: int = 5
    chains: int = 0
    text: str | Text | None = None
    tokens: int = TOKENS


@dataclass(frozen=True)
class Reading:
    """Both models on the same texts."""

    dense: Report | TextReport
    changed: Report | TextReport
    divergence: float  # mean KL(dense || changed) in nats a token
    agreement: float  # share of tokens at which both would choose the same next one
    tokens: int
    work: Entry = field(default_factory=Entry)  # of the changed model, for all tokens

    @property
    def added_loss(self) -> float:
        """Loss above the dense model, in nats per token (of stories: of ordinary text)."""
        return self.changed.loss - self.dense.loss


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
    measured: str = ""  # on what
    calibrated: tuple[str, ...] = ()  # what the techniques were calibrated on
    energy: Estimate | None = None  # of generating

    @property
    def identical(self) -> bool:
        return self.reading.agreement == 1 and self.generation.same == self.generation.prompts

    @property
    def multiply_adds(self) -> float:
        """Of the changed model, relative to the dense one."""
        return self.relative("multiply_adds")

    def relative(self, name: str) -> float:
        """A field of ``Entry`` per new token, relative to the dense model."""
        changed, dense = (
            sum(part.values(), Entry()) for part in (self.generation.changed, self.generation.dense)
        )
        return getattr(changed, name) / max(getattr(dense, name), 1)

    @property
    def memory(self) -> float:
        """Bytes of all arrays, relative to the dense model."""
        return self.size.weights / self.dense_size.weights

    @property
    def cache(self) -> float:
        """Bytes of the KV cache, relative to the dense model."""
        return self.size.cache / max(self.dense_size.cache, 1)

    def with_energy(self, constants: Constants, context: int) -> "Comparison":
        """With an estimate of the energy, for models with this context."""
        sizes = (size.weights + context * size.cache for size in (self.dense_size, self.size))
        work = self.generation.dense, self.generation.changed
        return replace(self, energy=Estimate.of(constants, *work, *sizes))

    def as_dict(self) -> dict:
        found = asdict(self)
        for name in ("dense", "changed"):
            found["reading"][name] = getattr(self.reading, name).as_dict()
        del found["energy"]
        if self.energy is not None:
            found["energy"] = self.energy.as_dict()
        return found | {"identical": self.identical, "multiply_adds": self.multiply_adds}

    def __str__(self) -> str:
        return as_text(self)


def compare(
    dense,
    changed,
    techniques: str,
    plan: Workload = Workload(),
    grade="full",
    bar=True,
    energy: Constants | None = None,
) -> Comparison:
    """Compare two LMs that share a tokenizer. Raises MinitxError without one. energy: constants, to
    estimate the energy too."""
    material = to_read(dense, plan, grade)
    runs = 2 * (len(material.texts) + len(material.prompts(plan.prompts))) + plan.rounds
    with progress.bar(runs, "compare", unit="run", shown=bar) as shown:
        known = measure_dense(dense, material, plan.prompts, shown.update)
        found = compare_with(known, changed, techniques, plan.rounds, shown.update)
    return found.with_energy(energy, dense.model.config.context) if energy else found


def to_read(dense, plan: Workload, grade="full") -> Material:
    if plan.text is not None:
        return text_to_read(dense, plan.text, plan.tokens)
    return stories_to_read(dense, plan.stories, grade, plan.chains)


@dataclass(frozen=True)
class Dense:
    """What is measured of the dense model once, for all models that are compared with it."""

    lm: object
    material: Material
    hidden: list[np.ndarray]  # its hidden states (T, D) of each text: logits would fill the memory
    report: Report | TextReport
    prompts: list[list[int]]
    continuations: list[list[int]]
    counts: Ledger  # of generating them
    size: Size
    tokens_per_second: float  # of generating them once, while their work is counted


def measure_dense(dense, material: Material, prompts: int, tick) -> Dense:
    tally, hidden = Tally.empty(), []
    for text in material.texts:
        hidden.append(hidden_as_generated(dense, text.ids[:-1]))
        targets, kinds = np.array(text.ids[1:]), np.array(text.kinds)
        for some in pieces(len(hidden[-1]), dense.model.config.vocab_size):
            tally.add(logits_of(dense, hidden[-1][some]), targets[some], kinds[some])
        tally.floor += text.nats
        tick()
    found = material.report(tally)
    warn_if_stories_are_unknown(material.source, found)
    own = material.prompts(prompts)
    began = time.process_time()
    texts, counts = continue_all(dense, own, tick)
    speed = sum(map(len, texts)) / elapsed(time.process_time, began)
    size = Size.of(dense, material.texts[0].ids[: dense.model.config.context])
    return Dense(dense, material, hidden, found, own, texts, counts, size, speed)


def compare_with(known: Dense, changed, techniques: str, rounds: int, tick) -> Comparison:
    """Compare a model with the dense one that is measured already."""
    material = known.material
    warn_if_calibrated_otherwise(changed, material.source)
    reading = read(known, changed, tick)
    generation = generate(known, changed, rounds, tick)
    size = Size.of(changed, material.texts[0].ids[: known.lm.model.config.context])
    calibrated = tuple(map(str, changed.calibrated))
    return Comparison(techniques, reading, generation, known.size, size, material.name, calibrated)


def read(known: Dense, changed, tick) -> Reading:
    """Read one text after another: not every technique takes batches."""
    tally, work = Tally.empty(), Entry()
    divergence, same, tokens = 0.0, 0, 0
    for text, dense_hidden in zip(known.material.texts, known.hidden, strict=True):
        targets, kinds = np.array(text.ids[1:]), np.array(text.kinds)
        hidden, spent = counted(changed, hidden_as_generated, text.ids[:-1])
        work += spent
        for some in pieces(len(hidden), known.lm.model.config.vocab_size):
            dense_logits = logits_of(known.lm, dense_hidden[some])
            logits, spent = counted(changed, logits_of, hidden[some])
            work += spent
            tally.add(logits, targets[some], kinds[some])
            p, q = log_softmax(dense_logits), log_softmax(logits)
            divergence += float((np.exp(p) * (p - q)).sum())
            same += int((dense_logits.argmax(-1) == logits.argmax(-1)).sum())
        tally.floor += text.nats
        tokens += len(targets)
        tick()
    changed_report = known.material.report(tally)
    mean = max(divergence / tokens, 0.0)
    return Reading(known.report, changed_report, mean, same / tokens, tokens, work)


def counted(lm, run, *arguments) -> tuple[np.ndarray, Entry]:
    """``run(lm, *arguments)``, and its work."""
    with counting(lm) as counts:
        found = run(lm, *arguments)
    return found, counts.total()


def continue_all(lm, prompts: Sequence[list[int]], tick) -> tuple[list[list[int]], Ledger]:
    """The greedy continuation of each prompt, and what they cost together."""
    found = []
    with counting(lm) as counts:
        forget(lm)
        for prompt in prompts:
            found.append(continuation(lm, prompt))
            tick()
    return found, counts


def generate(known: Dense, changed, rounds: int, tick) -> Generation:
    dense, prompts = known.lm, known.prompts
    texts, counts = continue_all(changed, prompts, tick)
    both, ledgers = (known.continuations, texts), (known.counts, counts)
    same = sum(a == b for a, b in zip(*both))
    new = [sum(map(len, own)) or 1 for own in both]  # tokens
    seconds, began = ([], []), time.monotonic()
    for done in range(rounds):
        if done and time.monotonic() - began > LONGEST_TIMING:
            break
        for lm, found, tokens in zip((dense, changed), seconds, new):
            found.append(timed(partial(generate_all, lm, prompts), least=0) / tokens)
        tick()
    ratios = [a / b for a, b in zip(*seconds)]
    costs = [per_token(ledger, tokens) for ledger, tokens in zip(ledgers, new)]
    return Generation(
        same,
        len(prompts),
        max(map(len, prompts)),
        *costs,
        dict(counts.events),
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
    return {group: entry.divided(tokens) for group, entry in counts.by_group().items()}


# Text --------------------------------------------------------------------------------------------


def as_text(c: Comparison) -> str:
    r, t = c.reading, c.generation
    word = "identical" if c.identical else "approximate"
    speed, low, high = t.speed
    lines = [
        f"{c.techniques or 'no technique'}: {word}. The argmax agrees at {percent(r.agreement)} of "
        f"{r.tokens:,} tokens, {t.same} of {t.prompts} greedy continuations are the same; "
        f"KL divergence {r.divergence:.2g} nats per token.",
        f"Measured on {c.measured}.",
        *(f"{use[0].upper() + use[1:]}." for use in c.calibrated),
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
    if c.energy is not None:
        lines += ["", str(c.energy)]
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
    dense, changed = r.dense.columns(), r.changed.columns()
    return table([["", *dense], ["dense", *dense.values()], ["changed", *changed.values()]])


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
