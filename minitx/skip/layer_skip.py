"""Drop whole layers, or attention or FFN sub-layers, by a fixed list that is selected once.

A unit is a layer or a sub-layer; a plan is a list of units. What runs is the model without the
units of the plan. Below the part that runs are the published criteria that select a plan: each
takes a model and some texts.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.model import Stack
from minitx.progress import bar
from minitx.shared.least_loss import mean_loss
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, blocks_of, need, technique, wrap
from minitx.tree import Part, part, walk


@technique(
    level="block",
    exact=False,
    neutral={"count": 0},
    demo={"unit": "both", "count": 2},
    event="sub-layer runs skipped",
    presets={"llm-drop": {"unit": "attention", "choose": "similarity"}},
)
def layer_skip(
    lm,
    *,
    unit: Annotated[
        Literal["layer", "attention", "ffn", "both"],
        "what is dropped; both: attention and FFN sub-layers, ranked in one list",
    ] = "layer",
    count: Annotated[int | None, "how many units; default: 1", at_least(0)] = None,
    drop: Annotated[
        str | None,
        "the units by number from 0, as 3,5; with unit=both as attn3,ffn5 (+ instead of the comma "
        "in minitx sweep, where commas separate settings)",
    ] = None,
    choose: Annotated[
        Literal["influence", "angular", "similarity", "greedy", "random", "last"] | None,
        "how they are selected; default: influence for layers, similarity for sub-layers",
    ] = None,
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 16,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Drop a fixed list of layers, or of attention and FFN sub-layers.

    Paper:     influence: Men et al., "ShortGPT", 2024, arXiv 2403.03853.
               angular: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers",
               2024, arXiv 2403.17887. similarity: He et al., "What Matters in Transformers? Not
               All Attention is Needed" (LLM-Drop), 2024, arXiv 2406.15786. greedy: Song et al.,
               "SLEB", ICML 2024, arXiv 2402.09025; on sub-layers BlockPruner, arXiv 2406.10594.
    Fidelity:  similarity: the authors' code. influence, angular: a reconstruction from the
               abstracts and from other people's code; greedy: from summaries.
    Kind:      approximate.
    Idea:      A sub-layer f adds to the residual stream: y = x + f(norm(x)). Where that hardly
               matters, y = x is enough. A layer is two sub-layers, attention and FFN. To skip
               attention alone (preset=llm-drop) takes the same part and plan, so it is one more
               unit here, not one more technique, and unit=both can rank both kinds together.
    Offline:   n = count; h[l]: hidden state that enters layer l; means are over calibration tokens.
               influence:  mean 1 - cos(h[l], h[l+1]);  drop the n layers with the lowest
               angular:    mean arccos(cos(h[l], h[l+n])) / pi, over each text's last token only;
                           drop the n layers from the l with the lowest
               similarity: mean cos(x, x + f(norm(x)));  drop the n sub-layers with the highest
               greedy:     drop the unit without which the loss is lowest; again, until n are gone
               Baselines:  random; last, the n deepest units except the very last one.
    Online:    y = x. A dropped attention caches no keys and values.
    Saves:     all of a sub-layer. Attention, per token: 2 D (H + K) d + 2 S H d multiply-adds and
               2 K d cached numbers (D width, H query and K key heads of width d, S cached tokens).
               FFN: 3 D F multiply-adds, or 2 D F without a gate (F hidden neurons).
    In NumPy:  whole layers save time in proportion to multiply-adds, attention more than that, FFN
               less (Notes).
    Not for:   skipless models; the FFN of block 0 in a first_layer table (parallel blocks);
               early_exit with measure=saturation, which takes the unchanged x of a dropped layer
               for converged.
    Proof:     tests/skip/test_layer_skip.py; literal version: tests/skip/literal_layer_skip.py
    Tutorial:  tutorials/12_which_layers_matter.py
    """
    check_model(lm)
    units = units_of(lm, unit)
    if drop is not None:
        if count is not None:
            raise MinitxError("layer_skip: got both drop and count; give only one of them.")
        return drop_units(lm, read_drop(drop, unit, units))
    choose = choose or ("influence" if unit == "layer" else "similarity")
    count = 1 if count is None else count
    check_choice(choose, unit, count, len(units))
    if count == 0:
        return lm
    if choose == "random":
        plan = at_random(units, count, seed)
    elif choose == "last":
        plan = deepest(units, count)
    else:
        check_streams(lm, choose)
        texts = calibration_ids("layer_skip", lm, stories, "use choose=random, last or drop=")
        plan = CRITERIA[choose](lm, units, count, texts)
    return drop_units(lm, plan)


