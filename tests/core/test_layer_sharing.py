"""Layer sharing: the same block in several places of the stack, as in ALBERT and Universal
Transformers. Parts are stateless and each place has its own state, so this works without further
code; these tests hold the core to that.
"""

from dataclasses import replace

import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, TOKENIZER, in_chunks, tiny_model

from minitx.errors import MinitxError
from minitx.ledger import Entry, counting
from minitx.lm import LM
from minitx.model import Linear, Stack
from minitx.state import State
from minitx.technique import swap, wrap
from minitx.tree import Part, map_weights, nbytes, part

IDS = np.random.default_rng(3).integers(0, 258, 40)
ORDERS = {"0 and 2 shared": (0, 1, 0), "all shared": (0, 0, 0)}  # which block stands in each place

family = pytest.mark.parametrize("family", FAMILIES)
each_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


def stacked(order, family="llama", copies=False) -> LM:
    """A model whose blocks are those of a dense one in this order; or copies of them."""
    model = tiny_model(family, dtype=np.float64)
    blocks = tuple(model.stack.blocks[which] for which in order)
    if copies:
        blocks = tuple(map_weights(block, np.copy) for block in blocks)
    config = replace(model.config, layers=len(order))
    return LM(replace(model, stack=Stack(blocks), config=config), TOKENIZER)


def places_of_first(order) -> list[int]:
    return [place for place, which in enumerate(order) if which == 0]


@family
@each_order
def test_shared_blocks_equal_copied_blocks(family, order):
    shared, copied = stacked(order, family), stacked(order, family, copies=True)
    blocks = shared.model.stack.blocks
    assert blocks[0] is blocks[2] and nbytes(shared) < nbytes(copied)
    assert_same(shared.logits(IDS), copied.logits(IDS))
    assert (shared.logits(IDS) != stacked((0, 1), family).logits(IDS)).any(), "2 layers, not 3"
    for sizes in ((7, 20, 13), (1,) * 40):
        found = in_chunks(shared, IDS, sizes)
        assert_same(found, in_chunks(copied, IDS, sizes))
        assert_same(found, shared.logits(IDS), atol=1e-10 * abs(found).max())
    prompts = [IDS[:4].tolist(), IDS[5:16].tolist()]
    assert shared.generate(prompts, 20) == [copied.generate(prompt, 20) for prompt in prompts]


@family
@each_order
def test_the_ledger_counts_each_place_by_its_own_path(family, order):
    shared, copied = stacked(order, family), stacked(order, family, copies=True)
    ledgers = []
    for lm in (shared, copied):
        with counting(lm) as counts:
            lm.generate(IDS[:5], 10)
        ledgers.append(counts)
    first, second = ledgers
    assert first.entries == second.entries, "counts differ from those of copied blocks"
    totals = [first.total(f"model.stack.blocks.{place}") for place in places_of_first(order)]
    assert totals[0] != Entry() and all(total == totals[0] for total in totals)
    for inner in ("attn.qkv.k", "attn.out", "ffn.down"):
        counted = [first.entries[f"model.stack.blocks.{i}.{inner}"] for i in places_of_first(order)]
        assert len(set(map(str, counted))) == 1, f"{inner} is counted unevenly"


@part
class Labelled(Part):
    """Calls the part; notes the index it was made with and that of the layer it runs in."""

    inner: Part
    index: int
    calls: list

    def __call__(self, x, layer):
        self.calls.append((self.index, layer.index))
        return self.inner(x, layer)


@family
@each_order
@pytest.mark.parametrize("slot", ["attn", "ffn", "block"])
def test_wrap_makes_a_part_for_each_place_with_its_index(family, order, slot):
    lm, calls = stacked(order, family), []
    wrapped = wrap(lm, slot, lambda node, index: Labelled(node, index, calls))
    assert_same(wrapped.logits(IDS), lm.logits(IDS))
    assert calls == [(0, 0), (1, 1), (2, 2)]
    assert lm.model.stack.blocks[0] is lm.model.stack.blocks[2], "the model itself was changed"
    for place in (0, 2):  # what is inside stays shared
        block = wrapped.model.stack.blocks[place]
        inside = block.inner if slot == "block" else getattr(block, slot).inner
        original = lm.model.stack.blocks[0]
        assert inside is (original if slot == "block" else getattr(original, slot))


@each_order
def test_the_tree_names_the_first_place_of_a_shared_block(order):
    text = repr(stacked(order).model.stack)
    assert text.endswith("2: Block, the same as blocks.0")
    assert "the same as" not in repr(stacked(order, copies=True))


@each_order
def test_changed_weights_stay_shared(order):
    lm = stacked(order)
    blocks = map_weights(lm.model, lambda w: w * 2).stack.blocks
    assert blocks[0] is blocks[2] and blocks[0] is not lm.model.stack.blocks[0]


@each_order
def test_swap_makes_a_shared_part_once(order):
    made = []

    def change(linear):
        made.append(linear)
        return replace(linear, w=linear.w * 2)

    lm = swap(stacked(order), Linear, change)
    assert len(made) == len(set(map(id, made))) == 7 * len(set(order))  # q, k, v, o, gate, up, down
    assert lm.model.stack.blocks[0] is lm.model.stack.blocks[2]


@family
@each_order
def test_each_place_keeps_cache_rows_of_its_own(family, order):
    lm = stacked(order, family)
    state = lm.model.new_state()
    lm.model(IDS[:9], state)
    assert [layer.count for layer in state.layers] == [9, 9, 9]
    keys = [layer.keys[..., :9, :] for layer in state.layers]
    assert not np.may_share_memory(keys[0], keys[2])
    assert (keys[0] != keys[2]).any(), "two places have stored the same keys"


@family
@each_order
def test_rewound_and_forked_states_go_on_as_before(family, order):
    lm = stacked(order, family)
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    expected = lm.model(IDS[20:25], state)
    for again in (state.fork(20), state):
        again.rewind(20)
        lm.model((IDS[20:23] + 1) % 258, again)
        again.rewind(20)
        assert_same(lm.model(IDS[20:25], again), expected)
    state.rewind(0)
    close = dict(atol=1e-10 * abs(expected).max())
    np.testing.assert_allclose(lm.model(IDS[:25], state)[20:], expected, **close)


def test_the_state_has_a_layer_for_each_place():
    lm = stacked((0, 1, 0))
    lm = replace(lm, model=replace(lm.model, config=replace(lm.model.config, layers=1)))
    assert len(lm.model.new_state().layers) == 3, "taken from the config, not from the blocks"
    lm.logits(IDS)


def test_more_blocks_than_layers_are_refused():
    """A state that was made for another model must not be filled in part without a word."""
    lm = stacked((0, 1, 0))
    with pytest.raises(MinitxError, match="2 blocks .* has 3"):
        lm.model(IDS, State(2, lm.model.config.context))
