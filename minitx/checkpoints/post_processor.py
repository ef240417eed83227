"""The post-processor of a tokenizer: the special tokens before and after the ids of a text.

TemplateProcessing, BertProcessing and RobertaProcessing say which. ByteLevel only changes offsets,
which are not computed here. Several may follow each other if at most one adds something.
"""

from __future__ import annotations

from pathlib import Path

from minitx.checkpoints.tokenizer_steps import Step, steps

Affixes = tuple[list[int], list[int]]  # the ids before a text, the ids after it


def read_post_processor(file: Path, fields) -> Affixes:
    """The "post_processor" of a ``tokenizer.json``. MinitxError names an unsupported one."""
    before: list[int] = []
    after: list[int] = []
    for step in steps(file, "post_processor", fields, "processors"):
        first, last = _read(step)
        if (before or after) and (first or last):
            raise step.unsupported("at most one post-processor that adds tokens")
        before, after = before or first, after or last
    return before, after


def _read(step: Step) -> Affixes:
    if step.type == "ByteLevel":
        return [], []
    if step.type in ("BertProcessing", "RobertaProcessing"):
        return [_named_id(step, "cls")], [_named_id(step, "sep")]
    if step.type != "TemplateProcessing":
        raise step.unsupported("TemplateProcessing, BertProcessing, RobertaProcessing or ByteLevel")
    pieces = step.get("single", None, lambda v: isinstance(v, list), "a list")
    names = [_name(step, piece) for piece in pieces or []]
    if names.count(None) != 1:
        raise step.unsupported("a template for one text with its tokens before and after it")
    text = names.index(None)
    ids = [_template_ids(step, name) if name is not None else [] for name in names]
    return sum(ids[:text], []), sum(ids[text:], [])


def _name(step: Step, piece) -> str | None:
    """The special token that `piece` of a template stands for; None if it stands for the text."""
    if isinstance(piece, dict) and len(piece) == 1:
        (kind, content), *_ = piece.items()
        id = content.get("id") if isinstance(content, dict) else None
        if kind == "Sequence" and id == "A":
            return None
        if kind == "SpecialToken" and isinstance(id, str):
            return id
    raise step.unsupported("a template of special tokens and the text A")


def _template_ids(step: Step, name: str) -> list[int]:
    known = step.fields.get("special_tokens")
    entry = known.get(name) if isinstance(known, dict) else None
    ids = entry.get("ids") if isinstance(entry, dict) else None
    if not (isinstance(ids, list) and all(_is_id(id) for id in ids)):
        raise step.unsupported(f"the ids of {name!a} among its special_tokens")
    return ids


def _named_id(step: Step, name: str) -> int:
    """The id in a pair such as "cls": ["<s>", 1]."""
    pair = step.fields.get(name)
    if not (isinstance(pair, list) and len(pair) == 2 and _is_id(pair[1])):
        raise step.unsupported(f"{name} to be a token and its id")
    return pair[1]


def _is_id(value) -> bool:
    return type(value) is int and 0 <= value < 2**32
