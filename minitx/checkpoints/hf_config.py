"""Read a Hugging Face ``config.json`` into a minitx ``Config``.

Five architectures are read: Llama; Mistral and Qwen2 where they are a Llama (no sliding window that
is shorter than the context); GPT-2; GPT-NeoX. A field that may be absent has the default that
transformers has. hf_fields.py lists what becomes of every other field, hf_rope.py reads the rotary
settings, and hf_generation.py how generation ends.

One addition of minitx: an architecture "SkiplessX" is architecture X without residual adds and
norms (a norm epsilon is written but unused).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from minitx.checkpoints.common import abbreviate, need_small_rope_tables, read_json
from minitx.checkpoints.hf_fields import refuse_unsupported
from minitx.checkpoints.hf_rope import GPT_NEOX, LLAMA, read_rope
from minitx.checkpoints.json_object import (
    REQUIRED,
    JsonObject,
    is_integer,
    is_integer_or_integers,
)
from minitx.config import Config
from minitx.errors import MinitxError

ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu"},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
}
SKIPLESS = "Skipless"  # SkiplessLlamaForCausalLM and so on, defined by minitx

# The defaults of transformers 5.24 for fields that may be absent.
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MISTRAL_DEFAULTS = LLAMA_DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN2_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GPT2_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
NEOX_DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "attention_bias": True,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
# transformers reads these in place of GPT-2's own names.
GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def read_config(path) -> Config:
    """The configuration in the file ``path`` (a ``config.json``).

    Raises MinitxError if the file is missing or malformed, contradicts itself, or asks for a
    feature that minitx does not implement.
    """
    if not Path(path).exists():
        raise MinitxError(f"{path}: there is no such file; a model folder needs a config.json.")
    return config_from(path, read_json(path))


def config_from(path, fields: dict) -> Config:
    """The configuration given by the fields of a ``config.json``; ``path`` is for messages."""
    architecture, skipless = _architecture(path, fields)
    fields = _without_aliases(path, fields, architecture.aliases)
    c = JsonObject(path, architecture.defaults | fields)
    refuse_unsupported(c, architecture.model_type)
    try:
        config = replace(architecture.read(c), skipless=skipless)
    except MinitxError as error:  # Config's own checks do not name the file
        text = str(error)
        raise MinitxError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    need_small_rope_tables(path, config)
    return config


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers: its name, that of the same model without a head (which
    some files give instead), and its reader."""

    name: str
    without_head: str
    model_type: str
    defaults: dict
    read: Callable[[JsonObject], Config]
    aliases: dict = field(default_factory=dict)


def _architecture(path, fields: dict) -> tuple[Architecture, bool]:
    """The architecture that 'architectures' and 'model_type' name, and whether it is skipless.

    transformers selects the model by 'model_type' alone, so the two must agree; one of them may be
    absent.
    """
    names, model_type = fields.get("architectures") or None, fields.get("model_type")
    known = {a.model_type: a for a in ARCHITECTURES}
    if names is None and isinstance(model_type, str) and model_type in known:
        return known[model_type], False
    by_name = {name: a for a in ARCHITECTURES for name in (a.name, a.without_head)}
    name = names[0] if _is_single_string(names) else ""
    found = by_name.get(name.removeprefix(SKIPLESS))
    if found is None:
        raise MinitxError(
            f"{path}: 'architectures' is {abbreviate(names)} and 'model_type' "
            f"{abbreviate(model_type)}; expected one of {', '.join(a.name for a in ARCHITECTURES)}."
        )
    skipless = name.startswith(SKIPLESS)
    expected = f"skipless_{found.model_type}" if skipless else found.model_type
    if model_type not in (None, expected):
        raise MinitxError(
            f"{path}: 'model_type' is {abbreviate(model_type)} but 'architectures' is "
            f"{abbreviate(names)}, whose model_type is {expected!r}; the two must name the same "
            "kind of model."
        )
    return found, skipless


def _is_single_string(names) -> bool:
    return isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)


# The five readers ---------------------------------------------------------------------------------


