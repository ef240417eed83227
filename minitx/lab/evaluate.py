"""The quality of a model on stories: accuracy by kind of question and by hops, and loss compared
with the entropy of the text.

Teacher forcing: every story is read once, after ``<|endoftext|>``, and the model's prediction is
compared with each token. No text is generated. Stories of similar length share a batch, padded at
the end, which does not affect a causal model. A model with a technique that decides per step reads
one story after another as generation would, and any other text is read in windows (reading.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from minitx.calibration import STORIES
from minitx.errors import MinitxError
from minitx.lab.layout import table
from minitx.pictures.heatmap import Heat
from minitx.pictures.output import write_picture
from minitx.progress import bar
from minitx.technique import blocks_of, decides
from minitx.text import Text, start_of
from minitx.training.data import END, ORDINARY, PADDING, StoryEncoder, end_id
from minitx.training.layerskip import record
from minitx.training.loss import token_losses
from minitx.training.stories import HOPS, KINDS, Story, first_stories, guess_baselines, stories

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

    def columns(self) -> dict[str, str]:
        """What a table shows of it, by heading."""
        found = {"loss": f"{self.loss:.4f}", "above entropy": f"{self.gap:.4f}"}
        return found | self.accuracies()

    def accuracies(self) -> dict[str, str]:
        """Right answers, by heading."""
        return {hops_name(hops): percent(share) for hops, share in self.by_hops.items()}

    @property
    def accuracy(self) -> float:
        """Of all kinds of answers together."""
        right = sum(self.by_kind[kind] * n for kind, n in self.answers.items())
        return right / max(sum(self.answers.values()), 1)

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


def evaluate(
    model,
    tokenizer,
    read: Iterable[Story],
    batch_tokens: int = 4096,
    end: int | None = None,
    shown: bool = False,
) -> Report:
    """Accuracy and loss of a model (or the ``model`` of an LM) on stories.

    model: any callable from ids (B, T) to logits (B, T, V). batch_tokens: the approximate size of a
    batch in tokens. end: the token around each story, default ``<|endoftext|>``. shown: a progress
    bar. Raises MinitxError for no stories, or one longer than the context.
    """
    model, read = getattr(model, "model", model), list(read)
    total, encoded = Tally.empty(), encode(tokenizer, read, end=end)
    for batch in shown_batches(encoded, context_of(model), batch_tokens, shown):
        total.floor += batch.floor
        total.add(model(batch.ids), batch.targets, batch.kinds)
    return report(total, best_guess(read))


def exit_profile(
    model,
    tokenizer,
    read: Iterable[Story],
    batch_tokens: int = 4096,
    end: int | None = None,
    shown: bool = False,
) -> list[Report]:
    """One report per depth 1 .. L: the final norm and head applied to the hidden state after that
    many blocks, all recorded in one pass. The last one is the report of ``evaluate``."""
    model, read = getattr(model, "model", model), list(read)
    recorded, hidden = record(model)
    totals, encoded = [Tally.empty() for _ in blocks_of(model)], encode(tokenizer, read, end=end)
    for batch in shown_batches(encoded, context_of(model), batch_tokens, shown):
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

    depths: list  # of Report, or of TextReport (reading.py)

    def __str__(self) -> str:
        rows = [["exit after", *self.depths[-1].columns()]]
        for depth, r in enumerate(self.depths, 1):
            rows.append([f"{depth} of {len(self.depths)}", *r.columns().values()])
        parts = [str(self.depths[-1]), table(rows), *filter(None, [self.heat()])]
        return "\n\n".join(map(str, parts))

    def heat(self) -> Heat | None:
        """The map of right answers; None for a text, which has no answers."""
        names = [f"{depth} of {len(self.depths)}" for depth in range(1, len(self.depths) + 1)]
        return heat_of("exit after", names, self.depths)

    def picture(self, path) -> None:
        """The map as an SVG or PNG file (pictures/output.py); MinitxError if there is none."""
        write_picture(need_heat(self.heat()).draw(), path)

    def as_dict(self) -> dict:
        return self.depths[-1].as_dict() | {"depths": [r.as_dict() for r in self.depths]}


def evaluate_model(
    lm, count: int = 500, grade="full", depths: bool = False, seed: int = 0, shown: bool = False
):
    """The ``Report`` (with ``depths``, the ``Profile``) of an LM on ``count`` held-out stories of a
    grade; a seed always gives the same stories. shown: a progress bar."""
    from minitx.lab.reading import warn_if_calibrated_otherwise, warn_if_stories_are_unknown

    read, end = held_out(lm, count, grade, seed), story_end(lm)
    warn_if_calibrated_otherwise(lm, STORIES)
    if depths:
        found = Profile(exit_profile(lm, lm.tokenizer, read, end=end, shown=shown))
    elif decides(lm.model) == "token":
        found = evaluate(lm, lm.tokenizer, read, end=end, shown=shown)
    else:
        found = _evaluate_as_generated(lm, read, end, shown)
    warn_if_stories_are_unknown(STORIES, found.depths[-1] if depths else found)
    return found


def _evaluate_as_generated(lm, read: list[Story], end: int, shown: bool) -> Report:
    """For a technique that decides per step: each story as generation would run it."""
    from minitx.lab.reading import add_up

    total, encoded = Tally.empty(), encode(lm.tokenizer, read, end=end)
    need_context(encoded, lm.model.config.context)
    for story in bar(encoded, "evaluate", unit="story", shown=shown):
        add_up(total, lm, story)
    return report(total, best_guess(read))


def evaluate_text(
    lm, text: str | Text, tokens: int = 4096, depths: bool = False, shown: bool = False
):
    """The ``TextReport`` (with ``depths``, a ``Profile``) of an LM on the first ``tokens`` tokens
    of a text. shown: a progress bar."""
    from minitx.lab.reading import add_up, pieces, text_to_read, warn_if_calibrated_otherwise

    material = text_to_read(lm, text, tokens)
    warn_if_calibrated_otherwise(lm, material.source)
    texts = bar(material.texts, "evaluate", unit="window", shown=shown)
    if not depths:
        total = Tally.empty()
        for one in texts:
            add_up(total, lm, one)
        return material.report(total)
    recorded, hidden = record(lm.model)
    totals = [Tally.empty() for _ in blocks_of(lm)]
    for one in texts:
        hidden.clear()
        recorded.hidden(one.ids[:-1])
        targets, kinds = np.array(one.ids[1:]), np.array(one.kinds)
        for total, x in zip(totals, hidden):
            for some in pieces(len(x), lm.model.config.vocab_size):
                logits = lm.model.head(lm.model.norm(x[some]))
                total.add(logits, targets[some], kinds[some])
    return Profile([material.report(total) for total in totals])


def story_end(lm) -> int:
    """The token before and after each story: ``<|endoftext|>`` if the tokenizer has it, else the
    model's own beginning- or end-of-text token."""
    try:
        return end_id(lm.tokenizer)
    except MinitxError:
        if start := start_of(lm):
            return start[0]
        raise MinitxError(
            f"Stories are read after {END} or another beginning- or end-of-text token, and this "
            "model has none; measure it on text: --text FILE."
        ) from None


