"""Mixture-of-Depths: every second block runs only the tokens that its router lets in.

This file: the card and options, the routed block and its routers (online), which routers (offline),
notes. Read next: fit.py (a router by least squares) and file.py (the file of trained routers).
Training routers together with their model: minitx/training/mixture_of_depths.py.

Letters: T new tokens, D width, L blocks, numbered from 0.
"""

import warnings
from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.calibration import calibration_ids, remembered
from minitx.errors import MinitxError, MinitxWarning
from minitx.shared.random_baseline import random_scores
from minitx.shared.row_by_row import each_row
from minitx.skip.mixture_of_depths.file import FILE, Trained, read_routers
from minitx.skip.mixture_of_depths.fit import fit_routers
from minitx.state import Layer
from minitx.technique import (
    SEEDS,
    above,
    at_least,
    blocks_of,
    need_independent_layers,
    technique,
    wrap,
)
from minitx.tree import Part, float_type, part, table


@technique(
    level="block",
    exact=False,
    neutral={"router": "random", "capacity": 1.0},
    after=("kv_share", "layer_skip"),
    demo={"router": "fitted", "capacity": 0.5, "stories": 4},
    event=("tokens that entered a block", "tokens routed"),
    presets={"paper": {"router": "fitted", "capacity": 0.125, "first": 1, "every": 2}},
)
def mixture_of_depths(
    lm,
    *,
    router: Annotated[
        Literal["auto", "trained", "fitted", "random"],
        f"trained: from {FILE}; fitted: by least squares, for a model that was not trained with "
        "routers; random: a baseline; auto: trained if there is that file, else fitted",
    ] = "auto",
    capacity: Annotated[
        float | None,
        "of fitted and random: share of the tokens that enter a routed block (fitted: about); "
        "default: as in the training, or 0.25",
        above(0, 1),
    ] = None,
    every: Annotated[
        int | None,
        "of fitted and random: blocks from one routed block to the next (paper: 2); default: as in "
        "the training, or 1",
        at_least(1),
    ] = None,
    first: Annotated[
        int | None,
        "of fitted and random: the first routed block, from 0 (paper: 1); default: as in the "
        "training, or L // 2, at least 1",
        at_least(0),
    ] = None,
    threshold: Annotated[
        float, "of trained and fitted: r above which a token enters; 0: sigmoid(r) > 0.5"
    ] = 0.0,
    stories: Annotated[
        int, "of fitted: calibration stories (with calibrate: passages)", at_least(1, limit=1000)
    ] = 16,
    seed: Annotated[int, "of router=random", SEEDS] = 0,
):
    """Route only some tokens through a block, by a router that was trained with the model.

    Paper:     Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in
               transformer-based language models", 2024, arXiv 2404.02258.
    Fidelity:  a reconstruction from summaries, one of them with the paper's equation, and from
               other people's code. Converting a trained model, and router=fitted, are ours (Notes).
    Kind:      approximate. The weights are trained for it: stories-mod, which was made from
               stories, takes 0.57x of its multiply-adds for 0.005 nats.
    Idea:      Not every token needs every layer. A router, one vector w per block, scores each
               token; only the best enter the block, and attend only to each other. How many may
               enter is fixed (the capacity, a share of the tokens); which ones is learned.
    Offline:   train model and routers together (training/mixture_of_depths.py): of T tokens, the
               k = max(1, int(capacity T)) with the largest r enter, and
               loss = L_model + weight * BCE(sigmoid(r_i), is i among the k?)
               fitted: w = argmin sum (w . x_i - y_i)^2; y_i = +1 for the share capacity of the
               calibration tokens that the block changes most, by |f| / |x|, else -1
    Online:    in each routed block, for each token i with hidden state x_i:
                 r_i = w . x_i
                 if r_i > 0, that is sigmoid(r_i) > 0.5:  token i enters
                   x_i = x_i + r_i f(X)_i    X: the tokens that have entered, at their original
                                             positions; f: the block without its residual add
                 else x_i stays, and the block caches no keys and values of it
               The k best of a text are not known while it is being written, hence r_i > 0.
               Routed are the blocks of the second half; in the paper every second block.
    Saves:     if n of T tokens enter, a routed block takes n / T of its matrix products, (n / T)^2
               of a prompt's attention and n / T of its KV cache; D per token for the router.
    In NumPy:  stories-mod: decoding 1.5x as fast, a prompt of 320 tokens 1.6x.
    Not for:   models that were not trained with routers: fitted ones are no better than random;
               skipless models; batches with a KV cache (generate decodes prompts one by one);
               elsa, a3, dota and others that need a cache row for every token.
    Proof:     tests/skip/test_mixture_of_depths.py; literal version:
               tests/skip/literal_mixture_of_depths.py
    """
    check_residual(lm)
    need_independent_layers("mixture_of_depths", lm.model)
    trained = trained_routers(lm, router)
    if trained is not None and router != "random":
        refuse_beside_trained(capacity=capacity, every=every, first=first)
        routers = {i: LearnedRouter(w, threshold) for i, w in trained.vectors.items()}
    else:
        blocks = routed_blocks(lm, trained, first, every)
        if capacity is None:
            capacity = 0.25 if trained is None else trained.capacity
        if router == "random":
            routers = random_routers(lm, blocks, capacity, seed)
        else:
            found = fitted(lm, blocks, capacity, stories)
            routers = {i: LearnedRouter(w, threshold, scale) for i, (w, scale) in found.items()}

    def change(block: Part, index: int) -> Part:
        return RoutedBlock(block, routers[index]) if index in routers else block

    return wrap(lm, "block", change) if routers else lm


