"""The quality of a model on stories: accuracy by kind of question and by hops, and loss compared
with the entropy of the text.

Teacher forcing: every story is read once, after ``<|endoftext|>``, and the model's prediction is
compared with each token. No text is generated. Stories of similar length share a batch, padded at
the end, which does not affect a causal model.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np

from minitx.errors import MinitxError
from minitx.lab.layout import table
from minitx.technique import blocks_of
from minitx.training.data import ORDINARY, PADDING, StoryEncoder
from minitx.training.layerskip import record
from minitx.training.loss import token_losses
from minitx.training.stories import HOPS, KINDS, Story, guess_baselines, stories

ENTRIES = len(KINDS) + 1  # ordinary text, then each kind of answer


@dataclass
class Tally:
    """Sums over target tokens, by kind: index 0 is ordinary text, k + 1 is KINDS[k].

    Tallies add up: of parts of the stories to that of all stories.
    """

    count: np.ndarray  # (ENTRIES,) tokens
    right: np.ndarray  # (ENTRIES,) tokens whose largest logit is the target
    loss: np.ndarray  # (ENTRIES,) float64 nats
    floor: float = 0.0  # entropy of ordinary text in nats: its lowest possible loss

    @classmethod
    def empty(cls) -> "Tally":
        return cls(np.zeros(ENTRIES, int), np.zeros(ENTRIES, int), np.zeros(ENTRIES))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.count + other.count,
            self.right + other.right,
            self.loss + other.loss,
            self.floor + other.floor,
        )

    def add(self, logits, targets, kinds) -> None:
        """Count tokens: logits (..., V); targets, kinds (...), PADDING is ignored."""
        real = kinds != PADDING
        logits, targets, kinds = logits[real], targets[real], kinds[real]
        self.count += np.bincount(kinds, minlength=ENTRIES)
        self.right += np.bincount(kinds[logits.argmax(-1) == targets], minlength=ENTRIES)
        losses = token_losses(logits, targets)
        self.loss += np.bincount(kinds, losses, minlength=ENTRIES)  # summed in float64


@dataclass(frozen=True)
class Report:
    """The result of ``evaluate``. All losses are in nats per token."""

    by_kind: dict[str, float]  # accuracy of the answer tokens
    by_hops: dict[int, float]  # the same, by number of hops (0: counting questions)
    answers: dict[str, int]  # answer tokens of each kind
    answer_loss: float
    loss: float  # of ordinary tokens
    floor: float  # the lowest possible loss: the entropy of the stories
    tokens: int  # ordinary tokens
    guess: dict[str, float]  # accuracy of the best guess without binding, by kind

    @property
    def gap(self) -> float:
        """The loss of ordinary tokens above the entropy of the text."""
        return self.loss - self.floor

    def as_dict(self) -> dict:
        return asdict(self) | {"gap": self.gap}

    def __str__(self) -> str:
        rows = [["answer", "hops", "count", "right", "best guess"]]
        for kind, accuracy in self.by_kind.items():
            guess = percent(self.guess[kind]) if kind in self.guess else "-"
            rows.append([kind, str(HOPS[kind]), str(self.answers[kind]), percent(accuracy), guess])
        hops = ", ".join(f"{hops or 'count'}: {percent(a)}" for hops, a in self.by_hops.items())
        return "\n".join(
            [
                table(rows),
                f"by hops      {hops or '-'}",
                f"answers      {self.answer_loss:.4f} nats per token",
                f"other text   {self.loss:.4f} nats per token; entropy {self.floor:.4f}, "
                f"gap {self.gap:+.4f} ({self.tokens} tokens)",
            ]
        )


def report(tally: Tally, guess: dict[str, float] | None = None) -> Report:
    """The tally as accuracies and mean losses; kinds that never occur are left out."""
    seen = [(i, kind) for i, kind in enumerate(KINDS, 1) if tally.count[i]]
    hops: dict[int, list[int]] = {}
    for i, kind in sorted(seen, key=lambda entry: HOPS[entry[1]]):
        hops.setdefault(HOPS[kind], []).append(i)
    ordinary = max(int(tally.count[ORDINARY]), 1)
    return Report(
        by_kind={kind: share(tally, [i]) for i, kind in seen},
        by_hops={h: share(tally, which) for h, which in hops.items()},
        answers={kind: int(tally.count[i]) for i, kind in seen},
        answer_loss=float(tally.loss[1:].sum() / max(tally.count[1:].sum(), 1)),
        loss=float(tally.loss[ORDINARY] / ordinary),
        floor=tally.floor / ordinary,
        tokens=ordinary,
        guess=guess or {},
    )


def share(tally: Tally, which: list[int]) -> float:
    return float(tally.right[which].sum() / tally.count[which].sum())


def evaluate(model, tokenizer, read: Iterable[Story], batch_tokens: int = 4096) -> Report:
    """Accuracy and loss of a model (or the ``model`` of an LM) on stories.

    model: any callable from ids (B, T) to logits (B, T, V). batch_tokens: the approximate size of a
    batch in tokens. Raises MinitxError for no stories, or one longer than the context.
    """
    model, read = getattr(model, "model", model), list(read)
    total = Tally.empty()
    for batch in batches(encode(tokenizer, read), context_of(model), batch_tokens):
        total.floor += batch.floor
        total.add(model(batch.ids), batch.targets, batch.kinds)
    return report(total, best_guess(read))


def exit_profile(model, tokenizer, read: Iterable[Story], batch_tokens: int = 4096) -> list[Report]:
    """One report per depth 1 .. L: the final norm and head applied to the hidden state after that
    many blocks, all recorded in one pass. The last one is the report of ``evaluate``."""
    model, read = getattr(model, "model", model), list(read)
    recorded, hidden = record(model)
    totals = [Tally.empty() for _ in blocks_of(model)]
    for batch in batches(encode(tokenizer, read), context_of(model), batch_tokens):
        hidden.clear()
        recorded.hidden(batch.ids)
        for total, x in zip(totals, hidden):
            total.floor += batch.floor
            total.add(model.head(model.norm(x)), batch.targets, batch.kinds)
    guess = best_guess(read)
    return [report(total, guess) for total in totals]


@dataclass(frozen=True)
class Profile:
    """The reports of ``exit_profile``, for printing."""

    depths: list[Report]

    def __str__(self) -> str:
        hops = list(self.depths[-1].by_hops)
        rows = [["exit after", *(f"{h} hops" if h else "counts" for h in hops), "loss", "gap"]]
        for depth, r in enumerate(self.depths, 1):
            accuracies = [percent(r.by_hops[h]) for h in hops]
            name = f"{depth} of {len(self.depths)}"
            rows.append([name, *accuracies, f"{r.loss:.4f}", f"{r.gap:+.4f}"])
        return f"{self.depths[-1]}\n\n{table(rows)}"

    def as_dict(self) -> dict:
        return self.depths[-1].as_dict() | {"depths": [r.as_dict() for r in self.depths]}


def evaluate_model(lm, count: int = 500, grade="full", depths: bool = False, seed: int = 0):
    """The ``Report`` (with ``depths``, the ``Profile``) of an LM on ``count`` held-out stories of a
    grade; a seed always gives the same stories."""
    found = held_out(lm, count, grade, seed)
    if depths:
        return Profile(exit_profile(lm, lm.tokenizer, found))
    return evaluate(lm, lm.tokenizer, found)


def held_out(lm, count: int, grade="full", seed: int = 0) -> list[Story]:
    """``count`` evaluation stories of a grade, for an LM with a tokenizer."""
    if lm.tokenizer is None:
        raise MinitxError(
            "This model has no tokenizer, so it cannot read stories; load it with tokenizer=PATH."
        )
    if type(count) is not int or count < 1:
        raise MinitxError(f"stories must be an integer >= 1, got {count!r}.")
    return list(islice(stories("evaluation", grade, seed), count))


def best_guess(stories: Sequence[Story]) -> dict[str, float]:
    """For each kind of answer, the best accuracy of a guess that binds no names to facts."""
    return {kind: max(found.values()) for kind, found in guess_baselines(stories).items()}


# Batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """One story: n targets."""

    ids: list[int]  # n + 1 ids: <|endoftext|>, the story, <|endoftext|>
    kinds: list[int]  # the kind of each target (every id but the first)
    nats: float  # entropy of the story


@dataclass(frozen=True)
class Padded:
    """A batch of stories; shorter ones are padded at the end."""

    ids: np.ndarray  # (B, T) input
    targets: np.ndarray  # (B, T) the next token of each
    kinds: np.ndarray  # (B, T) int8, the kind of each target
    floor: float  # entropy of these stories in nats


def encode(tokenizer, stories: Iterable[Story], longest: int | None = None) -> list[Encoded]:
    """The stories as ids; only the first ``longest`` targets of each, if given.

    A truncated story counts the entropy of its whole pieces only, so its floor is slightly low.
    """
    encoder = StoryEncoder(tokenizer)
    found = []
    for story in stories:
        ids, kinds, _ = encoder.story(story)
        nats = story.nats if longest is None else _nats(encoder, story, longest)
        found.append(Encoded([encoder.end, *ids[:longest]], kinds[:longest], nats))
    return found


def chains(tokenizer, split: str, grade, tokens: int) -> Iterator[Encoded]:
    """An endless stream of chains of ``tokens`` tokens: stories one after another, each preceded by
    ``<|endoftext|>``, the last one truncated (as in training/data.py)."""
    endless = stories(split, grade, 0)
    while True:
        ids, kinds, nats = [], [], 0.0
        while len(kinds) < tokens:
            (story,) = encode(tokenizer, [next(endless)], tokens - len(kinds))
            ids += story.ids[bool(ids) :]  # its first token ends the previous story
            kinds += story.kinds
            nats += story.nats
        yield Encoded(ids, kinds, nats)


def _nats(encoder: StoryEncoder, story: Story, longest: int) -> float:
    """The entropy of the pieces within the first ``longest`` targets."""
    nats, end = 0.0, 0
    for text, _, cost in story.pieces:
        end += len(encoder.piece(text))
        if end > longest:
            break
        nats += cost
    return nats


def batches(stories: list[Encoded], context: int | None, tokens: int) -> Iterable[Padded]:
    """Batches of at most about ``tokens`` tokens, from the shortest stories to the longest."""
    if not stories:
        raise MinitxError("Expected at least one story to evaluate on, got none.")
    stories = sorted(stories, key=lambda story: len(story.kinds))
    longest = len(stories[-1].kinds)
    if context is not None and longest > context:
        raise MinitxError(
            f"A story has {longest} tokens but the model's context is {context}; "
            "choose an easier grade or a model with a longer context."
        )
    while stories:
        rows = 1
        while rows < len(stories) and (rows + 1) * len(stories[rows].kinds) <= tokens:
            rows += 1
        yield pad(stories[:rows])
        stories = stories[rows:]


def pad(stories: list[Encoded]) -> Padded:
    B, T = len(stories), max(len(story.kinds) for story in stories)
    ids = np.full((B, T + 1), stories[0].ids[0], np.int64)
    kinds = np.full((B, T), PADDING, np.int8)
    for row, story in enumerate(stories):
        ids[row, : len(story.ids)] = story.ids
        kinds[row, : len(story.kinds)] = story.kinds
    return Padded(ids[:, :-1], ids[:, 1:], kinds, sum(story.nats for story in stories))


# Text --------------------------------------------------------------------------------------------


def context_of(model) -> int | None:
    """The context length of the model, or None if it is unknown."""
    return getattr(getattr(model, "config", None), "context", None)


def hops_name(hops: int) -> str:
    """The heading of a column of accuracies; 0 hops are counting questions."""
    return f"{hops} hop{'s' * (hops > 1)}" if hops else "counts"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
