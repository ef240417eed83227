"""The time of products that skip inputs or neurons, beside the dense ones:

    python -m minitx.lab.product_times zero_skip 4096 1024
    python -m minitx.lab.product_times cats 576 1536
    OMP_NUM_THREADS=1 python -m minitx.lab.product_times perforate 512 1408 --tokens 128

One matrix of INPUTS x OUTPUTS (zero_skip, teal, delta, perforate), or one FFN of width INPUTS with
OUTPUTS neurons (cats, contextual_sparsity), with random float32 numbers of which each token skips a
share: in perforate the same inputs as all others, else its own. The dense and the skipping product
run in turn, and the fastest of many runs counts. BLAS takes as many threads as the environment
allows.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minitx import ops
from minitx.exit_status import run_module
from minitx.lab.layout import table
from minitx.memory_layout import to_column_major
from minitx.model import FFN, Activated, Linear, NoNorm, SwiGLU
from minitx.shared.activation_threshold import AboveThreshold, Magnitudes
from minitx.skip.cats import ThresholdedFFN
from minitx.skip.contextual_sparsity import PredictedNeurons
from minitx.skip.contextual_sparsity.predictor import Predictor, TopK
from minitx.skip.delta import DeltaLinear
from minitx.skip.perforate import Perforated
from minitx.skip.teal import ThresholdedLinear
from minitx.skip.zero_skip import ZeroSkippingLinear
from minitx.state import Layer
from minitx.values import between, need_integer

SHARES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
REPEATS = 200  # of which the fastest counts
LONGEST = 0.3  # seconds after which there is no other one

Run = Callable[[], object]  # runs a product once


# What is timed -----------------------------------------------------------------------------------
#
# Each function returns (skipping, dense) for x (T, in), of which a share is skipped, and a matrix
# of so many outputs, or FFN of so many neurons.


def zero_skip(x, outputs: int, share: float) -> tuple[Run, Run]:
    w = matrix(x.shape[1], outputs)
    zeros = np.argsort(x, axis=1)[:, : skipped(x.shape[1], share)]
    x = x.copy()
    np.put_along_axis(x, zeros, 0, axis=1)
    return with_matrix(ZeroSkippingLinear(w, None, 0.0), w, x)


def teal(x, outputs: int, share: float) -> tuple[Run, Run]:
    w = matrix(x.shape[1], outputs)
    select = AboveThreshold(Magnitudes(x).threshold(share))
    return with_matrix(ThresholdedLinear(w, None, select), w, x)


def delta(x, outputs: int, share: float) -> tuple[Run, Run]:
    w = matrix(x.shape[1], outputs)
    product, before = DeltaLinear(w, None, 0.3, refresh=1 << 30), x.copy()
    before[:, skipped(x.shape[1], share) :] += 9  # the other coordinates are those of the token
    sent = [product.token(row, [], 0) for row in before]

    def skipping():
        for row, state in zip(x, sent):
            product.token(row, [state], 1)

    return skipping, with_matrix(product, w, x)[1]


def perforate(x, outputs: int, share: float) -> tuple[Run, Run]:
    w, b = matrix(x.shape[1], outputs), numbers(outputs)
    kept = np.sort(np.argsort(numbers(len(w)))[skipped(len(w), share) :])
    return with_matrix(Perforated(to_column_major(Linear(w[kept], b)), kept), w, x)


def cats(x, neurons: int, share: float) -> tuple[Run, Run]:
    D = x.shape[1]
    gate, up, down = matrix(D, neurons), matrix(D, neurons), matrix(neurons, D)
    dense = FFN(NoNorm(), SwiGLU(Linear(gate), Linear(up)), Linear(down))
    select = AboveThreshold(Magnitudes(ops.silu(x @ gate)).threshold(share))
    return with_ffn(ThresholdedFFN.of(dense, select), dense, x)


def contextual_sparsity(x, neurons: int, share: float) -> tuple[Run, Run]:
    D, rank = x.shape[1], max(1, x.shape[1] // 4)
    up, b, down = matrix(D, neurons), numbers(neurons), matrix(neurons, D)
    dense = FFN(NoNorm(), Activated(Linear(up, b), ops.relu), Linear(down))
    top = TopK(Predictor(matrix(D, rank), matrix(rank, neurons)), neurons - skipped(neurons, share))
    some = PredictedNeurons(NoNorm(), up.T.copy(), b, down, None, selector=top)
    return with_ffn(some, dense, x)


PRODUCTS = {f.__name__: f for f in (zero_skip, teal, delta, perforate, cats, contextual_sparsity)}


def with_matrix(product, w, x) -> tuple[Run, Run]:
    product, dense = to_column_major(product), to_column_major(Linear(w))
    return lambda: product(x), lambda: dense(x)


def with_ffn(some, dense, x) -> tuple[Run, Run]:
    some, dense, layer = to_column_major(some), to_column_major(dense), Layer.once(len(x))
    return lambda: some(x, layer), lambda: dense(x, layer)


def skipped(size: int, share: float) -> int:
    return min(round(share * size), size - 1)


def matrix(inputs: int, outputs: int):
    return numbers(inputs, outputs) / np.float32(inputs**0.5)


def numbers(*shape: int):
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


# Timing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds at each of ``SHARES``."""

    title: str
    skipping: list[float]
    dense: list[float]

    def __str__(self) -> str:
        rows = [["skipped", "time", "dense", "relative to dense"]]
        for share, ours, dense in zip(SHARES, self.skipping, self.dense):
            times = [f"{1e6 * seconds:,.1f} us" for seconds in (ours, dense)]
            rows.append([f"{share:.0%}", *times, f"{ours / dense:.2f}x"])
        return "\n".join([self.title, table(rows), "", self.break_even])

    @property
    def break_even(self) -> str:
        faster = [ours < dense for ours, dense in zip(self.skipping, self.dense)]
        if not faster[-1]:
            return "Skipping is slower at every share tried."
        first = max((i + 1 for i, fast in enumerate(faster) if not fast), default=0)
        return f"Skipping is faster from {SHARES[first]:.0%} on."


def measure(name: str, inputs: int, outputs: int, tokens: int = 1) -> Times:
    x, found = numbers(tokens, inputs), []
    for share in SHARES:
        found.append(fastest(*PRODUCTS[name](x, outputs, share)))
    amount = f"{tokens} token{'s' * (tokens > 1)}"
    title = f"{name}, {inputs:,} x {outputs:,}, float32, {amount} on this machine:"
    return Times(title, *map(list, zip(*found)))


def fastest(*runs: Run) -> list[float]:
    """The seconds that each takes, run in turn."""
    best, start = [np.inf] * len(runs), time.perf_counter()
    for _ in range(REPEATS):
        for i, run in enumerate(runs):
            began = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - began)
        if time.perf_counter() - start > LONGEST:
            break
    return best


def main(words=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.product_times", description="The time of products that skip."
    )
    parser.add_argument("product", choices=PRODUCTS, help="whose: %(choices)s", metavar="NAME")
    parser.add_argument("inputs", type=int, help="or the width of an FFN")
    parser.add_argument("outputs", type=int, help="or the neurons of an FFN")
    parser.add_argument("--tokens", type=int, default=1, help="default: %(default)s")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given))


def run(given: argparse.Namespace) -> None:
    sizes = (given.inputs, given.outputs, given.tokens)
    for name, size in zip(("inputs", "outputs", "tokens"), sizes):
        need_integer(size, name, between(1, 1 << 14))
    print(measure(given.product, *sizes))


if __name__ == "__main__":
    main()
