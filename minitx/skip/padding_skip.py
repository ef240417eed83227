"""Packed batches: the tokens of sequences of different lengths in one array, without padding.

This file: the card, the token loop (online), the model for packed tokens (online), the cost
formula, notes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Annotated

import numpy as np

from minitx import fast, ledger
from minitx.decode import Autoregressive, Sampler, TokenLoop, new_state
from minitx.model import (
    FFN,
    Attend,
    Attention,
    Block,
    ParallelBlock,
    SkiplessBlock,
    SkiplessParallelBlock,
    Stack,
    Transformer,
)
from minitx.state import State, Tokens
from minitx.technique import at_least, need, technique
from minitx.tree import Part, part, rebuild, walk, weights


@technique(
    level="decode",
    exact=True,
    neutral=None,
    after=(
        *("big_little", "ensemble", "jacobi", "lookahead"),
        *("prefix_cache", "prompt_lookup", "self_speculative", "speculative"),
    ),
    event=("tokens run", "tokens with padding"),
)
def padding_skip(
    lm,
    *,
    tokens: Annotated[
        int,
        "maximum number of tokens in a pass, unless one prompt has more; 1: each sequence alone",
        at_least(1),
    ] = 256,
):
    """Pack the sequences of a ragged batch without padding, and drop those that have ended.

    Paper:     Zhai et al., "ByteTransformer: A High-Performance Transformer Boosted for Variable-
               Length Inputs", IPDPS 2023, arXiv 2210.03052. Yu et al., "Orca", OSDI 2022: sequences
               that have ended leave the batch; attention runs one sequence at a time ("selective
               batching").
    Fidelity:  a reconstruction from notes on ByteTransformer's code and from summaries of Orca. Not
               here: requests that join a running batch.
    Kind:      exact up to rounding: each sequence gets what it would get alone.
    Idea:      In a batch, shorter prompts are padded to the longest, and sequences that have ended
               run on until all have. But norms, projections and FFNs treat each token by itself, so
               they can run on an array of nothing but the real tokens of all sequences.
    Offline:   nothing.
    Online:    a pass over n sequences; sequence i has T[i] new tokens, N = sum of T
               cuts[i] = T[0] + ... + T[i-1]        sequence i: rows cuts[i] .. cuts[i+1] - 1
               x (N, D): all new tokens, sequence after sequence, each with its own positions
               norms, projections, RoPE, FFN:       once, on all N rows
               KV cache and attention:              sequence by sequence, each on its own rows
               logits:                              of the last row of each sequence
               A sequence whose new token ends the text leaves the batch.
    Saves:     N of B max(T) rows are run (B: all sequences of the batch). Of the prompts' products
               mean(T) / max(T) remains, and less of their attention; of decoding, the share of
               steps before a sequence ends. A single prompt (minitx compare) has no padding.
    In NumPy:  16 prompts on stories: read 1.2x (equal lengths) to 4.2x (mean: a quarter of the
               longest) as fast as padded, about as fast as one by one. Decoded 0.8x as fast while
               all run, 1.2x to 2.4x if completions average 0.6 to 0.25 of the longest (Notes).
    Not for:   speculative and prefix_cache, which decode the prompts of a batch one by one. Parts
               that may keep something of a sequence (the stack of early_exit, the FFN of ffn_skip)
               run on one after another. Batches of lm.logits, which have no padding.
    Proof:     tests/skip/test_padding_skip.py; literal version: tests/skip/literal_padding_skip.py
    """
    need(lm.decode, Autoregressive)
    return replace(lm, decode=PackedBatch(lm.decode, tokens))


# Online: the loop --------------------------------------------------------------------------------


@part
class PackedBatch(TokenLoop):
    """Each step runs the new tokens of all sequences that have not ended, packed."""

    inner: Part  # the loop for one sequence
    tokens: int  # in a pass

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """One sequence has no padding: see ``TokenLoop``."""
        return self.inner(model, state, ids, choose, limit)

    def batch(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        choosers: Sequence[Sampler],
        limit: int,
    ) -> Iterator[list[int]]:
        """B prompts: see ``TokenLoop``. A sequence that has ended repeats its last token."""
        packed, B = pack(model), len(prompts)
        states = {i: new_state(model, prompt) for i, prompt in enumerate(prompts)}
        new, chosen = list(prompts), [0] * B  # new: the ids that each sequence runs next
        for _ in range(limit):
            lengths = {i: len(new[i]) for i in states}
            ledger.event("tokens run", sum(lengths.values()))
            ledger.event("tokens with padding", B * max(lengths.values(), default=0))
            for group in passes(lengths, self.tokens):
                logits = next_logits(packed, [new[i] for i in group], [states[i] for i in group])
                for i, row in zip(group, logits):
                    chosen[i] = choosers[i](row)
                    new[i] = [chosen[i]]
            yield list(chosen)
            # The state of a sequence that has ended is dropped, and its KV cache with it.
            states = {i: own for i, own in states.items() if chosen[i] not in model.config.eos}


def passes(lengths: dict[int, int], tokens: int) -> list[list[int]]:
    """The sequences of a step in groups, of which each is one pass of at most so many tokens, or of
    one sequence. lengths: the new tokens of each sequence."""
    groups: list[list[int]] = []
    room = 0
    for i, T in lengths.items():
        if T > room:
            groups.append([])
            room = tokens
        groups[-1].append(i)
        room -= T
    return groups


def next_logits(packed: Transformer, ids: Sequence[Sequence[int]], states: Sequence[State]):
    """Logits (n, V) after each of n sequences, whose new ids continue its state."""
    step = PackedState(states, [len(new) for new in ids])
    x = packed.hidden(np.concatenate(ids), step)  # (N, D)
    for state, new in zip(states, ids):
        state.position += len(new)
    last = np.array(step.cuts[1:]) - 1  # the last row of each sequence
    return packed.head(packed.norm(x[last]))


# Online: the model for packed tokens -------------------------------------------------------------


def pack(model: Transformer) -> Transformer:
    """The model for packed tokens x (N, D), made of the same parts. Only the cache, attention, and
    parts that may keep something of a sequence see one sequence at a time."""

    def change(node: Part) -> Part | None:
        if type(node) in PASS_ON:
            return None  # goes on to its children
        if type(node) is FFN and by_token(node):
            return node
        if type(node) is Attention and all(
            by_token(child) for child in (node.norm, node.qkv, node.rope, node.out)
        ):
            attend = PackedSoftmax if type(node.attend) is Attend else PackedAttend
            return replace(node, cache=PackedCache(node.cache), attend=attend(node.attend))
        return EachSequence(node)

    return replace(model, stack=rebuild(model.stack, change))


PASS_ON = Stack, Block, ParallelBlock, SkiplessBlock, SkiplessParallelBlock


def by_token(root: Part) -> bool:
    """Does each row of the result depend on that row of x alone?"""
    return all(node.decides == "token" and not node.has_history for _, node in walk(root))


class Packed:
    """n sequences side by side: sequence i has the rows cuts[i] .. cuts[i+1] - 1 of an array. own:
    the ``State`` of each, or its ``Layer`` of one block."""

    def __init__(self, own: Sequence, cuts: Sequence[int]):
        self.own, self.cuts = own, cuts

    def split(self, x) -> list[np.ndarray]:
        """The rows of each sequence: x (..., N, D) -> n views (..., T, D)."""
        return [x[..., a:b, :] for a, b in pairwise(self.cuts)]


class PackedState(Packed):
    """What the model takes instead of a ``State``: those of n sequences, for one step."""

    def __init__(self, states: Sequence[State], lengths: Sequence[int]):
        super().__init__(states, list(accumulate(lengths, initial=0)))
        self.layers = [Packed(layers, self.cuts) for layers in zip(*(s.layers for s in states))]
        self.capacity, self.position = states[0].capacity, 0
        positions = [advance(state, T).array for state, T in zip(states, lengths)]
        self.tokens = Tokens(np.concatenate(positions))  # (N,)

    def take(self, N: int) -> Tokens:
        return self.tokens

    def need_batch(self, shape: tuple) -> None:
        """Nothing to check: packed ids (N,) are one row."""


def advance(state: State, T: int) -> Tokens:
    """The T new tokens of one sequence, set in its state and in all its layers."""
    tokens = state.take(T)
    for layer in state.layers:
        layer.tokens = tokens
    return tokens


@part
class PackedCache(Part):
    """The KV cache of each sequence."""

    inner: Part

    def store(self, k, v, layers: Packed):
        """k and v (K, N, d)"""
        for own_k, own_v, layer in zip(layers.split(k), layers.split(v), layers.own):
            self.inner.store(own_k, own_v, layer)  # (K, T, d)

    def read(self, layers: Packed):
        """All keys and all values: two tuples of n arrays (K, S, d)."""
        return zip(*(self.inner.read(layer) for layer in layers.own))


@part
class PackedAttend(Part):
    """The queries of each sequence attend to its own keys."""

    inner: Part

    def __call__(self, q, k, v, layers: Packed):
        """q (H, N, d), k and v from ``PackedCache.read`` -> (H, N, d)"""
        found = map(self.inner, layers.split(q), k, v, layers.own)  # n arrays (H, T, d)
        return np.concatenate(list(found), -2)


@part
class PackedSoftmax(PackedAttend):
    """The same for plain attention. If each sequence has one token, one softmax serves all: it
    decodes 16 sequences on stories 1.25x faster, since NumPy is called less often."""

    def __call__(self, q, k, v, layers: Packed):
        H, N, d = q.shape
        if N > len(layers.own) or any(layer.mask() is not None for layer in layers.own):
            return super().__call__(q, k, v, layers)
        K, width = k[0].shape[-3], v[0].shape[-1]
        S = [keys.shape[-2] for keys in k]
        q = (q * self.inner.scale).reshape(K, H // K, N, d)
        cuts = list(accumulate(S, initial=0))  # sequence i has the scores cuts[i] .. cuts[i+1] - 1
        p = np.empty((K, H // K, cuts[-1]), q.dtype)
        for i, (a, b) in enumerate(pairwise(cuts)):
            np.matmul(q[:, :, i], k[i].swapaxes(-1, -2), out=p[..., a:b])
        p -= np.repeat(np.maximum.reduceat(p, cuts[:-1], -1), S, -1)
        np.exp(p, out=p)
        out = np.empty((*q.shape[:-1], width), q.dtype)
        for i, (a, b) in enumerate(pairwise(cuts)):
            np.matmul(p[..., a:b], v[i], out=out[:, :, i])
        out /= np.add.reduceat(p, cuts[:-1], -1)[..., None]
        work = H * (d + width) * cuts[-1]
        ledger.count(work, 0, lambda: sum(map(fast.cached_bytes, k, v)), part=self.inner)
        return out.reshape(H, N, width)


@part
class EachSequence(Part):
    """Runs a part on one sequence after another, as it would run alone."""

    inner: Part

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks  # of a stack

    def __call__(self, x, packed: Packed):
        return np.concatenate(list(map(self.inner, packed.split(x), packed.own)), -2)


# Cost --------------------------------------------------------------------------------------------


def multiply_adds(model: Transformer, lengths: Sequence[tuple[int, int]]) -> int:
    """Of one step of a dense model in which sequence i runs T new tokens, after which its cache has
    S rows: ``lengths`` has (T, S) of each. A padded batch: the longest (T, S), B times."""
    c = model.config
    per_token = sum(w.size for w in weights(model.stack).values() if w.ndim == 2)
    scores = sum((b - a) * end for T, S in lengths for a, b, end in fast.causal_blocks(T, S))
    attention = 2 * c.layers * c.heads * c.head_width * scores
    return (
        sum(T for T, _ in lengths) * per_token + attention + len(lengths) * c.width * c.vocab_size
    )


# Notes:
#
# - Positions start from 0 in each sequence, and no sequence attends to another: each has a
#   ``State`` of its own. A single packed cache would need a mask made of blocks along the diagonal.
# - minitx batch --padding-skip on stories: the longest of 16 prompts has 256 tokens, the longest
#   completion 64. One BLAS thread, medians of 3 rounds, relative to the padded batch. "alone": the
#   dense model, one prompt after another. ByteTransformer was measured at mean / longest 0.6.
#
#                        prefill                         decoding
#       mean / longest   multiply-adds  speed   alone    multiply-adds  speed   alone
#       0.26             0.24x          4.2x    4.2x     0.19x          2.4x    1.5x
#       0.50             0.48x          2.2x    2.4x     0.41x          1.5x    0.6x
#       0.60             0.58x          1.9x    2.0x     0.52x          1.2x    0.5x
#       0.90             0.89x          1.2x    1.4x     0.88x          0.9x    0.3x
#       1.00             1.00x          1.2x    1.3x     1.00x          0.8x    0.3x
#
#   4 prompts are decoded 2.0x, 1.6x, 1.3x, 0.9x and 0.8x as fast (at 0.33, 0.53, 0.62, 0.91, 1).
# - Why prompts are read as fast alone: 256 rows keep BLAS busy, and their arrays fit the CPU's
#   cache. All 16 prompts in one pass take up to 1.25x as long as passes of 256 tokens (minitx batch
#   --padding-skip tokens=4096). Prompts of up to 32 tokens (--longest 32) are no faster either.
# - Why decoding is slower while all run: the padded batch attends with one call for all sequences,
#   the packed one with a few for each.
# - Weights are read once a pass. A step of decoding is one pass for up to 256 sequences.
# - With a part that runs on one sequence after another, the weights inside it are read once for
#   each, as if there were no batch; padding and ended sequences are still not run.
