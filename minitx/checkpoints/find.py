"""Finding a model: by the name of a shipped one, or in a folder or file of any supported format."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import unreadable
from minitx.checkpoints.precomputed import is_precomputed, read_precomputed
from minitx.decode import Autoregressive
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.tree import Part

PACKAGE = Path(__file__).resolve().parent.parent
# An installed wheel carries the weights inside the package; a checkout has them beside it.
SHIPPED = [PACKAGE / "weights", PACKAGE.parent / "weights"]
TOKENIZERS = ("tokenizer.json", "tokenizer.bin")


def shipped() -> dict[str, Path]:
    """The folders of the models that come with minitx, by name."""
    return {
        config.parent.name: config.parent
        for folder in reversed(SHIPPED)
        for config in sorted(folder.glob("*/config.json"))
    }


def locate(name_or_path) -> Path:
    """The folder or file that is meant. A plain name is a shipped model first; ``./name``, or a
    ``Path``, is a path only. Raises MinitxError if there is no such thing."""
    path = _place(name_or_path, "model")
    if not _exists(path):
        raise MinitxError(
            f"There is no model {str(name_or_path)!r}: it is neither a folder or file here, nor "
            f"one of the shipped models ({', '.join(sorted(shipped())) or 'none found'})."
        )
    return path


@dataclass(frozen=True)
class Found:
    """What was found of a language model."""

    model: Transformer
    decode: Part
    tokenizer: object  # or None
    path: Path  # of the model


def read(name_or_path, tokenizer=None, dtype=np.float32) -> Found:
    """A language model, for arguments as ``minitx.load`` has them.

    The tokenizer is looked for where it was asked for, else beside the model.
    """
    path = locate(name_or_path)
    where = tokenizer_path(path, tokenizer)
    if is_precomputed(path):
        model, decode = read_precomputed(path, dtype)
    else:
        model, decode = read_model_at(path, dtype), Autoregressive()
    found = None if where is None else read_tokenizer_for(where, model)
    return Found(model, decode, found, path)


def name_of(path: Path) -> str:
    """As a model is called where it lies: "." and "stories15M.bin" are no names."""
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
    """The file of the tokenizer of the model at ``path``: the one that is asked for, else the one
    beside the model, if there is one."""
    return beside(path) if tokenizer is None else _tokenizer_at(tokenizer)


def beside(path: Path) -> Path | None:
    """The tokenizer that stands beside the model, if there is one."""
    if not path.is_dir():
        found = path.with_name("tokenizer.bin")
        return found if _exists(found) else None
    for name in TOKENIZERS if is_precomputed(path) else TOKENIZERS[:1]:
        if _exists(path / name):
            return path / name
    return None


def read_tokenizer_for(path: Path, model: Transformer):
    """The tokenizer in a folder or file, refused if it gives ids that the model does not have."""
    size = model.config.vocab_size
    if path.suffix == ".bin":
        from minitx.checkpoints.llama2c_tokenizer import read_llama2c_tokenizer

        return read_llama2c_tokenizer(path, size)
    from minitx.checkpoints.tokenizer_json import read_tokenizer

    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size > size:
        raise MinitxError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} entries but the model knows only "
            f"{size}; give the tokenizer that belongs to this model."
        )
    return tokenizer


def _tokenizer_at(name_or_path) -> Path:
    """The file of a tokenizer that was asked for: the file itself, or the one in that folder, which
    may be a shipped model's."""
    path = _place(name_or_path, "tokenizer")
    if not _exists(path):
        raise MinitxError(f"{path}: there is no such tokenizer; give its file or folder.")
    if not path.is_dir():
        return path
    for name in TOKENIZERS:
        if _exists(path / name):
            return path / name
    raise MinitxError(f"{path}: holds no tokenizer (tokenizer.json, or llama2.c's tokenizer.bin).")


def _place(name_or_path, what: str) -> Path:
    """The folder of the shipped model of that name, else the path."""
    known = shipped()
    if isinstance(name_or_path, str) and name_or_path in known:
        return known[name_or_path]
    try:
        return Path(name_or_path)
    except TypeError:
        raise MinitxError(f"The {what} is {name_or_path!r}; expected a name or a path.") from None


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False
    except OSError as error:  # no permission to look there, or a name that is too long
        raise unreadable(path, error) from None
    return True
