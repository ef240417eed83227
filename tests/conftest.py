"""For the tests of the command line: a directory to work in, and a way to run a command."""

import pytest
from tiny import tiny_folder

from minitx.cli import main
from minitx.files import find


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with the model "toy" in it; nothing is shipped."""
    monkeypatch.setattr(find, "SHIPPED", [tmp_path / "nowhere"])
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "toy")
    tiny_folder(tmp_path / "bare", tokenizer=False)
    return tmp_path


@pytest.fixture
def run(workdir, capfd):
    """run(*words) -> (status, stdout, stderr)."""

    def call(*words):
        status = main([str(word) for word in words])
        return status, *capfd.readouterr()

    return call
