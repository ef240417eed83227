"""The steps of a ``tokenizer.json``: null, an object with a "type", or a Sequence of steps."""

from __future__ import annotations

from pathlib import Path

from minitx.checkpoints.json_object import JsonObject
from minitx.errors import MinitxError, abbreviate


class Step(JsonObject):
    """One step; `kind` says which part of the pipeline it belongs to ("normalizer")."""

    def __init__(self, file: Path, kind: str, fields: dict):
        super().__init__(f"{file}: {kind}", fields)
        self.kind = kind

    @property
    def type(self) -> str:
        return self.fields["type"]

    def unsupported(self, expected: str) -> MinitxError:
        return MinitxError(
            f"{self.path} {abbreviate(self.fields)} is not supported; expected {expected}."
        )


def steps(file: Path, kind: str, step, members: str) -> list[Step]:
    """The steps in `step`, however deeply its Sequences are nested; none for null.

    members: the field of a Sequence that lists its steps ("normalizers").
    """
    if step is None:
        return []
    if not (isinstance(step, dict) and isinstance(step.get("type"), str)):
        raise MinitxError(f"{file}: {kind} {abbreviate(step)} must be an object with a type.")
    if step["type"] != "Sequence":
        return [Step(file, kind, step)]
    parts = step.get(members)
    if not isinstance(parts, list):
        raise MinitxError(f"{file}: {kind} {abbreviate(step)} must have a list of {members}.")
    return [found for part in parts for found in steps(file, kind, part, members)]
