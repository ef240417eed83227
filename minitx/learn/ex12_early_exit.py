"""Exercise 12: Early exit (35 minutes)

Many tokens are easy: after half of the layers the model would already predict the right word. Such
a token may exit there and skip the remaining layers. But later tokens attend to it in every layer.
If the skipped layers have no key and no value for it, the KV cache has a hole.

So a token that exits backfills the cache: each skipped layer makes a key and a value from the state
that the token had when it exited, as if nothing had changed it since. That costs two small matrix
products instead of a whole layer.

Write ``run``, which takes one token through the layers:

- Run the layers in order. Each is called with the token's state h and its own cache, and returns
  the new state. It stores the token's key and value in the cache by itself.
- After ``first`` layers, and after each further one, ask whether the token may exit. It exits if
  confidence(h, previous) >= threshold. Here h is the state now, and ``previous`` the state before
  the layer that has just run. Before ``first`` layers have run, do not ask. Whether you ask after
  all L layers makes no difference.
- When it exits, call cache.append(k, v) for each layer that has not run, with its cache. The layers
  read their input through their own norm, so the key and value of a skipped layer are

      n = block.norm(h)                        with h the state at the exit
      k, v = block.keys_and_values(n)

- Return the state and the depth: how many layers have run.

    h           (D,)   the token's state before the first layer
    blocks             L layers (the class Block below)
    caches             L caches (the class Cache below), one for each layer
    confidence         a function of (h, previous) that returns a number
    threshold          a number
    first              a number of layers, from 1 to L

Three equal layers to check by hand. With h = (1, 1) the norm gives n = (1, 1). All matrices are 1
on the diagonal, so key and value are (1, 1) too, and attention to this one token adds (1, 1). The
states are (1, 1), (2, 2), (3, 3), (4, 4). As confidence take previous[0] / h[0]: 1/2 after one
layer, 2/3 after two. With a threshold of 0.6 the token exits after two layers. The last layer gets
the key norm((3, 3)) = (1, 1).

    >>> one = np.eye(2)
    >>> blocks = [Block(np.ones(2), one, one) for _ in range(3)]
    >>> caches = [Cache() for _ in range(3)]
    >>> h, depth = run(np.ones(2), blocks, caches, lambda h, previous: previous[0] / h[0], 0.6, 1)
    >>> h.tolist(), depth
    ([3.0, 3.0], 2)
    >>> [len(cache.keys) for cache in caches], caches[2].keys[0].tolist()
    ([1, 1, 1], [1.0, 1.0])

Source: Schuster et al., "Confident Adaptive Language Modeling" (CALM), NeurIPS 2022.
"""

from dataclasses import replace

import numpy as np

from minitx.learn.exercise import Exercise, Mistake
from minitx.learn.outcomes import unpack
from minitx.model import Transformer
from minitx.shared.cosine import cosine
from minitx.state import Layer, State, Tokens
from minitx.technique import blocks_of, swap
from minitx.tree import Part, part


# given
class Cache:
    """The KV cache of one layer."""

    def __init__(self):
        self.keys, self.values = [], []

    def append(self, k, v):
        """Store the key and the value (D,) of one token."""
        self.keys.append(k)
        self.values.append(v)


class Block:
    """A toy layer with one attention head. It has no feed-forward network."""

    def __init__(self, gain, wk, wv):
        self.gain, self.wk, self.wv = gain, wk, wv  # (D,), (D, D), (D, D)

    def norm(self, h):
        """h (D,), a state, divided by its root mean square, times the gain: what the layer
        reads."""
        return h / np.sqrt((h**2).mean()) * self.gain

    def keys_and_values(self, n):
        """n (D,), a normalized state -> key (D,), value (D,)"""
        return n @ self.wk, n @ self.wv

    def __call__(self, h, cache):
        """Store the key and value of one token, then let it attend to all tokens in the cache."""
        n = self.norm(h)
        cache.append(*self.keys_and_values(n))
        scores = np.array(cache.keys) @ n / np.sqrt(len(n))  # the query is n itself
        weights = np.exp(scores - scores.max())
        return h + weights / weights.sum() @ np.array(cache.values)


# end of given