# Online ------------------------------------------------------------------------------------------


@part
class RoutedBlock(Part):
    """A block that only some tokens enter, which attend to each other. The others skip it: their
    hidden states stay as they are."""

    # Declared for techniques that are combined with this one (tree.Part). Each token is routed by
    # itself: decides = "token".
    frees_rows = True  # the KV cache has rows only for tokens that entered
    one_sequence = True  # no batches of different lengths: each row has other tokens that enter

    inner: Part  # the block
    router: Part

    def __call__(self, x, layer: Layer):
        """x (T, D) -> (T, D)."""
        if x.ndim > 2:
            check_shared(layer)
            because = "mixture_of_depths lets other tokens of each sequence into a block"
            return each_row(lambda row, _: self(row, alone(row, layer)), x, layer, because)
        return self.routed(self.inner, x, layer)

    def attend_from(self, x, layer: Layer):
        """Run the block for tokens x (T, D) whose keys and values, if they enter, are cached."""
        return self.routed(self.inner.attend_from, x, layer)

    def routed(self, run, x, layer: Layer):
        """x_i + r_i f(X)_i for the tokens i that enter; x_i for the others. f is the block without
        its residual connection, X the tokens that enter."""
        entered, r = self.router(x, layer)  # (T,), (T,)
        note(entered)
        if not entered.any():
            return x
        inside, tokens = x[entered], layer.tokens
        layer.tokens = only(tokens, entered)
        f = run(inside, layer) - inside
        layer.tokens = tokens
        y = x.copy()
        y[entered] = inside + r[entered, None] * f
        return y

    def backfill(self, x, layer: Layer):
        """Only fill the KV cache, for those of the tokens x (T, D) that enter."""
        entered, _ = self.router(x, layer)
        if entered.any():
            tokens = layer.tokens
            layer.tokens = only(tokens, entered)
            self.inner.backfill(x[entered], layer)
            layer.tokens = tokens


@part
class LearnedRouter(Part):
    """r = w . x for each token by itself. A token enters if r is above the threshold.

    w = scale * vector. A scale like 1 / |x| keeps the numbers of the vector near 1, which is what
    training needs: AdamW changes every weight by about the same amount in a step.
    """

    vector: np.ndarray  # (D,)
    threshold: float = 0.0
    scale: float = 1.0

    def __call__(self, x, layer: Layer):
        r = self.scores(x)
        return r > self.threshold, r

    def scores(self, x):
        """r (..., T) for x (..., T, D)."""
        return ops.linear(x, self.vector[:, None])[..., 0] * self.scale


