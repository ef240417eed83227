"""Finding models and tokenizers by name or path."""

import os
from pathlib import Path

import numpy as np
import pytest
from literal_llama2c import SHAPES, WRITERS, make_weights
from test_llama2c_tokenizer import RAW, tokenizer_bin
from tiny import END, TOKENIZER, tiny_folder

import minitx
from minitx.checkpoints import find
from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.errors import MinitxError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, with "small" as the only shipped model."""
    for name in ("installed", "checkout", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(find, "SHIPPED", [tmp_path / "installed", tmp_path / "checkout"])
    tiny_folder(tmp_path / "checkout" / "small")
    (tmp_path / "checkout" / "untrained").mkdir()  # a recipe without weights
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def llama2c_file(path, vocab_size=260):
    sizes = (*SHAPES["grouped"][:5], vocab_size, *SHAPES["grouped"][6:])
    path.write_bytes(WRITERS[1](make_weights(sizes, True), sizes, True))
    return path


def llama2c_tokenizer(path, vocab_size=260):
    tokens = [b"<unk>", b"^", b"$", *RAW, *(b" " * n for n in range(1, vocab_size - 258))]
    path.write_bytes(tokenizer_bin(tokens, [0.0] * vocab_size))
    return path


# Models ------------------------------------------------------------------------------------------


def test_shipped_model_is_found_by_name(here):
    assert find.shipped() == {"small": here.parent / "checkout" / "small"}
    lm = minitx.load("small")
    assert lm.name == "small" and lm.encode("on") == [END, 256]
    tiny_folder(here.parent / "installed" / "small", "gpt2")
    assert minitx.load("small").model.config.family == "gpt2"  # the installed one takes precedence


def test_name_prefers_shipped_model_over_folder(here):
    tiny_folder(here / "small", "gpt2")
    families = {
        str(where): minitx.load(where).model.config.family
        for where in ("small", "./small", here / "small")
    }
    assert list(families.values()) == ["llama", "gpt2", "gpt2"]
    assert minitx.load(Path("small")).model.config.family == "gpt2"


@pytest.mark.parametrize("path", ["My-Model-1.5B", "a/b.c/d", "."])
def test_folder_path_loads_model_and_tokenizer(here, path):
    lm = minitx.load(tiny_folder(here / path))
    assert lm.name == (here / path).resolve().name and lm.tokenizer.vocab_size == 259
    assert lm.generate("on", 3) == minitx.load("small").generate("on", 3)


def test_dtype_is_respected_or_rejected():
    folder = Path(__file__).parent.parent / "reference" / "files"
    path = next(path.parent for path in sorted(folder.glob("*/config.json")))
    for dtype in (np.float32, np.float64, "float32", "float64"):
        lm = minitx.load(path, dtype=dtype)
        assert lm.logits([1, 2]).dtype == dtype
    for wrong in (
        "int8",
        "foo",
        "",
        ">f8",
        "f4,f4",
        None,
        3,
        [1],
        object(),
        "x" * 10**6,
        np.float16,
    ):
        with pytest.raises(MinitxError, match="dtype must be float32 or float64, got .") as caught:
            minitx.load(path, dtype=wrong)
        assert len(str(caught.value)) < 120


def test_llama2c_file_loads_with_tokenizer_beside_it(here):
    lm = minitx.load(llama2c_file(here / "stories15M.bin"))
    assert (lm.name, lm.tokenizer, lm.model.config.vocab_size) == ("stories15M", None, 260)
    llama2c_tokenizer(here / "tokenizer.bin")
    lm = minitx.load("stories15M.bin")
    assert lm.encode("a") == [1, 259, 3 + 97]
    assert isinstance(lm.generate("a", 4), str)


# Tokenizers --------------------------------------------------------------------------------------


def test_model_without_tokenizer_generates_ids(here):
    lm = minitx.load(tiny_folder(here / "bare", tokenizer=False))
    assert lm.tokenizer is None and len(lm.generate([1, 2], 3)) == 3


def test_tokenizer_false_loads_model_for_ids_whatever_its_files_are(here):
    folder = tiny_folder(here / "full")
    for text in ("{", '{"model": {"type": "Unigram"}}'):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(MinitxError, match="without a tokenizer, on token ids: tokenizer=False"):
            minitx.load(folder)
        lm = minitx.load(folder, tokenizer=False)
        assert lm.tokenizer is None and len(lm.generate([1, 2], 3)) == 3
    model = llama2c_file(here / "model.bin")
    (here / "tokenizer.bin").write_bytes(b"")
    with pytest.raises(MinitxError, match=r"tokenizer=False \(--no-tokenizer\)"):
        minitx.load(model)
    assert minitx.load(model, False).tokenizer is None
    with pytest.raises(MinitxError, match="tokenizer must be a name or a path, got True"):
        minitx.load(model, True)


def test_explicit_tokenizer_takes_precedence(here):
    bare = tiny_folder(here / "bare", tokenizer=False)
    for where in ("small", tiny_folder(here / "full"), here / "full" / "tokenizer.json"):
        assert minitx.load(bare, where).encode("on") == [END, 256]
        assert minitx.load(bare, tokenizer=str(where)).encode("on") == [END, 256]
    model = llama2c_file(here / "model.bin")
    (here / "other").mkdir()
    llama2c_tokenizer(here / "other" / "tokenizer.bin")
    assert minitx.load(model, here / "other").encode("") == [1]
    # An explicit tokenizer takes precedence; the one next to the model is not even read.
    (here / "full" / "tokenizer.json").write_text("{")
    assert minitx.load(here / "full", "small").encode("on") == [END, 256]


def test_tokenizer_of_another_vocabulary_is_rejected(here):
    larger = ByteLevelBPE(
        [*TOKENIZER.tokens, b"onc", b"once"], [*TOKENIZER.merges, (256, 99), (258, 101)]
    )
    folder = tiny_folder(here / "mine", tokenizer=False)
    write_tokenizer(larger, folder)
    with pytest.raises(MinitxError, match="has 260 tokens but the model's vocabulary has 259"):
        minitx.load(folder)
    llama2c_file(here / "model.bin")
    llama2c_tokenizer(here / "tokenizer.bin", 261)
    with pytest.raises(MinitxError, match="follow the 260 tokens of the model"):
        minitx.load("model.bin")
    with pytest.raises(MinitxError, match="tokenizer.bin: "):
        minitx.load("small", "tokenizer.bin")


# Missing files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, tokenizer, message",
    [
        ("smal", None, r"no model 'smal': .* shipped models \(small\)"),
        ("no\nsuch", None, r"no model 'no\\nsuch'"),
        ("untrained", None, "no model 'untrained'"),
        ("a\0b", None, "no model"),
        (7, None, "model must be a name or a path, got 7"),
        (None, None, "model must be a name or a path, got None"),
        ("text.txt", None, "text.txt is not a model: expected a Hugging Face folder"),
        ("text.txt/x", None, "no model 'text.txt/x'"),
        ("x" * 5000, None, "cannot be read"),
        ("empty", None, "empty/config.json: there is no such file"),
        ("tokenizer.bin", None, "tokenizer.bin: "),
        ("small", "smal", "smal: there is no such tokenizer"),
        ("small", "empty", "empty: expected a tokenizer.json"),
        ("small", "text.txt", "text.txt: is not valid JSON"),
        ("small", 7, "tokenizer must be a name or a path, got 7"),
        ("small", "x" * 5000, "cannot be read"),
    ],
)
def test_missing_model_or_tokenizer_is_one_line_error(here, model, tokenizer, message):
    (here / "text.txt").write_text("Once")
    (here / "empty").mkdir()
    llama2c_tokenizer(here / "tokenizer.bin")
    with pytest.raises(MinitxError, match=message):
        minitx.load(model, tokenizer)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read everything"
)
def test_unreadable_folder_is_reported(here):
    folder = tiny_folder(here / "secret")
    folder.chmod(0)
    try:
        with pytest.raises(MinitxError, match="cannot be read"):
            minitx.load(folder)
    finally:
        folder.chmod(0o700)


def test_no_shipped_models_is_reported(here, monkeypatch):
    monkeypatch.setattr(find, "SHIPPED", [here / "nowhere"])
    with pytest.raises(MinitxError, match="none found"):
        minitx.load("stories")
