"""Cross-layer attention: a worked example, a literal version, cache rows, counts, other techniques,
gradients, figures.

The contract tests (test_contract.py) run on models of two layers; here there are six.
"""

from dataclasses import replace

import literal_kv_share as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, TOKENIZER, in_chunks, tiny_model

import minitx
from minitx.calibration import calibration_ids
from minitx.checkpoints.precomputed import Origin, read_precomputed, write_precomputed
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import QKV, Attend, Attention, Block, Cache, NoNorm, NoRope, Stack
from minitx.shared.least_loss import mean_loss
from minitx.skip.kv_share import FollowerAttention, attention_of, shared
from minitx.state import State
from minitx.technique import apply, wrap
from minitx.training.autograd import gradients
from minitx.training.loss import cross_entropy
from minitx.tree import Part, map_weights, nbytes, part, weights

L = 6
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
SETTINGS = [
    dict(first=0, size=None, group=2),
    dict(first=1, size=5, group=3),  # layers 1-3 and 4-5
    dict(first=2, size=4, group=4),
]
family = pytest.mark.parametrize("family", FAMILIES)
each_setting = pytest.mark.parametrize(
    "options", SETTINGS, ids=lambda o: f"{o['size']} in groups of {o['group']}"
)


def tiny_lm(family="llama", dtype=np.float64, layers=L):
    return LM(tiny_model(family, dtype=dtype, layers=layers), TOKENIZER)


def models(family="llama", dtype=np.float64, **options):
    """(dense, sharing), with six layers."""
    lm = tiny_lm(family, dtype)
    return lm, apply(lm, {"kv_share": options})


def leaders_of(lm) -> list[int]:
    """Whose keys and values each layer reads."""
    found = attention_of(lm)
    return [getattr(found[i], "leader", i) for i in range(len(found))]


def close(found, expected, what, tolerance=1e-10):
    assert_same(found, expected, what, atol=tolerance * abs(expected).max())


# Worked example ----------------------------------------------------------------------------------


@part
class Times(Part):
    """Multiplies by a number."""

    by: float

    def __call__(self, x):
        return x * self.by


@part
class Nothing(Part):
    """An FFN that adds 0."""

    def __call__(self, x, layer):
        return np.zeros_like(x)


def one_number_wide(value: float) -> Block:
    """A block of width 1 whose queries are 0, so that it adds the mean of the visible values."""
    qkv = QKV(Times(0.0), Times(1.0), Times(value))
    parts = NoNorm(), qkv, NoRope(), Cache(), Attend(1.0), Times(1.0)
    return Block(Attention(*parts, heads=1, kv_heads=1), Nothing())


