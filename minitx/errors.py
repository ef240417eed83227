"""What minitx raises for bad input, and how it warns: one clear sentence instead of a traceback.

A message may quote anything that was found in a file or given as an argument: megabytes of digits,
line breaks, escape sequences that would repaint the terminal. ``MinitxError`` and ``MinitxWarning``
make one line of bounded length of whatever they are given, so no place that raises one has to
think of it. ``abbreviate`` shortens a single value, so that the rest of the sentence is kept.
"""

from collections.abc import Iterable

LONGEST_MESSAGE, LONGEST_VALUE = 400, 60  # characters


class MinitxError(ValueError):
    """Bad input. The message is one sentence: what was expected, what was found, what to do.

    The command line prints it and exits with status 2; in Python it is a ``ValueError``.
    """

    def __init__(self, message: str = ""):
        super().__init__(one_line(message))


class MinitxWarning(UserWarning):
    """Something that runs as asked but will mislead or disappoint: a check that costs more than it
    can save, a model measured on text that it never learned. Raised by ``warnings.warn``; the
    command line prints it on stderr as "minitx: note: ..." and goes on.
    """

    def __init__(self, message: str = ""):
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """The message as one printable line of at most 400 characters. Control characters are escaped
    (``\\n``, ``\\x1b``); of a longer message the middle is left out: its end says what to do."""
    text = _without_middle(str(message))
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _without_middle("".join(escaped))


def _without_middle(text: str) -> str:
    if len(text) <= LONGEST_MESSAGE:
        return text
    half = (LONGEST_MESSAGE - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def abbreviate(value) -> str:
    """A value as one ASCII line of at most 60 characters, for a message. Of a huge value only the
    beginning is looked at."""
    text = " ".join(_beginning(value).split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _beginning(value, levels: int = 3) -> str:
    """``ascii(value)``, but of no more of it than a message can show; raises nothing."""
    if isinstance(value, str | bytes):
        return ascii(value[: LONGEST_VALUE + 1])
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print a long one
    if type(value) in (list, tuple, dict):
        if levels == 0:
            return "..."
        items = value.items() if type(value) is dict else value
        items = [item for item, _ in zip(items, range(LONGEST_VALUE // 2))]
        if type(value) is dict:
            pairs = ((_beginning(k, 0), _beginning(v, levels - 1)) for k, v in items)
            return "{" + ", ".join(map(": ".join, pairs)) + "}"
        words = ", ".join(_beginning(item, levels - 1) for item in items)
        return f"[{words}]" if type(value) is list else f"({words}{',' * (len(items) == 1)})"
    try:
        return ascii(value)
    except Exception:  # whatever a foreign __repr__ raises
        return f"a {type(value).__name__}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """How the refusal of an unknown word ends: "did you mean 'full'?" if a known word is like it,
    otherwise "expected one of full, ...". Upper case, ``_`` for ``-`` and missing ends do not
    matter."""
    found = nearest(word, known)
    return f"did you mean {found!r}?" if found else f"expected one of {', '.join(known)}."


def one_of(word: str, known: Iterable[str]) -> str:
    """For a short list, always given in full: "expected one of tiny, full. Did you
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
