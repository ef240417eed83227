"""Run the whole suite in two processes: one takes test files from the front, the other from the
back, until they meet. A process claims a file by creating a directory of its name, so no file runs
twice.

Only plain ``python -m pytest``, without arguments, is run so, and only with at least two cores;
with any arguments pytest runs as usual.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CLAIMS = "MINITX_TEST_CLAIMS"  # environment variable: the folder of claims, for the second process


def share(config):
    """The pytest plugin for this process, or None if the suite is not shared."""
    if CLAIMS in os.environ:
        return Second(Path(os.environ[CLAIMS]))
    if config.invocation_params.args or (os.cpu_count() or 1) < 2:
        return None
    return First(config.invocation_params.dir)


class Claims:
    """Runs only the tests of files that this process claims first."""

    def __init__(self, claims: Path):
        self.claims = claims
        self.mine: dict[Path, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        return None if self.claim(item.path) else True  # True: handled, report nothing

    def claim(self, path: Path) -> bool:
        if path not in self.mine:
            try:
                (self.claims / path.name).mkdir()
                self.mine[path] = True
            except FileExistsError:
                self.mine[path] = False
        return self.mine[path]


class Second(Claims):
    """The second process: starts with the last file."""

    def pytest_collection_modifyitems(self, items):
        order = {path: -i for i, path in enumerate(dict.fromkeys(item.path for item in items))}
        items.sort(key=lambda item: order[item.path])


class First(Claims):
    """The first process: starts with the first file. It spawns the second process, waits for it and
    prints its output. The suite fails if either process fails."""

    def __init__(self, directory: Path):
        self.folder = tempfile.TemporaryDirectory()
        super().__init__(Path(self.folder.name))
        self.directory = directory

    def pytest_sessionstart(self):
        self.output = open(self.claims / "output", "w+", encoding="utf-8")
        self.other = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
            cwd=self.directory,
            env=os.environ | {CLAIMS: str(self.claims)},
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.INTERRUPTED:
            self.other.terminate()
        if self.other.wait() and not exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("the other files, by a second process")
        self.output.seek(0)
        terminalreporter.write(self.output.read())

    def pytest_unconfigure(self):
        self.output.close()
        self.folder.cleanup()
