"""absorb_products: W_q W_k^T and W_v W_o as one matrix each compute the same attention."""

from dataclasses import replace
from itertools import product

import literal_absorb_products as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, error, in_chunks, tiny_lm

from minitx.build import random_model
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import QKV, Attend, Attention, Cache, Linear, NoRope, RMSNorm
from minitx.precompute.absorb_products import absorb
from minitx.skip.elsa import SignHash
from minitx.technique import apply, swap
from minitx.tree import map_weights, walk

# Notes that a check can never pay: these models are tiny.
pytestmark = pytest.mark.filterwarnings("ignore::minitx.errors.MinitxWarning")

SIZES = dict(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2, head_width=6, context=40)
PLAIN = dict(bos=None, eos=())
BIASES = dict(qkv_bias=True, out_bias=True)
KINDS = {
    "learned": replace(FAMILIES["gpt2"], **SIZES, **PLAIN),
    "learned-plain": replace(FAMILIES["llama"], **SIZES, **PLAIN, rope_width=0),
    "rotary": replace(FAMILIES["llama"], **SIZES, **PLAIN, **BIASES, rope_width=4),
    "parallel": replace(FAMILIES["gpt_neox"], **SIZES, **PLAIN, rope_width=2),
}
KINDS["one head"] = replace(KINDS["learned"], heads=1, kv_heads=1, head_width=16)
KINDS["one key head"] = replace(KINDS["rotary"], kv_heads=1)
KINDS["full"] = replace(KINDS["learned"], kv_heads=4)
IDS = np.array([7, 2, 7, 0, 10, 3, 7, 5] * 4)
CASES = [
    (kind, pairs)
    for kind, config in KINDS.items()
    for pairs in (("ov",) if config.rope_width else ("qk", "ov", "both"))
]
cases = pytest.mark.parametrize("kind, pairs", CASES)


def make(kind, dtype=np.float64, **changes):
    """A model whose biases are not zero and whose gains are not one."""
    rng = np.random.default_rng(5)
    random = random_model(replace(KINDS[kind], **changes), 3, dtype)

    def change(w):
        return (w + rng.normal(0, 0.3, w.shape) if w.ndim == 1 else 2 * w).astype(dtype)

    return LM(map_weights(random, change))


def by_hand():
    """An attention of width 2 with one head of width 1."""
    columns = np.array([[[1.0], [2.0]], [[3.0], [4.0]], [[5.0], [6.0]]])
    biases = np.array([[10.0], [20.0], [30.0]])
    q, k, v = (Linear(w, b) for w, b in zip(columns, biases))
    out = Linear(np.array([[7.0, 8.0]]), np.array([0.5, 0.25]))
    norm = RMSNorm(np.ones(2), 1e-5)
    return Attention(norm, QKV(q, k, v), NoRope(), Cache(), Attend(1.0), out, 1, 1)


def test_absorb_products_worked_example_by_hand():
    """Width 2, one head of width 1:

    QK = W_q W_k^T = [1, 2]^T [3, 4] = [3, 4], [6, 8]         bias b_q W_k^T = 10 [3, 4] = [30, 40]
    OV = W_v W_o   = [5, 6]^T [7, 8] = [35, 40], [42, 48]
    bias b_o + b_v W_o = [0.5, 0.25] + 30 [7, 8] = [210.5, 240.25];   b_k drops out
    """
    both = absorb(by_hand(), qk=True, ov=True)
    assert_same(both.qkv.q.w, [[3, 4], [6, 8]], "QK")
    assert_same(both.qkv.q.b, [30, 40], "b_q W_k^T")
    assert_same(both.out.w, [[35, 40], [42, 48]], "OV")
    assert_same(both.out.b, [210.5, 240.25], "b_v W_o + b_o")


# Literal version ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "learned-plain", "one head", "full"])
@pytest.mark.parametrize("pairs", ["qk", "ov", "both"])
def test_absorb_products_equals_the_literal_version(kind, pairs):
    dense = make(kind)
    lm = apply(dense, {"absorb_products": {"pairs": pairs}})
    plain, changed = (model.model.stack.blocks[1].attn for model in (dense, lm))
    rows = np.random.default_rng(1).normal(0, 1, (10, 16))
    maps = dict(zip("qkvo", (plain.qkv.q, plain.qkv.k, plain.qkv.v, plain.out)))
    w = {f"W_{name}": m.w for name, m in maps.items()}
    w |= {f"b_{n}": np.zeros(m.w.shape[1]) if m.b is None else m.b for n, m in maps.items()}
    expected = literal.attend(plain.norm(rows), w, plain.heads, plain.kv_heads)
    for attn, model in ((changed, lm.model), (plain, dense.model)):
        layer = model.new_state().layers[1].take(len(rows))
        check_close(attn(rows, layer), expected, 1e-12, "attention output")


# The dense model ---------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("dtype, allowed", [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_absorb_products_keeps_logits_of_prompts_chunks_and_single_tokens(
    kind, pairs, dtype, allowed
):
    dense = make(kind, dtype)
    lm = apply(dense, {"absorb_products": {"pairs": pairs}})
    expected = dense.logits(IDS)
    for sizes in ((32,), (20, 2, 9, 1), (1,) * 32):
        found = in_chunks(lm, IDS, sizes)
        check_close(found, expected, allowed, "logits")
        assert found.dtype == dtype


