"""Putting a transformer together: from a configuration and its weights, to the tree of parts.

The three families differ only in which small parts are chosen here.
"""

from collections.abc import Callable

import numpy as np

from minitx import ops
from minitx.config import Config
from minitx.model import (
    FFN,
    QKV,
    Activated,
    Attend,
    Attention,
    Block,
    Cache,
    Head,
    LayerNorm,
    Linear,
    NoNorm,
    NoRope,
    ParallelBlock,
    PositionEmbedding,
    RMSNorm,
    Rope,
    SkiplessBlock,
    SkiplessParallelBlock,
    Stack,
    SwiGLU,
    TiedHead,
    TokenEmbedding,
    Transformer,
)
from minitx.tree import Part

Get = Callable[[str, tuple], np.ndarray]  # get(path in the tree, shape) -> that weight


def build(config: Config, get: Get) -> Transformer:
    """The model of ``config`` with every weight fetched once by ``get(path, shape)``.

    Paths are those of ``tree.weights``: ``stack.blocks.0.attn.qkv.q.w``; shapes are (in, out).
    """
    embed, tokens = _embedding(config, get)
    rope = _rope(config, tokens.dtype)
    blocks = tuple(_block(config, rope, f"stack.blocks.{i}.", get) for i in range(config.layers))
    norm = _norm(config, "norm.", get)
    if config.tied:
        head = TiedHead(tokens)
    else:
        head = Head(get("head.w", (config.width, config.vocab_size)))
    return Transformer(embed, Stack(blocks), norm, head, config)


def shapes(config: Config) -> dict[str, tuple]:
    """The path and shape of every weight that ``build`` asks for, in its order."""
    found: dict[str, tuple] = {}

    def note(path, shape):
        found[path] = shape
        return np.broadcast_to(np.float32(0), shape)  # looks like an array, takes no memory

    build(config, note)
    return found


def random_model(config: Config, seed: int = 0, dtype=np.float32) -> Transformer:
    """A model with seeded random weights, scaled as for training from scratch.

    Matrices are normal with deviation 1/sqrt(in), those that write to the residual stream smaller
    by 1/sqrt(2L) (GPT-2) so that the stream does not grow with depth; gains 1, biases 0. A skipless
    model begins near the identity instead: see ``near_identity``.
    """
    rng = np.random.default_rng(seed)
    if config.skipless:
        return build(config, near_identity(config, rng, dtype))

    def draw(path: str, shape: tuple):
        if path.endswith("gain"):
            return np.ones(shape, dtype)
        if path.endswith((".b", "bias")):
            return np.zeros(shape, dtype)
        scale = shape[1 if path.startswith("embed") else 0] ** -0.5
        if path.endswith((".attn.out.w", ".ffn.down.w")):
            scale /= (2 * config.layers) ** 0.5
        return (rng.standard_normal(shape) * scale).astype(dtype)

    return build(config, draw)


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


def _embedding(c: Config, get: Get) -> tuple[Part, np.ndarray]:
    """The embedding part, and its token table (which a tied head shares)."""
    if c.rope_width:
        tokens = get("embed.w", (c.vocab_size, c.width))
        return TokenEmbedding(tokens), tokens
    tokens = get("embed.tokens.w", (c.vocab_size, c.width))
    return PositionEmbedding(TokenEmbedding(tokens), get("embed.w", (c.context, c.width))), tokens


def _rope(c: Config, dtype) -> Part:
    if not c.rope_width:
        return NoRope()
    return Rope(*ops.rope_tables(c.rope_width, c.context, c.rope_base, dtype))


def _norm(c: Config, path: str, get: Get) -> Part:
    if c.skipless:
        return NoNorm()
    if c.family == "llama":
        return RMSNorm(get(f"{path}gain", (c.width,)), c.norm_eps)
    return LayerNorm(get(f"{path}gain", (c.width,)), get(f"{path}bias", (c.width,)), c.norm_eps)


def _block(c: Config, rope: Part, path: str, get: Get) -> Part:
    if c.skipless:
        kind = SkiplessParallelBlock if c.parallel else SkiplessBlock
    else:
        kind = ParallelBlock if c.parallel else Block
    return kind(_attention(c, rope, f"{path}attn.", get), _ffn(c, f"{path}ffn.", get))


def _attention(c: Config, rope: Part, path: str, get: Get) -> Part:
    norm = _norm(c, f"{path}norm.", get)
    inner, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    qkv = QKV(
        _linear(f"{path}qkv.q.", c.width, inner, c.qkv_bias, get),
        _linear(f"{path}qkv.k.", c.width, kv, c.qkv_bias, get),
        _linear(f"{path}qkv.v.", c.width, kv, c.qkv_bias, get),
    )
    out = _linear(f"{path}out.", inner, c.width, c.out_bias, get)
    attend = Attend(c.head_width**-0.5)
    return Attention(norm, qkv, rope, Cache(), attend, out, c.heads, c.kv_heads)


def _ffn(c: Config, path: str, get: Get) -> Part:
    norm = _norm(c, f"{path}norm.", get)
    up = _linear(f"{path}expand.up.", c.width, c.hidden, c.ffn_bias, get)
    down = _linear(f"{path}down.", c.hidden, c.width, c.ffn_bias, get)
    if c.family == "llama":
        gate = _linear(f"{path}expand.gate.", c.width, c.hidden, c.ffn_bias, get)
        return FFN(norm, SwiGLU(gate, up), down)
    return FFN(norm, Activated(up, ops.ACTIVATIONS[c.activation]), down)


def _linear(path: str, inputs: int, outputs: int, bias: bool, get: Get) -> Linear:
    return Linear(get(f"{path}w", (inputs, outputs)), get(f"{path}b", (outputs,)) if bias else None)
