"""The language model in use: prompts of every shape, limits before any work, text as it streams."""

import itertools

import numpy as np
import pytest
from same import assert_same
from test_llama2c_tokenizer import RAW
from tiny import END, FAMILIES, SIZES, TOKENIZER, ScriptedLoop, Spy, tiny_lm, tiny_model

import minitx
from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.llama2c_tokenizer import Llama2cTokenizer
from minitx.errors import MinitxError
from minitx.tree import map_weights

CONTEXT = SIZES["context"]
IDS = [5, 200, 111, 31, 7]


def says(*texts_or_ids, **changes):
    """A model that says this, whatever the prompt: texts, or lists of ids."""
    rows = [TOKENIZER.encode(t, special=False) if isinstance(t, str) else t for t in texts_or_ids]
    lm = tiny_lm(decode=ScriptedLoop(tuple(rows), []), **changes)
    return lm, lm.decode.calls


# Scores ------------------------------------------------------------------------------------------


def test_logits():
    lm = tiny_lm()
    assert lm.logits(IDS).shape == (5, 259) and lm.logits([IDS, IDS]).shape == (2, 5, 259)
    assert_same(lm.logits(np.array(IDS, np.uint8)), lm.model(np.array(IDS)))


# Kinds of prompts --------------------------------------------------------------------------------


def test_generate_returns_text_for_text_and_ids_for_ids():
    lm = tiny_lm()
    ids = lm.encode("Once")
    assert ids == [END, *TOKENIZER.encode("Once", special=False)]
    new = lm.generate(ids, 12)
    assert [type(i) for i in new] == [int] * 12
    assert lm.generate("Once", 12) == TOKENIZER.decode([0, *new])[1:]  # 0 is one character, U+0000
    assert lm.generate(np.array(ids), 12) == lm.generate(tuple(ids), 12) == new
    assert list(lm.tokens(ids, 12)) == list(lm.tokens("Once", 12)) == new
    assert "".join(lm.stream("Once", 12)) == "".join(lm.stream(ids, 12)) == lm.generate("Once", 12)


def test_generate_returns_a_list_for_a_batch():
    lm = tiny_lm()
    one, other = IDS[:2], IDS
    assert lm.generate([one, other], 9) == [lm.generate(one, 9), lm.generate(other, 9)]
    assert lm.generate([other], 9) == [lm.generate(other, 9)]
    assert lm.generate(np.array([one, one[::-1]]), 9) == lm.generate([one, one[::-1]], 9)
    found = lm.generate(["Once", "on", other], 9)
    assert found == [lm.generate("Once", 9), lm.generate("on", 9), lm.generate(other, 9)]
    assert isinstance(found[0], str) and isinstance(found[2], list)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sampled_batch_rows_equal_single_prompts(family, dtype):
    """Row i draws with the seed of the batch + i, however long the others are."""
    lm = tiny_lm(family, dtype)
    options = dict(max_new_tokens=20, temperature=0.9, top_k=100, top_p=0.98)
    prompts = [IDS, [3], IDS[::-1][:3], [3]]
    found = lm.generate(prompts, seed=11, **options)
    assert found == [lm.generate(p, seed=11 + i, **options) for i, p in enumerate(prompts)]
    assert found[1] != found[3]  # the same prompt, two seeds
    assert lm.generate(prompts, seed=11, **options) == found != lm.generate(prompts, **options)


def test_seed_decides_the_samples():
    lm = tiny_lm()
    texts = {seed: lm.generate("on", 30, 1.0, seed=seed) for seed in (0, 1, 2)}
    assert len(set(texts.values())) == 3
    for seed, text in texts.items():
        assert lm.generate("on", 30, 1.0, seed=seed) == text
        assert "".join(lm.stream("on", 30, temperature=1.0, seed=seed)) == text
    assert len({lm.generate("on", 30, 1.0) for _ in range(3)}) == 3
    assert lm.generate("on", 30) == lm.generate("on", 30, 0, seed=5)  # nothing is drawn
    assert lm.generate("on", 30, seed=5) == lm.generate("on", 30, 1, seed=5), "1 is implied"


def test_batch_seed_of_a_small_integer_type_does_not_wrap():
    """Row i is sampled with seed + i, and np.uint8(255) + 1 is 0."""
    lm, prompts = tiny_lm(), ["on", "on", "ce"]
    assert lm.generate(prompts, 12, seed=np.uint8(255)) == lm.generate(prompts, 12, seed=255)


def test_empty_text_starts_from_the_beginning_of_text_token():
    lm = tiny_lm()
    assert lm.encode("") == [END] and lm.generate("", 5) == "".join(lm.stream([END], 5))
    plain = ByteLevelBPE(TOKENIZER.tokens, [])  # which puts nothing before a text
    for ends, ids in (((3, (4, 5)), [3]), ((None, (4, 5)), [4])):
        model = tiny_model(bos=ends[0], eos=ends[1])
        assert minitx.LM(model, plain).encode("") == ids
        assert minitx.LM(model, plain).encode("a") == [97]
    with pytest.raises(MinitxError, match="prompt is empty"):
        minitx.LM(tiny_model(bos=None, eos=()), plain).generate("")


