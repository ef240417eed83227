"""Loop perforation over positions: the FFN runs at some positions only (PerforatedCNN).

The card and options, the two parts that run (online), the random baseline's positions (offline),
notes.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.shared.random_baseline import random_scores
from minitx.shared.row_by_row import each_sequence
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, blocks_of, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="ffn",
    exact=False,
    neutral={"stride": 1},
    after=("ffn_skip", "function_tables", "memoize_ffn"),
    demo={"stride": 2, "first": 0},
    event=("FFN positions run", "FFN positions"),
    presets={"paper": {"fill": "copy"}, "aggressive": {"stride": 4}},
)
def perforate_positions(
    lm,
    *,
    stride: Annotated[int, "the FFN runs at positions divisible by this", at_least(1)] = 2,
    first: Annotated[
        int | None,
        "layers at the beginning whose FFNs run at every position; default: L // 2",
        at_least(0),
    ] = None,
    fill: Annotated[
        Literal["none", "copy"],
        "the FFN's output at other positions: nothing is added, or a copy of the output at the "
        "nearest earlier position where it ran",
    ] = "none",
    choose: Annotated[
        Literal["stride", "random"],
        "positions at equal distances, or, as a baseline, as many at random",
    ] = "stride",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Run the FFN at every s-th position only, and copy or leave out its output at the others.

    Paper:     Figurnov et al., "PerforatedCNNs: Acceleration through Elimination of Redundant
               Convolutions", NIPS 2016, arXiv 1504.08362.
    Fidelity:  the authors' code for the nearest computed position, made causal: only earlier ones.
               Ours: the FFN of a transformer instead of a convolution, fill=none, the layers.
    Kind:      approximate; exact at stride=1.
    Idea:      In an image, neighbouring positions have nearly the same outputs, so a layer may run
               at some and copy them to the others. The same for the positions of a text, where
               outputs turn out not to be alike (Notes).
    Offline:   nothing.
    Online:    in each layer from ``first`` on, for the token at position i:
                 if i mod stride = 0:   y_i = FFN(x_i)
                 otherwise none:        y_i = 0         the residual stream is unchanged
                           copy:        y_i = y_j,  j < i the nearest position where the FFN ran
               (With copy, an FFN that has not run yet runs, whatever the position.)
    Saves:     3 D F multiply-adds (2 D F without a gate) per token and layer where it does not run:
               a share 1 - 1 / stride of the FFNs from ``first`` on.
    In NumPy:  as fast as dense on stories, whose FFNs are small; copy 0.9x. A prompt gathers the
               rows of the tokens that run and multiplies those only.
    Not for:   models whose late FFNs matter: SmolLM2-135M-Instruct is ruined at stride=2. The first
               layers. Models without residual connections. Random positions do as well (Notes).
    Proof:     tests/skip/test_perforate_positions.py; literal version:
               tests/skip/literal_perforate_positions.py
    Tutorial:  tutorials/16_nothing_new_under_the_sun.py
    """
    if lm.model.config.skipless:
        raise MinitxError(
            "perforate_positions needs residual connections and this model is skipless: its FFN "
            "replaces the hidden state; leave perforate_positions out."
        )
    L, context = len(blocks_of(lm)), lm.model.config.context
    first = L // 2 if first is None else first
    if first > L:
        raise MinitxError(
            f"perforate_positions: first must be at most {L}, the number of layers; got {first}."
        )
    if stride == 1:
        return lm
    runs = np.broadcast_to(np.arange(context) % stride == 0, (L, context))
    if choose == "random":
        runs = as_many_at_random(random_scores(L, context, seed), stride)
    kind = CopiedPositions if fill == "copy" else SkippedPositions
    return wrap(lm, "ffn", lambda ffn, i: ffn if i < first else kind(ffn, np.array(runs[i])))


# Online ------------------------------------------------------------------------------------------


