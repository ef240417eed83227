"""Say what a file is that should have been JSON or safetensors: what downloads leave behind."""

import re

from minitx.errors import MinitxError

ENOUGH = 512  # bytes from the start of a file, by which it is recognised

KINDS = (
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "is a Git LFS pointer, which only stands for the file; run 'git lfs pull' in its "
        "repository (with Git LFS installed)",
    ),
    (
        rb"\s*<(!doctype|html|\?xml|head|body|!--)",
        "is a web page (HTML), not the file; download the file itself (such a page is saved when a "
        "login is needed, or if the page that shows a file is saved)",
    ),
    (
        rb"(PK\x03\x04|\x80[\x02-\x05])",
        "is a pickle of PyTorch; opening a pickle can run any code, so minitx never does: save the "
        "model again with transformers' save_pretrained, which writes safetensors",
    ),
    (rb"GGUF", "is a GGUF file; minitx reads Hugging Face folders (config.json, safetensors)"),
    (rb"\Z", "is empty (0 bytes); download it again"),
)


def wrong_file(path, start: bytes) -> MinitxError | None:
    """The error for a file that is not of the expected format and begins with ``start``, if it is
    of a known other kind."""
    for pattern, what in KINDS:
        if re.match(pattern, start[:ENOUGH], re.IGNORECASE):
            return MinitxError(f"{path}: {what}.")
    return None


def not_json(path, text: bytes, error: ValueError) -> MinitxError:
    """The error for a file that is not JSON: what it is instead, or what is wrong with it."""
    found = wrong_file(path, text)
    if found:
        return found
    message = getattr(error, "msg", "")  # of json.JSONDecodeError
    cut_off = message and error.pos >= len(error.doc.rstrip()) or message.startswith("Unterminated")
    hint = "; it ends too early, so download it again" if cut_off else ""
    return MinitxError(f"{path}: is not valid JSON ({error}){hint}.")
