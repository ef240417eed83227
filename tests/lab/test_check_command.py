"""What ``minitx check`` prints and returns, models in folders, and the reference files themselves.
Which models it finds to be broken: test_check.py."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tiny import decode

from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.huggingface import write_model
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.cli import main
from minitx.decode import Autoregressive, Sampler
from minitx.errors import MinitxError
from minitx.lab import check
from minitx.lab.check import check_model, check_models, compare, run_stages
from minitx.lab.comparison import AGREES
from minitx.lab.reference import (
    FOLDER,
    Reference,
    files_about,
    find_references,
    read_reference,
    seeded_model,
    seeded_weights,
    write_reference,
)

LLAMA = read_reference(FOLDER / "random-llama-gqa.npz")
SOUND = check_model("random-llama-gqa")

# Printing -----------------------------------------------------------------------------------------


def test_check_report_of_a_correct_model(capsys):
    assert main(["check", "random-llama-gqa"]) == 0
    text = capsys.readouterr().out
    for stage in ("embedding", "block 0", "block 1", "block 2", "norm", "logits"):
        (line,) = [line for line in text.splitlines() if line.startswith(stage)]
        assert line.count("[OK]") == 2
    assert "[DIFF]" not in text
    assert "[OK]   greedy in float32: 32 of 32 tokens match" in text
    assert "Agrees. The largest relative error is" in text
    assert max(map(len, text.splitlines())) <= 100


def test_check_json_of_a_correct_model(capsys):
    assert main(["check", "--json", "random-gpt2-relu", "random-llama-mqa"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert [m["name"] for m in found] == ["random-gpt2-relu", "random-llama-mqa"]
    assert all(m["verdict"] == AGREES and m["bug_in"] is None for m in found)
    assert [s["stage"] for s in found[0]["stages"]][:2] == ["embedding", "block 0"]
    logits = found[0]["stages"][-1]
    assert logits["float64"]["ok"] and 0 < logits["float64"]["error"] < 1e-12
    assert logits["float32"]["relative"] == logits["float32"]["error"] / logits["largest"]
    assert found[0]["greedy"] == {"tokens": 32, "same": {"float32": 32, "float64": 32}}


def test_bug_exits_1_with_a_full_report(capsys, monkeypatch):
    def broken(config, seed, dtype):
        return seeded_model(replace(config, norm_eps=1e-4), seed, dtype)

    monkeypatch.setattr(check, "seeded_model", broken)
    assert check_models(["random-llama-gqa"]) == 1
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("block 0")]
    assert line.count("[DIFF]") == 2
    assert "A bug: it first appears in block 0" in text


def test_check_without_names_checks_all(capsys, monkeypatch):
    monkeypatch.setattr(check, "shipped", lambda: {})
    names = [name for name in find_references() if name.startswith("random-")]
    monkeypatch.setattr(check, "find_references", lambda folder: dict.fromkeys(names))
    monkeypatch.setattr(check, "check_model", lambda name, folder: compare_as(name))
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("[OK]")] == names


def compare_as(name):
    """A cheap stand-in: the comparison of one model under another's name."""
    return replace(SOUND, reference=replace(LLAMA, name=name))


# Models in folders --------------------------------------------------------------------------------

BYTES = [bytes([i]) for i in range(256)]
TEXTS = ["Once upon a time", "Zoë — 🙂\n\n"]
CONFIG = replace(LLAMA.config, vocab_size=258, layers=1)


@pytest.fixture
def folders(tmp_path):
    """A model's folder and a folder of references, in which minitx itself stands for the other
    framework: here it matters only what is read and compared."""
    tokenizer = ByteLevelBPE([*BYTES, b"on", b"ce"], [(111, 110), (99, 101)])
    model = seeded_model(CONFIG, 5)
    folder, references = tmp_path / "mine", tmp_path / "references"
    write_model(model, folder, "F32")
    write_tokenizer(tokenizer, folder)
    references.mkdir()
    texts = [(text, tokenizer.encode(text)) for text in TEXTS]
    ids = np.array(texts[0][1])
    rows = np.array([0, len(ids) - 1])
    hidden, logits = {}, {}
    for dtype in ("float32", "float64"):
        *h, logits[dtype] = [x[rows] for x in stages_of(dtype, ids)]
        hidden[dtype] = np.stack(h)
    greedy = np.array(list(decode(Autoregressive(), model, ids.tolist(), Sampler(), 24)))
    about = files_about(folder) | {"texts": texts, "versions": {"transformers": "none"}}
    reference = Reference("mine", about, ids, rows, ids, greedy, hidden, logits)
    write_reference(reference, references)
    return str(folder), references


