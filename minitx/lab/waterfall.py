"""``minitx waterfall``: what each flag saves when it is added to those before it, part by part.

    minitx waterfall --fold-norms --early-exit --quantize

The dense model, then the model with the first technique, with the first two, and so on, in the
order in which they are applied. Each continues the same prompts greedily, as in ``minitx compare``;
the ledger's counts per new token, prefill included, are stacked by part.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate

from minitx import progress
from minitx.errors import MinitxError
from minitx.lab.compare import NEW, Workload, continue_all, per_token, to_read
from minitx.ledger import Entry
from minitx.pictures.bars import stacked
from minitx.pictures.output import write_picture
from minitx.pictures.waterfall import draw, in_short
from minitx.technique import apply, as_words, find, in_order

WORK = Workload(stories=4, prompts=4)
COUNTED = {
    "multiply_adds": "multiply-adds",
    "additions": "additions of table entries",
    "weight_bytes": "bytes of weights read",
    "cache_bytes": "bytes of KV cache read",
}


@dataclass(frozen=True)
class Step:
    """The model with one technique more."""

    label: str
    parts: dict[str, Entry]  # per new token

    def amounts(self, name: str) -> dict[str, int]:
        """By part; of those that count anything."""
        found = {part: getattr(entry, name) for part, entry in self.parts.items()}
        return {part: amount for part, amount in found.items() if amount}


@dataclass(frozen=True)
class Waterfall:
    model: str
    measured: str
    steps: list[Step]

    def as_dict(self) -> dict:
        return asdict(self)

    def panels(self) -> list[tuple[str, list]]:
        """(what is counted, [(label, amounts by part)]), of what is not 0 everywhere."""
        found = []
        for name, words in COUNTED.items():
            steps = [(step.label, step.amounts(name)) for step in self.steps]
            if any(amounts for _, amounts in steps):
                found.append((f"{words} per new token", steps))
        return found

    def __str__(self) -> str:
        name = self.model or "The model"
        parts = [f"{name} continues {self.measured} by {NEW} tokens each, prefill included."]
        panels = self.panels()
        names = list(dict.fromkeys(p for _, steps in panels for _, each in steps for p in each))
        for words, steps in panels:
            totals = [in_short(sum(amounts.values())) for _, amounts in steps]
            wide = max(map(len, totals))
            rows = [(f"{label}  {total:>{wide}}", amounts)
                    for (label, amounts), total in zip(padded(steps), totals)]  # fmt: skip
            parts.append(f"{words[0].upper() + words[1:]}:\n{stacked(rows, parts=names)}")
        return "\n\n".join(parts)

    def picture(self, path) -> None:
        """As an SVG or PNG file (pictures/output.py)."""
        write_picture(draw(self.panels(), f"{self.model}: what each flag saves"), path)


def padded(steps: list) -> list:
    wide = max(len(label) for label, _ in steps)
    return [(f"{label:{wide}}", amounts) for label, amounts in steps]


def waterfall(
    dense, wanted: Mapping[str, dict], plan: Workload = WORK, grade="full", bar: bool = True
) -> Waterfall:
    """The steps from an LM without techniques to one with all those that are wanted ({name:
    options}). MinitxError for none, or if they do not fit the model or each other."""
    if not wanted:
        raise MinitxError(
            "Expected at least one technique, such as --early-exit (minitx list shows them all)."
        )
    order = [technique.name for technique in in_order(map(find, wanted))]
    apply(dense, dict(wanted))  # refuses what does not fit, before the work
    chosen = [{}, *accumulate(({name: wanted[name]} for name in order), lambda a, b: a | b)]
    material = to_read(dense, plan, grade)
    prompts = material.prompts(plan.prompts)
    steps = []
    with progress.bar(len(chosen) * len(prompts), "waterfall", unit="run", shown=bar) as shown:
        for number, techniques in enumerate(chosen):
            shown.set_description(label_of(order[number - 1], wanted) if number else "dense")
            lm = apply(dense, techniques) if techniques else dense
            texts, counts = continue_all(lm, prompts, shown.update)
            parts = per_token(counts, sum(map(len, texts)) or 1)
            label = f"+ {label_of(order[number - 1], wanted)}" if number else "dense"
            steps.append(Step(label, parts))
    return Waterfall(dense.name, f"{len(prompts)} prompts ({material.name})", steps)


def label_of(name: str, wanted: Mapping[str, dict]) -> str:
    return f"{find(name).flag[2:]} {as_words(wanted[name])}".strip()
