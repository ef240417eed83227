"""How long attention takes for one decoded token at growing contexts, dense and by each method.

One block's attention (the middle one's) is run by itself, on what it reads in the dense model when
that reads stories. The stories' rows follow one another until the context is full, also beyond the
context that the model was trained for: its rotary tables are continued for this. So the queries and
keys are the model's own, in number and in kind, although no text is read that is so long.

All methods decode the same token in turns, and again the next token, so that whatever else the
machine does meets all of them. Each time is without that of an attention that mixes nothing (norm,
projections, rotation), which is run in turns with them; the median over the rounds is given. A new
key's own work (a hash, a place in an order) is in it, that for all keys before is not. BLAS takes
as many threads as the environment gives it (OMP_NUM_THREADS=1 for one).
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
TICK = time.get_clock_info("perf_counter").resolution  # seconds; a smaller difference is unknown


@dataclass(frozen=True)
class Speed:
    """One decoded token at one context."""

    context: int  # keys that the query sees
    seconds: float
    dense_seconds: float
    kept: float  # share of these keys

    @property
    def ratio(self) -> float:
        """How many times as fast as dense attention."""
        return self.dense_seconds / self.seconds

    def as_dict(self) -> dict:
        return asdict(self) | {"ratio": self.ratio}


def crossover(speeds: Sequence[Speed]) -> int | None:
    """The smallest context from which on the method is faster than dense attention at all that
    were timed; None if it is not at the largest."""
    found = None
    for speed in reversed(speeds):
        if speed.ratio <= 1:
            break
        found = speed.context
    return found


def race(
    dense, put, settings: dict, texts: Sequence, contexts: Sequence[int], rounds: int, tick
) -> dict:
    """{(name, share): [Speed at each context]} for settings {(name, share): (Method, value)};
    ``put(method, value)`` makes the LM with a method."""
    number = dense.model.config.layers // 2
    x = attention_inputs(dense, number, texts, max(contexts))
    found: dict = {key: [] for key in settings}
    for S in contexts:
        runners = {
            DENSE: Runner(attention(dense, number, S), x, S),
            BARE: Runner(attention(swap(dense, Attend, PassOn), number, S), x, S),
        }
        for (name, share), (method, value) in settings.items():
            lm = put(method, method.at(value, share, S))
            runners[name, share] = Runner(attention(lm, number, S), x, S)
        seconds = in_turns({key: runner.step for key, runner in runners.items()}, rounds)
        for key in settings:
            ours, full = (max(seconds[k] - seconds[BARE], TICK) for k in (key, DENSE))
            found[key].append(Speed(S, ours, full, runners[key].kept(min(rounds, 8))))
        tick()
    return found


def in_turns(steps: dict, rounds: int) -> dict:
    """The median of the seconds that each step takes, which are run in turns; a step gets the
    number of the round and gives a time. The first round is left out: memory is fetched there."""
    taken: dict = {key: [] for key in steps}
    for number in range(rounds + 1):
        for key, step in steps.items():
            taken[key].append(step(number))
    return {key: median(found[1:]) for key, found in taken.items()}


class Runner:
    """An attention part whose memory holds S - 1 tokens, to decode one more again and again."""

    def __init__(self, attn: Part, x: np.ndarray, S: int):
        self.attn, self.x, self.S = attn, x, S
        self.layer = Layer(S)
        attn.backfill(x[: S - 1], self.layer.take(S - 1))
        self.step(0)  # methods learn of the keys before

    def step(self, number: int) -> float:
        """Seconds for one token, which is forgotten again before the next. Never 0: where the
        clock moves in ticks, the token is decoded again until it has moved."""
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
        """What each round decodes, the same for all: rows from the end of the stories."""
        at = -1 - 7 * number % len(self.x)
        return self.x[at][None]  # (1, D)

    def kept(self, queries: int) -> float:
        """The share of keys that some of these queries keep, in all heads."""
        with counting(self.attn) as counts:
            for number in range(queries):
                self.step(number)
        seen = counts.events["keys seen"]
        return counts.events["keys kept"] / seen if seen else 1.0  # not asked: all are kept


# Parts -------------------------------------------------------------------------------------------


@part
class PassOn(Part):
    """In the place of attending: nothing."""

    dense: Part

    def __call__(self, q, k, v, layer: Layer):
        return q


@part
class Listening(Part):
    """Attention that notes down what it reads."""

    inner: Part
    heard: list

    def __call__(self, x, layer: Layer):
        self.heard.append(x)
        return self.inner(x, layer)


def attention_inputs(dense, number: int, texts: Sequence, rows: int) -> np.ndarray:
    """What the attention of block ``number`` reads (rows, D), text after text, and from the first
    again if they are too few."""
    heard: list[np.ndarray] = []
    attn = dense.model.stack.blocks[number].attn

    def listen(node: Part) -> Part | None:
        return Listening(attn, heard) if node is attn else None

    model = rebuild(dense.model, listen)
    for ids in texts:
        if sum(map(len, heard)) >= rows:
            break
        model.hidden(ids)
    x = np.concatenate(heard)
    return np.resize(x, (rows, x.shape[-1]))  # repeats from the beginning


def attention(lm: Part, number: int, S: int) -> Part:
    """The attention part of block ``number``, with room for S positions."""
    return rebuild(lm.model.stack.blocks[number].attn, lambda node: longer(node, S))


def longer(node: Part, S: int) -> Part | None:
    """A rotation with tables for S positions at least; None for any other part."""
    if type(node) is not Rope or len(node.cos) >= S:
        return None
    turn = np.arctan2(node.sin[1].astype(np.float64), node.cos[1])  # per position, below pi
    angle = np.outer(np.arange(S), turn)  # (S, width)
    return Rope(np.cos(angle).astype(node.cos.dtype), np.sin(angle).astype(node.sin.dtype))
