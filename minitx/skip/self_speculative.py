"""Self-speculative decoding: the model's first layers propose tokens, its other layers verify them.

From top to bottom: the card and the options; the draft, which shares the model's KV cache; notes.
The rule that accepts or replaces a draft token and the decoding loop are in
minitx/shared/draft_and_verify.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import numpy as np

from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.model import Stack, Transformer
from minitx.second_model import need_rewind
from minitx.shared.draft_and_verify import (
    Draft,
    Drafting,
    Proposal,
    Speculative,
    draw_one_by_one,
)
from minitx.shared.draft_length import Adapt, Gamma, Stop, draft_length
from minitx.shared.plain_loop import need_plain_loop
from minitx.state import State
from minitx.technique import at_least, need, owner, technique
from minitx.tree import part, walk


@technique(
    level="decode",
    exact=True,
    neutral={"gamma": 0},
    demo={"layers": 1, "gamma": 3},
    event="draft tokens proposed",
    presets={"layerskip": {"gamma": 12, "stop": 0.0}},
)
def self_speculative(
    lm,
    *,
    layers: Annotated[
        int | None, "layers E that draft; default: a quarter of the model's", at_least(1)
    ] = None,
    gamma: Gamma = 8,
    stop: Stop = 0.3,
    adapt: Adapt = False,
):
    """The model's first layers propose tokens; its other layers verify them.

    Paper:     Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative
               Decoding", ACL 2024, arXiv 2404.16710. When to stop: Zhang et al., "Draft & Verify",
               ACL 2024, arXiv 2309.08168.
    Fidelity:  the paper's text; stop and adapt: the authors' code of Draft & Verify.
    Kind:      exact: samples follow the model's distribution; greedy text is the same, except for
               ties that rounding decides.
    Idea:      After a few layers a model often knows the next token. So those layers draft, and the
               others verify several draft tokens in one pass: no second model or KV cache.
    Offline:   nothing; a model trained for early exit (minitx/training/layerskip.py) accepts more.
    Online:    one round; h[E]: hidden state after the first E layers
               q[i] = head(norm(h[E]))        h[E] of x[i-1], x[0] being the text's last token
               x[i] ~ q[i], i = 1..n          n = gamma, or up to the first x[i] with a probability
                                              below stop, as in speculative
               keep each h[E], and the cache rows of layers 0..E-1
               run layers 0..E-1 on x[n]; run layers E..L-1 on h[E] of x[0..n] in one pass
               p[1..n+1] = head(norm(h[L]))
               accept, resample and emit as in speculative; truncate the KV cache of every layer to
               the same length
    Saves:     sequential passes of layers E..L-1, so bytes of weights read (0.68x on stories).
               Multiply-adds rise (1.30x): n + 1 tokens through every layer, 2 n + 1 through the
               head, for 1 to n + 1 tokens. A draft with its own cache would run n tokens through
               layers 0..E-1 twice (speculative draft=self: 1.61x at E = L/2, here 1.13x).
    In NumPy:  1.1x the throughput of plain decoding on stories (minitx frontier decoding
               --methods self_speculative).
    Not for:   models whose early layers predict badly; parts that free cache rows, or decide for
               all tokens of a step together; batches, whose sequences are decoded one by one.
    Proof:     tests/skip/test_self_speculative.py; literal version:
               tests/skip/literal_self_speculative.py
    Tutorial:  tutorials/18_guessing_without_a_draft.py
    """
    if gamma == 0:
        return lm
    need_plain_loop(lm, "self_speculative")
    need_first_layers(lm.model)
    L = len(lm.model.stack.blocks)
    layers = max(L // 4, 1) if layers is None else layers
    if layers >= L:
        raise MinitxError(
            f"self_speculative: layers is {layers}, but the model has {L} and one at least must be "
            f"left to verify; give 1 to {L - 1}."
            if L > 1
            else "self_speculative needs a model of two layers or more, and this one has one; use "
            "prompt_lookup."
        )
    length = draft_length(gamma, stop, adapt)
    return replace(lm, decode=Speculative(FirstLayers(layers), length))


def need_first_layers(model: Transformer) -> None:
    """Refuse a model whose first layers cannot run on their own."""
    need(model, Transformer)
    need(model.stack, Stack)
    need_rewind(model, "self_speculative", "model", "use prompt_lookup")
    for _, node in walk(model):
        if node.decides != "token":
            raise MinitxError(
                f"self_speculative runs the first layers token by token and the others on several "
                f"tokens at once, and {owner(node)} decides by the step; use one of the two."
            )


# Online ------------------------------------------------------------------------------------------


@part
class FirstLayers(Draft):
    """The first E layers of the target itself, followed by its norm and its head."""

    layers: int  # E

    def begin(self, model: Transformer, state: State) -> Drafting:
        return SharedCache(model, state, self.layers)


class SharedCache(Drafting):
    """``FirstLayers`` at work on one sequence.

    Draft and target have one KV cache. While a round is drafted, layers 0 .. E-1 hold more rows
    than the others; each token runs these layers once, and its hidden state h[E] is kept for the
    verification, which runs the others. After that all layers have the same number of rows again.
    """

    def __init__(self, model: Transformer, state: State, layers: int):
        super().__init__(model, state)
        self.layers = layers  # E
        self.h: list[np.ndarray] = []  # h[E] (1, D) of each token of this round that has run them

    def propose(self, text: list[int], sampler: Sampler) -> Iterator[Proposal]:
        return draw_one_by_one(self.next_logits, text[-1:], sampler)

    def next_logits(self, ids: list[int]) -> np.ndarray:
        """The draft's logits (V,) after one more token."""
        h = self.run_first_layers(ids)
        return self.model.head(self.model.norm(h)[0])

    def score(self, tokens: list[int]) -> np.ndarray:
        """The target's logits (gamma + 1, V)."""
        self.run_first_layers(tokens[len(self.h) :])  # the last proposal, which was not fed back
        x = np.concatenate(self.h)  # (gamma + 1, D)
        self.state.position -= len(tokens)
        self.state.take(len(tokens))
        x = self.run(x, self.layers, len(self.model.stack.blocks))
        self.state.position += len(tokens)
        return self.model.head(self.model.norm(x))

    def run_first_layers(self, ids: list[int]) -> np.ndarray:
        """h[E] (1, D) of the next token, which is kept."""
        ids = np.asarray(ids)
        self.model.check(ids, self.state)
        x = self.model.embed(ids, self.state.take(len(ids)).lookup)
        self.h.append(self.run(x, 0, self.layers))
        self.state.position += len(ids)
        return self.h[-1]

    def run(self, x, first: int, last: int) -> np.ndarray:
        """Run layers first .. last - 1 on the tokens of this step."""
        with np.errstate(over="ignore"):  # as in Transformer.hidden
            return self.model.stack.run(x, self.state, first, last)

    def rewind(self, position: int) -> None:
        super().rewind(position)
        self.h = []


