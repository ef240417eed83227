"""What each command prints and where: text and tables on stdout, figures on stderr, or JSON.
Wrong input, and everything else that can go wrong: test_cli_faults.py. ``check``:
test_check_command.py; ``bench``: test_bench.py."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from test_training import FIRST, recipe_of
from test_training import write as write_recipe
from tiny import END, ScriptedLoop, tiny_folder, tiny_lm, tiny_model

import minitx
from minitx.checkpoints.find import shipped
from minitx.checkpoints.huggingface import write_model
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.cli import main
from minitx.training.data import story_tokenizer
from minitx.training.stories import stories
from minitx.tree import weights

ROOT = Path(__file__).parent.parent.parent


# generate ----------------------------------------------------------------------------------------


def test_generate(run):
    lm = minitx.load("toy")
    text = lm.generate("Once", 9)
    status, out, err = run("generate", "Once", "-m", "toy", "-n", 9, "-t", 0)
    assert (status, out) == (0, f"Once{text}\n")
    assert re.fullmatch(r"9 tokens in \d+\.\d\d s, \d+ tokens/s\n", err)
    options = ["--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--seed", 3, "-n", 20]
    _, out, _ = run("generate", "Once", "-m", "toy", *options)
    assert out == f"Once{lm.generate('Once', 20, 0.9, 50, 0.9, 3)}\n"
    assert out != f"Once{lm.generate('Once', 20)}\n"
    context = lm.model.config.context
    words = ["generate", "Once", "-m", "toy", "-t", 0]
    assert f"{context - len(lm.encode('Once'))} tokens" in run(*words)[2]


def test_generate_samples_at_a_default_temperature_and_seed_unless_told_otherwise(run):
    lm, words = minitx.load("toy"), ["generate", "Once", "-m", "toy", "-n", 20]
    sampled = lm.generate("Once", 20, temperature=0.8, seed=0)
    assert run(*words)[1] == run(*words)[1] == f"Once{sampled}\n", "the same story every time"
    given = lm.generate("Once", 20, temperature=0.8, seed=5, top_k=3)
    assert run(*words, "--seed", 5, "--top-k", 3)[1] == f"Once{given}\n"
    assert run(*words, "-t", 0)[1] == f"Once{lm.generate('Once', 20)}\n" != f"Once{sampled}\n"


@pytest.mark.parametrize("prompt", ["Once upon a time", "One day", "Tom"])
def test_generate_tells_a_whole_story_on_its_first_run(capsys, prompt):
    assert main(["generate", prompt]) == 0
    text = capsys.readouterr().out
    assert text.startswith(prompt) and re.search(r"(end|bed|day|after)\.\n$", text), text
    sentences = re.split(r"(?<=[.?]) ", text.strip())
    assert len(set(sentences)) > 0.8 * len(sentences) > 5, "it repeats itself"


def test_options_of_a_technique(run):
    lm = minitx.load("toy", a3={"iterations": 0.25, "threshold": 10.0})
    options = ["--a3", "iterations=0.25", "threshold=10"]
    status, out, _ = run("generate", "Once", "-m", "toy", "-n", 9, "-t", 0, *options)
    assert (status, out) == (0, f"Once{lm.generate('Once', 9)}\n")
    assert "no option 'Q'" in run("generate", "Once", "-m", "toy", "--a3", "Q=1")[2]


def test_generate_json(run):
    lm = minitx.load("toy")
    status, out, err = run("generate", "Zoë", "-m", "toy", "-n", 7, "-t", 0, "--json")
    found = json.loads(out)
    assert status == 0 and found.pop("seconds") > 0 and "7 tokens" in err
    ids = lm.encode("Zoë")
    new = lm.generate(ids, 7)
    text = lm.generate("Zoë", 7)
    assert found == {"prompt": "Zoë", "text": text, "prompt_ids": ids, "ids": new}


def test_generate_counts_tokens_not_reencoded_text(run, monkeypatch):
    said = [*b"once upon", 0xC3]  # "on" and "ce" would be one token each; half a character
    monkeypatch.setattr(
        minitx, "load", lambda *a: tiny_lm(decode=ScriptedLoop(([*said, END],), []))
    )
    _, out, err = run("generate", "x")
    assert out == "xonce upon\ufffd\n" and err.startswith("10 tokens in")
    assert run("generate", "x", "-n", 0)[2].startswith("0 tokens in")


def test_generate_streams(workdir, monkeypatch, capsys):
    seen = []

    class Watching(ScriptedLoop):
        def __call__(self, *arguments):
            for token in super().__call__(*arguments):
                yield token
                seen.append(capsys.readouterr().out)

    monkeypatch.setattr(minitx, "load", lambda *a: tiny_lm(decode=Watching(("Zoë!".encode(),), [])))
    assert main(["generate", "x"]) == 0
    assert seen == ["xZ", "o", "", "ë", "!"] and capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    "data, prompt",
    [
        (b"Once", "Once"),
        ("Zoë \n".encode(), "Zoë "),
        (b"a\r\n", "a"),
        (b"a\n\n", "a\n"),
        (b"\n", ""),
        (b"", ""),
    ],
)
def test_prompt_from_stdin(run, monkeypatch, data, prompt):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    out = run("generate", "-", "-m", "toy", "-n", 5, "--json")[1]
    assert json.loads(out)["prompt"] == prompt


def test_stdin_that_is_not_utf8_is_refused(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    status, out, err = run("generate", "-", "-m", "toy")
    assert (status, out, err) == (
        2,
        "",
        "minitx: Byte 2 on stdin is not valid UTF-8; give UTF-8 text.\n",
    )
    monkeypatch.setattr(sys, "stdin", None)
    assert "no stdin" in run("generate", "-", "-m", "toy")[2]


# The others --------------------------------------------------------------------------------------


def test_show(run):
    lm = minitx.load("toy")
    total = 2 * 259 * 16 + 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 24 + 2 * 16) + 16
    size = 4 * (total + 2 * 48 * 8)  # the rotary tables too, once
    figures = f"{total:,} weights, {size / 1e6:.2f} MB in memory\n"
    assert run("show", "-m", "toy") == (0, f"{lm.model}\n", figures)
    found = json.loads(run("show", "-m", "toy", "--json")[1])
    assert (found["name"], found["weights"], found["bytes"]) == ("toy", total, size)
    assert found["config"]["family"] == "llama" and found["config"]["kv_heads"] == 1


def test_models_lists_each_shipped_model_with_its_shape_and_purpose(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for name, shape in (("stories", "llama +128 x 8"), ("stories-relu", "gpt2 +128 x 4")):
        assert re.search(rf"^{name} +{shape} +4 +1,022 .* \d\.\d$", out, re.M), name
    assert "A small companion of stories for speculative decoding" in " ".join(out.split())
    assert "a Hugging Face folder" in out and "llama2.c .bin" in out
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == sorted(shipped())
    lm = minitx.load("stories-draft")
    (draft,) = [entry for entry in found if entry["name"] == lm.name]
    assert draft["weights"] == sum(w.size for w in weights(lm.model).values())
    assert draft["config"]["width"] == lm.model.config.width


def test_stories(run):
    made = [story for story, _ in zip(stories("evaluation", "one_hop", 4), range(2))]
    options = ["--split", "evaluation", "--grade", "one_hop", "--seed", 4, "-n", 2]
    assert run("stories", *options) == (0, "".join(s.text + "\n\n" for s in made), "")
    found = json.loads(run("stories", *options, "--json")[1])
    assert [s["text"] for s in found] == [s.text for s in made]
    assert found[1]["answers"] == [[a.kind, a.value] for a in made[1].answers]
    assert run("stories")[1].count("\n\n") == 3


def test_evaluate(run, workdir):
    tokenizer = story_tokenizer()
    tiny_folder(workdir / "reader")
    model = tiny_model(
        vocab_size=len(tokenizer), context=120, bos=tokenizer.bos, eos=(tokenizer.eos,)
    )
    write_model(model, workdir / "reader", "F32")
    write_tokenizer(tokenizer, workdir / "reader")
    options = ["evaluate", "-m", "reader", "--grade", "one_hop_tiny", "--stories", 20]
    status, out, _ = run(*options)
    assert status == 0 and re.search(r"^where1 +1 +\d+ +\d+\.\d %", out, re.M)
    found = json.loads(run(*options, "--depths", "--json")[1])
    assert found["answers"]["where1"] >= 20 and len(found["depths"]) == 2
    assert found["depths"][1]["loss"] == found["loss"]
    assert "exit after" in run(*options, "--depths")[1]
    # What does not fit it.
    status, out, err = run("evaluate", "-m", "reader", "--stories", 5)
    assert status == 2 and "tokens but the model's context is 120" in err
    assert "no tokenizer" in run("evaluate", "-m", "bare")[2]


def test_check_with_references_elsewhere(run, workdir):
    status, out, err = run("check", "--reference", workdir)
    assert status == 2 and f"no reference outputs in {workdir}" in out + err
    folder = ROOT / "tests" / "reference"
    status, out, _ = run("check", "random-gpt2-relu", "--json", "--reference", folder)
    assert status == 0 and json.loads(out)["models"][0]["name"] == "random-gpt2-relu"


# train -------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """Calls of ``train``, which is not run."""
    calls = []

    def train(recipe, out, **options):
        calls.append((str(recipe), str(out), options))
        return {"finished": len(calls) == 1}

    monkeypatch.setattr("minitx.training.train.train", train)
    return calls


def test_train(run, trained, workdir):
    (workdir / "weights" / "some").mkdir(parents=True)
    (workdir / "weights" / "some" / "recipe.json").write_text("{}")
    options = dict(workers=None, resume=True, time_limit=None)
    assert run("train", "weights/some/recipe.json")[0] == 0
    assert run("train", "weights/some")[0] == 3  # not finished
    runs = os.path.join("runs", "some")
    assert [call[1:] for call in trained] == [(runs, options)] * 2  # never where the recipe lies
    os.chdir(workdir / "weights" / "some")
    run("train", "recipe.json", "--workers", 2, "--time-limit", 60, "--restart")
    assert trained[2] == ("recipe.json", runs, dict(workers=2, resume=False, time_limit=60))
    run("train", ".", "--out", "there")
    assert trained[3] == (".", "there", options)
    (workdir / "tuned.json").write_text("{}")
    run("train", str(workdir / "tuned.json"))
    assert trained[4][1] == os.path.join("runs", "tuned")  # each of a folder of recipes its own


def test_train_does_not_overwrite_a_model(run, workdir):
    write_recipe(workdir / "toy", recipe_of(FIRST))
    before = (workdir / "toy" / "model.safetensors").read_bytes()
    status, _, err = run("train", "toy/recipe.json", "--out", "toy")
    assert status == 2 and "toy: contains a model" in err and "use another output folder" in err
    assert (workdir / "toy" / "model.safetensors").read_bytes() == before
