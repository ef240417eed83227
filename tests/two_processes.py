"""The whole suite in two processes: one takes the test files from the front, the other from the
back, until they meet. Whoever comes to a file first claims it, by making a directory of its name.

Only ``python -m pytest`` without a word more is run so, and only where there are two processors;
with anything else pytest is as always.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CLAIMS = "MINITX_TEST_CLAIMS"  # tells the second process where files are claimed


def share(config):
    """The plugin for this process, or None where there is nothing to share."""
    if CLAIMS in os.environ:
        return Second(Path(os.environ[CLAIMS]))
    if config.invocation_params.args or (os.cpu_count() or 1) < 2:
        return None
    return First(config.invocation_params.dir)


class Claims:
    """Runs the tests of those files that it was the first to claim."""

    def __init__(self, claims: Path):
        self.claims = claims
        self.mine: dict[Path, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        return None if self.claim(item.path) else True  # True: done, and nothing to report

    def claim(self, path: Path) -> bool:
        if path not in self.mine:
            try:
                (self.claims / path.name).mkdir()
                self.mine[path] = True
            except FileExistsError:
                self.mine[path] = False
        return self.mine[path]


class Second(Claims):
    """Begins with the last file."""

    def pytest_collection_modifyitems(self, items):
        order = {path: -i for i, path in enumerate(dict.fromkeys(item.path for item in items))}
        items.sort(key=lambda item: order[item.path])


class First(Claims):
    """Begins with the first file; starts the other process, waits for it, and tells what it said.
    The suite has failed if either has."""

    def __init__(self, directory: Path):
        self.folder = tempfile.TemporaryDirectory()
        super().__init__(Path(self.folder.name))
        self.directory = directory

    def pytest_sessionstart(self):
        self.said = open(self.claims / "said", "w+", encoding="utf-8")
        self.other = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
            cwd=self.directory,
            env=os.environ | {CLAIMS: str(self.claims)},
            stdout=self.said,
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
        self.said.seek(0)
        terminalreporter.write(self.said.read())

    def pytest_unconfigure(self):
        self.said.close()
        self.folder.cleanup()
