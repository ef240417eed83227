"""Write a minitx ``Config`` as the ``config.json`` of the matching transformers architecture.

The rotary settings are written in both spellings: the one of transformers 5 and the older one.
Limits on the length of a text are written as older versions did, in ``config.json`` too.
"""

from minitx.checkpoints.hf_config import SKIPLESS
from minitx.config import Config
from minitx.errors import MinitxError

ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


def config_fields(config: Config) -> dict:
    """The fields of ``config.json`` with which transformers builds the same model. (A skipless
    model gets an architecture name of its own, which transformers does not know.)

    Raises MinitxError for a combination that no supported architecture has.
    """
    c = config
    fields = {"llama": _llama_fields, "gpt2": _gpt2_fields, "gpt_neox": _gpt_neox_fields}[c.family](
        c
    )
    if c.skipless:  # names that other frameworks reject instead of loading a different model
        fields["architectures"] = [SKIPLESS + name for name in fields["architectures"]]
        fields["model_type"] = f"skipless_{fields['model_type']}"
    limits = {"max_new_tokens": c.max_new_tokens, "max_length": c.max_length}
    fields |= {name: limit for name, limit in limits.items() if limit is not None}
    return fields | {
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tied,
        "bos_token_id": c.bos,
        "eos_token_id": c.eos[0] if len(c.eos) == 1 else list(c.eos) or None,
    }


def _llama_fields(c: Config) -> dict:
    biases = (c.qkv_bias, c.out_bias, c.ffn_bias)
    own = {}
    if biases == (True, False, False):
        name, kind = "Qwen2ForCausalLM", "qwen2"
    elif (
        not any(biases) and c.width % c.heads
    ):  # transformers' Llama requires that; Mistral does not
        name, kind, own = "MistralForCausalLM", "mistral", {"sliding_window": None}
    elif c.qkv_bias == c.out_bias and c.width % c.heads == 0:
        name, kind = "LlamaForCausalLM", "llama"
        own = {"attention_bias": c.qkv_bias, "mlp_bias": c.ffn_bias}
    else:
        raise _no_architecture(c, f"biases {biases} (qkv, out, ffn) at width {c.width}")
    if c.parallel or c.activation != "silu" or c.rope_width != c.head_width:
        raise _no_architecture(c, "parallel blocks, another activation or partial rotary columns")
    return {
        "architectures": [name],
        "model_type": kind,
        **_common_fields(c),
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        **_rope_fields(c),
        **own,
    }


def _gpt2_fields(c: Config) -> dict:
    if c.parallel or c.rope_width or not (c.qkv_bias and c.out_bias and c.ffn_bias):
        raise _no_architecture(c, "parallel blocks, rotary columns or a missing bias")
    _need_plain_heads(c)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.hidden,
        "n_positions": c.context,
        "activation_function": ACTIVATIONS[c.activation],
        "layer_norm_epsilon": c.norm_eps,
    }


def _gpt_neox_fields(c: Config) -> dict:
    if c.rope_width == 0 or c.qkv_bias != c.out_bias or not c.ffn_bias:
        raise _no_architecture(c, "learned positions, no FFN bias, or only one attention bias")
    _need_plain_heads(c)
    fraction = c.rope_width / c.head_width
    if int(c.head_width * fraction) != c.rope_width:  # readers truncate: add half a column
        fraction = (c.rope_width + 0.5) / c.head_width
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **_common_fields(c),
        "hidden_act": ACTIVATIONS[c.activation],
        "layer_norm_eps": c.norm_eps,
        "attention_bias": c.qkv_bias,
        "use_parallel_residual": c.parallel,
        "rotary_emb_base": c.rope_base,
        "rotary_pct": fraction,
        **_rope_fields(c, partial_rotary_factor=fraction),
    }


def _rope_fields(c: Config, **more) -> dict:
    """The object of transformers 5, and the older one if there is scaling."""
    if c.rope_trained_context:
        scaling = {
            "rope_type": "llama3",
            "factor": c.rope_factor,
            "low_freq_factor": c.rope_low_turns,
            "high_freq_factor": c.rope_high_turns,
            "original_max_position_embeddings": c.rope_trained_context,
        }
    elif c.rope_factor != 1:
        scaling = {"rope_type": "linear", "factor": c.rope_factor}
    else:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base, **more}}
    return {
        "rope_parameters": {**scaling, "rope_theta": c.rope_base, **more},
        "rope_scaling": {**scaling, "type": scaling["rope_type"], **more},
    }


def _common_fields(c: Config) -> dict:
    return {
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.context,
    }


def _need_plain_heads(c: Config) -> None:
    if c.kv_heads != c.heads or c.heads * c.head_width != c.width:
        raise _no_architecture(c, "grouped-query attention, or heads * head width != width")


def _no_architecture(c: Config, what: str) -> MinitxError:
    return MinitxError(
        f"No {c.family} architecture of transformers has {what}; it cannot be written."
    )
