"""Which tensor of a Hugging Face checkpoint holds which of our weights, and in what layout.

Theirs are stored (out, in) and some are fused; ours are (in, out) and apart. One ``Entry`` says for
one foreign tensor which of our weights are in it; its ``Layout`` knows how to take them out and how
to put them back. Our names are the paths of ``build.shapes``: ``stack.blocks.0.ffn.down.w``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from minitx.build import shapes
from minitx.config import Config


@dataclass(frozen=True)
class Layout:
    """How one foreign tensor holds some of our weights (one, or a row of equal heads: q, k, v)."""

    shape: Callable[[list], tuple]  # shapes of our weights -> shape of the foreign tensor
    split: Callable[[np.ndarray, int], list]  # foreign tensor, number of weights -> our weights
    join: Callable[[list], np.ndarray]  # our weights -> foreign tensor


SAME = Layout(lambda s: s[0], lambda a, n: [a], lambda ours: ours[0])

# A bias has one axis, and turning that round changes nothing: so this serves for biases too.
TRANSPOSED = Layout(lambda s: s[0][::-1], lambda a, n: [a.T], lambda ours: ours[0].T)

# GPT-2 stores (in, out), as we do, with q, k and v side by side in the columns.
COLUMNS = Layout(
    lambda s: (*s[0][:-1], sum(each[-1] for each in s)),
    lambda a, n: np.split(a, n, axis=-1),
    lambda ours: np.concatenate(ours, axis=-1),
)


def by_head(heads: int) -> Layout:
    """GPT-NeoX: output rows ordered by head, then by q, k, v: (H * 3 * d, in), or (H * 3 * d,)."""

    def split(a, n):
        a = a.reshape(heads, n, -1, *a.shape[1:])  # (H, 3, d, in)
        return [a[:, i].reshape(-1, *a.shape[3:]).T for i in range(n)]  # each (in, H*d)

    def join(ours):
        rows = [w.T.reshape(heads, -1, *w.T.shape[1:]) for w in ours]  # each (H, d, in)
        return np.stack(rows, axis=1).reshape(-1, *rows[0].shape[2:])  # (H*3*d, in)

    return Layout(lambda s: (sum(each[-1] for each in s), *s[0][:-1]), split, join)


@dataclass(frozen=True)
class Entry:
    """One foreign tensor: its name, our weights in it (path -> shape), and how they lie there."""

    name: str
    ours: dict[str, tuple]
    layout: Layout

    @property
    def shape(self) -> tuple:
        return self.layout.shape(list(self.ours.values()))

    def take(self, foreign: np.ndarray) -> dict[str, np.ndarray]:
        """Our weights, each contiguous, from the foreign tensor."""
        parts = self.layout.split(foreign, len(self.ours))
        return {path: np.ascontiguousarray(w) for path, w in zip(self.ours, parts, strict=True)}

    def put(self, weights: dict[str, np.ndarray]) -> np.ndarray:
        """The foreign tensor, from our weights by path."""
        return self.layout.join([weights[path] for path in self.ours])


@dataclass(frozen=True)
class Naming:
    """The names of one family: foreign name -> the ends of our paths that are in that tensor."""

    prefix: str  # before all names but the head's; some files leave it out
    layer: str  # before the names of block i
    head: str
    outside: dict[str, str]
    inside: dict[str, str]
    buffers: str  # tensors (a pattern) that hold no weights: masks, rotary angles


QKV = "attn.qkv.q attn.qkv.k attn.qkv.v"
NAMINGS = {
    "llama": Naming(
        prefix="model.",
        layer="layers.{}.",
        head="lm_head.weight",
        outside={"embed_tokens": "embed", "norm": "norm"},
        inside={
            "input_layernorm": "attn.norm",
            "self_attn.q_proj": "attn.qkv.q",
            "self_attn.k_proj": "attn.qkv.k",
            "self_attn.v_proj": "attn.qkv.v",
            "self_attn.o_proj": "attn.out",
            "post_attention_layernorm": "ffn.norm",
            "mlp.gate_proj": "ffn.expand.gate",
            "mlp.up_proj": "ffn.expand.up",
            "mlp.down_proj": "ffn.down",
        },
        buffers=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ),
    "gpt2": Naming(
        prefix="transformer.",
        layer="h.{}.",
        head="lm_head.weight",
        outside={"wte": "embed.tokens", "wpe": "embed", "ln_f": "norm"},
        inside={
            "ln_1": "attn.norm",
            "attn.c_attn": QKV,
            "attn.c_proj": "attn.out",
            "ln_2": "ffn.norm",
            "mlp.c_fc": "ffn.expand.up",
            "mlp.c_proj": "ffn.down",
        },
        buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "gpt_neox": Naming(
        prefix="gpt_neox.",
        layer="layers.{}.",
        head="embed_out.weight",
        outside={"embed_in": "embed", "final_layer_norm": "norm"},
        inside={
            "input_layernorm": "attn.norm",
            "attention.query_key_value": QKV,
            "attention.dense": "attn.out",
            "post_attention_layernorm": "ffn.norm",
            "mlp.dense_h_to_4h": "ffn.expand.up",
            "mlp.dense_4h_to_h": "ffn.down",
        },
        buffers=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
}


def entries(config: Config, prefix: str | None = None) -> list[Entry]:
    """Every foreign tensor that a checkpoint of ``config`` must hold, and nothing else.

    ``prefix`` replaces the usual one ("model.", "transformer.", "gpt_neox.").
    """
    naming = NAMINGS[config.family]
    prefix = naming.prefix if prefix is None else prefix
    # Only names and shapes are wanted: without a context there are no rotary tables to compute.
    known = shapes(replace(config, context=1) if config.rope_width else config)
    found = _entries(config, prefix, naming.outside, "", known)
    for i in range(config.layers):
        layer = prefix + naming.layer.format(i)
        found += _entries(config, layer, naming.inside, f"stack.blocks.{i}.", known)
    if not config.tied:
        found.append(Entry(naming.head, {"head.w": known["head.w"]}, TRANSPOSED))
    return found


def is_buffer(config: Config, name: str) -> bool:
    """Is this a tensor that old checkpoints carry and that holds no weights?"""
    naming = NAMINGS[config.family]
    return re.fullmatch(f"({re.escape(naming.prefix)})?({naming.buffers})", name) is not None


def _entries(config: Config, prefix: str, names: dict, path: str, known: dict) -> list[Entry]:
    """The tensors under one prefix, weights and biases; ``known`` has our paths and shapes."""
    found = []
    for name, ends in names.items():
        for foreign, fields in (("weight", ("w", "gain")), ("bias", ("b", "bias"))):
            candidates = [f"{path}{end}.{field}" for end in ends.split() for field in fields]
            ours = {p: known[p] for p in candidates if p in known}
            if ours:
                layout = _layout(config, ends, next(iter(ours)))
                found.append(Entry(f"{prefix}{name}.{foreign}", ours, layout))
    return found


def _layout(config: Config, ends: str, path: str) -> Layout:
    if path.startswith("embed") or path.endswith(("gain", "bias")):
        return SAME
    if ends == QKV:
        return COLUMNS if config.family == "gpt2" else by_head(config.heads)
    return SAME if config.family == "gpt2" else TRANSPOSED
