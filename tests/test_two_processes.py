"""The suite in two processes, seen from outside: each test runs once, and there is one summary,
which is true whatever happens in either process."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from two_processes import CLAIMS, FIRST, PIECE, pieces_of

CAN_BE_TWO = (os.cpu_count() or 1) >= 2
two = pytest.mark.skipif(not CAN_BE_TWO, reason="needs two processors")

# Each test waits until both processes are at a test. So each process runs at least the file at its
# own end, however late the second one starts on a loaded machine.
CONFTEST = """
import os, time
from pathlib import Path
import pytest, two_processes

def pytest_configure(config):
    if plugin := two_processes.share(config):
        config.pluginmanager.register(plugin)

@pytest.fixture(autouse=True)
def meet():
    Path(f"process-{os.getpid()}").touch()
    deadline = time.monotonic() + 120
    while len(list(Path().glob("process-*"))) < PROCESSES:
        if time.monotonic() > deadline:
            pytest.exit("the other process has not reached a test in 120 s")
        time.sleep(0.01)

@pytest.fixture
def log():
    with open("ran", "a") as file:
        yield lambda name, number: file.write(f"{name} {number} {os.getpid()}\\n")
"""
PASSES = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_one(number, log):
    log(__name__, number)
"""
FAILS = PASSES + '    assert number != 1, f"property of {__name__} broke"\n'
OTHER_OUTCOMES = """
import pytest

@pytest.mark.skip(reason="no accelerator")
def test_skipped(): pass

@pytest.mark.xfail
def test_expected_to_fail(): assert False

@pytest.fixture
def broken(): raise RuntimeError("broken fixture")

def test_with_an_error(broken): pass
"""


