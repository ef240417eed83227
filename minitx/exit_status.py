"""How a command ends: its exit status, notes as single lines, and ``run_module`` for the commands
that are started as ``python -m minitx...``. (cli.py is the ``minitx`` command.)"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minitx import progress
from minitx.errors import MinitxError, MinitxWarning

BAD_INPUT = 2
INTERRUPTED, CLOSED_PIPE = 130, 141  # as in a shell: 128 + the signal number


def run_module(parser: argparse.ArgumentParser, run: Callable[[], None]) -> None:
    """``run()``. Exits with one sentence for bad input, after Ctrl-C, and if whoever reads the
    output (head, less) has seen enough."""
    try:
        with notes_on_stderr():
            run()
        if sys.stdout:
            sys.stdout.flush()  # now, while a closed pipe can still be noticed
    except MinitxError as error:
        progress.close_all()
        parser.error(str(error))
    except KeyboardInterrupt:
        progress.close_all()
        parser.exit(INTERRUPTED, "stopped.\n")
    except BrokenPipeError:
        drop_output()
        parser.exit(CLOSED_PIPE)
    except OSError as error:
        drop_output()
        parser.error(f"{error.filename or 'output'}: {error.strerror or error}.")


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Show every note of minitx inside the ``with`` block as one line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", MinitxWarning)
        warnings.showwarning = show_once()
        yield


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


def drop_output() -> None:
    """Flush the output or, if that fails, drop it: Python would try again at exit."""
    try:
        if sys.stdout:  # None if it was closed from the start
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
