"""Table lookup as a technique: what is replaced, searched, learned, counted and refused."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.errors import MinitxError
from minitx.lab import lut_search
from minitx.lab.costs import lut as costs
from minitx.ledger import Entry, counting
from minitx.lm import LM
from minitx.model import FFN, Attention, Linear
from minitx.precompute.lut import TableHead, chosen, find_bits, matrix, right_tokens, with_tables
from minitx.precompute.lut.bit_search import two_stages
from minitx.precompute.lut.bit_serial import BitSerialLinear
from minitx.precompute.lut.centroid_table import CentroidLinear
from minitx.precompute.lut.product_table import (
    FoldedLinear,
    IntegerLinear,
    ProductTable,
    TableLinear,
    table_bytes,
)
from minitx.technique import apply, kinds, swap
from minitx.training import calibration
from minitx.tree import nbytes, walk

KINDS = {
    "product": TableLinear,
    "folded": FoldedLinear,
    "centroid": CentroidLinear,
    "bit-serial": BitSerialLinear,
}
IDS = np.random.default_rng(0).integers(0, 258, 30)


def with_lut(family="llama", dtype=np.float64, **options):
    return apply(tiny_lm(family, dtype=dtype), {"lut": {"stories": 2} | options})


def parts(lm, kind):
    return {id(node): node for _, node in walk(lm) if type(node) is kind}


# What is replaced --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_runs_in_pieces_and_in_batches(kind, family):
    lm = with_lut(family, kind=kind, head=True)
    assert Linear not in kinds(lm) and type(lm.model.head) is TableHead
    assert type(lm.model.head.logits) is KINDS[kind]
    whole = lm.logits(IDS)
    state = lm.model.new_state()
    found = [lm.model(IDS[a:b], state) for a, b in ((0, 11), (11, 12), (12, 30))]
    np.testing.assert_allclose(np.concatenate(found), whole, atol=1e-9)
    np.testing.assert_allclose(lm.logits(np.stack([IDS, IDS[::-1]]))[0], whole, atol=1e-9)
    assert lm.generate(IDS[:5], 8) == lm.generate([IDS[:5], IDS[:3]], 8)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stays_float32(kind):
    lm = with_lut(dtype=np.float32, kind=kind, head=True)
    assert lm.logits(IDS).dtype == np.float32
    for _, node in walk(lm):
        for value in vars(node).values():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                assert value.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_last_layers(kind):
    lm = with_lut(kind=kind, layers=1)
    assert KINDS[kind] not in kinds(lm.model.stack.blocks[0])
    assert Linear not in kinds(lm.model.stack.blocks[1])
    dense = tiny_lm(dtype=np.float64).model
    zero = with_lut(kind=kind, layers=0).model
    assert zero.stack.blocks == dense.stack.blocks and zero.head is dense.head


def test_all_matrices_share_one_table():
    lm = with_lut()
    (shared,) = parts(lm, ProductTable).values()
    assert "ProductTable(entries 256x256, ba=4, bw=4, d=2, layout=vertical)" in repr(lm)
    assert len(parts(lm, TableLinear)) == 14 and nbytes(shared) == 65536


def test_layouts_and_lengths_of_vectors_give_the_same_bits():
    expected = with_lut(d=1).logits(IDS)
    for options in (dict(d=2), dict(d=2, layout="horizontal"), dict(d=1, layout="horizontal")):
        np.testing.assert_array_equal(with_lut(**options).logits(IDS), expected)


def test_product_is_the_integer_model_bit_for_bit():
    dense = tiny_lm(dtype=np.float32)
    nodes = chosen(dense, None, True)
    integer = with_tables(dense, nodes, lambda node: IntegerLinear.of(*matrix(node), 4, 4))
    found = with_lut(dtype=np.float32, head=True)
    np.testing.assert_array_equal(found.logits(IDS), integer.logits(IDS))


def test_queries_keys_and_values_share_their_prototypes():
    lm = with_lut(kind="centroid")
    for block in lm.model.stack.blocks:
        q, k, v, out = block.attn.qkv.q, block.attn.qkv.k, block.attn.qkv.v, block.attn.out
        assert q.codebook is k.codebook is v.codebook is not out.codebook
        assert block.ffn.expand.gate.codebook is block.ffn.expand.up.codebook
    fused = apply(tiny_lm(), {"lut": dict(kind="centroid", stories=2), "fuse_projections": True})
    assert len(parts(fused, CentroidLinear)) == 8


def test_more_prototypes_are_nearer():
    dense = tiny_lm(dtype=np.float64)
    ids = dense.tokenizer.encode("The cat saw Once.")
    errors = [
        abs(with_lut(kind="centroid", Kc=Kc, V=2).logits(ids) - dense.logits(ids)).mean()
        for Kc in (2, 64)
    ]
    assert errors[1] < errors[0] / 2


# Search ------------------------------------------------------------------------------------------


def test_the_search_lowers_inputs_first_then_weights_then_fits_the_table():
    found = two_stages(lambda ba, bw: min(ba - 1, bw, 5) / 5, 0.6, 65536)
    assert (found.ba, found.bw, found.d) == (4, 3, 2)  # 2^14 entries; d = 3 would be 2^21
    tried = [8, 7, 6, 5, 4, 3], [7, 6, 5, 4, 3, 2]
    assert [t[:2] for t in found.tried] == [(a, 8) for a in tried[0]] + [(4, w) for w in tried[1]]
    assert "ba=3 bw=8  0.4000  too low" in str(found)
    assert str(found).splitlines()[-1] == "found: ba=4 bw=3 d=2"


def test_the_search_ends_at_two_bits():
    found = two_stages(lambda ba, bw: 1.0, 1.0, 65536)
    assert (found.ba, found.bw, found.d) == (2, 2, 4)  # 64 KiB


def test_what_is_found_is_in_the_tree():
    lm = tiny_lm(dtype=np.float32)
    changed = apply(lm, {"lut": dict(search=True, drop=1.0, stories=2)})
    (shared,) = parts(changed, ProductTable).values()
    assert (shared.ba, shared.bw, shared.d) == (2, 2, 4)
    found = find_bits(lm, chosen(lm, None, False), 1.0, 256, 2)
    assert (found.d, found.cache, len(found.tried)) == (2, 256, 13)
    assert lut_search.search(lm, drop=1.0, cache=256, stories=2) == found


def test_the_search_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr(lut_search.minitx, "load", lambda name: tiny_lm())
    assert lut_search.main(["drop=1", "stories=2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "--lut ba=2 bw=2 d=4" and len(out) == 21
    for words in (["a", "b"], ["drop=x"], ["drops=1"], ["cache=1", "drop=1", "stories=2"]):
        assert lut_search.main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith("minitx: ") and err.count("\n") == 1


class NextId:
    """Stands in for an LM: after token i the likeliest is always i + 1, of three tokens."""

    def __init__(self):
        self.asked = []

    def logits(self, ids):
        self.asked.append(list(ids))
        return np.eye(3)[(np.array(ids) + 1) % 3]


def test_right_tokens_is_the_share_over_the_tokens_of_all_texts():
    """0 1 2 2 0: predicted after 0 1 2 2 are 1 2 0 0, and 1 2 2 0 follow, so 3 of 4 are right.
    1 0: predicted is 2 and 0 follows, so 0 of 1. Together 3 of 5; the mean of the two texts'
    shares, 3/8, would give the short text the weight of the long one."""
    lm = NextId()
    found = right_tokens(lm, [[0, 1, 2, 2, 0], [1, 0]])
    assert found == 3 / 5, f"expected 3 of 5 tokens right, got a share of {found}"
    assert lm.asked == [[0, 1, 2, 2], [1]], "the last token of a text is never asked about"


@pytest.fixture(scope="module")
def dense():
    """A model that 8 bits do little to: its blocks write a twentieth of what they did."""

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

    def texts_for(name, lm, count):
        asked.append((name, count))
        return two_thirds

    monkeypatch.setattr(calibration, "texts_for", texts_for)
    return asked


def share_right(lm, texts):
    """The share of right next tokens, token by token."""
    right = [
        int(row.argmax()) == target
        for ids in texts
        for row, target in zip(lm.logits(ids[:-1]), ids[1:], strict=True)
    ]
    return sum(right) / len(right)


def searched(lm, texts, least, **options):
    """(ba, bw) and all that is tried, as the card says: the inputs' bits go down from 8 while the
    share is at least ``least``, then the weights' bits."""
    tried = []

    def enough(ba, bw):
        table = apply(lm, {"lut": dict(ba=ba, bw=bw, d=1) | options})
        tried.append((ba, bw, share_right(table, texts)))
        return tried[-1][2] >= least

    ba = bw = 8
    assert enough(8, 8)
    while ba > 2 and enough(ba - 1, bw):
        ba -= 1
    while bw > 2 and enough(ba, bw - 1):
        bw -= 1
    return (ba, bw), tried


