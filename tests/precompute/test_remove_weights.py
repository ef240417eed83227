"""remove_weights: skipless models without W_q and W_o compute the same, with fewer weights."""

from dataclasses import replace
from itertools import product

import literal_remove_weights as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, error, tiny_lm

from minitx.build import build
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import QKV, Attention, Block, Linear, SkiplessBlock
from minitx.precompute.remove_weights import (
    InputIsK,
    InputIsQ,
    InputIsV,
    MergedIntoFFN,
    merge,
)
from minitx.technique import apply, swap
from minitx.training.skipless_init import initial_model
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

    return LM(map_weights(initial_model(config, seed, dtype), change))


def matrices(lm):
    return sum(w.size for w in weights(lm.model).values() if w.ndim == 2)


def fits(kind, matrix):
    c = (KINDS | PARALLEL)[kind]
    return matrix == "q" or c.kv_heads == c.heads


CASES = [(kind, m) for kind in KINDS | PARALLEL for m in "qkv" if fits(kind, m)]


HAND = {  # weights of both blocks, rows are inputs
    "attn.qkv.q.w": [[2, 0], [0, 4]],
    "attn.qkv.q.b": [1, 0],
    "attn.qkv.k.w": [[2, 2], [4, 4]],
    "attn.qkv.k.b": [5, 5],
    "attn.qkv.v.w": [[2, 0], [0, 4]],
    "attn.qkv.v.b": [0, 7],
    "attn.out.w": [[0, 1], [1, 0]],
    "attn.out.b": [1, 2],
    "ffn.expand.up.w": [[1, 0], [0, 3]],
    "ffn.expand.up.b": [10, 20],
    "ffn.down.w": [[1, 1], [0, 1]],
    "ffn.down.b": [1, 1],
}


def test_remove_weights_worked_example_by_hand():
    """Width 2, two blocks alike. W_q = diag(2, 4) and b_q = [1, 0] are merged into:

    E* = E W_q + b_q = [1, 2] W_q + [1, 0]                             = [3, 8]
    W_k* = W_q^-1 W_k = [2/2, 2/2], [4/4, 4/4]                         = [1, 1], [1, 1]
    b_k* = b_k - b_q W_k* = [5, 5] - [1, 1]                            = [4, 4]
    W_v* = W_q^-1 W_v = I,   b_v* = [0, 7] - [1, 0]                    = [-1, 7]
    W_up* = W_o W_up = [[0, 1], [1, 0]] diag(1, 3)                     = [0, 3], [1, 0]
    b_up* = b_o W_up + b_up = [1, 6] + [10, 20]                        = [11, 26]
    block 0: W_down* = W_down W_q = [[1, 1], [0, 1]] diag(2, 4)        = [2, 4], [0, 4]
             b_down* = b_down W_q + b_q = [2, 4] + [1, 0]              = [3, 4]
    """
    config = Config(
        "gpt_neox", 1, 2, 2, 1, 1, 2, 2, 8, "relu", rope_width=2, skipless=True, qkv_bias=True,
        out_bias=True, ffn_bias=True,
    )  # fmt: skip
    outside = {"embed.w": [[1, 2]], "head.w": [[1], [1]]}

    def get(path, shape):
        name = path.removeprefix("stack.blocks.0.").removeprefix("stack.blocks.1.")
        return np.array((outside | HAND)[name], float).reshape(shape)

    lm = LM(build(config, get))
    new = apply(lm, {"remove_weights": {}})
    first, last = new.model.stack.blocks
    expected = {
        "E*": (new.model.embed.w, [[3, 8]]),
        "W_k*": (first.attn.qkv.k.w, [[1, 1], [1, 1]]),
        "b_k*": (first.attn.qkv.k.b, [4, 4]),
        "W_v*": (first.attn.qkv.v.w, [[1, 0], [0, 1]]),
        "b_v*": (first.attn.qkv.v.b, [-1, 7]),
        "W_up*": (first.ffn.expand.up.w, [[0, 3], [1, 0]]),
        "b_up*": (first.ffn.expand.up.b, [11, 26]),
        "W_down* of block 0": (first.ffn.down.w, [[2, 4], [0, 4]]),
        "b_down* of block 0": (first.ffn.down.b, [3, 4]),
        "W_down of block 1": (last.ffn.down.w, [[1, 1], [0, 1]]),
        "b_down of block 1": (last.ffn.down.b, [1, 1]),
    }
    for name, (found, by_hand) in expected.items():
        assert_same(found, by_hand, name, atol=1e-15)
    check_close(new.logits([0, 0, 0]), lm.logits([0, 0, 0]), 1e-15, "logits")


