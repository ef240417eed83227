"""Skipless models without Q and P: against the dense model and a literal twin, and refusals."""

from dataclasses import replace
from itertools import product

import literal_remove_weights as literal
import numpy as np
import pytest
from tiny import FAMILIES, error, tiny_lm

from minitx.build import random_model
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import QKV, Attention, Block, Linear
from minitx.precompute.remove_weights import InFFN, StreamIsK, StreamIsQ, StreamIsV, without
from minitx.skipless import SkiplessBlock
from minitx.technique import apply, swap
from minitx.tree import map_weights, walk, weights

IDS = np.random.default_rng(0).integers(0, 19, 30)
SIZES = dict(vocab_size=19, width=12, layers=3, heads=4, head_width=3, hidden=20, context=40)
ALL = dict(skipless=True, qkv_bias=True, out_bias=True, ffn_bias=True)
KINDS = {
    "gated-gqa": replace(FAMILIES["llama"], **SIZES, **ALL, kv_heads=2, rope_width=2),
    "plain-mha": replace(
        FAMILIES["gpt_neox"],
        **SIZES | ALL | dict(parallel=False, kv_heads=4, rope_width=2, activation="relu"),
    ),
    "learned-tied": replace(FAMILIES["gpt2"], **SIZES, **ALL, kv_heads=4),
    "no-biases": replace(FAMILIES["llama"], **SIZES, skipless=True, kv_heads=1, rope_width=2),
}
PARALLEL = {
    "parallel-gated": replace(KINDS["gated-gqa"], parallel=True),
    "parallel-plain": replace(KINDS["plain-mha"], parallel=True),
    "parallel-learned": replace(KINDS["learned-tied"], parallel=True),
    "parallel-no-biases": replace(KINDS["no-biases"], parallel=True),
}


def made(kind, dtype=np.float64, seed=3):
    """Random weights, with biases that are not 0."""
    rng = np.random.default_rng(seed)
    config = replace((KINDS | PARALLEL)[kind], bos=None, eos=())

    def change(w):
        noise = 0.3 if w.ndim == 1 else 0.5 * len(w) ** -0.5
        return (w + rng.normal(0, noise, w.shape)).astype(dtype)

    return LM(map_weights(random_model(config, seed, dtype), change))


def matrices(lm):
    return sum(w.size for w in weights(lm.model).values() if w.ndim == 2)


def fits(kind, matrix):
    c = (KINDS | PARALLEL)[kind]
    return matrix == "q" or c.kv_heads == c.heads


CASES = [(kind, m) for kind in KINDS | PARALLEL for m in "qkv" if fits(kind, m)]


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind, matrix", CASES)
def test_the_function_is_the_same(kind, matrix, dtype, tolerance):
    lm = made(kind, np.dtype(dtype))
    new = apply(lm, {"remove_weights": {"matrix": matrix}})
    assert new.logits(IDS).dtype == dtype
    assert error(new.logits(IDS), lm.logits(IDS)) <= tolerance
    state = new.model.new_state()  # and token by token
    found = np.concatenate([new.model(IDS[t : t + 1], state) for t in range(30)])
    assert error(found, lm.logits(IDS)) <= tolerance


# Biases ------------------------------------------------------------------------------------------


def some_biases(lm, has):
    """The model with the biases for which ``has(block number, name)`` is true; the others None."""
    blocks = []
    for number, block in enumerate(lm.model.stack.blocks):

        def some(**linears):
            return {
                name: linear if has(number, name) else replace(linear, b=None)  # noqa: B023
                for name, linear in linears.items()
            }

        attn, ffn = block.attn, block.ffn
        qkv = replace(attn.qkv, **some(q=attn.qkv.q, k=attn.qkv.k, v=attn.qkv.v))
        maps = {n: node for n, node in vars(ffn.expand).items() if type(node) is Linear}
        expand = replace(ffn.expand, **some(**maps))
        attn = replace(attn, qkv=qkv, **some(out=attn.out))
        blocks.append(
            replace(block, attn=attn, ffn=replace(ffn, expand=expand, **some(down=ffn.down)))
        )
    stack = replace(lm.model.stack, blocks=tuple(blocks))
    return replace(lm, model=replace(lm.model, stack=stack))


NAMES = ("q", "k", "v", "out", "gate", "up", "down")
WITH_BIASES = [kind for kind in KINDS | PARALLEL if "no-biases" not in kind]


