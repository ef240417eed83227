"""Reference outputs: what Hugging Face transformers computes for a model.

One ``NAME.npz`` per model in ``tests/reference`` of a checkout, written by ``make.py`` there, from
the shipped weights (``stories``, ...) or from random weights that a seed reproduces
(``random-...``). The README beside it documents the arrays. ``check.py`` compares.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from minitx.build import build, random_model
from minitx.checkpoints.common import atomic_write, parse_json, read_npz, weights_fingerprint
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.lab.inside import STEPS
from minitx.model import Transformer
from minitx.tree import weights

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = CHECKOUT / "tests" / "reference"
DTYPES = ("float32", "float64")
INSIDE = "inside: "  # begins the name of an array of values inside the blocks
MAX_BYTES = 2**28  # of one reference, unpacked


@dataclass(frozen=True)
class Reference:
    """The outputs of transformers for one text of T ids; R rows of them are stored."""

    name: str
    about: dict  # versions, hash of the weights, tokenizer texts; for random models the Config
    ids: np.ndarray  # (T,) the text
    rows: np.ndarray  # (R,) positions for which the values below are stored
    prompt: np.ndarray  # (P,) prompt of the greedy continuation
    greedy: np.ndarray  # (N,) its tokens, continuing past end-of-text
    hidden: dict[str, np.ndarray]  # by dtype (L + 2, R, D): embedding, each block, norm
    logits: dict[str, np.ndarray]  # by dtype (R, V)
    # Inside the blocks (inside.py), in float64 only: by step (L, I, ...) at these I positions.
    inside_rows: np.ndarray = field(default_factory=lambda: np.array([], int))
    inside: dict[str, np.ndarray] = field(default_factory=dict)

    def stages(self, dtype: str) -> dict[str, np.ndarray]:
        """The values (R, D or V) after each stage of the forward pass, in order."""
        hidden = self.hidden[dtype]
        return dict(zip(stage_names(len(hidden) - 2), [*hidden, self.logits[dtype]]))

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that a model must have to be comparable, by their names in Config."""
        stages, _, width = self.hidden["float64"].shape
        V = self.logits["float64"].shape[-1]
        return {"layers": stages - 2, "width": width, "vocab_size": V}

    @property
    def seed(self) -> int | None:
        """The seed of a random model's weights; None for a model read from files."""
        return self.about.get("seed")

    @property
    def config(self) -> Config:
        """The configuration of a random model."""
        fields = self.about["config"]
        return Config(**fields | {"eos": tuple(fields["eos"])})


def stage_names(layers: int) -> list[str]:
    return ["embedding", *(f"block {i}" for i in range(layers)), "norm", "logits"]


# Files -------------------------------------------------------------------------------------------


def find_references(folder=None) -> dict[str, Path]:
    """The reference files of a folder by model, random ones last. MinitxError if there are none."""
    own, folder = folder is None, FOLDER if folder is None else Path(folder)
    found = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    if not found:
        where = (
            "they are in tests/reference of a checkout, not in the installed package, so run this "
            "in a checkout"
            if own
            else "give the folder with the .npz files that tests/reference/make.py writes"
        )
        raise MinitxError(f"There are no reference outputs in {folder}: {where}.")
    return dict(sorted(found.items(), key=lambda entry: entry[0].startswith("random-")))


def write_reference(reference: Reference, folder=FOLDER) -> Path:
    arrays = {"about": np.array(json.dumps(reference.about))}
    for name in ("ids", "rows", "prompt", "greedy"):
        arrays[name] = getattr(reference, name)
    for dtype in DTYPES:
        arrays[f"hidden_{dtype}"] = reference.hidden[dtype]
        arrays[f"logits_{dtype}"] = reference.logits[dtype]
    arrays["inside_rows"] = reference.inside_rows
    for step, values in reference.inside.items():
        arrays[INSIDE + step] = values
    path = Path(folder) / f"{reference.name}.npz"
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)
    return path


def read_reference(path) -> Reference:
    """Read a reference file; MinitxError if it is damaged."""
    path = Path(path)
    try:
        a = read_npz(path, MAX_BYTES)
        return Reference(
            name=path.stem,
            about=parse_json(str(a["about"]).encode()),
            **{name: a[name] for name in ("ids", "rows", "prompt", "greedy")},
            hidden={dtype: a[f"hidden_{dtype}"] for dtype in DTYPES},
            logits={dtype: a[f"logits_{dtype}"] for dtype in DTYPES},
            inside_rows=a["inside_rows"],
            inside={step: a[INSIDE + step] for step in STEPS if INSIDE + step in a},
        )
    except MinitxError:  # no file, or not a regular one
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise MinitxError(f"{path}: not a reference file ({error}); {remake(path.stem)}.") from None


def remake(name: str) -> str:
    """How to regenerate a reference, for a message."""
    return f"regenerate it with 'python tests/reference/make.py {name}'"


# Weights -----------------------------------------------------------------------------------------


def seeded_weights(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights by path, the same on every machine.

    Like those of ``random_model``, but chosen so that mistakes show: gains are not all 1, biases
    not all 0, and the matrices of the blocks are larger, so that attention is far from uniform and
    blocks change the residual stream. Rounded to multiples of 1/4096, so that the last bit of the
    machine's logarithm (used for normal numbers) does not matter.
    """
    rng = np.random.default_rng([seed, 1])
    found = {}
    for path, w in weights(random_model(config, seed)).items():
        if w.ndim == 1:
            w = w + 0.2 * rng.standard_normal(w.shape)
        elif ".blocks." in path:
            w = w * 2.0
        found[path] = (np.rint(w * 4096) / 4096).astype(np.float32)
    return found


def seeded_model(config: Config, seed: int, dtype=np.float32) -> Transformer:
    """The model with ``seeded_weights``: the same numbers in any dtype."""
    drawn = seeded_weights(config, seed)
    return build(config, lambda path, shape: drawn[path].astype(dtype))


def seeded_about(config: Config, seed: int) -> dict:
    """What a reference records about a random model: enough to rebuild and verify it."""
    drawn = seeded_weights(config, seed)
    return {"config": asdict(config), "seed": seed, "weights": _hash(drawn.values())}


def files_about(folder: Path) -> dict:
    """What a reference records about a model folder: the hash of its weights."""
    return {"weights": weights_fingerprint(folder)}


def _hash(blocks) -> str:
    total = hashlib.sha256()
    for block in blocks:
        total.update(block)
    return total.hexdigest()
