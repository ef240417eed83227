"""Shared fixtures: a working directory and a way to run commands in it; tokenizers. The whole suite
runs in two processes (two_processes.py)."""

import atexit
import json
import os
import shutil
import tempfile

# Must be set before NumPy is imported. Two processes with two BLAS threads each would compete.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

# Answers are kept in a folder that is removed at the end: no test may touch the user's.
os.environ["MINITX_CACHE"] = tempfile.mkdtemp(prefix="minitx-tests-")

import pytest
import two_processes
from tiny import tiny_folder
from tokenizer_files import FOLDER, REFERENCE, with_variant, write_fields

from minitx.checkpoints import find
from minitx.checkpoints.tokenizer_json import read_tokenizer
from minitx.cli import main
from minitx.lab.cost import cost

atexit.register(shutil.rmtree, os.environ["MINITX_CACHE"], ignore_errors=True)


def pytest_configure(config):
    if plugin := two_processes.share(config):
        config.pluginmanager.register(plugin)


def pytest_collection_modifyitems(items):
    """The fundamentals first: with -x, what they find is named there and not by what it breaks."""
    items.sort(key=lambda item: item.path.name != two_processes.FIRST)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with the models "toy" and "bare" (no tokenizer); no shipped models."""
    monkeypatch.setattr(find, "SHIPPED", [tmp_path / "nowhere"])
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "toy")
    tiny_folder(tmp_path / "bare", tokenizer=False)
    return tmp_path


@pytest.fixture
def run(workdir, capfd):
    """run(*words) -> (exit status, stdout, stderr)."""

    def call(*words):
        status = main([str(word) for word in words])
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def cost_of(tmp_path):
    """cost_of(name, fields of config.json, *words): the report of ``minitx cost``."""

    def found(name, fields, *words):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return cost(name, path, words)

    return found


@pytest.fixture(scope="module")
def plain():
    """The unchanged tokenizer of the reference."""
    return read_tokenizer(FOLDER)


@pytest.fixture(params=REFERENCE["variants"])
def variant(request, tmp_path):
    """(tokenizer, texts, expected ids) of one variant of the reference's tokenizer."""
    data = REFERENCE["variants"][request.param]
    tokenizer = read_tokenizer(write_fields(tmp_path, with_variant(data["replaced"])))
    return tokenizer, REFERENCE["texts"][:: data["step"]], data["ids"]
