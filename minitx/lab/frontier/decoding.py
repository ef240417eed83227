"""``minitx frontier decoding``: ways to decode beside each other, on the same prompts.

Each method (decoding_methods.py) continues the same prompts, the beginnings of held-out stories or
pieces of any text, greedily and at temperature 1 (prompt i with seed i), up to end-of-text. Counted
per new token, prefill included, and relative to plain decoding:

- calls: passes that compute logits, of the model and of others. A pass of the model that ends
  before its last block (a draft by its first layers) counts among the others;
- multiply-adds, bytes of weights and of the KV cache, by the ledger, second models included.

Timed: the first token, and tokens per second. All methods take turns, prompt by prompt; a ratio
is that of the sums over all prompts of a round, and the median over the rounds is reported with
minimum and maximum. Time is CPU time; with one BLAS thread (OPENBLAS_NUM_THREADS=1) on an idle
machine that equals wall time.

What outlives a sequence (caches of prefixes or answers) is cleared before each round. Then all
prompts are run, and by methods that have such a store once more: they have two rows, of prompts
that are new and of prompts that were seen before.

Greedy texts are compared with those of plain decoding. Sampled ones are not: an exact method draws
from the same distribution, but other samples.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from minitx import progress
from minitx.decode import Sampler, new_state
from minitx.errors import MinitxError, MinitxWarning
from minitx.lab.bench import elapsed, spread
from minitx.lab.compare import forget
from minitx.lab.evaluate import chains, story_end
from minitx.lab.frontier.decoding_methods import PLAIN, Way
from minitx.lab.frontier.knobs import chosen_methods
from minitx.lab.own_process import reason_of
from minitx.ledger import Entry, counting
from minitx.model import Transformer
from minitx.second_model import SMALL
from minitx.text import Text, as_text, first_ids, start_of, windows
from minitx.tree import Part, nbytes, walk
from minitx.values import need_count

SAMPLERS: dict[str, Callable[[int], Sampler]] = {  # of each prompt, by its number
    "greedy": lambda number: Sampler(),
    "temperature 1": lambda number: Sampler(temperature=1.0, seed=number),
}
GREEDY, SAMPLED = SAMPLERS


@dataclass(frozen=True)
class Plan:
    """What is measured, and on how much. length: tokens of each prompt; new: new tokens after it,
    at most; small: the second model of methods that need one."""

    methods: tuple[str, ...] | None = None  # None: all
    prompts: int = 8
    length: int = 32
    new: int = 64
    rounds: int = 5
    grade: str = "full"
    text: str | Text | None = None  # to take the prompts from, instead of stories
    small: str = SMALL


@dataclass(frozen=True)
class Figures:
    """A method on the prompts; relative to plain decoding where it says x."""

    tokens: int  # new ones, of all prompts
    calls: dict[str, float]  # per new token, by the model: see ``Calls``
    multiply_adds: float  # x, per new token
    weight_bytes: float  # x
    cache_bytes: float  # x
    same: int | None  # greedy texts that are those of plain decoding
    agreement: float | None  # share of the plain texts up to the first difference
    first: dict[str, float] = field(default_factory=dict)  # x sooner: median, lowest, highest
    speed: dict[str, float] = field(default_factory=dict)  # x tokens per second

    @property
    def tokens_per_call(self) -> float | None:
        """New tokens per pass of the model; None if it did not run."""
        return 1 / self.calls[MAIN] if self.calls.get(MAIN) else None

    @property
    def other_calls(self) -> float:
        """Per new token, of second models and of the model's first layers."""
        return sum(calls for name, calls in self.calls.items() if name != MAIN)


@dataclass(frozen=True)
class Row:
    """A method, greedy or sampled; ``seen``: on prompts that it has run before."""

    method: str
    sampling: str
    seen: bool
    exact: bool
    figures: Figures | None = None  # None: the reason says why
    reason: str = ""
    memory: float = 1.0  # bytes of all arrays, second models included, relative to plain
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.method}, seen before" if self.seen else self.method


