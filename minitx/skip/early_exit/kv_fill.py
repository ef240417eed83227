"""Keys and values in skipped layers: backfill them from the exit state, or defer the layers.

A token that reaches a layer attends to every earlier token there, also to those that skipped it.
Both parts below have the same methods; ``run`` is called for each layer from ``first`` on.

Column j of x (..., T, D) is x[..., j, :]: token j of this step, in every sequence of the batch.
"""

import math

import numpy as np

from minitx import ledger
from minitx.state import Layer, State, Tokens
from minitx.tree import Part, part


@part
class CopyExitState(Part):
    """CALM: a skipped layer computes keys and values from the hidden state at the exit."""

    def run(self, block: Part, x, live, layer: Layer, state: State):
        """Run one block for the tokens of x (..., T, D) that are ``live`` (..., T). The others have
        exited: x holds their exit states, which are returned as they are.

        backfill: store keys and values only; attend_from: the rest of the block, for tokens whose
        keys and values are stored.
        """
        layer.tokens = state.tokens
        if live.all():
            return block(x, layer)
        block.backfill(x, layer)
        columns = np.flatnonzero(live_columns(live))
        if not len(columns):
            return x
        layer.tokens = state.tokens.only(columns)
        h, live = x[..., columns, :], live[..., columns, None]
        y = x.copy()
        y[..., columns, :] = np.where(live, block.attend_from(h, layer), h)
        return y

    def skip(self, blocks, x, layers, state: State) -> None:
        """For one token x (..., 1, D) that has exited, do what ``run`` does, in all these
        layers."""
        for block, layer in zip(blocks, layers, strict=True):
            layer.tokens = state.tokens
            block.backfill(x, layer)

    def begin(self, x, state: State) -> None:
        """Called before tokens may exit, with x (..., T, D) = h[first]. Nothing to do."""

    def ran_all_layers(self, state: State) -> None:
        """Called after a step in which no token may exit. Nothing to do."""


def live_columns(live):
    """(T,) booleans: is this column live in any sequence of the batch? live: (..., T)."""
    return live.reshape(-1, live.shape[-1]).any(0)


@part
class DeferLayers(Part):
    """FREE: a skipped layer runs only when a later token needs its keys and values. Then all tokens
    that skipped it run through it in one causal chunk with that token."""

    has_history = True  # remembers ``Deferred`` of a sequence, besides its keys and values

    def run(self, block: Part, x, live, layer: Layer, state: State):
        """Run one block for all tokens that it has not run yet, up to the last one of x (..., T, D)
        that is ``live`` (..., T). A token that has exited runs too if it comes before that one: its
        output is kept for the next layer, and its exit state, in x, is returned as it is."""
        columns = np.flatnonzero(live_columns(live))
        if not len(columns):
            return x
        deferred, now = self.deferred(x, state), state.position  # this step begins at position now
        a = deferred.done[layer.index]  # tokens before position a have run this layer
        b = now + int(columns[-1]) + 1  # those before b will have
        layer.tokens = Tokens(slice(a, b), state.start)
        deferred.h[..., a:b, :] = block(deferred.h[..., a:b, :], layer)
        deferred.done[layer.index] = b
        if a < now:
            ledger.event("deferred layers run", (now - a) * math.prod(x.shape[:-2]))
        return np.where(live[..., None], deferred.h[..., now : now + x.shape[-2], :], x)

    def skip(self, blocks, x, layers, state: State) -> None:
        """One token x (..., 1, D) has exited: these layers are deferred. Nothing to do yet."""

    def begin(self, x, state: State) -> None:
        """Keep x (..., T, D) = h[first], the last state that every token has."""
        self.deferred(x, state).h[..., state.tokens.positions, :] = x

    def ran_all_layers(self, state: State) -> None:
        """Called after a step in which no token may exit, that is, inside the warm-up: all earlier
        tokens are inside it too, so all of them have run every layer. (A ``Deferred`` exists then
        only if the sequence was rewound into the warm-up.)"""
        if self in state.shared.kept:
            state.shared.kept[self].done = [state.tokens.end] * len(state.layers)

    def deferred(self, x, state: State) -> "Deferred":
        """The ``Deferred`` of this sequence, made in the first step in which a token may exit: all
        tokens before this step have run all layers."""
        shape = (*x.shape[:-2], state.capacity, x.shape[-1])
        done = [state.position] * len(state.layers)
        return state.shared.recall(self, lambda: Deferred(shape, x.dtype, done))


class Deferred:
    """What is remembered of a sequence, so that skipped layers can run later.

    h (..., capacity, D): the hidden state of each token after the last layer that it ran.
    done (L): layer l >= ``first`` has run exactly the tokens before position done[l].

    Invariant: from layer ``first`` on, done never grows from one layer to the next, because a token
    that reaches layer l passed through all lower layers, and took along every token that had
    skipped those. So the tokens that layer l is about to run have their output of layer l-1 in h.
    """

    def __init__(self, shape: tuple, dtype, done: list[int]):
        self.h = np.empty(shape, dtype)
        self.done = done

    def rewind(self, position: int) -> None:
        self.done = [min(done, position) for done in self.done]
