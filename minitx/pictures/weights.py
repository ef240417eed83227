"""``minitx weights``: one weight matrix before and after techniques: histogram, zeros, spectrum.

    minitx weights --prune --part stack.blocks.3.ffn.down
    minitx weights --low-rank --svg weights.svg

The matrix that a technique leaves may be in another form (integers and scales, two factors, packed
columns). What is shown is the matrix that it multiplies by: what it makes of the unit vectors.

This file: the matrices, their figures, and the text. weights_svg.py draws them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from minitx.errors import MinitxError, did_you_mean
from minitx.lab.layout import table
from minitx.lm import LM
from minitx.technique import blocks_of
from minitx.tree import Part, nbytes, walk

BINS = 25  # of the histogram; odd, so that small weights of both signs share the middle one
ENERGY = 0.99  # share of the sum of the squared singular values
BAR = 28  # characters of the longest bar
MASK = (12, 48)  # characters of the picture of the zeros
SHADES = " ░▒▓█"
ROUNDING = 1e-6  # relative to the largest weight
NEARLY_LINEAR = 0.2  # relative error up to which a part counts as a matrix: inputs may be rounded


@dataclass(frozen=True)
class Matrix:
    """One weight matrix w, float64, and the bytes that its part takes in memory."""

    w: np.ndarray
    bytes: int

    @property
    def zeros(self) -> np.ndarray:
        """Booleans like w."""
        return self.w == 0

    @cached_property
    def singular_values(self) -> np.ndarray:
        """In descending order: the roots of the eigenvalues of w w^T or w^T w, whichever is
        smaller."""
        w = self.w if len(self.w) <= self.w.shape[1] else self.w.T
        values = np.linalg.eigvalsh(w @ w.T)[::-1]
        return np.sqrt(np.maximum(values, 0))

    def rank(self, energy: float = ENERGY) -> int:
        """How many singular values have this share of the sum of squares."""
        squares = self.singular_values**2
        if not squares.any():
            return 0
        return int(np.searchsorted(squares.cumsum() / squares.sum(), energy - 1e-12)) + 1

    def histogram(self, most: float, bins: int = BINS) -> np.ndarray:
        """The share of all weights in each of so many intervals of [-most, most]; exact zeros are
        left out, for there may be so many that nothing else shows."""
        w = self.w[~self.zeros]
        return np.histogram(w, bins, (-most, most))[0] / max(self.w.size, 1)

    def zero_share(self, rows: int, columns: int) -> np.ndarray:
        """The share of zeros in a grid of at most rows x columns patches of the matrix."""
        grid = self.zeros.astype(float)
        for axis, most in enumerate((rows, columns)):
            size = grid.shape[axis]
            starts = np.unique(np.arange(min(most, size)) * size // min(most, size))
            counts = np.diff([*starts, size])
            grid = np.add.reduceat(grid, starts, axis) / np.expand_dims(counts, 1 - axis)
        return grid


@dataclass(frozen=True)
class Weights:
    """A matrix before and after techniques; after=None: no techniques were given."""

    title: str
    part: str
    before: Matrix
    after: Matrix | None
    others: int  # matrices of the model besides this one

    @property
    def both(self) -> dict[str, Matrix]:
        return {"before": self.before} | ({} if self.after is None else {"after": self.after})

    @property
    def most(self) -> float:
        """The largest absolute value."""
        return max(float(abs(m.w).max(initial=0)) for m in self.both.values()) or 1.0

    def __str__(self) -> str:
        return self.text()

    def text(self, room: int = 100) -> str:
        parts = [self.title, self.heading, self.figures(), self.histogram_text()]
        shown = self.both["after" if self.after else "before"]
        if shown.zeros.any():
            parts.append(self.mask_text(shown))
        return "\n\n".join([*parts, self.spectrum_text()])

    @property
    def heading(self) -> str:
        rows, columns = self.before.w.shape
        return (
            f"{self.part}: {rows:,} x {columns:,}, one of {self.others + 1} weight matrices "
            "(--part shows another)"
        )

    def figures(self) -> str:
        rows = [["", "shape", "zeros", "rms", "largest", f"rank ({ENERGY:.0%} of energy)", "bytes"]]
        for name, m in self.both.items():
            rms, largest = np.sqrt((m.w**2).mean()), abs(m.w).max(initial=0)
            shape = "x".join(map(str, m.w.shape))
            figures = [f"{m.zeros.mean():.1%}", f"{rms:.4g}", f"{largest:.4g}", f"{m.rank():,}"]
            rows.append([name, shape, *figures, f"{m.bytes:,}"])
        text = table(rows)
        if self.after is not None and self.after.w.shape == self.before.w.shape:
            change = np.linalg.norm(self.after.w - self.before.w) / self.norm
            text += f"\nChange: {change:.2%} of the norm of the matrix."
        return text

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.before.w)) or 1.0

    def histogram_text(self) -> str:
        counts = {name: m.histogram(self.most) for name, m in self.both.items()}
        longest = max(c.max() for c in counts.values()) or 1.0
        edges = np.linspace(-self.most, self.most, BINS + 1)
        lines = [f"{'weight':>10}  " + "  ".join(f"{name:{BAR}}" for name in counts)]
        for i in range(BINS):
            bars = (bar(c[i] / longest) for c in counts.values())
            middle = (edges[i] + edges[i + 1]) / 2
            lines.append(f"{round(middle, 9):>10.3g}  " + "  ".join(f"{b:{BAR}}" for b in bars))
        note = f"The longest bar is {longest:.1%} of the weights; exact zeros are left out."
        return "\n".join([*(line.rstrip() for line in lines), note])

    def mask_text(self, m: Matrix) -> str:
        rows = m.zero_share(*MASK)
        shades = ["".join(SHADES[shade(p)] for p in row) for row in rows]
        legend = "Share of zeros in each patch of the matrix: ' ' none, ░▒▓ some, █ all"
        return "\n".join([legend, *shades])

    def spectrum_text(self) -> str:
        first = self.before.singular_values[0] or 1.0
        n = len(self.before.singular_values)
        shown = sorted({int(i) for i in np.linspace(0, n - 1, 13)})
        lines = [f"{'singular value':>14}  " + "  ".join(f"{name:{BAR}}" for name in self.both)]
        for i in shown:
            bars = []
            for m in self.both.values():
                s = m.singular_values
                bars.append(bar(s[i] / first) if i < len(s) else "")
            lines.append(f"{i + 1:>14}  " + "  ".join(f"{b:{BAR}}" for b in bars))
        return "\n".join(line.rstrip() for line in lines)

    def as_dict(self) -> dict:
        found: dict = {"title": self.title, "part": self.part, "largest": self.most}
        for name, m in self.both.items():
            found[name] = {
                "shape": list(m.w.shape),
                "bytes": m.bytes,
                "zeros": float(m.zeros.mean()),
                "rank": m.rank(),
                "histogram": m.histogram(self.most).tolist(),
                "singular_values": m.singular_values.tolist(),
            }
        return found


def shade(share: float) -> int:
    """The shade of a share: only none and all get the two ends."""
    return 0 if share == 0 else 4 if share == 1 else min(1 + int(share * 3), 3)


def bar(share: float) -> str:
    """A bar of at most ``BAR`` characters, which shows eighths of one."""
    eighths = round(min(share, 1.0) * BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


# Finding the matrices -----------------------------------------------------------------------------


def weights(dense: LM, changed: LM | None, title: str, part: str | None = None) -> Weights:
    """A matrix of ``dense`` and what became of it in ``changed``. part: its path; default: of the
    middle block, the first one that was changed, otherwise that of the FFN's output."""
    found = matrices(dense)
    if part is not None:
        part = part.removeprefix("model.")
        if part not in found:
            raise MinitxError(
                f"The model has no weight matrix of the part {part!r}; {hint(part, found)}"
            )
    else:
        part = first_changed(dense, changed, found)
    w = found[part].w
    before = Matrix(w.astype(np.float64), nbytes(found[part]))
    after = None if changed is None else matrix_after(changed, part, len(w))
    return Weights(title, part, before, after, len(found) - 1)