@dataclass(frozen=True)
class Decoding:
    """All methods on one model."""

    model: str
    plan: Plan
    measured: str  # on what
    first: dict[str, float]  # seconds to the first token by plain decoding, by the sampling
    tokens_per_second: dict[str, float]  # of plain decoding
    rows: list[Row]
    rounds: int  # of timing, that were finished

    @property
    def stopped(self) -> bool:
        return self.rounds < self.plan.rounds

    def as_dict(self) -> dict:
        text = None if self.plan.text is None else as_text(self.plan.text).name
        found = asdict(replace(self, plan=replace(self.plan, text=text)))
        for said, row in zip(found["rows"], self.rows):
            if row.figures:
                said["figures"]["tokens_per_call"] = row.figures.tokens_per_call
        return found

    def __str__(self) -> str:
        from minitx.lab.frontier.decoding_report import as_text

        return as_text(self)

    def picture(self, path) -> None:
        from minitx.lab.frontier.decoding_report import picture

        picture(self, path)


def compare_decoding(
    dense, methods: Sequence[Way], plan: Plan = Plan(), bar: bool = True
) -> Decoding:
    """Compare the methods on an LM without techniques. MinitxError for a plan that does not fit."""
    check(dense, plan)
    chosen = chosen_methods(methods, plan.methods)
    if chosen[0] is not methods[0]:
        chosen = [methods[0], *chosen]  # plain, which all others are compared with
    prompts, measured = to_continue(dense, plan)
    runners = [Runner.of(dense, method.with_small(plan.small)) for method in chosen]
    steps = len(SAMPLERS) * (len(runners) + plan.rounds * len(prompts))
    found: list[Measured] = []
    with progress.bar(steps, "count", shown=bar) as shown:
        for name in SAMPLERS:
            one = Measured(name, prompts, plan.new)
            for runner in runners:
                shown.set_description(f"{name}: count {runner.method.name}")
                one.count(runner)
                shown.update()
            found.append(one)
        try:
            for _ in range(plan.rounds):
                for one in found:
                    shown.set_description(f"{one.sampling}: time")
                    one.time(shown.update)
        except KeyboardInterrupt:
            if not found[-1].rounds:
                raise  # no round was finished
    rounds = len(found[-1].rounds)
    return Decoding(
        dense.name,
        plan,
        measured,
        {one.sampling: one.plain_first(rounds) for one in found},
        {one.sampling: one.plain_speed(rounds) for one in found},
        [row for one in found for runner in runners for row in one.rows(runner, rounds)],
        rounds,
    )


# What is continued -------------------------------------------------------------------------------


def check(dense, plan: Plan) -> None:
    for name in ("prompts", "length", "new", "rounds"):
        need_count(getattr(plan, name), name)
    context = dense.model.config.context
    if plan.length + plan.new > context:
        raise MinitxError(
            "frontier decoding: length and new together must be at most the context of "
            f"{context}; got {plan.length} and {plan.new}."
        )


def to_continue(dense, plan: Plan) -> tuple[list[list[int]], str]:
    """The prompts, and what they are."""
    dense.need_tokenizer()
    if plan.text is None:
        endless = chains(dense.tokenizer, "evaluation", plan.grade, plan.length, story_end(dense))
        found = [next(endless).ids[: plan.length] for _ in range(plan.prompts)]
        return found, f"{plan.prompts} held-out stories of grade {plan.grade}"
    text, start = as_text(plan.text), start_of(dense)
    ids = first_ids(dense, text, plan.prompts * plan.length)
    found = [ids[: plan.length] for ids in windows(ids, plan.length, start)]
    whole = [ids for ids in found if len(ids) == plan.length][: plan.prompts] or found[:1]
    return whole, f"{len(whole)} piece{'s' * (len(whole) != 1)} of {text.name}"


