"""Measure in a process of its own: what fails, takes too long or needs too much memory costs its
own figures only. A forked process shares the model's arrays with this one."""

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator

from minitx.errors import MinitxError, abbreviate


class Lost(Exception):
    """The process did not finish; the message says why."""


def in_own_process(task: Callable[[], Iterator[dict]], time_limit: float) -> Iterator[dict]:
    """What ``task()`` yields, as JSON has it (tuples become lists). Raises Lost if that takes more
    than ``time_limit`` seconds in all, or if the process dies. Where there is no fork, the task
    runs here, without a limit."""
    if "fork" not in multiprocessing.get_all_start_methods():
        yield from (json.loads(json.dumps(found)) for found in task())
        return
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(task, theirs))
    end = time.monotonic() + time_limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # BLAS threads, which the child renews
        process.start()
    theirs.close()
    try:
        while True:
            if not mine.poll(max(end - time.monotonic(), 0)):
                raise Lost(f"given up after {time_limit:g} s; see --time-limit.")
            if (found := json.loads(mine.recv_bytes())) is None:
                return
            yield found
    except EOFError:
        raise Lost("its process ended without a result; was there too little memory?") from None
    finally:
        process.kill()
        process.join()
        mine.close()


def send(task: Callable[[], Iterator[dict]], pipe) -> None:
    try:
        for found in task():
            pipe.send_bytes(json.dumps(found).encode())
        pipe.send_bytes(json.dumps(None).encode())
    except KeyboardInterrupt:
        os._exit(130)  # the parent says that it was stopped


def reason_of(error: Exception) -> str:
    """Why a technique has no figures: it does not fit, or it has a bug, which must not cost the
    others' figures."""
    if isinstance(error, MinitxError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory for it."
    return f"failed: {type(error).__name__}: {abbreviate(str(error))}"
