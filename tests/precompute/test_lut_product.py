"""lut_product: table reads equal the integer product bit for bit; the search; what is refused."""

from dataclasses import replace

import literal_lut_product as literal
import numpy as np
import pytest
from same import assert_same
from tiny import tiny_lm

from minitx.errors import MinitxError
from minitx.lab import lut_search
from minitx.lm import LM
from minitx.model import FFN, Attention
from minitx.precompute.lut_product import (
    ProductTable,
    ProductTableLinear,
    bit_search,
    pack,
    quantize_weights,
    table_bytes,
    unpack,
)
from minitx.precompute.lut_product.bit_search import (
    IntegerLinear,
    find_bits,
    next_token_accuracy,
    two_stages,
)
from minitx.shared.symmetric import quantize_symmetric
from minitx.shared.table_lookup import constant_matrices, replace_matrices, weight_and_bias
from minitx.technique import apply, swap
from minitx.tree import nbytes, walk

RNG = np.random.default_rng(3)
X = np.array([[0.9, -0.4, 0.2, 0.6]])
W = np.array([[0.5, -1], [1, 0.25], [-0.5, 0.75], [0.25, 1]])
# input bits, weight bits, length
BITS = [(8, 8, 1), (4, 4, 1), (4, 4, 2), (3, 4, 2), (3, 3, 3), (2, 2, 4), (3, 2, 2), (5, 2, 1)]
IDS = np.random.default_rng(0).integers(0, 258, 30)


FOUR_BITS = dict(input_bits=4, weight_bits=4, length=2, stories=2)


def with_tables(family="llama", dtype=np.float64, **options):
    return apply(tiny_lm(family, dtype=dtype), {"lut_product": FOUR_BITS | options})


def parts(lm, kind):
    return {id(node): node for _, node in walk(lm) if type(node) is kind}


def all_matrices(lm):
    return constant_matrices("lut_product", lm, None, False)


# The arithmetic ----------------------------------------------------------------------------------


def test_worked_example_with_3_bit_inputs_and_2_bit_weights():
    """Inputs: 3 bits reach +-3, so the scale is 0.9 / 3 = 0.3 and x / 0.3 rounds to 3 -1 1 2.
    Codes of two: (3 + 4) + (-1 + 4) * 8 = 31 and (1 + 4) + (2 + 4) * 8 = 53.
    Weights: 2 bits reach +-1, both scales are 1, W rounds (halves to even) to the four rows below.
    Codes of two: (0 + 2) + (1 + 2) * 4 = 14 and (0 + 2) + (0 + 2) * 4 = 10 for the first output.
    Reads: 3*0 - 1*1 = -1 and 0; for the second output 3*-1 - 1*0 = -3 and 1*1 + 2*1 = 3.
    """
    xi, xs = quantize_symmetric(X, 3)
    wi, ws = quantize_weights(W, 2)
    assert_same(xs, [0.3], tolerance=1e-7)
    assert_same(xi, [[3, -1, 1, 2]])
    assert_same(ws, [1, 1])
    assert_same(wi, [[0, -1], [1, 0], [0, 1], [0, 1]])
    table = ProductTable.of(3, 2, 2, "vertical")
    part = ProductTableLinear.of(table, W, None)
    cx = pack(xi, 3, 2)
    assert_same(cx, [[31, 53]], "input codes")
    assert_same(part.codes, [[14, 9], [10, 15]], "weight codes")
    assert_same(table.entries[cx[0][:, None], part.codes], [[-1, -3], [0, 3]])
    assert_same(table.sums(cx, part.codes), [[-1, 0]])
    assert_same(part(X), [[-0.3, 0]], tolerance=1e-7)
    assert_same(X @ W, [[0.1, -0.25]], tolerance=1e-7)


def test_worked_example_with_4_bits():
    xi, _ = quantize_symmetric(X, 4)
    wi, _ = quantize_weights(W, 4)
    assert_same(xi, [[7, -3, 2, 5]])
    assert_same(wi, [[4, -7], [7, 2], [-4, 5], [2, 7]])
    part = ProductTableLinear.of(ProductTable.of(4, 4, 2, "vertical"), W, None)
    assert_same(part.table.sums(pack(xi, 4, 2), part.codes), [[9, -10]])
    assert_same(part(X), [[0.16531, -0.18367]], atol=5e-6)