def continuation(lm, prompt: list[int], new: int, choose: Sampler) -> Iterator[int]:
    """At most ``new`` tokens, the last of which may be end-of-text."""
    for token in lm.decode(lm.model, new_state(lm.model, prompt), prompt, choose, new):
        yield token
        if token in lm.model.config.eos:
            return


# Calls -------------------------------------------------------------------------------------------

MAIN = "model"  # the path of the model itself, below the LM


class Calls:
    """Counts the passes that compute logits, by the path of their model: ``model``, or that of a
    second one inside ``decode``. Called with the path of every part that begins to run.

    A pass runs blocks, and then the head. One that has not reached the last block of its model
    counts under "model, first layers". Prefill without logits does not count as a call."""

    def __init__(self, lm):
        self.counts: Counter = Counter()
        self.models: dict[str, str] = {}  # by the path of a block, or of the head
        self.last: set[str] = set()  # paths of last blocks
        self.ran: dict[str, bool] = {}  # since the last logits: was it the last block?
        for path, node in walk(lm):
            if isinstance(node, Transformer):
                self.add(path, node)

    def add(self, model: str, node: Transformer) -> None:
        self.models[f"{model}.head"] = model
        stacks = (found for found in walk(node, model) if hasattr(found[1], "blocks"))
        for path, stack in list(stacks)[:1]:
            blocks = [f"{path}.blocks.{i}" for i in range(len(stack.blocks))]
            self.models |= dict.fromkeys(blocks, model)
            self.last.add(blocks[-1])

    def __call__(self, path: str) -> None:
        model = self.models.get(path)
        if model is None:
            return
        if path != f"{model}.head":
            self.ran[model] = path in self.last
        elif model in self.ran:  # not twice for one pass, whose head may take its rows in pieces
            whole = self.ran.pop(model)
            self.counts[model if whole else f"{model}, first layers"] += 1


# Measuring ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """A method, applied to the model; lm is None where it does not fit: the reason says why."""

    method: Way
    lm: Part | None
    reason: str = ""
    memory: float = 1.0
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, dense, method: Way) -> "Runner":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MinitxWarning)
            try:
                lm, reason = method.apply(dense), ""
            except Exception as error:
                lm, reason = None, reason_of(error)
        notes = (str(w.message) for w in caught if issubclass(w.category, MinitxWarning))
        memory = 1.0 if lm is None else nbytes(lm) / nbytes(dense)
        return cls(method, lm, reason, memory, tuple(dict.fromkeys(notes)))

    @property
    def stores(self) -> bool:
        """Does anything outlive a sequence?"""
        return any(type(node).forget is not Part.forget for _, node in walk(self.lm))

    @property
    def passes(self) -> tuple[bool, ...]:
        """Prompts are new, or were seen before."""
        return (False, True) if self.stores else (False,)


@dataclass(frozen=True)
class Work:
    """What a pass over all prompts takes."""

    texts: list[list[int]]
    entry: Entry
    calls: Counter

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))

    def per_token(self, name: str) -> float:
        return getattr(self.entry, name) / self.tokens


