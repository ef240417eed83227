"""Reading ``config.json``: from Hugging Face's spelling of a configuration to ours.

What fixes the arithmetic but can be left out of the file gets the value transformers gives it. What
minitx does not compute (scaled rotary angles, sliding windows shorter than the context, quantized
weights, ...) is refused, never ignored. Settings of training (dropout, ...) do not matter here.

One kind of model transformers does not have: an architecture "Skipless..." is the one that follows
in its name without residual adds and norms (the epsilon of a norm is written and does not matter).

Since transformers 5 the rotary settings stand in one dict ``rope_parameters``; before, they stood
at the top level (``rope_theta``; GPT-NeoX: ``rotary_emb_base`` and ``rotary_pct``) and in
``rope_scaling``. Both are read.
"""

from dataclasses import replace
from pathlib import Path

from minitx.checkpoints.common import need_modest_tables, read_json, short
from minitx.checkpoints.fields import Fields, is_token, is_token_or_tokens
from minitx.config import Config
from minitx.errors import MinitxError

ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"},
    **{"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
}


def read_config(path) -> Config:
    """The configuration in the file ``path`` (a ``config.json``).

    Raises MinitxError where the file is missing or malformed, lacks a field, contradicts itself,
    or asks for something that minitx does not compute.
    """
    if not Path(path).is_file():
        raise MinitxError(f"{path}: there is no such file; a model folder needs a config.json.")
    c = Fields(path, read_json(path))
    if c.fields.get("quantization_config") is not None:
        c.refuse("quantization_config", "minitx does not undo")
    names = c.fields.get("architectures")
    name = names[0] if _is_list_of_one_text(names) else ""
    reader = READERS.get(name.removeprefix(SKIPLESS))
    if reader is None:
        raise MinitxError(
            f"{path}: 'architectures' is {short(names)}; minitx reads one of {', '.join(READERS)}."
        )
    try:
        config = replace(reader(c), skipless=name.startswith(SKIPLESS))
    except MinitxError as error:  # Config's own checks do not know which file they judge
        text = str(error)
        raise MinitxError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    need_modest_tables(path, config)
    return config


def _is_list_of_one_text(names) -> bool:
    return isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)


def _read_llama(c: Fields) -> Config:
    bias = c.flag("attention_bias", False)
    return _llama_like(c, qkv_bias=bias, out_bias=bias, ffn_bias=c.flag("mlp_bias", False))


def _read_mistral(c: Fields) -> Config:
    # Without the field transformers takes a window of 4096; null means none.
    usual = None if "sliding_window" in c.fields else 4096
    _need_full_attention(c, c.count("sliding_window", usual))
    return _llama_like(c, qkv_bias=False, out_bias=False, ffn_bias=False)


def _read_qwen2(c: Fields) -> Config:
    sliding = c.flag("use_sliding_window", False)
    _need_full_attention(c, c.count("sliding_window", 4096) if sliding else None)
    return _llama_like(c, qkv_bias=True, out_bias=False, ffn_bias=False)


def _need_full_attention(c: Fields, window: int | None) -> None:
    """A sliding window is not a limit as long as the whole context fits in it."""
    if window is not None and window < c.count("max_position_embeddings"):
        raise MinitxError(
            f"{c.path}: 'sliding_window' is {window} but the context 'max_position_embeddings' is "
            f"{c.count('max_position_embeddings')}; minitx has no sliding window, so lower the "
            f"context in the file to {window} (up to there the model is the same)."
        )


def _llama_like(c: Fields, qkv_bias: bool, out_bias: bool, ffn_bias: bool) -> Config:
    width, heads = c.count("hidden_size"), c.count("num_attention_heads")
    head_width = c.count("head_dim", None) or _share(c, "hidden_size", "num_attention_heads")
    base, share = _rotary(c, "rope_theta", "partial_rotary_factor", 1.0)
    if share != 1.0:
        c.refuse("partial_rotary_factor", "this architecture does not have in transformers")
    if _activation(c, "hidden_act") != "silu":
        c.refuse("hidden_act", "is not the 'silu' of the llama family")
    return Config(
        family="llama",
        vocab_size=c.count("vocab_size"),
        width=width,
        layers=c.count("num_hidden_layers"),
        heads=heads,
        kv_heads=c.count("num_key_value_heads", heads),
        head_width=head_width,
        hidden=c.count("intermediate_size"),
        context=c.count("max_position_embeddings"),
        norm_eps=c.number("rms_norm_eps"),
        rope_width=head_width,
        rope_base=base,
        tied=c.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        ffn_bias=ffn_bias,
        **_special_tokens(c),
    )


