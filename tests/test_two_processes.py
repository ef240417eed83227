"""The suite in two processes: each test runs once, and a failure in either process is reported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_processes import CLAIMS

CONFTEST = """
import two_processes

def pytest_configure(config):
    if plugin := two_processes.share(config):
        config.pluginmanager.register(plugin)
"""
# The first test of each process waits until the other process is at a test too. So each process
# runs at least the file at its own end, however late the second one starts on a loaded machine.
TEST = """
import os, time
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range(3))
def test_one(number):
    Path(f"process-{os.getpid()}").touch()
    deadline = time.monotonic() + 120
    while len(list(Path().glob("process-*"))) < PROCESSES:
        if time.monotonic() > deadline:
            pytest.exit("the other process has not reached a test in 120 s")
        time.sleep(0.01)
    with open("ran", "a") as log:
        log.write(f"{__name__} {number} {os.getpid()}\\n")
    assert not FAILS
"""
CAN_BE_TWO = (os.cpu_count() or 1) >= 2


def run(folder, fails="", words=()):
    """(exit status, output, the tests that ran: (file, number, process)) of a suite of four
    files."""
    (folder / "conftest.py").write_text(CONFTEST)
    test = TEST.replace("PROCESSES", "2" if CAN_BE_TWO and not words else "1")
    for name in "abcd":
        (folder / f"test_{name}.py").write_text(test.replace("FAILS", str(name == fails)))
    environment = {k: v for k, v in os.environ.items() if k != CLAIMS}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert (folder / "ran").exists(), f"no test finished:\n{done.stdout}"
    ran = [line.split() for line in (folder / "ran").read_text().splitlines()]
    return done.returncode, done.stdout, ran


def processes_of(ran, file):
    """The processes that ran tests of this file; expected: one."""
    return {process for name, _, process in ran if name == file}


@pytest.mark.skipif(not CAN_BE_TWO, reason="needs two processors")
def test_each_test_runs_once_in_one_of_two_processes(tmp_path):
    status, output, ran = run(tmp_path)
    assert status == 0, output
    expected = [f"test_{name} {number}" for name in "abcd" for number in range(3)]
    found = sorted(f"{file} {number}" for file, number, _ in ran)
    assert found == expected, "a test ran twice, or not at all"
    first_file: dict[str, str] = {}  # of each process
    for file, _, process in ran:
        first_file.setdefault(process, file)
    assert len(first_file) == 2, f"expected two processes, got {len(first_file)}"
    began = sorted(first_file.values())
    assert began == ["test_a", "test_d"], f"expected to begin at both ends, got {began}"
    assert output.count(" passed in ") == 2 and "by a second process" in output


@pytest.mark.parametrize("fails", ["a", "d"])
def test_failure_in_either_process_is_reported(tmp_path, fails):
    """The first process runs the first file, the second process the last."""
    status, output, ran = run(tmp_path, fails)
    assert status == 1, f"test_{fails}.py fails, but the status of the suite is {status}"
    assert f"FAILED test_{fails}.py::test_one[2]" in output
    if CAN_BE_TWO:
        assert processes_of(ran, "test_a") != processes_of(ran, "test_d"), "one process ran both"


def test_suite_with_arguments_runs_in_one_process(tmp_path):
    status, output, ran = run(tmp_path, words=["-k", "one and 1"])
    assert status == 0 and [file for file, *_ in ran] == ["test_a", "test_b", "test_c", "test_d"]
    assert len({process for *_, process in ran}) == 1 and "by a second process" not in output
