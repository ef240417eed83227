"""Every field of a Hugging Face ``config.json`` that transformers knows, and what becomes of it.

A field is one of these, and nothing falls between them:

- **followed**: hf_config.py or hf_rope.py reads it (hf_generation.py: fields about generation);
- **refused** (below) by name, unless its value is one that changes nothing;
- **neutral** (below): no value of it changes what the model computes, for the reason given there.

Fields that transformers does not know are ignored, as transformers ignores them.

The evidence is a sweep: tests/reference/config_fields/make.py sets each field of the five
configuration classes to other values, has transformers compute logits and a greedy completion, and
records what changed. A test compares that record with what minitx reads and refuses.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minitx.checkpoints.json_object import JsonObject


@dataclass(frozen=True)
class Refusal:
    """A field that minitx does not implement: which values change nothing, and what others do."""

    harmless: Callable[[object], bool]
    why: str  # completes "'field' is VALUE, which ..."


def only(*values) -> Callable[[object], bool]:
    """True for exactly these values; null stands for an absent field."""
    return lambda value: any(type(value) is type(v) and value == v for v in (None, *values))


def nothing(value) -> bool:
    """True for null, an empty list and an empty object."""
    return value is None or value == [] or value == {}


ANY_MODEL = {
    "quantization_config": Refusal(
        only(), "asks for quantized weights; minitx does not dequantize"
    ),
    "is_causal": Refusal(only(True), "lets tokens see later ones"),
    "is_encoder_decoder": Refusal(only(False), "makes this the decoder of a two-part model"),
    "per_layer_config": Refusal(nothing, "gives layers different settings"),
    "kv_sharing_modes": Refusal(
        lambda value: not isinstance(value, list) or "reuse" not in value,
        "lets layers reuse the keys and values of others",
    ),
    "configuration_files": Refusal(nothing, "makes transformers read another configuration"),
    "transformers_weights": Refusal(
        only("model.safetensors"), "names another file than model.safetensors for the weights"
    ),
    **{
        name: Refusal(only(), "nests the configuration of another model")
        for name in ("text_config", "decoder", "generator", "text_encoder")
    },
}
OF_MODEL_TYPE = {
    "gpt2": {
        "scale_attn_weights": Refusal(only(True), "leaves out the attention scale 1 / sqrt(d)"),
        "scale_attn_by_inverse_layer_idx": Refusal(only(False), "scales attention by layer"),
        "add_cross_attention": Refusal(only(False), "adds cross-attention to an encoder"),
    },
}

NEUTRAL = {
    "act only in training": """
        attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop attn_pdrop
        initializer_range gradient_checkpointing""",
    "say how to compute the same numbers; minitx computes in float32 or, on request, float64": """
        use_cache reorder_and_upcast_attn chunk_size_feed_forward pretraining_tp dtype torch_dtype
        attn_implementation""",
    "say what is returned beside or around the logits": """
        return_dict output_hidden_states output_attentions tie_last_hidden_states""",
    "belong to other heads (classification, sequence summary)": """
        id2label label2id num_labels problem_type summary_type summary_use_proj summary_activation
        summary_proj_to_labels summary_first_dropout""",
    "are for padded batches; minitx pads by position": "pad_token_id",
    "are not read by decoders of these five kinds": "is_decoder",
    "describe the file": "transformers_version name_or_path auto_map",
}
NEUTRAL_NAMES = frozenset(name for names in NEUTRAL.values() for name in names.split())


def refuse_unsupported(c: JsonObject, model_type: str) -> None:
    """Raises MinitxError for the first field whose value asks for what minitx lacks."""
    refusals = ANY_MODEL | OF_MODEL_TYPE.get(model_type, {})
    for name in c.fields:
        if name in refusals and not refusals[name].harmless(c.fields[name]):
            c.reject(name, refusals[name].why)
