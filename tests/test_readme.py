"""What the README says is so: its tree, its commands, its files, its models."""

import re
import shlex
from pathlib import Path

import pytest

import minitx
from minitx import arguments
from minitx.checkpoints.find import shipped
from minitx.cli import main
from minitx.learn.exercise import exercises
from minitx.technique import techniques

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted({" ".join(found.split()) for found in re.findall(r"`(minitx [^`]+)`", README)})


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_printed_tree_is_the_tree_of_stories():
    (tree,) = (block.strip() for block in blocks("text") if block.startswith("Transformer"))
    assert tree == repr(minitx.load("stories").model)


def test_python_example_runs(capsys):
    (example,) = blocks("python")
    space: dict = {}
    exec(compile(example, "README.md", "exec"), space)
    assert space["logits"].shape[1] == space["lm"].model.config.vocab_size
    assert "One day" not in capsys.readouterr().out[:7]  # the prompt is not repeated


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_can_be_parsed(line):
    words = [w for w in shlex.split(line)[1:] if w != "..."]
    arguments.read_arguments(words)  # refuses an unknown command, option or technique


def test_every_path_exists():
    for path in re.findall(r"`((?:minitx|tests|tutorials|weights)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python (tutorials/\S+\.py)", README):
        assert (ROOT / path).exists(), path


def test_every_tutorial_is_linked():
    for script in (ROOT / "tutorials").glob("[0-9]*.py"):
        assert script.name in README, script.name


def test_number_of_exercises_and_mistakes_is_that_of_the_masters():
    known = sum(len(exercise.mistakes) for exercise in exercises())
    assert re.search(r"^(\d+) exercises, ", README, re.M)[1] == str(len(exercises()))
    said = int(re.search(r"one of the (\d+) mistakes", README)[1])
    assert said <= known < said + 50, f"the checker knows {known} mistakes"


def test_skip_map_is_what_its_command_draws(tmp_path, capsys):
    """The picture is current: the command beside it, run now, draws the same file."""
    (command,) = [line for line in COMMANDS if line.startswith("minitx map") and "--svg" in line]
    *words, name = shlex.split(command)[1:]
    assert main([*words, str(tmp_path / name)]) == 0
    committed = (ROOT / "tutorials" / "pictures" / name).read_text("utf-8")
    assert (tmp_path / name).read_text("utf-8") == committed, f"draw it again with: {command}"


def test_every_model_is_named():
    for name in shipped():
        assert f"`{name}`" in README, name


def test_gallery_lists_every_technique_with_its_card_test_and_tutorial():
    """A row per technique: link to its file, the summary of its card, five figures, links."""
    pattern = r"^\| \[`(--[\w-]+)`\]\((\S+)\) \| (.*?) \|(?: [^|]+ \|){5} (.*) \|$"
    rows = re.findall(pattern, README, re.M)
    expected = []
    for t in techniques():
        folder = f"tests/{t.function.__module__.split('.')[1]}"
        links = f"[test]({folder}/test_{t.name}.py)"
        if tutorial := t.card.sections.get("Tutorial"):
            links += f", [tutorial]({tutorial})"
        expected.append((t.flag, t.path, t.card.summary, links))
    assert sorted(rows) == sorted(expected)
    assert f"{len(expected)} so far" in README


def test_every_link_leads_to_a_file():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for block in blocks("sh"):
        for command in block.strip().split(" && "):
            assert command in script, f"not a line of .ci/run: {command}"


def test_first_story_is_the_one_that_is_printed():
    found = minitx.load("stories").generate("Once upon a time", temperature=0.8, seed=0)
    _, _, shown = blocks("text")[0].partition('$ minitx generate "Once upon a time"\n')
    pieces = " ".join(shown.partition("\n\n")[0].split()).split("[...]")
    for piece in pieces:
        assert piece.strip() in f"Once upon a time{found}", piece
