"""How many neurons ReLU sets to 0 in each layer, and when skipping them saves time:

    python -m minitx.lab.zero_activations [MODEL] [stories=4] [hidden=4096] [width=1024]

For each layer: the share of zero neurons on held-out stories, and the multiply-adds that
zero_skip executes there. Then the time of one token's product with W_down (hidden x width; default:
the model's), with gathered rows and dense, at several shares of zeros. Default model: stories-relu.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np

import minitx
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.lab.layout import table
from minitx.ledger import counting
from minitx.memory_layout import to_column_major
from minitx.model import Linear
from minitx.skip.zero_skip import ZeroSkippingLinear
from minitx.technique import apply
from minitx.tree import walk
from minitx.values import between, need_integer

SHARES = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
REPEATS = 200  # of which the fastest counts
LONGEST = 0.5  # seconds after which there is no other one


@dataclass(frozen=True)
class Zeros:
    """What was counted, and the times at each of ``SHARES``."""

    name: str
    texts: str
    zeros: list[float]  # of each layer: share of zero neurons
    executed: list[float]  # of each layer: multiply-adds of W_down, relative to dense
    shape: tuple[int, int]  # of the matrix that is timed
    gathered: list[float]  # seconds
    dense: list[float]

    def __str__(self) -> str:
        rows = [["layer", "zero neurons", "multiply-adds of W_down"]]
        for i, (share, left) in enumerate(zip(self.zeros, self.executed)):
            rows.append([str(i), f"{share:.1%}", f"{left:.3f}x"])
        rows.append(["mean", f"{np.mean(self.zeros):.1%}", f"{np.mean(self.executed):.3f}x"])
        times = [["zero neurons", "rows gathered", "dense"]]
        for share, *found in zip(SHARES, self.gathered, self.dense):
            times.append([f"{share:.0%}", *(f"{1e6 * seconds:,.1f} us" for seconds in found)])
        inputs, outputs = self.shape
        return "\n".join([
            f"{self.name}, {self.texts}. Multiply-adds include the comparisons with 0.",
            table(rows),
            "",
            f"One token times W_down ({inputs:,} x {outputs:,}, float32), on this machine:",
            table(times),
            "",
            self.break_even,
        ])  # fmt: skip

    @property
    def break_even(self) -> str:
        faster = [g < d for g, d in zip(self.gathered, self.dense)]
        if not faster[-1]:
            return "Gathering rows is slower at every share of zeros tried."
        first = max((i + 1 for i, fast in enumerate(faster) if not fast), default=0)
        return f"Gathering rows is faster from {SHARES[first]:.0%} of zeros on."


def measure(lm, name: str, stories: int = 4, hidden: int = 0, width: int = 0) -> Zeros:
    """Count on held-out stories and time; hidden, width: 0 for the model's own."""
    context = lm.model.config.context
    texts = [text.ids[:context] for text in encode(lm.tokenizer, held_out(lm, stories))]
    skipping = apply(lm, {"zero_skip": {}})
    parts = {path: node for path, node in walk(skipping) if type(node) is ZeroSkippingLinear}
    with counting(skipping) as counts:
        for ids in texts:
            skipping.model.hidden(ids)
    tokens, zeros, executed = sum(map(len, texts)), [], []
    for path, node in parts.items():
        neurons, outputs = node.w.shape
        work = counts.entries[path].multiply_adds / tokens
        executed.append(work / (neurons * outputs))
        zeros.append(1 - (work - neurons) / (neurons * outputs))
    shape = hidden or neurons, width or outputs
    amount = f"{len(texts)} held-out stories ({tokens:,} tokens)"
    return Zeros(name, amount, zeros, executed, shape, *timed(*shape))


def timed(hidden: int, width: int) -> tuple[list[float], list[float]]:
    """Seconds for one token at each of ``SHARES``, with gathered rows and dense."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((hidden, width)).astype(np.float32)
    skipping = ZeroSkippingLinear(w, None, 0.0, "skip")
    dense = to_column_major(Linear(w))
    found = []
    for share in SHARES:
        h = np.abs(rng.standard_normal((1, hidden))).astype(np.float32)
        h[0, rng.permutation(hidden)[: round(share * hidden)]] = 0
        found.append((fastest(skipping, h), fastest(dense, h)))
    return tuple(map(list, zip(*found)))


def fastest(part, h) -> float:
    best, start = np.inf, time.perf_counter()
    for _ in range(REPEATS):
        began = time.perf_counter()
        part(h)
        end = time.perf_counter()
        best = min(best, end - began)
        if end - start > LONGEST:
            break
    return best


def main(words: list[str]) -> int:
    """Print the report. Returns 0; 2 for bad input, which is one sentence on stderr; 130 for
    Ctrl-C."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        names = [word for word in words if "=" not in word]
        pairs = [word.split("=", 1) for word in words if "=" in word]
        options, known = dict(pairs), ("stories", "hidden", "width")
        if len(names) > 1 or len(options) < len(pairs) or set(options) - set(known):
            raise MinitxError(
                f"expected one model and {', '.join(known)}, each once; got {' '.join(words)}."
            )
        numbers = {key: number(key, value) for key, value in options.items()}
        name = names[0] if names else "stories-relu"
        print(measure(minitx.load(name), name, **numbers))
    except MinitxError as error:
        print(f"minitx: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minitx: stopped.", file=sys.stderr)
        return 130
    return 0


def number(name: str, text: str) -> int:
    """An option's value; MinitxError unless it is an integer from 1 to 2^14."""
    return need_integer(
        int(text) if text.isdecimal() and len(text) < 10 else text, name, between(1, 1 << 14)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
