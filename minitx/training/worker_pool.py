"""The pool of worker processes, and the calls that the main process makes to them.

Each worker is a fresh interpreter that computes on one thread: a batch is split finely enough to
keep every core busy, and more BLAS threads would only compete for cores. See worker.py for the
work.
"""

import multiprocessing
import os
import signal
import traceback
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from threading import BrokenBarrierError

from minitx.errors import MinitxError
from minitx.fast import ONE_THREAD
from minitx.training.recipe import Recipe
from minitx.training.worker import SharedArrays, Worker

WORKER_ENVIRONMENT = ONE_THREAD | {
    # By default glibc returns freed memory to the system, and the next training step allocates the
    # same again: keeping it saves 5 to 10 % of the time (other systems ignore these variables).
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


def run_worker(
    rank: int, workers: int, recipe: Recipe, shared: SharedArrays, barrier, next_shard, pipe
) -> None:
    """Main function of a worker process: answer calls from the pipe until None or end of file."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process handles Ctrl-C
        signal.signal(number, signal.SIG_IGN)
    try:
        worker = Worker(rank, workers, recipe, shared, barrier, next_shard)
        while (call := pipe.recv()) is not None:
            name, *arguments = call
            pipe.send((getattr(worker, name)(*arguments), None))
    except (EOFError, OSError):
        return  # the main process has ended
    except BrokenBarrierError:
        return  # another worker failed and reports the error
    except Exception as error:
        if not isinstance(error, MinitxError):  # a bug: send the traceback, which pickling drops
            error = RuntimeError(traceback.format_exc())
        pipe.send((None, error))
        barrier.abort()


class WorkerPool:
    """Worker processes for the duration of a ``with`` block."""

    def __init__(self, workers: int, recipe: Recipe, shared: SharedArrays):
        # Spawned, not forked: a fork would inherit this process's BLAS threads.
        context = multiprocessing.get_context("spawn")
        # Keep references: these are released when garbage-collected.
        self.barrier, self.next_shard = context.Barrier(workers), context.Value("i", 0)
        self.pipes, self.processes = [], []
        with environment(WORKER_ENVIRONMENT):
            for rank in range(workers):
                mine, theirs = context.Pipe()
                arguments = rank, workers, recipe, shared, self.barrier, self.next_shard, theirs
                process = context.Process(target=run_worker, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(mine)
                self.processes.append(process)

    def call(self, method: str, *arguments) -> list:
        """Call a method of ``Worker`` in all workers; returns their results by rank.

        An error in a worker is raised here, and the pool cannot be used any more.
        """
        self.next_shard.value = 0
        for pipe in self.pipes:
            with suppress(OSError):  # a dead worker is noticed below
                pipe.send((method, *arguments))
        results: dict[int, object] = {}
        while len(results) < len(self.pipes):
            missing = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            # Read from all workers that are ready before raising: when one worker fails the others
            # end too, and its error is the one to report.
            errors, dead = [], []
            for pipe in wait(missing):
                rank = self.pipes.index(pipe)
                try:
                    results[rank], error = pipe.recv()
                    errors += [error] if error else []
                except (EOFError, OSError):
                    dead.append(rank)
            if errors:
                raise errors[0]
            if dead:
                raise MinitxError(
                    f"Worker process {dead[0]} ended unexpectedly (out of shared?); "
                    "run the command again to resume from the last checkpoint."
                )
        return [results[rank] for rank in range(len(self.pipes))]

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, failed, *_) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            if failed:
                process.kill()  # it may wait for a dead worker
            else:
                with suppress(OSError):
                    pipe.send(None)
        for process in self.processes:
            process.join()


@contextmanager
def environment(settings: dict[str, str]):
    """Set environment variables within a block, for the processes that it starts."""
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
