"""What minitx raises for bad input, and how it warns: one clear sentence instead of a traceback."""

from collections.abc import Iterable


class MinitxError(ValueError):
    """Bad input. The message is one sentence: what was expected, what was found, what to do.

    The command line prints it and exits with status 2; in Python it is a ``ValueError``.
    """


class MinitxWarning(UserWarning):
    """Something that runs as asked but will mislead or disappoint: a check that costs more than it
    can save, a model measured on text that it never learned. Raised by ``warnings.warn``; the
    command line prints it on stderr as "minitx: note: ..." and goes on.
    """


def abbreviate(value) -> str:
    """A value as one ASCII line of at most 60 characters, for an error message."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """How the refusal of an unknown word ends: "did you mean 'full'?" if a known word is like it,
    otherwise "expected one of full, ...". Upper case, ``_`` for ``-`` and missing ends do not
    matter."""
    found = nearest(word, known)
    return f"did you mean {found!r}?" if found else f"expected one of {', '.join(known)}."


def one_of(word: str, known: Iterable[str]) -> str:
    """The same for a short list, which is told in any case: "expected one of tiny, full. Did you
    mean 'full'?"."""
    found = nearest(word, known)
    return f"expected one of {', '.join(known)}." + (f" Did you mean {found!r}?" if found else "")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like this one, or None."""
    from difflib import get_close_matches  # imported late: only for a refusal

    def plain(name: str) -> str:
        return name.lower().replace("-", "_").strip("_")

    by_plain = {plain(name): name for name in known}
    wanted = plain(word[:60])  # comparing takes time that grows with the length
    near = get_close_matches(wanted, by_plain, n=1)
    near += [name for name in by_plain if len(wanted) > 1 and name.startswith(wanted)]
    return by_plain[near[0]] if near else None