def _read_gpt2(c: Fields) -> Config:
    for name, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if c.flag(name, usual) is not usual:
            c.refuse(name, "minitx does not compute")
    width, heads = c.count("n_embd"), c.count("n_head")
    return Config(
        family="gpt2",
        vocab_size=c.count("vocab_size"),
        width=width,
        layers=c.count("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_width=_share(c, "n_embd", "n_head"),
        hidden=c.count("n_inner", 4 * width),
        context=c.count("n_positions"),
        activation=_activation(c, "activation_function"),
        norm_eps=c.number("layer_norm_epsilon"),
        tied=c.flag("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        **_special_tokens(c),
    )


def _read_gpt_neox(c: Fields) -> Config:
    width, heads = c.count("hidden_size"), c.count("num_attention_heads")
    head_width = _share(c, "hidden_size", "num_attention_heads")
    base, share = _rotary(c, "rotary_emb_base", "rotary_pct", 0.25)
    rope_width = int(head_width * share)
    if rope_width < 1:
        c.refuse("rotary_pct", "leaves no rotated column (nor are positions learned)")
    bias = c.flag("attention_bias", True)
    return Config(
        family="gpt_neox",
        vocab_size=c.count("vocab_size"),
        width=width,
        layers=c.count("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_width=head_width,
        hidden=c.count("intermediate_size"),
        context=c.count("max_position_embeddings"),
        activation=_activation(c, "hidden_act"),
        norm_eps=c.number("layer_norm_eps"),
        rope_width=rope_width,
        rope_base=base,
        parallel=c.flag("use_parallel_residual", True),
        tied=c.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=True,
        **_special_tokens(c),
    )


SKIPLESS = "Skipless"  # SkiplessLlamaForCausalLM and so on: minitx's own
READERS = {
    "LlamaForCausalLM": _read_llama,
    "MistralForCausalLM": _read_mistral,
    "Qwen2ForCausalLM": _read_qwen2,
    "GPT2LMHeadModel": _read_gpt2,
    "GPTNeoXForCausalLM": _read_gpt_neox,
}


def _share(c: Fields, width: str, heads: str) -> int:
    """The head width where it is the width divided by the heads."""
    if c.count(width) % c.count(heads):
        raise MinitxError(
            f"{c.path}: {width!r} {c.count(width)} is not a multiple of {heads!r} {c.count(heads)}."
        )
    return c.count(width) // c.count(heads)


def _activation(c: Fields, name: str) -> str:
    given = c.text(name)
    if given not in ACTIVATIONS:
        raise MinitxError(
            f"{c.path}: unknown activation {name!r} {short(given)}; "
            f"minitx reads one of {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[given]


def _rotary(c: Fields, base_name: str, share_name: str, usual_share: float) -> tuple[float, float]:
    """(rope base, rotated share of a head's columns), whichever way they are spelled."""
    new, old = c.nested("rope_parameters"), c.nested("rope_scaling")
    for where in (new, old):
        kind = where.text("rope_type", where.text("type", "default"))
        if kind != "default" or any(isinstance(v, dict) for v in where.fields.values()):
            raise MinitxError(
                f"{c.path}: rotary positions are scaled ({short(where.fields)}); minitx computes "
                "only the rope_type 'default', so choose a checkpoint without scaling."
            )
    base = _agreed([(new, "rope_theta"), (old, "rope_theta"), (c, "rope_theta"), (c, base_name)])
    share = _agreed(
        [(where, "partial_rotary_factor") for where in (new, old, c)] + [(c, share_name)]
    )
    share = usual_share if share is None else share
    if share > 1:
        raise MinitxError(f"{c.path}: {share_name!r} is {share}; expected at most 1.")
    base = 10000.0 if base is None else base
    if not 1 <= base <= 1e30:  # beyond that float32 angles are Inf, or all 0
        raise MinitxError(f"{c.path}: {base_name!r} is {base}; expected a number from 1 to 1e30.")
    return base, share


def _agreed(spellings: list[tuple[Fields, str]]) -> float | None:
    """The one value of a setting that has several spellings; None if none of them is there."""
    found = {}
    for where, name in spellings:
        value = where.number(name, None)
        if value is not None:
            found[value] = name
    if len(found) > 1:
        said = " and ".join(f"{name!r} {value}" for value, name in found.items())
        raise MinitxError(f"{spellings[0][0].path}: {said} disagree; remove one of them.")
    return next(iter(found), None)


def _special_tokens(c: Fields) -> dict:
    """bos and eos. Ids beyond the vocabulary, which tiny test models have, can never occur: as in
    transformers they do not matter."""
    bos = c.get("bos_token_id", None, is_token, "a token id")
    eos = c.get("eos_token_id", [], is_token_or_tokens, "a token id or a list of them")
    eos = eos if isinstance(eos, list) else [eos]
    size = c.count("vocab_size")
    return {
        "bos": bos if bos is not None and bos < size else None,
        "eos": tuple(token for token in eos if token < size),
    }
