"""Training that continues from an existing model: a fine-tune, with techniques or without.

A recipe with ``start`` names the model, and ``techniques`` those that are applied to it first:

    {"name": "stories with shared layers", "start": "stories",
     "techniques": {"layer_fusion": {"group": 2}}, "stages": [...]}

What is trained is what runs: every array of floats in the tree that the techniques have made,
through the same forward pass. Two layers that share one set of weights get the sum of both
gradients, a router that a technique has added is trained with the rest.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from minitx.checkpoints.find import locate
from minitx.checkpoints.precomputed import Origin, is_precomputed, read_origin, write_parts
from minitx.errors import MinitxError, abbreviate, one_line
from minitx.lm import LM, load
from minitx.memory_layout import to_column_major, to_row_major
from minitx.model import Transformer
from minitx.technique import apply, as_words, find
from minitx.training.autograd import gradients
from minitx.training.loss import cross_entropy
from minitx.training.recipe import Recipe


def starting_model(recipe: Recipe, tokenizer) -> LM:
    """The model that the recipe starts from, with its techniques. MinitxError if it cannot be
    loaded, if it has another vocabulary than the stories that it is trained on, or if a technique
    does not fit it."""
    lm = load(recipe.start)
    size, needed = lm.model.config.vocab_size, len(tokenizer)
    if size < needed or lm.tokenizer is None or lm.encode(PROBE) != tokenizer.encode(PROBE):
        raise MinitxError(
            f"Training reads stories, and the model {recipe.start!r} to start from has another "
            "vocabulary; start from one that was trained on stories (minitx models lists them)."
        )
    lm = apply(lm, recipe.techniques)
    return replace(lm, model=to_row_major(lm.model))


def need_gradients(recipe: Recipe, lm: LM) -> None:
    """MinitxError if a technique computes what has no gradient, found on a few tokens before the
    first step."""
    ids = np.array([lm.encode(PROBE)[:8]] * 2)
    if lm.model.config.context < ids.shape[-1]:
        return

    def loss(model):
        return cross_entropy(model(ids), ids, np.ones(ids.shape, np.float32))

    try:
        with np.errstate(all="ignore"):
            gradients(lm.model, loss)
    except Exception as error:  # whatever NumPy or a part raises for a traced array
        names = " and ".join(recipe.techniques) or "this model"
        raise MinitxError(
            f"Training through {names} is not possible, since it computes what has no gradient "
            f"({abbreviate(one_line(str(error)))}); train first, and apply it to the trained model."
        ) from None


def write_with_techniques(recipe: Recipe, model: Transformer, tokenizer, folder: Path) -> None:
    """Write the trained model and its techniques into the folder, for ``minitx.load(folder)``."""
    before = starting_model(recipe, tokenizer)
    trained = replace(before, model=to_column_major(model))
    flags = [f"{find(name).flag} {as_words(o)}" for name, o in recipe.techniques.items()]
    origin = Origin(recipe.start, "")
    if is_precomputed(locate(recipe.start)):
        origin = read_origin(locate(recipe.start))
    flags = " ".join([origin.flags, *flags]).strip()
    write_parts(trained, folder, Origin(origin.model, flags, before.calibrated, recipe.name))


def has_techniques(recipe: Recipe) -> bool:
    """Is what is trained a model with techniques: its own ones, or those of the start?"""
    if recipe.start is None:
        return False
    return bool(recipe.techniques) or is_precomputed(locate(recipe.start))


PROBE = "Once upon a time there was a boy named Finn. Where is the bell? The bell is"
