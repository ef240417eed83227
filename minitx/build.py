"""Build the tree of parts from a configuration and its weights.

The three model families differ only in which parts are selected here.
"""

from collections.abc import Callable
from functools import partial

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
from minitx.values import need_float_dtype, need_seed

Get = Callable[[str, tuple], np.ndarray]  # get(path in the tree, shape) -> that weight
Init = Callable[[Config, np.random.Generator, type], Get]  # draws all weights of a model


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
        return np.broadcast_to(np.float32(0), shape)  # an array in shape only: takes no memory

    build(config, note)
    return found


def normal_init(config: Config, rng: np.random.Generator, dtype) -> Get:
    """Weights scaled as for training from scratch: matrices are normal with standard deviation
    1/sqrt(in); those that write to the residual stream are scaled by 1/sqrt(2L) (GPT-2), so that it
    does not grow with depth; gains 1, biases 0."""

    def get(path: str, shape: tuple) -> np.ndarray:
        if path.endswith("gain"):
            return np.ones(shape, dtype)
        if path.endswith((".b", "bias")):
            return np.zeros(shape, dtype)
        scale = shape[1 if path.startswith("embed") else 0] ** -0.5
        if path.endswith((".attn.out.w", ".ffn.down.w")):
            scale /= (2 * config.layers) ** 0.5
        return (rng.standard_normal(shape) * scale).astype(dtype)

    return get


def random_model(
    config: Config, seed: int = 0, dtype=np.float32, init: Init = normal_init
) -> Transformer:
    """A model with seeded random weights. Training starts skipless models from another ``init``:
    see training/skipless_init.py."""
    rng = np.random.default_rng(need_seed(seed))
    return build(config, init(config, rng, need_float_dtype(dtype).type))


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
    return Rope(*ops.rope_tables(c.rope_width, c.context, c.rope_base, dtype, _rope_scaling(c)))


def _rope_scaling(c: Config) -> Callable | None:
    """What is done to the rotary frequencies, if anything."""
    if c.rope_trained_context:
        turns = dict(low=c.rope_low_turns, high=c.rope_high_turns, context=c.rope_trained_context)
        return partial(ops.llama3_rope_scaling, factor=c.rope_factor, **turns)
    if c.rope_factor != 1:
        return partial(ops.linear_rope_scaling, factor=c.rope_factor)
    return None


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
