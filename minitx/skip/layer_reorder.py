"""Run the middle layers in another order, or several of them side by side on the same input.

This file: the card and options, the stack that runs (online), the orders, checks, notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError, abbreviate
from minitx.model import Stack, Transformer
from minitx.state import State
from minitx.technique import SEEDS, at_least, need, need_independent_layers, swap, technique
from minitx.tree import Part, part


@technique(
    level="stack",
    exact=False,
    neutral={"order": "none"},
    demo={"order": "parallel", "first": 0, "last": 0},
    event="layer runs out of order",
    presets={
        "reverse": {"order": "reverse"},
        "shuffle": {"order": "shuffle"},
        "average": {"order": "parallel", "group": None, "combine": "mean"},
    },
)
def layer_reorder(
    lm,
    *,
    order: Annotated[
        Literal["none", "swap", "reverse", "shuffle", "parallel"] | None,
        "of the middle layers: swap neighbours, reverse all, shuffle, or run groups of them on the "
        "same input; default: parallel",
    ] = None,
    layers: Annotated[
        str | None,
        "instead of order: all layers by number from 0, as 0,2,1,3 (+ instead of the comma in "
        "minitx sweep, where commas separate settings)",
    ] = None,
    first: Annotated[int, "layers at the beginning that keep their place", at_least(0)] = 1,
    last: Annotated[int, "layers at the end that keep their place", at_least(0)] = 1,
    group: Annotated[
        int | None,
        "of order=parallel: layers that read the same input; None: all of the middle",
        at_least(1),
    ] = 2,
    combine: Annotated[
        Literal["sum", "mean"], "of order=parallel: what becomes of the updates of a group"
    ] = "sum",
    seed: Annotated[int, "of order=shuffle", SEEDS] = 0,
):
    """Reorder layers, or run pairs of layers in parallel on the same input.

    Paper:     other orders, and the mean: Sun et al., "Transformer Layers as Painters", AAAI 2025,
               arXiv 2407.09298. Parallel pairs: González et al., "Leveraging the True Depth of
               LLMs", TMLR 2026, arXiv 2502.02790.
    Fidelity:  reverse, swap, mean: the authors' code of the first paper. Pairs: a reconstruction
               from the abstract of the second. Unconfirmed: that it adds the updates of a pair.
    Kind:      approximate; exact at order=none. No setting pays on the shipped models: all layers
               run, so nothing is saved here. It shows how much the order of layers matters.
    Idea:      Layers read and write one residual stream. Where their updates hardly depend on each
               other, they may come in another order, or all read what the first of them reads.
    Offline:   a list of groups of layers, each layer once; middle layers: all but the ``first``
               first and the ``last`` last ones.
               swap:     each pair of neighbours in the middle: 0,2,1,4,3,...
               reverse:  the middle from its last layer to its first
               shuffle:  the middle in random order
               parallel: the middle in groups of ``group`` consecutive layers; else groups of one
    Online:    for each group:
                 u[l] = f[l](x) - x        the update of layer l of the group, all with one x
                 x    = x + sum of u[l]    (combine=mean: x + mean of u[l])
               Each layer keeps its own KV cache, wherever it runs.
    Saves:     no multiply-adds, weights or cache. With groups, sequential depth: n middle layers
               in groups of g take ceil(n / g) steps one after another instead of n, so that
               machines or cores may run a group side by side.
    In NumPy:  no gain: one core runs a group's layers one after another.
    Not for:   skipless models; the table of first_layer, unless layer 0 stays first.
    Proof:     tests/skip/test_layer_reorder.py; literal version:
               tests/skip/literal_layer_reorder.py
    Tutorial:  tutorials/12_which_layers_matter.py
    """
    check_model(lm)
    L = len(lm.model.stack.blocks)
    if layers is not None:
        if order is not None:
            raise MinitxError("layer_reorder: got both layers and order; give only one of them.")
        groups = [(index,) for index in read_layers(layers, L)]
    else:
        groups = plan(order or "parallel", L, first, last, group, seed)
    if groups == plan("none", L, first, last, group, seed):
        return lm
    need_independent_layers("layer_reorder", lm.model)
    check_first(lm, groups[0])

    def change(model: Transformer) -> Transformer:
        stack = ReorderedStack(model.stack, in_words(groups), tuple(groups), combine == "mean")
        return replace(model, stack=stack)

    return swap(lm, Transformer, change)


# Online ------------------------------------------------------------------------------------------


@part
class ReorderedStack(Part):
    """The blocks, group after group; those of a group read the same input."""

    # Declared for techniques that are combined with this one (tree.Part):
    needs_inner_first = True

    inner: Part  # the dense stack
    order: str  # the groups in words, for the drawing: 0 (1 2) 3
    groups: tuple  # tuples of layer numbers, in the order in which they run
    mean: bool  # divide the sum of a group's updates by their number?

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    def __call__(self, x, state: State):
        place = 0
        for group in self.groups:
            y = [self.inner.run(x, state, index, index + 1) for index in group]
            moved = len(group) - 1 if len(group) > 1 else int(group[0] != place)
            ledger.event("layer runs out of order", moved * x.size // x.shape[-1])
            place += len(group)
            if len(group) == 1:
                x = y[0]
            else:
                update = sum(f - x for f in y)
                x = x + (update / len(group) if self.mean else update)
        return x


# Offline: orders ---------------------------------------------------------------------------------


def plan(order: str, L: int, first: int, last: int, group: int | None, seed: int) -> list[tuple]:
    """Groups of the layers 0 .. L - 1, in the order in which they run."""
    middle = list(range(min(first, L), max(L - last, min(first, L))))
    size = 1 if order != "parallel" else group or len(middle) or 1
    if order == "swap":
        middle = [b for a in range(0, len(middle), 2) for b in reversed(middle[a : a + 2])]
    elif order == "reverse":
        middle.reverse()
    elif order == "shuffle":
        middle = np.random.default_rng(seed).permutation(middle).tolist()
    groups = [tuple(middle[a : a + size]) for a in range(0, len(middle), size)]
    before, after = range(min(first, L)), range(min(first, L) + len(middle), L)
    return [*((index,) for index in before), *groups, *((index,) for index in after)]


def in_words(groups: list[tuple]) -> str:
    """0 (1 2) 3: layers 1 and 2 run side by side."""
    names = [" ".join(map(str, group)) for group in groups]
    return " ".join(f"({name})" if " " in name else name for name in names)


# Checks ------------------------------------------------------------------------------------------


def read_layers(text: str, L: int) -> list[int]:
    """The order given by a text such as ``0,2,1,3`` or ``0+2+1+3``."""
    names = [name.strip() for name in text.replace("+", ",").split(",")]
    if sorted(names) != sorted(map(str, range(L))):
        raise MinitxError(
            f"layer_reorder: layers={abbreviate(text)} must name each of the layers 0 to {L - 1} "
            "once, separated by commas (by + in minitx sweep); to leave out layers, use layer_skip."
        )
    return [int(name) for name in names]


def check_model(lm) -> None:
    if lm.model.config.skipless:
        raise MinitxError(
            "layer_reorder needs residual connections and this model is skipless: there each layer "
            "reads another kind of hidden state; leave layer_reorder out."
        )
    need(lm.model.stack, Stack)


def check_first(lm, group: tuple) -> None:
    """Refuse to run another layer than 0 on the rows of first_layer's table, which are wider."""
    if group == (0,):
        return
    x = lm.model.embed(np.array([0]), slice(0, 1))
    if x.shape[-1] != lm.model.config.width:
        raise MinitxError(
            f"layer_reorder would run layer {group[-1]} on the embedding, which first_layer has "
            "replaced by a table for layer 0; keep layer 0 first (first=1), or leave first_layer "
            "out."
        )


