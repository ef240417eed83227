"""Models without skips: no block adds to a stream, and nothing is normalised.

He et al. (2023, arXiv 2302.10322) train such models. Here they are for what can be done to them
before the first token, and to no others: see precompute/remove_weights.py. Their parts take the
places of those in model.py; config.skipless says that a model has them.
"""

from collections.abc import Callable

import numpy as np

from minitx.config import Config
from minitx.state import Layer
from minitx.tree import Part, part

Get = Callable[[str, tuple], np.ndarray]  # get(path in the tree, shape) -> that weight


@part
class SkiplessBlock(Part):
    """Attention, then the feed-forward network, and nothing is added: each reads what the one
    before has made (He et al., 2023, arXiv 2302.10322, train such models)."""

    attn: Part
    ffn: Part

    def __call__(self, x, layer: Layer):
        return self.ffn(self.attn(x, layer), layer)

    def backfill(self, x, layer: Layer):
        """Only store the keys and values of tokens x: see ``Attention.backfill``."""
        self.attn.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """The block for tokens x whose keys and values are stored already."""
        return self.ffn(self.attn.attend_from(x, layer), layer)


@part
class SkiplessParallelBlock(Part):
    """Attention and feed-forward network read the same x, and their sum takes its place."""

    attn: Part
    ffn: Part

    def __call__(self, x, layer: Layer):
        return self.attn(x, layer) + self.ffn(x, layer)

    def backfill(self, x, layer: Layer):
        """Only store the keys and values of tokens x: see ``Attention.backfill``."""
        self.attn.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """The block for tokens x whose keys and values are stored already."""
        return self.attn.attend_from(x, layer) + self.ffn(x, layer)


@part
class NoNorm(Part):
    """Nothing is normalised (skipless models)."""

    def __call__(self, x):
        return x


# How training begins ------------------------------------------------------------------------------


def near_identity(config: Config, rng: np.random.Generator, dtype) -> Get:
    """What to begin a skipless model with: blocks that pass on what they read, or nearly.

    Without a residual stream a block of random numbers loses what came in, and what comes back when
    training. So, after He et al. (2023, arXiv 2302.10322), but by the weights alone: embeddings of
    deviation 1 and W_k = W_q, orthogonal, let each token look at itself more than at any other
    (|q|^2 / sqrt(d) is about sqrt(d), the scores of others are about 1 or less), which is enough
    for a few blocks; W_o = W_v^T, orthogonal, gives the value back as it was; and an FFN [R, -R],
    [R, -R]^T is the identity, as act(z) - act(-z) = z for all activations here ("looks linear":
    Balduzzi et al., 2017, arXiv 1702.08591). A gated FFN has no such beginning and gets normal
    numbers; and where heads share W_v, which is narrower then, W_v W_o is not the identity.
    """
    made: dict[str, np.ndarray] = {}  # by path, for those that follow from another

    def draw(path: str, shape: tuple) -> np.ndarray:
        before = path.rpartition("attn.")[0] if "attn." in path else path.rpartition("ffn.")[0]
        if path.endswith(".b"):
            return np.zeros(shape, dtype)
        if path.startswith("embed"):
            w = rng.standard_normal(shape)
        elif path.endswith("qkv.k.w"):
            w = by_group(made[f"{before}attn.qkv.q.w"], config)[:, :, 0].reshape(shape)
        elif path.endswith("attn.out.w"):
            w = np.repeat(by_group(made[f"{before}attn.qkv.v.w"], config), config.group, axis=2)
            w = w.reshape(shape[::-1]).T / config.group
        elif path.endswith("up.w") and config.family != "llama":
            half = orthogonal(rng, (shape[0], (shape[1] + 1) // 2))
            w = np.concatenate([half, -half], axis=1)[:, : shape[1]]
        elif path.endswith("down.w") and config.family != "llama":
            w = made[f"{before}ffn.expand.up.w"].T
        elif ".qkv." in path:
            w = orthogonal(rng, shape)
        else:
            w = rng.standard_normal(shape) * shape[0] ** -0.5
        made[path] = w
        return np.ascontiguousarray(w, dtype)

    return draw


def by_group(w, c: Config):
    """The columns of W_q (or of W_k, W_v) by group, head in the group and column of the head."""
    return w.reshape(len(w), c.kv_heads, -1, c.head_width)  # (D, K, G or 1, d)


def orthogonal(rng: np.random.Generator, shape: tuple) -> np.ndarray:
    """A random matrix with orthonormal columns, or rows where these are fewer."""
    tall = shape if shape[0] >= shape[1] else shape[::-1]
    q = np.linalg.qr(rng.standard_normal(tall))[0]
    return q if tall == shape else q.T
