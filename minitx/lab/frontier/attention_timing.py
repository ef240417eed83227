"""Latency of attention for one decoded token at growing contexts, dense and by each method.

The attention of one block, the middle one, runs by itself on its inputs in the dense model as that
reads stories. Stories follow one another until the context is full, also beyond the context that
the model was trained for (its rotary tables are extended). So the queries and keys are the model's
own, although it never reads a text that long.

All methods decode the same token in turn, then the next token, so that other load on the machine
affects them all alike. From each time that of an attention part without attention (norm,
projections and rotation only) is subtracted; the result is the median over the rounds. The work for
one new key (its hash, its place in a sorted column) is included, that for all earlier keys is not.
BLAS uses as many threads as the environment allows (OMP_NUM_THREADS=1 for one).
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from minitx.ledger import counting
from minitx.model import Attend, Rope
from minitx.state import Layer
from minitx.technique import swap
from minitx.tree import Part, part, rebuild

CONTEXTS = (256, 512, 1024, 2048, 4096)
DENSE, BARE = "dense", "bare"
TICK = time.get_clock_info("perf_counter").resolution  # seconds: the smallest known difference


@dataclass(frozen=True)
class Speed:
    """One decoded token at one context."""

    context: int  # keys that the query sees
    seconds: float
    dense_seconds: float
    kept: float  # share of these keys

    @property
    def ratio(self) -> float:
        """Speedup over dense attention."""
        return self.dense_seconds / self.seconds

    def as_dict(self) -> dict:
        return asdict(self) | {"ratio": self.ratio}


def crossover(speeds: Sequence[Speed]) -> int | None:
    """The smallest timed context from which on the method is always faster than dense attention;
    None if it is slower at the largest."""
    found = None
    for speed in reversed(speeds):
        if speed.ratio <= 1:
            break
        found = speed.context
    return found


def measure_speeds(
    dense, apply, settings: dict, texts: Sequence, contexts: Sequence[int], rounds: int, tick
) -> dict:
    """{(name, share): [Speed at each context]} for settings {(name, share): (Method, value)};
    ``apply(method, value)`` returns the LM with a method."""
    number = dense.model.config.layers // 2
    x = attention_inputs(dense, number, texts, max(contexts))
    found: dict = {key: [] for key in settings}
    for S in contexts:
        runners = {
            DENSE: Runner(attention(dense, number, S), x, S),
            BARE: Runner(attention(swap(dense, Attend, NoAttention), number, S), x, S),
        }
        for (name, share), (method, value) in settings.items():
            lm = apply(method, method.at(value, share, S))
            runners[name, share] = Runner(attention(lm, number, S), x, S)
        seconds = time_in_turn({key: runner.step for key, runner in runners.items()}, rounds)
        for key in settings:
            ours, full = (max(seconds[k] - seconds[BARE], TICK) for k in (key, DENSE))
            found[key].append(Speed(S, ours, full, runners[key].kept(min(rounds, 8))))
        tick()
    return found


def time_in_turn(steps: dict, rounds: int) -> dict:
    """The median time of each step, run in turn, round by round. A step takes the number of the
    round and returns seconds. The first round is a warm-up and left out."""
    taken: dict = {key: [] for key in steps}
    for number in range(rounds + 1):
        for key, step in steps.items():
            taken[key].append(step(number))
    return {key: median(found[1:]) for key, found in taken.items()}


class Runner:
    """An attention part whose cache holds S - 1 tokens, to decode one more again and again."""

    def __init__(self, attn: Part, x: np.ndarray, S: int):
        self.attn, self.x, self.S = attn, x, S
        self.layer = Layer(S)
        attn.backfill(x[: S - 1], self.layer.take(S - 1))
        self.step(0)  # methods compute what they know of the earlier keys

    def step(self, number: int) -> float:
        """Seconds for one token; the cache is rewound before the next. Never 0: if the clock has
        not ticked, the token is decoded again until it has."""
        token, runs, spent = self.token(number), 0, 0.0
        while not spent:
            self.layer.rewind(self.S - 1)
            self.layer.take(1)
            began = time.perf_counter()
            self.attn(token, self.layer)
            runs += 1
            spent = time.perf_counter() - began
        return spent / runs

    def token(self, number: int) -> np.ndarray:
        """The input (1, D) of each round, the same for all methods: from the end of the stories."""
        at = -1 - 7 * number % len(self.x)
        return self.x[at][None]

    def kept(self, queries: int) -> float:
        """The share of the keys that these queries keep, over all heads."""
        with counting(self.attn) as counts:
            for number in range(queries):
                self.step(number)
        seen = counts.events["keys seen"]
        return counts.events["keys kept"] / seen if seen else 1.0  # no selection: all are kept


# Parts -------------------------------------------------------------------------------------------


@part
class NoAttention(Part):
    """Returns the queries, instead of attending."""

    dense: Part

    def __call__(self, q, k, v, layer: Layer):
        return q


@part
class RecordInputs(Part):
    """Attention that records its inputs."""

    inner: Part
    inputs: list

    def __call__(self, x, layer: Layer):
        self.inputs.append(x)
        return self.inner(x, layer)


def attention_inputs(dense, number: int, texts: Sequence, rows: int) -> np.ndarray:
    """The inputs (rows, D) of the attention of block ``number``, text after text; repeated from
    the beginning if the texts are too short."""
    inputs: list[np.ndarray] = []
    attn = dense.model.stack.blocks[number].attn

    def record(node: Part) -> Part | None:
        return RecordInputs(attn, inputs) if node is attn else None

    model = rebuild(dense.model, record)
    for ids in texts:
        if sum(map(len, inputs)) >= rows:
            break
        model.hidden(ids)
    x = np.concatenate(inputs)
    return np.resize(x, (rows, x.shape[-1]))


def attention(lm: Part, number: int, S: int) -> Part:
    """The attention part of block ``number``, with rotary tables for S positions."""
    return rebuild(lm.model.stack.blocks[number].attn, lambda node: extended_rope(node, S))


def extended_rope(node: Part, S: int) -> Part | None:
    """A ``Rope`` with tables for S positions; None for one that has as many, and other parts."""
    if type(node) is not Rope or len(node.cos) >= S:
        return None
    step = np.arctan2(node.sin[1].astype(np.float64), node.cos[1])  # angle per position, below pi
    angle = np.outer(np.arange(S), step)  # (S, width)
    return Rope(np.cos(angle).astype(node.cos.dtype), np.sin(angle).astype(node.sin.dtype))
