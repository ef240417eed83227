"""tokenizer.json: round trips, and an error that names every unsupported setting."""

import copy
import json

import pytest
from tokenizer_files import BYTES, FIELDS, FOLDER, REFERENCE, with_variant, write_fields

from minitx.checkpoints.added_tokens import AddedToken
from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.tokenizer_json import read_tokenizer
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.errors import MinitxError


def test_write_then_read_gives_same_tokenizer(variant, tmp_path):
    tokenizer, texts, ids = variant
    again = tmp_path / "again"
    again.mkdir()
    write_tokenizer(tokenizer, again)
    assert sorted(path.name for path in again.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    copied = read_tokenizer(again)
    assert [copied.encode(text) for text in texts] == ids
    for name in ("added", "bos", "eos", "adds_bos", "vocab_size", "special_ids"):
        assert getattr(copied, name) == getattr(tokenizer, name), name


@pytest.mark.parametrize("legacy", [False, True])
def test_merges_are_read_in_both_notations(legacy, tmp_path, plain):
    fields = copy.deepcopy(FIELDS)
    pairs = [
        merge if isinstance(merge, list) else merge.split() for merge in fields["model"]["merges"]
    ]
    fields["model"]["merges"] = [" ".join(pair) for pair in pairs] if legacy else pairs
    read = read_tokenizer(write_fields(tmp_path, fields))
    assert [read.encode(text) for text in REFERENCE["texts"]] == [
        plain.encode(text) for text in REFERENCE["texts"]
    ]


def test_gpt2_file_without_model_type_is_read(tmp_path, plain):
    fields = copy.deepcopy(FIELDS)
    del fields["model"]["type"]
    assert read_tokenizer(write_fields(tmp_path, fields)).encode("the kite") == plain.encode(
        "the kite"
    )


def test_bos_and_eos_come_from_tokenizer_config(tmp_path):
    variant = REFERENCE["variants"]["flags"]["replaced"]
    file = write_fields(tmp_path, with_variant(variant))
    by_itself = read_tokenizer(file)
    assert by_itself.bos == by_itself.eos == 419
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<l>"}}))
    assert (read_tokenizer(tmp_path).bos, read_tokenizer(tmp_path).eos) == (None, 420)
    for bad in (7, ["<l>"], {"content": ["<l>"]}, "\ud800"):
        config.write_text(json.dumps({"eos_token": bad}))
        with pytest.raises(MinitxError, match="eos_token|text of the added token"):
            read_tokenizer(tmp_path)


def model(**keys):
    return {"model": FIELDS["model"] | keys}


VOCAB = FIELDS["model"]["vocab"]
LAST = max(VOCAB, key=VOCAB.get)
SPLIT = REFERENCE["variants"]["split first"]["replaced"]["pre_tokenizer"]["pretokenizers"][0]
BYTE_LEVEL = FIELDS["pre_tokenizer"]
TEMPLATE = REFERENCE["variants"]["starts with bos"]["replaced"]["post_processor"]


def pre_tokenizers(*steps):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


def added(**keys):
    return {"added_tokens": [FIELDS["added_tokens"][0] | keys]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normalizer": {"type": "Nmt"}}, "normalizer .*Nmt.* is not supported; expected NFC"),
        ({"normalizer": "NFC"}, "normalizer 'NFC' must be an object with a type"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}}, "Replace"),
        ({"decoder": None}, "the decoder is null"),
        ({"decoder": {"type": "WordPiece"}}, "decoder .*WordPiece"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer .*Whitespace"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": "x"}}, "list of pretokenizers"),
        (pre_tokenizers(SPLIT | {"pattern": {"Regex": r"(a|a)*b"}}), "pattern of GPT-2"),
        (pre_tokenizers(SPLIT | {"behavior": "Joined"}), "behavior"),
        (pre_tokenizers(BYTE_LEVEL, SPLIT), "ByteLevel to be the last"),
        ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": 1}}, "use_regex"),
        ({"post_processor": {"type": "Padding"}}, "post_processor .*Padding"),
        ({"post_processor": {"type": "BertProcessing", "cls": ["a", 1]}}, "sep"),
        ({"post_processor": TEMPLATE | {"single": TEMPLATE["single"] * 2}}, "a template for one"),
        ({"post_processor": TEMPLATE | {"single": [{"Sequence": {"id": "B"}}]}}, "the text A"),
        ({"post_processor": TEMPLATE | {"special_tokens": {}}}, "among its special_tokens"),
        ({"post_processor": {"type": "Sequence", "processors": [TEMPLATE] * 2}}, "at most one"),
        ({"mystery": 1}, "mystery"),
        ({"model": None}, "'model'"),
        ({"model": []}, "'model'"),
        (model(type="WordPiece"), "WordPiece"),
        (model(dropout=0.1), "dropout"),
        (model(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (model(byte_fallback="yes"), "byte_fallback"),
        (model(ignore_merges="yes"), "ignore_merges"),
        (model(mystery=1), "mystery"),
        (model(vocab=None), "'vocab'"),
        (model(vocab=["a"]), "'vocab'"),
        (model(merges=None), "'merges'"),
        (model(merges={}), "'merges'"),
        (model(vocab=VOCAB | {LAST: 5}), "have the same id 5"),
        (model(vocab=VOCAB | {LAST: 10**15}), "has id 1000"),
        (model(vocab=VOCAB | {LAST: -1}), "has id -1"),
        (model(vocab=VOCAB | {LAST: 1.0}), "has id 1.0"),
        (model(vocab=VOCAB | {LAST: True}), "has id True"),
        (model(merges=["a"]), "merge 0 is 'a'"),
        (model(merges=["a b c"]), "merge 0"),
        (model(merges=[["a", "b", "c"]]), "merge 0"),
        (model(merges=[["a", 1]]), "merge 0"),
        (model(merges=[["a", []]]), "merge 0"),
        (model(merges=[7]), "merge 0 is 7"),
        (model(merges=["a nowhere"]), "needs the token 'nowhere'; add it"),
        (model(merges=["z z"]), "needs the token 'zz'"),
        (model(unk_token="nowhere"), "unk_token"),
        ({"added_tokens": {}}, "added_tokens"),
        ({"added_tokens": [1]}, "the added token 1 must be an object"),
        (added(id=420), "must have id 419, the next free id, got 420"),
        (added(id="419"), "id of the added token"),
        (added(id=True), "id of the added token"),
        (added(id=10**15), "must have id 419, .* got 1000"),
        (added(id=3), "must have id 419, .* got 3"),
        (added(content=None), "text of the added token"),
        (added(content="\ud800"), "text of the added token"),
        (added(content="a"), "must have id 64, its id in the vocabulary, got 419"),
        (added(lstrip=1), "lstrip"),
    ],
)
def test_unsupported_setting_is_rejected_by_name(changed, message, tmp_path):
    file = write_fields(tmp_path, FIELDS | changed)
    with pytest.raises(MinitxError, match=message) as caught:
        read_tokenizer(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(file)) + 300


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b'{"model": 1}', b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}'],
)
def test_invalid_json_is_rejected(content, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(MinitxError, match="tokenizer.json"):
        read_tokenizer(file)


def test_unknown_key_of_a_step_is_ignored(tmp_path, plain):
    """The reference ignores it too. At the top and in the model it refuses it, and so do we."""
    fields = FIELDS | {"pre_tokenizer": BYTE_LEVEL | {"mystery": 1}} | added(mystery=True)
    assert read_tokenizer(write_fields(tmp_path, fields)).encode("a b") == plain.encode("a b")


def test_gap_in_the_ids_is_decoded_to_nothing(tmp_path, plain):
    fields = (
        FIELDS | model(vocab={name: 2 * id for name, id in VOCAB.items()}) | {"added_tokens": []}
    )
    tokenizer = read_tokenizer(write_fields(tmp_path, fields))
    assert tokenizer.encode("a b") == [2 * id for id in plain.encode("a b")]
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 3]) == "a b"
    assert tokenizer.vocab_size == 2 * 419 - 1


