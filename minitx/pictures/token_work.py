"""Which tokens each block worked on, and how much: observed while a text is generated.

    work = generate_observed(lm, "Once upon a time", 40, temperature=0)
    work.of("model", 3, position=7)                # what block 3 spent on the token at position 7

Nothing here knows any technique. An open ledger reports every call of a part and all of its work
(ledger.Watcher). A part of a block gets the block's ``Layer``, and ``layer.tokens`` says which
tokens it is running, so the work is theirs; what is counted for several tokens together is shared
evenly among them. Which token is at a position is known from the embedding, which gets the ids.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minitx.ledger import Ledger, Watcher, counting
from minitx.lm import LM
from minitx.state import Layer
from minitx.technique import blocks_of

Token = tuple[int, int]  # (position, id); (-1, -1) is padding
PADDING = (-1, -1)


@dataclass
class Spent:
    """The multiply-adds that one block spent on one token.

    attn, ffn: in these parts of the block; kv: in its attention, only to backfill the KV cache;
    other: in the block itself (a router). later: how much of it all in a later step than the one
    in which the token was embedded. additions: instead of multiply-adds, by kind ("attn", ...).
    """

    attn: float = 0.0
    kv: float = 0.0
    ffn: float = 0.0
    other: float = 0.0
    later: float = 0.0
    additions: Counter = field(default_factory=Counter)

    @property
    def total(self) -> float:
        return self.attn + self.kv + self.ffn + self.other


@dataclass
class Round:
    """The tokens that a decoding loop yields without any work in between. ``proposed``: how many
    of them the model had run before, as guesses, so they were accepted. rejected: other guesses
    that were run in this round, in order."""

    first: int  # position of the first of them
    ids: list[int]
    proposed: int
    rejected: list[Token]


@dataclass
class TokenWork:
    """What ``generate_observed`` saw. blocks: Spent by (model, block, token). models: the number of
    blocks of "model", and of each other model that ran, by its path ("decode.draft")."""

    prompt: list[int]
    ids: list[int]  # prompt and completion
    rounds: list[Round]
    blocks: dict[tuple[str, int, Token], Spent]
    models: dict[str, int]
    ledger: Ledger = field(repr=False)

    def of(self, model: str, block: int, position: int) -> Spent:
        """What a block spent on the token of the text at this position."""
        return self.blocks.get((model, block, (position, self.ids[position])), Spent())

    def rejected(self) -> dict[int, list[int]]:
        """By position, the ids that were run there and are not in the text."""
        found: dict[int, set[int]] = {}
        for _, _, (position, id) in self.blocks:
            if (position, id) != PADDING and self.ids[position : position + 1] != [id]:
                found.setdefault(position, set()).add(id)
        return {position: sorted(ids) for position, ids in sorted(found.items())}


def generate_observed(lm: LM, prompt, max_new_tokens: int | None = None, **options) -> TokenWork:
    """Generate a completion (arguments as for ``LM.tokens``) and observe each block's work."""
    ids = lm.encode(prompt)
    watcher = TokenWatcher()
    with counting(lm, watcher) as ledger:
        tokens = lm.tokens(ids, max_new_tokens, **options)
        new, rounds = in_rounds(tokens, len(ids), watcher)
    return TokenWork(ids, ids + new, rounds, watcher.blocks, models_of(lm, watcher), ledger)


def run_observed(lm: LM, prompt: Sequence[int], ids: Sequence[int]) -> TokenWork:
    """Plain decoding of a known text: the prompt in one step, then one token after another, except
    for the last one, after which nothing is predicted."""
    watcher, state = TokenWatcher(), lm.model.new_state()
    state.prompt = len(prompt)
    with counting(lm, watcher) as ledger:
        steps = [list(prompt), *([id] for id in ids[len(prompt) : -1])]
        for step in steps if len(ids) > len(prompt) else []:
            lm.model.next_logits(step, state)
    models = models_of(lm, watcher)
    return TokenWork(list(prompt), list(ids), [], watcher.blocks, models, ledger)


