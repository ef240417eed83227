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

from minitx.checkpoints.precomputed import Origin, write_parts
from minitx.errors import MinitxError
from minitx.lm import LM, load
from minitx.memory_layout import to_column_major, to_row_major
from minitx.model import Transformer
from minitx.technique import apply, as_words, find
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


def write_with_techniques(recipe: Recipe, model: Transformer, tokenizer, folder: Path) -> None:
    """Write the trained model and its techniques into the folder, for ``minitx.load(folder)``."""
    before = starting_model(recipe, tokenizer)
    trained = replace(before, model=to_column_major(model))
    flags = " ".join(f"{find(name).flag} {as_words(o)}" for name, o in recipe.techniques.items())
    write_parts(trained, folder, Origin(recipe.start, flags, before.calibrated, recipe.name))


PROBE = "Once upon a time there was a boy named Finn. Where is the bell? The bell is"
