"""The detector of a block: a low-rank estimate of all its scores, from the block's input.

    y  = x p                           (T, rank)   p (D, rank): a random projection, never trained
    q~ = y w_q  and  k~ = y w_k        (H, T, rank) and (K, T, rank), rotated if the model is rotary
    q~_i . k~_j  estimates  q_i . k_j / sqrt(d)

x is the input of the model's own q and k matrices (the norm's output): T tokens of width D. A
head's matrix in w_q (H query heads) or w_k (K key heads) is rank x rank; d is the head width.

First the arrays as they are trained (``Detector``), then as they run, in few bits
(``QuantizedDetector``). The end of the file is only for training and fitting: it records what a
block's attention computes.
"""

from dataclasses import replace

import numpy as np

from minitx import fast, ledger, ops
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Attention, NoRope, Rope, Transformer, split_heads
from minitx.shared.coarse import coarse_scales
from minitx.shared.symmetric import quantize_symmetric
from minitx.state import Tokens
from minitx.technique import need, wrap
from minitx.tree import Part, part, table


@part
class Detector(Part):
    """One block's detector, in floats. The columns of w_q and w_k are grouped by head, as those of
    the model's own matrices are."""

    p: np.ndarray = table()  # (D, rank), drawn once and never trained
    w_q: np.ndarray  # (rank, H*rank)
    w_k: np.ndarray  # (rank, K*rank)

    @property
    def rank(self) -> int:
        return self.p.shape[1]

    def __call__(self, x, rope: Part, tokens: Tokens):
        """q~ (..., H, T, rank) and k~ (..., K, T, rank) for x (..., T, D)."""
        y = ops.linear(x, self.p)  # (..., T, rank)
        q, k = (
            split_heads(ops.linear(y, w), w.shape[1] // self.rank) for w in (self.w_q, self.w_k)
        )
        return rope(q, tokens), rope(k, tokens)


def projection(width: int, rank: int, rng) -> np.ndarray:
    """p (D, rank): sqrt(3 / rank) times -1, 0 or +1 with the probabilities 1/6, 2/3, 1/6
    (Achlioptas, 2003). It keeps lengths on average: E |x p|^2 = |x|^2."""
    signs = rng.choice(3, size=(width, rank), p=(1 / 6, 2 / 3, 1 / 6)) - 1
    return (signs * (3 / rank) ** 0.5).astype(np.float32)


def shapes(config: Config, rank: int) -> dict[str, tuple]:
    """The shapes of one block's arrays, by name."""
    return {
        "p": (config.width, rank),
        "w_q": (rank, config.heads * rank),
        "w_k": (rank, config.kv_heads * rank),
    }


def narrow_rope(rope: Part, rank: int, head_width: int) -> Part:
    """The rotation of a detector's ``rank`` columns, with angles taken from the model's RoPE.

    The same share of columns is rotated as in the model. Ours: the paper's models have no rotation;
    we take the model's lowest frequencies, so that the estimate for a distant key depends little on
    its distance. Of several choices this one predicted the scores of ``stories`` best.
    """
    need(rope, Rope, NoRope)
    if type(rope) is NoRope:
        return rope
    rotated = rope.cos.shape[1]
    pairs = rotated // 2  # column i is rotated with column i + pairs; larger i, lower frequency
    lowest = np.arange(pairs - max(1, round(rank * rotated / head_width / 2)), pairs)
    columns = np.concatenate([lowest, lowest + pairs])
    return Rope(rope.cos[:, columns], rope.sin[:, columns])


def check_rank(rank: int, config: Config, what: str) -> None:
    """Refuse a rank that RoPE cannot rotate, or with which an estimate costs more than a score."""
    low, even = (2, "an even integer") if config.rope_width else (1, "an integer")
    if not low <= rank <= config.head_width or rank % low:
        raise MinitxError(
            f"{what} must be {even}, {low} to the head width {config.head_width}; got {rank}."
        )


# In few bits -------------------------------------------------------------------------------------


@part
class QuantizedDetector(Part):
    """A detector whose y, w_q, w_k, q~ and k~ are integers of ``bits`` bits, or floats if None.

    Every row of y, q~ and k~ has its own scale, and so does each head's matrix. One scale for all
    keys would change as keys arrive, and with it what was selected before.
    """

    p: np.ndarray = table()  # (D, rank)
    w_q: np.ndarray  # (rank, H*rank) integers, to be multiplied by s_q
    w_k: np.ndarray  # (rank, K*rank) integers, to be multiplied by s_k
    s_q: np.ndarray  # (H, 1, 1)
    s_k: np.ndarray  # (K, 1, 1)
    rope: Part
    bits: int | None

    @staticmethod
    def of(detector: Detector, attn: Attention, head_width: int, bits: int | None):
        w_q, s_q = quantize_heads(detector.w_q, detector.rank, bits)
        w_k, s_k = quantize_heads(detector.w_k, detector.rank, bits)
        rope = narrow_rope(attn.rope, detector.rank, head_width)
        return QuantizedDetector(detector.p, w_q, w_k, s_q, s_k, rope, bits)

    def __call__(self, x, tokens: Tokens):
        """Of x (..., T, D): q~ (..., H, T, rank), and k~ (..., K, T, rank) with its scales
        (..., K, T). Scales of queries are dropped: they do not change the order of a query's
        keys."""
        y = self.project(x)
        queries, _ = self.heads(y, self.w_q, self.s_q, tokens)
        return queries, self.heads(y, self.w_k, self.s_k, tokens)

    def q(self, x, tokens: Tokens):
        """q~ alone."""
        return self.heads(self.project(x), self.w_q, self.s_q, tokens)[0]

    def kv(self, x, tokens: Tokens):
        """k~ and its scales alone."""
        return self.heads(self.project(x), self.w_k, self.s_k, tokens)

    def project(self, x):
        y, scales = quantize(ops.linear(x, self.p), self.bits)  # (..., T, rank), (..., T)
        return y, coarse_scales(scales)

    def heads(self, y, w, s, tokens: Tokens):
        """q~ or k~ (..., heads, T, rank), and scales (..., heads, T).

        Scales are multiplied last. The product y w is an exact sum of integers and the rotation
        works on each token by itself, so a prompt and a single token round alike."""
        y, y_scale = y
        ledger.product(y, w, self.bits)
        z = self.rope(split_heads(fast.matmul(y, w), len(s)), tokens)
        z, z_scale = quantize(z, self.bits)
        return z, z_scale * y_scale[..., None, :] * s[..., 0]


def quantize(x, bits: int | None):
    """``quantize_symmetric``; with bits=None x itself and scales of 1."""
    return (x, np.ones_like(x[..., 0])) if bits is None else quantize_symmetric(x, bits)


def quantize_heads(w, rank: int, bits: int | None):
    """w (rank, heads*rank) as integers, and a scale for each head's matrix, (heads, 1, 1)."""
    heads = w.shape[1] // rank
    by_head = w.reshape(rank, heads, rank).swapaxes(0, 1)  # (heads, rank, rank)
    integers, scale = quantize(by_head.reshape(heads, -1), bits)
    integers = integers.reshape(by_head.shape).swapaxes(0, 1)
    return np.ascontiguousarray(integers.reshape(w.shape)), scale[:, None, None]


# What a detector is trained on -------------------------------------------------------------------


def record_attention(model: Transformer) -> tuple[Transformer, list["Recording"]]:
    """A copy of the model that records, block by block, what detectors are trained on."""
    found: list[Recording] = []

    def change(attn, index):
        need(attn, Attention)
        found.append(Recording(attn))
        return found[-1].recorded()

    return wrap(model, "attn", change), found


class Recording:
    """The input of a block's q and k matrices, and its queries and keys, in the last pass."""

    def __init__(self, attn: Attention):
        self.attn = attn
        self.norms: list = []
        self.attends: list = []

    def recorded(self) -> Part:
        attn, attend = self.attn, Recorder(self.attn.attend, self.attends)
        return replace(attn, norm=Recorder(attn.norm, self.norms), attend=attend)

    def last(self):
        """Returns x (..., T, D), q (..., H, T, d) and k (..., K, T, d), with q and k rotated, and
        forgets them."""
        (_, x), (q, k, *_) = self.norms.pop(), self.attends.pop()
        self.norms.clear()
        self.attends.clear()
        return x, q, k


@part
class Recorder(Part):
    """Appends a part's inputs and output to a list, call by call."""

    inner: Part
    calls: list

    def __call__(self, *inputs):
        output = self.inner(*inputs)
        self.calls.append((*inputs, output))
        return output