# Literal version ---------------------------------------------------------------------------------


def as_lists(lm):
    """(embedding, blocks, head) as the literal version has them."""
    blocks = []
    for block in lm.model.stack.blocks:
        qkv, ffn = block.attn.qkv, block.ffn
        maps = {"q": qkv.q, "k": qkv.k, "v": qkv.v, "o": block.attn.out}
        maps |= {"up": ffn.expand.up, "down": ffn.down}
        maps |= {"gate": ffn.expand.gate} if hasattr(ffn.expand, "gate") else {}
        blocks.append({f"w_{n}": x.w.tolist() for n, x in maps.items()})
        blocks[-1] |= {
            f"b_{n}": [0.0] * x.w.shape[1] if x.b is None else x.b.tolist() for n, x in maps.items()
        }
    return lm.model.embed.w.tolist(), blocks, lm.model.head.w.tolist()


@pytest.mark.parametrize("kind, matrix", [c for c in CASES if c[0] in ("gated-gqa", "plain-mha")])
def test_removed_weights_equal_the_literal_version(kind, matrix):
    lm, ids = made(kind), IDS[:7].tolist()
    new = apply(lm, {"remove_weights": {"matrix": matrix}})
    c = lm.model.config
    sizes = c.heads, c.kv_heads, c.rope_width, c.rope_base
    embedding, blocks, head = as_lists(lm)
    dense = literal.forward(embedding, blocks, head, ids, *sizes)
    assert_same(dense, lm.logits(ids), "dense logits", atol=1e-12)
    embedding, blocks = literal.remove(embedding, blocks, matrix)
    assert_same(new.model.embed.w, embedding, atol=1e-11)
    for block, theirs in zip(new.model.stack.blocks, blocks):
        for name, linear in vars(block.attn.qkv).items():
            if name != "condition":
                assert_same(linear.w, theirs[f"w_{name}"], atol=1e-10)
                assert_same(linear.b, theirs[f"b_{name}"], atol=1e-10)
        for linear, name in ((block.ffn.expand.up, "up"), (block.ffn.down, "down")):
            assert_same(linear.w, theirs[f"w_{name}"], atol=1e-10)
            assert_same(linear.b, theirs[f"b_{name}"], atol=1e-10)
    found = literal.forward(embedding, blocks, head, ids, *sizes)
    assert_same(found, new.logits(ids), atol=1e-11)


# Exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind, matrix", CASES)
def test_remove_weights_keeps_the_logits(kind, matrix, dtype, tolerance):
    lm = made(kind, np.dtype(dtype))
    new = apply(lm, {"remove_weights": {"matrix": matrix}})
    assert new.logits(IDS).dtype == dtype
    check_close(new.logits(IDS), lm.logits(IDS), tolerance, "logits of a prompt")
    state = new.model.new_state()  # and token by token
    found = np.concatenate([new.model(IDS[t : t + 1], state) for t in range(30)])
    check_close(found, lm.logits(IDS), tolerance, "logits token by token")


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
def test_remove_weights_with_any_mix_of_biases_is_exact(kind, matrix):
    """All 2^4 choices of biases for the removed matrix, W_o, W_up (W_gate the opposite) and W_down.
    Of the two projections that stay, one has a bias. Once in every block alike, and once inverted
    in every other block, so that a block with biases also precedes one without."""
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
def test_remove_weights_one_bias_creates_biases_only_where_needed(kind, only):
    """Matrix q is removed. b_q: readers of the hidden state get -b_q W*, and W_down of the block
    before gets +b_q. b_o: W_up gets b_o W_up, but in parallel blocks W_o stays."""
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


