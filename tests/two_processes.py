"""Run the whole suite in two processes, reported as one: one process takes test files from the
front, the other from the back, until they meet.

Only the first file (``FIRST``) is run before the second process begins, so that with -x a mistake
in the fundamentals is reported by their own test.

A process claims a file (a very long one in pieces) by creating a directory of its name, so no file
runs twice. The second process writes what happens in it to a file, line by line. The first reads
those lines and reports them as its own: every test appears once, in one list and one summary, and a
failure anywhere is a failure of the suite. So is a test that neither process has finished.

Shared is a run of everything, with any options that do not choose tests (-v, -x, --durations ...).
A run of chosen files or tests, or in a debugger, is a usual run in one process; so is ``pytest
tests``.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

CLAIMS = "MINITX_TEST_CLAIMS"  # environment variable: the folder of claims, for the second process
FIRST = "test_fundamentals.py"
PATIENCE = 10  # seconds for the second process to end after it was interrupted
FINE = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
# Options that choose tests or their order, only list something, or need the terminal.
ALONE = (
    *("file_or_dir", "keyword", "markexpr", "lf", "failedfirst", "newfirst", "stepwise"),
    *("deselect", "collectonly", "showfixtures", "show_fixtures_per_test", "usepdb", "trace"),
    *("setuponly", "setupshow", "setupplan", "numprocesses"),
)


def share(config):
    """The pytest plugin for this process, or None if the suite is not shared."""
    if CLAIMS in os.environ:
        return Second(config, Path(os.environ[CLAIMS]))
    alone = any(getattr(config.option, name, None) for name in ALONE)
    if alone or config.option.capture == "no" or (os.cpu_count() or 1) < 2:
        return None
    return First(config)


PIECE = 400  # tests: a longer file (the contract) is claimed in pieces, so that both end together


def pieces_of(items) -> dict[tuple[Path, int], list]:
    """The tests by file and number of the piece, in order."""
    seen: dict[Path, int] = {}
    found: dict[tuple[Path, int], list] = {}
    for item in items:
        count = seen[item.path] = seen.get(item.path, -1) + 1
        found.setdefault((item.path, count // PIECE), []).append(item)
    return found


class Process:
    """Runs the tests of the files that this process claims."""

    def __init__(self, config, folder: Path):
        self.config, self.folder = config, folder

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        """Runs the tests instead of pytest's own loop, which runs if this returns None."""
        if session.testsfailed and not self.config.option.continue_on_collection_errors:
            return None  # it says what could not be collected
        gc.freeze()  # so many tests, and none is ever garbage: not looked at again and again
        pieces = pieces_of(session.items)
        self.begin(pieces)
        for piece in self.in_order(list(pieces)):
            if self.claim(*piece):
                self.run(session, pieces[piece])
        self.finish(session)
        return True

    def begin(self, pieces) -> None:
        """Called before the first piece."""

    def claim(self, path: Path, number: int) -> bool:
        name = os.path.relpath(path, self.config.rootpath).replace(os.sep, "+")
        try:
            (self.folder / f"{name}+{number}").mkdir()
        except FileExistsError:
            return False
        return True

    def run(self, session, items) -> None:
        for item, following in zip(items, [*items[1:], None]):
            self.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.after(item, following is None)
            stop_if_asked(session)


class Second(Process):
    """The second process: starts with the last file, and writes down what happens."""

    def __init__(self, config, folder: Path):
        super().__init__(config, folder)
        self.log = open(folder / "log", "a", encoding="utf-8")
        self.parent = os.getppid()
        # What the first process writes for both.
        config.option.xmlpath = config.option.log_file = None
        if config.option.basetemp:
            config.option.basetemp += "-second"
        for name in ("lfplugin", "nfplugin", "stepwiseplugin"):
            if config.pluginmanager.has_plugin(name):
                config.pluginmanager.unregister(name=name)

    def begin(self, pieces) -> None:
        """Wait until the first process has run the fundamentals."""
        waits = any(path.name == FIRST for path, _ in pieces)
        while waits and not (self.folder / "begin").exists() and os.getppid() == self.parent:
            time.sleep(0.02)

    def in_order(self, files):
        return reversed(files)

    def write(self, event: str, **what) -> None:
        self.log.write(json.dumps({"event": event} | what, default=repr) + "\n")
        self.log.flush()

    def pytest_runtest_logstart(self, nodeid, location):
        self.write("start", nodeid=nodeid, location=location)

    def pytest_runtest_logreport(self, report):
        hook = self.config.hook.pytest_report_to_serializable
        self.write("report", **hook(config=self.config, report=report))

    def pytest_runtest_logfinish(self, nodeid, location):
        self.write("finish", nodeid=nodeid, location=location)

    def after(self, item, end_of_file: bool) -> None:
        if end_of_file:
            self.write("end of file")
        if os.getppid() != self.parent:
            pytest.exit("the first process is gone")

    def finish(self, session) -> None:
        self.log.close()


