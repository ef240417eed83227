"""The comparison of a model with its reference outputs: differences, verdict, and how to print it.

Two correct programs differ by rounding, because they add in another order. float64 tells rounding
from mistakes: it has 9 more digits, so rounding shrinks by nine orders of magnitude and a mistake
does not. ``check.py`` runs the models.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minitx.differences import decapitalized, describe, scale_of
from minitx.lab.layout import table
from minitx.lab.reference import DTYPES, Reference

# The largest error, relative to the largest value of the stage, that counts as rounding: float32
# has 7 digits and float64 has 16, and a dozen layers may lose a few of them.
ALLOWED = {"float32": 2e-5, "float64": 1e-10}
SLIGHT = 1e-3  # in float32, more than this is not rounding, even if float64 agrees
SINGLE = 1e-6  # in float64, an error below this may come from a step that runs in float32

AGREES, ROUNDING, BUG = "agrees", "rounding", "bug"  # the verdicts


@dataclass(frozen=True)
class Stage:
    """The values after one stage of the forward pass, or after one step inside a block, compared in
    both dtypes."""

    name: str
    largest: float  # the reference's largest absolute value
    error: dict[str, float]  # by dtype: the largest absolute difference; NaN if ours has NaN
    difference: str = ""  # of more than rounding: where and how it differs, in a sentence

    @property
    def relative(self) -> dict[str, float]:
        return {dtype: error / (self.largest or 1.0) for dtype, error in self.error.items()}

    @property
    def ok(self) -> dict[str, bool]:
        return {dtype: error <= ALLOWED[dtype] for dtype, error in self.relative.items()}

    @property
    def is_bug(self) -> bool:
        """Is the difference larger than rounding? (Written so that NaN counts as a bug.)"""
        return not (self.ok["float64"] and self.relative["float32"] <= SLIGHT)

    def row(self) -> list[str]:
        row = [self.name, f"{self.largest:.3g}"]
        for dtype in DTYPES:
            row += [power(self.error[dtype]), power(self.relative[dtype]), mark(self.ok[dtype])]
        return row

    def as_dict(self) -> dict:
        compared = {
            dtype: {
                "error": finite(self.error[dtype]),
                "relative": finite(self.relative[dtype]),
                "ok": self.ok[dtype],
            }
            for dtype in DTYPES
        }
        return {"stage": self.name, "largest": self.largest, **compared}


def compare_values(
    name: str,
    found: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    positions: Sequence[int],
    axes: tuple[str, ...] = ("column",),
) -> Stage:
    """Compare the values (R, ...) after a stage, by dtype, at R positions. axes: the names of the
    axes after the position."""
    largest = float(np.abs(expected["float64"]).max())
    error = {dtype: _largest_difference(found[dtype], expected[dtype]) for dtype in DTYPES}
    stage = Stage(name, largest, error)
    if not stage.is_bug:
        return stage
    dtype, allowed = ("float32", SLIGHT) if stage.ok["float64"] else ("float64", ALLOWED["float64"])
    for position, ours, theirs in zip(positions, found[dtype], expected[dtype]):
        said = describe(ours, theirs, axes, allowed * largest / scale_of(theirs))
        if said is not None:
            said = f"At position {position}, {decapitalized(said)}"
            return Stage(name, largest, error, said)
    raise AssertionError("a stage with a bug differs at some position")


def _largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Inf for other shapes; NaN if there is any."""
    return float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf


