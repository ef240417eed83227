"""Head pruning: attention heads without which the loss changes least are removed.

The card and options, removing heads (what is left is a plain model with smaller matrices), the
importance of a head, checks, notes. All of it is offline.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx.calibration import calibration_ids
from minitx.model import QKV, Attend, AttendUnequalGroups, Attention, Linear
from minitx.progress import bar
from minitx.shared.observed_inputs import Moments, watched
from minitx.shared.share import share_of
from minitx.shared.units import columns, columns_of, contributions, rows
from minitx.state import Layer
from minitx.technique import SEEDS, above, at_least, blocks_of, need, technique, wrap
from minitx.tree import Part, float_type, part


@technique(
    level="pruning",
    exact=False,
    neutral={"share": 0.0},
    after=("prune", "prune_structure"),
    demo={"share": 0.25},
    presets={"authors": {"share": 0.4, "normalize": "layer"}},
)
def head_prune(
    lm,
    *,
    share: Annotated[
        float, "share of all query heads of the model to remove", at_least(0, below=1)
    ] = 0.3,
    step: Annotated[
        float, "share of all query heads that one round removes, at least one head", above(0, 1)
    ] = 0.1,
    recompute: Annotated[
        bool, "score the heads that are left again before each round; false: only once"
    ] = True,
    normalize: Annotated[
        Literal["none", "layer"], "layer: divide the scores of a layer by their l2 norm"
    ] = "none",
    choose: Annotated[
        Literal["importance", "contribution", "random"],
        "by the gradient of the loss; by what a head adds to the residual stream (the score of "
        "prune_structure); or a random baseline",
    ] = "importance",
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 16,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Remove the attention heads to which the loss is least sensitive.

    Paper:     Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019,
               arXiv 1905.10650.
    Fidelity:  a reconstruction from summaries of the paper (the formula) and from the authors' code
               (rounds, l2 norm). Heads that share keys and values are our extension.
    Kind:      approximate. Three of ten heads of ``stories`` cost next to nothing.
    Idea:      Put a gate in front of the output of each head. Where the loss hardly depends on the
               gate, it can go. One backward pass gives the gradient with respect to all gates.
    Offline:   gate g_h = 1 multiplies the output of head h (T, d), before W_o
               importance_h = mean over texts x of |dL(x) / dg_h|,   L(x): mean loss of x
               (two other readings are in use: Notes; normalize=layer: divided by the l2 norm of
               the importances of its layer)
               in rounds: remove the lowest tenth of all heads (``step``; a layer's last head
               stays), score the others again, until ``share`` of all heads are gone
    Online:    the same equations with fewer heads; layers may differ in how many. b_o stays.
    Saves:     per token and query head 2 D d + 2 d S multiply-adds (width D, heads of width d, S
               cached tokens) and 2 D d weights. A key/value head goes with the last query head that
               reads it: 2 D d multiply-adds and weights, and 2 d cached numbers per token.
    In NumPy:  0.92x to 0.99x on short stories: where groups of query heads become unequal, one
               head is computed after another. Faster where layers keep one head each (tutorial).
    Not for:   techniques that need equal groups of query heads, where those of a layer are not
               (absorb_products, fuse_projections, shrink, heavy_hitters, ...).
    Proof:     tests/precompute/test_head_prune.py; literal version:
               tests/precompute/literal_head_prune.py
    Tutorial:  tutorials/13_which_heads_matter.py
    """
    alive = [np.ones(attention_of(block).heads, bool) for block in blocks_of(lm)]
    wanted = share_of(sum(map(len, alive)), share)
    if not wanted:
        return lm
    if choose == "random":
        order = np.random.default_rng(seed)
        drawn = [order.random(len(heads)) for heads in alive]
        return without_heads(lm, prune_in_rounds(lambda _: drawn, alive, wanted, step, False))
    texts = calibration_ids("head_prune", lm, stories, "use choose=random")
    score = importance if choose == "importance" else contribution

    def scores(alive):
        found = score(lm, alive, texts)
        return [by_norm(s) for s in found] if normalize == "layer" else found

    return without_heads(lm, prune_in_rounds(scores, alive, wanted, step, recompute))


# Removing heads ----------------------------------------------------------------------------------