# Notes:
#
# - Read of the first paper: its abstract and most of its code for Mistral, which has the middle
#   reversed, two neighbours exchanged, and the middle in parallel with its outputs averaged (the
#   mean of the outputs is x plus the mean of the updates; the keys and values of those layers,
#   which it averages in one cache slot, are kept apart here). Unconfirmed: that it shuffles, too.
#   Of the second paper the abstract: consecutive layers in pairs that run in parallel.
# - Measured on stories (minitx sweep layer-reorder order=parallel,reverse,swap,shuffle first=1,4
#   --stories 60). Loss above dense in nats per token; then the accuracy of answers by hops, the
#   number of facts that they combine (dense: 99 / 93 / 100 %). All take 1.000x multiply-adds.
#
#       order       runs                       loss     1 / 2 / 3 hops     depth
#       parallel    0 (1 2) (3 4) (5 6) 7    +0.0088     99 / 89 /  92     5 of 8 (the default)
#       swap        0 2 1 4 3 6 5 7          +0.0448     96 / 86 /  86     8
#       shuffle     0 4 3 6 5 1 2 7          +0.7482     35 / 27 /  33     8
#       reverse     0 6 5 4 3 2 1 7          +2.4379     32 / 27 /  28     8
#       first=4, so layers 4 to 6 in each of the orders: at most +0.0005, the same answers as dense
#
#   To read the same input costs a pair less than to change places: in a pair only the second layer
#   misses the update of the first; exchanged, the first gets one that it never saw, too. Layers 4
#   to 6 commute, but they hardly matter at all: layer_skip drops all three for 0.005 nats.
# - stories was trained with LayerSkip's layer dropout, so layers have learned to miss others. Of
#   stories-parallel (four layers, without it) the middle pair in parallel costs 0.24 nats per token
#   of 12 calibration stories, exchanged 0.78; of stories-relu 0.30 and 0.90.
# - A layer keeps its number, its KV cache and what techniques remember for it, wherever it runs.
#   ``layers`` names an order by hand; order, first, last and group are then without effect.
# - The pairs of the second paper pay on several devices, each of which holds half of the matrices
#   of both layers: fewer steps, and fewer exchanges between devices. Here nothing is timed that a
#   single core could gain (0.92x to 0.97x: a few more additions per layer).
