"""The ledger against counts by hand: multiply-adds from the sizes, bytes from the arrays."""

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx import ledger
from minitx.ledger import Entry, Ledger, counting, group_of
from minitx.tree import weights

IDS = list(range(1, 8))


def by_hand(config, T, S):
    """Multiply-adds of T new tokens of which the last sees S keys, by what they are for. With fewer
    than 64 tokens attention computes the whole T x S rectangle."""
    c = config
    inner, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    ffn = (3 if c.family == "llama" else 2) * c.width * c.hidden
    return {
        "blocks.attn": c.layers * T * (2 * c.width * inner + 2 * c.width * kv + 2 * inner * S),
        "blocks.ffn": c.layers * T * ffn,
        "head": T * c.width * c.vocab_size,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_multiply_adds_follow_from_the_sizes(family):
    lm = tiny_lm(family)
    with counting(lm) as counts:
        state = lm.model.new_state()
        lm.model(IDS, state)
    found = {group: e.multiply_adds for group, e in counts.by_group().items() if e.multiply_adds}
    assert found == by_hand(lm.model.config, 7, 7)
    with counting(lm) as counts:
        lm.model([9], state)
    found = {group: e.multiply_adds for group, e in counts.by_group().items() if e.multiply_adds}
    assert found == by_hand(lm.model.config, 1, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_bytes_count_each_matrix_once_and_embedding_rows(family):
    lm = tiny_lm(family)
    with counting(lm) as counts:
        lm.model([3], lm.model.new_state())
    matrices = sum(
        w.nbytes for p, w in weights(lm.model).items() if w.ndim == 2 and "embed" not in p
    )
    c = lm.model.config
    rows = c.width * 4 * (2 if family == "gpt2" else 1)
    head = c.vocab_size * c.width * 4 if c.tied else 0  # a tied head reads the embedding
    total = counts.total()
    assert total.weight_bytes == matrices + rows + head
    assert total.cache_bytes == c.layers * 2 * c.kv_heads * c.head_width * 4


def test_entries_by_path_sum_over_subtrees():
    lm = tiny_lm()
    with counting(lm) as counts:
        lm.logits(IDS)
    c = lm.model.config
    assert counts.entries["model.stack.blocks.1.ffn.down"].multiply_adds == 7 * c.hidden * c.width
    assert counts.total("model.stack.blocks.1.ffn").multiply_adds == 7 * 3 * c.hidden * c.width
    assert counts.total("model.stack.blocks.1.ff") == Entry()
    assert group_of("model.stack.blocks.1.ffn.down") == "blocks.ffn"
    assert group_of("model.stack.blocks.1.inner.ffn.inner.down") == "blocks.ffn"
    assert group_of("decode.draft.model.stack.blocks.0.attn.qkv.q") == "decode.blocks.attn"
    assert group_of("model.head") == "head" and group_of("") == ""


def test_closed_ledger_leaves_classes_unchanged():
    """Classes are as before, also after an error; outside nothing is counted; ledgers nest."""
    lm = tiny_lm()
    call = type(lm.model).__call__
    with pytest.raises(ZeroDivisionError):
        with counting(lm):
            assert type(lm.model).__call__ is not call
            raise ZeroDivisionError
    assert type(lm.model).__call__ is call and ledger.active is None
    with counting(lm) as outer:
        lm.logits([1])
        with counting(lm) as inner:
            lm.logits(IDS)
        once = outer.total().multiply_adds
        lm.logits([1])
    assert outer.total().multiply_adds == 2 * once
    assert inner.total().multiply_adds > once
    before = outer.total()
    lm.logits(IDS)
    assert outer.total() == before


def test_events_and_extra_counts_are_summed():
    counts = Ledger()
    counts.event("skipped")
    counts.event("skipped", np.int64(2))
    assert counts.events == {"skipped": 3} and counts.events_at == {"": {"skipped": 3}}
    counts.path = "model.stack.blocks.0.ffn"
    counts.add(5, weight_bytes=2)
    counts.add(cache_bytes=1)
    assert counts.by_group() == {"blocks.ffn": Entry(5, 2, 1)}
    counts.event("skipped")
    assert counts.events == {"skipped": 4} and counts.events_at[counts.path] == {"skipped": 1}


def test_work_of_another_part_is_counted_as_its_own():
    lm = tiny_lm()
    head = lm.model.head
    with counting(lm) as counts:
        ledger.count(5, cache_bytes=lambda: 3, part=head)
        ledger.count(2, part=tiny_lm("gpt2").model.head)  # of no model that is counted
    ledger.count(7, part=head)
    assert counts.entries == {"model.head": Entry(5, 0, 3), "": Entry(2)}


def test_ledger_tells_which_part_begins_to_run():
    lm = tiny_lm()
    seen = []
    with counting(lm) as counts:
        counts.entered = seen.append
        lm.model.next_argmax(IDS)
    outer = [
        path for path in seen if path.count(".") < 2 or path.endswith(("blocks.0", "blocks.1"))
    ]
    # A part that calls another method of its own has not begun anew: next_argmax calls hidden.
    assert outer == [
        "model",
        "model.embed",
        "model.stack",
        "model.stack.blocks.0",
        "model.stack.blocks.1",
        "model.norm",
        "model.head",
    ]


def test_integers_are_counted_by_their_bits_within_all_multiply_adds():
    x, w = np.zeros((2, 3), np.float32), np.zeros((3, 5), np.int8)
    with counting(tiny_lm()) as counts:
        ledger.product(x, w)
        ledger.product(x, w, bits=8)
        ledger.count(7, bits=4)
        ledger.count(lambda: 2, cache_bytes=3, bits=8)
        ledger.count(additions=lambda: 11)
    total = counts.total()
    assert total.multiply_adds == 30 + 30 + 7 + 2 and total.integers == {8: 32, 4: 7}
    assert total.floats == 30, "what is not of integers is of floats"
    assert total.additions == 11 and total.weight_bytes == 30 and total.cache_bytes == 3
    both = total + Entry(5, 0, 0, 1, {2: 5})
    assert both == Entry(74, 30, 3, 12, {2: 5, 4: 7, 8: 32})
    assert both.divided(2) == Entry(37, 15, 2, 6, {2: 2, 4: 4, 8: 16})
    assert total.integers == {8: 32, 4: 7}, "adding must not change the terms"


def test_generation_cost_equals_sum_of_steps():
    lm = tiny_lm()
    with counting(lm) as counts:
        new = lm.generate(IDS, 5)
    c = lm.model.config
    one = by_hand(c, 7, 7) | {"head": c.width * c.vocab_size}  # only the last row is asked for
    total = sum(one.values())
    total += sum(sum(by_hand(c, 1, 7 + n).values()) for n in range(1, len(new)))
    assert len(new) == 5 and counts.total().multiply_adds == total