def hint(part: str, found: dict[str, Part]) -> str:
    """Names of one block, if nothing is alike: those of all of them would be too many."""
    near = did_you_mean(part, found)
    if near.startswith("did"):
        return near
    last = len([name for name in found if ".blocks." in f".{name}"])
    names = [name for name in found if ".blocks." not in f".{name}" or ".blocks.0." in f".{name}"]
    return f"expected one of {', '.join(names)}" + (" (and of other blocks)." if last else ".")


def matrices(lm: LM) -> dict[str, Any]:
    """The parts with a matrix ``w``, by path (``stack.blocks.3.ffn.down``), each once."""
    found: dict[str, Part] = {}
    seen: set[int] = set()
    for path, node in walk(lm.model):
        w = getattr(node, "w", None)
        if isinstance(w, np.ndarray) and w.ndim == 2 and id(w) not in seen:
            seen.add(id(w))
            found[path] = node
    return found


def first_changed(dense: LM, changed: LM | None, found: dict[str, Any]) -> str:
    """The first matrix, beginning with those of the middle block, that is still there and is not
    the same any more; the output of the middle block's FFN if all are the same."""
    middle = f".blocks.{len(blocks_of(dense)) // 2}."
    own = [path for path in found if middle in f".{path}"]
    order = [*own, *(path for path in found if path not in own)]
    now = plain_paths(dense if changed is None else changed)
    there = [path for path in order if path in now] or order
    default = next((path for path in there if path.endswith("ffn.down")), there[0])
    return next((path for path in there if differs(now[path][0], found[path])), default)


