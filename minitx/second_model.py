"""A second model beside the one that runs: a draft, or the small model of a cascade or a router.

Two models can take turns on one text only if a token id means the same to both.
"""

from dataclasses import replace
from pathlib import Path

from minitx.errors import MinitxError
from minitx.lm import LM, load
from minitx.model import Stack, Transformer
from minitx.technique import need


def load_second(lm: LM, name_or_path: str | Path, who: str, role: str, instead: str = "") -> LM:
    """A model that shares the vocabulary of ``lm``, by name or path.

    MinitxError, in one sentence, if there is none or it has another vocabulary. who: the technique
    that asks; role: what the model is to it ("draft"); instead: what else could be given.
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
    """How the vocabulary of ``other`` differs from that of ``lm``; nothing if it does not. Where a
    model has no tokenizer and works on ids alone, only the sizes can be compared."""
    ours, theirs = lm.model.config.vocab_size, other.model.config.vocab_size
    if ours != theirs:
        return f"it has {theirs} tokens and this model {ours}"
    if lm.tokenizer is None or other.tokenizer is None or lm.tokenizer is other.tokenizer:
        return ""
    here, there = (  # as in the middle of a text: at its beginning a tokenizer may drop a token
        [t.token_bytes(i, previous=i) for i in range(len(t))]
        for t in (lm.tokenizer, other.tokenizer)
    )
    return "" if here == there else "its tokens differ from this model's"


def first_blocks(model: Transformer, n: int, who: str) -> Transformer:
    """The first n blocks of a model as a model of their own, with its final norm and its head; all
    weights are shared. MinitxError if it has not so many, NoSuchPart if its stack cannot be cut."""
    need(model.stack, Stack)
    blocks = model.stack.blocks
    if not 1 <= n <= len(blocks):
        raise MinitxError(
            f"{who} cannot make a model of the first {n} blocks of this one; give 1 to "
            f"{len(blocks)}."
        )
    stack = replace(model.stack, blocks=blocks[:n])
    return replace(model, stack=stack, config=replace(model.config, layers=n))
