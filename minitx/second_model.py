"""A second model next to the one that runs: the draft of speculative decoding, say.

Two models can work on one text only if a token id means the same to both.
"""

from dataclasses import replace
from pathlib import Path

from minitx.errors import MinitxError
from minitx.lm import LM, load
from minitx.model import Stack, Transformer
from minitx.technique import need


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