def models_of(lm: LM, watcher: "TokenWatcher") -> dict[str, int]:
    """The main model and the others that ran, with the number of their blocks."""
    found = {MAIN: len(blocks_of(lm))}
    for model, block, _ in watcher.blocks:
        found[model] = max(found.get(model, 0), block + 1)
    return found


def in_rounds(tokens, position: int, watcher: "TokenWatcher") -> tuple[list[int], list[Round]]:
    """All tokens of the loop, and the same in rounds. position: of the first one."""
    new, guessed, rounds, before = [], [], [], -1
    seen: set[Token] = set()
    for id in tokens:
        if watcher.calls != before:  # the model has worked since the last token
            rounds.append(Round(position + len(new), [], 0, sorted(watcher.run)))
            seen, before = watcher.run, watcher.calls
            watcher.run = {}
        token = (position + len(new), id)
        rounds[-1].ids.append(id)
        guessed.append(token in seen)
        new.append(id)
    text = dict(enumerate(new, position))
    for one in rounds:
        at = one.first - position
        # The last token of a round is sampled, even if it was a guess on another branch. The text
        # may end inside the last round.
        last = at + len(one.ids) - (one is not rounds[-1])
        one.proposed = sum(guessed[at:last])
        one.rejected = [(p, id) for p, id in one.rejected if p in text and text[p] != id]
    return new, rounds


# Watching -----------------------------------------------------------------------------------------

MAIN = "model"


@dataclass
class Call:
    """A method that is running: what it was given."""

    layer: Layer | None
    x: np.ndarray | None  # its first array
    backfills: bool
    rows: list[Token] | None = None  # of x, once known
    tokens: object = None  # layer.tokens when ``rows`` were found


class TokenWatcher(Watcher):
    """Adds up what each block spends on each token."""

    def __init__(self):
        self.blocks: dict[tuple[str, int, Token], Spent] = {}
        self.calls = 0  # reports of work so far
        self.run: dict[Token, None] = {}  # tokens run since the last round, in order
        self.running: list[Call] = []
        self.steps: dict[str, Step] = {}  # by model

    def enter(self, path: str, method: str, arguments: tuple) -> None:
        layer = next((a for a in arguments if isinstance(a, Layer)), None)
        x = next((a for a in arguments if isinstance(a, np.ndarray)), None)
        if path.endswith("embed") and x is not None and x.dtype.kind in "iu":
            self.embedded(model_of(path), x, arguments[-1])
        within = bool(self.running) and self.running[-1].backfills
        self.running.append(Call(layer, x, within or method == "backfill"))

    def leave(self) -> None:
        self.running.pop()

    def embedded(self, model: str, ids, positions) -> None:
        """A step of this model begins, with the ids (..., T) at these positions."""
        if isinstance(positions, slice):
            positions = np.arange(positions.start, positions.stop)
        self.steps.setdefault(model, Step()).begin(ids, np.asarray(positions))

    def spend(self, path: str, multiply_adds: int, additions: int) -> None:
        self.calls += 1
        place = block_of(path)
        if place is None or not (multiply_adds or additions):
            return
        model, block, part = place
        step = self.steps.setdefault(model, Step())
        rows = self.rows_in_hand(step)
        kind = part if part in ("attn", "ffn") else "other"
        if kind == "attn" and self.running[-1].backfills:
            kind = "kv"
        for token in rows:
            self.run[token] = None
            spent = self.blocks.setdefault((model, block, token), Spent())
            setattr(spent, kind, getattr(spent, kind) + multiply_adds / len(rows))
            spent.additions[kind] += additions / len(rows)
            if token not in step.now:
                spent.later += multiply_adds / len(rows)

    def rows_in_hand(self, step: "Step") -> list[Token]:
        """The tokens that the running method works on: one for each row of its input."""
        at = len(self.running) - 1
        while at >= 0 and self.running[at].layer is None:
            at -= 1
        if at < 0:
            return list(step.now) or [PADDING]
        rows = self.rows_of_layer(at, step)
        for call in self.running[at + 1 :]:  # parts that get some rows of x, without the layer
            rows = some_rows(call.x, self.running[at].x, rows) or rows
        return rows

    def rows_of_layer(self, at: int, step: "Step") -> list[Token]:
        """The tokens of the layer that this call was given. If it got fewer rows than that, they
        are looked for in what the calls around it were given."""
        call = self.running[at]
        if call.rows is None or call.tokens is not call.layer.tokens:
            call.tokens = call.layer.tokens
            call.rows = step.tokens_at(call.tokens)
            if call.x is not None and call.x.ndim < 3 and row_count(call.x) < len(call.rows):
                around = (i for i in range(at - 1, -1, -1) if self.running[i].layer is call.layer)
                matches = (
                    some_rows(call.x, self.running[i].x, self.rows_of_layer(i, step))
                    for i in around
                )
                call.rows = next(filter(None, matches), call.rows)
        return call.rows