def prune_in_rounds(
    scores: Callable, alive: list, count: int, step: float, recompute: bool
) -> list[np.ndarray]:
    """Which heads of each layer (H,) stay when ``count`` of them go: in each round those with the
    lowest scores. ``scores(alive)``: an array (H,) for each layer."""
    alive = [heads.copy() for heads in alive]
    per_round = max(1, share_of(sum(map(len, alive)), step))
    found = scores(alive)
    while count:
        goes = lowest(found, alive, min(per_round, count))
        if not goes:
            break  # each layer has one head left
        for layer, head in goes:
            alive[layer][head] = False
        count -= len(goes)
        if count and recompute:
            found = scores(alive)
    return alive


def lowest(scores: list, alive: list, count: int) -> list[tuple[int, int]]:
    """The ``count`` heads (layer, head) with the lowest scores of those that are alive, without the
    last one of any layer. Ties go to the lower index."""
    left = [int(heads.sum()) for heads in alive]
    heads = [(layer, h) for layer, those in enumerate(alive) for h in np.flatnonzero(those)]
    found: list[tuple[int, int]] = []
    for layer, head in sorted(heads, key=lambda head: scores[head[0]][head[1]]):
        if len(found) < count and left[layer] > 1:
            found.append((layer, int(head)))
            left[layer] -= 1
    return found


def without_heads(lm, alive: list):
    """The model with these heads only, in each layer."""
    lm = wrap(lm, "attn", lambda attn, i: keep_heads(attn, np.flatnonzero(alive[i])))
    attentions = [block.attn for block in blocks_of(lm)]
    sizes = {(attn.heads, attn.kv_heads, type(attn.attend)) for attn in attentions}
    if len(sizes) > 1 or type(attentions[0].attend) is AttendUnequalGroups:
        return lm  # the configuration has one number for all layers: it stays that of before
    config = replace(lm.model.config, heads=attentions[0].heads, kv_heads=attentions[0].kv_heads)
    return replace(lm, model=replace(lm.model, config=config))