def test_missing_file_is_rejected(tmp_path):
    with pytest.raises(MinitxError, match="tokenizer.json"):
        read_tokenizer(tmp_path)
    with pytest.raises(MinitxError, match="nowhere"):
        read_tokenizer(tmp_path / "nowhere")


def test_truncated_file_is_rejected(tmp_path):
    whole = (FOLDER / "tokenizer.json").read_bytes()
    file = tmp_path / "tokenizer.json"
    for size in range(0, len(whole) - 2, 97):
        file.write_bytes(whole[:size])
        with pytest.raises(MinitxError):
            read_tokenizer(file)


def test_tokenizer_that_would_not_read_back_is_rejected(tmp_path):
    two_named_alike = ByteLevelBPE(BYTES, [], [AddedToken("\u0120", 256)])
    with pytest.raises(MinitxError, match="would both be named"):
        write_tokenizer(two_named_alike, tmp_path)
    with pytest.raises(MinitxError, match="must be a ByteLevelBPE .* got str"):
        write_tokenizer("tokenizer", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MinitxError, match="cannot be written"):
        write_tokenizer(ByteLevelBPE(BYTES, []), tmp_path / "nowhere")


def test_written_file_is_deterministic(tmp_path, plain):
    write_tokenizer(plain, tmp_path)
    first = (tmp_path / "tokenizer.json").read_bytes()
    write_tokenizer(read_tokenizer(tmp_path), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first