@pytest.mark.parametrize("kind, pairs", [("learned", "both"), ("rotary", "ov")])
def test_absorb_products_default_is_what_the_positions_allow(kind, pairs):
    possible, asked = (
        apply(make(kind), {"absorb_products": options}) for options in ({}, {"pairs": pairs})
    )
    assert repr(possible) == repr(asked)
    assert_same(possible.logits(IDS), asked.logits(IDS))


@cases
def test_absorb_products_row_of_a_batch_is_the_row_alone(kind, pairs):
    """In rows of equal length, and padded on the left."""
    lm = apply(make(kind), {"absorb_products": {"pairs": pairs}})
    both = lm.logits(np.stack([IDS, IDS[::-1]]))
    check_close(both[1], lm.logits(IDS[::-1]), 1e-12, "second row of the batch")
    prompts = [[7, 2, 7, 0], [3], [10, 9]]
    assert lm.generate(prompts, 8) == [lm.generate(prompt, 8) for prompt in prompts]


@cases
@pytest.mark.parametrize("other", ["first_layer", "merge_embeddings", "exact_head"])
def test_absorb_products_with_other_exact_techniques_is_exact(kind, pairs, other):
    dense = make(kind)
    if other == "merge_embeddings" and KINDS[kind].rope_width:
        pytest.skip("rotary")
    lm = apply(dense, {"absorb_products": {"pairs": pairs}, other: True})
    check_close(in_chunks(lm, IDS, (25, 1, 6)), dense.logits(IDS), 1e-12, "logits")


@cases
def test_absorb_products_backfills_tokens_that_skip_a_layer(kind, pairs):
    exit_early = {"early_exit": {"measure": "softmax", "threshold": 0.0, "first": 1, "warm_up": 8}}
    dense = make(kind)
    expected = apply(dense, exit_early).logits(IDS)
    lm = apply(dense, exit_early | {"absorb_products": {"pairs": pairs}})
    check_close(lm.logits(IDS), expected, 1e-12, "logits")
    assert error(dense.logits(IDS), expected) > 1e-3


# Biases ------------------------------------------------------------------------------------------


def some_biases(lm, names):
    """The model with the biases of these of q, k, v and out; the others None."""

    def change(attn):
        qkv = attn.qkv
        q, k, v, out = (
            linear if name in names else replace(linear, b=None)
            for name, linear in (("q", qkv.q), ("k", qkv.k), ("v", qkv.v), ("out", attn.out))
        )
        return replace(attn, qkv=replace(qkv, q=q, k=k, v=v), out=out)

    return swap(lm, Attention, change)


CHOICES = [[n for n, b in zip(("q", "k", "v", "out"), c) if b] for c in product([0, 1], repeat=4)]


@pytest.mark.parametrize("kind, pairs", [c for c in CASES if c[0] != "learned-plain"])
def test_absorb_products_with_any_mix_of_biases_is_exact(kind, pairs):
    """All 2^4 choices of biases; new biases appear only where there is something to add."""
    lm = make(kind)
    for names in CHOICES:
        dense = some_biases(lm, names)
        new = apply(dense, {"absorb_products": {"pairs": pairs}})
        found = error(in_chunks(new, IDS, (25, 1, 6)), dense.logits(IDS))
        assert found <= 1e-12, f"{pairs} with biases of {names or 'none'}: off by {found:.1e}"
        for block in new.model.stack.blocks:
            q, out = block.attn.qkv.q, block.attn.out
            assert (q.b is not None) == ("q" in names), f"queries with biases of {names or 'none'}"
            wanted = "out" in names or pairs != "qk" and "v" in names
            assert (out.b is not None) == wanted, f"the output with biases of {names or 'none'}"
            if pairs == "qk":
                assert (block.attn.qkv.v.b is not None) == ("v" in names), "values are as they were"
            if pairs == "ov":
                assert (block.attn.qkv.k.b is not None) == ("k" in names), "keys are as they were"


@pytest.mark.parametrize("names", CHOICES, ids=lambda names: "+".join(names) or "none")
def test_absorb_products_with_any_mix_of_biases_by_hand(names):
    """As in the worked example: b_q W_k^T = 10 [3, 4]; b_v W_o = 30 [7, 8]; b_k drops out."""
    new = absorb(some_biases(by_hand(), names), qk=True, ov=True)
    b = new.qkv.q.b
    assert (None if b is None else b.tolist()) == ([30, 40] if "q" in names else None), "b_q W_k^T"
    expected = np.zeros(2)
    if "v" in names:
        expected = expected + [210, 240]
    if "out" in names:
        expected = expected + [0.5, 0.25]
    b = new.out.b
    if not {"v", "out"} & set(names):
        assert b is None, f"expected no bias of the output, got {b}"
    else:
        assert_same(b, expected, "b_v W_o + b_o")