class Measured:
    """All that is measured with one way of sampling."""

    def __init__(self, sampling: str, prompts: Sequence[list[int]], new: int):
        self.sampling, self.prompts, self.new = sampling, prompts, new
        self.runners: dict[str, Runner] = {}  # those that run, by the name of their method
        self.work: dict[tuple[str, bool], Work] = {}  # by the method, and whether prompts were seen
        self.reasons: dict[str, str] = {}
        # Of each round, the sums of (seconds to the first token, all seconds, tokens).
        self.rounds: list[dict[tuple[str, bool], tuple[float, float, int]]] = []

    def run(self, lm, number: int) -> Iterator[int]:
        choose = SAMPLERS[self.sampling](number)
        return continuation(lm, self.prompts[number], self.new, choose)

    def count(self, runner: Runner) -> None:
        name = runner.method.name
        if runner.lm is None:
            self.reasons[name] = runner.reason
            return
        try:
            forget(runner.lm)
            for seen in runner.passes:
                self.work[name, seen] = self.work_of(runner.lm)
            self.runners[name] = runner
        except Exception as error:
            if name == PLAIN:
                raise
            self.reasons[name] = reason_of(error)

    def work_of(self, lm) -> Work:
        with counting(lm) as counts:
            counts.entered = calls = Calls(lm)
            texts = [list(self.run(lm, number)) for number in range(len(self.prompts))]
        return Work(texts, counts.total(), calls.counts)

    def time(self, tick: Callable) -> None:
        """A round: all methods in turn on each prompt; then those with a store once more, and plain
        decoding beside them. ``tick()`` is called after every prompt of the first time."""
        sums: dict[tuple[str, bool], tuple[float, float, int]] = {}
        for runner in self.runners.values():
            forget(runner.lm)
        stored = {name: r for name, r in self.runners.items() if name == PLAIN or r.stores}
        for seen, runners in ((False, self.runners), (True, stored)):
            if len(runners) < 2 and seen:
                break  # nothing has a store
            for number in range(len(self.prompts)):
                for name, runner in runners.items():
                    found = timed(self.run(runner.lm, number))
                    before = sums.get((name, seen), (0.0, 0.0, 0))
                    sums[name, seen] = tuple(a + b for a, b in zip(before, found))
                if not seen:
                    tick()
        self.rounds.append(sums)

    def plain_first(self, rounds: int) -> float:
        """Seconds to the first token of a prompt."""
        first = spread([one[PLAIN, False][0] for one in self.rounds[:rounds]])
        return first["median"] / len(self.prompts)

    def plain_speed(self, rounds: int) -> float:
        """Tokens per second."""
        speeds = [one[PLAIN, False] for one in self.rounds[:rounds]]
        return spread([tokens / seconds for _, seconds, tokens in speeds])["median"]

    def rows(self, runner: Runner, rounds: int) -> Iterator[Row]:
        method = runner.method
        about = dict(exact=method.exact, memory=runner.memory, notes=runner.notes)
        if method.name not in self.runners:
            reason = self.reasons[method.name]
            yield Row(method.name, self.sampling, False, reason=reason, **about)
            return
        for seen in runner.passes:
            figures = self.figures(method.name, seen, self.rounds[:rounds])
            yield Row(method.name, self.sampling, seen, figures=figures, **about)

    def figures(self, name: str, seen: bool, rounds: Sequence[dict]) -> Figures:
        own, plain = self.work[name, seen], self.work[PLAIN, False]
        costs = ("multiply_adds", "weight_bytes", "cache_bytes")
        pairs = [(one[PLAIN, seen], one[name, seen]) for one in rounds if (PLAIN, seen) in one]
        greedy = self.sampling == GREEDY
        return Figures(
            tokens=own.tokens,
            calls={model: n / own.tokens for model, n in own.calls.items()},
            **{cost: own.per_token(cost) / max(plain.per_token(cost), 1) for cost in costs},
            same=sum(a == b for a, b in zip(own.texts, plain.texts)) if greedy else None,
            agreement=agreement(own.texts, plain.texts) if greedy else None,
            first=spread([a[0] / b[0] for a, b in pairs]),
            speed=spread([a[1] / a[2] / (b[1] / b[2]) for a, b in pairs]),
        )


def timed(tokens: Iterator[int]) -> tuple[float, float, int]:
    """CPU seconds to the first token, all CPU seconds, and the number of tokens."""
    began = time.process_time()
    next(tokens)
    first = elapsed(time.process_time, began)
    count = 1 + sum(1 for _ in tokens)
    return first, elapsed(time.process_time, began), count


def agreement(texts: Sequence[list[int]], plain: Sequence[list[int]]) -> float:
    """The share of the plain texts' tokens that come before the first difference."""
    same = 0
    for ours, theirs in zip(texts, plain):
        pairs = enumerate(zip(ours, theirs))
        same += next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return same / sum(map(len, plain))
