"""The ``minitx`` command: text and tables go to stdout, figures about the run to stderr.

Whatever is wrong with the input becomes one sentence on stderr and status 2. Which arguments there
are is in arguments.py, what the commands do in commands.py.
"""

import os
import sys

from minitx import commands
from minitx.arguments import read_arguments
from minitx.errors import MinitxError

BAD_INPUT = 2
INTERRUPTED, CLOSED_PIPE = 130, 141  # as a shell has it: 128 and the number of the signal


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0; 1 if ``check`` found a bug; 2 for bad input;
    3 if ``train`` stopped before its end; 130 for Ctrl-C, 141 if nobody reads on."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for what the terminal's encoding does not have
    try:
        args = read_arguments(arguments)
        status = args.run(args) or 0
        if sys.stdout:
            sys.stdout.flush()  # now, while a fault can still be reported
        return status
    except MinitxError as error:
        return fail(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        return fail("stopped.", INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) has seen enough, which is no fault
        drop_output()
        return CLOSED_PIPE
    except OSError as error:
        drop_output()
        return fail(f"{error.filename or 'output'}: {error.strerror or error}.", BAD_INPUT)
    except MemoryError:
        return fail("there is not enough memory for this.", BAD_INPUT)


def fail(message: str, status: int) -> int:
    commands.print_figures(f"minitx: {message}")
    return status


def drop_output() -> None:
    """Write what was printed or, if it cannot be, drop it: Python would try again when it ends."""
    try:
        if sys.stdout:  # None if it was closed from the beginning
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