# The context -------------------------------------------------------------------------------------


def test_default_new_tokens_fill_the_context():
    lm, calls = says([1] * 99)
    assert len(lm.generate(IDS)) == CONTEXT - 5 == len(lm.generate(IDS, CONTEXT - 5))
    assert lm.generate([1] * CONTEXT) == [] == lm.generate(IDS, 0)
    lm, calls = says([1] * 99, [2] * 99)
    assert list(map(len, lm.generate([IDS, [4]]))) == [CONTEXT - 5] * 2  # room for the longest


ASK = {
    "generate": lambda lm, *a, **k: lm.generate(*a, **k),
    "stream": lambda lm, *a, **k: lm.stream(*a, **k),  # not one piece is asked for
    "tokens": lambda lm, *a, **k: lm.tokens(*a, **k),
    "batch": lambda lm, prompt, *a, **k: lm.generate([[3], prompt], *a, **k),
}


@pytest.fixture(params=ASK)
def ask(request):
    return ASK[request.param]


REFUSED = [
    ((IDS, CONTEXT - 4), {}, r"prompt of 5 tokens plus 44 new ones .* context of 48; .* 43 new"),
    (([1] * CONTEXT, 1), {}, "at most 0 new tokens"),
    (([1] * 49,), {}, "prompt has 49 tokens but the context is 48"),
    ((IDS, -1), {}, "max_new_tokens must be .*, got -1"),
    ((IDS, 2.5), {}, "max_new_tokens must be .*, got 2.5"),
    ((IDS, "3"), {}, "max_new_tokens must be .*, got '3'"),
    ((IDS, 3), {"temperature": -1}, "temperature must be .*, got -1"),
    ((IDS, 3), {"top_k": 0}, "top_k must be .*, got 0"),
    ((IDS, 3), {"top_p": 2}, "top_p must be .*, got 2"),
    ((IDS, 3), {"seed": -1}, "seed must be .*, got -1"),
    ((IDS, 3), {"seed": "x"}, "seed must be .*, got 'x'"),
    (([],), {}, "prompt is empty"),
    (([5, 259],), {}, "Token id 259 is outside the vocabulary of 259"),
    (([5, -1],), {}, "Token id -1 is outside"),
    (([5.0, 1.0],), {}, r"Expected integer token ids, got \[5.0, 1.0\] of type float64"),
    (([True],), {}, r"Expected integer token ids, got \[True\] of type bool"),
    ((["a", 1],), {}, "."),
    (([1, [2]],), {}, "rows of equal length, got rows of different lengths"),
    ((None,), {}, "Expected a list of token ids, got None"),
    ((7,), {}, "Expected a list of token ids, got 7"),
    (({1, 2},), {}, "Expected a list of token ids, got {1, 2}"),
    ((b"Once",), {}, "Expected a list of token ids, got b'Once'"),
    (("\udcff",), {}, "lone surrogate"),
]


@pytest.mark.parametrize("arguments, options, words", REFUSED)
def test_bad_input_is_refused_before_any_work(ask, arguments, options, words):
    lm = tiny_lm()
    spy = Spy(lm.model, [])
    with pytest.raises(MinitxError, match=words) as caught:
        ask(minitx.LM(spy, TOKENIZER), *arguments, **options)
    assert spy.runs == [] and "\n" not in str(caught.value)


def test_bad_prompts_are_refused():
    lm = tiny_lm()
    for one in (lm.stream, lm.tokens, lm.encode):
        with pytest.raises(
            MinitxError, match=r"Expected one text or one list of token ids, got .* \(2, 5\)"
        ):
            one([IDS, IDS])
    for bad in ("Once", 7, None):
        with pytest.raises(MinitxError, match="Expected a list of token ids"):
            lm.logits(bad)
    for bad in ([[1, 2], [3]], [], [[]], [[1] * 49], [300]):
        with pytest.raises(MinitxError):
            lm.logits(bad)
    with pytest.raises(MinitxError, match="empty"):
        lm.generate(np.zeros((0, 3), int))
    with pytest.raises(MinitxError, match="shape"):
        lm.generate(np.zeros((2, 2, 2), int))


def test_ids_outside_the_vocabulary_are_refused():
    class Other:
        def encode(self, text):
            return [300]

    with pytest.raises(MinitxError, match="300 is outside .* tokenizer that belongs"):
        tiny_lm(tokenizer=Other()).generate("a")


# The end of the text -----------------------------------------------------------------------------


def test_end_of_text_stops_generation_and_is_not_returned():
    text = TOKENIZER.encode("once", special=False)
    lm, calls = says([*text, END, 7, 8])
    assert lm.generate(IDS, 9) == list(lm.tokens(IDS, 9)) == text
    assert lm.generate("x", 9) == "".join(lm.stream("x", 9)) == "once"
    assert calls[: len(text) + 2] == [(IDS, 9), *text, END]  # nothing is requested after the end
    assert says([END])[0].generate("x") == ""