class First(Process):
    """The first process: starts with the first file. It spawns the second process, reports what it
    writes, and waits for it."""

    def __init__(self, config):
        self.temporary = tempfile.TemporaryDirectory()
        super().__init__(config, Path(self.temporary.name))
        self.events: list[dict] = []  # of the second process, read and not yet reported
        self.rest = ""  # of its log: the beginning of a line
        self.done: set[str] = set()  # ids of finished tests, of both processes
        self.running = None  # the event of the second process's last test that began

    def pytest_report_header(self):
        return "in two processes (pytest tests: in one)"

    def pytest_sessionstart(self):
        (self.folder / "log").touch()
        self.log = open(self.folder / "log", encoding="utf-8")
        self.output = open(self.folder / "output", "w+", encoding="utf-8", errors="replace")
        same_imports = f"import sys, pytest; sys.path[:] = {sys.path!r}; sys.exit(pytest.main())"
        self.other = subprocess.Popen(
            [sys.executable, "-c", same_imports, *self.config.invocation_params.args],
            cwd=self.config.invocation_params.dir,
            env=os.environ | {CLAIMS: str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def in_order(self, files):
        return files

    def after(self, item, end_of_file: bool) -> None:
        self.done.add(item.nodeid)
        if end_of_file and not item.session.shouldfail:
            (self.folder / "begin").touch()  # the second process waits for it
        if self.config.option.maxfail:
            self.report()  # at once: it may be time to stop
        elif end_of_file:
            self.report(whole_files=True)

    def finish(self, session) -> None:
        """Wait for the second process; a test that it should have finished and did not is a
        failure."""
        ended = False
        while not ended:
            ended = self.other.poll() is not None
            self.report()
            stop_if_asked(session)
            time.sleep(0.0 if ended else 0.05)
        missing = [item for item in session.items if item.nodeid not in self.done]
        if missing or self.other.returncode not in FINE:
            self.config.hook.pytest_runtest_logreport(report=self.crash(missing))

    def report(self, whole_files: bool = False) -> None:
        """Report what the second process has done since the last call. whole_files: only the files
        that it has finished, so that the results of a file stand together."""
        *lines, self.rest = (self.rest + self.log.read()).split("\n")
        self.events += map(json.loads, lines)
        ready = len(self.events)
        while whole_files and ready and self.events[ready - 1]["event"] != "end of file":
            ready -= 1
        for event in self.events[:ready]:
            self.repeat(**event)
        del self.events[:ready]

    def repeat(self, event: str, **what) -> None:
        """Tell the plugins of this process what happened in the other one."""
        hook = self.config.hook
        if event == "start":
            self.running = what
            hook.pytest_runtest_logstart(**what)
        elif event == "report":
            if isinstance(what["longrepr"], list):  # of a skipped test; a tuple before it was JSON
                what["longrepr"] = tuple(what["longrepr"])
            report = hook.pytest_report_from_serializable(config=self.config, data=what)
            hook.pytest_runtest_logreport(report=report)
        elif event == "finish":
            self.running = None
            self.done.add(what["nodeid"])
            hook.pytest_runtest_logfinish(**what)

    def crash(self, missing) -> pytest.TestReport:
        """The report of a second process that did not do its part."""
        status = self.other.returncode
        ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        files = sorted({item.location[0] for item in missing})
        lines = [f"The second process {ended}."]
        if missing:
            lines += [f"Not finished: {len(missing)} tests of {', '.join(files)}."]
        self.output.seek(0)
        printed = self.output.read().splitlines()[-40:]
        lines += ["It printed:", *(f"    {line}" for line in printed)]
        # With a test: that one failed. Without: an error beside the tests.
        where = self.running or {"nodeid": "the second process", "location": ("", None, "")}
        when = "call" if self.running else "setup"
        return pytest.TestReport(
            *(where["nodeid"], where["location"], {}, "failed", "\n".join(lines), when)
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self):
        """End the second process if it still runs: after Ctrl-C, -x, or an error here."""
        if self.other.poll() is None:
            self.other.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
            try:
                self.other.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.other.kill()
                self.other.wait()
        self.report()

    def pytest_unconfigure(self):
        self.log.close()
        self.output.close()
        self.temporary.cleanup()


def stop_if_asked(session) -> None:
    """End the loop as pytest's own does: after enough failures, or when a plugin asks for it."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)