def held_out(lm, count: int, grade="full", seed: int = 0) -> list[Story]:
    """``count`` evaluation stories of a grade, for an LM with a tokenizer."""
    if lm.tokenizer is None:
        raise MinitxError(
            "This model has no tokenizer, so it cannot read stories; load it with tokenizer=PATH."
        )
    if type(count) is not int or count < 1:
        raise MinitxError(f"stories must be an integer >= 1, got {count!r}.")
    return first_stories("evaluation", grade, seed, count)


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


def encode(
    tokenizer, stories: Iterable[Story], longest: int | None = None, end: int | None = None
) -> list[Encoded]:
    """The stories as ids; only the first ``longest`` targets of each, if given. end: the token
    around each story, default ``<|endoftext|>``.

    A truncated story counts the entropy of its whole pieces only, so its floor is slightly low.
    """
    encoder, stories = StoryEncoder(tokenizer, end), iter(stories)
    found = []
    for story in stories:
        ids, kinds, _ = encoder.story(story)
        if not found and not encoder.splits_at_pieces(story, ids):
            return _encode_whole(encoder, [story, *stories], longest)
        nats = story.nats if longest is None else _nats(encoder, story, longest)
        found.append(Encoded([encoder.end, *ids[:longest]], kinds[:longest], nats))
    return found


