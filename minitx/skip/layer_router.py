"""Per-sequence layer skipping: a router reads the prompt and fixes which layers the sequence runs.

This file: the card and options, the stack that asks the router and what it remembers (online), the
training of the gates (offline), checks, notes.
"""

from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids, remembered
from minitx.errors import MinitxError
from minitx.model import Stack, Transformer
from minitx.progress import bar
from minitx.shared.break_even import warn
from minitx.shared.log_softmax import log_softmax
from minitx.shared.logistic_regression import fit_logistic, sigmoid, standard
from minitx.shared.row_by_row import row_by_row
from minitx.state import State
from minitx.technique import (
    SEEDS,
    at_least,
    between,
    need,
    need_independent_layers,
    swap,
    technique,
)
from minitx.tree import Part, part


@technique(
    level="stack",
    exact=False,
    neutral={"threshold": 0.0},
    demo={"threshold": 1.0, "stories": 2},
    event="layer runs skipped",
    presets={"static": {"tolerance": 0.003}, "aggressive": {"tolerance": 0.03}},
)
def layer_router(
    lm,
    *,
    threshold: Annotated[
        float, "a layer is skipped if its gate is below; 0 skips none", between(0, 1)
    ] = 0.5,
    tolerance: Annotated[
        float, "KL divergence, in nats per token, up to which a layer is labelled skip", at_least(0)
    ] = 0.001,
    first: Annotated[int, "layers at the beginning that always run", at_least(1)] = 1,
    last: Annotated[int, "layers at the end that always run", at_least(0)] = 0,
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 32,
    prompt: Annotated[
        int, "tokens at the beginning of a calibration text that serve as its prompt", at_least(1)
    ] = 32,
    ridge: Annotated[float, "L2 penalty on the weights of a gate", at_least(0.1)] = 10.0,
    choose: Annotated[
        Literal["gate", "random"], "trained gates, or random ones that skip as often"
    ] = "gate",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Skip whole layers for a sequence, decided from its prompt by a small gate per layer (FiRST).

    Paper:     Jain et al., "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive
               Latency Reduction", Findings of EMNLP 2025, arXiv 2410.12513.
    Fidelity:  a reconstruction from the abstract: a router per layer, decided once, by the prompt.
               Unconfirmed: its loss, and its LoRA, which is left out. Ours: labels and gates
               without backpropagation; the prompt itself skips, too.
    Kind:      approximate; exact at threshold=0, since no gate is below 0. On stories no better
               than a fixed list of layers at the same cost (layer_skip): the first 32 tokens of a
               story do not tell which layers the rest of it needs (Notes).
    Idea:      Which layers matter may depend on the text. Decide it once for each sequence: no
               token that runs a layer then meets one that did not, so the KV cache has no holes.
    Offline:   for each calibration text and each layer l that does not always run:
                 y[l] = 1 (keep) if leaving out l moves the distributions of the tokens after the
                        prompt by a mean KL divergence above ``tolerance``, else 0
                 s[l] = mean over the prompt's tokens of h[l], the input of layer l
               w[l], b[l]: logistic regression of y[l] on s[l]
    Online:    in the first step of a sequence (the prompt), in layer l:
                 s = mean over the prompt's tokens of x, the input of layer l
                 g = sigmoid(w[l] . s + b[l]);  g < threshold: skip l
               a layer that is skipped, for every token of the sequence: y = x, nothing is cached
    Saves:     all multiply-adds, weight reads and cache rows of a skipped layer. The router costs
               (T + 1) D multiply-adds once per layer that it decides (T tokens of prompt, width D).
    In NumPy:  saves time in proportion to multiply-adds: 1.2x at 0.82x.
    Not for:   scoring a text in one step, which is then its own prompt; batches with a KV cache
               (generate decodes prompts one by one); skipless models.
    Proof:     tests/skip/test_layer_router.py; literal version: tests/skip/literal_layer_router.py
    Tutorial:  tutorials/12_which_layers_matter.py
    """
    check_model(lm)
    layers = range(first, len(lm.model.stack.blocks) - last)  # that may be skipped
    if threshold == 0 or not layers:
        if threshold > 0:
            warn(f"layer_router: first={first} and last={last} leave no layer to skip.")
        return lm
    need_independent_layers("layer_router", lm.model)
    texts = calibration_ids("layer_router", lm, stories)
    settings = layers, prompt
    seen = remembered("layer_router", lm, texts, settings, lambda: observe(lm, texts, *settings))
    gates = fit_gates(seen, tolerance, ridge)
    if choose == "random":
        gates = random_gates(seen, gates, threshold, seed)

    def change(model: Transformer) -> Transformer:
        router = Router(*(array.astype(seen.summaries.dtype) for array in gates), first, threshold)
        return replace(model, stack=RoutedStack(model.stack, router))

    return swap(lm, Transformer, change)


# Online ------------------------------------------------------------------------------------------


@part
class RoutedStack(Part):
    """The blocks, without those that the router skips for this sequence."""

    # Declared for techniques that are combined with this one (tree.Part):
    needs_inner_first = True
    decides = "sequence"
    has_history = True  # the decisions
    one_sequence = True  # the sequences of a batch run different layers

    inner: Part  # the dense stack
    router: Part

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    def __call__(self, x, state: State):
        if x.ndim > 2:
            return row_by_row(
                self, x, state, "layer_router runs different layers for each sequence"
            )
        runs = state.shared.recall(Decisions, Decisions).runs
        for index in range(len(self.blocks)):
            if index not in runs:  # the first step of the sequence
                runs[index] = self.router(x[: state.prompt], index)
            if runs[index]:
                x = self.inner.run(x, state, index, index + 1)
            else:
                ledger.event("layer runs skipped", len(x))  # one run per token
        return x


@part
class Router(Part):
    """A logistic gate for each layer from ``first`` on; the layers around them always run."""

    w: np.ndarray  # (layers that may be skipped, D)
    b: np.ndarray  # (layers that may be skipped,)
    first: int
    threshold: float

    def __call__(self, x, index: int) -> bool:
        """Does a sequence whose prompt enters layer ``index`` as x (T, D) run it?"""
        i = index - self.first
        if not 0 <= i < len(self.w):
            return True
        ledger.count(x.size + x.shape[-1], self.w[i].nbytes)
        g = sigmoid(float(x.mean(0) @ self.w[i] + self.b[i]))
        return bool(g >= self.threshold)


class Decisions:
    """runs: for each layer that has been decided, whether the sequence runs it."""

    def __init__(self):
        self.runs: dict[int, bool] = {}

    def rewind(self, position: int) -> None:
        """A sequence that goes on keeps its layers, even if half of its prompt is forgotten."""
        if position == 0:
            self.runs = {}


# Offline -----------------------------------------------------------------------------------------


class Observed(NamedTuple):
    """Of n calibration texts, for each of the G layers that may be skipped."""

    summaries: np.ndarray  # (n, G, D): means of the layer's inputs over the prompt
    divergences: np.ndarray  # (n, G): KL divergence of the model without the layer


class Gates(NamedTuple):
    w: np.ndarray  # (G, D)
    b: np.ndarray  # (G,)


def observe(lm, texts, layers: range, prompt: int) -> Observed:
    """Run each text, then for each layer once more without it, from its input on."""
    model = lm.model
    summaries, divergences = [], []
    for ids in bar(texts, "layer router: leave out layers", unit="text", delay=1.0):
        n = max(min(prompt, len(ids) - 1), 1)
        with np.errstate(over="ignore"):  # as in Transformer.hidden: silu far below 0
            h = hidden_states(model, ids, layers)
            dense = log_probabilities(model, ids, h[0], layers[0], n)
            # A layer is left out: its input enters the next one.
            without = [log_probabilities(model, ids, x, i + 1, n) for i, x in zip(layers, h)]
        summaries.append([x[:n].mean(0) for x in h])
        divergences.append([(np.exp(dense) * (dense - q)).sum(-1).mean() for q in without])
    return Observed(np.array(summaries), np.array(divergences))


def hidden_states(model: Transformer, ids, layers: range) -> list:
    """The inputs (T, D) of these layers."""
    state = model.new_state(remember=False)
    x = model.embed(np.asarray(ids), state.take(len(ids)).lookup)
    found = [model.stack.run(x, state, 0, layers[0])]
    for index in layers[:-1]:
        found.append(model.stack.run(found[-1], state, index, index + 1))
    return found


def log_probabilities(model: Transformer, ids, x, layer: int, n: int) -> np.ndarray:
    """Of the tokens after the first n, (T - n + 1, V) in float64, if x (T, D) enters ``layer``."""
    state = model.new_state(remember=False)
    state.take(len(ids))
    x = model.stack.run(x, state, layer, len(model.stack.blocks))
    return log_softmax(model.head(model.norm(x[n - 1 :])))


def fit_gates(seen: Observed, tolerance: float, ridge: float) -> Gates:
    """A logistic regression for each layer. Targets are Platt's: a little inside (0, 1), so that b
    is finite where all texts have the same label."""
    weight = np.ones(len(seen.summaries))
    fitted = []
    for s, divergence in zip(seen.summaries.swapaxes(0, 1), seen.divergences.T):
        keep = divergence > tolerance  # (n,)
        target = np.where(keep, (keep.sum() + 1) / (keep.sum() + 2), 1 / ((~keep).sum() + 2))
        fitted.append(fit_logistic(s, target, weight, ridge))
    return Gates(*map(np.array, zip(*fitted)))


def random_gates(seen: Observed, gates: Gates, threshold: float, seed: int) -> Gates:
    """For each layer a random hyperplane that skips as many calibration texts as its gate does."""
    rng = np.random.default_rng(seed)
    threshold = np.clip(threshold, 1e-12, 1 - 1e-12)
    at = np.log(threshold / (1 - threshold))  # the score of a gate at the threshold
    drawn = []
    for s, w, b in zip(seen.summaries.swapaxes(0, 1).astype(np.float64), *gates):
        skipped = int((sigmoid(s @ w + b) < threshold).sum())
        _, spread = standard(s)
        direction = rng.standard_normal(s.shape[-1]) / spread
        scores = np.sort(s @ direction)
        edges = np.concatenate([[-np.inf], scores, [np.inf]])
        cut = edges[skipped : skipped + 2].mean()  # between the last skipped and the next
        drawn.append((direction, at - cut))
    return Gates(*map(np.array, zip(*drawn)))


# Checks ------------------------------------------------------------------------------------------


def check_model(lm) -> None:
    if lm.model.config.skipless:
        raise MinitxError(
            "layer_router needs residual connections and this model is skipless: skipping a layer "
            "would skip the hidden state; leave layer_router out."
        )
    need(lm.model.stack, Stack)


# Notes:
#
# - Measured on stories, prompts of 32 tokens (minitx sweep layer-router
#   tolerance=0.0005,0.001,0.003,0.03 choose=gate,random --stories 60, once more with choose=random
#   seed=1,2,3; fixed lists: minitx sweep layer-skip count=1,2,5,6 choose=greedy --stories 60). Loss
#   above dense in nats per token; then the accuracy of answers by hops, the number of facts that
#   they combine (dense: 99 / 93 / 100 %).
#
#       setting                       multiply-adds      loss     1 / 2 / 3 hops
#       tolerance=0.0005 gate            1.000x        +0.0000     99 / 93 / 100
#       tolerance=0.0005 random          0.953x        +0.0005     99 / 93 / 100
#       tolerance=0.001  gate            0.822x        +0.0016     99 / 93 /  89
#       tolerance=0.001  random          0.750x        +0.0033     99 / 91 /  92
#         ... seed=1, 2, 3       0.774, 0.786, 0.667x  +0.0030, +0.0020, +0.0030
#       tolerance=0.003  gate            0.524x        +0.0073     98 / 64 /  36
#       tolerance=0.03   gate            0.393x        +0.0769     76 / 55 /  17
#       tolerance=0.03   random          0.298x        +0.2207     28 / 38 /  19
#       fixed list, count=1              0.881x        +0.0007     99 / 91 / 100
#       fixed list, count=2              0.762x        +0.0025     99 / 91 /  97
#       fixed list, count=5              0.405x        +0.0258     48 / 64 /  42
#       fixed list, count=6              0.286x        +0.1024     44 / 53 /  39
#
#   The default lies on the line between the fixed lists of one and of two layers, and random gates
#   hardly above it (about +0.002 at 0.82x, between their two tolerances). At tolerance=0.003 all
#   sequences skip layers 4 to 7: a fixed list. At 0.03 the fixed list loses less: labels leave out
#   one layer at a time, and four that hardly matter one by one matter together.
# - Why: of 48 other stories, the gates of layers 4 to 7 (trained on 32, tolerance=0.001) rank the
#   labels little better than chance from the first 32 tokens (AUC 0.58, 0.54, 0.57, 0.59), and
#   well from all tokens (0.78, 0.87, 0.77, 0.54). The signal is in the text, but the beginning of a
#   story does not hold it. Where prompts say what follows (a task, a language), gates may win: the
#   test shows it on made-up summaries.
# - Calibration takes about L / 2 + 1 forward passes and L + 1 runs of the head per text: 3 s for
#   stories; fewer ``stories`` for larger models.
# - Gates are fitted to the inputs that layers have in the dense model, and labels leave out one
#   layer at a time; online, earlier layers may be missing.
# - Trained gates skip less on new stories (1.5 layers) than on those that they were trained on
#   (2.1), random ones as much: so the two settings of one tolerance do not cost the same.
# - The first step decides, with its tokens before ``state.prompt`` (all, where the length of the
#   prompt is not known). A prompt in several chunks is decided by the first of them; speculative
#   runs the prompt without its last token first. ``rewind`` to 0 forgets the decision; back into
#   the prompt, the sequence keeps its layers.
# - A layer never runs for some tokens of a sequence only, so techniques that need a cache row for
#   every token (elsa, a3) can be combined with this one. Other stacks (early_exit, lazy_tokens)
#   cannot.
# - Unconfirmed in the paper: whether its prompt runs all layers (it may: the abstract speaks of
#   skipping during decoding). Then later tokens would find cached rows of the prompt alone in a
#   layer that none of them runs, which changes nothing for them.
