"""Which parts swap and wrap reach, in which order techniques are applied, and heads in unequal
groups."""

from dataclasses import replace

import numpy as np
import pytest
from same import assert_same
from tiny import KINDS, tiny_lm, tiny_model

from minitx import fast, ops
from minitx.decode import Autoregressive
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.memory_layout import to_column_major
from minitx.model import Attend, AttendUnequalGroups, Linear
from minitx.shared.draft_and_verify import Speculative
from minitx.shared.draft_length import FixedLength
from minitx.skip.speculative import DraftModel
from minitx.technique import apply, blocks_of, decides, swap, wrap
from minitx.tree import Part, part, walk

IDS = np.random.default_rng(0).integers(0, 258, 20)


@part
class Tagged(Part):
    inner: Part
    tag: str

    def __call__(self, *args):
        return self.inner(*args)


def tag(name):
    return lambda node, index: Tagged(node, f"{name}{index}")


# swap --------------------------------------------------------------------------------------------


def test_swap_does_not_touch_a_second_model():
    """A draft inside ``decode`` is another model: no inner technique touches it."""
    draft = tiny_model(seed=5)
    lm = replace(tiny_lm(), decode=Speculative(DraftModel(draft), FixedLength(2)))
    for changed in (
        swap(lm, Linear, lambda node: Tagged(node, "swapped")),
        apply(lm, {"first_layer": True}),
        apply(lm, {"elsa": {"p": 0.0}}),
        apply(lm, {"dota": {"keep": 40}}),
    ):
        assert changed.decode is lm.decode
        assert changed.model is not lm.model
    assert apply(lm, {"elsa": {"p": 0.0}}).generate(IDS[:5], 9) == tiny_lm().generate(IDS[:5], 9)


def test_applying_in_two_calls_equals_one_call():
    """Speculation first and an inner technique afterwards, as with a precomputed model."""
    first = apply(tiny_lm(), {"speculative": {"draft": "self"}})
    both = apply(first, {"fold_norms": True, "elsa": {"p": 0.0}})
    assert both.generate(IDS[:5], 20) == tiny_lm().generate(IDS[:5], 20)


# wrap --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", ["attn", "ffn", "block"])
def test_wrap_reaches_every_block_with_its_index(kind, slot):
    lm = tiny_lm(kind)
    wrapped = wrap(lm, slot, tag("w"))
    slots = [b if slot == "block" else getattr(b, slot) for b in blocks_of(wrapped)]
    assert [node.tag for node in slots] == ["w0", "w1"]
    assert_same(wrapped.logits(IDS), lm.logits(IDS))


def test_later_wrap_goes_outside():
    """Also around what an earlier wrap put there: an FFN is not looked for inside."""
    lm = wrap(wrap(tiny_lm(), "ffn", tag("inner")), "ffn", tag("outer"))
    ffn = blocks_of(lm)[1].ffn
    assert (ffn.tag, ffn.inner.tag) == ("outer1", "inner1")


def test_wrap_looks_inside_wrapped_blocks():
    lm = wrap(wrap(tiny_lm(), "block", tag("b")), "attn", tag("a"))
    block = blocks_of(lm)[0]
    assert block.tag == "b0" and block.inner.attn.tag == "a0"


def test_wrap_works_on_first_layer_table_blocks():
    """first_layer's block 0 has no FFN of its own in a parallel model: that slot is not there."""
    lm = wrap(apply(tiny_lm("gpt_neox"), {"first_layer": True}), "ffn", tag("w"))
    assert blocks_of(lm)[1].ffn.tag == "w1" and not hasattr(blocks_of(lm)[0], "ffn")


def test_wrap_without_a_stack_or_a_slot_is_refused():
    with pytest.raises(MinitxError, match="no part of type Stack"):
        wrap(tiny_lm().model.norm, "ffn", tag("w"))
    bare = wrap(tiny_lm(), "block", lambda node, index: node.attn)
    with pytest.raises(MinitxError, match="no part of type FFN"):
        wrap(bare, "ffn", tag("w"))


# Order -------------------------------------------------------------------------------------------


def test_absorb_products_is_applied_after_fold_norms():
    lm = tiny_lm("gpt2", dtype=np.float64)
    expected = lm.logits(IDS)
    found = apply(lm, {"absorb_products": True, "fold_norms": True}).logits(IDS)
    assert abs(found - expected).max() / abs(expected).max() < 1e-13


def test_freeing_rows_is_refused_with_a_technique_that_needs_them():
    @part
    class Frees(Part):
        frees_rows = True
        inner: Part

        def __call__(self, *args):
            return self.inner(*args)

    lm = wrap(tiny_lm(), "block", lambda node, index: Frees(node))
    with pytest.raises(
        MinitxError, match="elsa needs a cache row for every token, but .* frees some"
    ):
        apply(lm, {"elsa": {"p": 0.5}})


