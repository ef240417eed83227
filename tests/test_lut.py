"""Table lookup as a technique: what is replaced, searched, learned, counted and refused."""

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.errors import MinitxError
from minitx.lab import lut_search
from minitx.lab.costs import lut as costs
from minitx.ledger import Entry, counting
from minitx.lm import LM
from minitx.matrices.bit_search import two_stages
from minitx.matrices.bit_serial import BitSerialLinear
from minitx.matrices.centroid_table import CentroidLinear
from minitx.matrices.product_table import FoldedLinear, IntegerLinear, ProductTable, TableLinear
from minitx.model import Linear
from minitx.precompute.lut import TableHead, chosen, find_bits, matrix, with_tables
from minitx.technique import apply, kinds
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
