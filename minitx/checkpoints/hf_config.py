"""Read a Hugging Face ``config.json`` into a minitx ``Config``.

Fields that affect inference but may be absent get the default of transformers. Features that minitx
does not implement (RoPE scaling, sliding windows shorter than the context, quantized weights, ...)
raise an error and are never ignored. Training settings (dropout, ...) are not read.

One addition of minitx: an architecture "SkiplessX" is architecture X without residual adds and
norms (a norm epsilon is written but unused).

transformers 5 stores the rotary settings in one dict, ``rope_parameters``. Older versions stored
them at the top level (``rope_theta``; GPT-NeoX: ``rotary_emb_base`` and ``rotary_pct``) and in
``rope_scaling``. Both spellings are read.
"""

from dataclasses import replace
from pathlib import Path

from minitx.checkpoints.common import abbreviate, need_small_rope_tables, read_json
from minitx.checkpoints.json_object import JsonObject, is_token_id, is_token_id_or_ids
from minitx.config import Config
from minitx.errors import MinitxError

ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"},
    **{"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
}


def read_config(path) -> Config:
    """The configuration in the file ``path`` (a ``config.json``).

    Raises MinitxError if the file is missing or malformed, lacks a field, contradicts itself, or
    asks for a feature that minitx does not implement.
    """
    if not Path(path).exists():
        raise MinitxError(f"{path}: there is no such file; a model folder needs a config.json.")
    c = JsonObject(path, read_json(path))
    if c.fields.get("quantization_config") is not None:
        c.reject("quantization_config", "minitx does not dequantize")
    names = c.fields.get("architectures")
    name = names[0] if _is_single_string(names) else ""
    reader = READERS.get(name.removeprefix(SKIPLESS))
    if reader is None:
        raise MinitxError(
            f"{path}: 'architectures' is {abbreviate(names)}; expected one of {', '.join(READERS)}."
        )
    try:
        config = replace(reader(c), skipless=name.startswith(SKIPLESS))
    except MinitxError as error:  # Config's own checks do not name the file
        text = str(error)
        raise MinitxError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    need_small_rope_tables(path, config)
    return config


def _is_single_string(names) -> bool:
    return isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)


def _read_llama(c: JsonObject) -> Config:
    bias = c.boolean("attention_bias", False)
    return _llama_like(c, qkv_bias=bias, out_bias=bias, ffn_bias=c.boolean("mlp_bias", False))


def _read_mistral(c: JsonObject) -> Config:
    # An absent field means a window of 4096 in transformers; null means no window.
    default = None if "sliding_window" in c.fields else 4096
    _need_full_attention(c, c.positive_int("sliding_window", default))
    return _llama_like(c, qkv_bias=False, out_bias=False, ffn_bias=False)


def _read_qwen2(c: JsonObject) -> Config:
    sliding = c.boolean("use_sliding_window", False)
    _need_full_attention(c, c.positive_int("sliding_window", 4096) if sliding else None)
    return _llama_like(c, qkv_bias=True, out_bias=False, ffn_bias=False)


def _need_full_attention(c: JsonObject, window: int | None) -> None:
    """Reject a sliding window that is shorter than the context; a longer one has no effect."""
    if window is not None and window < c.positive_int("max_position_embeddings"):
        raise MinitxError(
            f"{c.path}: 'sliding_window' is {window} but the context 'max_position_embeddings' is "
            f"{c.positive_int('max_position_embeddings')}; minitx has no sliding window, so lower "
            f"the context in the file to {window} (up to that length the model is the same)."
        )


def _llama_like(c: JsonObject, qkv_bias: bool, out_bias: bool, ffn_bias: bool) -> Config:
    width, heads = c.positive_int("hidden_size"), c.positive_int("num_attention_heads")
    head_width = c.positive_int("head_dim", None) or _head_width(
        c, "hidden_size", "num_attention_heads"
    )
    base, fraction = _rotary(c, "rope_theta", "partial_rotary_factor", 1.0)
    if fraction != 1.0:
        c.reject("partial_rotary_factor", "transformers does not support in this architecture")
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
        rope_base=base,
        tied=c.boolean("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        ffn_bias=ffn_bias,
        **_special_tokens(c),
    )