@pytest.mark.parametrize("kind, matrix", [c for c in CASES if c[0] in WITH_BIASES])
def test_remove_weights_mixed_biases_is_exact(kind, matrix):
    """All 2^4 choices of biases for the removed matrix, P, the FFN's first matrices and its last,
    the two projections that stay having one each way; in every block alike, and the other way round
    in every second block, so that a bias meets none in the next block too."""
    lm = made(kind)
    first, second = (name for name in "qkv" if name != matrix)
    for choice in product([False, True], repeat=4):
        chosen = dict(zip((matrix, "out", "up", "down"), choice))
        chosen |= {first: choice[1], second: not choice[1], "gate": not choice[2]}
        for alternate in (False, True):
            dense = some_biases(lm, lambda i, name: chosen[name] ^ (alternate and i % 2))  # noqa: B023
            new = apply(dense, {"remove_weights": {"matrix": matrix}})
            found = error(new.logits(IDS), dense.logits(IDS))
            there = [name for name in NAMES if chosen[name]]
            assert found <= 1e-12, (
                f"with biases of {there}{', the others in block 1' * alternate}: off by {found:.1e}"
            )


@pytest.mark.parametrize("kind", ["plain-mha", "parallel-plain"])
@pytest.mark.parametrize("only", ["q", "k", "v", "out", "up", "down"])
def test_remove_weights_one_bias_makes_biases_only_where_it_is_needed(kind, only):
    """Matrix q is removed. With a = b_q: what reads the stream gets -a W*, what writes it last +a;
    with p = b_P: the FFN's first matrix gets p M, but P stays in parallel blocks."""
    lm = some_biases(made(kind), lambda i, name: name == only)
    new = apply(lm, {"remove_weights": {}}).model.stack.blocks
    readers = {"k", "v", "up"} if "parallel" in kind else {"k", "v"}
    for number, block in enumerate(new):
        expected = {only} - {"q"}
        if only == "q":
            expected |= readers | ({"down"} if number < 2 else set())
        if only == "out" and "parallel" not in kind:
            expected = {"up"}
        maps = dict(k=block.attn.qkv.k, v=block.attn.qkv.v, out=block.attn.out)
        maps |= dict(up=block.ffn.expand.up, down=block.ffn.down)
        found = {name for name, linear in maps.items() if getattr(linear, "b", None) is not None}
        assert found == expected, f"block {number}: expected biases of {expected}, got {found}"


# What is gone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, matrix", CASES)
def test_what_is_gone(kind, matrix):
    """Exactly 2 L D^2 weights and multiply-adds; a parallel block loses one matrix, not two."""
    lm = made(kind)
    new = apply(lm, {"remove_weights": {"matrix": matrix}})
    c = lm.model.config
    gone = c.layers * c.width**2 * (1 if c.parallel else 2)
    untied = c.vocab_size * c.width if c.tied else 0
    assert matrices(lm) - matrices(new) == gone - untied
    work = []
    for model in (lm, new):
        with counting(model) as counts:
            model.logits(IDS)
        work.append(counts.total().multiply_adds)
    assert work[0] - work[1] == len(IDS) * gone
    drawn = repr(new.model)
    assert f"StreamIs{matrix.upper()}(cond=" in drawn
    assert drawn.count("out: InFFN") == (0 if c.parallel else drawn.count("SkiplessBlock"))
    for block in new.model.stack.blocks:
        assert type(block.attn.qkv) in (StreamIsQ, StreamIsK, StreamIsV)
        assert matrix not in vars(block.attn.qkv)


def as_lists(lm):
    """(embedding, blocks, head) as the twin has them."""
    blocks = []
    for block in lm.model.stack.blocks:
        qkv, ffn = block.attn.qkv, block.ffn
        maps = {"q": qkv.q, "k": qkv.k, "v": qkv.v, "p": block.attn.out}
        maps |= {"m": ffn.expand.up, "o": ffn.down}
        maps |= {"gate": ffn.expand.gate} if hasattr(ffn.expand, "gate") else {}
        blocks.append({f"w_{n}": x.w.tolist() for n, x in maps.items()})
        blocks[-1] |= {
            f"b_{n}": [0.0] * x.w.shape[1] if x.b is None else x.b.tolist() for n, x in maps.items()
        }
    return lm.model.embed.w.tolist(), blocks, lm.model.head.w.tolist()