@part
class SkippedPositions(Part):
    """An FFN that runs at some positions, and adds nothing at the others."""

    one_sequence = True  # in a batch, sequences of different lengths have other positions

    inner: Part
    runs: np.ndarray = table()  # (context,) booleans

    def __call__(self, x, layer: Layer):
        if x.ndim > 2:
            because = "perforate_positions runs FFNs at other positions of each sequence"
            return each_sequence(self.one, x, layer, because)
        return self.one(x, layer)

    def one(self, x, layer: Layer):
        """x (T, D) of one sequence -> (T, D)"""
        some = self.runs[layer.tokens.array]  # (T,)
        y = np.zeros_like(x)
        y[some] = self.run(x, some, layer)
        return y

    def run(self, x, some, layer: Layer):
        """FFN(x) of some tokens, (n, D). some (T,): booleans."""
        ledger.event("FFN positions", len(some))
        ledger.event("FFN positions run", some)
        if some.all():
            return self.inner(x, layer)
        if not some.any():
            return x[:0]
        tokens, layer.tokens = layer.tokens, layer.tokens.only(some)
        found = self.inner(x[some], layer)
        layer.tokens = tokens
        return found


@part
class CopiedPositions(SkippedPositions):
    """An FFN that runs at some positions; the others get a copy of the last output before them."""

    has_history = True  # remembers outputs

    def one(self, x, layer: Layer):
        if not len(x):
            return x
        positions, before = layer.tokens.array, layer.memory.recall(self, Outputs)
        some, last = self.runs[positions], before.rows[-1:]  # last: one row, or none yet
        some[0] |= not last  # nothing to copy
        new = self.run(x, some, layer)
        before.add(positions[some], new)
        copied = np.cumsum(some) - 1 + len(last)  # (T,) which row each token gets
        return np.array([*last, *new])[copied]


class Outputs:
    """The outputs at the positions where an FFN ran. Only the last is copied; the others are there
    for ``rewind``."""

    def __init__(self):
        self.positions: list[int] = []
        self.rows: list[np.ndarray] = []  # (D,) each

    def add(self, positions, rows) -> None:
        self.positions += positions.tolist()
        self.rows += list(rows)

    def rewind(self, position: int) -> None:
        count = sum(p < position for p in self.positions)
        del self.positions[count:], self.rows[count:]


# Offline -----------------------------------------------------------------------------------------


def as_many_at_random(scores, stride: int):
    """(L, context) booleans: one position in each run of ``stride`` positions, the one with the
    highest score."""
    L, context = scores.shape
    padded = np.pad(scores, ((0, 0), (0, -context % stride)), constant_values=-1)
    best = padded.reshape(L, -1, stride).argmax(-1)  # (L, runs)
    found = best[..., None] == np.arange(stride)
    return found.reshape(L, -1)[:, :context]


# Notes:
#
# - The outputs of an FFN are not a smooth function of the position: they depend on the token, and a
#   copy of another token's output is worse than none. PerforatedCNN's interpolation needs
#   neighbours that are alike, as pixels are.
# - For the same reason it does not matter which positions run: random ones, one in each run of
#   ``stride``, do as well. What matters is the layer, which layer_skip unit=ffn leaves out whole.
# - stories hardly needs its late FFNs (--layer-skip unit=ffn drops them). SmolLM2-135M-Instruct
#   (not shipped) does: minitx compare --perforate-positions on 128 tokens of a text, 0.84x of the
#   multiply-adds, 2.96 nats per token become 9.08.
# - copy keeps D numbers per layer and position that ran, so that ``rewind`` can go back to them.
# - Figures on stories, one BLAS thread:
#       minitx sweep perforate-positions stride=2,4 fill=none,copy --stories 60
#       minitx sweep perforate-positions stride=2,4 choose=random --stories 60
#       minitx sweep perforate-positions stride=2,4 first=1 --stories 60
#   Loss is above dense, in nats per token; the hops are right answers to questions that need 1, 2
#   or 3 facts (dense: 99 / 93 / 100 %):
#
#       stride  fill  choose  first   multiply-adds  loss     1 / 2 / 3 hops   speed
#       2       none  stride  4       0.84x          +0.004   99 / 91 / 100 %  1.0x
#       4       none  stride  4       0.76x          +0.007   99 / 91 / 100 %  1.0x
#       2       copy  stride  4       0.84x          +0.140   98 / 78 / 100 %  0.9x
#       4       copy  stride  4       0.76x          +0.127   96 / 80 / 97 %   0.9x
#       2       none  random  4       0.84x          +0.003   99 / 93 / 100 %  1.0x
#       4       none  random  4       0.76x          +0.006   99 / 93 / 100 %  1.1x
#       2       none  stride  1       0.72x          +0.556   96 / 89 / 92 %   1.1x
#       4       none  stride  1       0.57x          +0.827   89 / 87 / 94 %   1.2x
