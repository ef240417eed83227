"""What a technique does in each layer: the events that it counts, and the multiply-adds it leaves.

    python -m minitx.lab.layer_events memoize_ffn radius=0.3 -m stories --stories 20
    python -m minitx.lab.layer_events delta threshold=0.5 --parts

The model reads held-out stories, each in one pass (techniques that use the union of several tokens'
rows are asked for each token's own by prompts=skip). A row is a layer; with --parts it is a part of
the block, over all layers. Multiply-adds are those of the part and of what is inside it, relative
to the same part of the dense model ("-": it has no such part). An event that is counted beside the
number of times that it might have happened ("hits" beside "lookups") is printed as a share of that.
"""

import argparse
from collections import Counter
from dataclasses import dataclass

from minitx.exit_status import run_module
from minitx.lab.evaluate import encode, held_out
from minitx.lab.layout import fit, table
from minitx.ledger import Ledger, counting, is_below
from minitx.lm import load
from minitx.technique import Technique, apply, find

MONITORED = ("checks above the limit", "quality checks")  # shared/quality_monitor.py


@dataclass(frozen=True)
class LayerEvents:
    """What was counted, by layer ("0", "1", ...) or by part of the block ("ffn.down")."""

    title: str
    shares: tuple[tuple[str, str], ...]  # pairs of events: some, and all
    events: dict[str, Counter]
    multiply_adds: dict[str, int]
    dense: dict[str, int]

    def __str__(self) -> str:
        whole = sum(self.events.values(), Counter())
        shares = [(some, every) for some, every in self.shares if whole[every]]
        counted = [name for name in whole if all(name != some for some, _ in shares)]
        rows = [["", "multiply-adds", *(some for some, _ in shares), *counted]]
        for key in sorted({*self.multiply_adds, *self.events}, key=in_order):
            events, dense = self.events.get(key, Counter()), work_below(self.dense, key)
            if events or dense:  # else: a small part inside another one, which counts its work
                work = ratio(work_below(self.multiply_adds, key), dense)
                rows.append([key, work, *figures(events, shares, counted)])
        work = ratio(sum(self.multiply_adds.values()), sum(self.dense.values()))
        rows.append(["all", work, *figures(whole, shares, counted)])
        said = [f"{some}: % of {every}." for some, every in shares]
        return "\n".join([fit(" ".join([self.title, *said])), "", table(rows)])


def figures(events: Counter, shares, counted: list[str]) -> list[str]:
    found = [f"{events[some] / events[every]:.1%}" if events[every] else "-"
             for some, every in shares]  # fmt: skip
    return found + [f"{events[name]:,}" if events[name] else "-" for name in counted]


def ratio(work: int, dense: int) -> str:
    return f"{work / dense:.3f}x" if dense else "-"


def in_order(key: str) -> tuple:
    """Layers by their numbers, parts by their names."""
    return (int(key), "") if key.isdecimal() else (0, key)


def work_below(work: dict[str, int], key: str) -> int:
    """The work of a part and of those inside it, which a technique may have replaced by one."""
    return sum(n for path, n in work.items() if is_below(path, key))


def layer_events(lm, technique: Technique, options: dict, stories: int = 4, parts: bool = False):
    """The ``LayerEvents`` of one technique on an LM without techniques."""
    context = lm.model.config.context
    texts = [text.ids[:context] for text in encode(lm.tokenizer, held_out(lm, stories))]
    tokens = sum(map(len, texts))
    dense, changed = (count(x, texts) for x in (lm, apply(lm, {technique.name: options})))
    pair = (technique.event,) if isinstance(technique.event, tuple) else ()
    return LayerEvents(
        f"{technique.flag} on {lm.name}: {len(texts)} held-out stories, {tokens:,} tokens.",
        (*pair, MONITORED),
        by_key(changed.events_at, parts, Counter()),
        by_key({p: entry.multiply_adds for p, entry in changed.entries.items()}, parts, 0),
        by_key({p: entry.multiply_adds for p, entry in dense.entries.items()}, parts, 0),
    )


def count(lm, texts) -> Ledger:
    with counting(lm) as counts:
        for ids in texts:
            lm.model.hidden(ids)
    return counts


def by_key(amounts: dict, parts: bool, zero) -> dict:
    """Sums of what was counted below the blocks, by layer or by part of the block."""
    found: dict = {}
    for path, amount in amounts.items():
        if key := key_of(path, parts):
            found[key] = found.get(key, zero) + amount
    return found


def key_of(path: str, parts: bool) -> str:
    """``model.stack.blocks.3.ffn.down`` -> ``3``, or ``ffn.down`` for parts; "" outside the
    blocks."""
    index, _, part = path.partition("blocks.")[2].partition(".")
    if not index or not parts:
        return index
    return ".".join(word for word in part.split(".") if word != "inner") or "block"


def main(words=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.layer_events", description="What a technique does in each layer."
    )
    parser.add_argument("technique", help="its name, as minitx list has it")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="its options")
    parser.add_argument("-m", "--model", default="stories", help="default: %(default)s")
    parser.add_argument("--stories", type=int, default=4, help="to read; default: %(default)s")
    parser.add_argument("--parts", action="store_true", help="a row for each part of a block")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given))


def run(given: argparse.Namespace) -> None:
    technique = find(given.technique)
    options = technique.read(given.options)
    print(layer_events(load(given.model), technique, options, given.stories, given.parts))


if __name__ == "__main__":
    main()