def _read_llama(c: JsonObject) -> Config:
    _need_full_attention(c, c.positive_int("max_position_embeddings"))
    bias = c.boolean("attention_bias", False)
    return _llama_like(c, qkv_bias=bias, out_bias=bias, ffn_bias=c.boolean("mlp_bias", False))


def _read_mistral(c: JsonObject) -> Config:
    _need_full_attention(c, c.positive_int("max_position_embeddings"))
    return _llama_like(c, qkv_bias=False, out_bias=False, ffn_bias=False)


def _read_qwen2(c: JsonObject) -> Config:
    """Its window counts only if it is switched on, and then only in some of the layers."""
    first = c.get("max_window_layers", REQUIRED, is_integer, "an integer")
    kinds = c.fields.get("layer_types")
    if isinstance(kinds, list):
        windowed = "sliding_attention" in kinds
    else:
        windowed = first < c.positive_int("num_hidden_layers")
    window = c.positive_int("sliding_window", None)
    if not (c.boolean("use_sliding_window") and windowed):
        window = None
    c = JsonObject(c.path, c.fields | {"sliding_window": window})
    _need_full_attention(c, c.positive_int("max_position_embeddings"))
    return _llama_like(c, qkv_bias=True, out_bias=False, ffn_bias=False)


def _llama_like(c: JsonObject, qkv_bias: bool, out_bias: bool, ffn_bias: bool) -> Config:
    width, heads = c.positive_int("hidden_size"), c.positive_int("num_attention_heads")
    head_width = c.positive_int("head_dim", None) or _head_width(
        c, "hidden_size", "num_attention_heads"
    )
    fraction, rope = read_rope(c, LLAMA)
    if fraction != 1.0:
        raise MinitxError(
            f"{c.path}: 'partial_rotary_factor' is {fraction}, which transformers does not support "
            "in this architecture; expected 1."
        )
    if _activation(c, "hidden_act") != "silu":
        c.reject("hidden_act", "is not 'silu', the only activation of the llama family")
    return Config(
        family="llama",
        vocab_size=c.positive_int("vocab_size"),
        width=width,
        layers=c.positive_int("num_hidden_layers"),
        heads=heads,
        kv_heads=c.positive_int("num_key_value_heads", heads),
        head_width=head_width,
        hidden=c.positive_int("intermediate_size"),
        context=c.positive_int("max_position_embeddings"),
        norm_eps=c.positive_float("rms_norm_eps"),
        rope_width=head_width,
        tied=c.boolean("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        ffn_bias=ffn_bias,
        **rope,
        **_special_tokens(c),
    )


def _read_gpt2(c: JsonObject) -> Config:
    context = c.positive_int("n_positions")
    _need_full_attention(c, context)
    width, heads = c.positive_int("n_embd"), c.positive_int("n_head")
    return Config(
        family="gpt2",
        vocab_size=c.positive_int("vocab_size"),
        width=width,
        layers=c.positive_int("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_width=_head_width(c, "n_embd", "n_head"),
        hidden=c.positive_int("n_inner", 4 * width),
        context=context,
        activation=_activation(c, "activation_function"),
        norm_eps=c.positive_float("layer_norm_epsilon"),
        tied=c.boolean("tie_word_embeddings"),
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        **_special_tokens(c),
    )


def _read_gpt_neox(c: JsonObject) -> Config:
    context = c.positive_int("max_position_embeddings")
    _need_full_attention(c, context)
    width, heads = c.positive_int("hidden_size"), c.positive_int("num_attention_heads")
    head_width = _head_width(c, "hidden_size", "num_attention_heads")
    if c.positive_int("head_dim", head_width) != head_width:
        c.reject("head_dim", f"is not hidden_size / num_attention_heads = {head_width}")
    fraction, rope = read_rope(c, GPT_NEOX)
    rope_width = int(head_width * fraction)
    if rope_width < 2 or rope_width % 2:
        raise MinitxError(
            f"{c.path}: 'rotary_pct' {fraction} of heads of width {head_width} are {rope_width} "
            "rotary columns; expected an even number above 0."
        )
    bias = c.boolean("attention_bias")
    return Config(
        family="gpt_neox",
        vocab_size=c.positive_int("vocab_size"),
        width=width,
        layers=c.positive_int("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_width=head_width,
        hidden=c.positive_int("intermediate_size"),
        context=context,
        activation=_activation(c, "hidden_act"),
        norm_eps=c.positive_float("layer_norm_eps"),
        rope_width=rope_width,
        parallel=c.boolean("use_parallel_residual"),
        tied=c.boolean("tie_word_embeddings"),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=True,
        **rope,
        **_special_tokens(c),
    )


ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "LlamaModel", "llama", LLAMA_DEFAULTS, _read_llama),
    Architecture("MistralForCausalLM", "MistralModel", "mistral", MISTRAL_DEFAULTS, _read_mistral),
    Architecture("Qwen2ForCausalLM", "Qwen2Model", "qwen2", QWEN2_DEFAULTS, _read_qwen2),
    Architecture("GPT2LMHeadModel", "GPT2Model", "gpt2", GPT2_DEFAULTS, _read_gpt2, GPT2_ALIASES),
    Architecture("GPTNeoXForCausalLM", "GPTNeoXModel", "gpt_neox", NEOX_DEFAULTS, _read_gpt_neox),
)

# What they share ----------------------------------------------------------------------------------


def _need_full_attention(c: JsonObject, context: int) -> None:
    """Reject a window or chunk that is shorter than the context; a longer one has no effect.

    transformers honours these fields in every architecture, since the KV cache reads them.
    """
    for name in ("sliding_window", "attention_chunk_size"):
        window = c.positive_int(name, None)
        if window is not None and window < context:
            raise MinitxError(
                f"{c.path}: {name!r} is {window} but the context is {context}; minitx attends to "
                f"all earlier tokens, so lower the context in the file to {window} (up to that "
                "length the model is the same)."
            )
    window = c.fields.get("sliding_window")
    allowed = ("full_attention", "attention") + ("sliding_attention",) * (window is not None)
    kinds = c.get("layer_types", [], lambda v: isinstance(v, list), "a list")
    if any(kind not in allowed for kind in kinds):
        c.reject("layer_types", "asks for other attention than full attention in some layer")


def _without_aliases(path, fields: dict, aliases: dict[str, str]) -> dict:
    """The fields with each alias replaced by the name that it stands for."""
    found = {name: value for name, value in fields.items() if name not in aliases}
    for alias, name in aliases.items():
        value = fields.get(alias)
        if value is not None and found.get(name, value) != value:
            raise MinitxError(
                f"{path}: {alias!r} {abbreviate(value)} and {name!r} {abbreviate(found[name])} "
                "disagree; remove one of them."
            )
        if value is not None:
            found[name] = value
    return found


def _head_width(c: JsonObject, width: str, heads: str) -> int:
    """Width / heads, where the file does not give the head width itself."""
    if c.positive_int(width) % c.positive_int(heads):
        raise MinitxError(
            f"{c.path}: {width!r} must be a multiple of {heads!r} {c.positive_int(heads)}, "
            f"got {c.positive_int(width)}."
        )
    return c.positive_int(width) // c.positive_int(heads)


def _activation(c: JsonObject, name: str) -> str:
    value = c.string(name)
    if value not in ACTIVATIONS:
        raise MinitxError(
            f"{c.path}: {name!r} is {abbreviate(value)}; expected one of {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[value]


def _special_tokens(c: JsonObject) -> dict:
    """bos and eos. Ids outside the vocabulary, as in tiny test models, are dropped: they can never
    occur, and transformers ignores them too."""
    size = c.positive_int("vocab_size")
    bos = c.get("bos_token_id", None, is_integer, "a token id")
    return {
        "bos": bos if bos is not None and 0 <= bos < size else None,
        "eos": end_tokens(c, size),
    }


def end_tokens(c: JsonObject, vocab_size: int) -> tuple[int, ...]:
    """The ids in 'eos_token_id' (one, a list, or null) that are in the vocabulary."""
    eos = c.get("eos_token_id", [], is_integer_or_integers, "a token id or a list of them")
    return tuple(t for t in (eos if isinstance(eos, list) else [eos]) if 0 <= t < vocab_size)
