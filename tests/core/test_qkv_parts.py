"""Queries alone, and keys and values alone: ``qkv.q(x)`` and ``qkv.kv(x)`` of every part that can
take the place of the projections of attention."""

import inspect

import numpy as np
import pytest
from same import assert_same
from tiny import tiny_lm

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import QKV
from minitx.precompute.absorb_products import InputQKV
from minitx.precompute.first_layer import InTable
from minitx.precompute.fuse_projections import FusedQKV
from minitx.precompute.remove_weights import InputIsK, InputIsQ, InputIsV
from minitx.precompute.slim_attention import QueriesAndKeys
from minitx.technique import apply, techniques
from minitx.tree import Part

FUSED = {"fuse_projections": True}
SLIM = {"slim_attention": True}
CASES = {  # family, techniques, the part they bring, and whether it is one matrix for several
    "qkv": ("llama", {}, QKV),
    "fused": ("llama", FUSED, FusedQKV),
    "fused gpt2": ("gpt2", FUSED, FusedQKV),
    "fused, quantized": ("llama", FUSED | {"quantize": True}, FusedQKV),
    "fused, low rank": ("llama", FUSED | {"low_rank": {"share": 0.75}}, FusedQKV),
    "fused, ordered": ("llama", FUSED | {"order_products": True}, FusedQKV),
    "fused, product table": ("llama", FUSED | {"lut_product": True}, FusedQKV),
    "slim, rotary": ("gpt_neox", SLIM, QueriesAndKeys),
    "slim, learned positions": ("gpt2", SLIM, QueriesAndKeys),
    "removed q": ("skipless", {"remove_weights": {"matrix": "q"}}, InputIsQ),
    "removed k": ("skipless", {"remove_weights": {"matrix": "k"}}, InputIsK),
    "removed v": ("skipless", {"remove_weights": {"matrix": "v"}}, InputIsV),
    "absorbed qk": ("gpt2", {"absorb_products": {"pairs": "qk"}}, InputQKV),
    "absorbed ov": ("gpt2", {"absorb_products": {"pairs": "ov"}}, InputQKV),
    "absorbed both": ("gpt2", {"absorb_products": {"pairs": "both"}}, InputQKV),
}
X = np.random.default_rng(0).normal(size=(5, 16))  # (T, D)


def qkv_part(case: str) -> Part:
    """The projections of the last block."""
    family, wanted, kind = CASES[case]
    qkv = apply(tiny_lm(family, np.float64), wanted).model.stack.blocks[-1].attn.qkv
    assert type(qkv) is kind
    return qkv


def multiply_adds(qkv: Part, call) -> int:
    with ledger.counting(qkv) as counts:
        call(X)
    return counts.total().multiply_adds


each = pytest.mark.parametrize("case", CASES)


def test_every_part_with_keys_and_values_alone_is_tested():
    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert techniques()  # which imports them all
    shipped = {kind for kind in below(Part) if kind.__module__.startswith("minitx.")}
    of_x = {k for k in shipped if hasattr(k, "kv") and len(inspect.signature(k.kv).parameters) == 2}
    assert of_x == {InTable} | {kind for _, _, kind in CASES.values()}  # InTable: see below


@each
def test_queries_alone_and_keys_and_values_alone(case):
    qkv = qkv_part(case)
    q, k, v = qkv(X)
    for found, expected in zip((qkv.q(X), *qkv.kv(X)), (q, k, v), strict=True):
        assert found.shape == expected.shape
        assert_same(found, expected, tolerance=1e-12, atol=1e-12)


@each
def test_nothing_else_is_computed(case):
    """Queries alone and the rest alone take together what the whole takes; where a part computes
    all columns and selects (quantize) or shares a step (low_rank), each takes at most that."""
    qkv = qkv_part(case)
    q, kv, whole = (multiply_adds(qkv, call) for call in (qkv.q, qkv.kv, qkv))
    if case == "fused, quantized":
        assert q == kv == whole > 0
    elif case in ("fused, low rank", "fused, product table"):
        assert 0 < q < whole and 0 < kv < whole and q + kv > whole
    else:
        assert q + kv == whole


def test_queries_in_the_stream_are_the_stream():
    assert qkv_part("removed q").q(X) is X


def test_queries_in_a_table_cannot_be_called():
    attn = apply(tiny_lm(), {"first_layer": True}).model.stack.blocks[0].attn
    assert type(attn.qkv) is InTable
    for call in (attn, attn.attend_from, attn.backfill):
        with pytest.raises(MinitxError, match="leave first_layer out"):
            call(X, None)
