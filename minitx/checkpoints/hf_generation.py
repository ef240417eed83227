"""Read how generation ends from a Hugging Face folder: ``generation_config.json``, or without that
file the same fields in ``config.json``, which older versions of transformers wrote there.

What becomes of each field that transformers knows is listed here, as hf_fields.py does for
``config.json``: followed, replaced by an option of minitx, refused by name unless its value changes
nothing, or neutral. Other fields are ignored, as transformers ignores them. A refusal keeps a
promise: a token that the folder suppresses never appears in a text, and no text ends where
transformers would go on. One field is noted instead, since public folders have it: a repetition
penalty changes which token is chosen, as a temperature does, but it is not an option of minitx.
"""

import warnings
from dataclasses import replace
from pathlib import Path

from minitx.checkpoints.common import abbreviate, read_json
from minitx.checkpoints.hf_config import end_tokens
from minitx.checkpoints.hf_fields import Refusal, nothing, only
from minitx.checkpoints.json_object import JsonObject
from minitx.config import Config
from minitx.errors import MinitxWarning

GENERATION = "generation_config.json"

FOLLOWED = ("eos_token_id", "max_new_tokens", "max_length")
# A caller of minitx says how to sample: temperature 0, the default, is greedy decoding.
REPLACED = (
    *("do_sample", "temperature", "top_k", "top_p"),
    *("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),  # act only if sampling
)
NOTED = ("repetition_penalty",)

_LATER_END = "does not let a text end early"
_CHANGES = "changes the logits of some tokens"
REFUSED = {
    "min_length": Refusal(only(0), _LATER_END),
    "min_new_tokens": Refusal(only(0), _LATER_END),
    "max_time": Refusal(only(), "ends a text after some seconds"),
    "stop_strings": Refusal(nothing, "ends a text at these strings"),
    "num_beams": Refusal(only(1), "asks for beam search"),
    "constraints": Refusal(nothing, "asks for constrained beam search"),
    "force_words_ids": Refusal(nothing, "asks for constrained beam search"),
    "penalty_alpha": Refusal(only(0, 0.0), "asks for contrastive search"),
    "dola_layers": Refusal(nothing, "asks for contrastive layers"),
    "forced_bos_token_id": Refusal(only(), "forces the first token"),
    "forced_eos_token_id": Refusal(only(), "forces the last token"),
    "suppress_tokens": Refusal(nothing, "forbids tokens"),
    "begin_suppress_tokens": Refusal(nothing, "forbids tokens at the beginning"),
    "bad_words_ids": Refusal(nothing, "forbids tokens"),
    "no_repeat_ngram_size": Refusal(only(0), "forbids to repeat what was said"),
    "encoder_no_repeat_ngram_size": Refusal(only(0), "forbids to repeat the prompt"),
    "encoder_repetition_penalty": Refusal(only(1, 1.0), _CHANGES),
    "exponential_decay_length_penalty": Refusal(only(), _CHANGES),
    "sequence_bias": Refusal(nothing, _CHANGES),
    "guidance_scale": Refusal(only(1, 1.0), _CHANGES),
    "watermarking_config": Refusal(only(), _CHANGES),
    "token_healing": Refusal(only(False), "changes the end of the prompt"),
    "is_assistant": Refusal(only(False), "ends a text when the model is unsure"),
    "cache_implementation": Refusal(
        lambda value: value != "quantized", "rounds the keys and values in the KV cache"
    ),
}
NEUTRAL = {
    "act only in beam search": """
        early_stopping length_penalty num_beam_groups diversity_penalty low_memory""",
    "say how to compute the same tokens": """
        use_cache cache_config max_cache_len compile_config disable_compile prefill_chunk_size
        continuous_batching_config renormalize_logits use_mtp prompt_lookup_num_tokens
        max_matching_ngram_size assistant_early_exit speculation_type""",
    "need a second model that proposes tokens": """
        num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
        assistant_lookbehind target_lookbehind assistant_ensemble_weight""",
    "hide NaN, which minitx reports": "remove_invalid_values",
    "say what is returned beside the tokens, or how often": """
        num_return_sequences output_attentions output_hidden_states output_scores output_logits
        return_dict_in_generate""",
    "are for padded batches, encoders, or a prompt of no tokens": """
        pad_token_id decoder_start_token_id bos_token_id""",
    "describe the file": "transformers_version _from_model_config",
}
NEUTRAL_NAMES = frozenset(name for names in NEUTRAL.values() for name in names.split())


def with_generation(config: Config, folder: Path, config_path: Path) -> Config:
    """``config`` with the end-of-text tokens and the default length of a text in this folder.

    As in transformers, ``generation_config.json`` replaces these fields of ``config.json`` (file
    ``config_path``) altogether. Raises MinitxError for a field that minitx cannot follow, warns
    (MinitxWarning) of a repetition penalty.
    """
    path = folder / GENERATION
    path = path if path.exists() else config_path
    c = JsonObject(path, read_json(path))
    for name, refusal in REFUSED.items():
        if name in c.fields and not refusal.harmless(c.fields[name]):
            instead = "remove it from the file to load the model without it"
            c.reject(name, f"{refusal.why} in transformers but not in minitx", instead)
    penalty = c.fields.get("repetition_penalty")
    if penalty not in (None, 1):
        warnings.warn(
            f"{path}: 'repetition_penalty' is {abbreviate(penalty)}; minitx has none, so its texts "
            "differ from those of transformers' generate, also greedy ones (logits do not).",
            MinitxWarning,
            stacklevel=2,
        )
    return replace(
        config,
        eos=end_tokens(c, config.vocab_size),
        max_new_tokens=c.positive_int("max_new_tokens", None),
        max_length=c.positive_int("max_length", None),
    )
