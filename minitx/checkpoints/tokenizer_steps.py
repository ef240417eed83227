"""The steps around the model in a ``tokenizer.json``: normalizer, pre-tokenizer, post-processor and
decoder. Read here, and refused by name where they ask for something that minitx does not do."""

from __future__ import annotations

from pathlib import Path

from minitx.checkpoints.common import short
from minitx.checkpoints.fields import Fields
from minitx.errors import MinitxError

# GPT-2's pattern as the files spell it; both spellings mean the same.
_PATTERNS = [
    contractions + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for contractions in ("'s|'t|'re|'ve|'m|'ll|'d", "'(?:[sdmt]|ll|ve|re)")
]


def only(file: Path, fields: dict, known: str, where: str) -> None:
    """Refuse a key that is not in `known`, for it may change what the file means."""
    for name in fields:
        if name not in known.split():
            raise MinitxError(
                f"{file}: {where} has {short(name)}, which minitx does not know; remove it."
            )


class TokenizerSteps:
    """`nfc`, `add_prefix_space`, `use_regex`, and `first_id`: put before every text, or None."""

    def __init__(self, file: Path, fields: dict):
        self.file, self.fields = file, fields
        self.nfc = fields.get("normalizer") is not None
        if self.nfc and fields["normalizer"] != {"type": "NFC"}:
            raise self._refused("normalizer", "none or NFC")
        if _type(fields.get("decoder")) != "ByteLevel":
            raise self._refused("decoder", "ByteLevel")
        self.add_prefix_space, self.use_regex = self._pre_tokenizer(fields.get("pre_tokenizer"))
        self.first_id = self._first_id(fields.get("post_processor"))

    def _refused(self, name: str, needed: str) -> MinitxError:
        found = short(self.fields.get(name))
        return MinitxError(f"{self.file}: the {name} is {found}; expected {needed}.")

    def _pre_tokenizer(self, step) -> tuple[bool, bool]:
        """(add_prefix_space, use_regex)."""
        if _type(step) == "ByteLevel":
            return self._byte_level(step)
        pair = step.get("pretokenizers") if _type(step) == "Sequence" else None
        if isinstance(pair, list) and len(pair) == 2 and _is_gpt2_split(pair[0]):
            # GPT-2's split leaves its own words whole, so whether ByteLevel splits again is all
            # the same; but it would put a prefix space before every single word.
            if _type(pair[1]) == "ByteLevel" and not self._byte_level(pair[1])[0]:
                return False, True
        raise self._refused("pre_tokenizer", "ByteLevel, alone or after a Split by GPT-2's pattern")

    def _byte_level(self, step: dict) -> tuple[bool, bool]:
        only(self.file, step, "type add_prefix_space trim_offsets use_regex", "the pre_tokenizer")
        checked = Fields(self.file, step)
        return checked.flag("add_prefix_space", False), checked.flag("use_regex", True)

    def _first_id(self, step) -> int | None:
        if step is None or _type(step) == "ByteLevel":  # ByteLevel only moves offsets here
            return None
        if _type(step) == "Sequence" and isinstance(step.get("processors"), list):
            firsts = [self._first_id(part) for part in step["processors"]]
            firsts = [id for id in firsts if id is not None]
            if len(firsts) <= 1:
                return firsts[0] if firsts else None
        if _type(step) == "TemplateProcessing":
            try:
                special, text = step["single"]
                ids = step["special_tokens"][special["SpecialToken"]["id"]]["ids"]
                if text["Sequence"]["id"] == "A" and [type(id) for id in ids] == [int]:
                    return ids[0]
            except (KeyError, TypeError, ValueError):
                pass  # not of the one form that is understood
        raise self._refused(
            "post_processor", "none, ByteLevel, or a TemplateProcessing that puts one token first"
        )


def _type(step):
    return step.get("type") if isinstance(step, dict) else None


def _is_gpt2_split(step) -> bool:
    pattern = step.get("pattern") if _type(step) == "Split" else None
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    # Either the matches are the pieces, or what is not matched (nothing) is removed.
    how = (step.get("behavior"), step.get("invert", False)) if regex else None
    return regex in _PATTERNS and how in (("Isolated", False), ("Removed", True))
