"""The steps of a tokenizer, one by one, on examples to check by hand."""

import pytest

from minitx.checkpoints import decoders, normalizers, pre_tokenizers
from minitx.checkpoints.added_tokens import AddedToken, AddedTokenSplitter
from minitx.checkpoints.bpe import BPE
from minitx.checkpoints.post_processor import read_post_processor

SPACE = "\u2581"

# Added tokens


def test_added_tokens_share_no_whitespace():
    """What one has stripped to its right is gone for the next, and may be all of it."""

    def pieces(text, *tokens):
        return AddedTokenSplitter(tokens, lambda text: text).split(text)

    left, right = AddedToken("<l>", 1, lstrip=True), AddedToken("<r>", 2, rstrip=True)
    assert pieces("a  <r>  <l>b", left, right) == ["a  ", 2, 1, "b"]
    assert pieces("      ", AddedToken("  ", 3, lstrip=True, rstrip=True)) == [3]


# Normalizers


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        (None, "A b", "A b"),
        ({"type": "NFC"}, "e\u0301", "\u00e9"),
        ({"type": "NFKC"}, "\ufb01\u00b2", "fi2"),
        ({"type": "NFD"}, "\u00e9", "e\u0301"),
        ({"type": "Lowercase"}, "\u0391\u03a3", "\u03b1\u03c3"),  # no final sigma
        ({"type": "Prepend", "prepend": "_"}, "a", "_a"),
        ({"type": "Prepend", "prepend": "_"}, "", ""),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "_"}, "a  b", "a__b"),
        ({"type": "Strip", "strip_left": True, "strip_right": False}, "\u2003 a ", "a "),
        ({"type": "Strip", "strip_left": True, "strip_right": True}, "\x1c a \x85", "\x1c a"),
        ({"type": "Sequence", "normalizers": []}, "a", "a"),
        (
            {
                "type": "Sequence",
                "normalizers": [{"type": "Lowercase"}, {"type": "Prepend", "prepend": "X"}],
            },
            "A",
            "Xa",
        ),
    ],
)
def test_normalizer_worked_examples(step, text, expected):
    assert normalizers.read_normalizer("file", step)(text) == expected


# Pre-tokenizers


def split(step, text, at_start=True):
    return pre_tokenizers.read_pre_tokenizer("file", step)([text], at_start)


@pytest.mark.parametrize(
    ("behavior", "words"),
    [
        ("Isolated", ["a", "-", "-", "b", "-"]),
        ("Removed", ["a", "b"]),
        ("MergedWithPrevious", ["a-", "-", "b-"]),
        ("MergedWithNext", ["a", "-", "-b", "-"]),
        ("Contiguous", ["a", "--", "b", "-"]),
    ],
)
def test_split_keeps_removes_or_merges_what_matches(behavior, words):
    step = {"type": "Split", "pattern": {"String": "-"}, "behavior": behavior}
    assert split(step, "a--b-") == words
    assert "".join(split(step | {"invert": True}, "a--b-")) in ("a--b-", "---")


def test_digits_are_split_apart_or_together():
    step = {"type": "Digits", "individual_digits": True}
    assert split(step, "a12\u00bd b") == ["a", "1", "2", "\u00bd", " b"]
    assert split(step | {"individual_digits": False}, "a12\u00bd b") == ["a", "12\u00bd", " b"]


@pytest.mark.parametrize(
    ("scheme", "first", "later"),
    [("always", "_a_b", "_a_b"), ("first", "_a_b", "a_b"), ("never", "a_b", "a_b")],
)
def test_metaspace_prepends_by_scheme(scheme, first, later):
    step = {"type": "Metaspace", "replacement": "_", "prepend_scheme": scheme, "split": False}
    assert split(step, "a b") == [first]
    assert split(step, "a b", at_start=False) == [later]
    assert split(step, " a") == ["_a"], "a space is there already"
    assert split(step | {"split": True}, "a  b", at_start=True)[-2:] == ["_", "_b"]


