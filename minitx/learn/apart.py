"""Judge a student's file in a process of its own, with a limit on time and memory: an endless loop
costs some seconds, not the terminal, and nobody's code runs in the process that grades others.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minitx.learn.exercise import Exercise
from minitx.learn.verdict import Verdict

MEGABYTES = 4096.0
ROOT = Path(__file__).resolve().parents[2]


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
        out = Path(folder) / "verdict.json"
        order = dict(
            exercise=exercise.stem, path=str(path.resolve()), seed=seed, out=str(out), shown=shown
        )
        order |= dict(seconds=seconds, megabytes=megabytes)
        ended = run_limited(json.dumps(order), seconds, None if shown else folder)
        try:
            found = json.loads(out.read_bytes())
            return Verdict.from_dict(found["verdict"]), found["shown"]
        except (OSError, ValueError, KeyError, TypeError):
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
    try:
        return child.wait(2 * seconds + 5)  # the processor time has its own limit; 5: to begin
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(child, quiet)


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
    return Verdict("error", "It ended the whole process (sys.exit, os._exit) instead of returning.")


# In the process ----------------------------------------------------------------------------------


def main() -> None:
    from minitx.learn.exercise import find_exercise

    wanted = json.loads(sys.argv[1])
    limit_resources(wanted["seconds"], wanted["megabytes"])
    verdict, shown = run_here(find_exercise(wanted["exercise"]), wanted)
    text = json.dumps({"verdict": verdict.as_dict(), "shown": shown})
    out = Path(wanted["out"])
    out.with_suffix(".tmp").write_text(text, "utf-8")
    out.with_suffix(".tmp").replace(out)


def run_here(exercise: Exercise, wanted: dict) -> tuple[Verdict, str]:
    from minitx.learn.answer import read_answer
    from minitx.learn.check import judge
    from minitx.learn.in_model import demonstration

    path = Path(wanted["path"])
    sys.path.insert(0, str(path.parent))  # as if the file were run
    try:
        answer, trouble = read_answer(exercise, path)
        verdict = trouble or judge(exercise, answer, wanted["seed"])
        if verdict.passed and wanted["shown"]:
            return verdict, demonstration(exercise, answer)
        return verdict, ""
    except MemoryError:
        limit = f"{wanted['megabytes']:,.0f} MB"
        return Verdict("limit", f"It needs more memory than the {limit} that it may have."), ""


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
