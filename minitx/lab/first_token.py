"""``minitx first-token``: time to first token for prompts that share a prefix.

The prompts share a prefix, like those that start with the same instructions or the conversation so
far, and then differ. Caches that outlive a sequence are cleared before each round, so the first
prompt of a round shows the time of a new prompt, and the others that of prompts whose prefix has
been seen before.

The dense and the changed model take turns, prompt by prompt. A ratio is the median over these
pairs, with the minimum and maximum. Time is CPU time; with one BLAS thread
(OPENBLAS_NUM_THREADS=1) on an idle machine that equals wall time.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from minitx import progress
from minitx.errors import MinitxError
from minitx.lab.bench import elapsed
from minitx.lab.compare import forget
from minitx.lab.layout import table
from minitx.ledger import counting
from minitx.training.stories import stories


@dataclass(frozen=True)
class PromptSet:
    """shared: length of the common prefix in tokens; own: tokens of each prompt after it."""

    shared: int = 400
    own: int = 20
    prompts: int = 8
    rounds: int = 7


@dataclass(frozen=True)
class Times:
    """Time to first token, for one kind of prompt."""

    dense: float  # median, seconds
    changed: float
    ratio: tuple[float, float, float]  # dense over changed: median, lowest, highest
    multiply_adds: float  # of the changed model, relative to the dense one
    events: dict[str, int]  # counted for one such prompt


@dataclass(frozen=True)
class FirstToken:
    techniques: str
    plan: PromptSet
    new: Times  # prompts seen for the first time
    known: Times  # prompts whose prefix was seen before
    cache_bytes: int  # KV cache per token

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        plan, rows = self.plan, [["", "dense", "changed", "faster", "", "multiply-adds"]]
        for name, t in (("new prompt", self.new), ("shared prefix", self.known)):
            middle, low, high = t.ratio
            rows.append(
                [name, *(f"{1e3 * s:.2f} ms" for s in (t.dense, t.changed)), f"{middle:.2f}x"]
                + [f"({low:.2f}x to {high:.2f}x)", f"{t.multiply_adds:.3f}x"]
            )
        lines = [
            f"{self.techniques or 'no technique'}: time to first token for prompts of "
            f"{plan.shared + plan.own} tokens, of which the first {plan.shared} are the same in "
            "all prompts.",
            "",
            table(rows),
            "",
            f"{self.cache_bytes:,} bytes of KV cache per token.",
        ]
        for name, t in (("a new prompt", self.new), ("a shared prefix", self.known)):
            if t.events:
                found = ", ".join(f"{n:,} {event}" for event, n in t.events.items())
                lines.append(f"Events for {name}: {found}.")
        return "\n".join(lines)


def first_token(
    dense, changed, techniques: str, plan: PromptSet = PromptSet(), bar=True
) -> FirstToken:
    """Compare two LMs that share a vocabulary. MinitxError for fewer than two prompts, or if they
    do not fit the context."""
    if plan.prompts < 2:
        raise MinitxError(
            f"first-token: prompts must be >= 2 (a new one and one with a known prefix), got "
            f"{plan.prompts}."
        )
    texts = prompts(dense, plan.shared, plan.own, plan.prompts)
    work, events = [], []
    forget(changed)
    for text in texts[:2]:
        done = []
        for lm in (dense, changed):
            with counting(lm) as counts:
                until_first(lm, text)
            done.append(counts.total().multiply_adds)
        work.append(done[1] / done[0])
        events.append({event: n for event, n in counts.events.items() if n})
    seconds: tuple[list, list] = [], []  # of pairs (dense, changed)
    for _ in progress.bar(range(plan.rounds), "first token", unit="round", shown=bar):
        forget(changed)
        for text in texts:
            pair = tuple(until_first(lm, text) for lm in (dense, changed))
            seconds[text is not texts[0]].append(pair)
    new, known = (times(*found) for found in zip(seconds, work, events))
    state = changed.model.new_state()
    changed.model(np.array(texts[0]), state)
    return FirstToken(techniques, plan, new, known, state.bytes_per_token)


def until_first(lm, prompt: list[int]) -> float:
    """CPU seconds until the decoding loop yields its first token."""
    began = time.process_time()
    next(lm.tokens(prompt, 1), None)
    return elapsed(time.process_time, began)


def times(pairs: list[tuple], multiply_adds: float, events: Counter) -> Times:
    ratios = [a / b for a, b in pairs]
    dense, changed = map(median, zip(*pairs))
    spread = median(ratios), min(ratios), max(ratios)
    return Times(dense, changed, spread, multiply_adds, events)


def prompts(lm, shared: int, own: int, count: int) -> list[list[int]]:
    """``count`` prompts with the same first ``shared`` tokens and different ones after them:
    held-out stories or, without a tokenizer, random ids (always the same)."""
    config, length = lm.model.config, shared + own
    if min(shared, own) < 1 or length >= config.context:
        raise MinitxError(
            "first-token: shared and own must be >= 1 and leave room for a new token in the "
            f"context of {config.context}, got {shared} and {own}."
        )
    texts = endless_texts(lm)

    def read(ids: list[int], n: int) -> list[int]:
        while len(ids) < n:
            ids = ids + next(texts)
        return ids[:n]

    first, found, taken = read([], shared), [], set()
    for _ in range(count):
        # Stories have common beginnings too: start each prompt's own part with a different token.
        ids = next(texts)
        skip = next((i for i, token in enumerate(ids) if token not in taken), 0)
        taken.add(ids[skip])
        found.append(first + read(ids[skip:], own))
    return found


def endless_texts(lm) -> Iterator[list[int]]:
    """The ids of held-out stories, then random ones; always the same."""
    if lm.tokenizer is not None:
        for story in stories("evaluation", "full", 0):
            yield lm.tokenizer.encode(story.text)
    draw = np.random.default_rng(0).integers
    while True:
        yield draw(0, lm.model.config.vocab_size, 256).tolist()
