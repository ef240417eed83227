"""``minitx bench``: decoding and prefill speed, next to transformers and next to memory bandwidth.

Three llama shapes with seeded random weights, float32, tied embeddings:

- decode: greedy tokens one by one after a prompt of one token, by ``lm.tokens``;
- prefill: one call that reads a prompt, fills the KV cache and returns the next token's logits;
- limit: decoding reads every weight once per token, so it is memory-bandwidth bound: tokens/s times
  bytes of weights cannot exceed the read bandwidth. The bandwidth is that of a matrix-vector
  product in the same run: with a matrix as large as all weights, used repeatedly, so that it is
  wherever the weights are (a cache, or memory), and with one of 256 MB, larger than any cache. A
  model that fits in a cache may be faster than the second. The KV cache and activations are not
  counted. The products of a token are also timed alone, back to back: the rest of a token's time is
  overhead between them.

If torch and transformers are installed, they do the same with the same weights; the faster of their
two ways of decoding counts. All take turns (A B C A B C ...) on one thread. A speed is the median
over the rounds, a ratio the median of the ratios within a round, with minimum and maximum: a
slowdown of the machine mostly affects neighbouring turns alike. Time is CPU time, which on an idle
machine equals wall time.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from minitx import __version__, progress
from minitx.build import random_model
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.fast import ONE_THREAD, THREAD_VARIABLES
from minitx.lab.bench_report import as_text
from minitx.lab.layout import fit
from minitx.lm import LM
from minitx.memory_layout import to_column_major
from minitx.model import Head, Linear, TiedHead, Transformer
from minitx.tree import walk, weights

SEED = 0
FIRST = 1  # the prompt of one token
ALLOWED = 1e-4  # of the largest logit: difference between two frameworks in float32
BEYOND_CACHES = 256_000_000  # bytes

# What is timed, in turn
DECODE, PREFILL, THEIR_PREFILL = "minitx decode", "minitx prefill", "transformers prefill"
ALONE = "minitx products alone"
NEAR, FAR = "product of the same size", "product of 256 MB"


def llama(width, layers, heads, kv_heads, hidden, vocab_size) -> Config:
    return Config(
        family="llama",
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=width // heads,
        hidden=hidden,
        context=512,
        rope_width=width // heads,
        tied=True,
    )


SHAPES = (
    llama(64, 5, 8, 4, 172, 512),
    llama(192, 8, 6, 6, 512, 1024),
    llama(288, 6, 6, 6, 768, 32000),
)


@dataclass(frozen=True)
class Repeats:
    """How much to measure: new tokens, prompt tokens, rounds, and the minimum seconds of a turn."""

    decode: int
    prefill: int
    rounds: int
    least: float


FULL = Repeats(decode=200, prefill=256, rounds=7, least=0.1)
QUICK = Repeats(decode=50, prefill=256, rounds=3, least=0.02)


def bench(as_json: bool = False, quick: bool = False) -> None:
    """Measure and print, as a table or JSON. Reruns itself in a process with one BLAS thread if
    necessary. Raises MinitxError if the two frameworks disagree."""
    if not one_thread():
        return run_again(["minitx", "bench", *["--json"] * as_json, *["--quick"] * quick])
    rival, reason = find_rival()
    result = measure_all(SHAPES, QUICK if quick else FULL, rival)
    result["not_compared"] = reason
    print(json.dumps(result, indent=1) if as_json else fit(as_text(result)))


def one_thread() -> bool:
    """Does the environment hold BLAS to one thread?"""
    return all(os.environ.get(name) == "1" for name in THREAD_VARIABLES)


def run_again(words: list[str]) -> None:
    """``python -m *words`` in a process with one BLAS thread, and its exit status unless it is
    0."""
    source = str(Path(__file__).resolve().parents[2])  # so that the same minitx is imported
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": path}
    status = subprocess.run([sys.executable, "-m", *words], env=environment).returncode
    if status:
        sys.exit(status)


def find_rival() -> tuple[Callable | None, str | None]:
    """A function that wraps a model in the other framework, or None and the reason."""
    try:
        from minitx.lab.bench_transformers import Transformers
    except ImportError as error:
        return None, f"{error}; the extra minitx[reference] installs it"
    return Transformers, None


def measure_all(shapes, plan: Repeats, rival: Callable | None, bar: bool = True) -> dict:
    """All measurements of all shapes, as plain data for JSON. ``rival(model)`` wraps a model in the
    other framework (see ``Transformers``); None measures minitx only."""
    found = machine()  # before the run, which is load itself
    clock, processor = time.perf_counter(), time.process_time()
    rounds = len(shapes) * (plan.rounds + 1)
    with progress.bar(rounds, "bench", unit="round", shown=bar) as shown:
        measured = [measure(config, plan, rival, shown.update) for config in shapes]
    spent = time.process_time() - processor
    busy = spent / elapsed(time.perf_counter, clock)
    return {
        "machine": found | {"processor_share": round(busy, 3)},
        "versions": versions() | (rival.versions if rival else {}),
        "plan": asdict(plan),
        "shapes": measured,
    }


def measure(config: Config, plan: Repeats, rival: Callable | None, tick: Callable) -> dict:
    """Measure one shape. ``tick()`` is called after the warm-up and after every round."""
    model = to_column_major(random_model(config, SEED))
    lm, read = LM(model), bytes_per_token(model)
    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, plan.prefill)
    jobs = {
        DECODE: lambda: list(lm.tokens([FIRST], plan.decode)),
        NEAR: lambda: near_x @ near,
        ALONE: products_alone(model),
        PREFILL: lambda: model.next_logits(ids, model.new_state()),
        FAR: lambda: far_x @ far,
    }
    (near_x, near), (far_x, far) = factors(read), factors(BEYOND_CACHES)
    ways, agreement = [], None
    if rival:
        other = rival(model)
        agreement = {"logits_relative_difference": agree(model(ids), other.logits(ids), config)}
        for name, decode in other.ways_to_decode().items():
            ways.append(f"transformers decode, {name}")
            jobs[ways[-1]] = partial(decode, FIRST, plan.decode)
        jobs[THEIR_PREFILL] = lambda: other.prefill(ids)
    results = {name: job() for name, job in jobs.items()}  # which also warms up
    if agreement:
        steps = zip(results[DECODE], *(results[way] for way in ways))
        agreement["same_greedy_tokens"] = sum(len(set(step)) == 1 for step in steps)
    tick()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(plan.rounds):
        for name, job in jobs.items():
            seconds[name].append(timed(job, plan.least))
        tick()
    return {
        "config": asdict(config),
        "weights": sum(w.size for w in weights(model).values()),
        "bytes_per_token": read,
        "agreement": agreement,
        "decode": compared(plan.decode, seconds, DECODE, ways),
        "prefill": compared(plan.prefill, seconds, PREFILL, [THEIR_PREFILL] if rival else []),
        "limit": {
            name: limit(plan.decode * read, matrix.nbytes, seconds[DECODE], seconds[name])
            for name, matrix in ((NEAR, near), (FAR, far))
        },
        "products_alone": share(plan.decode, seconds[DECODE], seconds[ALONE]),
        "seconds": seconds,
    }


def timed(job: Callable, least: float) -> float:
    """CPU seconds of one run of ``job``, averaged over at least ``least`` seconds of runs. Never 0:
    if the clock moves in ticks, ``job`` runs again until it has moved."""
    began, runs, spent = time.process_time(), 0, 0.0
    while not spent or spent < least:
        job()
        runs += 1
        spent = time.process_time() - began
    return spent / runs


def elapsed(clock: Callable, began: float) -> float:
    """Seconds on this clock since ``began``. Never 0: waits for the first tick."""
    while not (seconds := clock() - began):
        pass
    return seconds


def agree(ours: np.ndarray, theirs: np.ndarray, config: Config) -> float:
    """The largest difference of logits, relative to the largest logit; MinitxError if it is more
    than rounding."""
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not error <= ALLOWED:
        raise MinitxError(
            f"At {config.width} x {config.layers} the logits of minitx and transformers differ by "
            f"{error:.1e} of the largest, more than rounding ({ALLOWED:.0e}), so their speeds "
            "cannot be compared; run the tests, or install the versions that pyproject.toml names."
        )
    return error


def compared(tokens: int, seconds: dict, ours: str, theirs: list[str]) -> dict:
    """Tokens per second of both frameworks, and the ratio to the faster of ``theirs``."""
    out = {"minitx_tokens_per_second": tokens / median(seconds[ours])}
    if theirs:
        faster = min(theirs, key=lambda name: median(seconds[name]))
        out["transformers_tokens_per_second"] = tokens / median(seconds[faster])
        out["transformers_way"] = faster
        out["ratio"] = spread([b / a for a, b in zip(seconds[ours], seconds[faster])])
    return out


def limit(read: int, size: int, decode: list[float], product: list[float]) -> dict:
    """Read bandwidth in bytes per second: of decoding (``read`` bytes per time), of a product with
    a matrix of ``size`` bytes, and the first as a fraction of the second."""
    return {
        "minitx_bytes_per_second": read / median(decode),
        "product_bytes_per_second": size / median(product),
        "fraction": spread([(read / a) / (size / b) for a, b in zip(decode, product)]),
    }


def share(tokens: int, decode: list[float], products: list[float]) -> dict:
    """The share of decoding time that the products alone take."""
    return spread([tokens * b / a for a, b in zip(decode, products)])


def spread(values: list[float]) -> dict:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def bytes_per_token(model: Transformer) -> int:
    """Bytes of weights read to decode one token: the blocks, the final norm, the whole head (also
    if tied), and one row of each embedding table."""
    parts = (model.stack, model.norm, model.head)
    whole = sum(w.nbytes for part in parts for w in weights(part).values())
    return whole + sum(w[0].nbytes for w in weights(model.embed).values())


def products_alone(model: Transformer) -> Callable:
    """A function that multiplies one row with all weight matrices, in the order of the model, and
    does nothing else."""

    def row(node):
        inputs = node.w.shape[1 if type(node) is TiedHead else 0]
        return np.ones((1, inputs), node.w.dtype)

    kinds = Linear, Head, TiedHead
    pairs = [(node, row(node)) for _, node in walk(model) if type(node) in kinds]

    def run():
        for node, x in pairs:
            node(x)

    return run


def factors(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A vector (1, n) and a matrix (n, 4096) of about ``size`` bytes, with rows long enough for
    BLAS to reach full speed at any size."""
    n = max(1, round(size / (4 * 4096)))
    return np.ones((1, n), np.float32), np.ones((n, 4096), np.float32)


def machine() -> dict:
    """The machine. load: the load average over the last minute (None if the system does not report
    it)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        cpu = next(line for line in text.splitlines() if line.startswith("model name"))
        cpu = cpu.partition(":")[2].strip()
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict:
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return {
        "minitx": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas.get('name')} {blas.get('version')}",
    }
