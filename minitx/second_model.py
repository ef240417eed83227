"""A second model next to the one that runs: the draft of speculative decoding, say, or the small
model of a cascade.

Two models can work on one text only if a token id means the same to both.
"""

import warnings
from dataclasses import replace
from pathlib import Path

from minitx.checkpoints.find import shipped
from minitx.errors import MinitxError, MinitxWarning
from minitx.lm import LM, load
from minitx.model import Stack, Transformer
from minitx.technique import need, owner
from minitx.tree import walk

SMALL = "stories-draft"  # shipped, small, with the vocabulary of the other story models

# What an option that names a small model may be, for its help text.
SMALL_NAMES = (
    "a model with the same vocabulary, by name or path; self: the first half of this model's "
    "blocks; auto: stories-draft if its vocabulary fits, else self"
)


def small_model(lm: LM, name: str, who: str, role: str, instead: str = "") -> Transformer:
    """The small model that an option with the meaning ``SMALL_NAMES`` names.

    MinitxError, in one sentence, if it cannot be had. who: the technique; role: what the model is
    to it, which is the name of the option ("draft"); instead: what the user could do instead.
    """
    if name == "auto":
        found = load(SMALL) if lm.tokenizer is not None and SMALL in shipped() else None
        if found is not None and not why_another_vocabulary(lm, found):
            return found.model
        warnings.warn(
            f"{who}: no shipped model shares the vocabulary of this model, so the first half of "
            f"its own blocks is the {role} model; {role}=PATH names a better one"
            f"{instead and f', or {instead}'}.",
            MinitxWarning,
            stacklevel=2,
        )
        name = "self"
    if name == "self":
        return first_half(lm.model, who, role)
    instead = f"{role}=self{instead and f', or {instead}'}"
    return load_second(lm, name, who, f"{role} model", instead).model


def first_half(model: Transformer, who: str, role: str) -> Transformer:
    """The first half of the model's blocks (rounded down) with its final norm and head, as a model
    that shares the weights."""
    need(model.stack, Stack)
    half = len(model.stack.blocks) // 2
    if not half:
        raise MinitxError(
            f"{who} cannot use half of a model of one block as its {role} model; give another."
        )
    return first_blocks(model, half, who)


def need_rewind(model: Transformer, who: str, role: str, instead: str) -> None:
    """Refuse a second model that could not take back tokens: its KV cache must be rewound."""
    for _, node in walk(model):
        if node.frees_rows:
            raise MinitxError(
                f"{who} cannot use this {role} model: {owner(node)} frees cache rows, so tokens "
                f"that are rejected could not be taken back; {instead}."
            )


def load_second(lm: LM, name_or_path: str | Path, who: str, role: str, instead: str = "") -> LM:
    """Load a model that shares the vocabulary of ``lm``, by name or path.

    MinitxError, in one sentence, if there is none or its vocabulary differs. who: the technique;
    role: what the model is to it ("draft"); instead: what the user could give instead.
    """
    try:
        other = load(name_or_path)
    except MinitxError as error:
        raise MinitxError(f"{who} cannot load its {role}: {error}") from None
    if why := why_another_vocabulary(lm, other):
        raise MinitxError(
            f"{who} cannot use {str(name_or_path)!r} as its {role}: {why}; give a model that "
            f"shares the tokenizer{instead and f', or {instead}'}."
        )
    return other


def why_another_vocabulary(lm: LM, other: LM) -> str:
    """How the vocabulary of ``other`` differs from that of ``lm``; "" if it does not. If one of the
    models has no tokenizer, only the sizes are compared."""
    ours, theirs = lm.model.config.vocab_size, other.model.config.vocab_size
    if ours != theirs:
        return f"it has {theirs} tokens and this model {ours}"
    if lm.tokenizer is None or other.tokenizer is None or lm.tokenizer is other.tokenizer:
        return ""
    here, there = (  # previous=i: as in the middle of a text, since the first token may differ
        [t.token_bytes(i, previous=i) for i in range(len(t))]
        for t in (lm.tokenizer, other.tokenizer)
    )
    return "" if here == there else "its tokens differ from this model's"


def first_blocks(model: Transformer, n: int, who: str) -> Transformer:
    """The first n blocks of a model, its final norm and its head, as a model that shares all
    weights. MinitxError if it has fewer blocks, NoSuchPart if its stack is not a plain one."""
    need(model.stack, Stack)
    blocks = model.stack.blocks
    if not 1 <= n <= len(blocks):
        raise MinitxError(
            f"{who} cannot make a model of the first {n} blocks of this one; give 1 to "
            f"{len(blocks)}."
        )
    stack = replace(model.stack, blocks=blocks[:n])
    return replace(model, stack=stack, config=replace(model.config, layers=n))
