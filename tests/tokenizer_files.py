"""The tokenizer files and ids that Hugging Face made, for the tests of tokenizers."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "reference/tokenizer"
REFERENCE = json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))
FIELDS = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
BYTES = [bytes([byte]) for byte in range(256)]


def with_variant(variant):
    """The reference's file with the keys of `variant` (as in make.py)."""
    return FIELDS | variant | {"model": FIELDS["model"] | variant.get("model", {})}


def write_fields(folder, fields):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(fields), encoding="utf-8")
    return file
