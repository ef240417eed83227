"""sparse_memory in whole models: what it counts, refuses and prints; that it is right: see
test_sparse_memory."""

import numpy as np
import pytest
from qkv import IDS
from tiny import tiny_lm

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.skip.sparse_memory.slots import Slots
from minitx.technique import apply, find

# Counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("N", [20, None])
def test_a_decoded_token_costs_what_the_card_says(family, N):
    lm = apply(tiny_lm(family), {"sparse_memory": {"K": 5, "N": N}})
    c, state = lm.model.config, lm.model.new_state()
    H, K, d = c.heads, c.kv_heads, c.head_width
    lm.model(IDS[:29], state)
    with counting(lm) as counts:
        lm.model(IDS[29:30], state)
    path, n, r = "model.stack.blocks.0.attn.attend", N or 30, 5
    assert counts.entries[path + ".selector"].multiply_adds == H * n * d
    assert counts.entries[path + ".selector"].cache_bytes == K * n * d * 4
    assert counts.entries[path].multiply_adds == H * 2 * r * d
    assert counts.entries[path].cache_bytes == H * 2 * r * d * 4
    expected = {"keys seen": c.layers * H * 30, "keys kept": c.layers * H * r}
    assert counts.events == expected | ({"keys evicted": c.layers * K} if N else {})


@pytest.mark.parametrize("b, width", [(3, 1), (9, 2)])
@pytest.mark.parametrize("N", [20, None])
def test_hashing_costs_what_the_card_says(b, width, N):
    options = {"K": 5, "N": N, "index": "lsh", "b": b, "L": 6}
    lm = apply(tiny_lm(), {"sparse_memory": options})
    c, state = lm.model.config, lm.model.new_state()
    H, K, d = c.heads, c.kv_heads, c.head_width
    lm.model(IDS[:29], state)
    with counting(lm) as counts:
        lm.model(IDS[29:30], state)
    path, n = "model.stack.blocks.{}.attn.attend", N or 30
    index = counts.entries[path.format(0) + ".selector.index"]
    assert index.multiply_adds == H * 6 * b * d + K * 6 * b * (d + 1)
    assert index.cache_bytes == K * n * 6 * width
    assert index.weight_bytes == 6 * b * (d + d + 1) * 4
    scored = [counts.entries[path.format(i) + ".selector"] for i in range(c.layers)]
    assert sum(e.multiply_adds for e in scored) == counts.events["candidates"] * d
    assert c.layers * H * 5 <= counts.events["candidates"] < c.layers * H * n


def test_trees_say_how_many_points_were_asked_for():
    lm = apply(tiny_lm(), {"sparse_memory": {"K": 4, "index": "kd-tree", "checks": 7}})
    state = lm.model.new_state()
    lm.model(IDS[:29], state)
    with counting(lm) as counts:
        lm.model(IDS[29:30], state)
    c = lm.model.config
    assert 7 * c.heads * c.layers <= counts.events["points checked"] < 10 * c.heads * c.layers


def test_a_prompt_saves_nothing():
    lm = apply(tiny_lm(), {"sparse_memory": {"K": 4}})
    c = lm.model.config
    with counting(lm) as counts:
        lm.model(IDS[:30], lm.model.new_state())
    path, square = "model.stack.blocks.0.attn.attend", c.heads * 30 * 30 * c.head_width
    assert counts.entries[path + ".selector"].multiply_adds == square
    assert counts.entries[path].multiply_adds == 2 * square


# A whole model -----------------------------------------------------------------------------------

