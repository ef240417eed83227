"""Bounded reads and atomic writes: what every reader and writer of files shares."""

import ast
import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_folder

import minitx
from minitx.checkpoints import common
from minitx.checkpoints.common import (
    atomic_write,
    fingerprint,
    open_file,
    read,
    read_json,
    read_npz,
    weights_fingerprint,
)
from minitx.checkpoints.llama2c import read_llama2c
from minitx.checkpoints.safetensors import read_header, read_tensor
from minitx.checkpoints.tokenizer_json import read_tokenizer
from minitx.errors import MinitxError
from minitx.lab.reference import read_reference
from minitx.training.recipe import read_recipe

ROOT = Path(__file__).parent.parent.parent

# Not a regular file ------------------------------------------------------------------------------


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


NO_FILES = {
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": os.mkdir,
}
READERS = (read, read_json, fingerprint, read_header, read_llama2c, read_reference, read_recipe)


@pytest.mark.parametrize("kind", NO_FILES)
def test_only_regular_files_are_read(kind, tmp_path, monkeypatch):
    """A FIFO without a writer would wait for ever, /dev/zero has no end."""
    monkeypatch.chdir(tmp_path)  # the name of a socket has to be short
    path = Path("x")
    NO_FILES[kind](path)
    for reader in READERS:
        if reader is read_recipe and kind == "a folder":
            continue  # which may contain a recipe
        with pytest.raises(MinitxError, match=f"x: is {kind}.*; expected a regular file"):
            reader(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_folder_with_a_file_that_is_none_is_refused(name, kind, tmp_path):
    tiny_folder(tmp_path)
    (tmp_path / name).unlink()
    NO_FILES[kind](tmp_path / name)
    with pytest.raises(MinitxError, match=f"{name}: is {kind}"):
        minitx.load(tmp_path)


@pytest.mark.parametrize("reader", [read_json, read_recipe, read_tokenizer, read])
def test_huge_sparse_file_is_refused_without_reading_it(reader, tmp_path):
    path = tmp_path / "tokenizer.json"
    with open(path, "wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    with pytest.raises(MinitxError, match="is larger than 67,108,864 bytes"):
        reader(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_small_limit_and_names_that_no_file_can_have(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read(tmp_path / "x", 5) == b"12345"
    with pytest.raises(MinitxError, match="larger than 4 bytes"):
        read(tmp_path / "x", 4)
    for name, message in (("\0", "no file can have this name"), ("y", "no such file")):
        with pytest.raises(MinitxError, match=message):
            read(tmp_path / name)
    with pytest.raises(MinitxError, match="cannot be read"):
        read("x" * 5000)


def test_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    real, statuses = os.fstat, []

    def shrinks(descriptor):
        statuses.append(real(descriptor))
        if len(statuses) == 2:  # its size is known
            path.write_bytes(b"123")
        return statuses[-1]

    monkeypatch.setattr(common.os, "fstat", shrinks)
    with pytest.raises(MinitxError, match="changed while it was read"):
        read(path)


def test_weights_that_change_between_header_and_tensor_are_noticed(tmp_path):
    tiny_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    name, info = next(iter(read_header(path).tensors.items()))
    read_tensor(path, name, info)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(0, 0))
    with pytest.raises(MinitxError, match="changed while it was read"):
        read_tensor(path, name, info)


def test_npz_that_unpacks_to_gigabytes_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(10**7))
    with pytest.raises(ValueError, match="unpacks to 80,0.* bytes; expected at most 1,000"):
        read_npz(tmp_path / "bomb.npz", 1000)
    np.savez(tmp_path / "small.npz", a=np.arange(3))
    assert read_npz(tmp_path / "small.npz", 1000)["a"].tolist() == [0, 1, 2]


# One way in --------------------------------------------------------------------------------------

OPENERS = ("open", "read_bytes", "read_text", "load", "fromfile", "memmap", "loadtxt", "genfromtxt")
ALLOWED = {
    "checkpoints/common.py": {"open", "load"},  # here
    "checkpoints/safetensors.py": {"fromfile"},  # from a file of open_file
    "lab/bench.py": {"read_text"},  # /proc/cpuinfo
    "exit_status.py": {"open"},  # os.devnull
    "digest.py": {"read_bytes"},  # minitx's own source
    "shared/answer_store.py": {"open"},  # os.open creates the file, which nobody else may read
}


def test_no_module_opens_an_input_by_itself():
    """Everything is read by ``read`` or ``open_file``, so that each limit holds everywhere."""
    found = {}
    for path in sorted((ROOT / "minitx").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                function = node.func
                name = getattr(function, "attr", getattr(function, "id", None))
                owner = getattr(getattr(function, "value", None), "id", None)
                if name == "read_text" and isinstance(function, ast.Name):
                    continue  # minitx.text.read_text
                if name in OPENERS and (name != "load" or owner in ("np", "numpy", "pickle")):
                    found.setdefault(str(path.relative_to(ROOT / "minitx")), set()).add(name)
    assert found == ALLOWED


# Writing -----------------------------------------------------------------------------------------


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    """And only those: another process that writes the same file now is left alone."""
    dead, alive = dead_process(), os.getppid()
    mine, folder, other = (
        tmp_path / f".out.json.{dead}.tmp", tmp_path / f".out.json.{dead}0.tmp", tmp_path / "x.tmp",
    )  # fmt: skip
    running, unlike = tmp_path / f".out.json.{alive}.tmp", tmp_path / f".other.json.{dead}.tmp"
    for path in (mine, running, unlike, other):
        path.write_bytes(b"half")
    if not common.is_running(int(f"{dead}0")):
        folder.mkdir()
        (folder / "x").write_bytes(b"half")
    with atomic_write(tmp_path / "out.json") as file:
        file.write(b"{}")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out.json", running.name, unlike.name, other.name}


def test_killed_write_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps({"old": 1}))
    killed = (
        "import os, signal, sys; from minitx.checkpoints.common import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", killed, str(path)], cwd=ROOT)
    assert len(list(tmp_path.iterdir())) == 2 and read_json(path) == {"old": 1}
    with atomic_write(path) as file:
        file.write(b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_open_file_reports_errors_of_the_system_in_one_sentence(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    with pytest.raises(MinitxError, match="x: cannot be read .Input/output error"):
        with open_file(tmp_path / "x"):
            raise OSError(5, "Input/output error")


@pytest.mark.parametrize("name", ["model.safetensors", "precomputed.safetensors"])
def test_fingerprint_of_a_folder_depends_on_its_weights(tmp_path, name):
    (tmp_path / "switchable.safetensors").write_bytes(b"not the model's")
    found = {weights_fingerprint(tmp_path)}
    for content in (b"1", b"2"):
        (tmp_path / name).write_bytes(content)
        found.add(weights_fingerprint(tmp_path))
    assert len(found) == 3
