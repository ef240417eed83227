"""Map the tensors of a Hugging Face checkpoint to the weights of minitx, and back.

Hugging Face stores matrices as (out, in) and fuses some of them; minitx has separate (in, out)
matrices. A ``TensorMap`` lists the minitx weights in one stored tensor; its ``StoredLayout`` splits
the tensor into them and joins them again. minitx names are the paths of ``build.shapes``:
``stack.blocks.0.ffn.down.w``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from minitx.build import shapes
from minitx.config import Config


@dataclass(frozen=True)
class StoredLayout:
    """How one stored tensor holds one weight, or several fused ones (q, k, v)."""

    shape: Callable[[list], tuple]  # shapes of the weights -> shape of the stored tensor
    split: Callable[[np.ndarray, int], list]  # stored tensor, number of weights -> weights
    join: Callable[[list], np.ndarray]  # weights -> stored tensor


UNCHANGED = StoredLayout(lambda s: s[0], lambda a, n: [a], lambda weights: weights[0])

# Transposing a bias, which has one axis, changes nothing, so this layout works for biases too.
TRANSPOSED = StoredLayout(lambda s: s[0][::-1], lambda a, n: [a.T], lambda weights: weights[0].T)

# GPT-2 stores (in, out), as minitx does, with the columns of q, k and v concatenated.
FUSED_COLUMNS = StoredLayout(
    lambda s: (*s[0][:-1], sum(each[-1] for each in s)),
    lambda a, n: np.split(a, n, axis=-1),
    lambda weights: np.concatenate(weights, axis=-1),
)


def fused_by_head(heads: int) -> StoredLayout:
    """GPT-NeoX: output rows ordered by head, then by q, k, v: (H * 3 * d, in), or (H * 3 * d,)."""

    def split(a, n):
        a = a.reshape(heads, n, -1, *a.shape[1:])  # (H, 3, d, in)
        return [a[:, i].reshape(-1, *a.shape[3:]).T for i in range(n)]  # each (in, H*d)

    def join(weights):
        rows = [w.T.reshape(heads, -1, *w.T.shape[1:]) for w in weights]  # each (H, d, in)
        return np.stack(rows, axis=1).reshape(-1, *rows[0].shape[2:])  # (H*3*d, in)

    return StoredLayout(lambda s: (sum(each[-1] for each in s), *s[0][:-1]), split, join)


@dataclass(frozen=True)
class TensorMap:
    """One stored tensor: its name, the shapes of the minitx weights in it by path, its layout."""

    name: str
    weights: dict[str, tuple]
    layout: StoredLayout

    @property
    def shape(self) -> tuple:
        return self.layout.shape(list(self.weights.values()))

    def split(self, stored: np.ndarray) -> dict[str, np.ndarray]:
        """Stored tensor -> minitx weights by path, each contiguous."""
        parts = self.layout.split(stored, len(self.weights))
        return {path: np.ascontiguousarray(w) for path, w in zip(self.weights, parts, strict=True)}

    def join(self, weights: dict[str, np.ndarray]) -> np.ndarray:
        """minitx weights by path -> stored tensor."""
        return self.layout.join([weights[path] for path in self.weights])


@dataclass(frozen=True)
class NameMap:
    """The names of one family: stored name -> suffixes of the minitx paths in that tensor."""

    prefix: str  # of all names except the head's; missing in files of a model without a head
    layer: str  # prefix of the names in block i
    head: str
    top_level: dict[str, str]  # names outside the blocks
    per_layer: dict[str, str]  # names inside a block
    buffers: str  # regex of tensors that hold no weights: masks, rotary frequencies
    other_head: str = ""  # another name of the head


QKV = "attn.qkv.q attn.qkv.k attn.qkv.v"
NAME_MAPS = {
    "llama": NameMap(
        prefix="model.",
        layer="layers.{}.",
        head="lm_head.weight",
        top_level={"embed_tokens": "embed", "norm": "norm"},
        per_layer={
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
        buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    ),
    "gpt2": NameMap(
        prefix="transformer.",
        layer="h.{}.",
        head="lm_head.weight",
        top_level={"wte": "embed.tokens", "wpe": "embed", "ln_f": "norm"},
        per_layer={
            "ln_1": "attn.norm",
            "attn.c_attn": QKV,
            "attn.c_proj": "attn.out",
            "ln_2": "ffn.norm",
            "mlp.c_fc": "ffn.expand.up",
            "mlp.c_proj": "ffn.down",
        },
        buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "gpt_neox": NameMap(
        prefix="gpt_neox.",
        layer="layers.{}.",
        head="embed_out.weight",
        top_level={"embed_in": "embed", "final_layer_norm": "norm"},
        per_layer={
            "input_layernorm": "attn.norm",
            "attention.query_key_value": QKV,
            "attention.dense": "attn.out",
            "post_attention_layernorm": "ffn.norm",
            "mlp.dense_h_to_4h": "ffn.expand.up",
            "mlp.dense_4h_to_h": "ffn.down",
        },
        buffers=r"(layers\.\d+\.attention\.)?"
        r"(bias|masked_bias|rotary_emb\.(inv_freq|cos_cached|sin_cached))",
        other_head="lm_head.weight",
    ),
}


def tensor_maps(config: Config) -> list[TensorMap]:
    """Exactly the tensors that a checkpoint of ``config`` must hold."""
    name_map = NAME_MAPS[config.family]
    # Only names and shapes are needed: with a context of 1 the rotary tables stay small.
    known = shapes(replace(config, context=1) if config.rope_width else config)
    found = _named_tensors(config, name_map.prefix, name_map.top_level, "", known)
    for i in range(config.layers):
        layer = name_map.prefix + name_map.layer.format(i)
        found += _named_tensors(config, layer, name_map.per_layer, f"stack.blocks.{i}.", known)
    if not config.tied:
        found.append(TensorMap(name_map.head, {"head.w": known["head.w"]}, TRANSPOSED))
    return found


def full_name(config: Config, stored: str) -> str:
    """The name, as in ``tensor_maps``, of a tensor that may be stored without the prefix (OpenAI's
    GPT-2; a model saved without its head) or, for a head, with another name."""
    name_map = NAME_MAPS[config.family]
    name = stored.removeprefix(name_map.prefix)
    return name_map.head if name in (name_map.head, name_map.other_head) else name_map.prefix + name


def is_buffer(config: Config, name: str) -> bool:
    """Is the tensor with this full name a buffer, as in old checkpoints, rather than a weight?"""
    name_map = NAME_MAPS[config.family]
    return re.fullmatch(re.escape(name_map.prefix) + name_map.buffers, name) is not None


QUANTIZED = (".qweight", ".scales", ".qzeros", ".weight_packed", ".weight_scale", ".absmax", ".SCB")


def why_missing(config: Config, missing: list[str], stored: list[str]) -> str:
    """The likely cause if a file has the tensors ``stored`` but not ``missing`` (full names)."""
    name_map = NAME_MAPS[config.family]
    if any("lora_" in name for name in stored):
        return (
            "these are weights of a PEFT adapter: merge it into its base model (merge_and_unload, "
            "then save_pretrained) and load the result"
        )
    if any(name.endswith(QUANTIZED) for name in stored):
        return "these are quantized weights, which minitx does not dequantize"
    if missing == [name_map.head]:
        return (
            "all other tensors are there: if the head shares the embedding table, set "
            "tie_word_embeddings to true; a model without a head predicts no tokens"
        )
    for name in missing:  # under another prefix, as left by wrappers: "module.", "_orig_mod."
        tail = name.removeprefix(name_map.prefix)
        for other in stored:
            if other.endswith("." + tail):
                return f"{other!a} looks like it: the names have another prefix than {name!a}"
    for family, other_map in NAME_MAPS.items():
        tops = [f"{top}.weight" for top in other_map.top_level]
        if family != config.family and all(_ends_any(stored, top) for top in tops):
            return f"these are names of the {family} family: config.json is of another model"
    return ""


def _ends_any(names: list[str], tail: str) -> bool:
    return any(name == tail or name.endswith("." + tail) for name in names)


def _named_tensors(
    config: Config, prefix: str, names: dict, path: str, known: dict
) -> list[TensorMap]:
    """The weights and biases under one prefix; ``known`` maps minitx paths to shapes."""
    found = []
    for name, suffixes in names.items():
        for kind, fields in (("weight", ("w", "gain")), ("bias", ("b", "bias"))):
            candidates = [
                f"{path}{suffix}.{field}" for suffix in suffixes.split() for field in fields
            ]
            weights = {p: known[p] for p in candidates if p in known}
            if weights:
                layout = _layout(config, suffixes, next(iter(weights)))
                found.append(TensorMap(f"{prefix}{name}.{kind}", weights, layout))
    return found


def _layout(config: Config, suffixes: str, path: str) -> StoredLayout:
    if path.startswith("embed") or path.endswith(("gain", "bias")):
        return UNCHANGED
    if suffixes == QKV:
        return FUSED_COLUMNS if config.family == "gpt2" else fused_by_head(config.heads)
    return UNCHANGED if config.family == "gpt2" else TRANSPOSED
