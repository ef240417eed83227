"""How good a model is on stories: recall by kind and by hops, and loss against the best possible.

Teacher-forced: every story is read once, after ``<|endoftext|>``, and each token is compared with
what the model would have said there. No text is generated. Stories of similar length share a batch,
padded at the end, which a causal model does not notice.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np

from minitx.errors import MinitxError
from minitx.technique import blocks_of
from minitx.training.data import ORDINARY, PADDING, Encoder
from minitx.training.layerskip import record
from minitx.training.loss import token_losses
from minitx.training.stories import HOPS, KINDS, Story, guess_baselines, stories

ENTRIES = len(KINDS) + 1  # ordinary text, then each kind of answer


@dataclass
class Tally:
    """Sums over target tokens, by kind: index 0 is ordinary text, k + 1 is KINDS[k].

    Tallies of parts of the stories add up to the tally of all.
    """

    count: np.ndarray  # (ENTRIES,) tokens
    right: np.ndarray  # (ENTRIES,) tokens whose largest logit is the target
    loss: np.ndarray  # (ENTRIES,) float64 nats
    floor: float = 0.0  # nats of the choices in ordinary text: its least possible loss

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
        """Count tokens: logits (..., V); targets, kinds (...), where PADDING is left out."""
        real = kinds != PADDING
        logits, targets, kinds = logits[real], targets[real], kinds[real]
        self.count += np.bincount(kinds, minlength=ENTRIES)
        self.right += np.bincount(kinds[logits.argmax(-1) == targets], minlength=ENTRIES)
        losses = token_losses(logits, targets)
        self.loss += np.bincount(kinds, losses, minlength=ENTRIES)  # summed in float64


@dataclass(frozen=True)
class Report:
    """What ``evaluate`` found. All losses are nats a token."""

    by_kind: dict[str, float]  # accuracy of the answer tokens
    by_hops: dict[int, float]  # the same, kinds of equally many hops together (0: counts)
    answers: dict[str, int]  # answer tokens of each kind
    answer_loss: float
    loss: float  # of ordinary tokens
    floor: float  # the least possible: the stories' own entropy
    tokens: int  # ordinary tokens
    guess: dict[str, float]  # accuracy of the best guess that binds nothing, by kind

    @property
    def gap(self) -> float:
        """How far the loss of ordinary tokens is above the least possible."""
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
                f"answers      {self.answer_loss:.4f} nats a token",
                f"other text   {self.loss:.4f} nats a token; least possible {self.floor:.4f}, "
                f"gap {self.gap:+.4f} ({self.tokens} tokens)",
            ]
        )


def report(tally: Tally, guess: dict[str, float] | None = None) -> Report:
    """The tally as shares and means; kinds that never came are left out."""
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

    A model is anything that gives logits (B, T, V) for ids (B, T). batch_tokens: about how many
    tokens are run at once. Raises MinitxError for no stories, or one longer than the context.
    """
    model, read = getattr(model, "model", model), list(read)
    total = Tally.empty()
    for batch in batches(encode(tokenizer, read), context_of(model), batch_tokens):
        total.floor += batch.floor
        total.add(model(batch.ids), batch.targets, batch.kinds)
    return report(total, best_guess(read))


def exit_profile(model, tokenizer, read: Iterable[Story], batch_tokens: int = 4096) -> list[Report]:
    """One report for each depth 1 .. L: what final norm and head read in the hidden state after so
    many blocks, all recorded in one pass. The last is the report of ``evaluate``."""
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
    """The ``Report`` (or with ``depths`` the ``Profile``) of an LM on ``count`` held-out stories of
    a grade, always the same ones for one seed."""
    found = held_out(lm, count, grade, seed)
    if depths:
        return Profile(exit_profile(lm, lm.tokenizer, found))
    return evaluate(lm, lm.tokenizer, found)


def held_out(lm, count: int, grade="full", seed: int = 0) -> list[Story]:
    """So many evaluation stories of a grade, for an LM, which needs a tokenizer to read them."""
    if lm.tokenizer is None:
        raise MinitxError("This model has no tokenizer, so it cannot read stories.")
    if type(count) is not int or count < 1:
        raise MinitxError(f"The number of stories is {count!r}; a whole number >= 1 is needed.")
    return list(islice(stories("evaluation", grade, seed), count))


def best_guess(stories: Sequence[Story]) -> dict[str, float]:
    """For each kind of answer, the accuracy of the best of the readers that bind nothing."""
    return {kind: max(found.values()) for kind, found in guess_baselines(stories).items()}


# Batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """One story: n targets."""

    ids: list[int]  # n + 1 ids: <|endoftext|>, the story, <|endoftext|>
    kinds: list[int]  # the kind of each target, which is each id but the first
    nats: float  # of all choices in the story


@dataclass(frozen=True)
class Padded:
    """Stories side by side, the shorter ones padded at the end."""

    ids: np.ndarray  # (B, T) what the model reads
    targets: np.ndarray  # (B, T) what follows each
    kinds: np.ndarray  # (B, T) int8, the kind of each target
    floor: float  # nats of all choices in these stories


def encode(tokenizer, stories: Iterable[Story], longest: int | None = None) -> list[Encoded]:
    """The stories as ids; only the first ``longest`` targets of each, if given.

    A story that is cut counts the nats of its whole pieces, so its floor is then a little low.
    """
    encoder = Encoder(tokenizer)
    found = []
    for story in stories:
        ids, kinds, _ = encoder.story(story)
        nats = story.nats if longest is None else _nats(encoder, story, longest)
        found.append(Encoded([encoder.end, *ids[:longest]], kinds[:longest], nats))
    return found


def chains(tokenizer, split: str, grade, tokens: int) -> Iterator[Encoded]:
    """Endless chains of so many tokens: story after story, each behind ``<|endoftext|>``, the last
    one cut (as in training, see data.py)."""
    told = stories(split, grade, 0)
    while True:
        ids, kinds, nats = [], [], 0.0
        while len(kinds) < tokens:
            (story,) = encode(tokenizer, [next(told)], tokens - len(kinds))
            ids += story.ids[bool(ids) :]  # the first token is the end of the story before
            kinds += story.kinds
            nats += story.nats
        yield Encoded(ids, kinds, nats)


def _nats(encoder: Encoder, story: Story, longest: int) -> float:
    """What the pieces that lie within the first ``longest`` targets cost the best reader."""
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
        raise MinitxError("There are no stories to evaluate on; give at least one.")
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
    """The longest sequence that the model can read, or None if it does not say."""
    return getattr(getattr(model, "config", None), "context", None)


def hops_name(hops: int) -> str:
    """The heading of a column of accuracies; 0 stands for counts."""
    return f"{hops} hop{'s' * (hops > 1)}" if hops else "counts"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(rows: list[list[str]]) -> str:
    """Rows of words in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            word.rjust(w) if i else word.ljust(w) for i, (word, w) in enumerate(zip(row, widths))
        )
        for row in rows
    )