# solution
def run(h, blocks, caches, confidence, threshold, first):
    """Take one token h (D,) through the layers until it may exit -> (h (D,), depth)."""
    previous = h
    for depth, (block, cache) in enumerate(zip(blocks, caches)):
        if depth >= first and confidence(h, previous) >= threshold:
            for skipped, its_cache in zip(blocks[depth:], caches[depth:]):
                its_cache.append(*skipped.keys_and_values(skipped.norm(h)))
            return h, depth
        previous, h = h, block(h, cache)
    return h, len(blocks)


# end of solution


def in_loops(h, blocks, caches, confidence, threshold, first):
    """Count the layers that run; then fill the others."""
    L, states = len(blocks), [h]
    for i in range(L):
        states.append(blocks[i](states[i], caches[i]))
        depth = i + 1
        if first <= depth < L and confidence(states[depth], states[depth - 1]) >= threshold:
            break
    for i in range(depth, L):
        n = blocks[i].norm(states[depth])
        k, v = blocks[i].keys_and_values(n)
        caches[i].append(k, v)
    return states[depth], depth


def flawed(
    h,
    blocks,
    caches,
    confidence,
    threshold,
    first,
    *,
    sure=True,
    strict=False,
    always=False,
    late=0,
    order="now",
    fill="own",
    fill_from=0,
    count="layers",
):
    start = previous = h
    for depth, (block, cache) in enumerate(zip(blocks, caches)):
        if depth >= (1 if always else first + late):
            pair = {"now": (h, previous), "swapped": (previous, h), "stale": (h, start)}[order]
            c = confidence(*pair)
            exits = c >= threshold if sure else c < threshold
            if exits and not (strict and c == threshold):
                for skipped in range(depth + fill_from, len(blocks)):
                    backfill(fill, h, blocks, caches, skipped, depth)
                return h, depth - (count == "index")
        previous, h = h, block(h, cache)
    return h, len(blocks) - (count == "index")


def backfill(fill, h, blocks, caches, skipped, depth):
    block, cache = blocks[skipped], caches[skipped]
    if fill == "own":
        cache.append(*block.keys_and_values(block.norm(h)))
    elif fill == "raw":
        cache.append(*block.keys_and_values(h))
    elif fill == "copy":
        before = caches[depth - 1]
        cache.append(before.keys[-1], before.values[-1])
    elif fill == "zeros":
        cache.append(0 * h, 0 * h)
    elif fill == "run" and skipped == depth:
        for block, cache in zip(blocks[depth:], caches[depth:]):
            h = block(h, cache)


MISTAKES = (
    Mistake(
        "A token exits while it is unsure: it may exit if the confidence is at least the "
        "threshold.",
        sure=False,
    ),
    Mistake("At a confidence equal to the threshold the token runs on; >= is enough.", strict=True),
    Mistake("A token exits too early: `first` layers run in any case.", always=True),
    Mistake(
        "You ask too late: the first question comes after `first` layers, not after one more.",
        late=1,
    ),
    Mistake(
        "The confidence gets the two states in the wrong order: confidence(h, previous), the state "
        "now comes first.",
        order="swapped",
    ),
    Mistake(
        "`previous` is always the state before the first layer; it must be the state before the "
        "layer that ran last.",
        order="stale",
    ),
    Mistake(
        "The KV cache has a hole: a token that exits must still append a key and a value to the "
        "cache of each skipped layer.",
        fill="none",
    ),
    Mistake(
        "One layer is left out of the backfill: the first layer that has not run needs a key and a "
        "value too.",
        fill_from=1,
    ),
    Mistake(
        "The layer that ran last gets a second key and value for this token: backfill only the "
        "layers that have not run.",
        fill_from=-1,
    ),
    Mistake(
        "A token that has exited still runs the other layers, so nothing is saved: call only their "
        "norm and keys_and_values.",
        fill="run",
    ),
    Mistake(
        "Skipped layers make keys and values from the raw state h; they read it through their own "
        "norm.",
        fill="raw",
    ),
    Mistake(
        "Skipped layers get the key and value that the last layer made. Each has a norm and "
        "matrices of its own: make its key and value with those.",
        fill="copy",
    ),
    Mistake(
        "You fill skipped layers with zeros. A key of zeros is no gap: its score is 0, and exp(0) "
        "takes attention away from the other keys.",
        fill="zeros",
    ),
    Mistake(
        "The depth is the number of layers that have run, not the index of the last one.",
        count="index",
    ),
)


