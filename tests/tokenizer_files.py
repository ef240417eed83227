"""Reference tokenizer files and ids from Hugging Face ``tokenizers``, for the tokenizer tests."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "reference/tokenizer"
REFERENCE = json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))
FIELDS = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
PIPELINES = json.loads((FOLDER / "pipelines.json").read_text(encoding="utf-8"))
VOCABULARIES = {"bytes": FIELDS, "sentencepiece": PIPELINES["sentencepiece"]}
BYTES = [bytes([byte]) for byte in range(256)]


def with_variant(variant, vocabulary="bytes"):
    """The reference ``tokenizer.json`` with the keys of `variant` replaced (as in make.py)."""
    fields = VOCABULARIES[vocabulary]
    return fields | variant | {"model": fields["model"] | variant.get("model", {})}


def write_fields(folder, fields):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(fields), encoding="utf-8")
    return file


def write_folder(folder, files):
    """The files of a folder (as in make_pipelines.py)."""
    for name, content in files.items():
        if name == "tokenizer.json":
            content = with_variant(content[1], content[0])
        if name == "vocab.json":
            model = VOCABULARIES[content]["model"]
            merges = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
            content = model["vocab"]
        (folder / name).write_text(json.dumps(content))
    return folder
