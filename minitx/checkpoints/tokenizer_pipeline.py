"""The pipeline around the model in a ``tokenizer.json``: normalizer, pre-tokenizer, post-processor
and decoder. Steps that minitx does not support raise an error that names them."""

from __future__ import annotations

from pathlib import Path

from minitx.checkpoints.common import abbreviate
from minitx.checkpoints.json_object import JsonObject
from minitx.errors import MinitxError

# GPT-2's pattern in the two equivalent spellings found in files.
_PATTERNS = [
    contractions + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for contractions in ("'s|'t|'re|'ve|'m|'ll|'d", "'(?:[sdmt]|ll|ve|re)")
]


def reject_unknown_keys(file: Path, fields: dict, known: str, where: str) -> None:
    """Rejects a key that is not in `known`, because it may change what the file means."""
    for name in fields:
        if name not in known.split():
            raise MinitxError(f"{file}: {where} has the unknown key {abbreviate(name)}; remove it.")


class Pipeline:
    """`nfc`, `add_prefix_space`, `use_regex`, and `prefix_id`, prepended to every text, or None."""

    def __init__(self, file: Path, fields: dict):
        self.file, self.fields = file, fields
        self.nfc = fields.get("normalizer") is not None
        if self.nfc and fields["normalizer"] != {"type": "NFC"}:
            raise self._unsupported("normalizer", "none or NFC")
        if _type(fields.get("decoder")) != "ByteLevel":
            raise self._unsupported("decoder", "ByteLevel")
        self.add_prefix_space, self.use_regex = self._pre_tokenizer(fields.get("pre_tokenizer"))
        self.prefix_id = self._prefix_id(fields.get("post_processor"))

    def _unsupported(self, name: str, expected: str) -> MinitxError:
        found = abbreviate(self.fields.get(name))
        return MinitxError(f"{self.file}: the {name} must be {expected}, got {found}.")

    def _pre_tokenizer(self, step) -> tuple[bool, bool]:
        """(add_prefix_space, use_regex)."""
        if _type(step) == "ByteLevel":
            return self._byte_level(step)
        pair = step.get("pretokenizers") if _type(step) == "Sequence" else None
        if isinstance(pair, list) and len(pair) == 2 and _is_gpt2_split(pair[0]):
            # Splitting GPT-2's words again changes nothing, so ByteLevel's use_regex is irrelevant.
            # But its add_prefix_space would prepend a space to every single word.
            if _type(pair[1]) == "ByteLevel" and not self._byte_level(pair[1])[0]:
                return False, True
        raise self._unsupported(
            "pre_tokenizer", "ByteLevel, alone or after a Split by GPT-2's pattern"
        )

    def _byte_level(self, step: dict) -> tuple[bool, bool]:
        reject_unknown_keys(
            self.file, step, "type add_prefix_space trim_offsets use_regex", "the pre_tokenizer"
        )
        checked = JsonObject(self.file, step)
        return checked.boolean("add_prefix_space", False), checked.boolean("use_regex", True)

    def _prefix_id(self, step) -> int | None:
        if step is None or _type(step) == "ByteLevel":  # ByteLevel only changes offsets here
            return None
        if _type(step) == "Sequence" and isinstance(step.get("processors"), list):
            ids = [self._prefix_id(part) for part in step["processors"]]
            ids = [id for id in ids if id is not None]
            if len(ids) <= 1:
                return ids[0] if ids else None
        if _type(step) == "TemplateProcessing":
            try:
                special, text = step["single"]
                ids = step["special_tokens"][special["SpecialToken"]["id"]]["ids"]
                if text["Sequence"]["id"] == "A" and [type(id) for id in ids] == [int]:
                    return ids[0]
            except (KeyError, TypeError, ValueError):
                pass  # not the one supported form
        raise self._unsupported(
            "post_processor", "none, ByteLevel, or a TemplateProcessing that prepends one token"
        )


def _type(step):
    return step.get("type") if isinstance(step, dict) else None


def _is_gpt2_split(step) -> bool:
    pattern = step.get("pattern") if _type(step) == "Split" else None
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    # Either the matches are kept as pieces, or the text between matches (none) is removed.
    how = (step.get("behavior"), step.get("invert", False)) if regex else None
    return regex in _PATTERNS and how in (("Isolated", False), ("Removed", True))
