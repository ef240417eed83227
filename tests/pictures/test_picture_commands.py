"""The commands that draw: what they print and write, and what they refuse."""

import json
from pathlib import Path

import pytest

COMMANDS = (["map", "Once"], ["keys", "Once"], ["weights"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_command_prints_text_or_json_and_writes_svg(run, command):
    new = [] if command[0] == "weights" else ["-n", 5]
    words = [*command, *new, "-m", "toy", "--fold-norms"]
    status, text, _ = run(*words, "--svg", "a.svg")
    assert status == 0 and text.startswith(f"minitx {command[0]}") and "--fold-norms" in text
    assert Path("a.svg").read_text().startswith("<svg ")
    status, found, _ = run(*words, "--json")
    assert status == 0 and json.loads(found)["title"] in text.splitlines()[0]


def test_show_diff_prints_text_or_json(run):
    status, text, _ = run("show", "--diff", "-m", "toy", "--fold-norms")
    assert status == 0 and "\n+" in text and "bytes in memory: " in text
    found = json.loads(run("show", "--diff", "-m", "toy", "--fold-norms", "--json")[1])
    assert found["changed"] and found["lines"] == text.split("\n\n")[0].splitlines()


@pytest.mark.parametrize(
    "words, message",
    [
        (["map", "Once", "--svg", "none/a.svg"], "there is no folder none; create it first"),
        (["map", "Once", "--svg", "a.png"], "expected a file name that ends in .svg"),
        (["keys", "Once", "--svg", "."], "expected a file name that ends in .svg, got '.'"),
        (["map", "x" * 60], "The prompt has 61 tokens but the context is 48; shorten it."),
        (["map", "Once", "-n", "99"], "exceeds the context of 48"),
        (["map", "Once", "-m", "bare"], "This model has no tokenizer"),
        (["keys", "Once", "-m", "bare"], "This model has no tokenizer"),
        (["keys", "Once", "--layer", "7", "-n", "2"], "There is no layer 7"),
        (["weights", "--part", "nothing"], "no weight matrix of the part 'nothing'"),
        (["show", "--diff"], "give at least one, such as --fold-norms"),
        (["map"], "the following arguments are required: prompt"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_sentence(run, words, message):
    model = [] if "-m" in words else ["-m", "toy"]
    status, out, err = run(*words, *model)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1, err
    assert not list(Path().glob("*.svg"))


def test_empty_prompt_starts_from_the_beginning_of_text(run):
    status, text, _ = run("map", "", "-m", "toy", "-n", 3)
    assert status == 0 and "(3 new tokens after a prompt of 1)" in text
