"""Finding a model: by the name of a shipped one, or in a folder or file of any supported format."""

from pathlib import Path

import numpy as np

from minitx.errors import MinitxError
from minitx.model import Transformer

PACKAGE = Path(__file__).resolve().parent.parent
# An installed wheel carries the weights inside the package; a checkout has them beside it.
SHIPPED = [PACKAGE / "weights", PACKAGE.parent / "weights"]


def shipped() -> dict[str, Path]:
    """The models that come with minitx, by name."""
    return {
        config.parent.name: config.parent
        for folder in reversed(SHIPPED)
        for config in sorted(folder.glob("*/config.json"))
    }


def locate(name_or_path) -> Path:
    """The folder or file that is meant: a shipped name first, then a path."""
    known = shipped()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    path = Path(name_or_path)
    if not path.exists():
        raise MinitxError(
            f"There is no model {str(name_or_path)!r}: it is neither a folder or file here, nor one "
            f"of the shipped models ({', '.join(sorted(known)) or 'none found'})."
        )
    return path


def read(name_or_path, tokenizer=None, dtype=np.float32) -> tuple[Transformer, object, str]:
    """(model, tokenizer or None, name). The tokenizer is read from where it was asked for, or from
    beside the model if one stands there."""
    path = locate(name_or_path)
    if path.is_dir():
        from minitx.files.huggingface import read_model

        model = read_model(path, dtype)
        beside = path / "tokenizer.json"
    elif path.suffix == ".bin":
        from minitx.files.llama2c import read_llama2c

        model = read_llama2c(path, dtype)
        beside = path.with_name("tokenizer.bin")
    else:
        raise MinitxError(
            f"{path} is no model: a Hugging Face folder (config.json and model.safetensors) or a "
            "llama2.c .bin file is needed."
        )
    where = Path(tokenizer) if tokenizer is not None else beside if beside.exists() else None
    return model, None if where is None else read_tokenizer_for(where, model), path.stem


def read_tokenizer_for(path: Path, model: Transformer):
    """The tokenizer in a folder or file, refused if it can give ids that the model does not have."""
    size = model.config.vocab_size
    if path.suffix == ".bin":
        from minitx.files.llama2c_tokenizer import read_llama2c_tokenizer

        return read_llama2c_tokenizer(path, size)
    from minitx.files.tokenizer_json import read_tokenizer

    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size > size:
        raise MinitxError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} entries but the model knows only {size}; "
            "give the tokenizer that belongs to this model."
        )
    return tokenizer
