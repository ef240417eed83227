"""The processes that train, and the one that orders them about.

Each worker is a fresh interpreter that computes on one thread: a batch is cut finely enough to
keep every core busy, and BLAS's own threads would only be in the way. See worker.py for its work.
"""

import multiprocessing
import os
import signal
import traceback
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from threading import BrokenBarrierError

from minitx.errors import MinitxError
from minitx.threads import ONE_THREAD
from minitx.training.recipe import Recipe
from minitx.training.worker import Memory, Worker

SETTINGS = ONE_THREAD | {  # environment of a worker
    # glibc gives freed memory back to the system, and a training step takes the same again at once:
    # keeping it saves 5 to 10 % of the time (on other systems nothing reads these).
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


def work(rank: int, workers: int, recipe: Recipe, memory: Memory, barrier, taken, pipe) -> None:
    """The life of a worker: do what the pipe says, until it says None or breaks."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C is for the first process to act upon
        signal.signal(number, signal.SIG_IGN)
    try:
        worker = Worker(rank, workers, recipe, memory, barrier, taken)
        while (order := pipe.recv()) is not None:
            name, *arguments = order
            pipe.send((getattr(worker, name)(*arguments), None))
    except (EOFError, OSError):
        return  # the first process is gone
    except BrokenBarrierError:
        return  # another worker failed, and has said why
    except Exception as error:
        if not isinstance(error, MinitxError):  # a defect: say where, which pickling would lose
            error = RuntimeError(traceback.format_exc())
        pipe.send((None, error))
        barrier.abort()


class Team:
    """The workers, for the length of a ``with`` block."""

    def __init__(self, workers: int, recipe: Recipe, memory: Memory):
        # A fresh interpreter each: a copy of this one would keep its BLAS threads.
        context = multiprocessing.get_context("spawn")
        # Kept, since the system drops them with their last owner.
        self.barrier, self.taken = context.Barrier(workers), context.Value("i", 0)
        self.pipes, self.processes = [], []
        with environment(SETTINGS):
            for rank in range(workers):
                mine, theirs = context.Pipe()
                shared = memory, self.barrier, self.taken
                arguments = rank, workers, recipe, *shared, theirs
                process = context.Process(target=work, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(mine)
                self.processes.append(process)

    def ask(self, *order) -> list:
        """Give all workers the same order; returns their answers by rank.

        An error in a worker is raised here, and then the team is of no more use.
        """
        self.taken.value = 0
        for pipe in self.pipes:
            with suppress(OSError):  # that it is gone is noticed below
                pipe.send(order)
        answers: dict[int, object] = {}
        while len(answers) < len(self.pipes):
            missing = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            # All that is there is read before anything is raised: when one worker fails the others
            # end too, and its error is the one to tell.
            errors, gone = [], []
            for pipe in wait(missing):
                rank = self.pipes.index(pipe)
                try:
                    answers[rank], error = pipe.recv()
                    errors += [error] if error else []
                except (EOFError, OSError):
                    gone.append(rank)
            if errors:
                raise errors[0]
            if gone:
                raise MinitxError(
                    f"Worker process {gone[0]} ended by itself (out of memory?); "
                    "train again to go on from the last checkpoint."
                )
        return [answers[rank] for rank in range(len(self.pipes))]

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, failed, *_) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            if failed:
                process.kill()  # it may wait for another that is gone
            else:
                with suppress(OSError):
                    pipe.send(None)
        for process in self.processes:
            process.join()


@contextmanager
def environment(settings: dict[str, str]):
    """Processes started in this block have these environment variables."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