def erratic(h, previous):
    """A confidence in [0, 1) that depends on both states and changes from layer to layer."""
    return (41 * h.sum() + 97 * previous[0]) % 1


def constant(h, previous):
    return 0.5


def cases(rng):
    """Texts whose tokens exit at every depth, at the earliest possible one, and never."""
    for T, D, L, confidence, threshold, first in (
        (2, 3, 3, constant, 0.5, 2),  # equal to the threshold: exits
        (3, 2, 4, erratic, 0.6, 1),
        (4, 3, 4, erratic, 0.5, 2),
        (1, 4, 2, constant, 0.75, 1),  # never
    ):
        blocks = [
            Block(rng.uniform(0.5, 2, D), *rng.standard_normal((2, D, D)) / 2) for _ in range(L)
        ]
        yield rng.standard_normal((T, D)), blocks, confidence, threshold, first


def observe(answer, x, blocks, confidence, threshold, first):
    """The state and depth of each token of a text, and what the caches hold after it."""
    caches = [Cache() for _ in blocks]
    ends = [
        unpack(answer.run(h, blocks, caches, confidence, threshold, first), "run", "h", "depth")
        for h in x
    ]
    kept = [(np.array(cache.keys), np.array(cache.values)) for cache in caches]
    return {"tokens": ends, "caches": kept}


# In the model ------------------------------------------------------------------------------------

THRESHOLD = 0.98


@part
class StudentStack(Part):
    """The layers of the model, which each token leaves where the student's function says so."""

    inner: Part  # Stack
    run: object
    first: int
    threshold: float

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    def __call__(self, x, state: State):
        """x (T, D) -> (T, D), one token after another."""
        return np.concatenate([self.one_token(x[t : t + 1], t, state) for t in range(len(x))])

    def one_token(self, h, t: int, state: State):
        position = state.position + t
        for layer in state.layers:
            layer.tokens = Tokens(slice(position, position + 1))
        blocks = [RealBlock(block) for block in self.blocks]
        caches = [RealCache(block, layer) for block, layer in zip(blocks, state.layers)]
        return self.run(h[0], blocks, caches, saturation, self.threshold, self.first)[0][None]


class RealBlock:
    """A block of the model, called like the toy."""

    def __init__(self, block: Part):
        self.block = block

    def norm(self, h):
        return self.block.attn.norm(h[None])

    def keys_and_values(self, n):
        return self.block.attn.qkv.kv(n)

    def __call__(self, h, cache):
        return self.block(h[None], cache.layer)[0]


class RealCache:
    """The KV cache of a block, called like the toy. Keys are rotated when they are stored."""

    def __init__(self, block: RealBlock, layer: Layer):
        self.attn, self.layer = block.block.attn, layer

    def append(self, k, v):
        self.attn.store(k, v, self.layer)


def saturation(h, previous) -> float:
    """The cosine between the states after and before a layer."""
    return float(cosine(h[None], previous[None])[0])


def into_model(lm, answer):
    first = len(blocks_of(lm)) // 2

    def change(model: Transformer) -> Transformer:
        return replace(model, stack=StudentStack(model.stack, answer.run, first, THRESHOLD))

    return swap(lm, Transformer, change)


EXERCISE = Exercise(
    title="Early exit",
    minutes=35,
    difficulty="hard",
    names=("run",),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed=flawed,
    mistakes=MISTAKES,
    hints=(
        "Write the loop without exits first; keep the old state as `previous` before you replace "
        "h. Where in the loop do you know that `depth` layers have run?",
        "At the top of the loop over range(L), `depth` layers have run and the layer number "
        "`depth` has not. If the token exits there, loop over blocks[depth:] and caches[depth:], "
        "append block.keys_and_values(block.norm(h)), and return h and depth.",
    ),
    library="minitx/skip/early_exit/kv_fill.py: CopyExitState",
    into_model=into_model,
    same_as={"early_exit": {"measure": "saturation", "threshold": THRESHOLD}},
    saves=(
        "Here a token may exit after 4 of 8 layers, once the cosine of two successive states "
        "reaches 0.98. Skipped layers still make keys and values, so they are cheap, not free."
    ),
)
