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
    """The model's first layers propose tokens; its other layers verify them."""
    if gamma == 0:
        return lm
    need_plain_loop(lm, "self_speculative")
    check(lm.model)
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


def check(model: Transformer) -> None:
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
        self.run_first_layers(tokens[len(self.h) :])  # the last one: no token was drafted from it
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