def differs(after: Part, before: Any) -> bool:
    w = getattr(after, "w", None)
    return after is not before and not (isinstance(w, np.ndarray) and np.array_equal(w, before.w))


def plain_paths(lm: LM) -> dict[str, list[Part]]:
    """The parts at each path, without the words that say that a technique has wrapped something:
    the outermost first."""
    found: dict[str, list[Part]] = {}
    for path, node in walk(lm.model):
        plain = ".".join(word for word in path.split(".") if word != "inner")
        found.setdefault(plain, []).append(node)
    return found


def matrix_after(changed: LM, part: str, inputs: int) -> Matrix:
    nodes = plain_paths(changed).get(part)
    if not nodes:
        block = part.rpartition(".")[0]
        raise MinitxError(
            f"After the techniques there is no part {part} any more (they may have joined it with "
            f"others, or removed it); minitx show --diff shows what is in {block} now."
        )
    for node in nodes:
        if (w := as_matrix(node, inputs)) is not None:
            return Matrix(w, nbytes(nodes[0]))
    raise MinitxError(
        f"{part} is now of type {type(nodes[0]).__name__}, which does not multiply by one matrix "
        "whatever its input is; show another part."
    )


def as_matrix(node: Part, inputs: int) -> np.ndarray | None:
    """The matrix (inputs, outputs), float64, of a part: its weights, or what it makes of unit
    vectors. None if that does not say what it makes of other vectors, or it takes no vectors."""
    w = getattr(node, "w", None)
    if isinstance(w, np.ndarray) and w.ndim == 2 and w.dtype.kind == "f":
        return w.astype(np.float64)
    x = np.random.default_rng(0).standard_normal((8, inputs)).astype(np.float32)
    rows = np.concatenate([np.zeros_like(x[:1]), np.eye(inputs, dtype=x.dtype), x])
    try:
        with np.errstate(all="ignore"):
            zero, unit, y = np.split(np.asarray(node(rows), np.float64), [1, 1 + inputs])
    except (TypeError, AttributeError, ValueError, IndexError):  # it takes more than an x
        return None
    w = unit - zero
    w[abs(w) < ROUNDING * abs(w).max(initial=0)] = 0  # of the bias, which was added and subtracted
    error = np.linalg.norm(x @ w - (y - zero)) / (np.linalg.norm(y - zero) or 1)
    return w if error <= NEARLY_LINEAR else None
