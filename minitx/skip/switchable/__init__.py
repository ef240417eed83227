"""Switchable decision: a small network reads the prompt and selects which sub-layers run.

This file: the card and options, the part that runs (online), checks, notes. Read next: policy.py
(the network), train.py (how it is trained), baselines.py, file.py (the shipped policies).
"""

import os
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import Stack, Transformer
from minitx.shared.break_even import warn
from minitx.shared.row_by_row import row_by_row
from minitx.skip.switchable.baselines import FixedPlan, RandomPlans, units_within
from minitx.skip.switchable.file import FILE, read_policies
from minitx.skip.switchable.policy import TokenPolicy, units_of
from minitx.state import Layer, Memory, State
from minitx.technique import (
    SEEDS,
    at_least,
    between,
    blocks_of,
    need,
    need_independent_layers,
    swap,
    technique,
    wrap,
)
from minitx.tree import Part, float_type, part, walk


@technique(
    level="stack",
    exact=False,
    neutral={"tolerance": 0.0},
    demo={"choose": "random", "share": 0.5},
    event="units switched off",
    presets={"aggressive": {"tolerance": 0.05}},
)
def switchable(
    lm,
    *,
    tolerance: Annotated[
        float,
        "what skipping may cost: KL divergence from the dense model in nats per token, on average "
        "over the texts of the training; 0 keeps all units",
        at_least(0, limit=1000),
    ] = 0.01,
    choose: Annotated[
        Literal["policy", "random", "static"],
        "who decides: the policy. Baselines: random draws units for each prompt, static removes "
        "the same for all, smallest KL divergence per multiply-add first",
    ] = "policy",
    share: Annotated[
        float | None,
        "of the baselines: share of the units' multiply-adds that run; default: the policy's mean",
        between(0, 1),
    ] = None,
    tokens: Annotated[bool, "also drop prompt tokens after layer 0"] = False,
    stories: Annotated[
        int,
        "for a model without shipped policies: calibration stories to train on (with calibrate: "
        "passages of the text)",
        at_least(1, limit=1000),
    ] = 8,
    steps: Annotated[
        int, "for a model without shipped policies: training steps", at_least(1, limit=5000)
    ] = 200,
    seed: Annotated[int, "of choose=random, and of the training", SEEDS] = 0,
):
    """Decide once per prompt which attention and FFN sub-layers run, by a small policy network.

    Paper:     Zhang et al., "Switchable Decision: Dynamic Neural Generation Networks", ICML 2024,
               arXiv 2405.04513.
    Fidelity:  a reconstruction from the abstract and reviews: reward, sizes and result tables were
               not readable. The paper's models are encoder-decoders; decoders are ours (Notes).
    Kind:      approximate; exact at tolerance=0, which keeps every unit. Far better than random
               units at equal cost; better than the best static plan at some tolerances, and a
               static plan itself at others (Notes).
    Idea:      How much of a model a text needs can be told from its prompt. A unit is an attention
               or FFN sub-layer, from layer 1 on; there are U. A network of two matrices reads the
               prompt after layer 0 and decides for the whole request which units run.
    Offline:   train the network with the model frozen, on texts of several grades of difficulty:
               b_u ~ Bernoulli(p_u): unit u runs or not;  e(b) = sum c_u b_u, c_u: its share of the
               multiply-adds;  q(b): KL divergence from the dense model on what follows the prompt
               minimize E[e] subject to E[q] <= tolerance, by gradients on the logits of p:
               g_q = (q(b) - q(p > 0.5)) (b - p)    REINFORCE with a self-critical baseline
               g_e = c p (1 - p)                    exact
               dynamic barrier: step against g_e + lambda g_q; lambda grows with q - tolerance
               stories has its policies in a file; for other models the training runs on loading.
    Online:    prompt: run layer 0;  s = mean of its output over the prompt's tokens
               p = sigmoid(tanh(s W1 + b1) W2 + b2);  unit u runs if p_u > 0.5
               These units run for the prompt and for every new token. A layer without attention
               caches nothing. tokens=true: later layers get only the prompt tokens for which
               h w + s v + b > 0 (h: layer 0's output), the first and the last, and all new ones.
    Saves:     attention: 2 D (H + K) d + 2 S H d multiply-adds per token, and its cache rows; FFN:
               3 D F (2 D F without a gate). The policy takes 16 D + 16 U once per prompt (D width,
               H query and K key heads of width d, F hidden neurons, S cached tokens).
    In NumPy:  1.65x the speed at 0.56x the multiply-adds (stories): whole sub-layers are skipped.
    Not for:   skipless models; layer_merge on stories, whose policies decide about all its layers;
               batches with a KV cache (generate decodes prompts one by one); prompts in small
               pieces, of which the first decides.
    Proof:     tests/skip/test_switchable.py; literal version: tests/skip/literal_switchable.py
    Tutorial:  tutorials/12_which_layers_matter.py
    """
    check_model(lm)
    if choose == "policy" and share is not None:
        raise MinitxError(
            "switchable: share is of the baselines, and choose is policy; use choose=random or "
            "choose=static, or give a tolerance instead."
        )
    if choose != "policy" and tokens:
        raise MinitxError(
            f"switchable: tokens are dropped by the policy, and choose is {choose}; use "
            "choose=policy, or tokens=false."
        )
    if tolerance == 0 and share is None:
        return lm
    if len(blocks_of(lm)) < 2:
        warn("switchable decides about the layers after the first, and this model has only one.")
        return lm
    need_independent_layers("switchable", lm.model)
    from minitx.skip.switchable import train  # which runs models with a stack of this file

    training = train.Quick(stories, steps, tokens, seed)
    shipped = None if choose == "random" and share is not None else shipped_policies(lm)
    found = None
    if share is None:
        found = shipped.within(tolerance) if shipped else train.quick(lm, tolerance, training)
        if found is None:
            return lm
        share = found.share
    if choose == "policy":
        return switched(lm, found.network, found.tokens if tokens else None)
    costs = unit_costs(lm)
    if choose == "random":
        return switched(lm, RandomPlans(costs.astype(float_type(lm.model)), share, seed))
    order = shipped.order if shipped else train.static_order(lm, training)
    return switched(lm, FixedPlan(units_within(order, costs, share)))


