"""Reference tokenizer files and ids from Hugging Face ``tokenizers``, for the tokenizer tests."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "reference/tokenizer"
REFERENCE = json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))
FIELDS = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
BYTES = [bytes([byte]) for byte in range(256)]


def with_variant(variant):
    """The reference ``tokenizer.json`` with the keys of `variant` replaced (as in make.py)."""
    return FIELDS | variant | {"model": FIELDS["model"] | variant.get("model", {})}


def write_fields(folder, fields):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(fields), encoding="utf-8")
    return file
