"""Exercise 13: FFN skipping (25 minutes)

In the middle layers, many feed-forward networks (FFNs) hardly change the direction of a token's
hidden state. If one does not, the next ones probably will not either. So measure the angle, and
after a small one skip the next k FFNs. Attention always runs: so unlike with early exit, every
layer has a key and a value of every token, and the KV cache has no hole.

Write ``skip_ffns``, which takes one token through all L layers. In each layer,

    a = h + block.attention(h)     always
    y = a + block.ffn(a)           if the FFN runs
    y = a                          if it is skipped

and y is the h of the next layer. Which FFNs are skipped:

- Layers are numbered from 0. Outside cold_start <= layer < cold_end, the FFN runs, and nothing is
  measured.
- Inside, an FFN is skipped if FFNs are left to skip. At first there are none.
- Inside, after an FFN that has run, measure cos(a, y): the cosine of the angle between the states
  before and after this FFN. If it is at least the threshold, the next k FFNs are to be skipped.
- When these k have been skipped, the next FFN runs and is measured again.

The cosine of two vectors is a . y / (|a| |y|). Return the last state, and for each layer whether
its FFN was skipped.

    h           (D,)   the token's state before the first layer
    blocks             L layers (the class Block below)
    threshold          a number, such as 0.9
    k                  how many FFNs are skipped after a cosine of at least the threshold, from 1 on
    cold_start         layers before this one are cold: their FFNs always run
    cold_end           this layer and the later ones are cold, too
    result             (h (D,), a list of L booleans)

Four layers to check by hand, with no cold layers, a threshold of 0.9 and k = 1. Attention adds
nothing, and each FFN adds (0, 1). Layer 0 turns (4, 0) into (4, 1). The cosine is 16 / (4 * 4.123)
= 0.970, so the FFN of layer 1 is skipped. Layer 2 turns (4, 1) into (4, 2): the cosine is
18 / (4.123 * 4.472) = 0.976, so the FFN of layer 3 is skipped.

    >>> block = Block(np.zeros((2, 2)), np.zeros((2, 2)), np.array([0.0, 1.0]))
    >>> h, skipped = skip_ffns(np.array([4.0, 0.0]), [block] * 4, 0.9, 1, 0, 4)
    >>> h.tolist(), skipped
    ([4.0, 2.0], [False, True, False, True])

Source: Jaiswal et al., "FFN-SkipLLM", EMNLP 2024.
"""

from dataclasses import replace

import numpy as np

from minitx import ledger
from minitx.learn.exercise import Exercise, Mistake
from minitx.model import Transformer
from minitx.state import Layer, State, Tokens
from minitx.technique import swap
from minitx.tree import Part, part


# given
class Block:
    """A toy layer for one token. Both methods return what is to be added to the state."""

    def __init__(self, w_attention, w_ffn, b_ffn):
        self.w_attention, self.w_ffn, self.b_ffn = w_attention, w_ffn, b_ffn

    def attention(self, h):
        return h @ self.w_attention  # (D,)

    def ffn(self, a):
        return np.tanh(a @ self.w_ffn) + self.b_ffn  # (D,)


# end of given


# solution
def skip_ffns(h, blocks, threshold, k, cold_start, cold_end):
    """Take one token h (D,) through the layers -> (h (D,), for each layer: was its FFN skipped)"""
    left, skipped = 0, []  # left: how many FFNs are still to be skipped
    for layer, block in enumerate(blocks):
        a = h + block.attention(h)
        inside = cold_start <= layer < cold_end
        skipped.append(inside and left > 0)
        if skipped[-1]:
            left -= 1
            h = a
            continue
        h = a + block.ffn(a)
        cosine = a @ h / (np.linalg.norm(a) * np.linalg.norm(h))
        if inside and cosine >= threshold:
            left = k
    return h, skipped


# end of solution


def in_loops(h, blocks, threshold, k, cold_start, cold_end):
    """The rules, one after another, number by number."""
    run_skip, skipped = 0, []
    for layer in range(len(blocks)):
        attended = blocks[layer].attention(h)
        a = np.array([h[c] + attended[c] for c in range(len(h))])
        if layer < cold_start or layer >= cold_end:
            h = a + blocks[layer].ffn(a)
            skipped.append(False)
        elif run_skip > 0:
            run_skip = run_skip - 1
            h = a
            skipped.append(True)
        else:
            y = a + blocks[layer].ffn(a)
            ay = sum(a[c] * y[c] for c in range(len(h)))
            aa = sum(a[c] ** 2 for c in range(len(h)))
            yy = sum(y[c] ** 2 for c in range(len(h)))
            if ay / (aa**0.5 * yy**0.5) >= threshold:
                run_skip = k
            h = y
            skipped.append(False)
    return h, skipped


def flawed(
    h,
    blocks,
    threshold,
    k,
    cold_start,
    cold_end,
    *,
    pair="ay",
    lengths=True,
    similar=True,
    attend=True,
    count=0,
    forever=False,
    drop=False,
    cold=True,
    measure="inside",
    end=0,
):
    left, skipped = 0, []
    cold_end += end
    for layer, block in enumerate(blocks):
        inside = cold_start <= layer < cold_end
        skip = (inside or not cold) and left > 0
        skipped.append(skip)
        a = h + block.attention(h) if attend or not skip else h
        if skip:
            left -= not forever
            h = a
            continue
        f = block.ffn(a)
        u, w = {"ay": (a, a + f), "af": (a, f), "hy": (h, a + f), "ha": (h, a)}[pair]
        cosine = u @ w / (np.linalg.norm(u) * np.linalg.norm(w) if lengths else 1)
        counts = inside or measure == "everywhere" or not cold
        high = counts and (cosine >= threshold if similar else cosine < threshold)
        left = k + count if high else left
        h = a if high and drop else a + f
    return h, skipped


