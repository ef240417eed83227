"""Read a BPE tokenizer from Hugging Face's ``tokenizer.json``, or from a folder with its files.

Supported: BPE models and the steps in ``normalizers.py``, ``pre_tokenizers.py``,
``post_processor.py`` and ``decoders.py``, in any order and nesting that gives the same as there.
Any other setting that changes ids or text raises an error that names it. "truncation" and "padding"
are ignored, as transformers ignores them unless it is asked to truncate or to pad.

Which tokens are added, and what a folder's other files change, is in ``auto_tokenizer.py``.

The ids and the decoded text equal those of Hugging Face ``tokenizers``.
"""

from __future__ import annotations

from pathlib import Path

from minitx.checkpoints.auto_tokenizer import Found, find_tokenizer
from minitx.checkpoints.bpe import read_bpe
from minitx.checkpoints.decoders import read_decoder
from minitx.checkpoints.normalizers import read_normalizer
from minitx.checkpoints.pipeline_tokenizer import Pipeline, PipelineTokenizer
from minitx.checkpoints.post_processor import read_post_processor
from minitx.checkpoints.pre_tokenizers import needs_text_offsets, read_pre_tokenizer
from minitx.checkpoints.tokenizer_steps import steps
from minitx.errors import MinitxError, abbreviate

_KEYS = (
    "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model"
)
_END_OF_TEXT = "<|endoftext|>"


def read_tokenizer(path) -> PipelineTokenizer:
    """The tokenizer in `path`: a folder, or the ``tokenizer.json`` in it.

    Raises MinitxError for a damaged file and for what is not supported.
    """
    found = find_tokenizer(path)
    file, fields = found.file, found.fields
    _reject_unknown_keys(file, fields)
    make_decoder, spells_bytes = read_decoder(file, fields.get("decoder"))
    _need_offsets(file, fields)
    before, after = read_post_processor(file, fields.get("post_processor"))
    pipeline = Pipeline(
        normalize=read_normalizer(file, fields.get("normalizer")),
        pre_tokenize=read_pre_tokenizer(file, fields.get("pre_tokenizer")),
        model=read_bpe(file, fields),
        before=before,
        after=after,
        make_decoder=make_decoder,
        spells_bytes=spells_bytes,
    )
    bos, eos = _bos_and_eos(found, pipeline.model.vocab, before)
    return PipelineTokenizer(
        pipeline,
        found.added,
        bos=bos,
        eos=eos,
        splits_special=found.splits_special,
        fields=fields,
    )


def _need_offsets(file: Path, fields: dict) -> None:
    """Metaspace's "first" goes by where a word stood in the text, which most normalizers change."""
    if needs_text_offsets(file, fields.get("pre_tokenizer")):
        for step in steps(file, "normalizer", fields.get("normalizer"), "normalizers"):
            if step.type != "NFC":
                raise step.unsupported('no normalizer but NFC before a Metaspace "first"')


def _bos_and_eos(found: Found, vocab: dict, before: list[int]) -> tuple[int | None, int | None]:
    """The ids of the named tokens; if neither is named, both are "<|endoftext|>", if that is an
    added token. A token that the post-processor prepends takes precedence as bos."""
    ids = vocab | {token.content: token.id for token in found.added}
    named = found.named
    if not {"bos_token", "eos_token"} & set(named) and _END_OF_TEXT in [
        token.content for token in found.added
    ]:
        named = {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT}
    bos = before[0] if before else ids.get(named.get("bos_token"))
    return bos, ids.get(named.get("eos_token"))


def _reject_unknown_keys(file: Path, fields: dict) -> None:
    for name in fields:
        if name not in _KEYS.split():
            raise MinitxError(f"{file}: has the unknown key {abbreviate(name)}; remove it.")
