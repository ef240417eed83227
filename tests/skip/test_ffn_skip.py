"""FFN-SkipLLM: hand-made cases, a loop-written twin, what is counted, and calibration.

The contract tests (test_contract.py) run on models of two layers, where the defaults skip nothing;
so chunks, rewinding and batches are tested again here, on six layers with much skipped.
"""

import numpy as np
import pytest
from literal_ffn_skip import run as twin
from tiny import FAMILIES, TOKENIZER, in_chunks, tiny_model

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import FFN
from minitx.skip import ffn_skip as module
from minitx.skip.ffn_skip import (
    PlannedFFN,
    SimilarityFFN,
    calibrate,
    cosine,
    similarities,
)
from minitx.state import State
from minitx.technique import apply, swap
from minitx.tree import Part, map_weights, part, walk

L = 6
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
ALL = dict(threshold=-2.0, k=L)  # every cosine is similar enough
SOME = dict(threshold=0.8, k=2, warm_up=4, cold_start=1, cold_end=L)
BASELINES = [
    dict(choose="random", rate=0.4, warm_up=4),
    dict(choose="static", rate=0.45, warm_up=4),
]

family = pytest.mark.parametrize("family", FAMILIES)
each_choice = pytest.mark.parametrize("options", [SOME, *BASELINES], ids=lambda o: str(o)[:20])


def tiny_lm(family="llama", dtype=np.float32, layers=L):
    return LM(tiny_model(family, dtype=dtype, layers=layers), TOKENIZER)


def models(family="llama", dtype=np.float64, **options):
    """(dense, skipping) with six layers."""
    lm = tiny_lm(family, dtype)
    return lm, apply(lm, {"ffn_skip": options})


def ran(lm, ids):
    """(T, L) booleans: whose FFN was run, found by what the ledger says of the matrix at its end,
    and the multiply-adds (T,) of each token."""
    state, found, cost = lm.model.new_state(), np.zeros((len(ids), L), bool), []
    for t in range(len(ids)):
        with counting(lm) as counts:
            lm.model(ids[t : t + 1], state)
        for number in range(L):
            below = counts.total(f"model.stack.blocks.{number}.ffn").weight_bytes
            found[t, number] = below > 0
        cost.append(counts.total().multiply_adds)
    return found, np.array(cost)


# Worked examples ---------------------------------------------------------------------------------