def _encode_whole(encoder: StoryEncoder, stories, longest: int | None) -> list[Encoded]:
    """For a tokenizer whose tokens reach across answers: all tokens count as ordinary text."""
    found = []
    for story in stories:
        ids = [*encoder.tokenizer.encode(story.text, special=False), encoder.end]
        share = min((longest or len(ids)) / len(ids), 1)  # of the entropy
        ids = [encoder.end, *ids[:longest]]
        found.append(Encoded(ids, [ORDINARY] * (len(ids) - 1), share * story.nats))
    return found


def chains(tokenizer, split: str, grade, tokens: int, end: int | None = None) -> Iterator[Encoded]:
    """An endless stream of chains of ``tokens`` tokens: stories one after another, each preceded by
    ``<|endoftext|>``, the last one truncated (as in training/data.py)."""
    endless = stories(split, grade, 0)
    while True:
        ids, kinds, nats = [], [], 0.0
        while len(kinds) < tokens:
            (story,) = encode(tokenizer, [next(endless)], tokens - len(kinds), end)
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


def shown_batches(
    stories: list[Encoded], context: int | None, tokens: int, shown: bool
) -> Iterator[Padded]:
    """``batches``, with a progress bar of the stories if it is to be shown."""
    with bar(len(stories), "evaluate", unit="story", shown=shown) as progress:
        for batch in batches(stories, context, tokens):
            yield batch
            progress.update(len(batch.ids))


def batches(stories: list[Encoded], context: int | None, tokens: int) -> Iterable[Padded]:
    """Batches of at most about ``tokens`` tokens, from the shortest stories to the longest."""
    if not stories:
        raise MinitxError("Expected at least one story to evaluate on, got none.")
    need_context(stories, context)
    stories = sorted(stories, key=lambda story: len(story.kinds))
    while stories:
        rows = 1
        while rows < len(stories) and (rows + 1) * len(stories[rows].kinds) <= tokens:
            rows += 1
        yield pad(stories[:rows])
        stories = stories[rows:]


def need_context(stories: list[Encoded], context: int | None) -> None:
    """MinitxError for a story that is longer than the context."""
    longest = max(len(story.kinds) for story in stories)
    if context is not None and longest > context:
        raise MinitxError(
            f"A story has {longest} tokens but the model's context is {context}; "
            "choose an easier grade or a model with a longer context."
        )


def pad(stories: list[Encoded]) -> Padded:
    B, T = len(stories), max(len(story.kinds) for story in stories)
    ids = np.full((B, T + 1), stories[0].ids[0], np.int64)
    kinds = np.full((B, T), PADDING, np.int8)
    for row, story in enumerate(stories):
        ids[row, : len(story.ids)] = story.ids
        kinds[row, : len(story.kinds)] = story.kinds
    return Padded(ids[:, :-1], ids[:, 1:], kinds, sum(story.nats for story in stories))


# Text --------------------------------------------------------------------------------------------


def heat_of(corner: str, names: Sequence[str], reports: Sequence) -> Heat | None:
    """Right answers by hops, a row for each report; None if they have no answers. corner: what the
    rows are."""
    hops = list(getattr(reports[0], "by_hops", ()))
    if not hops:
        return None
    values = [[r.by_hops[h] for h in hops] for r in reports]
    title = "Right answers, per cent, by the facts that they need"
    return Heat(title, names, [hops_name(h) for h in hops], values, corner)


def need_heat(heat: Heat | None) -> Heat:
    if heat is None:
        raise MinitxError(
            "A map of right answers needs stories with questions, and what was read has none; "
            "leave out --svg and --png."
        )
    return heat


def context_of(model) -> int | None:
    """The context length of the model, or None if it is unknown."""
    return getattr(getattr(model, "config", None), "context", None)


def hops_name(hops: int) -> str:
    """The heading of a column of accuracies; 0 hops are counting questions."""
    return f"{hops} hop{'s' * (hops > 1)}" if hops else "counts"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