def test_decides_is_step_if_any_part_does_then_sequence_then_token():
    @part
    class Steps(Tagged):
        decides = "step"

    @part
    class Sequences(Tagged):
        decides = "sequence"

    lm = tiny_lm()
    assert decides(lm.model) == "token"
    routed = wrap(lm, "ffn", lambda node, i: Sequences(node, ""))
    assert decides(routed.model) == "sequence"
    assert decides(wrap(routed, "attn", lambda node, i: Steps(node, "")).model) == "step"


# Matrices by rows --------------------------------------------------------------------------------


def test_part_declares_its_matrix_layout():
    @part
    class RowReader(Part):
        matrix_layout = "row-major"
        w: np.ndarray

    @part
    class Pair(Part):
        a: Part
        b: Part

    large = np.asfortranarray(np.ones((300, 200), np.float32))
    assert large.size > fast.LARGE
    placed = to_column_major(Pair(Linear(large.copy("C")), RowReader(large)))
    assert placed.a.w.flags.f_contiguous, "a Linear is read by columns"
    assert placed.b.w.flags.c_contiguous, "this part reads rows"
    assert to_column_major(placed) is placed


# Heads in unequal groups -------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, np.array([0, 3])])
def test_unequal_groups_equal_single_heads(start):
    """Five query heads on three key heads, in groups of 1, 3 and 1."""
    from minitx.state import Layer

    rng, key_head = np.random.default_rng(1), np.array([0, 1, 1, 1, 2])
    lead = () if start is None else (2,)
    q, k, v = (rng.standard_normal((*lead, n, 7, 4)) for n in (5, 3, 3))
    layer = Layer(7, start).take(7)
    layer.store(k, v)
    found = AttendUnequalGroups(0.5, key_head)(q, *layer.rows(), layer)
    expected = Attend(0.5)(q, k[..., key_head, :, :], v[..., key_head, :, :], layer)
    assert_same(found, expected, atol=1e-14)


def test_model_with_unequal_groups_equals_model_without_heads():
    """Query head 1 of 2 left out equals zeros in its rows of W_o, and is not computed."""
    lm = tiny_lm("llama", dtype=np.float64)
    d = lm.model.config.head_width

    def cut(attn, index):
        q, out = attn.qkv.q, attn.out
        qkv = replace(attn.qkv, q=replace(q, w=q.w[:, :d]))
        attend = AttendUnequalGroups(attn.attend.scale, np.array([0]))
        return replace(attn, qkv=qkv, attend=attend, out=replace(out, w=out.w[:d]), heads=1)

    def zeroed(attn, index):
        w = attn.out.w.copy()
        w[d:] = 0
        return replace(attn, out=replace(attn.out, w=w))

    one, other = wrap(lm, "attn", cut), wrap(lm, "attn", zeroed)
    assert_same(one.logits(IDS), other.logits(IDS), atol=1e-12)
    with counting(one) as fewer:
        one.logits(IDS)
    with counting(other) as more:
        other.logits(IDS)
    attend = "model.stack.blocks.0.attn.attend"
    assert 2 * fewer.entries[attend].multiply_adds == more.entries[attend].multiply_adds


# The ledger --------------------------------------------------------------------------------------


def test_ledger_counts_every_method_of_a_part():
    """No list of names: a method that a technique invents is work of its part."""

    @part
    class Works(Part):
        inner: Part

        def __call__(self, x, layer):
            return self.something_new(x, layer)

        def something_new(self, x, layer):
            return self.inner(x, layer) + ops.linear(x, np.eye(x.shape[-1], dtype=x.dtype))

    lm = wrap(tiny_lm(), "ffn", lambda node, index: Works(node))
    with counting(lm) as counts:
        lm.logits(IDS)
    assert counts.entries["model.stack.blocks.1.ffn"].multiply_adds == 20 * 16 * 16


def test_ledger_evaluates_nothing_while_closed():
    from minitx import ledger

    def fail():
        raise AssertionError("asked although nobody counts")

    ledger.count(fail, fail, cache_bytes=fail)
    ledger.event("x", fail)
    with counting(tiny_lm()) as counts:
        ledger.count(lambda: 3, weight_bytes=lambda: 4)
        ledger.event("x", np.array([True, False, True]))
        ledger.event("x", lambda: 5)
    assert counts.total().multiply_adds == 3 and counts.total().weight_bytes == 4
    assert counts.events == {"x": 7}


def test_ledger_counts_parts_of_the_decoding_loop():
    lm = replace(tiny_lm(), decode=Speculative(DraftModel(tiny_model(seed=5)), FixedLength(2)))
    with counting(lm) as counts:
        lm.generate(IDS[:5], 5)
    assert any(path.startswith("decode.draft.model.stack") for path in counts.entries)
    assert [type(n) for _, n in walk(tiny_lm().decode)] == [Autoregressive]
