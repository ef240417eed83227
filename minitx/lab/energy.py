"""``minitx compare --energy``: how much energy the counted work would take, in picojoules (pJ).

An estimate: the ledger's counts times published constants,

    energy = multiply-adds * pJ per multiply-add, by the kind of number
           + bytes read    * pJ per byte,         by where they are read from

for dedicated hardware that does nothing else. There is no static power, no control, no instruction
fetch, no writing, and no cache that serves a byte twice; what the ledger does not count (norms,
softmax) is free. It says which of two models takes less and why, not what a computer consumes.
Energy is the measure of green computing (survey: arXiv 2311.00447).

Where bytes are read from is one simple rule. A model whose arrays and whose KV cache of a full
context together fit in the on-chip memory reads all its bytes from there (SRAM); any other reads
them from DRAM, every time they are needed. By default there is no on-chip memory.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

from minitx.errors import MinitxError, abbreviate, nearest
from minitx.lab.layout import table
from minitx.ledger import Entry

# M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014: pJ of one
# operation, and of reading 64 bits, at 45 nm and 0.9 V. Confirmed from papers and programs that
# quote his table, not from the talk itself.
FLOAT32_ADD, FLOAT32_MULTIPLY = 0.9, 3.7
INT8_ADD, INT8_MULTIPLY = 0.03, 0.2
SRAM_64_BITS = 100.0  # a cache of 1 MB; of 32 KB: 20, of 8 KB: 10
DRAM_64_BITS = 1300.0  # to 2600: the lower end
PLACES = {"dram": "DRAM", "sram": "on-chip SRAM"}
LARGEST = 1e9  # a constant beyond this is a mistake, and might overflow


@dataclass(frozen=True)
class Constants:
    """Energy of one operation, in pJ; each may be overridden."""

    float32: float = FLOAT32_MULTIPLY + FLOAT32_ADD  # a multiply-add
    addition: float = FLOAT32_ADD  # of floats, without a multiplication
    int8: float = INT8_MULTIPLY + INT8_ADD  # a multiply-add
    dram: float = DRAM_64_BITS / 8  # a byte
    sram: float = SRAM_64_BITS / 8  # a byte
    on_chip: float = 0.0  # not energy, but size: MB of on-chip memory

    def integer(self, bits: int) -> float:
        """A multiply-add of b-bit integers. Ours: a multiplier has an adder for each bit
        of each factor, so it grows with the square (at 32 bits this gives 3.7; published: 3.2)."""
        return self.int8 * (bits / 8) ** 2

    def of(self, entry: Entry, memory: str) -> "Energy":
        """The energy of counted work; memory: "dram" or "sram"."""
        work = entry.floats * self.float32 + entry.additions * self.addition
        work += sum(n * self.integer(bits) for bits, n in entry.integers.items())
        byte = getattr(self, memory)
        return Energy(work, entry.weight_bytes * byte, entry.cache_bytes * byte)

    def memory(self, nbytes: float) -> str:
        """Where a model reads that takes ``nbytes`` (arrays, and the KV cache of a full
        context)."""
        return "sram" if nbytes <= self.on_chip * 1e6 else "dram"

    def __str__(self) -> str:
        """All but the size of the on-chip memory, as the options are written."""
        given = {name: value for name, value in asdict(self).items() if name != "on_chip"}
        return ", ".join(f"{name}={value:g}" for name, value in given.items())


@dataclass(frozen=True)
class Energy:
    """Energy in pJ, by what consumes it."""

    multiply_adds: float = 0.0  # and additions
    weights: float = 0.0  # reading them
    cache: float = 0.0  # reading keys and values

    @property
    def total(self) -> float:
        return self.multiply_adds + self.weights + self.cache

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(*(a + b for a, b in zip(_values(self), _values(other))))

    def as_dict(self) -> dict:
        return asdict(self) | {"total": self.total}


def _values(energy: Energy) -> tuple[float, ...]:
    return energy.multiply_adds, energy.weights, energy.cache


@dataclass(frozen=True)
class Estimate:
    """The energy of generating a token with two models, by part."""

    constants: Constants
    dense: dict[str, Energy]
    changed: dict[str, Energy]
    dense_memory: str  # "dram" or "sram": where each reads from
    memory: str

    @classmethod
    def of(
        cls,
        constants: Constants,
        dense: Mapping[str, Entry],
        changed: Mapping[str, Entry],
        dense_bytes: float,
        changed_bytes: float,
    ) -> "Estimate":
        """From the work per token by part, and the bytes that each model takes."""
        places = constants.memory(dense_bytes), constants.memory(changed_bytes)
        both = (
            {part: constants.of(entry, place) for part, entry in work.items()}
            for work, place in zip((dense, changed), places)
        )
        return cls(constants, *both, *places)

    @property
    def ratio(self) -> float:
        """Of all energy, relative to the dense model."""
        before, after = (sum(m.values(), Energy()).total for m in (self.dense, self.changed))
        return after / before if before else math.nan

    def as_dict(self) -> dict:
        models = {"dense": self.dense, "changed": self.changed}
        return {
            "unit": "pJ per new token",
            "constants": asdict(self.constants),
            "memory": {"dense": self.dense_memory, "changed": self.memory},
            **{
                name: {part: energy.as_dict() for part, energy in parts.items()}
                for name, parts in models.items()
            },
            "ratio": None if math.isnan(self.ratio) else self.ratio,  # JSON has no NaN
        }

    def __str__(self) -> str:
        rows = [["part", "multiply-adds", "", "weights", "", "KV cache", "", "all", ""]]
        parts = list(dict.fromkeys([*self.dense, *self.changed]))
        pairs = [(p, self.dense.get(p, Energy()), self.changed.get(p, Energy())) for p in parts]
        pairs.append(("all", *(sum(m.values(), Energy()) for m in (self.dense, self.changed))))
        for part, before, after in pairs:
            row = [part]
            for a, b in zip((*_values(before), before.total), (*_values(after), after.total)):
                row += [f"{b / 1000:,.1f}", f"{b / a:.2f}x" if a else "-"]
            rows.append(row)
        read = f"Bytes are read from {PLACES[self.dense_memory]}"
        if self.memory != self.dense_memory:
            read += f" by the dense model, from {PLACES[self.memory]} by the changed one"
        return "\n".join(
            [
                "Energy in nJ per new token, an estimate: counts times constants; no static power, "
                "caches or control.",
                table(rows),
                f"{read} (on_chip={self.constants.on_chip:g} MB). Constants in pJ: "
                f"{self.constants}.",
            ]
        )


def read_constants(words: Iterable[str]) -> Constants:
    """Constants from ``name=value`` words, the others as published; MinitxError if one is unknown,
    given twice, or not a number from 0 to ``LARGEST``."""
    known = [f.name for f in fields(Constants)]
    found: dict[str, float] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise MinitxError(f"--energy: expected NAME=VALUE, got {abbreviate(word)}.")
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else f"choose from {', '.join(known)}."
            raise MinitxError(f"--energy has no constant {abbreviate(name)}; {hint}")
        if name in found:
            raise MinitxError(f"--energy: {name} is given twice; give it once.")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = math.nan
        if not 0 <= found[name] <= LARGEST:  # NaN is not
            raise MinitxError(
                f"--energy: {name} must be a number from 0 to {LARGEST:g}; got {abbreviate(text)}."
            )
    return Constants(**found)
