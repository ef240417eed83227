"""How training starts a skipless model: blocks that pass on their input nearly unchanged.

Without residual adds, a block of random weights loses its input on the way forward and the gradient
on the way back. After He et al. (2023, arXiv 2302.10322), but by the weights alone:

    embeddings of deviation 1,  W_k = W_q orthogonal     a token attends mostly to itself: its own
                                                         score |q|^2 / sqrt(d) is about sqrt(d),
                                                         the others' are about 1 or less
    W_o = W_v^T orthogonal                               W_v W_o = I: attention returns its input
    W_up = [R, -R],  W_down = [R, -R]^T,  R R^T = I      the FFN is the identity, because
                                                         act(z) - act(-z) = z for every activation
                                                         here ("looks linear": Balduzzi et al.,
                                                         2017, arXiv 1702.08591)

That is enough for a few blocks. A gated FFN has no such start and gets normal weights. Where query
heads share W_v, which is then narrower, W_v W_o is not the identity.
"""

import numpy as np

from minitx.build import Get, normal_init, random_model
from minitx.config import Config
from minitx.model import Transformer


def initial_model(config: Config, seed: int = 0, dtype=np.float32) -> Transformer:
    """The model that training starts from: near the identity if it is skipless, else normal."""
    return random_model(config, seed, dtype, near_identity if config.skipless else normal_init)


def near_identity(config: Config, rng: np.random.Generator, dtype) -> Get:
    """Weights by path and shape, for ``build``. Those that follow from others (W_k, W_o, W_down)
    are asked for after them."""
    drawn: dict[str, np.ndarray] = {}  # by path

    def get(path: str, shape: tuple) -> np.ndarray:
        if path.endswith(".b"):
            return np.zeros(shape, dtype)
        block = path.rpartition("attn." if "attn." in path else "ffn.")[0]  # "stack.blocks.0."
        gated = config.family == "llama"
        if path.startswith("embed"):
            w = rng.standard_normal(shape)
        elif path.endswith("qkv.k.w"):  # that of the first query head of each group
            w = by_group(drawn[f"{block}attn.qkv.q.w"], config)[:, :, 0].reshape(shape)
        elif path.endswith("attn.out.w"):
            w = np.repeat(by_group(drawn[f"{block}attn.qkv.v.w"], config), config.group, axis=2)
            w = w.reshape(shape[::-1]).T / config.group
        elif path.endswith("up.w") and not gated:
            half = orthogonal(rng, (shape[0], (shape[1] + 1) // 2))
            w = np.concatenate([half, -half], axis=1)[:, : shape[1]]
        elif path.endswith("down.w") and not gated:
            w = drawn[f"{block}ffn.expand.up.w"].T
        elif ".qkv." in path:
            w = orthogonal(rng, shape)
        else:
            w = rng.standard_normal(shape) * shape[0] ** -0.5
        drawn[path] = w
        return np.ascontiguousarray(w, dtype)

    return get


def by_group(w, c: Config):
    """The columns of W_q, W_k or W_v by key head, query head within its group, and head column:
    (D, K, G or 1, d)."""
    return w.reshape(len(w), c.kv_heads, -1, c.head_width)


def orthogonal(rng: np.random.Generator, shape: tuple) -> np.ndarray:
    """A random matrix with orthonormal columns, or orthonormal rows if it is wider than tall."""
    tall = shape if shape[0] >= shape[1] else shape[::-1]
    q = np.linalg.qr(rng.standard_normal(tall))[0]
    return q if tall == shape else q.T
