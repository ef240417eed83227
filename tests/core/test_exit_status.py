"""How commands that are started as ``python -m minitx...`` end."""

import argparse
import subprocess
import sys
import warnings

import pytest

from minitx.errors import MinitxError, MinitxWarning
from minitx.exit_status import CLOSED_PIPE, run_module

PARSER = argparse.ArgumentParser("python -m minitx.some.module")


@pytest.mark.parametrize(
    "error, status, said",
    [
        (MinitxError("expected a, got b."), 2, "module: error: expected a, got b.\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "error: a.txt: No such file.\n"),
        (KeyboardInterrupt(), 130, "stopped.\n"),
        (BrokenPipeError(), CLOSED_PIPE, ""),
    ],
)
def test_each_trouble_has_its_status_and_one_sentence(error, status, said, capsys):
    def fails():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_module(PARSER, fails)
    assert stopped.value.code == status
    err = capsys.readouterr().err
    assert err.endswith(said) and "Traceback" not in err and bool(err) == bool(said)


def test_notes_are_single_lines_and_are_shown_once(capsys):
    def notes():
        for _ in range(2):
            warnings.warn("calibrated on little text.", MinitxWarning, stacklevel=1)

    run_module(PARSER, notes)
    assert capsys.readouterr().err == "minitx: note: calibrated on little text.\n"


def test_reader_that_closes_the_pipe_causes_no_traceback():
    words = [sys.executable, "-m", "minitx.lab.product_times", "cats", "16", "16"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before it prints
        assert process.stderr.read() == b"" and process.wait() == CLOSED_PIPE
