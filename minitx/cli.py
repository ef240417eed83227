"""The ``minitx`` command: text and tables go to stdout, figures about the run to stderr.

Bad input gives one sentence on stderr and exit status 2. arguments.py declares the arguments,
commands.py does the work.
"""

import sys

from minitx import progress
from minitx.arguments import read_arguments
from minitx.errors import MinitxError, one_line
from minitx.exit_status import (
    BAD_INPUT,
    CLOSED_PIPE,
    INTERRUPTED,
    drop_output,
    notes_on_stderr,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0; 1 if ``check`` found a bug; 2 for bad input;
    3 if ``train`` stopped early; 130 for Ctrl-C; 141 for a closed pipe."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
    try:
        args = read_arguments(arguments)
        with notes_on_stderr():
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


def fail(message: str, status: int) -> int:
    progress.close_all()
    progress.say(f"minitx: {one_line(message)}")
    return status