def keep_heads(attn: Attention, heads) -> Attention:
    """Only these query heads (ascending), and the key/value heads that they read."""
    if len(heads) == attn.heads:
        return attn
    d, group = len(attn.out.w) // attn.heads, attn.heads // attn.kv_heads
    kv, key_head, sizes = np.unique(heads // group, return_inverse=True, return_counts=True)
    q, k = columns_of(heads, d), columns_of(kv, d)
    qkv = QKV(columns(attn.qkv.q, q), columns(attn.qkv.k, k), columns(attn.qkv.v, k))
    attend = attn.attend
    if len(set(sizes)) > 1:
        attend = AttendUnequalGroups(attend.scale, key_head)
    out = rows(attn.out, q)
    return replace(attn, qkv=qkv, attend=attend, out=out, heads=len(heads), kv_heads=len(kv))


# Scores ------------------------------------------------------------------------------------------
# Of each head in each layer: a list of arrays (H,), for heads that are gone too.


def importance(lm, alive: list, texts) -> list[np.ndarray]:
    """The mean over texts of |derivative of the text's loss with respect to the gate of each head|.
    Gates of heads that are gone are 0."""
    from minitx.training.autograd import grad_of  # training imports skip

    total = [np.zeros(len(heads)) for heads in alive]
    gates = [heads.astype(float_type(lm.model)) for heads in alive]
    for ids in bar(texts, "head prune: importance", unit="text", delay=1.0):
        _, slopes = grad_of(lambda *gates, ids=ids: text_loss(gated(lm, gates), ids), *gates)
        total = [so_far + abs(slope) for so_far, slope in zip(total, slopes, strict=True)]
    return [so_far / len(texts) for so_far in total]


def text_loss(lm, ids):
    """The mean negative log-likelihood of the tokens of one text, in nats."""
    from minitx.training.loss import cross_entropy  # training imports skip

    n = len(ids) - 1
    return cross_entropy(lm.model(np.array(ids[:-1])), np.array(ids[1:]), np.full(n, 1 / n))


def gated(lm, gates):
    """The model with a gate (H,) for the output of each head in each layer."""

    def change(attn: Attention, index: int) -> Attention:
        return replace(attn, attend=Gated(attn.attend, gates[index]))

    return wrap(lm, "attn", change)


@part
class Gated(Part):
    """Attention whose heads are multiplied by gates."""

    inner: Part
    gate: np.ndarray  # (H,)

    def __call__(self, q, k, v, layer: Layer):
        return self.inner(q, k, v, layer) * self.gate[:, None, None]  # (..., H, T, d)


def contribution(lm, alive: list, texts) -> list[np.ndarray]:
    """The sum over tokens of |what the head adds to the residual stream|^2."""
    gates = [heads.astype(float_type(lm.model)) for heads in alive]
    outs = [attention_of(block).out for block in blocks_of(lm)]
    masked = gated(lm, gates).model
    observed, seen = watched(masked, Linear, Moments, {id(out) for out in outs})
    for ids in bar(texts, "head prune: contributions", unit="text", delay=1.0):
        observed.hidden(ids)
    return [
        contributions(seen[id(out)].gram, out.w, len(out.w) // len(heads))
        for out, heads in zip(outs, alive, strict=True)
    ]


def by_norm(scores):
    """Divided by their l2 norm (unchanged if that is 0)."""
    return scores / (np.linalg.norm(scores) or 1)


# Checks ------------------------------------------------------------------------------------------


def attention_of(block: Part) -> Attention:
    """The attention of a block, if it is made of plain parts."""
    attn = block.attn
    need(attn, Attention)
    need(attn.qkv, QKV)
    need(attn.attend, Attend)
    for linear in (attn.qkv.q, attn.qkv.k, attn.qkv.v, attn.out):
        need(linear, Linear)
    return attn


# Notes:
#
# - Three readings of the formula are in use, and they rank heads differently. The paper's takes the
#   absolute value of the derivative text by text, then the mean: this one. The authors' code takes
#   it token by token, from the product of a head's output and the gradient there, summed over
#   features. A well-known BERTology script takes it once, of the sum over the batch, where texts
#   cancel; at a batch size of 1 that is the paper's. L(x) is the mean over a text's tokens, so that
#   long texts do not count more (our choice).
# - The l2 norm of each layer (normalize=layer) is in the authors' command. Here it loses more than
#   it gains: it makes the least important heads of the first layers look as dispensable as those of
#   the last ones, which hardly matter in ``stories``.
# - A first-order score says what a small change of the gate does, not what removal does. Rank
#   correlation (Spearman) with the loss on the 16 calibration stories when each of the 32 heads of
#   ``stories`` is removed by itself: 0.88 by importance, 0.27 by importance and normalize=layer,
#   0.22 by contribution. Within a layer importance still orders well in 0, 2, 5 and 6 (0.8), and
#   in the wrong order in 4 (-0.8), where no head matters.
# - Heads that are gone have a gate of 0 while the others are scored, so all rounds run the whole
#   model. What is removed at the end is sliced off: both give the same logits (a test).
# - If layers differ in their number of heads, ``config.heads`` and ``config.kv_heads`` stay those
#   of the model before. minitx precompute writes such a model; no Hugging Face format holds it.
# - Calibration: one forward and backward pass per text and round.
# - Figures on stories (60 of them, one BLAS thread):
#       minitx sweep head-prune share=0.2,0.3,0.4,0.5 --stories 60
#       minitx sweep head-prune share=0.3 choose=contribution,random --stories 60
#       minitx sweep head-prune share=0.3 normalize=layer --stories 60
#   Loss is above dense, in nats per token; the hops are right answers to questions that need 1, 2
#   or 3 facts:
#
#       share  choose           multiply-adds  memory  cache  loss     1 hop  2 hops  3 hops  speed
#       0      (dense)                                                 99 %   93 %    100 %
#       0.2    importance       0.95x          0.96x   0.88x  +0.001   99 %   91 %    97 %    0.92x
#       0.3    importance       0.92x          0.94x   0.81x  +0.002   99 %   91 %    97 %    0.96x
#       0.4    importance       0.90x          0.92x   0.75x  +0.003   99 %   91 %    97 %    0.99x
#       0.5    importance       0.87x          0.90x   0.69x  +0.261   92 %   91 %    94 %    0.95x
#       0.3    normalize=layer  0.93x          0.95x   0.88x  +0.119   40 %   69 %    47 %
#       0.3    contribution     0.92x          0.94x   0.81x  +1.111   80 %   71 %    28 %
#       0.3    random, seed 0   0.93x          0.95x   0.88x  +1.661   25 %   51 %    25 %
#
#   ``stories`` was trained with LayerSkip's layer dropout, so the heads of late layers are
#   dispensable; a model without it has fewer to spare.