@dataclass(frozen=True)
class Inside:
    """The steps inside the first block that differs, compared at a few positions. Their reference
    is transformers in float64."""

    block: str
    steps: list[Stage]
    positions: Sequence[int]

    @property
    def bug(self) -> Stage | None:
        """The first step with more than rounding."""
        return next((step for step in self.steps if step.is_bug), None)

    @property
    def where(self) -> str:
        return "at positions " + " and ".join(map(str, self.positions))

    @property
    def explanation(self) -> str:
        if self.bug:
            return (
                f"Inside {self.block} it begins in the {self.bug.name}: "
                f"{decapitalized(self.bug.difference)}"
            )
        return (
            f"Inside {self.block}, every step agrees {self.where}: look at what is added to the "
            "residual stream at the end of the block, and at other positions."
        )

    def __str__(self) -> str:
        return f"Inside {self.block}, {self.where}:\n\n{stage_table(self.steps, 'step')}"

    def as_dict(self) -> dict:
        return {
            "block": self.block,
            "bug_in": self.bug and self.bug.name,
            "explanation": self.explanation,
            "steps": [step.as_dict() for step in self.steps],
        }


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared for one model."""

    reference: Reference
    title: str  # what kind of model it is
    stages: list[Stage]
    greedy: dict[str, int]  # by dtype: greedy tokens that match before the first mismatch
    wrong_text: int | None  # index of the first text with other token ids
    inside: Inside | None = None  # if the first wrong stage is a block

    @property
    def name(self) -> str:
        return self.reference.name

    def greedy_ok(self, dtype: str) -> bool:
        return self.greedy[dtype] == len(self.reference.greedy)

    def worst(self, dtype: str) -> float:
        """The largest relative error of any stage; Inf if one has NaN."""
        errors = [stage.relative[dtype] for stage in self.stages]
        return max(math.inf if math.isnan(error) else error for error in errors)

    @property
    def bug(self) -> Stage | None:
        """The first stage with more than rounding; later stages inherit its error."""
        return next((stage for stage in self.stages if stage.is_bug), None)

    @property
    def verdict(self) -> str:
        """BUG: more than rounding. ROUNDING: float32 lost more digits than usual, but float64
        agrees. AGREES: everything is within the usual rounding."""
        if self.bug or not self.greedy_ok("float64") or self.wrong_text is not None:
            return BUG
        usual = all(stage.ok["float32"] for stage in self.stages) and self.greedy_ok("float32")
        return AGREES if usual else ROUNDING

    @property
    def explanation(self) -> str:
        """The verdict as a sentence."""
        single, double = self.worst("float32"), self.worst("float64")
        if self.verdict == AGREES:
            return (
                f"Agrees. The largest relative error is {single:.1e} in float32 and {double:.1e} "
                "in float64: it shrinks, so it is rounding."
            )
        if self.verdict == ROUNDING:
            first = next(
                (s.name for s in self.stages if not s.ok["float32"]), "the greedy continuation"
            )
            return (
                f"Rounding, not a bug: float32 is off by up to {single:.1e}, more than usual "
                f"(first in {first}), but float64 only by {double:.1e}. The formulas are right; "
                "float32 loses digits."
            )
        if self.bug:
            more = self.inside.explanation if self.inside else self.bug.difference
            return f"{explain_bug(self.bug)} {more}"
        if not self.greedy_ok("float64"):
            return (
                f"A bug: it first appears in the greedy continuation, after "
                f"{self.greedy['float64']} matching tokens. One pass over the "
                "whole text agrees, so look at what only decoding uses: the KV cache, "
                "and the positions of later tokens."
            )
        return (
            "A bug in the tokenizer: on the same ids the model agrees, but text "
            f"{self.wrong_text} of the reference (counting from 0) gives other ids."
        )

    def __str__(self) -> str:
        """The whole comparison as text."""
        about, total = self.reference.about, len(self.reference.greedy)
        by = f"transformers {about['versions']['transformers']}"
        length, rows = len(self.reference.ids), len(self.reference.rows)
        lines = [
            f"{self.name} ({self.title})",
            f"against {by}, on {length} tokens of text, compared at {rows} positions",
            "",
            stage_table(self.stages),
            "",
        ]
        if self.inside:
            lines += [str(self.inside), ""]
        for dtype, same in self.greedy.items():
            ok = self.greedy_ok(dtype)
            lines.append(f"{mark(ok):<6} greedy in {dtype}: {same} of {total} tokens match")
        if "texts" in about:
            ok = self.wrong_text is None
            lines.append(f"{mark(ok):<6} tokenizer: {self._tokenizer_result()}")
        return "\n".join([*lines, "", textwrap.fill(self.explanation, 100)])

    def _tokenizer_result(self) -> str:
        texts = self.reference.about["texts"]
        if self.wrong_text is None:
            return f"the same ids for {len(texts)} texts"
        return f"other ids for {texts[self.wrong_text][0][:40]!r}"

    def line(self) -> str:
        """The comparison in one line."""
        errors = "  ".join(f"{dtype} {self.worst(dtype):.1e}" for dtype in DTYPES)
        return f"{mark(self.verdict != BUG):<6} {self.name:<26} {errors}"

    def as_dict(self) -> dict:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "explanation": self.explanation,
            "bug_in": self.bug and self.bug.name,
            "stages": [stage.as_dict() for stage in self.stages],
            "inside": self.inside and self.inside.as_dict(),
            "greedy": {"tokens": len(self.reference.greedy), "same": self.greedy},
            "tokenizer_ok": self.wrong_text is None if "texts" in self.reference.about else None,
            "versions": self.reference.about["versions"],
        }


def explain_bug(first: Stage) -> str:
    """Describe a bug by the first stage that shows it."""
    single, double = first.relative["float32"], first.relative["float64"]
    words = f"A bug: it first appears in {first.name}"
    if not (math.isfinite(single) and math.isfinite(double)):
        return f"{words}, where there are NaN or Inf."
    words += f", by {single:.1e} in float32 and {double:.1e} in float64. "
    if first.ok["float64"]:
        return words + "Only float32 is wrong, by far more than rounding."
    if double < SINGLE:
        return words + (
            "That is too much for float64 but within the rounding of float32: perhaps a step "
            "always runs in float32, or a constant has too few digits."
        )
    return words + "It does not shrink in float64, so it is not rounding."


def stage_table(stages: list[Stage], kind: str = "stage") -> str:
    head = [kind, "largest", "float32 error", "relative", "", "float64 error", "relative", ""]
    lines = table([head, *(stage.row() for stage in stages)]).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def mark(ok: bool) -> str:
    return "[OK]" if ok else "[DIFF]"


def power(x: float) -> str:
    return f"{x:.1e}" if x else "0"


def finite(x: float) -> float | None:
    """JSON has no NaN and no Inf."""
    return x if math.isfinite(x) else None
