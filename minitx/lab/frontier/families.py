"""The families of ``minitx frontier``: which techniques stand beside each other, and at the same
share of what.

A family of techniques that execute fewer multiply-adds needs an entry here and a module
``minitx/lab/frontier/NAME.py`` with a table ``METHODS`` (see structure.py): equal_work.py measures
it. ``attention`` has its own measurements (attention.py), and so has ``decoding`` (decoding.py),
whose methods are not tuned: each is shown at settings of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from minitx.errors import MinitxError, abbreviate, one_of
from minitx.lab.frontier.knobs import Method


@dataclass(frozen=True)
class Family:
    """Techniques that are compared at the same share of ``equal``, or on the same prompts."""

    name: str
    equal: str | None  # "keys" or "multiply-adds"; None: nothing is tuned
    shares: tuple[float, ...]  # by default
    summary: str
    table: str  # the module with its METHODS
    baselines: tuple[str, ...]  # those of the methods that are no techniques

    @property
    def methods(self) -> Sequence[Method]:
        return import_module(f"minitx.lab.frontier.{self.table}").METHODS

    def compare(self, dense, bar: bool = True, **plan):
        """The comparison on an LM without techniques: ``plan`` are the fields of attention.Grid, of
        decoding.Plan, or else of equal_work.Plan."""
        if self.equal is None:
            from minitx.lab.frontier.decoding import Plan, compare_decoding

            return compare_decoding(dense, self.methods, Plan(**plan), bar)
        if self.equal == "keys":
            from minitx.lab.frontier.attention import Grid, compare_attention

            return compare_attention(dense, Grid(**{"shares": self.shares} | plan), bar)
        from minitx.lab.frontier.equal_work import Plan, compare_work

        return compare_work(dense, self, Plan(**{"shares": self.shares} | plan), bar)


FAMILIES = (
    Family(
        "attention",
        "keys",
        (1 / 2, 1 / 4, 1 / 8),
        "sparse attention methods at the same share of keys",
        "attention_methods",
        ("oracle", "window", "random"),
    ),
    Family(
        "structure",
        "multiply-adds",
        (0.9, 0.75, 0.5),
        "techniques that skip layers, sub-layers, heads, neurons or tokens, at the same executed "
        "share of multiply-adds",
        "structure",
        ("random", "static"),
    ),
    Family(
        "calculation",
        "multiply-adds",
        (0.9, 0.75, 0.5),
        "techniques that skip products: zeros, negatives, predicted and reused ones, perforation",
        "calculation",
        ("random", "static"),
    ),
    Family(
        "decoding",
        None,
        (),
        "techniques that skip whole passes of the model, or whole answers: drafts, second models "
        "and caches, on the same prompts",
        "decoding_methods",
        ("plain",),
    ),
)


def family_of(name: str) -> Family:
    known = {family.name: family for family in FAMILIES}
    if name not in known:
        raise MinitxError(f"There is no family {abbreviate(name)}; {one_of(name, known)}")
    return known[name]
