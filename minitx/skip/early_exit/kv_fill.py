"""Keys and values in skipped layers: backfill them from the exit state, or defer the layers.

A token that reaches a layer attends to every earlier token there, also to those that skipped it.
Both parts below have the same methods; ``run`` is called for each layer after the first exits.
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

        First the keys and values of all tokens are stored; then the live ones attend.
        """
        layer.tokens = state.tokens
        if live.all():
            return block(x, layer)
        block.backfill(x, layer)
        columns = np.flatnonzero(live_columns(live))
        if not len(columns):
            return x
        layer.tokens = state.tokens.only(columns)
        rows, live = x[..., columns, :], live[..., columns, None]
        y = x.copy()
        y[..., columns, :] = np.where(live, block.attend_from(rows, layer), rows)
        return y

    def skip(self, blocks, x, layers, state: State) -> None:
        """What ``run`` does in all these layers for one token x (..., 1, D) that has exited."""
        for block, layer in zip(blocks, layers, strict=True):
            layer.tokens = state.tokens
            block.backfill(x, layer)

    def begin(self, x, state: State) -> None:
        """Called when tokens may begin to exit. Nothing to do."""

    def ran_all_layers(self, state: State) -> None:
        """Called for a step in which no token may exit. Nothing to do."""


def live_columns(live):
    """(T,) booleans: is any sequence of the batch live (..., T) in this column?"""
    return live.reshape(-1, live.shape[-1]).any(0)


@part
class DeferLayers(Part):
    """FREE: a skipped layer runs only when a later token needs its keys and values. Then all tokens
    that skipped it run through it in one causal chunk with that token."""

    has_history = True

    def run(self, block: Part, x, live, layer: Layer, state: State):
        """Run one block for all tokens that it has not run yet, up to the last one of x (..., T, D)
        that is ``live`` (..., T). The outputs of those that have exited are kept for the next layer
        and not returned."""
        columns = np.flatnonzero(live_columns(live))
        if not len(columns):
            return x
        deferred, first = self.deferred(x, state), state.position
        a, b = deferred.done[layer.index], first + int(columns[-1]) + 1
        layer.tokens = Tokens(slice(a, b), state.start)
        deferred.h[..., a:b, :] = block(deferred.h[..., a:b, :], layer)
        deferred.done[layer.index] = b
        if a < first:
            ledger.event("deferred layers run", (first - a) * math.prod(x.shape[:-2]))
        return np.where(live[..., None], deferred.h[..., first : first + x.shape[-2], :], x)

    def skip(self, blocks, x, layers, state: State) -> None:
        """The layers of one token that has exited are deferred: nothing to do yet."""

    def begin(self, x, state: State) -> None:
        """Keep the hidden states x (..., T, D) after the layers that every token runs."""
        self.deferred(x, state).h[..., state.tokens.positions, :] = x

    def ran_all_layers(self, state: State) -> None:
        if self in state.shared.kept:
            state.shared.kept[self].done = [state.tokens.end] * len(state.layers)

    def deferred(self, x, state: State) -> "Deferred":
        shape = (*x.shape[:-2], state.capacity, x.shape[-1])
        done = [state.position] * len(state.layers)  # before the first exit, all layers ran
        return state.shared.recall(self, lambda: Deferred(shape, x.dtype, done))


class Deferred:
    """What is remembered of tokens that have exited.

    h (..., capacity, D): the hidden state of each token after the last layer that it ran. done: for
    each layer, the position up to which it has run all tokens. It has run none after that, since a
    token that enters a layer takes along all that skipped it. And those have run all layers before
    it, since that token came through them too.
    """

    def __init__(self, shape: tuple, dtype, done: list[int]):
        self.h = np.empty(shape, dtype)
        self.done = done

    def rewind(self, position: int) -> None:
        self.done = [min(done, position) for done in self.done]