def command(folder, words=(), processes=2, **files):
    """The command and options of Popen for a suite of test_a.py to test_d.py, which pass."""
    (folder / "conftest.py").write_text(CONFTEST.replace("PROCESSES", str(processes)))
    for name in "abcd":
        (folder / f"test_{name}.py").write_text(files.get(name, PASSES))
    environment = {k: v for k, v in os.environ.items() if k not in (CLAIMS, "PYTEST_ADDOPTS")}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "100"}
    return [sys.executable, "-m", "pytest", *words], dict(
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(*arguments, **options):
    """(exit status, output) of a suite."""
    words, settings = command(*arguments, **options)
    done = subprocess.run(words, **settings)
    return done.returncode, done.stdout


def ran(folder):
    """The tests that ran: (file, number, process)."""
    return [line.split() for line in (folder / "ran").read_text().splitlines()]


def summary(output):
    """The last line of a run; expected: the only line like it."""
    found = re.findall(r"^=* ?(\d+ \w+.*) in [\d.]+s.*$", output, re.M)
    assert len(found) == 1, f"expected one summary, got {found} in:\n{output}"
    assert re.search(r" in [\d.]+s", output.splitlines()[-1]), "something follows the summary"
    return found[0]


# One run in two processes ------------------------------------------------------------------------


@two
def test_each_test_runs_once_in_one_of_two_processes(tmp_path):
    status, output = run(tmp_path)
    assert (status, summary(output)) == (0, "12 passed")
    expected = [f"test_{name} {number}" for name in "abcd" for number in range(3)]
    found = sorted(f"{file} {number}" for file, number, _ in ran(tmp_path))
    assert found == expected, "a test ran twice, or not at all"
    first_file: dict[str, str] = {}  # of each process
    for file, _, process in ran(tmp_path):
        first_file.setdefault(process, file)
    began = sorted(first_file.values())
    assert began == ["test_a", "test_d"], f"expected to begin at both ends, got {began}"


@two
def test_failures_of_both_processes_are_in_one_summary_with_their_messages(tmp_path):
    """The first process runs the first file, the second process the last."""
    status, output = run(tmp_path, a=FAILS, d=FAILS)
    assert (status, summary(output)) == (1, "2 failed, 10 passed")
    for name in "ad":
        message = f"AssertionError: property of test_{name} broke"
        assert f"FAILED test_{name}.py::test_one[1] - {message}" in output
        assert f"E       {message}" in output, "the failure is shown with its source"


@two
def test_second_process_waits_for_the_fundamentals(tmp_path):
    """The first file fails after a second, all others at once: with -x it is still the one that is
    reported, because a file of that name is in the suite."""
    slow = (
        "import time\n\ndef test_slow():\n    time.sleep(1)\n    assert False, 'the fundamentals'\n"
    )
    (tmp_path / FIRST).write_text(FAILS)
    status, output = run(tmp_path, ["-x"], 1, a=slow, d=FAILS)
    assert (status, summary(output)) == (1, "1 failed")
    assert "FAILED test_a.py::test_slow - AssertionError: the fundamentals" in output


@two
def test_every_option_that_does_not_choose_tests_works_in_two_processes(tmp_path):
    words = ["-v", "-rs", "--tb=line", "--durations=2", "--color=yes", "--junitxml=report.xml"]
    status, output = run(tmp_path, words, c=FAILS, d=OTHER_OUTCOMES)
    output = re.sub("\x1b[^m]*m", "", output)
    assert status == 1
    assert summary(output) == "1 failed, 8 passed, 1 skipped, 1 xfailed, 1 error"
    assert len({process for *_, process in ran(tmp_path)}) == 2 or "test_d" not in str(
        ran(tmp_path)
    )
    for line in (
        r"test_a.py::test_one\[0\] PASSED +\[ +\d+%\]",
        r"test_c.py::test_one\[1\] FAILED ",
        r"test_d.py::test_skipped SKIPPED \(no accelerator\)",
        r"test_d.py::test_with_an_error ERROR +\[ *\d+%\]",
        r"SKIPPED \[1\] test_d.py:\d+: no accelerator",
        r".*test_c.py:\d+: AssertionError: property of test_c broke",
        r"=+ slowest 2 durations =+",
    ):
        assert re.search(f"^{line}", output, re.M), f"not in the output: {line}\n{output}"
    assert 'tests="12"' in (tmp_path / "report.xml").read_text(), "the report of both processes"


@two
def test_first_failure_ends_both_processes_with_x(tmp_path):
    slow = PASSES + "    __import__('time').sleep(0.5)"
    status, output = run(tmp_path, ["-x", "-q"], a=slow, b=slow, c=slow, d=FAILS)
    assert status == 1 and "stopping after 1 failures" in output
    failed, passed = re.fullmatch(r"(\d) failed, (\d+) passed", summary(output)).groups()
    assert failed == "1" and int(passed) < 8, "nothing was left out"


# When the second process does not do its part ----------------------------------------------------

CRASHES = {
    "killed": ("os.kill(os.getpid(), 9)", "was ended by signal 9"),
    "exits as if all were well": ("os._exit(0)", "ended with status 0"),
    "gives up": ("pytest.exit('no more')", "ended with status 2"),
}


@two
@pytest.mark.skipif(os.name != "posix", reason="about signals of Unix")
@pytest.mark.parametrize("how", CRASHES)
def test_end_of_the_second_process_within_a_test_is_a_failure_of_that_test(tmp_path, how):
    code, message = CRASHES[how]
    crash = f"import os\n{PASSES}\ndef test_crash(): {code}\ndef test_never_run(): pass\n"
    status, output = run(tmp_path, d=crash)
    assert (status, summary(output)) == (1, "1 failed, 12 passed")
    assert f"FAILED test_d.py::test_crash - The second process {message}" in output
    assert "Not finished: 2 tests of test_d.py." in output


@two
def test_second_process_that_cannot_begin_is_an_error(tmp_path):
    broken = f"import os\nif {CLAIMS!r} in os.environ: import missing_module\n{PASSES}"
    status, output = run(tmp_path, processes=1, d=broken)
    assert (status, summary(output)) == (1, "12 passed, 1 error")
    assert "No module named 'missing_module'" in output, "what it printed"


def test_file_that_cannot_be_imported_is_one_error(tmp_path):
    status, output = run(tmp_path, b="import missing_module")
    assert (status, summary(output)) == (2, "1 error")


@two
@pytest.mark.skipif(os.name != "posix", reason="about signals of Unix")
def test_ctrl_c_ends_both_processes(tmp_path):
    slow = PASSES + "    __import__('time').sleep(60)"
    words, options = command(tmp_path, ["-q"], a=slow, d=slow)
    process = subprocess.Popen(words, **options)
    while len(began := list(tmp_path.glob("process-*"))) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == pytest.ExitCode.INTERRUPTED and "KeyboardInterrupt" in output
    for path in began:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.removeprefix("process-")), 0)


# One process -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, expected",
    [
        (["-k", "one and 1"], "4 passed, 8 deselected"),
        (["test_c.py"], "3 passed"),
        (["--deselect", "test_a.py"], "9 passed, 3 deselected"),
    ],
)
def test_chosen_tests_run_in_one_process(tmp_path, words, expected):
    status, output = run(tmp_path, words, processes=1)
    assert (status, summary(output)) == (0, expected)
    assert len({process for *_, process in ran(tmp_path)}) == 1 and "two processes" not in output


def test_long_file_is_divided_and_every_test_is_in_one_piece():
    items = [SimpleNamespace(path="long", name=i) for i in range(2 * PIECE + 1)]
    items.insert(5, SimpleNamespace(path="short", name=0))
    pieces = pieces_of(items)
    assert {piece: len(found) for piece, found in pieces.items()} == {
        ("long", 0): PIECE, ("short", 0): 1, ("long", 1): PIECE, ("long", 2): 1,
    }  # fmt: skip
    long = [item.name for (path, _), found in pieces.items() if path == "long" for item in found]
    assert long == list(range(2 * PIECE + 1))