@pytest.mark.parametrize("input_bits, weight_bits, length", [(3, 2, 2), (2, 2, 3), (4, 4, 1)])
def test_lut_product_equals_the_literal_version(input_bits, weight_bits, length):
    x, w = RNG.normal(size=7), RNG.normal(size=(7, 4))
    expected = literal.lut_product(x.tolist(), w.tolist(), input_bits, weight_bits, length)
    y, acc, cx, cw = expected
    table = ProductTable.of(input_bits, weight_bits, length, "horizontal")
    part = ProductTableLinear.of(table, w, None)
    xi, _ = quantize_symmetric(x[None], input_bits)
    found = pack(xi, input_bits, length)
    assert_same(found[0], cx, "input codes")
    assert_same(part.codes.T, cw, "weight codes")
    assert_same(table.sums(found, part.codes)[0], acc, "integer sums")
    assert_same(part(x), y, "outputs", tolerance=1e-14)


@pytest.mark.parametrize("layout", ["vertical", "horizontal"])
@pytest.mark.parametrize("input_bits, weight_bits, length", BITS)
def test_table_reads_equal_the_integer_product_bit_for_bit(input_bits, weight_bits, length, layout):
    """17 inputs, which no length above 1 divides; the largest integers of each sign are there."""
    a, w = (1 << input_bits - 1) - 1, (1 << weight_bits - 1) - 1
    xi = RNG.integers(-a, a + 1, (40, 17))
    wi = RNG.integers(-w, w + 1, (17, 23))
    xi[0], wi[:, 0], xi[1] = a, w, -a
    table = ProductTable.of(input_bits, weight_bits, length, layout)
    cw = pack(wi.T, weight_bits, length).T.astype(np.uint32)
    assert_same(table.sums(pack(xi, input_bits, length), cw), xi @ wi)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("input_bits, weight_bits, length", BITS)
def test_table_part_equals_the_integer_part_bit_for_bit(input_bits, weight_bits, length, dtype):
    x, w, b = (RNG.normal(size=s).astype(dtype) for s in ((3, 5, 17), (17, 23), (23,)))
    table = ProductTable.of(input_bits, weight_bits, length, "vertical")
    found = ProductTableLinear.of(table, w, b)
    expected = IntegerLinear.of(w, b, input_bits, weight_bits)
    assert found(x).dtype == dtype
    assert_same(found(x), expected(x))


@pytest.mark.parametrize("bits, length", [(2, 3), (3, 2), (4, 2), (8, 1)])
def test_pack_inverts_unpack(bits, length):
    every = unpack(bits, length)
    assert every.min() == -(1 << bits - 1) and every.max() == (1 << bits - 1) - 1
    assert_same(pack(every, bits, length)[:, 0], np.arange(1 << bits * length))


def test_pack_pads_the_last_group_with_the_value_0():
    """1 is stored as 1 + 8 = 9, the missing 0 as 8; a digit of 0 would mean -8."""
    assert_same(pack(np.array([[1]]), 4, 2), [[9 + (8 << 4)]])


@pytest.mark.parametrize(
    "bits, size",
    [((4, 4, 1), 256), ((4, 4, 2), 64 << 10), ((3, 4, 2), 16 << 10), ((3, 3, 3), 256 << 10)]
    + [((2, 2, 4), 64 << 10), ((8, 8, 1), 128 << 10), ((4, 4, 3), 32 << 20)],
)
def test_table_size(bits, size):
    """The last two take 16 bits an entry: they reach 127 * 127 and 3 * 7 * 7 = 147."""
    assert table_bytes(*bits) == size
    if size < 1 << 20:
        assert ProductTable.of(*bits, "vertical").entries.nbytes == size


def test_table_entries_that_are_never_read_do_not_overflow():
    """(-8)(-8) 2 = 128 is no int8; quantization never produces -8, so the entry is clipped."""
    entries = ProductTable.of(4, 4, 2, "vertical").entries
    assert entries.dtype == np.int8 and entries.max() == 98 and entries.min() == -98