# Costs -------------------------------------------------------------------------------------------


@cases
def test_absorb_products_costs_what_the_card_says(kind, pairs):
    dense = make(kind, np.float32)
    lm = apply(dense, {"absorb_products": {"pairs": pairs}})
    c = dense.model.config
    D, H, K, d, S = 16, c.heads, c.kv_heads, c.head_width, 30
    qk, ov = pairs != "ov", pairs != "qk"
    states = [model.model.new_state() for model in (dense, lm)]
    found = []
    for model, state in zip((dense, lm), states):
        model.model(IDS[: S - 1], state)
        with counting(model) as counts:
            model.model(IDS[S - 1 : S], state)
        found.append(counts.total("model.stack.blocks.0.attn"))
    before, after = found
    assert before.multiply_adds == 2 * D * (H + K) * d + 2 * S * H * d
    scores = H * D * D + S * H * D if qk else D * (H + K) * d + S * H * d
    outputs = H * D * D + S * H * D if ov else D * (H + K) * d + S * H * d
    assert after.multiply_adds == scores + outputs
    products = (H * D if qk else (H + K) * d) + (H * D if ov else (H + K) * d)
    assert after.weight_bytes == 4 * D * products
    kept = D if qk and ov else D + K * d if qk or ov else 2 * K * d
    assert states[1].bytes_per_token == 4 * kept * c.layers
    assert after.cache_bytes == 4 * kept * S  # keys that are values are read once
    assert before.cache_bytes == 4 * 2 * K * d * S


def test_absorb_products_pays_for_one_wide_head():
    """d = D: each product is as large as one of its two factors."""
    dense = make("one head", np.float32)
    costs = []
    for lm in (dense, apply(dense, {"absorb_products": True})):
        with counting(lm) as counts:
            lm.logits(IDS)
        costs.append(counts.total("model.stack.blocks.0.attn"))
    assert costs[1].multiply_adds < costs[0].multiply_adds
    assert costs[1].weight_bytes * 2 == costs[0].weight_bytes
    assert costs[1].cache_bytes * 2 == costs[0].cache_bytes


# With what selects keys --------------------------------------------------------------------------

KEEP_ALL = {
    "elsa": {"threshold": -0.9},
    "a3": {"iterations": None, "threshold": 1e-9, "exp": "tables", "fraction_bits": 8},
    "dota": {"keep": 47},
    "sparse_memory": {"keep": 47, "index": "lsh"},
    "predictive_attention": {"threshold": 1e-30, "share": 1.0},
}


@pytest.mark.parametrize("pairs", ["qk", "both", "ov"])
@pytest.mark.parametrize("name", KEEP_ALL)
def test_selectors_work_with_the_keys_that_are_there(name, pairs):
    """Keys as wide as the hidden state, one head of them or one of values for all: settings that
    keep (nearly) every key give what the dense model gives."""
    dense = tiny_lm("gpt2", dtype=np.float64)
    wanted = {"absorb_products": {"pairs": pairs}, name: KEEP_ALL[name]}
    try:
        lm = apply(dense, wanted)
    except MinitxError as error:
        assert (name, pairs) == ("dota", "ov") and "use one of the two" in str(error)
        return
    expected = dense.logits(IDS)
    for found in (lm.logits(IDS), in_chunks(lm, IDS, (5, *[1] * 27))):
        check_close(found, expected, {"a3": 1e-4}.get(name, 1e-9), name)


def test_elsa_hashes_whole_keys():
    """k = d bits, where d is the width of the keys that arrive: 16, not the 6 of a head."""
    lm = apply(make("learned"), {"absorb_products": {"pairs": "qk"}, "elsa": {"threshold": 0.1}})
    assert np.isfinite(lm.logits(IDS)).all()
    hashes = [node for _, node in walk(lm) if type(node) is SignHash]
    assert [node.bits for node in hashes] == [16, 16]
    projection = hashes[0].projections[0]
    assert np.prod([len(factor.a) for factor in projection.factors]) == 16


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rotary", "parallel"])
@pytest.mark.parametrize("pairs", ["qk", "both"])
def test_absorb_products_of_q_and_k_with_rotary_positions_is_refused(kind, pairs):
    with pytest.raises(MinitxError, match="^absorb_products.*rotary.*use pairs=ov"):
        apply(make(kind), {"absorb_products": {"pairs": pairs}})


@pytest.mark.parametrize("other", ["fuse_projections", "slim_attention"])
def test_absorb_products_beside_techniques_that_need_the_matrices_is_refused(other):
    with pytest.raises(MinitxError, match=f"{other}.*absorb_products.*use one of the two"):
        apply(make("full"), {"absorb_products": True, other: True})


@pytest.mark.parametrize("kind", ["full", "learned"])
def test_absorb_products_after_fold_norms_is_exact(kind):
    """fold_norms goes first, whatever the order of the flags."""
    dense = make(kind)
    pairs = "both" if kind == "learned" else "ov"
    both = apply(dense, {"absorb_products": {"pairs": pairs}, "fold_norms": True})
    check_close(both.logits(IDS), dense.logits(IDS), 1e-12, "logits")