@pytest.mark.parametrize("drop", [0.03, 0.05, 0.2])
def test_lut_search_small_drop_keeps_the_dense_share_less_the_drop(
    dense, two_thirds, calibrated, drop
):
    least = share_right(dense, two_thirds) - drop
    (ba, bw), tried = searched(dense, two_thirds, least)
    assert 2 < ba < 8 and bw > 2, f"the example is to end before 2 bits, and it tries {tried}"
    found = find_bits(dense, chosen(dense, None, False), drop, 65536, 5)
    assert found.least == pytest.approx(least), f"expected {least} to be kept, got {found.least}"
    assert found.tried == tuple(tried), "other bits are tried, or other shares measured"
    assert (found.ba, found.bw) == (ba, bw), f"expected ba={ba} bw={bw}, got {found}"
    sizes = [table_bytes(ba, bw, d) for d in (found.d, found.d + 1)]
    assert sizes[0] <= 65536 < sizes[1], f"d={found.d} is not the largest that fits: {sizes}"
    assert calibrated == [("lut", 5)], f"expected 5 stories for lut, got {calibrated}"


def test_lut_search_in_the_technique_and_in_the_lab_find_the_same(dense, two_thirds, calibrated):
    """Both pass on drop, cache, layers, head and stories."""
    options = dict(drop=0.3, cache=3000, layers=1, head=True, stories=3)
    least = share_right(dense, two_thirds) - 0.3
    (ba, bw), tried = searched(dense, two_thirds, least, layers=1, head=True)
    assert tried != searched(dense, two_thirds, least)[1], "the last layer and all are told apart"
    d = max(d for d in range(1, 9) if table_bytes(ba, bw, d) <= 3000)
    assert table_bytes(ba, bw, d + 1) <= 65536, "another cache gives another d"
    found = lut_search.search(dense, **options)
    assert found.tried == tuple(tried), "the lab searches other matrices or texts"
    assert (found.ba, found.bw, found.d) == (ba, bw, d), f"expected {ba}, {bw}, {d}, got {found}"
    assert found.cache == 3000, f"expected a table of at most 3000 bytes, got {found.cache}"
    lm = apply(dense, {"lut": dict(search=True) | options})
    (shared,) = parts(lm, ProductTable).values()
    made = shared.ba, shared.bw, shared.d
    assert made == (ba, bw, d), f"the search finds {ba}, {bw}, {d}, but the table has {made}"
    assert calibrated == [("lut", 3)] * 2, f"expected 3 stories twice, got {calibrated}"