def test_two_layers_by_hand():
    # Layer 0: values = x. Layer 1: values = 10 x. All scores are 0, so attention takes means.
    lm = LM(replace(tiny_model(), stack=Stack((one_number_wide(1.0), one_number_wide(10.0)))))
    x = np.array([[2.0], [4.0]])

    def stack(lm):
        state = State(2, 8)
        state.take(2)
        return lm.model.stack(x, state)[:, 0].tolist(), state

    # dense:  x = 2, 4 -> values 2, 4, means 2, 3 -> x = 4, 7
    #         values 40, 70, means 40, 55         -> x = 44, 62
    assert stack(lm)[0] == [44, 62]
    # shared: layer 1 takes the means 2, 3 of layer 0's values again -> x = 6, 10
    found, state = stack(shared(lm, attention_of(lm), 0, 2, 2))
    assert found == [6, 10]
    assert [layer.count for layer in state.layers] == [2, 0], "layer 1 has cached rows of its own"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(first=0, size=None, group=2), [0, 0, 2, 2, 4, 4]),
        (dict(first=0, size=None, group=4), [0, 0, 0, 0, 4, 4]),
        (dict(first=0, size=None, group=9), [0, 0, 0, 0, 0, 0]),
        (dict(first=1, size=5, group=3), [0, 1, 1, 1, 4, 4]),
        (dict(first=3, size=2, group=2), [0, 1, 2, 3, 3, 5]),
        (dict(first=0, size=99, group=2), [0, 0, 2, 2, 4, 4]),
        (dict(first=2, size=1, group=2), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_groups_by_hand(options, expected):
    assert leaders_of(models(**options)[1]) == expected


# Against the literal version ---------------------------------------------------------------------


@family
@each_setting
def test_logits_equal_the_literal_version(family, options):
    dense, lm = models(family, **options)
    size = L if options["size"] is None else options["size"]
    expected = literal.run(dense.model, IDS[:12], options["first"], size, options["group"])
    close(lm.logits(IDS[:12]), expected, "logits differ")
    assert abs(expected - dense.logits(IDS[:12])).max() > 1e-3, "sharing changed nothing"


@family
def test_followers_with_the_leaders_weights_and_input_change_nothing(family):
    """Where the attention and FFN of a leader add nothing, the next layer has the same input; with
    the same W_k and W_v, and the same norm, it has the same keys and values."""

    def change(attn, index):
        first = tiny_lm(family).model.stack.blocks[2].attn
        zero = map_weights(attn.out, lambda w: w * 0) if index == 2 else attn.out
        qkv = replace(attn.qkv, k=first.qkv.k, v=first.qkv.v) if index == 3 else attn.qkv
        return replace(attn, out=zero, qkv=qkv, norm=first.norm if index == 3 else attn.norm)

    lm = wrap(tiny_lm(family), "attn", change)
    lm = wrap(lm, "ffn", lambda ffn, i: Nothing() if i == 2 else ffn)
    close(apply(lm, {"kv_share": dict(first=2, size=2)}).logits(IDS), lm.logits(IDS), "differ")


@family
def test_neutral_is_the_dense_model_itself(family):
    for options in (dict(group=1), dict(size=1)):
        dense, lm = models(family, np.float32, **options)
        assert lm.model is dense.model or repr(lm) == repr(dense)


# Memory ------------------------------------------------------------------------------------------


@family
@each_setting
def test_one_pass_chunks_and_single_tokens_agree(family, options):
    _, lm = models(family, **options)
    whole = lm.logits(IDS)
    close(in_chunks(lm, IDS, (7, 20, *[1] * 13)), whole, "decoding differs from prefill")


@pytest.mark.parametrize("options", SETTINGS[:2])
@pytest.mark.parametrize("back_to", [0, 3, 39])
def test_rewound_and_forked_states_read_their_own_rows(options, back_to):
    _, lm = models(**options)
    state = lm.model.new_state()
    once = in_chunks(lm, IDS, (1,) * 40, state)
    fork = state.fork(back_to)
    lm.model(OTHER[:5], state)  # must not be seen by the fork
    state.rewind(back_to)
    for which, name in ((fork, "forked"), (state, "rewound")):
        again = in_chunks(lm, IDS[back_to:], (1,) * (40 - back_to), which)
        assert_same(again, once[back_to:], f"a {name} state differs")


def test_ragged_batch_row_equals_row_alone():
    _, lm = models(**SETTINGS[1])
    prompts = [IDS[:3].tolist(), OTHER[:9].tolist(), IDS[10:16].tolist()]
    assert lm.generate(prompts, 8) == [lm.generate(prompt, 8) for prompt in prompts]


# Cost --------------------------------------------------------------------------------------------


@family
@each_setting
def test_counted_cost_equals_the_formula_on_the_card(family, options):
    dense, lm = models(family, np.float32, **options)
    c = dense.model.config
    followers = sum(leader != i for i, leader in enumerate(leaders_of(lm)))
    states = [one.model.new_state() for one in (dense, lm)]
    for one, state in zip((dense, lm), states):
        one.model(IDS[:9], state)
    with counting(dense) as before:
        dense.model(IDS[9:10], states[0])
    with counting(lm) as after:
        lm.model(IDS[9:10], states[1])
    saved = before.total().multiply_adds - after.total().multiply_adds
    assert saved == followers * 2 * c.width * c.kv_heads * c.head_width
    assert after.total().cache_bytes == before.total().cache_bytes, "attention reads as many rows"
    assert after.events == {"key/value projections skipped": followers}
    cached = [state.cache_bytes for state in states]
    assert cached[0] - cached[1] == followers * 10 * 2 * c.kv_heads * c.head_width * 4
    gone = followers * nbytes(QKV(Times(1.0), *part_of_kv(dense)))
    assert nbytes(dense) - nbytes(lm) == gone, "followers hold W_k or W_v"


def part_of_kv(lm):
    qkv = lm.model.stack.blocks[0].attn.qkv
    return qkv.k, qkv.v


# Which layers ------------------------------------------------------------------------------------


def test_the_place_with_the_lowest_calibration_loss_is_chosen():
    lm = tiny_lm()
    texts = calibration_ids("kv_share", lm, 2)
    attns = attention_of(lm)
    losses = [mean_loss(shared(lm, attns, first, 2, 2), texts) for first in range(L - 1)]
    best = int(np.argmin(losses))
    found = leaders_of(apply(lm, {"kv_share": dict(size=2, stories=2)}))
    assert found == [best if i == best + 1 else i for i in range(L)], losses


def test_random_places_are_drawn_by_seed():
    places = {str(leaders_of(models(size=2, choose="random", seed=s)[1])) for s in range(40)}
    assert len(places) == L - 1
    again = [models(size=2, choose="random", seed=3)[1] for _ in range(2)]
    assert repr(again[0]) == repr(again[1])


# Refusals and other techniques -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(first=3, size=4), "first is 3; expected at most 2, since 4 of the 6 layers begin"),
        (dict(group=0), "kv_share: group must be an integer, at least 1; got 0"),
        (dict(size=0), "kv_share: size must be an integer, at least 1, or None; got 0"),
        (dict(choose="best"), "choose must be one of loss, random; got 'best'"),
    ],
)
def test_refusals_are_one_clear_sentence(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        models(**options)
    assert "\n" not in str(caught.value)


def refusal(family="llama", **flags) -> str:
    with pytest.raises(MinitxError) as caught:
        apply(tiny_lm(family), flags | {"kv_share": dict(first=0, size=None)})
    return str(caught.value)


def test_techniques_that_do_not_fit_are_refused_by_name():
    evicting = dict(heavy=4, recent=4)
    assert refusal(heavy_hitters=evicting) == (
        "kv_share needs a cache row for every token, but heavy_hitters frees some; use one of the "
        "two."
    )
    assert "sink_window frees some" in refusal(sink_window=dict(sinks=2, window=4))
    assert "lazy_tokens frees some" in refusal(lazy_tokens=dict(keep=0.5))
    assert refusal(layer_reorder=dict(order="reverse")) == (
        "layer_reorder changes which layers run, or their order, but with kv_share a layer reads "
        "the cache rows of an earlier one; use one of the two."
    )
    assert "layer_router changes which layers run, or their" in refusal(layer_router={})
    assert "switchable changes which layers run, or their order" in refusal(switchable={})
    assert "where fuse_projections has put a FusedQKV" in refusal(fuse_projections={})
    assert "where layer_skip has put a Dropped" in refusal(layer_skip=dict(drop="3"))
    assert "where first_layer has put a InTable" in refusal("gpt_neox", first_layer={})


def test_unequal_key_heads_are_refused():
    lm = LM(tiny_model("gpt2", layers=2), TOKENIZER)
    attn = lm.model.stack.blocks[1].attn
    fewer = replace(attn, kv_heads=1)
    lm = wrap(lm, "attn", lambda p, i: fewer if i == 1 else p)
    with pytest.raises(MinitxError, match="layer 1 has 1 key heads and the first layer of its gr"):
        apply(lm, {"kv_share": dict(first=0, size=2)})


def test_layers_without_plain_attention_are_not_chosen():
    found = apply(tiny_lm(), {"layer_skip": dict(drop="1,4"), "kv_share": dict(size=2, stories=1)})
    assert [i for i, a in attention_of(found).items() if type(a) is FollowerAttention] == [3]


TOGETHER = {
    "int8 cache": {"quantize_cache": dict(bits=8)},
    "quantize": {"quantize": dict(bits=8)},
    "a3": {"a3": dict(iterations=0.5)},
    "ffn_skip": {"ffn_skip": dict(threshold=0.8, skip=2, warm_up=4, cold_start=1, cold_end=L)},
    "exit, copied": {"early_exit": dict(threshold=0.2, warm_up=3, first=1)},
    "exit, deferred": {"early_exit": dict(threshold=0.2, warm_up=3, first=1, kv_fill="deferred")},
}


@pytest.mark.parametrize("others", TOGETHER.values(), ids=TOGETHER)
def test_chunks_and_rewinding_with_other_techniques(others):
    lm = apply(tiny_lm(), others | {"kv_share": SETTINGS[1]})
    whole = lm.logits(IDS)
    close(in_chunks(lm, IDS, (7, 20, *[1] * 13)), whole, "in chunks, logits differ", 1e-8)
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    expected = lm.model(IDS[20:30], state)
    lm.model(OTHER[:5], state)
    state.rewind(20)
    assert_same(lm.model(IDS[20:30], state), expected)
    assert [i for i in range(L) if state.layers[i].count == 0] == [
        i for i, leader in enumerate(leaders_of(lm)) if leader != i
    ], "a follower has cache rows, or a leader none"


def test_what_a_follower_remembers_beside_the_rows_is_in_its_own_layer():
    lm = apply(tiny_lm(), {"a3": dict(iterations=0.5), "kv_share": SETTINGS[0]})
    state = lm.model.new_state()
    lm.model(IDS[:9], state)
    assert all(len(layer.memory.kept) == 1 for layer in state.layers)


def test_followers_read_the_leaders_quantized_rows():
    """As a dense attention over the dequantized rows of the leader would."""
    lm = apply(tiny_lm(), {"quantize_cache": dict(bits=4), "kv_share": dict(first=2, size=2)})
    leader, follower = (attention_of(lm)[i] for i in (2, 3))
    assert follower.cache is leader.cache.inner and type(follower.cache).__name__ == (
        "QuantizedCache"
    )


def test_a_written_model_shares_as_before(tmp_path):
    _, lm = models(dtype=np.float32, **SETTINGS[1])
    write_precomputed(lm, tmp_path / "out", Origin("tiny", "--kv-share"), None)
    model, _ = read_precomputed(tmp_path / "out")
    assert_same(model(IDS), lm.logits(IDS))


# Training ----------------------------------------------------------------------------------------


@family
def test_gradients_equal_central_differences(family):
    """Those of W_k and W_v come from every layer of the group."""
    model = apply(tiny_lm(family, layers=3), {"kv_share": dict(first=0, size=None, group=3)}).model
    ids, targets, weight = IDS[:6], IDS[1:7], np.ones(6)

    def loss(model):
        return cross_entropy(model(ids), targets, weight) / 6

    _, found, _ = gradients(model, loss)
    rng, step = np.random.default_rng(1), 1e-6
    paths = weights(model)
    assert not any(f"blocks.{i}.attn.{m}.w" in paths for i in (1, 2) for m in ("k", "v"))
    for path in (
        "stack.blocks.0.attn.qkv.k.w",
        "stack.blocks.0.attn.qkv.v.w",
        "stack.blocks.2.attn.q.w",
    ):
        direction = rng.standard_normal(paths[path].shape)

        def moved(sign, path=path, direction=direction):
            target = paths[path]
            return map_weights(model, lambda w: w + sign * step * direction if w is target else w)

        expected = float(loss(moved(1)) - loss(moved(-1))) / (2 * step)
        got = float((found[path] * direction).sum())
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-8), path


# Figures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    lm = minitx.load("stories")
    return lm, calibration_ids("kv_share", lm, 2)


def test_on_stories_late_layers_can_share_and_early_ones_cannot(stories):
    lm, texts = stories
    dense, attns = mean_loss(lm, texts), attention_of(lm)
    costs = [mean_loss(shared(lm, attns, f, 4, 2), texts) - dense for f in range(5)]
    assert leaders_of(apply(lm, {"kv_share": {}})) == [0, 1, 2, 3, 3, 5, 5, 7]
    assert -0.002 < costs[3] < 0.01, "the place that the default chooses"
    assert costs[3] < np.mean(costs) / 20, "hardly better than a random place"
    assert 0.05 < costs[1] < 0.5
    pairs = mean_loss(shared(lm, attns, 0, 8, 2), texts) - dense
    assert 0.6 < pairs < 2, "sharing in all layers, without training for it"
