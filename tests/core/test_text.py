"""Any text: read within bounds, encoded once, every token scored once."""

import io
import os
import sys
from dataclasses import replace

import pytest
from tiny import END, TOKENIZER, tiny_lm

from minitx import text as module
from minitx.errors import MinitxError
from minitx.text import (
    Text,
    as_text,
    count_bytes,
    first_ids,
    passages,
    prefix_of,
    read_text,
    start_of,
    windows,
)

IDS = list(range(10, 20))


def test_windows_with_a_start_score_every_token_once_after_it():
    """Ten tokens in windows of 4: inputs are all but the last id of each."""
    assert windows(IDS, 4, [1]) == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19]]
    targets = [token for window in windows(IDS, 4, [1]) for token in window[1:]]
    assert targets == IDS, "a token of the text is scored twice, or never"


def test_windows_without_a_start_score_every_token_but_the_first():
    found = windows(IDS, 4, [])
    assert found == [[10, 11, 12, 13, 14], [14, 15, 16, 17, 18], [18, 19]]
    assert [token for window in found for token in window[1:]] == IDS[1:]
    assert windows(IDS[:9], 4, [])[-1] == [14, 15, 16, 17, 18], "a window without a target"


def test_passages_begin_like_prompts_and_are_full():
    assert passages(IDS, 5, [1]) == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17]]
    assert passages(IDS, 5, []) == [IDS[:5], IDS[5:]]
    assert passages(IDS[:3], 5, [1]) == [[1, 10, 11, 12]], "a short text is one short passage"


def test_text_starts_from_bos_else_eos_else_nothing():
    lm = tiny_lm()
    config = lm.model.config

    def with_ends(bos, eos):
        ends = replace(config, bos=bos, eos=eos)
        return start_of(replace(lm, model=replace(lm.model, config=ends)))

    assert [with_ends(3, (4,)), with_ends(None, (4, 5)), with_ends(None, ())] == [[3], [4], []]
    assert prefix_of(lm) == [END], "this tokenizer prepends it to every prompt"


def test_first_ids_of_a_long_text_are_those_of_the_whole_text(monkeypatch):
    """Only a prefix of the text is encoded, which must not change the ids."""
    lm, content = tiny_lm(), "once upon a time, a balance was once found in France; " * 400
    whole = TOKENIZER.encode(content, special=False)
    encoded = []
    encode = TOKENIZER.encode
    monkeypatch.setattr(
        TOKENIZER,
        "encode",
        lambda text, special=True: encoded.append(text) or encode(text, special),
    )
    for count in (2, 300, 4000):
        assert first_ids(lm, Text(content), count) == whole[:count]
    assert len(encoded[0]) < len(content) / 10, "the whole text was encoded for two tokens"
    assert first_ids(lm, Text(content), 10**9) == whole
    assert count_bytes(lm, whole) == len(content)


def test_text_of_one_token_and_no_text_are_refused():
    with pytest.raises(MinitxError, match="a.txt has 1 token; expected a text of at least 2."):
        first_ids(tiny_lm(), Text("a", "a.txt"), 10)
    with pytest.raises(MinitxError, match=r"Expected a text \(str\), got a int.*read_text"):
        as_text(3)
    with pytest.raises(MinitxError, match="no tokenizer"):
        first_ids(tiny_lm(tokenizer=None), Text("some text"), 10)


# Files -------------------------------------------------------------------------------------------


def test_read_text_decodes_utf8_and_drops_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\n")
    assert read_text(path) == Text("naïve\r\n", str(path))


def test_read_text_reads_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("né".encode())))
    assert read_text("-") == Text("né", "stdin")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected a text, got an empty one"),
        (b" \n\t", "expected a text, got an empty one"),
        (b"ab\xffc", "byte 2 is not valid UTF-8"),
        (b"\x7fELF\0\1", "holds NUL bytes"),
        ("text".encode("utf-16"), "holds NUL bytes|not valid UTF-8"),
        (b"cut \xc3", "byte 4 is not valid UTF-8"),
    ],
)
def test_files_that_are_no_text_are_refused_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(MinitxError, match=words) as found:
        read_text(path)
    assert str(found.value).startswith(f"{path}: ") and "\n" not in str(found.value)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", r"a pipe \(FIFO\); expected a regular file; .* - to read stdin"),
        ("/dev/zero", "is a device"),
        (tmp_path / "none", "there is no such file"),
        ("a\0b", "no file can have this name"),
        ("x" * 5000, "cannot be read"),
    ):
        with pytest.raises(MinitxError, match=words) as found:
            read_text(path)
        assert len(str(found.value)) <= 400 and str(found.value).isprintable()
        assert ". " not in str(found.value).replace("...", ""), "one sentence"


def test_only_the_beginning_of_a_huge_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 4)
    (tmp_path / "a.txt").write_bytes("abcé and more".encode())
    assert read_text(tmp_path / "a.txt").content == "abc", "the cut is within a character"