def test_lut_search_without_options_takes_the_defaults_of_the_technique(
    dense, two_thirds, calibrated
):
    """A drop of 0.01, 64 KiB, 16 stories, every block, and not the head."""
    found = lut_search.search(dense)
    least = share_right(dense, two_thirds) - 0.01
    assert found.least == pytest.approx(least), f"expected a drop of 0.01, got {found.least}"
    assert found.cache == 65536, f"expected a table of at most 64 KiB, got {found.cache}"
    assert calibrated == [("lut", 16)], f"expected 16 stories for lut, got {calibrated}"
    _, tried = searched(dense, two_thirds, least)
    assert found.tried == tuple(tried), "the lab searches other matrices or texts"


# Counting ----------------------------------------------------------------------------------------

WORK = {
    "product": lambda D, N: costs.product(D, N, 4, 4, 2),
    "folded": lambda D, N: costs.folded(D, N, 4, 2, 8),
    "centroid": lambda D, N: costs.centroid(D, N, 16, 4, 8),
    "bit-serial": lambda D, N: costs.bit_serial(D, N, 4, 4, True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_counted_is_predicted(kind, tokens):
    lm = with_lut(kind=kind)
    shapes = [node.w.shape for node in chosen(tiny_lm(), None, False)]
    with counting(lm) as counts:
        lm.logits(IDS[:tokens])
    work = sum((WORK[kind](*shape) for shape in shapes), costs.Work(0, 0, 0, 0, 0))
    ours = [path for path in counts.entries if not path.endswith(("attend", "head", "embed"))]
    found = sum((counts.entries[path] for path in ours), Entry())
    assert len(ours) == 14
    assert found.multiply_adds == tokens * work.multiplications
    assert counts.events["table reads"] == tokens * work.reads
    assert counts.events["table entries made"] == tokens * work.made
    if kind == "product":  # a byte a code, once; a byte an entry, for each token
        assert found.weight_bytes == work.weight_bytes + tokens * work.reads
    if kind == "folded":
        assert found.weight_bytes == 8 * tokens * work.reads
        assert sum(p.tables.nbytes for p in parts(lm, FoldedLinear).values()) == work.table_bytes
    if kind == "bit-serial":  # a byte for each index of 4 bits
        assert found.weight_bytes == 2 * work.weight_bytes


# Beside others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fold_norms", "fuse_projections", "first_layer", "early_exit"])
def test_default_tables_run_beside_others_or_are_refused(name, family):
    lm = tiny_lm(family)
    try:
        both = apply(lm, {"lut": True, name: True})
    except MinitxError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    assert "TableLinear" in repr(both) and len(both.generate(IDS[:5], 8)) <= 8
    if name == "fuse_projections":  # columns keep their scales, and q only a factor more
        found, alone = both.logits(IDS), with_lut(family, np.float32).logits(IDS)
        np.testing.assert_allclose(found, alone, atol=1e-4 * abs(alone).max())


def test_exact_head_needs_a_head_of_weights():
    with pytest.raises(MinitxError, match="^exact_head needs .* which lut has replaced"):
        apply(tiny_lm(), {"lut": dict(head=True), "exact_head": True})


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(ba=1), "ba is 1; it must be from 2 to 8"),
        (dict(bw=1), "bw is 1; it must be from 2 to 8"),
        (dict(kind="bit-serial", bw=0), "bw is 0; it must be from 1 to 8"),
        (dict(d=0), "d is 0"),
        (dict(g=9), "g is 9"),
        (dict(V=0), "V is 0"),
        (dict(Kc=0), "Kc is 0"),
        (dict(layers=3), "layers is 3; it must be from 0 to 2"),
        (dict(layers=-1), "layers is -1"),
        (dict(drop=1.5), "drop is 1.5"),
        (dict(cache=-1, search=True, drop=1.0), "cache"),
        (dict(stories=0), "stories is 0"),
        (dict(search=True, kind="folded"), "search is for kind=product, not for kind=folded"),
        (dict(ba=8, bw=8, d=2), "would take 8,192.0 MiB and limit is 256"),
        (dict(kind="folded", limit=0.1), "MiB and limit is 0.1"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(MinitxError, match="^lut: ") as error:
        with_lut(**options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("options", [dict(kind="centroid"), dict(search=True)])
def test_stories_need_a_tokenizer(options):
    with pytest.raises(MinitxError, match="^lut .*no tokenizer"):
        apply(LM(tiny_lm().model), {"lut": options})


def test_a_search_that_8_bits_fail():
    with pytest.raises(MinitxError, match="^lut: at 8 and 8 bits the accuracy is 0.5000 and 0.6"):
        two_stages(lambda ba, bw: 0.5, 0.6, 65536)
    with pytest.raises(MinitxError, match="^lut: a table for 2 and 2 bits takes 16 bytes"):
        two_stages(lambda ba, bw: 0.5, 0.5, 15)
