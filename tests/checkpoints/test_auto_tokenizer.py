"""The tokenizer of a folder: every file that transformers' AutoTokenizer follows, and its class."""

import json

import pytest
from tokenizer_files import FIELDS, PIPELINES, write_folder

from minitx.checkpoints.tokenizer_json import read_tokenizer
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.errors import MinitxError

TEXTS = PIPELINES["folder texts"]
BYTES = {"tokenizer.json": ["bytes", {}]}


@pytest.mark.parametrize("name", PIPELINES["folders"])
def test_ids_equal_autotokenizer(name, tmp_path):
    found = PIPELINES["folders"][name]
    tokenizer = read_tokenizer(write_folder(tmp_path, found["files"]))
    for text, ids in zip(TEXTS, found["ids"], strict=True):
        assert tokenizer.encode(text) == ids, f"{name}: {text!r}"
    for which, id in zip(("bos", "eos"), found["bos and eos"], strict=True):
        assert id in (None, getattr(tokenizer, which)), f"{name}: {which}"


@pytest.mark.parametrize("name", PIPELINES["folders"])
def test_written_tokenizer_needs_no_other_file(name, tmp_path):
    tokenizer = read_tokenizer(write_folder(tmp_path, PIPELINES["folders"][name]["files"]))
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out")
    copy = read_tokenizer(tmp_path / "out")
    assert [copy.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    ids = range(tokenizer.vocab_size)
    assert copy.decode(ids, skip_special=True) == tokenizer.decode(ids, skip_special=True)


def test_later_flags_replace_earlier_ones(tmp_path):
    """But a token that was special once is skipped in decoding, as in the reference."""
    flags = {"content": "<|endoftext|>", "lstrip": True, "special": False}
    config = {"added_tokens_decoder": {"419": flags}}
    tokenizer = read_tokenizer(write_folder(tmp_path, BYTES | {"tokenizer_config.json": config}))
    (token,) = tokenizer.added
    assert (token.lstrip, token.special) == (True, False)
    assert tokenizer.decode([64, 419, 65], skip_special=True) == "ab"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.model": 1}, "tokenizer.model is a SentencePiece model"),
        ({"tekken.json": 1}, "tekken.json is Mistral's tekken vocabulary"),
        ({"tiktoken.model": 1}, "tiktoken.model is a tiktoken vocabulary"),
        ({}, "expected a tokenizer.json, or a vocab.json and a merges.txt"),
        ({"vocab.json": "bytes"}, "has a vocab.json but no tokenizer.json"),
        (BYTES | {"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}, "'T5Tokenizer'"),
        (BYTES | {"tokenizer_config.json": {"tokenizer_class": 7}}, "tokenizer_class 7"),
        (
            BYTES | {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a.B", None]}}},
            "auto_map",
        ),
        (BYTES | {"tokenizer_config.json": {"fix_mistral_regex": True}}, "fix_mistral_regex"),
        (BYTES | {"tokenizer_config.json": {"split_special_tokens": 1}}, "split_special_tokens"),
        (BYTES | {"tokenizer_config.json": {"extra_special_tokens": "<a>"}}, "must be a list"),
        (BYTES | {"tokenizer_config.json": {"extra_special_tokens": [3]}}, "extra_special_tokens"),
        (BYTES | {"tokenizer_config.json": {"added_tokens_decoder": []}}, "added_tokens_decoder"),
        (BYTES | {"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}, "id 'x'"),
        (
            BYTES | {"tokenizer_config.json": {"added_tokens_decoder": {"430": {"content": "z!"}}}},
            "'z!' must have id 420, the next free id, got 430",
        ),
        (BYTES | {"added_tokens.json": {"z!": -1}}, "the id -1"),
        ({"tokenizer.json": ["bytes", {"model": {"type": "WordPiece"}}]}, "must be BPE"),
        ({"tokenizer.json": ["bytes", {"model": {"type": "Unigram", "vocab": []}}]}, "must be BPE"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(files, message, tmp_path):
    with pytest.raises(MinitxError, match=message) as caught:
        read_tokenizer(write_folder(tmp_path, files))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_unused_settings_do_not_matter(tmp_path):
    config = {"model_max_length": 10**15, "padding_side": 7, "do_lower_case": True, "mystery": {}}
    config |= {"clean_up_tokenization_spaces": True, "chat_template": [1], "errors": "replace"}
    with_config = write_folder(tmp_path, BYTES | {"tokenizer_config.json": config})
    ids = read_tokenizer(with_config).encode("The kite <|endoftext|>")
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_tokenizer(tmp_path).encode("The kite <|endoftext|>") == ids


def test_merges_file_is_read_line_by_line(tmp_path):
    files = PIPELINES["folders"]["GPT-2's by model type, from vocab.json and merges.txt"]["files"]
    folder = write_folder(tmp_path, files)
    before = read_tokenizer(folder).encode("the kite")
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert read_tokenizer(folder).encode("the kite") == before
    for bad, message in ((b"a\n", "merge 0 is 'a'"), (b"\xff", "not valid UTF-8")):
        merges.write_bytes(bad)
        with pytest.raises(MinitxError, match=message):
            read_tokenizer(folder)
    merges.unlink()
    with pytest.raises(MinitxError, match="merges.txt"):
        read_tokenizer(folder)


def test_file_of_another_name_is_read_alone(tmp_path):
    file = tmp_path / "my-tokenizer.json"
    file.write_text(json.dumps(FIELDS))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "the"}')
    assert read_tokenizer(file).bos == 419
