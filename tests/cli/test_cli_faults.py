"""The command line when something is wrong: one sentence and a status, never a traceback."""

import io
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from test_training import FIRST, recipe_of
from test_training import write as write_recipe
from tiny import tiny_model

import minitx
from minitx import cli, commands
from minitx.arguments import parser, read_arguments
from minitx.checkpoints.huggingface import write_model
from minitx.cli import main
from minitx.errors import MinitxError, MinitxWarning
from minitx.pictures import output
from minitx.technique import techniques
from minitx.tree import map_weights

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ["generate", "show", "models", "list", "check", "bench", "evaluate", "train", "stories"]


# Wrong input -------------------------------------------------------------------------------------

TOO_LONG = "x" * 300
WRONG = [
    ([], "expected a command, one of generate, show, models, list,"),
    (["foo"], "no command 'foo'; expected one of generate, show, models, list,"),
    (["generat", "x"], "no command 'generat'; did you mean 'generate'"),
    (["--foo"], "no option --foo; usage: minitx"),
    (["generate"], "required: prompt"),
    (["generate", "x", "--zzz", "3"], r"no option --zzz; usage: .*-t T\] .*--seed N"),
    (["generate", "x", "--temprature=3"], "no option --temprature; did you mean --temperature"),
    (["show", "--jso"], "no option --jso; did you mean --json"),
    (["generate", "x", "--elza", "p=2"], "no option --elza; did you mean --elsa"),
    (["generate", "x", "--spec"], "no option --spec; did you mean --speculative"),
    (["help"], "no command 'help'; did you mean --help"),
    (["compare", "elsa"], "Unexpected argument 'elsa'; did you mean --elsa"),
    (["compare", "--elsa=1"], "options of a technique follow its flag, .* --elsa option=value"),
    (["explain", "--elsa"], "takes the name of a technique, without dashes: minitx explain elsa"),
    (["sweep", "--elsa", "p=1,2"], "without dashes: minitx sweep elsa"),
    (["stories", "--elza"], "no option --elza; usage:"),
    (["generate", "x", "-m", "toy", "--elsa", "bitz=8"], "no option 'bitz'; .*mean 'bits'"),
    (["explain", "elza"], "no technique 'elza'; did you mean 'elsa'"),
    (["frontier", "attention", "-m", "toy", "--methods", "elza"], "one of oracle, .*mean 'elsa'"),
    (["cost", "first-layr", "--config", "x"], "no cost formulas; did you mean 'first-layer'"),
    (["generate", "x", "-t", "0", "--seed", "1"], "-t 0 is greedy decoding.* --seed would have no"),
    (["generate", "x", "-t", "0", "--top-k", "2", "--top-p", "0.5"], "so --top-k and --top-p"),
    (["generate", "Once", "upon"], "Unexpected argument 'upon' .*in quotes"),
    (["generate", "x", "-n", "few"], "-n/--max-new-tokens: invalid int value: 'few'"),
    (["generate", "x", "-n"], "expected one argument"),
    (["generate", "x", "-m", "nowhere"], "no model 'nowhere'"),
    (["generate", "x", "-m", "\udcff"], r"no model '\\udcff'"),
    (["generate", "x", "-m", TOO_LONG], "File name too long|no model"),
    (["generate", "x", "-m", "notes.txt"], "notes.txt is not a model"),
    (["generate", "x", "-m", "."], "config.json"),
    (["generate", "x", "-m", "bare"], "no tokenizer"),
    (["generate", "x", "-m", "toy", "--tokenizer", "nowhere"], "no such tokenizer"),
    (["generate", "x", "-m", "toy", "-n", "-5"], "max_new_tokens must be .*got -5"),
    (["generate", "x", "-m", "toy", "-n", "99"], "prompt of 2 tokens plus 99 new"),
    (["generate", TOO_LONG, "-m", "toy"], "301 tokens but the context is 48; shorten"),
    (["generate", "a\udcff", "-m", "toy"], "Character 1 of the prompt is not valid UTF-8"),
    (["generate", "x", "-m", "toy", "-t", "-1"], "temperature must be .*got -1.0"),
    (["generate", "x", "-m", "toy", "-t", "nan"], "temperature must be .*got nan"),
    (["generate", "x", "-m", "toy", "--top-k", "0"], "top_k must be .*got 0"),
    (["generate", "x", "-m", "toy", "--top-p", "1.5"], "top_p must be .*got 1.5"),
    (["generate", "x", "-m", "toy", "--seed", "-1"], "seed must be .*got -1"),
    (["show", "-m", "nowhere"], "no model"),
    (["bench", "--stories"], r"no option --stories; usage: .*--quick"),
    (["evaluate", "-m", "toy", "--stories", "-3"], "expected a number from 1 to .*got -3"),
    (["evaluate", "-m", "toy", "--stories", "9" * 30], "expected a number from 1 to"),
    (["evaluate", "-m", "toy", "--grade", "ful"], "Did you mean 'full'"),
    (["train", "nowhere.json"], "nowhere.json: there is no such file"),
    (["train", "notes.txt"], "notes.txt: is not valid JSON"),
    (["train", "nonsense.json"], "nonsense.json: .*'colour'"),
    (["train", "toy"], "recipe.json: there is no such file"),
    (
        ["train", "good/recipe.json", "--workers", "0"],
        "number of workers must be an integer >= 1, got 0",
    ),
    (["train", "good/recipe.json", "--time-limit", "-1"], "expected a number from 0 to .*got -1.0"),
    (["train", "good/recipe.json", "--time-limit", "nan"], "expected a number from 0 to .*got nan"),
    (["train", "good/recipe.json", "--out", "notes.txt"], "notes.txt: cannot be written"),
    (["stories", "--grade", "\udcff"], "Unknown grade"),
    (["stories", "--grade", "fulll"], "expected one of set_phrases, .*full. Did you mean 'full'"),
    (["stories", "--split", "trian"], "one of train, calibration, evaluation. .*mean 'train'"),
    (["stories", "--seed", "-1"], "must be an integer, at least 0; got -1"),
    (["precompute", "toy", "--fold-norms"], "toy already exists; give the name of a new folder"),
    (["precompute", "notes.txt/new", "--fold-norms"], "notes.txt/new: cannot be written"),
    (["stories", "-n", "0"], "expected a number from 1 to .*got 0"),
    (["stories", "-n", "9" * 30], "expected a number from 1 to"),
]


