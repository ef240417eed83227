"""The suite in two processes: every test once, and a failure in either is a failure."""

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
TEST = """
import os, time
import pytest
from two_processes import CLAIMS

@pytest.mark.parametrize("number", range(3))
def test_one(number):
    time.sleep(0.1)
    with open("ran", "a") as log:
        log.write(f"{__name__} {number} {os.getpid()}\\n")
    assert not FAILS
"""


def run(folder, fails="", words=()):
    """(status, output, what ran: (file, number, process)) of a suite of four files."""
    (folder / "conftest.py").write_text(CONFTEST)
    for name in "abcd":
        (folder / f"test_{name}.py").write_text(TEST.replace("FAILS", str(name == fails)))
    environment = {k: v for k, v in os.environ.items() if k != CLAIMS}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    ran = [line.split() for line in (folder / "ran").read_text().splitlines()]
    return done.returncode, done.stdout, ran


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_each_test_runs_once_in_one_of_two_processes(tmp_path):
    status, output, ran = run(tmp_path)
    assert status == 0
    expected = [f"test_{name} {number}" for name in "abcd" for number in range(3)]
    assert sorted(f"{file} {number}" for file, number, _ in ran) == expected
    assert len({process for _, _, process in ran}) == 2
    assert output.count(" passed in ") == 2 and "by a second process" in output


@pytest.mark.parametrize("fails", ["a", "d"])
def test_a_failure_in_either_is_told(tmp_path, fails):
    status, output, _ = run(tmp_path, fails)
    assert status == 1 and f"FAILED test_{fails}.py::test_one[2]" in output


def test_what_is_asked_for_runs_in_one_process(tmp_path):
    status, output, ran = run(tmp_path, words=["-k", "one and 1"])
    assert status == 0 and [file for file, *_ in ran] == ["test_a", "test_b", "test_c", "test_d"]
    assert len({process for *_, process in ran}) == 1 and "by a second process" not in output