# Online ------------------------------------------------------------------------------------------


@part
class SwitchableStack(Part):
    """The blocks. After block 0 has run a prompt, the units of the others are decided."""

    # Declared for techniques that are combined with this one (tree.Part):
    decides = "sequence"  # the first step, the prompt, decides for all
    has_history = True  # the decision
    one_sequence = True  # other units run for each sequence
    needs_inner_first = True  # a decision for each unit that there is

    inner: Part  # the dense stack, whose sub-layers are ``Switched``
    policy: Part  # s (D,) -> (U,) booleans
    tokens: Part | None = None  # h (T, D) -> indices of the tokens that are kept

    @property
    def frees_rows(self) -> bool:
        """True: layers after 0 have no row for a dropped token. (A layer whose attention is off has
        no rows at all, and no part that would look for them.)"""
        return self.tokens is not None

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    def __call__(self, x, state: State):
        """x (T, D) -> (T, D)"""
        if x.ndim > 2:
            return row_by_row(self, x, state, "switchable runs other sub-layers for each sequence")
        h = self.inner.run(x, state, 0, 1)  # (T, D)
        decision = decision_of(state.shared)
        if decision.keep is None:
            decision.keep = self.policy(h[: state.prompt].mean(0))
            if self.tokens is not None:
                return self.run_kept(h, state)
        return self.inner.run(h, state, 1, len(self.blocks))

    def run_kept(self, h, state: State):
        """Later layers run on the kept tokens of the prompt only, at their original positions. Of a
        dropped one, the output is that of layer 0. Tokens after the prompt (drafts) are kept."""
        prompt, tokens = h[: state.prompt], state.tokens
        kept = np.append(self.tokens(prompt), np.arange(len(prompt), len(h)))
        ledger.event("prompt tokens dropped", len(h) - len(kept))
        y = h.copy()
        state.tokens = tokens.only(kept)
        y[kept] = self.inner.run(h[kept], state, 1, len(self.blocks))
        state.tokens = tokens
        return y


