"""The one error that minitx raises for bad input: a single clear sentence, never a traceback."""


class MinitxError(ValueError):
    """Bad input. The message is one sentence: what was found, what is needed, what to do.

    The command line prints it and leaves with status 2; in Python it is an ordinary ``ValueError``.
    """
