"""``contextual_sparsity.safetensors``: the trained predictors of a model, beside its weights.

Tensors ``neurons.0.a`` (D, rank), ``neurons.0.b`` (rank, F), ``heads.0.a``, ``heads.0.b`` (rank,
H), ``neurons.1.a``, ... (predictor.py), in float16. The metadata holds the fingerprints of the
weights that the predictors were trained for (as a file, and as the arrays that a predictor depends
on, for a model that other techniques have changed), and of these tensors.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import arrays_fingerprint, need_finite, weights_fingerprint
from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError
from minitx.skip.contextual_sparsity.fit import in_dtype
from minitx.skip.contextual_sparsity.predictor import Predictor
from minitx.technique import blocks_of
from minitx.tree import float_type, walk, weights
from minitx.values import between

FILE = "contextual_sparsity.safetensors"
FORMAT = "minitx predictors"
SLOTS = {"ffn": "neurons", "attn": "heads"}
WEIGHTS = between(-1e6, 1e6)  # larger ones could overflow in a score
AGAIN = "train them with python -m minitx.skip.contextual_sparsity.train"


@dataclass(frozen=True)
class Trained:
    """The predictors of a file by slot ("ffn", "attn"), and the fingerprints of what they are
    for."""

    predictors: dict[str, tuple[Predictor, ...]]
    made_for: dict[str, str]

    def fits(self, lm, slot: str) -> bool:
        """Are the sub-layers of this model still those that the predictors were trained for?"""
        return self.made_for[slot] == sub_layers_fingerprint(lm, slot)


def write_predictors(lm, predictors: dict[str, tuple[Predictor, ...]], path) -> Trained:
    """Write the predictors of the model, which was read from a folder. Returns them as the file has
    them, rounded to float16."""
    with np.errstate(over="ignore"):  # refused by ``need_finite``
        tensors = {
            f"{SLOTS[slot]}.{i}.{name}": getattr(p, name).astype(np.float16)
            for slot, found in predictors.items()
            for i, p in enumerate(found)
            for name in ("a", "b")
        }
    for name, array in tensors.items():
        need_finite(path, name, array)  # before anything is written
    metadata = {"format": FORMAT, "weights": weights_fingerprint(lm.folder)}
    metadata |= {SLOTS[slot]: sub_layers_fingerprint(lm, slot) for slot in SLOTS}
    metadata |= {"predictors": arrays_fingerprint(tensors)}
    write_safetensors(path, tensors, "F16", metadata)
    return read_predictors(lm, path)


def read_predictors(lm, path) -> Trained:
    """The predictors in a file for this model. MinitxError if the file is missing or damaged, or
    was trained for other weights than those in the model's folder."""
    path = Path(path)
    found, metadata = read_tensors(path), read_header(path).metadata
    if metadata.get("format") != FORMAT:
        raise MinitxError(f"{path} is not a predictor file; {AGAIN}.")
    if metadata.get("weights") != weights_fingerprint(lm.folder):
        raise MinitxError(
            f"{path}: its predictors were trained for other weights than those in {lm.folder}; "
            f"delete it, or {AGAIN}."
        )
    if metadata.get("predictors") != arrays_fingerprint(found):
        raise MinitxError(
            f"{path}: its tensors do not match their fingerprint, so it was changed after it was "
            f"written; bring the original back, or {AGAIN}."
        )
    predictors = {slot: of_slot(path, found, name) for slot, name in SLOTS.items()}
    if len(found) != 2 * sum(map(len, predictors.values())):
        raise MinitxError(f"{path}: has tensors that are no predictors; {AGAIN}.")
    dtype = float_type(lm.model)
    return Trained(
        {slot: tuple(in_dtype(p, dtype) for p in ps) for slot, ps in predictors.items()},
        {slot: metadata.get(name, "") for slot, name in SLOTS.items()},
    )


def of_slot(path: Path, found: dict[str, np.ndarray], name: str) -> list[Predictor]:
    """The predictors ``name``.0, ``name``.1, ... of a file, whose tensors are checked."""
    predictors = []
    while f"{name}.{len(predictors)}.a" in found:
        one = f"{name}.{len(predictors)}"
        a, b = found[f"{one}.a"], found.get(f"{one}.b", np.zeros(0))
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b):
            raise MinitxError(
                f"{path}: expected {one}.a (D, rank) and {one}.b (rank, units), got the shapes "
                f"{a.shape} and {b.shape}; {AGAIN}."
            )
        for array in (a, b):
            need_finite(path, one, array)
            if abs(array).max(initial=0) not in WEIGHTS:
                raise MinitxError(f"{path}: expected numbers {WEIGHTS} in {one}; {AGAIN}.")
        predictors.append(Predictor(a, b))
    return predictors


def need_shapes(path: Path, predictors, width: int, units: list[int]) -> None:
    """MinitxError unless there is a predictor for each layer, which has so many units."""
    got = [(len(p.a), p.b.shape[1]) for p in predictors]
    expected = [(width, n) for n in units]
    if got != expected:
        raise MinitxError(
            f"{path}: contextual_sparsity expected predictors from D to units {expected}, layer by "
            f"layer, got {got}; {AGAIN}."
        )


def sub_layers_fingerprint(lm, slot: str) -> str:
    """Of the arrays that a predictor depends on: all of each sub-layer in this slot."""
    tensors = {}
    for i, block in enumerate(blocks_of(lm)):
        for path, node in walk(block):
            sub_layer = getattr(node, slot, None)
            if sub_layer is not None:
                tensors |= weights(sub_layer, f"{i}.{path}.")
    return arrays_fingerprint({name: w for name, w in tensors.items() if w.dtype.kind == "f"})