@pytest.mark.parametrize("kind, matrix", [c for c in CASES if c[0] in ("gated-gqa", "plain-mha")])
def test_against_the_literal_twin(kind, matrix):
    lm, ids = made(kind), IDS[:7].tolist()
    new = apply(lm, {"remove_weights": {"matrix": matrix}})
    c = lm.model.config
    sizes = c.heads, c.kv_heads, c.rope_width, c.rope_base
    embedding, blocks, head = as_lists(lm)
    dense = literal.forward(embedding, blocks, head, ids, *sizes)
    np.testing.assert_allclose(dense, lm.logits(ids), atol=1e-12)  # the model itself, too
    embedding, blocks = literal.remove(embedding, blocks, matrix)
    np.testing.assert_allclose(new.model.embed.w, embedding, atol=1e-11)
    for block, theirs in zip(new.model.stack.blocks, blocks):
        for name, linear in vars(block.attn.qkv).items():
            if name != "cond":
                np.testing.assert_allclose(linear.w, theirs[f"w_{name}"], atol=1e-10)
                np.testing.assert_allclose(linear.b, theirs[f"b_{name}"], atol=1e-10)
        for linear, name in ((block.ffn.expand.up, "m"), (block.ffn.down, "o")):
            np.testing.assert_allclose(linear.w, theirs[f"w_{name}"], atol=1e-10)
            np.testing.assert_allclose(linear.b, theirs[f"b_{name}"], atol=1e-10)
    found = literal.forward(embedding, blocks, head, ids, *sizes)
    np.testing.assert_allclose(found, new.logits(ids), atol=1e-11)


def test_a_tied_head_keeps_the_embedding_as_it_was():
    lm = made("learned-tied")
    new = apply(lm, {"remove_weights": {}}).model
    assert new.head is lm.model.head and new.head.w is lm.model.embed.tokens.w
    assert new.embed.tokens.w is not new.head.w


def test_the_last_matrix_stays():
    lm = made("gated-gqa")
    new = apply(lm, {"remove_weights": {}})
    assert new.model.stack.blocks[-1].ffn.down is lm.model.stack.blocks[-1].ffn.down


@pytest.mark.parametrize("kind", PARALLEL)
def test_parallel_blocks_cannot_lose_two(kind):
    """Figure 3 (a) drops P as well: another function, whatever the other matrices are made."""
    new = apply(made(kind), {"remove_weights": {}})
    both = swap(new, Attention, lambda a: replace(a, out=InFFN()))
    assert error(both.logits(IDS), new.logits(IDS)) > 0.1


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_residual_adds_are_refused(family):
    with pytest.raises(MinitxError, match="^remove_weights is for skipless models") as caught:
        apply(tiny_lm(family), {"remove_weights": {}})
    assert "residual adds and norms" in str(caught.value) and "\n" not in str(caught.value)


def test_and_it_would_be_wrong_there():
    """The negative control: merged all the same, with the norms left out on both sides."""
    lm = made("plain-mha")
    dense = lm.logits(IDS)
    assert error(without(lm.model, "q")(IDS), dense) < 1e-12

    def with_adds(model):
        return swap(model, SkiplessBlock, lambda b: Block(b.attn, b.ffn))

    merged = with_adds(without(lm.model, "q"))
    assert error(merged(IDS), with_adds(lm.model)(IDS)) > 0.1


@pytest.mark.parametrize("matrix", ["k", "v"])
def test_shared_keys_and_values_have_no_inverse(matrix):
    with pytest.raises(MinitxError, match=f"needs a square W_{matrix} and this one is 12 x 6"):
        apply(made("gated-gqa"), {"remove_weights": {"matrix": matrix}})


def test_heads_that_do_not_fill_the_width():
    config = replace(KINDS["gated-gqa"], head_width=4, bos=None, eos=())
    with pytest.raises(
        MinitxError, match="needs a square W_q and this one is 12 x 16, .*inverse.$"
    ):
        apply(LM(random_model(config)), {"remove_weights": {}})


@pytest.mark.parametrize("scale", [0.0, 1e-8])
def test_a_matrix_that_cannot_be_inverted_is_refused(scale):
    def spoil(qkv):
        w = qkv.q.w.copy()
        w[:, 0] *= scale
        return replace(qkv, q=Linear(w))

    lm = swap(made("plain-mha"), QKV, spoil)
    with pytest.raises(
        MinitxError, match="remove_weights cannot invert W_q of block 0: .* more than"
    ):
        apply(lm, {"remove_weights": {}})
    assert apply(lm, {"remove_weights": {"matrix": "k"}})  # which is sound


def test_the_condition_number_is_shown():
    new = apply(made("plain-mha"), {"remove_weights": {}})
    found = [node.cond for _, node in walk(new) if type(node) is StreamIsQ]
    expected = [np.linalg.cond(b.attn.qkv.q.w) for b in made("plain-mha").model.stack.blocks]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("other", ["fuse_projections", "fold_norms", "first_layer"])
def test_others_that_do_not_fit_say_so(other):
    with pytest.raises(MinitxError) as caught:
        apply(tiny_lm("skipless"), {"remove_weights": {}, other: {}})
    assert other in str(caught.value) and "\n" not in str(caught.value)
