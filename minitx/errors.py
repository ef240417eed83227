"""What minitx raises for bad input, and how it warns: one clear sentence instead of a traceback."""


class MinitxError(ValueError):
    """Bad input. The message is one sentence: what was expected, what was found, what to do.

    The command line prints it and exits with status 2; in Python it is a ``ValueError``.
    """


class MinitxWarning(UserWarning):
    """Something that runs as asked but will mislead or disappoint: a check that costs more than it
    can save, a model measured on text that it never learned. Raised by ``warnings.warn``; the
    command line prints it on stderr as "minitx: note: ..." and goes on.
    """