# Notes:
#
# - The draft has not read its own last proposal when the verification begins, so that token runs
#   all layers there. Each token of a round runs each layer once; the weights of layers 0..E-1 are
#   read n + 1 times, those of the others once.
# - The default of E, a quarter of the layers, is the paper's choice for Llama 2 7B (8 of 32; 15 of
#   40 for 13B). With one layer less than all, nothing is left to save.
# - adapt=true moves the threshold by 0.001 a round, so it matters only in long texts.
# - Sampling accepts an unlikely draft token as readily as a likely one if q is close to p, so there
#   stop=0.3 ends rounds too early: 3.1 tokens per pass instead of 3.9 with gamma=4 stop=0, for
#   fewer multiply-adds (layers=2; --temperature 1 below).
# - python -m minitx.lab.loops self_speculative layers=2,3,4,5,6 gamma=4 stop=0
#   on stories (trained with LayerSkip's recipe), 20 prompts of 32 tokens, 48 new ones each, greedy
#   (layers=2,3,4,5,6; stop=0 gamma=1,2,8). Relative to plain decoding, prefill included; passes are
#   among the events below that table:
#
#                         accepted   tokens per pass   multiply-adds   weight bytes
#       gamma=4 stop=0
#         layers=2           50 %         2.90             1.49x           0.78x
#         layers=3           62 %         3.33             1.33x           0.80x
#         layers=4           73 %         3.74             1.23x           0.83x
#         layers=5           76 %         3.87             1.19x           0.92x
#         layers=6           85 %         4.21             1.13x           0.95x
#       gamma=8 stop=0.3 (default)
#         layers=2           63 %         3.06             1.30x           0.68x
#         layers=3           74 %         3.52             1.20x           0.71x
#         layers=4           85 %         3.75             1.13x           0.75x
#         layers=5           87 %         3.87             1.11x           0.84x
#         layers=6           90 %         3.90             1.09x           0.91x
#       layers=2 stop=0
#         gamma=1            70 %         1.68             1.14x           0.79x
#         gamma=2            65 %         2.26             1.23x           0.73x
#         gamma=8            32 %         3.37             2.06x           1.00x
#
#   More layers predict better, but a draft step then reads more weights: bytes are lowest at E = 2.