def test_old_key_of_metaspace_means_never():
    step = {"type": "Metaspace", "replacement": "_", "add_prefix_space": False}
    assert split(step, "a") == ["a"]


def test_byte_level_spells_bytes():
    step = {"type": "ByteLevel", "add_prefix_space": True}
    assert split(step, "caf\u00e9 1") == ["\u0120caf\u00c3\u00a9", "\u01201"]
    assert split(None, "a b") == ["a b"]


# The model

VOCAB = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "<0xC3>": 4, "<0xA9>": 5}


def test_unknown_characters_become_bytes_or_unknown_or_nothing():
    merges = [("a", "b")]
    assert BPE(VOCAB, merges).ids("abx\u00e9b") == [3, 2]
    assert BPE(VOCAB, merges, unk="<unk>").ids("axya") == [1, 0, 0, 1]
    assert BPE(VOCAB, merges, unk="<unk>", fuse_unk=True).ids("axya") == [1, 0, 1]
    fallback = BPE(VOCAB, merges, unk="<unk>", byte_fallback=True)
    assert fallback.ids("a\u00e9x") == [1, 4, 5, 0], "x has no byte tokens"


def test_ignore_merges_looks_up_the_whole_word():
    assert BPE(VOCAB, [], ignore_merges=True).ids("ab") == [3]
    assert BPE(VOCAB, []).ids("ab") == [1, 2]


# Post-processors


def test_post_processor_worked_examples():
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "special_tokens": {"<s>": {"ids": [1, 2]}}}
    read = lambda step: read_post_processor("file", step)  # noqa: E731
    assert read(None) == ([], [])
    assert read({"type": "ByteLevel", "trim_offsets": False}) == ([], [])
    assert read(template | {"single": [piece]}) == ([], [])
    assert read(template | {"single": [special, piece]}) == ([1, 2], [])
    assert read(template | {"single": [special, piece, special]}) == ([1, 2], [1, 2])
    cls = {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}
    assert read({"type": "Sequence", "processors": [{"type": "ByteLevel"}, cls]}) == ([0], [2])


# Decoders


def decode(step, tokens, at_start=True):
    make, _ = decoders.read_decoder("file", step)
    decoder = make(at_start)
    return "".join(map(decoder.push, tokens)) + decoder.finish()


REPLACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
FALLBACK, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@pytest.mark.parametrize(
    ("steps", "tokens", "text"),
    [
        ([{"type": "ByteLevel"}], ["\u0120a", "\u00c3", "\u00a9"], " a\u00e9"),
        ([{"type": "ByteLevel"}], ["\u00c3", "a"], "\ufffda"),
        ([{"type": "ByteLevel"}], ["<\u4eca>"], "<\u4eca>"),  # spells no bytes
        ([REPLACE, FALLBACK, FUSE, STRIP], [SPACE + "a", "<0xC3>", "<0xA9>"], "a\u00e9"),
        ([REPLACE, FALLBACK, FUSE, STRIP], [SPACE + SPACE, "a"], " a"),
        ([REPLACE, FALLBACK, FUSE, STRIP], ["<0x20>", "a"], "a"),
        ([REPLACE, FALLBACK, FUSE, STRIP], ["a", "<0xC3>", SPACE], "a\ufffd "),
        ([FALLBACK, FUSE, REPLACE], [SPACE + "a"], " a"),
        ([{"type": "Metaspace"}], [SPACE + "a" + SPACE, SPACE + "b"], "a b"),
        ([{"type": "Metaspace", "prepend_scheme": "never"}], [SPACE + "a"], " a"),
        ([], [SPACE + "a", "b"], SPACE + "ab"),
    ],
)
def test_decoder_worked_examples(steps, tokens, text):
    assert decode({"type": "Sequence", "decoders": steps}, tokens) == text


def test_only_the_start_of_a_text_is_stripped():
    for step in (
        {"type": "Sequence", "decoders": [REPLACE, FALLBACK, FUSE, STRIP]},
        {"type": "Metaspace"},
    ):
        assert decode(step, [SPACE + "a"]) == "a"
        assert decode(step, [SPACE + "a"], at_start=False) == " a"