@pytest.mark.parametrize("words, message", WRONG, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence_and_status_2(run, workdir, words, message):
    (workdir / "notes.txt").write_text("Once")
    (workdir / "nonsense.json").write_text('{"colour": 1}')
    write_recipe(workdir / "good", recipe_of(FIRST))
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert err.startswith("minitx: ") and err.count("\n") == 1 and err.endswith("\n")
    assert re.search(message, err), err


def test_unknown_model_is_compared_with_the_shipped_ones(capsys):
    assert main(["generate", "x", "-m", "storis-relu"]) == 2
    assert "Did you mean 'stories-relu'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["sweep", "ffn-skip"], ["frontier", "attention"]])
@pytest.mark.parametrize(
    "path, message",
    [
        ("a.pdf", "expected a file name that ends in .png, got 'a.pdf'"),
        ("", "expected a file name that ends in .png"),
        ("nowhere/a.png", "there is no folder nowhere; create it first"),
        ("folder.png", "folder.png is a folder; give the name of a file"),
        ("x" * 300 + ".png", "cannot be written (File name too long)"),
    ],
)
def test_picture_that_cannot_be_written_is_refused_before_the_work(
    run, workdir, monkeypatch, command, path, message
):
    (workdir / "folder.png").mkdir()
    monkeypatch.setattr(output, "need_pyplot", lambda: None)
    monkeypatch.setattr(minitx, "load", None)  # the work would begin with it
    before = sorted(workdir.iterdir())
    status, out, err = run(*command, "--png", path)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    assert sorted(workdir.iterdir()) == before


@pytest.mark.parametrize("command", [["sweep", "ffn-skip"], ["frontier", "attention"]])
def test_picture_without_matplotlib_is_refused_before_the_work(run, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setattr(minitx, "load", None)
    assert "needs matplotlib; install it with" in run(*command, "--png", "a.png")[2]


def test_precompute_refuses_its_folder_before_the_work(run, monkeypatch):
    monkeypatch.setattr(minitx, "load", None)
    assert "toy already exists" in run("precompute", "toy", "--fold-norms")[2]


NUMBERS = {
    "generate x": ("-n", "-t", "--top-k", "--top-p", "--seed"),
    "evaluate": ("--stories",),
    "compare": ("--stories", "--chains"),
    "first-token": ("--shared", "--own", "--prompts", "--rounds"),
    "batch": ("--size", "--longest", "--new", "--rounds"),
    "sweep elsa": ("--stories", "--chains"),
    "frontier attention": ("--share", "--chains", "--tokens", "--rounds"),
    "frontier structure": ("--share", "--stories", "--time-limit"),
    "frontier decoding": ("--prompts", "--length", "--new", "--rounds"),
    "train x": ("--workers", "--time-limit"),
    "stories": ("--seed", "--count"),
}
NASTY = (
    "1e999999999", "-1e999999999", "9" * 5000, "9" * 10**5, "1/1e9", "1/" + "9" * 5000, "nan",
    "9" * 5000 + "/1", "1/0", "inf", "", "x", "0x10", "1,", "\x1b[2J", "\n", "1e-999999999", "--",
)  # fmt: skip


@pytest.mark.parametrize("command", NUMBERS)
def test_number_of_any_length_is_read_or_refused_at_once(command):
    """``--share 1e999999999`` is no integer of a billion digits."""
    known = parser()
    for flag in NUMBERS[command]:
        for text in NASTY:
            began = time.process_time()
            try:
                read_arguments([*command.split(), f"{flag}={text}"], known)
            except MinitxError as error:
                assert str(error).isprintable() and len(str(error)) <= 400
            assert time.process_time() - began < 1, f"{flag} {text[:30]}"


def test_endless_stdin_is_refused(workdir, monkeypatch):
    monkeypatch.setattr("minitx.checkpoints.common.MAX_TEXT_BYTES", 1000)
    monkeypatch.setattr(commands.sys, "stdin", piped(b"x" * 1001))
    with pytest.raises(MinitxError, match="at most 1,000 bytes on stdin"):
        commands.read_stdin()


def piped(content: bytes):
    """What sys.stdin is when these bytes are piped in."""
    return io.TextIOWrapper(io.BytesIO(content))


def test_unknown_command_lists_the_commands(run):
    for words in ([], ["foo"]):
        assert all(name in run(*words)[2] for name in COMMANDS)


def test_overflow_is_refused_without_warnings(run, workdir):
    huge = map_weights(tiny_model(), lambda w: w * np.float32(1e38) if w.shape == (16, 259) else w)
    write_model(huge, workdir / "toy", "F32")
    status, out, err = run("generate", "Once", "-m", "toy")
    assert (status, out) == (2, "Once\n")
    assert re.fullmatch(r"minitx: The model's logit for token \d+ is (nan|inf), [^\n]*\n", err)


@pytest.mark.parametrize("words", [["--version"], ["--help"], *([name, "-h"] for name in COMMANDS)])
def test_help_and_version(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    out = capsys.readouterr().out
    assert ended.value.code == 0
    if words == ["--version"]:
        assert out == f"minitx {minitx.__version__}\n"
    elif words == ["--help"]:
        assert all(re.search(rf"^ +{name} +\w+", out, re.M) for name in COMMANDS)
    else:
        assert out.startswith(f"usage: minitx {words[0]}")


def test_help_lists_techniques_and_the_options_of_those_given(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for technique in techniques():
        assert f" {technique.flag} {technique.card.summary}" in text, technique.name
    with pytest.raises(SystemExit):
        main(["compare", "--elsa", "--help"])
    text = capsys.readouterr().out
    assert "--elsa: Select keys by comparing sign hashes" in text and "  bits=None\n" in text
    assert "--fold-norms" not in text
    with pytest.raises(SystemExit):
        main(["stories", "--help"])
    text = capsys.readouterr().out
    assert "--elsa" not in text and "Grades, from easy to hard: set_phrases, told_twice," in text
    assert "train (default), calibration or evaluation" in text


# Width -------------------------------------------------------------------------------------------

PRINTED = [
    *([name, "--help"] for name in COMMANDS + ["compare", "sweep", "frontier", "cost"]),
    *([["--help"], ["list"], ["models"], ["show"]]),
    ["frontier"],
    *(["frontier", family, "--help"] for family in ("structure", "attention", "decoding")),
    *(["explain", technique.name] for technique in techniques()),
    ["compare", "--early-exit", "--stories", "2"],
    ["sweep", "ffn-skip", "threshold=0.9,0.95", "cold_start=3", "warm_up=0", "--stories", "1"],
    ["evaluate", "--stories", "3", "--depths"],
    ["first-token", "--prompts", "2", "--rounds", "1"],
    ["batch", "--size", "1", "--longest", "8", "--new", "2", "--rounds", "1"],
    ["cost", "first-layer", "--config", str(ROOT / "weights" / "stories" / "config.json")],
    ["check", "stories-skipless"],
    [*["frontier", "attention", "--chains", "1", "--tokens", "48", "--rounds", "1"]]
    + ["--methods", "window,random,predictive-attention"],
    [
        *("frontier", "decoding", "--prompts", "1", "--new", "4", "--rounds", "1"),
        *("--methods", "speculative draft=self,prefix_cache + draft,answer_cache,lookahead"),
    ],
]


@pytest.mark.parametrize("words", PRINTED, ids=lambda words: " ".join(words)[:30])
def test_what_is_printed_fits_100_columns(capsys, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "100")
    with suppress(SystemExit):  # after --help
        main(words)
    lines = capsys.readouterr().out.splitlines()
    assert lines and [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError(13, "Permission denied", "secret"), "secret: Permission denied."),
        (OSError(28, "No space left on device"), "output: No space left on device."),
        (MemoryError(), "there is not enough memory for this."),
    ],
)
def test_errors_of_the_system_are_one_sentence(run, monkeypatch, error, words):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(minitx, "load", fail)
    assert run("show") == (2, "", f"minitx: {words}\n")


# In a process of its own -------------------------------------------------------------------------


def start(*words, code="from minitx.cli import main; import sys; sys.exit(main())", **options):
    """The command in a process of its own."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=environment, **options)


@pytest.mark.skipif(os.name != "posix", reason="about signals and closed pipes of Unix")
class TestProcess:
    def test_module_and_version(self):
        done = subprocess.run(
            [sys.executable, "-m", "minitx", "--version"], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, f"minitx {minitx.__version__}\n")

    def test_prompt_that_is_not_utf8(self, workdir):
        out, err = (process := start("generate", b"a\xff", "-m", "toy")).communicate()
        assert (process.returncode, out) == (2, b"") and b"not valid UTF-8" in err

    @pytest.mark.parametrize("words", [["stories", "-n", "3000"], ["stories", "-n", "1"]])
    def test_closed_pipe(self, words):
        process = start(*words)
        process.stdout.read(10 if words[-1] != "1" else 0)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == cli.CLOSED_PIPE
        process.stderr.close()

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
    def test_full_disk(self, workdir):
        for words in (["stories"], ["generate", "x", "-m", "toy"]):
            with open("/dev/full", "wb") as full:
                process = start(*words, stdout=full)
            err = process.communicate()[1].decode()
            assert (process.returncode, err) == (2, "minitx: output: No space left on device.\n")

    def test_ctrl_c_while_streaming(self, workdir):
        slowly = (
            "import time, sys; from minitx.model import Transformer; from minitx.cli import main\n"
            "step = Transformer.next_argmax\n"
            "def slow(*arguments): time.sleep(0.2); return step(*arguments)\n"
            "Transformer.next_argmax = slow\n"
            "sys.exit(main())"
        )
        process = start("generate", "Once", "-m", "toy", code=slowly)
        assert process.stdout.read(4) == b"Once"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert process.returncode == 130 and out.endswith(b"\n")
        assert err == b"minitx: stopped.\n"

    def test_closed_stdout(self, workdir):
        """Neither may take what is closed for the other."""
        command = f"{sys.executable} -m minitx generate x -m {workdir / 'toy'} -n 3"
        for closed, open_ in ((">&-", "stderr"), ("2>&-", "stdout")):
            done = subprocess.run(f"{command} {closed}", shell=True, cwd=ROOT, capture_output=True)
            assert done.returncode == 0
            assert (b"3 tokens" in done.stderr) == (open_ == "stderr")
            assert (done.stdout != b"") == (open_ == "stdout") and b"tokens" not in done.stdout

    def test_terminal_encoding_without_the_character(self, workdir, monkeypatch):
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")
        out, err = (process := start("generate", "Zoë", "-m", "toy", "-n", "3")).communicate()
        assert process.returncode == 0 and out.startswith(b"Zo?") and b"Traceback" not in err


# Warnings ----------------------------------------------------------------------------------------


def test_a_warning_is_one_line_on_stderr_and_the_command_goes_on(run, monkeypatch):
    def show(args):
        warnings.warn("this check can never pay", MinitxWarning, stacklevel=2)
        print("went on")

    monkeypatch.setattr(commands, "show", show)
    assert run("show", "-m", "toy") == (0, "went on\n", "minitx: note: this check can never pay\n")