def test_batch_rows_end_independently():
    lm, calls = says([1, 2, END, 4, 5, 6], [1, END, 3, END, 5, 6], [END] * 6)
    assert lm.generate([IDS, [3], "on"], 6) == [[1, 2], [1], ""]
    assert len(calls) == 1 + 3  # until the last row ended
    assert says([1, 2], [3, END])[0].generate([IDS, IDS], 2) == [[1, 2], [3]]


# Streaming ---------------------------------------------------------------------------------------


def test_stream_holds_back_incomplete_characters():
    lm, _ = says([*"Zoë — 🙂!".encode()])  # one token a byte
    assert list(lm.stream("x")) == list("Zoë — 🙂!")


@pytest.mark.parametrize("cut", range(1, 12))
def test_stream_that_ends_inside_a_character(cut):
    data = "aé—🙂b".encode()[:cut]
    lm, _ = says([*data, END])
    pieces = list(lm.stream("x"))
    assert "".join(pieces) == lm.generate("x") == data.decode(errors="replace")
    assert all(piece and "\ufffd" not in piece for piece in pieces[:-1])
    assert lm.generate(["x"]) == [lm.generate("x")]


def test_bytes_that_are_not_utf8():
    """Streams of random bytes: always valid text, and that of the whole."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        data = rng.choice([0x61, 0x80, 0xC3, 0xA9, 0xE2, 0xF0, 0x9F, 0xFF], 12).tolist()
        lm, _ = says(data)
        pieces = list(lm.stream([0]))
        assert "".join(pieces) == bytes(data).decode("utf-8", errors="replace")
        "".join(pieces).encode("utf-8")


def test_first_token_is_decoded_after_the_prompt():
    """llama2.c's tokenizer drops a space after the start token and nowhere else."""
    tokens = [b"<unk>", b"^", b"$", *RAW, b" ", b"a", b" b"]
    tokenizer = Llama2cTokenizer(tokens, [0.0] * len(tokens))
    model = tiny_model(vocab_size=262)
    lm, _ = says([261, 260], tokenizer=tokenizer, model=model)
    assert lm.generate("") == "".join(lm.stream("")) == lm.generate([""])[0] == "ba"
    assert lm.generate("a") == "".join(lm.stream("a")) == lm.generate(["a"])[0] == " ba"


# Without a tokenizer, with damaged weights, and in print -----------------------------------------


def test_model_without_tokenizer_works_on_ids():
    lm = tiny_lm(tokenizer=None)
    assert lm.generate(IDS, 5) == tiny_lm().generate(IDS, 5) == list(lm.tokens(IDS, 5))
    assert lm.generate([IDS, [3]], 5)[0] == lm.generate(IDS, 5)
    for ask in (lm.generate, lm.stream, lm.tokens, lm.encode, lambda x: lm.generate([x])):
        with pytest.raises(MinitxError, match="no tokenizer.* load it with tokenizer=PATH"):
            ask("Once")
    with pytest.raises(MinitxError, match="no tokenizer"):
        lm.stream(IDS)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_overflow_is_refused_instead_of_text():
    model = map_weights(tiny_model(), lambda w: w * np.float32(1e38) if w.shape == (16, 259) else w)
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(MinitxError, match="The model's logit for token .* is (nan|inf)"):
            minitx.LM(model, TOKENIZER).generate("Once", 5, **options)


def test_very_negative_neurons_do_not_warn():
    """exp overflows in silu, whose value is 0 there all the same (warnings are errors here)."""
    model = map_weights(tiny_model(), lambda w: w * 1000 if w.shape == (16, 24) else w)
    assert np.isfinite(minitx.LM(model, TOKENIZER).logits(IDS)).all()
    with pytest.warns(RuntimeWarning, match="overflow"):
        state = model.new_state()
        model.stack(model.embed(np.array(IDS), state.take(len(IDS)).lookup), state)


def test_print_draws_the_tree_from_the_root():
    lm = tiny_lm(name="tiny")
    lines = repr(lm).splitlines()
    assert lines[:2] == ["LM(name=tiny)", "  model: Transformer"]
    assert lines[-1] == "  decode: Autoregressive"
    assert all(line[2:] in repr(lm) for line in repr(lm.model).splitlines())


def test_batches_of_any_mixture_of_lengths():
    lm = tiny_lm(dtype=np.float64)
    rows = {n: np.random.default_rng(n).integers(0, 258, n).tolist() for n in (1, 2, 40)}
    alone = {n: lm.generate(row, 8) for n, row in rows.items()}
    for lengths in itertools.product(rows, repeat=3):
        found = lm.generate([rows[n] for n in lengths], 8)
        assert found == [alone[n] for n in lengths]