def test_error_falls_with_more_bits():
    x, w = RNG.normal(size=(20, 32)), RNG.normal(size=(32, 16))
    tables = [ProductTable.of(bits, bits, 1, "vertical") for bits in (2, 4, 6, 8)]
    errors = [abs(ProductTableLinear.of(table, w, None)(x) - x @ w).max() for table in tables]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]


def test_an_outlier_token_does_not_change_the_others():
    x, w = RNG.normal(size=(5, 32)), RNG.normal(size=(32, 16))
    part = ProductTableLinear.of(ProductTable.of(4, 4, 2, "vertical"), w, None)
    before = part(x)
    x[2] *= 1000
    assert_same(np.delete(part(x), 2, 0), np.delete(before, 2, 0))


def test_an_input_of_zeros_gives_the_bias():
    part = ProductTableLinear.of(ProductTable.of(4, 4, 2, "vertical"), W, np.ones(2))
    assert_same(part(np.zeros((1, 4))), [[1, 1]])


# In a model --------------------------------------------------------------------------------------


def test_all_matrices_share_one_table():
    lm = with_tables()
    (shared,) = parts(lm, ProductTable).values()
    drawn = "entries 256x256, input_bits=4, weight_bits=4, length=2, layout=vertical"
    assert f"ProductTable({drawn})" in repr(lm)
    assert len(parts(lm, ProductTableLinear)) == 14 and nbytes(shared) == 65536


@pytest.mark.parametrize(
    "options",
    [dict(length=2), dict(length=2, layout="horizontal"), dict(length=1, layout="horizontal")],
)
def test_layout_and_length_do_not_change_a_bit(options):
    expected = with_tables(length=1).logits(IDS)
    assert_same(with_tables(**options).logits(IDS), expected)


def test_logits_equal_the_integer_model_bit_for_bit():
    dense = tiny_lm(dtype=np.float32)
    nodes = constant_matrices("lut_product", dense, None, True)
    integer = replace_matrices(
        dense, nodes, lambda node: IntegerLinear.of(*weight_and_bias(node), 4, 4)
    )
    found = with_tables(dtype=np.float32, head=True)
    assert_same(found.logits(IDS), integer.logits(IDS))


# Search ------------------------------------------------------------------------------------------


def test_search_lowers_input_bits_first_then_weight_bits_then_fits_the_table():
    """A made-up accuracy that needs 4 and 3 bits. Pairs: 2^(2 * 7) = 16 KiB fit 64 KiB, triples
    2^21 = 2 MiB do not."""
    found = two_stages(lambda inputs, weights: min(inputs - 1, weights, 5) / 5, 0.6, 65536)
    assert (found.input_bits, found.weight_bits, found.length) == (4, 3, 2)
    tried = [8, 7, 6, 5, 4, 3], [7, 6, 5, 4, 3, 2]
    expected = [(a, 8) for a in tried[0]] + [(4, w) for w in tried[1]]
    assert [t[:2] for t in found.tried] == expected
    assert "input_bits=3 weight_bits=8  0.4000  too low" in str(found)
    assert str(found).splitlines()[-1] == "found: input_bits=4 weight_bits=3 length=2"


def test_search_ends_at_two_bits():
    found = two_stages(lambda inputs, weights: 1.0, 1.0, 65536)
    assert (found.input_bits, found.weight_bits, found.length) == (2, 2, 4)  # 64 KiB


def test_search_result_is_in_the_model():
    lm = tiny_lm(dtype=np.float32)
    changed = apply(lm, {"lut_product": dict(search=True, drop=1.0, stories=2)})
    (shared,) = parts(changed, ProductTable).values()
    assert (shared.input_bits, shared.weight_bits, shared.length) == (2, 2, 4)
    found = find_bits(lm, all_matrices(lm), 1.0, 256, 2)
    assert (found.length, found.cache, len(found.tried)) == (2, 256, 13)
    assert lut_search.search(lm, drop=1.0, cache=256, stories=2) == found


