"""What a few rows cost at once: the time of one pass over several tokens, relative to one token.

    python -m minitx.lab.rows                            the three smaller shapes
    python -m minitx.lab.rows 288x6 576x30 --rows 1,5    the larger ones take more memory
    python -m minitx.lab.rows --batch                    one token each of several sequences

Speculative decoding verifies its draft tokens in one pass, and a batch decodes one token of each
sequence in one pass: both pay off as far as several rows cost less than several times one row.
A pass computes the logits of all its rows, after a KV cache of ``cached`` tokens, which it is
rewound to. The weights are random, in the shapes of ``minitx bench``, that of ``stories`` and that
of SmolLM2-135M.

The numbers of rows take turns (1 2 3 ... 1 2 3 ...), each for ``least`` seconds, on one BLAS
thread. A time is the median over the rounds, a ratio the median of the ratios within a round, with
minimum and maximum. Time is CPU time, which on an idle machine equals wall time.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from minitx import progress
from minitx.build import random_model
from minitx.config import Config
from minitx.errors import MinitxError, abbreviate, one_of
from minitx.exit_status import run_module
from minitx.lab.bench import SEED, SHAPES, llama, one_thread, run_again, spread
from minitx.lab.layout import fit, table
from minitx.memory_layout import to_column_major
from minitx.model import Transformer
from minitx.values import between, need_integer

SMALL, MIDDLE, LARGE = SHAPES
STORIES = llama(128, 8, 4, 2, 352, 1022)
SMOLLM2 = llama(576, 30, 9, 3, 1536, 49152)
KNOWN = {f"{c.width}x{c.layers}": c for c in (SMALL, STORIES, MIDDLE, LARGE, SMOLLM2)}
BY_DEFAULT = ("64x5", "128x8", "192x8")


@dataclass(frozen=True)
class Plan:
    """rows: numbers of rows in a pass, of which the first is what the others are compared with.
    batch: the rows are sequences instead of tokens. least: seconds of each turn."""

    rows: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 16)
    cached: int = 100
    batch: bool = False
    rounds: int = 7
    least: float = 0.05


@dataclass(frozen=True)
class Price:
    """The seconds of a pass, in each round, by its number of rows."""

    config: Config
    seconds: dict[int, list[float]]

    @property
    def one(self) -> list[float]:
        return next(iter(self.seconds.values()))

    def ratio(self, rows: int) -> dict[str, float]:
        """To one row: median, lowest and highest."""
        return spread([several / one for several, one in zip(self.seconds[rows], self.one)])

    def as_dict(self) -> dict:
        ratios = {rows: self.ratio(rows) for rows in self.seconds}
        return {"config": asdict(self.config), "seconds": self.seconds, "ratio": ratios}


def prices(configs: Sequence[Config], plan: Plan = Plan(), bar: bool = True) -> list[Price]:
    """Measure each shape. MinitxError if the plan does not fit the context."""
    for config in configs:
        if plan.cached + max(plan.rows) > config.context:
            raise MinitxError(
                f"rows: cached and rows together must be at most the context of {config.context}; "
                f"got {plan.cached} and {max(plan.rows)}."
            )
    with progress.bar(len(configs) * (plan.rounds + 1), "rows", "round", shown=bar) as shown:
        return [measure(config, plan, shown.update) for config in configs]


def measure(config: Config, plan: Plan, tick: Callable) -> Price:
    """``tick()`` is called after the warm-up and after every round."""
    model = to_column_major(random_model(config, SEED))
    passes = {rows: Pass(model, rows, plan) for rows in plan.rows}
    for one in passes.values():
        one.seconds(0)
    tick()
    seconds: dict[int, list[float]] = {rows: [] for rows in plan.rows}
    for _ in range(plan.rounds):
        for rows, one in passes.items():
            seconds[rows].append(one.seconds(plan.least))
        tick()
    return Price(config, seconds)


class Pass:
    """A pass of the model over some rows, again and again at the same position."""

    def __init__(self, model: Transformer, rows: int, plan: Plan):
        shape = (rows, plan.cached + 1) if plan.batch else (plan.cached + rows,)
        ids = np.random.default_rng(SEED).integers(0, model.config.vocab_size, shape)
        self.model, self.cached, self.state = model, plan.cached, model.new_state()
        model.hidden(ids[..., : plan.cached], self.state)
        self.ids = ids[..., plan.cached :]

    def seconds(self, least: float) -> float:
        """CPU seconds of one pass, averaged over at least ``least`` seconds of passes. Never 0."""
        runs, spent = 0, 0.0
        while not spent or spent < least:
            began = time.process_time()
            self.model(self.ids, self.state)
            spent += time.process_time() - began
            self.state.rewind(self.cached)
            runs += 1
        return spent / runs


def as_text(found: list[Price], plan: Plan) -> str:
    first = "one row" if plan.rows[0] == 1 else f"{plan.rows[0]} rows"
    rows = [["shape", first, *(f"{n} rows" for n in plan.rows[1:])]]
    for price in found:
        c, ms = price.config, spread([1e3 * s for s in price.one])
        ratios = [price.ratio(n) for n in plan.rows[1:]]
        middle = [f"{ms['median']:.3g} ms", *(f"{r['median']:.2f}x" for r in ratios)]
        rows.append([f"{c.width} x {c.layers}, {c.vocab_size:,}", *middle])
        ends = [f"{ms['lowest']:.3g}-{ms['highest']:.3g}"]
        ends += [f"{r['lowest']:.2f}-{r['highest']:.2f}" for r in ratios]
        rows.append(["", *ends])
    what = "one token each of several sequences" if plan.batch else "several tokens"
    title = (
        f"One pass over {what}, after {plan.cached} cached tokens, relative to {first} (below: "
        f"lowest and highest of {plan.rounds} rounds); one thread, CPU time."
    )
    return f"{fit(title)}\n\n{table(rows)}"


def main(words=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.rows",
        description="The time of one pass over several tokens, relative to one token.",
    )
    shapes = f"width x layers: {', '.join(KNOWN)} (default: {' '.join(BY_DEFAULT)})"
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=shapes)
    numbers = ",".join(map(str, Plan.rows))
    parser.add_argument("--rows", default=numbers, metavar="N,N", help=f"default: {numbers}")
    text = "tokens in the KV cache (default: %(default)s)"
    parser.add_argument("--cached", type=int, default=Plan.cached, metavar="N", help=text)
    text = "rows are sequences of a batch, instead of tokens of one sequence"
    parser.add_argument("--batch", action="store_true", help=text)
    text = "default: %(default)s"
    parser.add_argument("--rounds", type=int, default=Plan.rounds, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given, words))


def run(given: argparse.Namespace, words: list[str] | None) -> None:
    configs = [config_of(name) for name in given.shapes or BY_DEFAULT]
    need_integer(given.cached, "cached", between(1, SMALL.context))
    need_integer(given.rounds, "rounds", between(1, 1000))
    plan = Plan(numbers_of_rows(given.rows), given.cached, given.batch, given.rounds)
    if not one_thread():
        return run_again(["minitx.lab.rows", *(sys.argv[1:] if words is None else words)])
    found = prices(configs, plan)
    if given.json:
        report = {"plan": asdict(plan), "shapes": [price.as_dict() for price in found]}
        print(json.dumps(report, indent=1))
    else:
        print(as_text(found, plan))


def config_of(name: str) -> Config:
    if name not in KNOWN:
        raise MinitxError(f"There is no shape {abbreviate(name)}; {one_of(name, KNOWN)}")
    return KNOWN[name]


def numbers_of_rows(text: str) -> tuple[int, ...]:
    words = text.split(",")
    found = [int(word) if word.isdecimal() and len(word) < 5 else 0 for word in words]
    for number, word in zip(found, words):
        need_integer(number or word, "rows", between(1, SMALL.context))
    return tuple(dict.fromkeys(found))


if __name__ == "__main__":
    main()
