"""Byte-level BPE: agreement with the reference, round trips, merging, streaming."""

import random

import pytest
from tokenizer_files import BYTES, REFERENCE, with_variant, write_fields

from minitx.checkpoints import bpe
from minitx.checkpoints.added_tokens import AddedToken
from minitx.checkpoints.bpe_merge import merge_best_first
from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.tokenizer import StreamDecoder
from minitx.checkpoints.tokenizer_json import read_tokenizer
from minitx.errors import MinitxError


def random_text(rng, length):
    planes = [(0, 0x80), (0x80, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(length))


# Agreement with the reference


def test_ids_equal_reference(variant):
    tokenizer, texts, ids = variant
    for text, expected in zip(texts, ids, strict=True):
        assert tokenizer.encode(text) == expected, text


def test_decoded_text_equals_reference(plain):
    for ids, text, without_special in REFERENCE["decoded"]:
        assert plain.decode(ids) == text
        assert plain.decode(ids, skip_special=True) == without_special


# Round trips


@pytest.mark.parametrize("name", ["plain", "starts with bos", "no regex", "ignore merges"])
def test_any_text_round_trips(name, tmp_path):
    variant = REFERENCE["variants"][name]["replaced"]
    tokenizer = read_tokenizer(write_fields(tmp_path, with_variant(variant)))
    rng = random.Random(1)
    for text in REFERENCE["texts"] + [random_text(rng, 30) for _ in range(200)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(tokenizer.encode("")) == ""


def test_code_points_of_every_plane_round_trip(plain):
    """All of planes 0 and 1; of the others, which hold rare characters or none, both ends."""
    for start in range(0, 0x110000, 0x800):
        end_of_plane = start % 0x10000 in (0, 0xF800)
        if (start < 0x20000 or end_of_plane) and not 0xD800 <= start < 0xE000:
            text = "".join(map(chr, range(start, start + 0x800)))
            assert plain.decode(plain.encode(text)) == text


def test_any_bytes_round_trip(plain):
    rng = random.Random(2)
    samples = [*BYTES, *(rng.randbytes(rng.randrange(40)) for _ in range(300))]
    samples += ["caf\u00e9 <|endoftext|>".encode()[:k] for k in range(20)]
    for data in samples:
        assert plain.decode_bytes(plain.encode_bytes(data)) == data
        assert plain.decode(plain.encode_bytes(data)) == data.decode(errors="replace")


def test_bytes_and_text_have_same_ids(plain):
    for text in REFERENCE["texts"]:
        if "<|endoftext|>" not in text:
            assert plain.encode_bytes(text.encode()) == plain.encode(text)
    assert plain.eos in plain.encode("<|endoftext|>")
    assert plain.eos not in plain.encode_bytes(b"<|endoftext|>")


def test_lone_surrogate_is_rejected(plain):
    with pytest.raises(MinitxError, match=r"character 2 .* U\+DC80"):
        plain.encode("ab\udc80")


# Vocabulary


def test_encode_worked_example():
    # 256 = "ab", 257 = "abc", 258 = "bc"; "ab" is merged first, so "bc" only without an "a" before.
    tokens = [*BYTES, b"ab", b"abc", b"bc"]
    tokenizer = ByteLevelBPE(tokens, [(97, 98), (256, 99), (98, 99)], [AddedToken("<s>", 259)])
    assert tokenizer.encode("abcbc abab<s>") == [257, 258, 32, 256, 256, 259]
    assert tokenizer.vocab_size == len(tokenizer) == 260
    assert tokenizer.token_bytes(257) == b"abc"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.special_ids) == (None, None, {259})


def test_bos_is_prepended_and_removed():
    added = [AddedToken("<s>", 256)]
    tokenizer = ByteLevelBPE(BYTES, [], added, bos=256, adds_bos=True)
    assert tokenizer.encode("a") == [256, 97]
    assert tokenizer.encode("a", special=False) == [97]
    assert tokenizer.encode("<s>a<s>") == [256, 256, 97, 256]
    assert tokenizer.decode([256, 256, 97, 256]) == "<s>a<s>"
    assert tokenizer.decode([256, 256, 97, 256], skip_special=True) == "a"


def test_id_without_token_is_decoded_to_nothing(plain):
    """A model's vocabulary may be larger than its tokenizer's, and a model may choose any id."""
    a, b = plain.encode("ab")
    for unknown in (420, 10**9):
        assert plain.token_bytes(unknown) == b""
        assert plain.decode([a, unknown, b]) == "ab"
    with pytest.raises(MinitxError, match="expected a token id >= 0, got -1"):
        plain.decode([-1])


def test_byte_without_token_is_left_out():
    """As in the reference, which has no unknown token here."""
    tokenizer = ByteLevelBPE([b"a", b"b", b"ab"], [(0, 1)])
    assert tokenizer.encode("abba") == [2, 1, 0]
    assert tokenizer.encode("acb") == [2]


def test_word_cache_stays_bounded(monkeypatch):
    monkeypatch.setattr(bpe, "_CACHED_WORDS", 10)
    tokenizer = ByteLevelBPE(BYTES, [])
    for n in range(100):
        word = chr(97 + n % 26) * (n + 1)
        assert tokenizer.decode(tokenizer.encode(word)) == word
        assert len(tokenizer.pipeline.model._cache) <= 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([*BYTES, b"a"], []), "97 and 256"),
        ((BYTES, [(97, 98)]), "merge 0, 'a' and 'b', needs the token 'ab'"),
        ((BYTES, [(97, 256)]), "ids from 0 to 255, got 97 and 256"),
        ((BYTES, [(-1, 97)]), "ids from 0 to 255, got -1 and 97"),
        ((BYTES, [], [AddedToken("<s>", 257)]), "must have id 256, .* got 257"),
        ((BYTES, [], [AddedToken("<s>", -1)]), "must have id 256, .* got -1"),
        (
            (BYTES, [], [AddedToken("<s>", 256), AddedToken("<e>", 256)]),
            "must have id 257, .* got 256",
        ),
        ((BYTES, [], [AddedToken("<s>", 256), AddedToken("<s>", 257)]), "duplicated"),
        ((BYTES, [], [AddedToken("", 256)]), "is empty"),
        ((BYTES, [], [AddedToken("<s>", 5)]), "in the vocabulary that id is"),
    ],
)
def test_inconsistent_vocabulary_is_rejected(arguments, message):
    with pytest.raises(MinitxError, match=message):
        ByteLevelBPE(*arguments)


