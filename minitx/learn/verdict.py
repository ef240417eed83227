"""What the checker says about an answer."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Verdict:
    """kind: what was found, one of KINDS. message: one or two sentences for the student. mistakes:
    the sentences of the named mistakes. figures: numbers of an open exercise, for a ranking."""

    kind: str
    message: str
    mistakes: tuple[str, ...] = ()
    figures: dict[str, float] | None = None

    @property
    def passed(self) -> bool:
        return self.kind == "passed"

    def as_dict(self) -> dict:
        return asdict(self) | {"passed": self.passed, "mistakes": list(self.mistakes)}

    @classmethod
    def from_dict(cls, found: dict) -> "Verdict":
        """ValueError, KeyError or TypeError if ``found`` is not from ``as_dict``."""
        if found["kind"] not in KINDS or not isinstance(found["message"], str):
            raise ValueError("no verdict")
        return cls(found["kind"], found["message"], tuple(found["mistakes"]), found["figures"])


KINDS = {
    "passed": "right on every case",
    "not written": "still a hole",
    "mistake": "wrong, and the mistake has a name",
    "wrong": "wrong in some other way",
    "form": "the wrong shape or type, NaN, or an input that was changed",
    "error": "an exception, or a file that cannot be read or run",
    "limit": "stopped: it took too long or too much memory",
}