@part
class RandomRouter(Part):
    """The baseline: tokens enter at random, by their position, with the same weight."""

    scores: np.ndarray = table()  # (L, context), uniform in [0, 1)
    capacity: float
    weight: float

    def __call__(self, x, layer: Layer):
        scores = self.scores[layer.index, layer.tokens.positions]  # (T,)
        return scores < self.capacity, np.full(len(x), self.weight, x.dtype)


def alone(row, layer: Layer) -> Layer:
    """The layer of one row (T, D) of a batch without a KV cache."""
    return Layer(len(row), remember=False, index=layer.index).take(len(row))


def only(tokens, entered):
    return tokens if entered.all() else tokens.only(entered)


def note(entered) -> None:
    ledger.event("tokens routed", entered.size)
    ledger.event("tokens that entered a block", entered)


# Offline -----------------------------------------------------------------------------------------


def trained_routers(lm, router: str) -> Trained | None:
    """The routers in the model's folder, if there are any and they are asked for."""
    exists = lm.folder is not None and (lm.folder / FILE).exists()
    if router == "trained" and not exists:
        where = "was not read from a folder" if lm.folder is None else f"has none in {lm.folder}"
        raise MinitxError(
            f"mixture_of_depths: router=trained reads {FILE} beside the weights, and this model "
            f"{where}; use the model stories-mod, train routers (a stage of a recipe with router), "
            "or use router=fitted."
        )
    if router == "auto" and not exists:
        warnings.warn(
            "mixture_of_depths: this model was not trained with routers, so they are fitted, which "
            "costs more than training them; use the model stories-mod, or say router=fitted.",
            MinitxWarning,
            stacklevel=3,
        )
    if not exists or router == "fitted":
        return None
    return read_routers(lm.folder, lm.model.config, float_type(lm.model))


