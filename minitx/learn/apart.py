"""Judge a student's file in a process of its own, with a limit on time and memory: an endless loop
costs some seconds, not the terminal, and nobody's code runs in the process that grades others.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from minitx.checkpoints.common import read
from minitx.errors import abbreviate
from minitx.learn.answer import read_answer
from minitx.learn.check import judge, text_of
from minitx.learn.exercise import Exercise, find_exercise
from minitx.learn.in_model import demonstration
from minitx.learn.verdict import Verdict

MEGABYTES = 4096.0
MOST_BYTES = 2**24  # of a verdict, with what the answer shows
INTERRUPTED, OUT_OF_MEMORY = 130, 137  # exit statuses, as shells have them
ROOT = Path(__file__).resolve().parents[2]
RUNNING = []  # (process, has it a group of its own?), of all threads


def judge_apart(
    exercise: Exercise,
    path: Path,
    seed: int = 0,
    seconds: float | None = None,
    megabytes: float = MEGABYTES,
    shown: bool = True,
) -> tuple[Verdict, str]:
    """(verdict, what the answer does in a model if it passed).

    seconds: the limit; default: the exercise's own.
    shown: let the student's own prints through, and run the answer in a model; False, for grading,
    does neither."""
    seconds = exercise.seconds if seconds is None else seconds
    with tempfile.TemporaryDirectory(prefix="minitx-learn-") as folder:
        path = Path(os.path.abspath(path))
        beside = path.parent
        if not shown:  # a copy: no submission is changed by what runs in it
            path = Path(shutil.copyfile(path, Path(folder) / path.name))
        out, order, token = Path(folder) / "verdict.json", Path(folder) / "order.json", token_hex()
        wanted = dict(
            exercise=exercise.stem,
            path=str(path),
            beside=str(beside),
            seed=seed,
            out=str(out),
        )
        wanted |= dict(shown=shown, seconds=seconds, megabytes=megabytes, token=token)
        order.write_text(json.dumps(wanted), "utf-8")
        ended = run_limited(str(order), seconds, None if shown else folder)
        try:
            found = json.loads(read(out, MOST_BYTES))
            if found["token"] != token or not isinstance(found["shown"], str):
                raise ValueError("the answer wrote this, not main")
            return Verdict.from_dict(found["verdict"]), found["shown"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return lost(ended, seconds, megabytes), ""


def run_limited(order: str, seconds: float, quiet_in: str | None) -> int | None:
    """Run the child; its exit status, or None if it took too long and was ended. quiet_in: the
    folder in which it runs without a terminal; None: where we are, with ours."""
    quiet = quiet_in is not None
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # "" is the current folder, in which a student's numpy.py would be found before NumPy.
    begin = f"import sys; sys.path = [*filter(None, sys.path), {str(ROOT)!r}]; "
    output = subprocess.DEVNULL if quiet else None
    child = subprocess.Popen(
        [sys.executable, "-c", f"{begin}from minitx.learn.apart import main; main()", order],
        env=os.environ | threads,
        cwd=quiet_in,
        stdin=subprocess.DEVNULL if quiet else None,
        stdout=output,
        stderr=output,
        start_new_session=quiet,  # a student at the terminal may want to press Ctrl-C or debug
    )
    RUNNING.append((child, quiet))
    try:
        return child.wait(2 * seconds + 5)  # the processor time has its own limit; 5: to begin
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(child, quiet)
        RUNNING.remove((child, quiet))


def end_running() -> None:
    """End all processes that judge answers now: whoever presses Ctrl-C does not want to wait."""
    for child, own_group in list(RUNNING):
        end(child, own_group)


def end(child: subprocess.Popen, own_group: bool) -> None:
    """End the process, and in a group of its own also those that it has started."""
    try:
        if own_group and hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        elif child.poll() is None:
            child.kill()
    except ProcessLookupError:
        pass  # it has ended, with all others
    child.wait()


def lost(ended: int | None, seconds: float, megabytes: float) -> Verdict:
    """The verdict on a process that left none."""
    slow = ended is None or -ended == getattr(signal, "SIGXCPU", None)
    if slow:
        message = f"It did not finish within {seconds:g} s; is there an endless loop?"
        return Verdict("limit", message)
    if ended and ended < 0:
        message = f"It was ended by signal {-ended}; was it out of its {megabytes:,.0f} MB?"
        return Verdict("limit", message)
    if ended == OUT_OF_MEMORY:
        return too_large(megabytes)
    if ended == INTERRUPTED:
        return Verdict(
            "error", "It was interrupted: Ctrl-C, or your code raised KeyboardInterrupt."
        )
    return Verdict("error", "It ended the whole process (sys.exit, os._exit) instead of returning.")


def too_large(megabytes: float) -> Verdict:
    return Verdict("limit", f"It needs more memory than the {megabytes:,.6g} MB that it may have.")


# In the process ----------------------------------------------------------------------------------


def main() -> None:
    order = Path(sys.argv.pop())
    wanted = json.loads(read(order, MOST_BYTES))
    order.unlink()  # so that an answer finds no token, with which it could write its own verdict
    exercise = find_exercise(wanted["exercise"])  # imports all that is needed, before the limits
    limit_resources(wanted["seconds"], wanted["megabytes"])
    try:
        verdict, shown = run_here(exercise, wanted)
        text = json.dumps({"token": wanted["token"], "verdict": verdict.as_dict(), "shown": shown})
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    out = Path(wanted["out"])
    try:
        out.with_suffix(".tmp").write_text(text, "utf-8")
        out.with_suffix(".tmp").replace(out)
    except OSError:  # the answer has put something in its place
        os._exit(1)
    with suppress(Exception):  # an answer may have closed them
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # without waiting for threads that the answer has started


def run_here(exercise: Exercise, wanted: dict) -> tuple[Verdict, str]:
    path = Path(wanted["path"])
    sys.path.insert(0, wanted["beside"])  # as if the file were run
    sys.dont_write_bytecode = True  # into the student's folder
    try:
        answer, trouble = read_answer(exercise, path)
        verdict = trouble or judge(exercise, answer, wanted["seed"])
        if verdict.passed and wanted["shown"]:
            return verdict, demonstration(exercise, answer)
        return verdict, ""
    except MemoryError:
        return too_large(wanted["megabytes"]), ""
    except Exception as error:  # of the checker: the answer has changed what it needs
        what = f"{type(error).__name__}: {abbreviate(text_of(error))[1:-1]}"
        message = f"The checker broke on it ({what}). Does it change NumPy, or Python itself?"
        return Verdict("error", message), ""


def limit_resources(seconds: float, megabytes: float) -> None:
    """Where the operating system can: processor time, and address space."""
    try:
        import resource
    except ImportError:  # Windows
        return
    spent = time.process_time()  # to start Python
    for kind, most in (("RLIMIT_CPU", spent + seconds + 1), ("RLIMIT_AS", megabytes * 1e6)):
        _, hard = resource.getrlimit(getattr(resource, kind))
        most = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
        try:
            resource.setrlimit(getattr(resource, kind), (most, hard))
        except (ValueError, OSError):
            pass  # macOS refuses a limit on address space
