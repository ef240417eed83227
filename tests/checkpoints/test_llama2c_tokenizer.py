"""llama2.c's tokenizer: agreement with a literal version of run.c, and corrupt files."""

import random
import re
import struct

import pytest

from minitx.checkpoints.llama2c_tokenizer import Llama2cTokenizer, read_llama2c_tokenizer
from minitx.checkpoints.tokenizer import StreamDecoder
from minitx.errors import MinitxError

RAW = [b"<0x%02X>" % byte for byte in range(256)]


def vocabulary(rng, merges=60):
    """A vocabulary like llama2.c's: special tokens, raw bytes, characters, merged tokens."""
    characters = [c.encode() for c in " abcdehinorst.,\u00e9\u4e16\U0001f601"]
    tokens = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *RAW, *characters]
    scores = [0.0] * len(tokens)
    pieces = list(characters)
    while len(pieces) < len(characters) + merges:
        token = rng.choice(pieces) + rng.choice(pieces)
        if token not in tokens and len(token) < 12:
            pieces.append(token)
            tokens.append(token)
            scores.append(float(-rng.randrange(20)))  # many ties
    return tokens, scores


def tokenizer_bin(tokens, scores, longest=None):
    data = struct.pack("<i", max(map(len, tokens)) if longest is None else longest)
    for token, score in zip(tokens, scores, strict=True):
        data += struct.pack("<fi", score, len(token)) + token
    return data


def run_c_encode(tokens, scores, text, bos):
    """The encode of run.c, loop by loop. `text` must not contain NUL."""

    def look_up(string):
        return tokens.index(string) if string in tokens else -1

    out = []
    if bos:
        out.append(1)
    if text:
        out.append(look_up(b" "))
    buffer = b""
    for at in range(len(text)):
        if text[at] & 0xC0 != 0x80:
            buffer = b""
        buffer += text[at : at + 1]
        following = text[at + 1] if at + 1 < len(text) else 0
        if following & 0xC0 == 0x80 and len(buffer) < 4:
            continue
        id = look_up(buffer)
        if id != -1:
            out.append(id)
        else:
            for byte in buffer:
                out.append(byte + 3)
        buffer = b""
    while True:
        best_score, best_id, best_at = -1e10, -1, -1
        for at in range(len(out) - 1):
            id = look_up(tokens[out[at]] + tokens[out[at + 1]])
            if id != -1 and scores[id] > best_score:
                best_score, best_id, best_at = scores[id], id, at
        if best_at == -1:
            return out
        out[best_at] = best_id
        del out[best_at + 1]


def run_c_decode(tokens, ids):
    """The output of run.c's decode, token by token; the leading bos is not printed."""
    out, previous = b"", ids[0]
    for id in ids[1:]:
        piece = tokens[id]
        if previous == 1 and piece[:1] == b" ":
            piece = piece[1:]
        if re.fullmatch(rb"<0x[0-9A-F]{2}>", piece):
            piece = bytes([int(piece[3:5], 16)])
        out += piece
        previous = id
    return out


@pytest.fixture(scope="module")
def tokenizer():
    return Llama2cTokenizer(*vocabulary(random.Random(0)))


def some_texts(rng, count):
    characters = " abcdehinorst.,\u00e9\u4e16\U0001f642Z\n"
    for _ in range(count):
        yield "".join(rng.choices(characters, k=rng.randrange(60)))


def test_worked_example():
    tokens = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *RAW, b" ", b"a", b"b", b"ab", b" a", b"bb"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -2.0, -1.0, -1.0]
    tokenizer = Llama2cTokenizer(tokens, scores)
    # " a" and "bb" tie for the best score; the leftmost, " a", is merged first. Then "ab" is gone.
    assert tokenizer.encode("abb") == [1, 263, 264]
    assert tokenizer.encode("abb", special=False) == [263, 264]
    assert tokenizer.encode("bab\u00e9") == [1, 259, 261, 262, 0xC3 + 3, 0xA9 + 3]
    assert tokenizer.encode("") == [1]
    assert tokenizer.decode([1, 263, 264]) == "abb"
    assert tokenizer.decode([263, 264]) == " abb"
    assert tokenizer.decode([259 + 3, 13, 0xC3 + 3, 0xA9 + 3, 0xA9 + 3]) == "ab\n\u00e9\ufffd"
    assert [tokenizer.token_bytes(263), tokenizer.token_bytes(263, 1)] == [b" a", b"a"]


@pytest.mark.parametrize("seed", range(20))
def test_ids_and_text_equal_run_c(seed):
    rng = random.Random(seed)
    tokens, scores = vocabulary(rng)
    tokenizer = Llama2cTokenizer(tokens, scores)
    for text in some_texts(rng, 15):
        for bos in (True, False):
            expected = run_c_encode(tokens, scores, text.encode(), bos)
            assert tokenizer.encode(text, special=bos) == expected, text
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == run_c_decode(tokens, ids) == text.encode()
        generated = [1, *rng.choices(range(3, len(tokens)), k=10)]
        assert tokenizer.decode_bytes(generated) == run_c_decode(tokens, generated)


def test_invalid_utf8_is_split_as_in_run_c(tokenizer):
    rng = random.Random(4)
    pieces = [
        b"\x80",
        b"\xbf\x81",
        b"\xf0\x9f\x98\x81",
        *(bytes([b]) for b in b"a \xc3\xa9\xe4\xf0\xff"),
    ]
    for _ in range(300):
        data = b"".join(rng.choices(pieces, k=rng.randrange(20)))
        ids = tokenizer.encode_bytes(data)
        assert ids == run_c_encode(tokenizer.tokens, tokenizer.scores, data, True)
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode(ids) == data.decode(errors="replace")