# Online ------------------------------------------------------------------------------------------


@part
class Dropped(Part):
    """Replaces an attention or FFN sub-layer: adds 0 and caches nothing."""

    def __call__(self, x, layer: Layer):
        ledger.event("sub-layer runs skipped", x.size // x.shape[-1])  # one run per token
        return np.zeros_like(x)  # (..., T, D)

    # The three other ways to call attention (model.Attention).

    def backfill(self, x, layer: Layer):
        """Cache nothing for tokens that skip this layer."""

    def attend_from(self, x, layer: Layer):
        """Add 0 for tokens whose keys and values the attention would have cached before."""
        return self(x, layer)

    def from_qkv(self, q, k, v, layer: Layer):
        """Add 0 after the projections: a plain 0, since q (..., T, H*d) may be wider than x."""
        ledger.event("sub-layer runs skipped", q.size // q.shape[-1])
        return 0.0


class Unit(NamedTuple):
    """One layer or sub-layer that may be dropped."""

    kind: str  # "layer", "attn" or "ffn"
    index: int

    def __str__(self) -> str:
        return f"{self.kind}{self.index}"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("attn", "ffn") if self.kind == "layer" else (self.kind,)


KINDS = {"layer": ("layer",), "attention": ("attn",), "ffn": ("ffn",), "both": ("attn", "ffn")}


def units_of(lm, unit: str) -> list[Unit]:
    """All units of this kind, in the order in which they run."""
    return [Unit(kind, i) for i in range(len(blocks_of(lm))) for kind in KINDS[unit]]


def drop_units(lm, plan: Sequence[Unit]):
    """The model without these units: a sub-layer is dropped with its norm."""
    dropped = {(slot, unit.index) for unit in plan for slot in unit.slots}
    check_slots(lm, dropped)

    def without(lm, slot: str):
        return wrap(lm, slot, lambda p, index: Dropped() if (slot, index) in dropped else p)

    return without(without(lm, "attn"), "ffn")


# Offline: criteria -------------------------------------------------------------------------------
# Each returns a plan of ``count`` of the units, in the order of removal, for a model and some texts
# (lists of ids).


def by_influence(lm, units: list[Unit], count: int, texts) -> list[Unit]:
    return lowest(units, count, block_influence(lm, texts))


def by_angular_distance(lm, units: list[Unit], count: int, texts) -> list[Unit]:
    first = int(angular_distance(lm, texts, count).argmin())
    return units[first : first + count]


def by_similarity(lm, units: list[Unit], count: int, texts) -> list[Unit]:
    return lowest(units, count, -similarity(lm, units, texts))


def by_loss(lm, units: list[Unit], count: int, texts) -> list[Unit]:
    """Greedy: after each removal, measure the loss without each of the remaining units again."""
    plan: list[Unit] = []
    for n in range(count):
        rest = [unit for unit in units if unit not in plan]
        shown = bar(rest, f"{LABEL} {n + 1} of {count}", unit="candidate", delay=1.0)
        losses = [mean_loss(drop_units(lm, [*plan, unit]), texts) for unit in shown]
        plan += lowest(rest, 1, losses)
    return plan


CRITERIA = {
    "influence": by_influence,
    "angular": by_angular_distance,
    "similarity": by_similarity,
    "greedy": by_loss,
}


def at_random(units: list[Unit], count: int, seed: int) -> list[Unit]:
    order = np.random.default_rng(seed).permutation(len(units))
    return [units[i] for i in order[:count]]


def deepest(units: list[Unit], count: int) -> list[Unit]:
    """From the last but one down."""
    return units[-2::-1][:count]


def lowest(units: list[Unit], count: int, scores) -> list[Unit]:
    """The units with the lowest scores, the lowest first."""
    return [units[i] for i in np.argsort(scores, kind="stable")[:count]]


LABEL = "layer skip: choose"  # of the progress bars


# Offline: what they measure ----------------------------------------------------------------------


def block_influence(lm, texts) -> np.ndarray:
    """(L,): ShortGPT's block influence (BI) of each layer."""
    cosines = [cosine(h[:-1], h[1:]) for h in hidden_states(lm, texts)]  # each (L, T)
    return 1 - np.concatenate(cosines, -1).mean(-1)


def angular_distance(lm, texts, n: int) -> np.ndarray:
    """(L - n + 1,): distances, from 0 to 1, between what enters layer l and what enters l + n."""
    cosines = []
    for h in hidden_states(lm, texts):
        last = h[:, -1]  # (L + 1, D): of the last token
        cosines.append(cosine(last[:-n], last[n:]))
    return (np.arccos(cosines) / np.pi).mean(0)


def similarity(lm, units: Sequence[Unit], texts) -> np.ndarray:
    """(units,): mean cosines of the residual stream before and after each sub-layer."""
    found: dict[Unit, list] = {unit: [] for unit in units}

    def watch(lm, kind: str):
        def watched(p, index):
            unit = Unit(kind, index)
            return Watched(p, found[unit]) if unit in found else p

        return wrap(lm, kind, watched)

    watched = watch(watch(lm, "attn"), "ffn")
    cosines: dict[Unit, list] = {unit: [] for unit in units}
    for ids in bar(texts, LABEL, unit="text", delay=1.0):
        watched.model.hidden(ids)
        for unit, passed in found.items():
            cosines[unit] += [cosine(x, x + f) for x, f in passed]
            passed.clear()
    return np.array([np.concatenate(cosines[unit]).mean() for unit in units])


def hidden_states(lm, texts) -> Iterator[np.ndarray]:
    """For each text h (L + 1, T, D): the input of each layer, and the output of the last."""
    found: list = []
    watched = wrap(lm, "block", lambda block, index: Watched(block, found))
    for ids in bar(texts, LABEL, unit="text", delay=1.0):
        found.clear()
        watched.model.hidden(ids)
        yield np.stack([found[0][0], *(after for _, after in found)])


@part
class Watched(Part):
    """Runs a part and records its input and output."""

    inner: Part
    found: list

    def __call__(self, x, layer: Layer):
        y = self.inner(x, layer)
        self.found.append((x, y))
        return y


def cosine(a, b) -> np.ndarray:
    """Cosines of the angles between the rows of a and b (..., D), in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.clip((a * b).sum(-1) / lengths, -1, 1)  # rounding may exceed 1


# Checks ------------------------------------------------------------------------------------------

NOUNS = {
    "layer": "layers",
    "attention": "attention sub-layers",
    "ffn": "FFN sub-layers",
    "both": "sub-layers",
}
UNITS = {  # the units that a criterion ranks, where it does not rank all
    "influence": ("layer",),
    "angular": ("layer",),
    "similarity": ("attention", "ffn", "both"),
}


def read_drop(text: str, unit: str, units: list[Unit]) -> list[Unit]:
    """The units named by a text such as ``3,5``, ``3+5`` or, for unit=both, ``attn3,ffn5``."""
    known = {str(u) if unit == "both" else str(u.index): u for u in units}
    plan: list[Unit] = []
    for name in text.replace("+", ",").split(","):
        if name.strip() not in known:
            first, last = list(known)[0], list(known)[-1]
            raise MinitxError(
                f"layer_skip: drop has {name!r}; expected {first} to {last}, the {NOUNS[unit]} of "
                f"this model, separated by commas."
            )
        if known[name.strip()] in plan:
            raise MinitxError(f"layer_skip: drop has {name.strip()!r} twice; name it once.")
        plan.append(known[name.strip()])
    return plan


def check_choice(choose: str, unit: str, count: int, units: int) -> None:
    if unit not in UNITS.get(choose, NOUNS):
        others = [c for c in (*CRITERIA, "random", "last") if unit in UNITS.get(c, NOUNS)]
        raise MinitxError(
            f"layer_skip: choose={choose} does not rank {NOUNS[unit]} (unit={unit}); use "
            f"{', '.join(others[:-1])} or {others[-1]}."
        )
    most = units - (choose == "last")
    if count > most:
        keeps = ", since choose=last keeps the very last" if choose == "last" else ""
        raise MinitxError(
            f"layer_skip: count is {count}; expected at most {most} of the {units} "
            f"{NOUNS[unit]} of this model{keeps}."
        )


def check_model(lm) -> None:
    if lm.model.config.skipless:
        raise MinitxError(
            "layer_skip needs residual connections and this model is skipless: dropping a "
            "sub-layer would drop the hidden state; leave layer_skip out."
        )


def check_slots(lm, dropped: set[tuple[str, int]]) -> None:
    blocks = blocks_of(lm)
    for slot, index in sorted(dropped):
        found = (getattr(node, slot, None) for _, node in walk(blocks[index]))
        if not any(isinstance(p, Part) for p in found):
            raise MinitxError(
                f"layer_skip cannot drop {slot}{index}: block {index}, a "
                f"{type(blocks[index]).__name__}, no longer has a part of that name; drop "
                "another, or load the model without the technique that replaced it."
            )


def check_streams(lm, choose: str) -> None:
    """Refuse to compare hidden states if the input of the first block is not one: with first_layer
    it is a wider row of a table."""
    if choose == "greedy":
        return
    need(lm.model.stack, Stack)
    x = lm.model.embed(np.array([0]), slice(0, 1))
    if x.shape[-1] != lm.model.config.width:
        raise MinitxError(
            f"layer_skip: choose={choose} compares the hidden states around each layer, but the "
            "input of the first is a row of a table; use greedy, random, last or drop=, or leave "
            "first_layer out."
        )


# Notes:
#
# Measured on ``stories`` with ``minitx sweep layer-skip`` and these settings (one BLAS thread):
#
#     choose=influence,angular,greedy,last count=3,4
#     choose=random seed=0,1,2,3,4 count=3
#     unit=attention,ffn choose=greedy,similarity count=3
#     unit=both choose=last count=3
#
# Loss above dense, in nats per token of ordinary text; then the accuracy of answers by hops, the
# number of facts that an answer has to combine (dense: 99.3, 97.2, 100 %).
#
#     unit       count  choose                 multiply-adds  loss     1 hop  2 hops  3 hops  speed
#     layer        3    infl., ang., greedy, last 0.643x     +0.0050   99.3    94.4    96.0   1.56x
#     layer        3    random, seed 0            0.643x     +0.0914   47.0    58.3    44.0
#     layer        3    random, best of 5         0.643x     +0.0037   98.7    94.4    92.0
#     layer        3    random, worst of 5        0.643x     +10.6      2.6     2.8     0.0
#     layer        4    infl., ang., greedy       0.524x     +0.0073   98.7    61.1    36.0   1.9x
#     layer        4    last                      0.524x     +0.0412   90.7    58.3    56.0   1.8x
#     attention    3    greedy                    0.889x     +0.0026   99.3    97.2   100.0   1.3x
#     attention    3    similarity                0.889x     +0.0061   98.0    94.4    92.0   1.3x
#     ffn          3    greedy                    0.754x     +0.0039   99.3    97.2   100.0   1.15x
#     ffn          3    similarity                0.754x     +0.0063   99.3    97.2   100.0   1.15x
#     both         3    last                      0.844x     +0.0014   99.3    97.2    96.0   1.25x
#
# With count=3 every criterion drops layers 4, 5 and 6: ``stories`` was trained with LayerSkip's
# layer dropout, which makes late layers dispensable, and even ``last`` finds them. Without such
# training no layer can be dropped: on ``stories-parallel`` the cheapest of four layers costs 0.49
# nats per token of 16 calibration stories. The fourth layer shows what a mean loss hides: +0.0073
# nats, and two thirds of the answers that combine three facts are lost.
#
# Cosines are blind to scale: a layer that makes the hidden state ten times as long matters, and has
# influence 0. Only greedy looks at the output of the model, which takes up to count * units passes
# over the texts. Texts are run one by one, so no padding enters a mean. Angular uses one token of
# each text, and needs the most texts.
#
# Unconfirmed in the papers and chosen here: influence averages over all calibration tokens,
# not over texts; ties go to the lower index; in SLEB, the first and last layer may be dropped too.
#
# preset=llm-drop leaves count to you: the authors' code drops the attention of 4 or 8 layers of 32
# (preset=llm-drop count=4), ranked once by 256 texts of 2,048 tokens; here 16 stories.