def test_search_as_a_command_prints_the_flag(monkeypatch, capsys):
    monkeypatch.setattr(lut_search.minitx, "load", lambda name: tiny_lm())
    assert lut_search.main(["drop=1", "stories=2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "--lut-product input_bits=2 weight_bits=2 length=4" and len(out) == 21


@pytest.mark.parametrize(
    "words", [["a", "b"], ["drop=x"], ["drops=1"], ["cache=1", "drop=1", "stories=2"]]
)
def test_search_as_a_command_refuses_bad_input_in_one_line(monkeypatch, capsys, words):
    monkeypatch.setattr(lut_search.minitx, "load", lambda name: tiny_lm())
    assert lut_search.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("minitx: ") and err.count("\n") == 1


class NextId:
    """An LM of three tokens that always predicts i + 1 after token i."""

    def __init__(self):
        self.asked = []

    def logits(self, ids):
        self.asked.append(list(ids))
        return np.eye(3)[(np.array(ids) + 1) % 3]


def test_accuracy_is_the_share_over_the_tokens_of_all_texts():
    """0 1 2 2 0: predicted after 0 1 2 2 are 1 2 0 0, and 1 2 2 0 follow, so 3 of 4 are right.
    1 0: predicted is 2 and 0 follows, so 0 of 1. Together 3 of 5; the mean of the two texts'
    shares, 3/8, would give the short text the weight of the long one."""
    lm = NextId()
    found = next_token_accuracy(lm, [[0, 1, 2, 2, 0], [1, 0]])
    assert found == 3 / 5, f"expected 3 of 5 tokens right, got a share of {found}"
    assert lm.asked == [[0, 1, 2, 2], [1]], "nothing is predicted after the last token of a text"


@pytest.fixture(scope="module")
def dense():
    """A model that 8 bits hardly change: its blocks write a twentieth of what they did."""

    def quieter(linear):
        return replace(linear, w=linear.w * 0.05)

    lm = swap(tiny_lm(dtype=np.float64), FFN, lambda ffn: replace(ffn, down=quieter(ffn.down)))
    return swap(lm, Attention, lambda attn: replace(attn, out=quieter(attn.out)))


@pytest.fixture(scope="module")
def two_thirds(dense):
    """Four texts of 48 tokens, of which 125 of 188 are those that the dense model predicts: with
    probability 3/4 the next token is its own choice, otherwise a random one."""
    rng = np.random.default_rng(4)
    texts = [[int(rng.integers(258))] for _ in range(4)]
    for ids in texts:
        while len(ids) < 48:
            greedy = rng.random() < 0.75
            ids.append(int(dense.logits(ids)[-1].argmax() if greedy else rng.integers(258)))
    return texts


@pytest.fixture
def calibrated(monkeypatch, two_thirds):
    """Those texts instead of calibration stories; returns a list of what is asked for."""
    asked = []

    def calibration_ids(name, lm, count, instead):
        asked.append((name, count))
        return two_thirds

    monkeypatch.setattr(bit_search, "calibration_ids", calibration_ids)
    return asked


def share_right(lm, texts):
    """The share of right next tokens, token by token."""
    right = [
        int(row.argmax()) == target
        for ids in texts
        for row, target in zip(lm.logits(ids[:-1]), ids[1:], strict=True)
    ]
    return sum(right) / len(right)


def searched(lm, texts, floor, **options):
    """(input bits, weight bits) and all that is tried, with real tables: the inputs' bits go down
    from 8 while the accuracy is at least ``floor``, then the weights' bits."""
    tried = []

    def enough(input_bits, weight_bits):
        bits = dict(input_bits=input_bits, weight_bits=weight_bits, length=1)
        changed = apply(lm, {"lut_product": bits | options})
        tried.append((input_bits, weight_bits, share_right(changed, texts)))
        return tried[-1][2] >= floor

    input_bits = weight_bits = 8
    assert enough(8, 8)
    while input_bits > 2 and enough(input_bits - 1, weight_bits):
        input_bits -= 1
    while weight_bits > 2 and enough(input_bits, weight_bits - 1):
        weight_bits -= 1
    return (input_bits, weight_bits), tried


@pytest.mark.parametrize("drop", [0.03, 0.05, 0.2])
def test_search_keeps_the_dense_accuracy_less_the_drop(dense, two_thirds, calibrated, drop):
    floor = share_right(dense, two_thirds) - drop
    bits, tried = searched(dense, two_thirds, floor)
    assert 2 < bits[0] < 8 and bits[1] > 2, f"the example is to end above 2 bits; tried {tried}"
    found = find_bits(dense, all_matrices(dense), drop, 65536, 5)
    assert found.floor == pytest.approx(floor), f"expected {floor} to be kept, got {found.floor}"
    assert found.tried == tuple(tried), "other bits are tried, or other accuracies measured"
    assert (found.input_bits, found.weight_bits) == bits, f"expected {bits}, got {found}"
    sizes = [table_bytes(*bits, length) for length in (found.length, found.length + 1)]
    assert sizes[0] <= 65536 < sizes[1], f"length={found.length} is not the largest: {sizes}"
    assert calibrated == [("lut_product", 5)], f"expected 5 stories, got {calibrated}"


def test_search_in_the_technique_and_in_the_lab_agree(dense, two_thirds, calibrated):
    """Both pass on drop, cache, layers, head and stories."""
    options = dict(drop=0.3, cache=3000, layers=1, head=True, stories=3)
    floor = share_right(dense, two_thirds) - 0.3
    bits, tried = searched(dense, two_thirds, floor, layers=1, head=True)
    assert tried != searched(dense, two_thirds, floor)[1], "the last layer and all are told apart"
    length = max(n for n in range(1, 9) if table_bytes(*bits, n) <= 3000)
    assert table_bytes(*bits, length + 1) <= 65536, "another cache gives another length"
    found = lut_search.search(dense, **options)
    assert found.tried == tuple(tried), "the lab searches other matrices or texts"
    result = found.input_bits, found.weight_bits, found.length
    assert result == (*bits, length), f"expected {bits} and {length}, got {found}"
    assert found.cache == 3000, f"expected a table of at most 3000 bytes, got {found.cache}"
    lm = apply(dense, {"lut_product": dict(search=True) | options})
    (shared,) = parts(lm, ProductTable).values()
    made = shared.input_bits, shared.weight_bits, shared.length
    assert made == result, f"the search finds {result}, but the table has {made}"
    assert calibrated == [("lut_product", 3)] * 2, f"expected 3 stories twice, got {calibrated}"


def test_search_without_options_takes_the_defaults_of_the_technique(dense, two_thirds, calibrated):
    """A drop of 0.01, 64 KiB, 16 stories, every block, and not the head."""
    found = lut_search.search(dense)
    floor = share_right(dense, two_thirds) - 0.01
    assert found.floor == pytest.approx(floor), f"expected a drop of 0.01, got {found.floor}"
    assert found.cache == 65536, f"expected a table of at most 64 KiB, got {found.cache}"
    assert calibrated == [("lut_product", 16)], f"expected 16 stories, got {calibrated}"
    _, tried = searched(dense, two_thirds, floor)
    assert found.tried == tuple(tried), "the lab searches other matrices or texts"


def test_search_that_8_bits_fail_is_refused():
    with pytest.raises(MinitxError, match="^lut_product: at 8 and 8 bits the accuracy is 0.5000, "):
        two_stages(lambda inputs, weights: 0.5, 0.6, 65536)


def test_search_without_room_for_length_1_is_refused():
    with pytest.raises(MinitxError, match="^lut_product: a table for 2 and 2 bits takes 16 bytes"):
        two_stages(lambda inputs, weights: 0.5, 0.5, 15)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(input_bits=1), "input_bits must be an integer, 2 to 8; got 1"),
        (dict(weight_bits=1), "weight_bits must be an integer, 2 to 8; got 1"),
        (dict(length=0), "length must be an integer, 1 to 16; got 0"),
        (dict(layers=3), "layers must be at most 2, the blocks of this model; got 3"),
        (dict(layers=-1), "layers must be an integer, at least 0, or None; got -1"),
        (dict(drop=1.5), "drop must be a number, 0 to 1; got 1.5"),
        (dict(cache=-1, search=True, drop=1.0), "cache must be an integer, at least 1; got -1"),
        (dict(stories=0), "stories must be an integer, 1 to 1000; got 0"),
        (dict(input_bits=8, weight_bits=8), "would take 8,192.0 MiB and limit is 256"),
        (dict(limit=0.01), "would take 0.1 MiB and limit is 0.01"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(MinitxError, match="^lut_product: ") as error:
        with_tables(**options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_search_without_a_tokenizer_is_refused():
    with pytest.raises(MinitxError, match="^lut_product .*no tokenizer"):
        apply(LM(tiny_lm().model), {"lut_product": dict(search=True)})