def routed_blocks(lm, trained: Trained | None, first, every) -> tuple[int, ...]:
    """Which blocks get a router: first, first + every, ..."""
    if trained is not None and first is None and every is None:
        return tuple(trained.vectors)
    L = len(blocks_of(lm))
    first, every = max(1, L // 2) if first is None else first, 1 if every is None else every
    if first == 0:
        check_width(lm)
    return tuple(range(first, L, every))


def fitted(lm, blocks, capacity: float, stories: int) -> dict[int, tuple]:
    """The vector and the scale of each fitted router."""
    instead = "use router=random"
    texts = calibration_ids("mixture_of_depths", lm, stories, instead)
    settings = blocks, capacity
    return remembered(
        "mixture_of_depths", lm, texts, settings, lambda: fit_routers(lm, texts, blocks, capacity)
    )


def random_routers(lm, blocks, capacity: float, seed: int) -> dict[int, RandomRouter]:
    """None at capacity 1: every token enters every block, as in the dense model."""
    if capacity == 1:
        return {}
    scores = random_scores(len(blocks_of(lm)), lm.model.config.context, seed)
    return {i: RandomRouter(scores, capacity, 1.0) for i in blocks}


# Checks ------------------------------------------------------------------------------------------


def refuse_beside_trained(**options) -> None:
    for name, value in options.items():
        if value is not None:
            raise MinitxError(
                f"mixture_of_depths: {name}={value:g} is for router=fitted and router=random, and "
                "this model has trained routers; leave it out, or change the share of the tokens "
                "that enter by threshold."
            )


def check_residual(lm) -> None:
    if lm.model.config.skipless:
        raise MinitxError(
            "mixture_of_depths needs residual connections and this model is skipless: skipping a "
            "block would drop the hidden state; leave mixture_of_depths out."
        )


def check_width(lm) -> None:
    """Refuse to route block 0 if its input is no hidden state: with first_layer it is a wider row
    of a table."""
    x = lm.model.embed(np.array([0]), slice(0, 1))
    if x.shape[-1] != lm.model.config.width:
        raise MinitxError(
            "mixture_of_depths with first=0 routes block 0, which first_layer has replaced by a "
            "table; use first=1, or leave out one of the two."
        )


def check_shared(layer: Layer) -> None:
    """Refuse a batch of which another technique has memory that all blocks share: its rows could
    not be told apart."""
    if layer.shared.kept and not layer.remember:
        raise MinitxError(
            "mixture_of_depths runs the rows of a batch one by one, and another technique counts "
            "over all blocks what belongs to a row (ffn_skip does); give one sequence at a time."
        )


# Notes:
#
# - Confirmed by the equation that a summary quotes: r_i = w . x_i, and x_i + r_i f(X)_i with f the
#   block without its residual connection. (The best-known port multiplies the whole output by r,
#   the residual stream included, and its strict "above the k-th largest r" lets in k - 1 tokens.)
#   From summaries: every second block, a capacity of 12.5 %, the binary cross-entropy. The other
#   way that they name to decide while decoding, a small separate predictor whose input passes no
#   gradient on, is not built here: the router itself decides. Unconfirmed: the weight of that loss.
# - What is ours. The paper trains from scratch; stories-mod starts from stories, with routers
#   fitted by least squares. It routes each of the last four blocks instead of every second one:
#   the first four of stories look up what all tokens need. Loss above entropy before any training,
#   with fitted routers of capacity 0.25 (30 stories; dense 0.026): routing block 1 alone 0.052, 3
#   alone 0.087, 5 or 7 alone 0.027 and 0.026, but 4 to 7 together 0.033. After 80 steps of 2,048
#   tokens (40 stories): 0.132 with 1, 3, 5 and 7 at capacity 0.25, 0.096 at 0.5; 0.041 with 4 to 7
#   at 0.125.
# - An entry in a KV cache is a token that entered: a later one attends to those only. A block that
#   no token of a step enters is not run, and its weights are not read.
# - Answers of 500 held-out stories, and multiply-adds relative to a dense model (minitx evaluate
#   --stories 500 with these flags; multiply-adds by minitx sweep --stories 60).
#
#       flags                                      multiply-adds   1 / 2 / 3 hops   above entropy
#       -m stories                                     1.00x        99 / 93 / 99        0.027
#       -m stories-mod --mixture-of-depths             0.58x        99 / 92 / 96        0.031
#         ... router=random capacity=0.13              0.59x        98 / 67 / 42        0.052
#       -m stories --layer-skip count=3                0.64x        99 / 90 / 93        0.031
#       -m stories --layer-skip count=4                0.52x        99 / 68 / 42        0.034
#       -m stories-mod, dense                          1.00x        99 / 92 / 98        0.043
#
#   Random routers on weights that were trained for others are a weak baseline. So 80 short steps
#   were also trained with random tokens instead of the best (same data, weights r = 1): 69 / 28 %
#   of the answers with 2 / 3 hops, where the routers had reached 83 / 100 % (40 stories).
# - Without training it does not pay to choose (minitx sweep mixture-of-depths router=fitted,random
#   capacity=0.25,0.125 --stories 60, on stories): fitted 0.62x, +0.008 nats, 98 / 69 / 58 %;
#   random 0.64x, +0.008, 98 / 76 / 61 %. At capacity 0.125: 98 / 64 / 36 and 98 / 66 / 44 %.
# - In training r is also what makes tokens compete, and it grew: the tokens that enter the blocks
#   of stories-mod do so with a mean r of 7, 12, 20 and 9, and f has become that much smaller. A
#   threshold other than 0 shifts few tokens: the predictions are sharp (a loss of 0.02).
# - A batch without a KV cache is run row by row, so a technique that counts over all blocks
#   (ffn_skip) cannot be combined with it there.