def _read_gpt2(c: JsonObject) -> Config:
    for name, supported in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if c.boolean(name, supported) is not supported:
            c.reject(name, "minitx does not support")
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
        context=c.positive_int("n_positions"),
        activation=_activation(c, "activation_function"),
        norm_eps=c.positive_float("layer_norm_epsilon"),
        tied=c.boolean("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        **_special_tokens(c),
    )


def _read_gpt_neox(c: JsonObject) -> Config:
    width, heads = c.positive_int("hidden_size"), c.positive_int("num_attention_heads")
    head_width = _head_width(c, "hidden_size", "num_attention_heads")
    base, fraction = _rotary(c, "rotary_emb_base", "rotary_pct", 0.25)
    rope_width = int(head_width * fraction)
    if rope_width < 1:
        c.reject("rotary_pct", "rotates no columns, so the model would have no positions")
    bias = c.boolean("attention_bias", True)
    return Config(
        family="gpt_neox",
        vocab_size=c.positive_int("vocab_size"),
        width=width,
        layers=c.positive_int("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_width=head_width,
        hidden=c.positive_int("intermediate_size"),
        context=c.positive_int("max_position_embeddings"),
        activation=_activation(c, "hidden_act"),
        norm_eps=c.positive_float("layer_norm_eps"),
        rope_width=rope_width,
        rope_base=base,
        parallel=c.boolean("use_parallel_residual", True),
        tied=c.boolean("tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=True,
        **_special_tokens(c),
    )


SKIPLESS = "Skipless"  # SkiplessLlamaForCausalLM and so on, defined by minitx
READERS = {
    "LlamaForCausalLM": _read_llama,
    "MistralForCausalLM": _read_mistral,
    "Qwen2ForCausalLM": _read_qwen2,
    "GPT2LMHeadModel": _read_gpt2,
    "GPTNeoXForCausalLM": _read_gpt_neox,
}


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


def _rotary(
    c: JsonObject, base_name: str, fraction_name: str, default_fraction: float
) -> tuple[float, float]:
    """(RoPE base, fraction of a head's columns that is rotated), in any of the spellings."""
    new, old = c.object("rope_parameters"), c.object("rope_scaling")
    for where in (new, old):
        kind = where.string("rope_type", where.string("type", "default"))
        if kind != "default" or any(isinstance(v, dict) for v in where.fields.values()):
            raise MinitxError(
                f"{c.path}: RoPE scaling is not supported ({abbreviate(where.fields)}); expected "
                "rope_type 'default', so choose a checkpoint without scaling."
            )
    base = _single_value([(s, "rope_theta") for s in (new, old, c)] + [(c, base_name)])
    fraction = _single_value(
        [(s, "partial_rotary_factor") for s in (new, old, c)] + [(c, fraction_name)]
    )
    fraction = default_fraction if fraction is None else fraction
    if fraction > 1:
        raise MinitxError(f"{c.path}: {fraction_name!r} must be at most 1, got {fraction}.")
    base = 10000.0 if base is None else base
    if not 1 <= base <= 1e30:  # outside this range float32 angles are Inf, or all 0
        raise MinitxError(f"{c.path}: {base_name!r} must be from 1 to 1e30, got {base}.")
    return base, fraction


def _single_value(spellings: list[tuple[JsonObject, str]]) -> float | None:
    """The value of a setting that has several spellings; None if all of them are absent."""
    found = {}
    for where, name in spellings:
        value = where.positive_float(name, None)
        if value is not None:
            found[value] = name
    if len(found) > 1:
        values = " and ".join(f"{name!r} {value}" for value, name in found.items())
        raise MinitxError(f"{spellings[0][0].path}: {values} disagree; remove one of them.")
    return next(iter(found), None)


def _special_tokens(c: JsonObject) -> dict:
    """bos and eos. Ids outside the vocabulary, as in tiny test models, are dropped: they can never
    occur, and transformers ignores them too."""
    bos = c.get("bos_token_id", None, is_token_id, "a token id")
    eos = c.get("eos_token_id", [], is_token_id_or_ids, "a token id or a list of them")
    eos = eos if isinstance(eos, list) else [eos]
    size = c.positive_int("vocab_size")
    return {
        "bos": bos if bos is not None and bos < size else None,
        "eos": tuple(token for token in eos if token < size),
    }