def test_bos_and_eos_must_be_added_tokens():
    with pytest.raises(MinitxError, match="eos must be the id of an added token, got 3"):
        ByteLevelBPE(BYTES, [], eos=3)
    with pytest.raises(MinitxError, match="adds_bos needs a bos"):
        ByteLevelBPE(BYTES, [], adds_bos=True)


# Merging


def literal_merge(ids, lookup):
    ids = list(ids)
    while True:
        found = [(lookup(*ids[at : at + 2]), at) for at in range(len(ids) - 1)]
        found = [((priority, at), merged) for (priority, merged), at in filter(can_merge, found)]
        if not found:
            return ids
        (_, at), merged = min(found)
        ids[at : at + 2] = [merged]


def can_merge(entry):
    return entry[0] is not None


def test_merge_best_first_equals_literal_version():
    rng = random.Random(3)
    for _ in range(400):
        # Random rules: a merge may create a pair of lower rank, and ranks may tie.
        rules = {
            (rng.randrange(12), rng.randrange(12)): (rng.randrange(8), rng.randrange(12))
            for _ in range(30)
        }
        ids = rng.choices(range(4), k=rng.randrange(40))
        lookup = lambda left, right: rules.get((left, right))  # noqa: B023, E731
        assert merge_best_first(ids, lookup) == literal_merge(ids, lookup)


def test_word_of_100000_characters_is_encoded(plain):
    for word in ("the" * 33_333, "a" * 100_000, " " * 100_000):
        assert plain.decode(plain.encode(word)) == word


# Streaming


def test_stream_buffers_split_character(plain):
    decoder = StreamDecoder(plain)
    pieces = [decoder.push(id) for id in plain.encode_bytes(b"a\xf0") + plain.encode_bytes(b"\x9f")]
    assert pieces == ["a", "", ""]
    rest = plain.encode_bytes(b"\x99") + plain.encode_bytes(b"\x82!")
    assert [decoder.push(id) for id in rest] == ["", "\U0001f642", "!"]
    assert decoder.finish() == ""


def test_stream_flushes_incomplete_character_as_one_replacement(plain):
    decoder = StreamDecoder(plain)
    assert "".join(map(decoder.push, plain.encode_bytes(b"x\xf0\x9f\x99"))) == "x"
    assert decoder.finish() == "\ufffd"
    assert decoder.push(plain.encode("b")[0]) == "b"


def test_streamed_text_equals_decoded_text(plain):
    for ids, text, without_special in REFERENCE["decoded"]:
        for skip, expected in ((False, text), (True, without_special)):
            decoder = StreamDecoder(plain, skip_special=skip)
            assert "".join(map(decoder.push, ids)) + decoder.finish() == expected