def stages_of(dtype, ids):
    return run_stages(seeded_model(CONFIG, 5, dtype), ids).values()


def test_check_model_in_a_folder(folders, capsys):
    folder, references = folders
    assert check_models([folder], folder=references) == 0
    assert "[OK]   tokenizer: the same ids for 2 texts" in capsys.readouterr().out


def test_different_tokenizer_is_a_bug(folders, capsys):
    folder, references = folders
    write_tokenizer(ByteLevelBPE([*BYTES, b"on", b"ce"], [(111, 110)]), folder)
    assert check_models([folder], folder=references) == 1
    text = capsys.readouterr().out
    assert "A bug in the tokenizer" in text
    assert "[DIFF] tokenizer: other ids for 'Once upon a time'" in text


def test_other_weights_are_refused(folders, capsys):
    folder, references = folders
    write_model(seeded_model(CONFIG, 6), folder, "F32")
    assert check_models([folder], folder=references) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "its reference was made from other weights" in text
    assert "tests/reference/make.py mine" in text


def test_models_without_reference_are_reported(folders, tmp_path, capsys):
    folder, references = folders
    other = Path(folder).rename(tmp_path / "unknown")
    assert check_models([str(other)], folder=references) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "There are no reference outputs for unknown; choose from mine." in text
    assert check_models(["nowhere", "random-llama-gqa"], as_json=True) == 2
    missing, sound = json.loads(capsys.readouterr().out)["models"]
    assert missing["verdict"] == "not checked" and "no model 'nowhere'" in missing["explanation"]
    assert sound["verdict"] == AGREES


def test_check_outside_a_checkout_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minitx.lab.reference.FOLDER", tmp_path)
    assert main(["check"]) == 2
    captured = capsys.readouterr()
    assert "run this in a checkout" in captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err


def test_other_sizes_are_refused():
    def with_size(**size):
        return compare(LLAMA, lambda dtype: seeded_model(replace(LLAMA.config, **size), 0, dtype))

    with pytest.raises(MinitxError, match="has layers = 2 but its reference has 3"):
        with_size(layers=2)
    with pytest.raises(MinitxError, match="vocab_size = 47"):
        with_size(vocab_size=47)


# Files --------------------------------------------------------------------------------------------


def test_reference_round_trip(tmp_path):
    again = read_reference(write_reference(LLAMA, tmp_path))
    assert again.about == LLAMA.about and again.name == LLAMA.name
    for name in ("ids", "rows", "prompt", "greedy"):
        assert np.array_equal(getattr(again, name), getattr(LLAMA, name))
    for dtype, x in LLAMA.stages("float64").items():
        assert np.array_equal(again.stages("float64")[dtype], x)
    assert again.config == LLAMA.config and asdict(again.config) == asdict(LLAMA.config)


def test_damaged_reference_is_refused(tmp_path):
    whole = (FOLDER / "random-llama-gqa.npz").read_bytes()
    path = tmp_path / "x.npz"
    np.savez(tmp_path / "part.npz", about=np.array("{}"), ids=LLAMA.ids)
    np.save(tmp_path / "one.npy", LLAMA.ids)
    np.savez(tmp_path / "pickle.npz", about=np.array([{}], object))
    bad = {name: (tmp_path / name).read_bytes() for name in ("part.npz", "one.npy", "pickle.npz")}
    for content in (
        b"",
        b"text",
        whole[:-100],
        whole[:5000] + b"xxxx" + whole[5004:],
        *bad.values(),
    ):
        path.write_bytes(content)
        with pytest.raises(MinitxError, match="not a reference file .*make.py x"):
            read_reference(path)
    with pytest.raises(MinitxError, match="no such file"):
        read_reference(tmp_path / "absent.npz")


def test_seeded_weights_are_robust():
    """Multiples of 1/4096, the same again, gains and biases that are not trivial."""
    config = LLAMA.config
    drawn = seeded_weights(config, 3)
    for path, w in drawn.items():
        assert w.dtype == np.float32 and np.array_equal(w * 4096, np.rint(w * 4096))
        assert np.array_equal(w, seeded_weights(config, 3)[path])
        assert w.std() > 0.02
    assert not np.array_equal(drawn["norm.gain"], seeded_weights(config, 4)["norm.gain"])
