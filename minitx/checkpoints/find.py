"""Find and load a model: a shipped one by name, or any supported folder or file by path."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitx.checkpoints import auto_tokenizer
from minitx.checkpoints.common import unreadable
from minitx.checkpoints.precomputed import is_precomputed, read_origin, read_precomputed
from minitx.decode import Autoregressive
from minitx.errors import MinitxError, abbreviate, nearest
from minitx.model import Transformer
from minitx.tree import Part, walk

PACKAGE = Path(__file__).resolve().parent.parent
# An installed wheel has the weights inside the package, a checkout next to it.
SHIPPED = [PACKAGE / "weights", PACKAGE.parent / "weights"]
TOKENIZERS = (*auto_tokenizer.FILES, "tokenizer.bin")


def shipped() -> dict[str, Path]:
    """The folders of the shipped models, by name."""
    return {
        config.parent.name: config.parent
        for folder in reversed(SHIPPED)
        for config in sorted(folder.glob("*/config.json"))
    }


def locate(name_or_path) -> Path:
    """The folder or file of a model. A plain name is looked up among the shipped models first;
    ``./name`` or a ``Path`` is always a path. Raises MinitxError if it does not exist."""
    path = _resolve(name_or_path, "model")
    if not _exists(path):
        near = nearest(str(name_or_path), shipped())
        hint = f" Did you mean {near!r}?" if near else ""
        raise MinitxError(
            f"There is no model {abbreviate(str(name_or_path))}: expected a folder, a file, or one "
            f"of the shipped models ({', '.join(sorted(shipped())) or 'none found'}).{hint}"
        )
    return path


@dataclass(frozen=True)
class LoadedModel:
    """A model, its decoding loop and its tokenizer, as read from files."""

    model: Transformer
    decode: Part  # the decoding loop
    tokenizer: object  # or None
    path: Path  # of the model
    calibrated: tuple = ()  # what a precomputed model was calibrated on


def read_language_model(name_or_path, tokenizer=None, dtype=np.float32) -> LoadedModel:
    """The model and tokenizer for the arguments of ``minitx.load``.

    Without ``tokenizer`` the tokenizer is looked up next to the model; False means none.
    """
    path = locate(name_or_path)
    where = tokenizer_path(path, tokenizer)
    if is_precomputed(path):
        model, decode = read_precomputed(path, dtype)
        calibrated = read_origin(path).calibrated
    else:
        model, decode, calibrated = read_model_at(path, dtype), Autoregressive(), ()
    return LoadedModel(model, decode, _tokenizer_of(where, model), path, calibrated)


def _tokenizer_of(where: Path | None, model: Transformer):
    """The tokenizer in this file, None for None; a refusal says how to do without it."""
    if where is None:
        return None
    try:
        tokenizer = read_tokenizer_for(where, model)
    except MinitxError as error:
        raise MinitxError(
            f"{error} To use the model without a tokenizer, on token ids: tokenizer=False "
            "(--no-tokenizer)."
        ) from None
    for _, node in walk(model):
        tokenizer = node.tokenizer_for(tokenizer)
    return tokenizer


def name_of(path: Path) -> str:
    """The model's name: the resolved folder's name, or the file name without suffix."""
    return path.resolve().name if path.is_dir() else path.stem


def read_model_at(path: Path, dtype) -> Transformer:
    if path.is_dir():
        from minitx.checkpoints.huggingface import read_model

        return read_model(path, dtype)
    if path.suffix == ".bin":
        from minitx.checkpoints.llama2c import read_llama2c

        return read_llama2c(path, dtype)
    raise MinitxError(
        f"{path} is not a model: expected a Hugging Face folder (one with config.json and "
        "model.safetensors), a llama2.c .bin file, or a folder that minitx precompute wrote."
    )


def tokenizer_path(path: Path, tokenizer=None) -> Path | None:
    """The tokenizer file for the model at ``path``: ``tokenizer`` if given, else the one next to
    the model, or None. False: None, whatever is there."""
    if tokenizer is False:
        return None
    return tokenizer_beside(path) if tokenizer is None else _tokenizer_at(tokenizer)


def tokenizer_beside(path: Path) -> Path | None:
    """The tokenizer file next to the model, or None."""
    if not path.is_dir():
        found = path.with_name("tokenizer.bin")
        return found if _exists(found) else None
    for name in TOKENIZERS if is_precomputed(path) else auto_tokenizer.FILES:
        if _exists(path / name):
            return path / name
    return None


def read_tokenizer_for(path: Path, model: Transformer):
    """The tokenizer in a folder or file; rejected if its vocabulary is larger than the model's,
    apart from tokens that were added to it: the model refuses their ids."""
    size = model.config.vocab_size
    if path.suffix == ".bin":
        from minitx.checkpoints.llama2c_tokenizer import read_llama2c_tokenizer

        return read_llama2c_tokenizer(path, size)
    from minitx.checkpoints.tokenizer_json import read_tokenizer

    tokenizer = read_tokenizer(path)
    if tokenizer.model_vocab_size > size:
        raise MinitxError(
            f"{path}: the tokenizer has {tokenizer.model_vocab_size} tokens but the model's "
            f"vocabulary has {size}; give the tokenizer that belongs to this model."
        )
    return tokenizer


def _tokenizer_at(name_or_path) -> Path:
    """The tokenizer file for a path or name: the file itself, or the one in that folder or in the
    folder of that shipped model."""
    path = _resolve(name_or_path, "tokenizer")
    if not _exists(path):
        raise MinitxError(f"{path}: there is no such tokenizer; expected a file or folder.")
    if not path.is_dir():
        return path
    for name in TOKENIZERS:
        if _exists(path / name):
            return path / name
    raise MinitxError(
        f"{path}: expected a tokenizer.json, or a llama2.c tokenizer.bin, in this folder."
    )


def _resolve(name_or_path, what: str) -> Path:
    """The folder of the shipped model with that name, else the path."""
    known = shipped()
    if isinstance(name_or_path, str) and name_or_path in known:
        return known[name_or_path]
    try:
        return Path(name_or_path)
    except TypeError:
        raise MinitxError(f"The {what} must be a name or a path, got {name_or_path!r}.") from None


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False
    except OSError as error:  # no permission, or the name is too long
        raise unreadable(path, error) from None
    return True