MISTAKES = (
    Mistake(
        "You measure between a and FFN(a), which are nearly at right angles in any model; measure "
        "between the states a and y = a + FFN(a).",
        pair="af",
    ),
    Mistake(
        "You measure between the layer's input h and y, so the turn by attention counts too; "
        "measure between a and y.",
        pair="hy",
    ),
    Mistake(
        "You measure what attention does, between h and a; measure what the FFN does, between a "
        "and y.",
        pair="ha",
    ),
    Mistake("The dot product is not divided by both lengths: a . y / (|a| |y|).", lengths=False),
    Mistake(
        "FFNs are skipped after one that turned the state a lot; skip after a cosine of at least "
        "the threshold.",
        similar=False,
    ),
    Mistake("Attention is skipped as well; it runs in every layer.", attend=False),
    Mistake("You skip one FFN too many; skip k of them.", count=1),
    Mistake("You skip one FFN too few; skip k of them.", count=-1),
    Mistake(
        "Once FFNs are skipped, you skip all that follow: after k of them the next one runs and is "
        "measured again.",
        forever=True,
    ),
    Mistake(
        "You throw away the FFN that was measured. It has been computed, so add it; the next k are "
        "skipped.",
        drop=True,
    ),
    Mistake(
        "Cold layers are ignored: before cold_start and from cold_end on, every FFN runs.",
        cold=False,
    ),
    Mistake(
        "You measure in cold layers too; only layers from cold_start to cold_end - 1 may decide "
        "that FFNs are skipped.",
        measure="everywhere",
    ),
    Mistake("Layer cold_end is cold already: its FFN always runs.", end=1),
)


def cases(rng):
    """Cosines on both sides of the threshold, with cold layers and without; states so short that
    their dot products stay below it."""
    for D, L, threshold, k, cold_start, cold_end in (
        (3, 6, 0.8, 2, 1, 5),
        (4, 8, 0.8, 1, 0, 8),
        (4, 9, 0.3, 3, 2, 8),
        (3, 9, 0.9, 1, 1, 8),
        (2, 8, 0.6, 2, 2, 7),
    ):
        blocks = [
            Block(
                rng.standard_normal((D, D)) / 2,
                rng.standard_normal((D, D)) / 2,
                rng.uniform(-1, 1, D),
            )
            for _ in range(L)
        ]
        yield 2 * rng.standard_normal(D), blocks, threshold, k, cold_start, cold_end
    small = [Block(np.eye(3) / 9, np.zeros((3, 3)), rng.uniform(0.01, 0.02, 3)) for _ in range(6)]
    yield rng.uniform(0.1, 0.3, 3), small, 0.9, 1, 1, 5


# In the model ------------------------------------------------------------------------------------

SETTING = dict(threshold=0.9, skip=2, cold_start=3, cold_end=8)


@part
class StudentStack(Part):
    """The layers of the model, of which the student's function skips some FFNs."""

    inner: Part  # Stack
    skip_ffns: object
    threshold: float
    skip: int
    cold_start: int
    cold_end: int

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    def __call__(self, x, state: State):
        """x (T, D) -> (T, D), one token after another."""
        return np.array([self.one_token(h, state.position + t, state) for t, h in enumerate(x)])

    def one_token(self, h, position: int, state: State):
        for layer in state.layers:
            layer.tokens = Tokens(slice(position, position + 1))
        inside = range(self.cold_start, self.cold_end)
        blocks = [
            RealBlock(block, state.layers[i], i in inside) for i, block in enumerate(self.blocks)
        ]
        setting = self.threshold, self.skip, self.cold_start, self.cold_end
        return self.skip_ffns(h, blocks, *setting)[0].astype(h.dtype)


class RealBlock:
    """A block of the model, called like the toy."""

    def __init__(self, block: Part, layer: Layer, measured: bool):
        self.block, self.layer, self.measured = block, layer, measured

    def attention(self, h):
        return self.block.attn(h[None], self.layer)[0]

    def ffn(self, a):
        if self.measured:
            ledger.count(3 * a.size)  # the cosine: three dot products
        return self.block.ffn(a[None], self.layer)[0]


def into_model(lm, answer):
    def change(model: Transformer) -> Transformer:
        return replace(model, stack=StudentStack(model.stack, answer.skip_ffns, **SETTING))

    return swap(lm, Transformer, change)


EXERCISE = Exercise(
    title="FFN skipping",
    minutes=25,
    difficulty="medium",
    names=("skip_ffns",),
    cases=lambda rng: list(cases(rng)),
    flawed=flawed,
    mistakes=MISTAKES,
    hints=(
        "Keep a counter of the FFNs that are still to be skipped. In which order do you look at "
        "it, count it down, and set it?",
        "In each layer: compute a. If the layer is inside and the counter is above 0, count down "
        "and take a. Otherwise take y = a + block.ffn(a), and if the layer is inside and cos(a, y) "
        "reaches the threshold, set the counter to k.",
    ),
    library="minitx/skip/ffn_skip/__init__.py: SkippableFFN",
    into_model=into_model,
    same_as={"ffn_skip": {**SETTING, "warm_up": 0}},
    saves=(
        "Here layers 3 to 7 may skip FFNs, two after each cosine of at least 0.9. FFNs are most of "
        "a layer's multiply-adds, and skipped ones leave no hole in the KV cache."
    ),
)
