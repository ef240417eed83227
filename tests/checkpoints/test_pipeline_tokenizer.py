"""Pipelines of well-known models: ids and decoded text equal those of the reference."""

import random

import pytest
from tokenizer_files import PIPELINES, with_variant, write_fields

from minitx.checkpoints.tokenizer import StreamDecoder
from minitx.checkpoints.tokenizer_json import read_tokenizer
from minitx.checkpoints.tokenizer_json_write import write_tokenizer

TEXTS = PIPELINES["texts"]


def pipeline(name, folder):
    found = PIPELINES["pipelines"][name]
    return read_tokenizer(
        write_fields(folder, with_variant(found["replaced"], found["vocabulary"]))
    )


def stream(tokenizer, ids, previous=None, skip_special=False):
    decoder = StreamDecoder(tokenizer, previous, skip_special)
    return "".join(map(decoder.push, ids)) + decoder.finish()


@pytest.mark.parametrize("name", PIPELINES["pipelines"])
def test_ids_equal_reference(name, tmp_path):
    tokenizer = pipeline(name, tmp_path)
    for text, ids in zip(TEXTS, PIPELINES["pipelines"][name]["ids"], strict=True):
        assert tokenizer.encode(text) == ids, f"{name}: {text!r}"


@pytest.mark.parametrize("name", PIPELINES["decoded"])
def test_decoded_and_streamed_text_equal_reference(name, tmp_path):
    tokenizer = pipeline(name, tmp_path)
    for ids, text, without_special in PIPELINES["decoded"][name]:
        assert tokenizer.decode(ids) == stream(tokenizer, ids) == text, f"{name}: {ids}"
        assert tokenizer.decode(ids, skip_special=True) == without_special, f"{name}: {ids}"
        assert stream(tokenizer, ids, skip_special=True) == without_special, f"{name}: {ids}"


@pytest.mark.parametrize("name", ["Llama 2", "Llama 3", "Qwen2", "SmolLM", "unknown characters"])
def test_write_then_read_gives_same_tokenizer(name, tmp_path):
    tokenizer = pipeline(name, tmp_path)
    (tmp_path / "again").mkdir()
    write_tokenizer(tokenizer, tmp_path / "again")
    copy = read_tokenizer(tmp_path / "again")
    assert [copy.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (copy.bos, copy.eos, copy.special_ids) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.special_ids,
    )


@pytest.mark.parametrize("name", ["GPT-4", "GPT-4o", "Llama 2", "Llama 3", "SmolLM"])
def test_text_round_trips(name, tmp_path):
    tokenizer = pipeline(name, tmp_path)
    for text in TEXTS:
        # In Llama 2's, "\u2581" is a space in a text, too, and a special token a piece of its own.
        if name != "Llama 2" or not ("\u2581" in text or "<" in text):
            assert tokenizer.decode(tokenizer.encode(text)) == text, f"{name}: {text!r}"


def test_every_id_is_decoded(tmp_path):
    """Whatever a model chooses, no id ends a generation: alone, in a row, or beyond the tokens."""
    rng = random.Random(1)
    for name in ("GPT-NeoX", "Llama 2", "Mistral", "Metaspace, always, split"):
        tokenizer = pipeline(name, tmp_path)
        for id in range(tokenizer.vocab_size + 3):
            assert tokenizer.decode([id]) == stream(tokenizer, [id])
        for _ in range(50):
            ids = rng.choices(range(tokenizer.vocab_size + 3), k=20)
            assert tokenizer.decode(ids) == stream(tokenizer, ids)


def test_run_of_bytes_is_text_or_one_replacement_for_each(tmp_path):
    tokenizer = pipeline("Llama 2", tmp_path)
    ids = [3 + byte for byte in "\u00e9\U0001f642".encode()]
    a = tokenizer.encode("a", special=False)
    assert tokenizer.decode([*ids, *a]) == "\u00e9\U0001f642 a"
    assert tokenizer.decode([*ids[:-1], *a]) == "\ufffd" * 5 + " a"  # "é" is lost with the rest
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(id) for id in (*ids, *a)] == [""] * 6 + ["\u00e9\U0001f642 a"]


def test_space_is_stripped_only_where_the_text_starts(tmp_path):
    tokenizer = pipeline("Llama 2", tmp_path)
    bos, *ids = tokenizer.encode("the kite")
    assert tokenizer.decode([bos, *ids]) == tokenizer.decode(ids) == "the kite"
    assert stream(tokenizer, ids, previous=ids[-1]) == " the kite", "a completion goes on"
    assert stream(tokenizer, ids, previous=bos) == "the kite", "after bos alone it starts"
    assert tokenizer.token_bytes(ids[0], previous=ids[0]).startswith(b" ")


def test_any_bytes_round_trip(tmp_path):
    rng = random.Random(2)
    for name in ("Llama 2", "Llama 3"):
        tokenizer = pipeline(name, tmp_path)
        for data in [b"", b"\xff", b"a\xf0\x9f", *(rng.randbytes(20) for _ in range(50))]:
            assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_long_text_without_words_is_encoded(tmp_path):
    """Llama 2 has no pre-tokenizer: a text is one word, whose merging must not be quadratic."""
    tokenizer = pipeline("Llama 2", tmp_path)
    text = "the kite is in the box. " * 2_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
