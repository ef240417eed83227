"""The ``minitx`` command: text and tables go to stdout, figures about the run to stderr.

Bad input gives one sentence on stderr and exit status 2. arguments.py declares the arguments,
commands.py does the work.
"""

import os
import sys
import warnings

from minitx import progress
from minitx.arguments import read_arguments
from minitx.errors import MinitxError, MinitxWarning, one_line

BAD_INPUT = 2
INTERRUPTED, CLOSED_PIPE = 130, 141  # as in a shell: 128 + the signal number


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0; 1 if ``check`` found a bug; 2 for bad input;
    3 if ``train`` stopped early; 130 for Ctrl-C; 141 for a closed pipe."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
    try:
        args = read_arguments(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("always", MinitxWarning)
            warnings.showwarning = show_once()
            status = args.run(args) or 0
        if sys.stdout:
            sys.stdout.flush()  # now, while an error can still be reported
        return status
    except MinitxError as error:
        return fail(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        return fail("stopped.", INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) has seen enough: not an error
        drop_output()
        return CLOSED_PIPE
    except OSError as error:
        drop_output()
        return fail(f"{error.filename or 'output'}: {error.strerror or error}.", BAD_INPUT)
    except MemoryError:
        return fail("there is not enough memory for this.", BAD_INPUT)


def show_once():
    """``show_warning``, once for each message: a sweep may repeat it for every setting."""
    shown = set()

    def show(message, *rest, **more) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            show_warning(message, *rest, **more)

    return show


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Notes of minitx as one line on stderr; other warnings as Python prints them."""
    if issubclass(category, MinitxWarning):
        progress.say(f"minitx: note: {message}")
    elif sys.stderr:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def fail(message: str, status: int) -> int:
    progress.close_all()
    progress.say(f"minitx: {one_line(message)}")
    return status


def drop_output() -> None:
    """Flush the output or, if that fails, drop it: Python would try again at exit."""
    try:
        if sys.stdout:  # None if it was closed from the start
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