def test_the_cosine_is_taken_on_the_stream():
    a = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    f = np.array([[1.0, 0.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    # (3,4).(4,4) = 28 over 5 sqrt(32); (1,0).(0,1) = 0; a vector of zeros; the same direction
    np.testing.assert_allclose(cosine(a, a + f), [28 / 5 / 32**0.5, 0, 0, 1])


@part
class Turns(Part):
    """Adds to (1, 0) what turns it to the cosine that is given for each token."""

    cosines: tuple
    calls: list

    def __call__(self, x, layer):
        self.calls.append(len(x.reshape(-1, 2)))
        tokens = np.round(x[..., 1]).astype(int)  # the second column says which token it is
        wanted = np.array(self.cosines)[tokens]
        length = np.hypot(x[..., 0], x[..., 1])
        angle = np.arctan2(x[..., 1], x[..., 0]) + np.arccos(wanted)
        return length[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1) - x


#         layer 1     2     3     4     5
COSINES = [
    (0.50, 0.95, 0.10, 0.10, 0.99),  # 2 is similar: 3 and 4 are skipped, then 5 is run again
    (0.95, 0.99, 0.99, 0.50, 0.95),  # 1 is similar: 2 and 3 are skipped; 4 is not similar
    (0.89, 0.89, 0.89, 0.89, 0.89),  # never
    (0.90, 0.10, 0.10, 0.91, 0.10),  # 1: 2 and 3 are skipped; 4: 5 is skipped, and nothing after it
]
RAN = [(1, 1, 0, 0, 1), (1, 0, 0, 1, 1), (1, 1, 1, 1, 1), (1, 0, 0, 1, 0)]


@pytest.mark.parametrize("sizes", [(4,), (1, 1, 1, 1), (2, 2), (3, 1)])
def test_the_greedy_rule_by_hand(sizes):
    """Five layers with made-up FFNs, k = 2, threshold 0.9; the tokens' cosines are not changed by
    what is skipped, since every layer gets the same stream."""
    state = State(5, capacity=4)
    calls = [[] for _ in range(5)]
    parts = [
        SimilarityFFN(Turns(column, seen), 0.9 - 1e-9, 2, 0)
        for column, seen in zip(zip(*COSINES), calls)
    ]
    stream = np.stack([np.full(4, 100.0), np.arange(4.0)], -1)  # (4, 2)
    found = np.zeros((4, 5))
    at = 0
    for size in sizes:
        x = stream[at : at + size]
        for number, (ffn, layer) in enumerate(zip(parts, state.layers)):
            found[at : at + size, number] = ffn(x, layer.take(size)).any(-1)
        at += size
    np.testing.assert_array_equal(found, RAN)
    # An FFN that is skipped is not called: it saw as many rows as were run, and no empty call.
    assert [sum(c) for c in calls] == np.sum(RAN, 0).tolist() and 0 not in sum(calls, [])


@pytest.mark.parametrize("cold", [(1, 5), (2, 6), (0, 6), (1, 6), (3, 4)])
def test_when_everything_is_similar_only_the_first_layer_that_is_not_cold_is_run(cold):
    cold_start, cold_end = cold
    _, lm = models(**ALL, warm_up=7, cold_start=cold_start, cold_end=cold_end)
    found, _ = ran(lm, IDS[:12])
    assert found[:7].all()
    np.testing.assert_array_equal(found[7:].sum(1), [cold_start + 1 + L - cold_end] * 5)
    assert found[7:, cold_start].all() and not found[7:, cold_start + 1 : cold_end].any()


# Settings at which it is the dense model ---------------------------------------------------------

NEUTRAL = [
    dict(threshold=1.1, warm_up=0),
    dict(threshold=-2.0, k=0, warm_up=0),
    dict(**ALL, warm_up=0, cold_start=3, cold_end=3),
    dict(**ALL, warm_up=0, cold_start=5, cold_end=1),
    dict(**ALL, warm_up=40),
    dict(choose="random", rate=0.0, warm_up=0),
    dict(choose="static", rate=0.0, warm_up=0),
]


@family
@pytest.mark.parametrize("options", NEUTRAL, ids=str)
def test_neutral_settings_are_the_dense_model_bit_for_bit(family, options):
    dense, lm = models(family, np.float32, **options)
    np.testing.assert_array_equal(lm.logits(IDS), dense.logits(IDS))
    for sizes in ((1,) * 40, (13, 1, 26)):
        np.testing.assert_array_equal(in_chunks(lm, IDS, sizes), in_chunks(dense, IDS, sizes))


@family
def test_skipping_ffns_that_add_nothing_changes_nothing(family):
    dense = tiny_lm(family)
    nothing = swap(dense, FFN, lambda ffn: map_weights(ffn, lambda w: w * 0))
    lm = apply(nothing, {"ffn_skip": dict(**ALL, warm_up=0)})
    np.testing.assert_array_equal(lm.logits(IDS), nothing.logits(IDS))
    with counting(lm) as counts:
        lm.logits(IDS)
    assert counts.events["FFNs skipped"] == 40 * 3  # of layers 1 to 4, the first is measured


def test_defaults_by_the_number_of_layers():
    def layers_and_k(layers):
        lm = apply(tiny_lm(layers=layers), {"ffn_skip": True})
        changed = [
            number
            for number, block in enumerate(lm.model.stack.blocks)
            if type(block.ffn) is SimilarityFFN
        ]
        ffns = [lm.model.stack.blocks[number].ffn for number in changed]
        assert [ffn.k > 0 for ffn in ffns] == [True] * (len(ffns) - 1) + [False]  # none to skip
        return changed, ffns[0].k

    assert layers_and_k(3) == ([1, 2], 1)
    assert layers_and_k(4) == ([1, 2], 1)
    assert layers_and_k(8) == ([2, 3, 4, 5, 6], 2)
    assert layers_and_k(12) == ([2, 3, 4, 5, 6, 7, 8, 9, 10], 3)


# Against the twin --------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("warm_up, cold", [(0, (1, 5)), (5, (0, 6))])
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_it_is_what_the_loops_give(family, warm_up, cold, k, share):
    """Logits, which FFN each token ran, and multiply-adds as the card predicts them."""
    dense = tiny_lm(family, np.float64)
    s0 = float(np.quantile(similarities(dense, [IDS])[slice(*cold)], share))
    options = dict(threshold=s0, k=k, warm_up=warm_up, cold_start=cold[0], cold_end=cold[1])
    lm = apply(dense, {"ffn_skip": options})
    expected, expected_ran, sims = twin(dense.model, IDS, s0, k, warm_up, *cold)
    atol = 1e-10 * abs(expected).max()
    np.testing.assert_allclose(lm.logits(IDS), expected, atol=atol)

    found, cost = ran(lm, IDS)
    np.testing.assert_array_equal(found, expected_ran)
    assert 0 < (~found).sum() < found.size

    c = dense.model.config
    ffn = (3 if c.family == "llama" else 2) * c.width * c.hidden
    _, dense_cost = ran(dense, IDS)
    cosines = (~np.isnan(sims[:, : cold[1] - 1])).sum(1)  # after the last there is none to skip
    predicted = dense_cost - (~expected_ran).sum(1) * ffn + cosines * 3 * c.width
    np.testing.assert_array_equal(cost, predicted)
    with counting(lm) as counts:
        lm.logits(IDS)
    with counting(dense) as before:
        dense.logits(IDS)
    saved = before.total().multiply_adds - counts.total().multiply_adds
    assert saved == (~expected_ran).sum() * ffn - cosines.sum() * 3 * c.width
    assert counts.events["FFNs skipped"] == (~expected_ran).sum()
    assert counts.events["FFNs that may be skipped"] == (40 - warm_up) * (cold[1] - cold[0])


@family
def test_a_higher_threshold_never_skips_earlier(family):
    dense = tiny_lm(family, np.float64)

    def first_skipped(threshold):
        lm = apply(dense, {"ffn_skip": SOME | dict(threshold=float(threshold), cold_start=0)})
        state = dense.model.new_state()  # what went before is the same for every threshold
        dense.model(IDS[:20], state)
        with counting(lm) as counts:
            lm.model(IDS[20:21], state)
        done = [counts.total(f"model.stack.blocks.{n}.ffn").weight_bytes > 0 for n in range(L)]
        return (*done, False).index(False)

    firsts = [first_skipped(s) for s in np.linspace(-1, 1.05, 30)]
    assert firsts == sorted(firsts) and firsts[0] == 1 and firsts[-1] == L
    assert len(set(firsts)) > 2


# Memory ------------------------------------------------------------------------------------------


@family
@each_choice
def test_one_pass_chunks_and_single_tokens_agree(family, options):
    dense, lm = models(family, **options)
    whole = lm.logits(IDS)
    assert abs(whole[:4] - dense.logits(IDS)[:4]).max() < 1e-10
    assert (abs(whole[4:] - dense.logits(IDS)[4:]).max(1) > 1e-6).any()  # something was skipped
    for sizes in ((7, 20, 13), (1,) * 40, (3, 1, 1, 35)):
        np.testing.assert_allclose(in_chunks(lm, IDS, sizes), whole, atol=1e-9)


@family
@each_choice
@pytest.mark.parametrize("back_to", [0, 3, 17, 39])
def test_rewind_and_replay(family, options, back_to):
    _, lm = models(family, **options)
    state = lm.model.new_state()
    once = in_chunks(lm, IDS, (1,) * 40, state)
    lm.model(OTHER[:5], state)
    state.rewind(40)
    state.rewind(back_to)
    lm.model(OTHER[back_to:], state)  # decided otherwise for the same positions
    state.rewind(back_to)
    again = in_chunks(lm, IDS[back_to:], (1,) * (40 - back_to), state)
    np.testing.assert_array_equal(again, once[back_to:])


@each_choice
def test_a_pass_that_was_broken_off_is_forgotten(options):
    """Half of the layers have run when it is rewound: what they told the others is void."""
    _, lm = models(**options)
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    expected = in_chunks(lm, IDS, (20, 1))[20:]
    x = lm.model.embed(OTHER[20:23], slice(20, 23))
    state.take(3)
    lm.model.stack.run(x, state, 0, 3)
    state.position = 23
    state.rewind(20)
    np.testing.assert_array_equal(lm.model(IDS[20:21], state), expected)


@each_choice
def test_two_sequences_side_by_side(options):
    _, lm = models(**options)
    states = [lm.model.new_state(), lm.model.new_state()]
    found = [[], []]
    for t in range(40):
        for which, ids in enumerate((IDS, OTHER)):
            found[which].append(lm.model(ids[t : t + 1], states[which])[0])
    for which, ids in enumerate((IDS, OTHER)):
        np.testing.assert_array_equal(found[which], in_chunks(lm, ids, (1,) * 40))


@family
@each_choice
@pytest.mark.parametrize("sizes", [(30,), (1,) * 30, (11, 1, 18)])
def test_rows_of_a_batch_are_what_they_are_alone(family, options, sizes):
    """Also rows that start late, whose warm-up begins with their first token."""
    _, lm = models(family, **options)
    start = np.array([0, 3, 9])
    ids = np.stack([np.concatenate([np.zeros(s, int), IDS[s : s + 30 - s]]) for s in start])
    for rows, starts in ((ids, start), (np.stack([IDS[:30], OTHER[:30]]), None)):
        state = lm.model.new_state(starts)
        cuts = np.cumsum([0, *sizes])
        found = [lm.model(rows[:, a:b], state) for a, b in zip(cuts, cuts[1:])]
        firsts = [0] * len(rows) if starts is None else starts
        for row, logits, first in zip(rows, np.concatenate(found, 1), firsts):
            np.testing.assert_allclose(logits[first:], lm.logits(row[first:]), atol=1e-9)


def test_a_batch_of_one_that_starts_late():
    _, lm = models(**SOME)
    state = lm.model.new_state(np.array([2]))
    ids = np.concatenate([[0, 0], IDS[:20]])
    found = [lm.model(ids[None, t : t + 1], state)[0, 0] for t in range(22)]
    np.testing.assert_allclose(found[2:], lm.logits(IDS[:20]), atol=1e-9)
    with counting(lm) as counts:
        lm.model(np.zeros((1, 3), int), lm.model.new_state(np.array([3])))
    assert counts.events["FFNs that may be skipped"] == 0  # padding never may


@family
@each_choice
def test_every_layer_keeps_keys_and_values_of_every_token(family, options):
    dense, lm = models(family, np.float32, **options)
    states = [dense.model.new_state(), lm.model.new_state()]
    for t in range(40):
        for model, state in zip((dense.model, lm.model), states):
            assert model(IDS[t : t + 1], state).dtype == np.float32
    for before, after in zip(*(state.layers for state in states)):
        assert before.count == after.count == 40
        for a, b in ((before.keys, after.keys), (before.values, after.values)):
            assert a.shape == b.shape and b.dtype == np.float32
            assert abs(b[..., :40, :]).max(-1).all()
    # up to the first layer that may be skipped they are the dense ones
    np.testing.assert_array_equal(
        states[0].layers[1].keys[:, :40], states[1].layers[1].keys[:, :40]
    )


# Baselines ---------------------------------------------------------------------------------------


def test_static_skips_the_last_layers_that_are_not_cold():
    _, lm = models(choose="static", rate=2 / L, warm_up=3)
    found, _ = ran(lm, IDS)
    np.testing.assert_array_equal(found[:3], np.ones((3, L)))
    np.testing.assert_array_equal(found[3:], [[True, True, True, False, False, True]] * 37)
    _, lm = models(choose="static", rate=2.5 / L, warm_up=0)
    found, _ = ran(lm, IDS)
    assert not found[:, 3:5].any() and found[:, [0, 1, 5]].all()
    assert 0.25 < found[:, 2].mean() < 0.75  # the half of a layer: for about half of the tokens


def test_random_skips_at_the_rate_asked_for_and_by_the_seed():
    counted = []
    for seed in range(20):
        _, lm = models(choose="random", rate=0.3, warm_up=5, seed=seed)
        with counting(lm) as counts:
            lm.logits(IDS)
        counted.append(counts.events["FFNs skipped"])
        assert counts.events["FFNs that may be skipped"] == 35 * 4
    # 20 * 35 * 6 FFNs at 0.3: 1260 expected, deviation sqrt(20 * 35 * 4 * 0.45 * 0.55) = 26
    assert 1150 < sum(counted) < 1370 and len(set(counted)) > 5
    logits = [models(choose="random", seed=s, warm_up=0)[1].logits(IDS) for s in (1, 1, 2)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert (logits[0] != logits[2]).any()
    _, lm = models(choose="random", rate=4 / L, warm_up=0)  # all that are not cold
    assert not ran(lm, IDS)[0][:, 1:5].any()


def test_baselines_measure_nothing():
    dense, lm = models(choose="static", rate=1 / L, warm_up=0)
    c = dense.model.config
    saved = ran(dense, IDS)[1] - ran(lm, IDS)[1]
    assert (saved == 3 * c.width * c.hidden).all()


# Offline -----------------------------------------------------------------------------------------


@family
def test_similarities_are_those_of_the_loops(family):
    lm = tiny_lm(family, np.float64)
    found = similarities(lm, [IDS, OTHER[:10].tolist()], warm_up=4)
    expected = [twin(lm.model, ids, 2, 0, 0, 0, L)[2][4:] for ids in (IDS, OTHER[:10])]
    np.testing.assert_allclose(found, np.concatenate(expected).T, atol=1e-12)
    assert similarities(lm, ["Once"]).shape == (L, len(lm.encode("Once")))


@family
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.15])
def test_what_is_proposed_skips_about_what_is_wished(family, rate):
    lm = tiny_lm(family)
    texts = [IDS, OTHER, OTHER[::-1]]
    options = calibrate(lm, texts, rate, k=1, warm_up=5)
    assert set(options) == {"threshold", "k", "warm_up", "cold_start", "cold_end"}
    changed = apply(lm, {"ffn_skip": options})
    with counting(changed) as counts:
        for ids in texts:
            changed.logits(ids)
    assert abs(counts.events["FFNs skipped"] / (3 * 35 * L) - rate) < 0.04


@pytest.mark.parametrize(
    ("means", "cold"),
    [
        ((0.2, 0.9, 0.8, 0.99, 0.99, 0.5), (1, 5)),
        ((0.2, 0.9, 0.1, 0.99, 0.99, 0.99), (1, 6)),  # low in the middle is not cold
        ((0.9, 0.9, 0.9, 0.9, 0.9, 0.9), (0, 6)),
    ],
)
def test_cold_are_the_ends_below_the_mean(monkeypatch, means, cold):
    cosines = np.repeat(np.array(means, np.float32)[:, None], 35, 1)
    monkeypatch.setattr(module, "similarities", lambda lm, texts, warm_up: cosines)
    options = calibrate(tiny_lm(), [IDS], 0.0, warm_up=5)
    assert (options["cold_start"], options["cold_end"]) == cold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([IDS[:25]], 0.1), "ffn_skip: no text is longer than the warm-up of 25 tokens."),
        (([], 0.1), "no text is longer"),
        (([IDS], 0.9), "ffn_skip: the rate is 0.9; at least 0 and at most 0.* with k=1 and layers"),
        (([IDS], -0.1), "the rate is -0.1; at least 0"),
        (([IDS], float("nan")), "the rate is nan; at least 0"),
        (([IDS], 0.1, -1), "ffn_skip: k is -1; it must be at least 0."),
        (([IDS], 0.1, 1, -1), "ffn_skip: warm_up is -1; it must be at least 0."),
        (([[1, 999]], 0.1), "Token id 999 is outside the vocabulary"),
    ],
)
def test_calibration_refuses_in_one_sentence(arguments, message):
    with pytest.raises(MinitxError, match=message) as caught:
        calibrate(tiny_lm(), *arguments)
    assert "\n" not in str(caught.value)


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(k=-1), "ffn_skip: k is -1; it must be at least 0."),
        (dict(warm_up=-3), "ffn_skip: warm_up is -3; it must be at least 0."),
        (dict(seed=-1), "ffn_skip: seed is -1"),
        (dict(cold_start=-1), "cold_start is -1; .* at most 6, the number of layers."),
        (dict(cold_end=7), "ffn_skip: cold_end is 7; it must be at least 0 and at most 6"),
        (dict(choose="random", rate=0.7), "rate is 0.7; .* at most 0.666667, since 4 of the 6"),
        (dict(choose="static", rate=-0.1), "ffn_skip: rate is -0.1; it must be at least 0"),
        (dict(choose="static", cold_start=6), "at most 0, since 0 of the 6 FFNs are not cold"),
        (dict(choose="rnd"), "'choose' of ffn_skip is 'rnd'; .* similarity, random, static"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        models(**options)
    assert "\n" not in str(caught.value)


def test_huge_numbers_are_taken_for_what_they_mean():
    _, lm = models(threshold=-2.0, k=10**30, warm_up=0)
    np.testing.assert_array_equal(lm.logits(IDS), models(**ALL, warm_up=0)[1].logits(IDS))
    dense, lm = models(**ALL, warm_up=10**30)
    np.testing.assert_array_equal(lm.logits(IDS), dense.logits(IDS))


def test_the_tree_shows_what_runs():
    _, lm = models(threshold=0.9, k=2)
    assert "ffn: SimilarityFFN(threshold=0.9, k=2, warm_up=25)" in repr(lm)
    assert type(lm.model.stack.blocks[0].ffn) is type(lm.model.stack.blocks[5].ffn) is FFN
    _, lm = models(choose="static", warm_up=2)
    assert sum(type(node) is PlannedFFN for _, node in walk(lm)) == 4
    assert "PlannedFFN(skipped 48, warm_up=2)" in repr(lm)
