"""The error that minitx raises for bad input: one clear sentence instead of a traceback."""


class MinitxError(ValueError):
    """Bad input. The message is one sentence: what was expected, what was found, what to do.

    The command line prints it and exits with status 2; in Python it is a ``ValueError``.
    """
