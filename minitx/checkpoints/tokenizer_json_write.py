"""Write a tokenizer as a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import json
from pathlib import Path

from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.common import atomic_write
from minitx.checkpoints.pipeline_tokenizer import PipelineTokenizer
from minitx.errors import MinitxError


def write_tokenizer(tokenizer: PipelineTokenizer, folder) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into `folder`, which must exist.

    A tokenizer that was read from other files is written as these two, which transformers takes as
    they are.
    """
    if not isinstance(tokenizer, PipelineTokenizer):
        kind = type(tokenizer).__name__
        raise MinitxError(
            f"tokenizer must be a ByteLevelBPE to be written as tokenizer.json, got {kind}."
        )
    fields = _fields(tokenizer) if isinstance(tokenizer, ByteLevelBPE) else tokenizer.fields
    fields = {"version": "1.0"} | fields | {"truncation": None, "padding": None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # decoding must not remove spaces
        "bos_token": _name(tokenizer, tokenizer.bos),
        "eos_token": _name(tokenizer, tokenizer.eos),
    }
    if tokenizer.splits_special:
        config["split_special_tokens"] = True
    files = {"tokenizer.json": fields, "tokenizer_config.json": config}
    for name, fields in files.items():
        text = json.dumps(fields, ensure_ascii=False, indent=1) + "\n"
        with atomic_write(Path(folder) / name) as file:
            file.write(text.encode("utf-8", errors="surrogatepass"))


def _name(tokenizer: PipelineTokenizer, id: int | None) -> str | None:
    """The special token with this id. (Naming another one would make it special.)"""
    return {token.id: token.content for token in tokenizer.added if token.special}.get(id)


def _fields(tokenizer: ByteLevelBPE) -> dict:
    names = _names(tokenizer)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": tokenizer.add_prefix_space,
        "trim_offsets": True,
        "use_regex": tokenizer.use_regex,
    }
    return {
        "added_tokens": [vars(token) for token in tokenizer.added],
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": byte_level,
        "post_processor": _bos_template(tokenizer, names) if tokenizer.adds_bos else byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.ignore_merges,
            "vocab": {name: id for id, name in enumerate(tokenizer.names)},
            "merges": [f"{names[left]} {names[right]}" for left, right in tokenizer.merges],
        },
    }


def _names(tokenizer: ByteLevelBPE) -> list[str]:
    """The name of each id; an added token must not be named like another."""
    after = [token.content for token in tokenizer.added if token.id >= len(tokenizer.names)]
    for name in after:
        if name in tokenizer.pipeline.model.vocab:
            raise MinitxError(
                f"an added token and another token would both be named {name!a}; rename the first."
            )
    return tokenizer.names + after


def _bos_template(tokenizer: ByteLevelBPE, names: list[str]) -> dict:
    """The post-processor that prepends bos to a text, or to each of a pair of texts."""
    bos = names[tokenizer.bos]

    def with_bos(text: str, type_id: int) -> list[dict]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": text, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": with_bos("A", 0),
        "pair": with_bos("A", 0) + with_bos("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
    }