def test_any_text_and_byte_round_trips(tokenizer):
    rng = random.Random(5)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
                       for _ in range(20))  # fmt: skip
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in ("", " ", "  a", "\x00", "a\x00b", "\n<s>\n", "<0x41>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for byte in range(256):
        data = bytes([byte])
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_minimum_score_is_never_merged():
    tokens = [b"<unk>", b"<s>", b"</s>", *RAW, b" ", b"a", b" a", b"aa"]
    for score in (-1e10, -2e10, float("-inf")):
        tokenizer = Llama2cTokenizer(tokens, [0.0] * 261 + [score, -5.0])
        assert tokenizer.encode("a", special=False) == [259, 260]
        assert tokenizer.encode("aa", special=False) == [259, 262]


def test_special_tokens_and_invalid_ids(tokenizer):
    assert (tokenizer.bos, tokenizer.eos) == (1, 1)  # run.c stops at bos
    assert tokenizer.decode([1, 260, 1, 2, 260], skip_special=True) == "aa"
    assert tokenizer.decode([1, 260, 2]) == "a\n</s>\n"
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.tokens)
    for id in (-1, len(tokenizer)):
        with pytest.raises(MinitxError, match="outside"):
            tokenizer.decode([id])
    with pytest.raises(MinitxError, match="surrogate"):
        tokenizer.encode("\ud83d")


def test_streamed_text_equals_decoded_text(tokenizer):
    rng = random.Random(6)
    for text in some_texts(rng, 50):
        ids = tokenizer.encode(text)
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == text
        decoder = StreamDecoder(tokenizer, previous=1)
        assert "".join(map(decoder.push, ids[1:])) + decoder.finish() == text
    decoder = StreamDecoder(tokenizer, previous=5)
    pieces = [decoder.push(3 + byte) for byte in "\U0001f642".encode()]
    assert pieces == ["", "", "", "\U0001f642"]


def test_long_text_is_not_quadratic(tokenizer):
    text = "the rain is a stone, " * 5_000  # scanning all pairs for each merge would take hours
    assert tokenizer.decode(tokenizer.encode(text)) == text


# Files


def test_file_is_read(tmp_path):
    tokens, scores = vocabulary(random.Random(7))
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(tokenizer_bin(tokens, scores))
    tokenizer = read_llama2c_tokenizer(path, len(tokens))
    assert (tokenizer.tokens, tokenizer.scores) == (tokens, scores)


def test_truncated_file_is_rejected(tmp_path):
    tokens, scores = vocabulary(random.Random(8), merges=5)
    data = tokenizer_bin(tokens, scores)
    path = tmp_path / "tokenizer.bin"
    for size in [*range(0, 60), *range(60, len(data), 41), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(MinitxError, match="tokenizer.bin"):
            read_llama2c_tokenizer(path, len(tokens))


def replaced(data, at, value):
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, struct.pack("<i", 2**31 - 1), "token 0 has length 2147483647"),
        (8, struct.pack("<i", -1), "token 0 has length -1"),
        (8, struct.pack("<i", 0), "token 0 has length 0"),  # run.c cannot read that either
        (8, struct.pack("<i", 6), "token 1 has length"),
        (0, struct.pack("<i", 3), "longest token in its header has 3"),
        (0, struct.pack("<i", -5), "longest token in its header has -5"),
        (4, struct.pack("<f", float("nan")), "score of token 0 must be a number, got NaN"),
        (4 + 3 * 8 + 5 + 5 + 6 + 8, b"<0x99>", "token 3 of .* must be .* got b'<0x99>'"),
    ],
)
def test_corrupt_file_is_rejected(at, value, message, tmp_path):
    tokens, scores = vocabulary(random.Random(9))
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(replaced(tokenizer_bin(tokens, scores), at, value))
    with pytest.raises(MinitxError, match=message):
        read_llama2c_tokenizer(path, len(tokens))


def test_file_of_another_model_is_rejected(tmp_path):
    tokens, scores = vocabulary(random.Random(10))
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(tokenizer_bin(tokens, scores))
    with pytest.raises(MinitxError, match="another model"):
        read_llama2c_tokenizer(path, len(tokens) - 1)
    for more in (len(tokens) + 1, 2**40):
        with pytest.raises(MinitxError, match=f"tokens of the model, got {len(tokens)};"):
            read_llama2c_tokenizer(path, more)
    path.write_bytes(tokenizer_bin(tokens[:100], scores[:100]))
    with pytest.raises(MinitxError, match="token 100 of 100"):
        read_llama2c_tokenizer(path, 100)
    without_space = [b"_" if token == b" " else token for token in tokens]
    path.write_bytes(tokenizer_bin(without_space, scores))
    with pytest.raises(MinitxError, match="single space"):
        read_llama2c_tokenizer(path, len(tokens))
    with pytest.raises(MinitxError, match="nowhere"):
        read_llama2c_tokenizer(tmp_path / "nowhere", 300)


def test_ids_decode_alike_one_by_one_and_at_once(tokenizer):
    rng = random.Random(12)
    for _ in range(100):
        ids = rng.choices(range(len(tokenizer)), k=12)
        previous = [None, *ids]
        parts = [tokenizer.token_bytes(id, before) for id, before in zip(ids, previous)]  # noqa: B905
        assert b"".join(parts) == tokenizer.decode_bytes(ids)