class Step:
    """The current step of one model: which tokens it embedded, and what is at each position."""

    def __init__(self):
        self.positions = np.empty(0, int)
        self.now: dict[Token, None] = {}
        self.rows: list[Token] = []
        self.id_at: dict[int, int] = {}

    def begin(self, ids, positions) -> None:
        """ids (..., T), positions (T,) or, in a padded batch, (B, T)."""
        self.positions = positions
        places = np.broadcast_to(positions, ids.shape).ravel().tolist()
        self.rows = list(zip(places, ids.ravel().tolist()))
        self.now = dict.fromkeys(self.rows)
        self.id_at.update(self.rows)

    def tokens_at(self, tokens) -> list[Token]:
        """The tokens of a ``state.Tokens``. Several may share a position (in a tree of guesses), so
        those of the whole step are taken as they were embedded."""
        if tokens.start is None and np.array_equal(tokens.array, self.positions):
            return self.rows
        places = np.ravel(tokens.own).tolist()
        return [(p, self.id_at.get(p, -1)) if p >= 0 else PADDING for p in places]


def row_count(x) -> int:
    return 1 if x.ndim < 2 else x.shape[-2]


def some_rows(x, whole, tokens: list[Token]) -> list[Token]:
    """The tokens of x (n, D) or (D,), if its rows are some of those of ``whole`` (T, D), which
    belong to ``tokens``, in the same order; none if they are not."""
    if x is None or whole is None or x is whole or x.ndim > 2 or whole.ndim != 2:
        return []
    if x.shape[-1:] != whole.shape[-1:] or row_count(x) >= len(tokens) or len(whole) != len(tokens):
        return []
    found, at = [], 0
    for row in x.reshape(-1, x.shape[-1]):
        equal = np.flatnonzero((whole[at:] == row).all(-1))
        if not len(equal):
            return []
        at += int(equal[0]) + 1
        found.append(tokens[at - 1])
    return found


# Paths --------------------------------------------------------------------------------------------


def block_of(path: str) -> tuple[str, int, str] | None:
    """``model.stack.blocks.3.inner.ffn.down`` -> ("model", 3, "ffn"); None outside the blocks."""
    words = path.split(".")
    if "blocks" not in words:
        return None
    at = words.index("blocks")
    below = [word for word in words[at + 2 :] if word != "inner"]
    return model_of(path), int(words[at + 1]), below[0] if below else ""


def model_of(path: str) -> str:
    """The path of the model that a block, or an embedding, belongs to."""
    words = path.split(".")
    end = words.index("blocks") if "blocks" in words else len(words) - 1
    while end > 1 and words[end - 1] in ("stack", "inner"):
        end -= 1
    return ".".join(words[:end])