OPTIONS = [
    {"K": 3},
    {"K": 3, "N": 10},
    {"K": 3, "N": 10, "index": "lsh", "b": 4, "L": 3},
    {"K": 3, "index": "lsh", "b": 12, "L": 3},
    {"K": 3, "N": 10, "index": "lsh", "b": 4, "L": 3, "augment": False},
    {"K": 3, "N": 10, "index": "kd-tree", "checks": 5, "trees": 2},
    {"K": 3, "index": "kd-tree", "checks": 5, "trees": 1},
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_model_runs_alike_in_pieces_and_after_rewinding(family, options):
    lm = apply(tiny_lm(family, dtype=np.float64), {"sparse_memory": options})
    whole = lm.logits(IDS)
    state = lm.model.new_state()
    found = [lm.model(IDS[a:b], state) for a, b in ((0, 7), (7, 8), (8, 30), (30, 40))]
    np.testing.assert_allclose(np.concatenate(found), whole, atol=1e-10 * abs(whole).max())
    once = [lm.model(IDS[t : t + 1], state) for t in range(8)]
    state.rewind(40)
    again = [lm.model(IDS[t : t + 1], state) for t in range(8)]
    np.testing.assert_array_equal(again, once)
    state.rewind(23)
    found = lm.model(IDS[23:40], state)
    np.testing.assert_allclose(found, whole[23:], atol=1e-10 * abs(whole).max())
    assert abs(whole - tiny_lm(family, dtype=np.float64).logits(IDS)).max() > 1e-3  # it did skip


@pytest.mark.parametrize("options", OPTIONS)
def test_it_stays_float32(options):
    lm = apply(tiny_lm(), {"sparse_memory": options})
    assert lm.logits(IDS).dtype == np.float32
    state = lm.model.new_state()
    lm.model(IDS, state)
    for layer in state.layers:
        for kept in layer.memory.kept.values():
            assert not isinstance(kept, Slots) or kept.rows[0].dtype == np.float32


def test_a_batch_generates_alike_together_and_alone():
    prompts = [IDS[:12].tolist(), IDS[20:23].tolist(), IDS[5:6].tolist()]
    for options in ({"K": 3}, {"K": 3, "index": "lsh", "b": 4, "L": 3}):
        lm = apply(tiny_lm(dtype=np.float64), {"sparse_memory": options})
        assert lm.generate(prompts, 20) == [lm.generate(prompt, 20) for prompt in prompts]
    lm = apply(tiny_lm(dtype=np.float64), {"sparse_memory": {"K": 3, "N": 10}})
    even = [IDS[:9].tolist(), IDS[9:18].tolist()]
    assert lm.generate(even, 20) == [lm.generate(prompt, 20) for prompt in even]
    for options in ({"N": 10}, {"index": "kd-tree"}):  # what cannot share a batch is run in turns
        lm = apply(tiny_lm(dtype=np.float64), {"sparse_memory": options})
        assert lm.generate(prompts, 9) == [lm.generate(prompt, 9) for prompt in prompts]
        padded = lm.model.new_state(np.array([0, 3]))
        with pytest.raises(MinitxError, match="^sparse_memory cannot .* run them one by one") as no:
            lm.model(np.array([IDS[:9], IDS[9:18]]), padded)
        assert "\n" not in str(no.value)


@pytest.mark.parametrize("other", ["first_layer", "fold_norms", "fuse_projections"])
@pytest.mark.parametrize("index", ["lsh", "kd-tree"])
def test_keys_whose_weights_stand_elsewhere(other, index):
    """Folded and fused ones have the same bound, so the same keys are found."""
    lm, options = tiny_lm(dtype=np.float64), {"K": 3, "N": 10, "index": index}
    alone = apply(lm, {"sparse_memory": options})
    both = apply(lm, {"sparse_memory": options, other: True})
    found, before = (m.model.stack.blocks[1].attn.attend.selector.index for m in (both, alone))
    np.testing.assert_allclose(found.R, before.R, rtol=1e-9)
    np.testing.assert_allclose(both.logits(IDS), alone.logits(IDS), atol=1e-8)


# Refusals, and what is printed -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"K": 0}, "K=0; a whole number of at least 1"),
        ({"N": 0}, "N=0"),
        ({"b": 0}, "b=0"),
        ({"b": 17}, "b=17; at most 16 bits"),
        ({"L": 0}, "L=0"),
        ({"trees": 0}, "trees=0"),
        ({"checks": 0}, "checks=0"),
        ({"seed": -1}, "seed=-1; a whole number of at least 0"),
        ({"delta": -0.1}, "delta=-0.1; a share of attention from 0 to 1"),
        ({"delta": 1.5}, "delta=1.5"),
    ],
)
def test_settings_that_are_refused(options, words):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"sparse_memory": options})
    text = str(refused.value)
    assert text.startswith("sparse_memory has ") and words in text and "\n" not in text


def test_the_tree_shows_the_settings_and_the_card_what_was_chosen_here():
    lm = apply(tiny_lm(), {"sparse_memory": {"N": 10, "index": "lsh"}})
    drawn = repr(lm.model)
    assert "choose: NearestKeys(K=16, N=10, delta=0.005" in drawn
    assert "index: LSH(" in drawn and "b=8, L=40" in drawn
    sections = find("sparse_memory").card.sections
    assert "chosen here" in sections["Paper"] and "1600" not in str(sections)