@part
class Switched(Part):
    """An attention or FFN sub-layer that runs if the decision keeps it; else it adds 0, and caches
    nothing."""

    inner: Part
    unit: int

    def runs(self, layer: Layer) -> bool:
        return bool(decision_of(layer.shared).keep[self.unit])

    def __call__(self, x, layer: Layer):
        return self.inner(x, layer) if self.runs(layer) else skipped(x)

    # The other ways to call attention (model.Attention).

    def backfill(self, x, layer: Layer):
        """Cache the keys and values of tokens that skip this layer, if the attention runs."""
        if self.runs(layer):
            self.inner.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """Attention from tokens whose keys and values are cached, if it runs."""
        return self.inner.attend_from(x, layer) if self.runs(layer) else skipped(x)


def skipped(x):
    ledger.event("units switched off", x.size // x.shape[-1])  # one run per token
    return np.zeros_like(x)


class Decision:
    """keep (U,): the units that run in this sequence; None until its first step has decided."""

    keep: np.ndarray | None = None

    def rewind(self, position: int) -> None:
        """Before the first token nothing is decided; the rest of a prompt cannot change it."""
        if position == 0:
            self.keep = None


def decision_of(shared: Memory) -> Decision:
    return shared.recall(Decision, Decision)


# Making it ---------------------------------------------------------------------------------------


def switched(lm, policy: Part, tokens: TokenPolicy | None = None):
    """The model whose sub-layers run as the policy decides."""
    number = {unit: u for u, unit in enumerate(units_of(lm))}

    def switch(lm, slot: str):
        return wrap(
            lm, slot, lambda p, i: Switched(p, number[slot, i]) if (slot, i) in number else p
        )

    def change(model: Transformer) -> Transformer:
        return replace(model, stack=SwitchableStack(model.stack, policy, tokens))

    return swap(switch(switch(lm, "attn"), "ffn"), Transformer, change)


COUNTED = 128  # tokens of the text on which the cost of a unit is counted


def unit_costs(lm) -> np.ndarray:
    """(U,): each unit's share of the dense model's multiply-adds, as counted on a text of 128
    tokens. They add up to less than 1: layer 0 and the head always run."""
    U = len(units_of(lm))
    lm = switched(lm, FixedPlan(np.ones(U, bool)))
    with ledger.counting(lm) as counts:
        lm.model(np.zeros(min(COUNTED, lm.model.config.context), int))
    costs, total = np.zeros(U), max(counts.total().multiply_adds, 1)
    for path, node in walk(lm):
        if type(node) is Switched:
            costs[node.unit] = counts.total(path).multiply_adds / total
    return costs


def shipped_policies(lm):
    """The policies beside the weights, or None if there are none."""
    if lm.folder is None or not os.path.lexists(lm.folder / FILE):  # a link to nothing is refused
        return None
    return read_policies(lm.folder, lm.model.config.width, len(units_of(lm)), float_type(lm.model))


# Checks ------------------------------------------------------------------------------------------


def check_model(lm) -> None:
    if lm.model.config.skipless:
        raise MinitxError(
            "switchable needs residual connections and this model is skipless: skipping a "
            "sub-layer would drop the hidden state; leave switchable out."
        )
    need(lm.model.stack, Stack)
    blocks = blocks_of(lm)
    for unit in units_of(lm):
        found = (getattr(node, unit.slot, None) for _, node in walk(blocks[unit.layer]))
        if not any(isinstance(p, Part) for p in found):
            raise MinitxError(
                f"switchable cannot skip {unit}: block {unit.layer}, a "
                f"{type(blocks[unit.layer]).__name__}, no longer has a part of that name; load the "
                "model without the technique that replaced it."
            )


# Notes:
#
# - Unconfirmed in the paper and chosen here: the pooled input (mean), 16 neurons, one unit for each
#   attention, that the quality is a KL divergence, the solver (dynamic barrier gradient descent,
#   Gong, Liu and Liu, 2021, which has an author in common), p > 0.5 at inference. Ours: training
#   starts at the best static plan; of all networks that it passes, the cheapest within the
#   tolerance on the training texts is taken; layer 0 always runs. The token unit is our guess
#   throughout. Whether the paper drops single tokens, or chunks, is not known.
# - ``tolerance`` takes the shipped policy with the largest tolerance that is not above it (0.005,
#   0.01, 0.02, 0.05); below the smallest, all units are kept.
# - Trained by ``python -m minitx.skip.switchable.train stories`` in 2.5 minutes (110 s of one core)
#   on 30 calibration stories of each of six grades, prompts of 32 tokens. It prints, on 10 held-out
#   stories of each grade (--measure only prints):
#
#       tolerance  skipped   KL divergence from dense, nats per token    different
#                            policy    static, equal cost    random      decisions
#       0.005      0.232     0.0045    0.0045                0.36        1
#       0.01       0.409     0.0106    0.0143                0.78        3
#       0.02       0.467     0.0207    0.0211                0.84        2
#       0.05       0.553     0.0469    0.0519                1.03        2
#
#   skipped: of the dense model's multiply-adds. static: greedy_order's plans, interpolated. What
#   depends on the prompt at 0.01: stories whose second half repeats the first (told_twice) keep
#   two thirds of the units' work, set phrases less than half. At 0.005 the policy is a static plan.
# - On stories of grade full alone, which are all alike, the prompt tells less (minitx sweep
#   switchable choose=policy,static,random tolerance=0.01,0.02,0.05 --stories 60; answers that need
#   1 / 2 / 3 facts, dense: 99 / 93 / 100 %):
#
#       tolerance   choose    multiply-adds   loss       answers         speed
#       0.01        policy       0.557x      +0.0075    99 / 89 / 86    1.65x
#       0.01        static       0.606x      +0.0116    98 / 62 / 53    1.65x
#       0.01        random       0.604x      +0.5893    60 / 62 / 56    1.54x
#       0.02        policy       0.524x      +0.0076    97 / 66 / 36    1.82x
#       0.02        static       0.524x      +0.0073    98 / 64 / 36    1.84x
#       0.02        random       0.523x      +0.6517    56 / 58 / 44    1.71x
#       0.05        policy       0.427x      +0.0232    76 / 60 / 36    2.00x
#       0.05        static       0.442x      +0.0217    91 / 64 / 36    1.96x
#       0.05        random       0.445x      +1.0259    38 / 44 / 39    2.33x
#
# - tokens=true does not pay on stories: one random token of a prompt of 32 is worth 0.014 nats per
#   token of the text that follows. The trained token policies drop none up to tolerance 0.02, and
#   at 0.05 an eighth of the prompt for 0.04 nats more. Their cost is taken as proportional to the
#   number of tokens, though attention is quadratic in it.
# - The first step decides, by its tokens before ``state.prompt`` (all, where the length of the
#   prompt is not known): drafts of speculative are not read, and never dropped. But speculative
#   runs the prompt without its last token first, so without that one the decision is made.
# - Random units are drawn for each prompt until their cost would fall below the share, so they cost
#   slightly more than the policy.
# - stories was trained with layer dropout, so late layers can go. Other models have less to skip:
#   with the default 200 steps stories-relu and stories-parallel keep at least 0.95 of the units'
#   work at tolerance 0.01.
