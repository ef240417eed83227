"""For stores that live as long as a model: threads that use one model take turns."""

import os
import threading


class Turns:
    """``with turns:`` one thread at a time; a thread that is inside may enter again. A copy, and a
    forked process (which has not the thread that may hold it), has its own."""

    def __init__(self):
        self.locks: dict[int, threading.RLock] = {}  # by process

    def __enter__(self) -> None:
        self.locks.setdefault(os.getpid(), threading.RLock()).acquire()

    def __exit__(self, *error) -> None:
        self.locks[os.getpid()].release()

    def __reduce__(self):
        return Turns, ()