# Savings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, matrix", CASES)
def test_remove_weights_saves_the_predicted_weights_and_multiply_adds(kind, matrix):
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
    assert f"InputIs{matrix.upper()}(condition=" in drawn
    assert drawn.count("out: MergedIntoFFN") == (0 if c.parallel else drawn.count("SkiplessBlock"))
    for block in new.model.stack.blocks:
        assert type(block.attn.qkv) in (InputIsQ, InputIsK, InputIsV)
        assert matrix not in vars(block.attn.qkv)


def test_remove_weights_tied_head_keeps_the_old_table():
    lm = made("learned-tied")
    new = apply(lm, {"remove_weights": {}}).model
    assert new.head is lm.model.head and new.head.w is lm.model.embed.tokens.w
    assert new.embed.tokens.w is not new.head.w


def test_remove_weights_last_w_down_stays():
    lm = made("gated-gqa")
    new = apply(lm, {"remove_weights": {}})
    assert new.model.stack.blocks[-1].ffn.down is lm.model.stack.blocks[-1].ffn.down


@pytest.mark.parametrize("kind", PARALLEL)
def test_remove_weights_parallel_blocks_cannot_lose_w_o_too(kind):
    """Figure 3 (a) of the paper drops both. That is another function."""
    new = apply(made(kind), {"remove_weights": {}})
    both = swap(new, Attention, lambda a: replace(a, out=MergedIntoFFN()))
    assert error(both.logits(IDS), new.logits(IDS)) > 0.1


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_weights_residual_adds_are_refused(family):
    with pytest.raises(MinitxError, match="^remove_weights is for skipless models") as caught:
        apply(tiny_lm(family), {"remove_weights": {}})
    assert "residual adds and norms" in str(caught.value) and "\n" not in str(caught.value)


def test_remove_weights_with_residual_adds_would_be_wrong():
    """The negative control: merge anyway, with residual adds and without norms on both sides."""
    lm = made("plain-mha")
    dense = lm.logits(IDS)
    check_close(merge(lm.model, "q")(IDS), dense, 1e-12, "logits")

    def with_adds(model):
        return swap(model, SkiplessBlock, lambda b: Block(b.attn, b.ffn))

    merged = with_adds(merge(lm.model, "q"))
    assert error(merged(IDS), with_adds(lm.model)(IDS)) > 0.1


@pytest.mark.parametrize("matrix", ["k", "v"])
def test_remove_weights_shared_keys_or_values_are_refused(matrix):
    with pytest.raises(
        MinitxError, match=f"needs a square W_{matrix}.*this one is 12 x 6; try matrix=q"
    ):
        apply(made("gated-gqa"), {"remove_weights": {"matrix": matrix}})


def test_remove_weights_heads_that_do_not_fill_the_width_are_refused():
    config = replace(KINDS["gated-gqa"], head_width=4, bos=None, eos=())
    with pytest.raises(
        MinitxError, match="needs a square W_q, which has an inverse; this one is 12 x 16.$"
    ):
        apply(LM(initial_model(config)), {"remove_weights": {}})


@pytest.mark.parametrize("scale", [0.0, 1e-8])
def test_remove_weights_singular_matrix_is_refused(scale):
    def spoil(qkv):
        w = qkv.q.w.copy()
        w[:, 0] *= scale
        return replace(qkv, q=Linear(w))

    lm = swap(made("plain-mha"), QKV, spoil)
    with pytest.raises(
        MinitxError, match="remove_weights cannot invert W_q of block 0: .*expected at most"
    ):
        apply(lm, {"remove_weights": {}})
    assert apply(lm, {"remove_weights": {"matrix": "k"}})  # which can be inverted


def test_remove_weights_condition_numbers_are_in_the_tree():
    new = apply(made("plain-mha"), {"remove_weights": {}})
    found = [node.condition for _, node in walk(new) if type(node) is InputIsQ]
    expected = [np.linalg.cond(b.attn.qkv.q.w) for b in made("plain-mha").model.stack.blocks]
    assert_same(found, expected, tolerance=1e-7)


@pytest.mark.parametrize("other", ["fuse_projections", "fold_norms", "first_layer"])
def test_remove_weights_beside_techniques_that_do_not_fit_is_refused(other):
    with pytest.raises(MinitxError) as caught:
        apply(tiny_lm("skipless"), {"remove_weights": {}, other: {}})
    assert other in str(caught.value) and "\n" not in str(caught.value)
