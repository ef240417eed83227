"""What the README says is so: its tree, its commands, its files, its models."""

import re
import shlex
from pathlib import Path

import pytest

import minitx
from minitx import arguments
from minitx.checkpoints.find import shipped
from minitx.technique import techniques

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`(minitx [^`]+)`", README)))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_printed_tree_is_what_runs():
    assert blocks("text")[0].strip() == repr(minitx.load("stories").model)


def test_the_python_example_runs(capsys):
    (example,) = blocks("python")
    space: dict = {}
    exec(compile(example, "README.md", "exec"), space)
    assert space["logits"].shape[1] == space["lm"].model.config.vocab_size
    assert "One day" not in capsys.readouterr().out[:7]  # the prompt is not repeated


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    words = [w for w in shlex.split(line)[1:] if w != "..."]
    arguments.read_arguments(words)  # refuses an unknown command, option or technique


def test_every_path_exists():
    for path in re.findall(r"`((?:minitx|tests|tutorials|weights)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python (tutorials/\S+\.py)", README):
        assert (ROOT / path).exists(), path


def test_all_tutorials_are_named():
    for script in (ROOT / "tutorials").glob("[0-9]*.py"):
        assert script.name in README, script.name


def test_all_models_are_named():
    for name in shipped():
        assert f"`{name}`" in README, name


def test_the_techniques_are_those_that_there_are():
    """Each with its level, whether it is exact, and the first line of its card."""
    rows = re.findall(r"^\| \[`(--[\w-]+)`\]\((\S+)\) \| (\w+) \| (\w+) \| (.*) \|$", README, re.M)
    expected = []
    for t in techniques():
        path = t.path
        exact = "exact" if t.exact else "approximate"
        expected.append((t.flag, path, t.level, exact, t.card.summary))
    assert rows == expected


def test_ci_runs_the_readmes_test_command():
    install, test = blocks("sh")[1].strip().split(" && ")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert test.removeprefix("python ") in script
    assert install.startswith("pip install")
