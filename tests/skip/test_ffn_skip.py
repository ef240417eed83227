"""FFN-SkipLLM: worked examples, equality with the literal version, counts, calibration.

The contract tests (test_contract.py) run on models of two layers, where the defaults skip nothing;
so chunks, rewinding and batches are tested again here, on six layers with many FFNs skipped.
"""

import numpy as np
import pytest
from literal_ffn_skip import run as literal
from same import assert_same
from tiny import FAMILIES, TOKENIZER, in_chunks, tiny_model

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import FFN
from minitx.shared.cosine import cosine
from minitx.skip.ffn_skip import SkippableFFN, calibration
from minitx.skip.ffn_skip.baselines import PlannedFFN
from minitx.skip.ffn_skip.calibration import calibrate, similarities
from minitx.state import State
from minitx.technique import apply, swap
from minitx.tree import Part, map_weights, part, walk

L = 6
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
ALL = dict(threshold=-2.0, skip=L)  # every cosine reaches the threshold
SOME = dict(threshold=0.8, skip=2, warm_up=4, cold_start=1, cold_end=L)
BASELINES = [
    dict(choose="random", rate=0.4, warm_up=4),
    dict(choose="static", rate=0.45, warm_up=4),
]

family = pytest.mark.parametrize("family", FAMILIES)
each_choice = pytest.mark.parametrize("options", [SOME, *BASELINES], ids=lambda o: str(o)[:20])


def tiny_lm(family="llama", dtype=np.float32, layers=L):
    return LM(tiny_model(family, dtype=dtype, layers=layers), TOKENIZER)


def models(family="llama", dtype=np.float64, **options):
    """(dense, with skipping), with six layers, of which all but the first may skip."""
    lm = tiny_lm(family, dtype)
    return lm, apply(lm, {"ffn_skip": {"cold_start": 1} | options})


def ran(lm, ids):
    """(T, L) booleans: which FFNs ran (the ledger saw their weights read), and the multiply-adds
    (T,) of each token."""
    state, read, cost = lm.model.new_state(), [[0] * L], [0]
    ffns = [f"model.stack.blocks.{number}.ffn" for number in range(L)]
    with counting(lm) as counts:
        for t in range(len(ids)):
            lm.model(ids[t : t + 1], state)
            read.append([counts.total(ffn).weight_bytes for ffn in ffns])
            cost.append(counts.total().multiply_adds)
    return np.diff(read, axis=0) > 0, np.diff(cost)


# Worked examples ---------------------------------------------------------------------------------


@part
class FFNWithCosine(Part):
    """A toy FFN: turns the hidden state (2,) of each token so that cos(a, a + FFN(a)) is given."""

    cosines: tuple
    calls: list

    def __call__(self, x, layer):
        self.calls.append(len(x.reshape(-1, 2)))
        tokens = np.round(x[..., 1]).astype(int)  # the second column says which token it is
        wanted = np.array(self.cosines)[tokens]
        length = np.hypot(x[..., 0], x[..., 1])
        angle = np.arctan2(x[..., 1], x[..., 0]) + np.arccos(wanted)
        return length[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1) - x


# cosines of layer 1     2     3     4     5     with threshold 0.9 and skip=2:
COSINES = [
    (0.50, 0.95, 0.10, 0.10, 0.99),  # 2 reaches 0.9: 3 and 4 are skipped, then 5 runs
    (0.95, 0.99, 0.99, 0.50, 0.95),  # 1 reaches it: 2 and 3 are skipped; 4 does not, so 5 runs
    (0.89, 0.89, 0.89, 0.89, 0.89),  # none
    (0.90, 0.10, 0.10, 0.91, 0.10),  # 1: 2 and 3 are skipped; 4: 5 is skipped, and no layer is left
]
RAN = [(1, 1, 0, 0, 1), (1, 0, 0, 1, 1), (1, 1, 1, 1, 1), (1, 0, 0, 1, 0)]


@pytest.mark.parametrize("sizes", [(4,), (1, 1, 1, 1), (2, 2), (3, 1)])
def test_worked_example_by_hand(sizes):
    """Five layers, four tokens, run together or one by one. Every layer gets the same hidden
    states, so that skipping does not change the cosines."""
    state = State(5, capacity=4)
    calls = [[] for _ in range(5)]
    parts = [
        SkippableFFN(FFNWithCosine(column, seen), 0.9 - 1e-9, 2, 0)
        for column, seen in zip(zip(*COSINES), calls)
    ]
    hidden = np.stack([np.full(4, 100.0), np.arange(4.0)], -1)  # (4, 2)
    found = np.zeros((4, 5))
    at = 0
    for size in sizes:
        x = hidden[at : at + size]
        for number, (ffn, layer) in enumerate(zip(parts, state.layers)):
            found[at : at + size, number] = ffn(x, layer.take(size)).any(-1)
        at += size
    assert_same(found, RAN, "FFNs that ran (rows: tokens)")
    assert [sum(c) for c in calls] == np.sum(RAN, 0).tolist(), "rows that each FFN was called with"
    assert 0 not in sum(calls, []), "an FFN was called with no rows"


def test_cosine_is_between_the_hidden_states_before_and_after_the_ffn():
    a = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    f = np.array([[1.0, 0.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    # (3,4).(4,4) = 28 over 5 sqrt(32); (1,0).(0,1) = 0; a zero vector; the same direction
    assert_same(cosine(a, a + f), [28 / 5 / 32**0.5, 0, 0, 1], tolerance=1e-7)


@pytest.mark.parametrize("cold", [(1, 5), (2, 6), (0, 6), (1, 6), (3, 4)])
def test_if_every_cosine_reaches_the_threshold_only_the_first_layer_that_is_not_cold_runs(cold):
    cold_start, cold_end = cold
    _, lm = models(**ALL, warm_up=7, cold_start=cold_start, cold_end=cold_end)
    found, _ = ran(lm, IDS[:12])
    assert found[:7].all(), "the warm-up skips nothing"
    assert_same(found[7:].sum(1), [cold_start + 1 + L - cold_end] * 5)
    assert found[7:, cold_start].all() and not found[7:, cold_start + 1 : cold_end].any()


# Settings that equal the dense model -------------------------------------------------------------

NEUTRAL = [
    dict(threshold=1.1, warm_up=0),
    dict(threshold=-2.0, skip=0, warm_up=0),
    dict(**ALL, warm_up=0, cold_start=3, cold_end=3),
    dict(**ALL, warm_up=0, cold_start=5, cold_end=1),
    dict(**ALL, warm_up=40),
    dict(choose="random", rate=0.0, warm_up=0),
    dict(choose="static", rate=0.0, warm_up=0),
]


@family
@pytest.mark.parametrize("options", NEUTRAL, ids=str)
def test_neutral_settings_equal_the_dense_model_bit_for_bit(family, options):
    dense, lm = models(family, np.float32, **options)
    assert_same(lm.logits(IDS), dense.logits(IDS))
    for sizes in ((1,) * 40, (13, 1, 26)):
        assert_same(in_chunks(lm, IDS, sizes), in_chunks(dense, IDS, sizes))


@family
def test_skipping_ffns_that_add_zero_changes_nothing(family):
    dense = tiny_lm(family)
    zeroed = swap(dense, FFN, lambda ffn: map_weights(ffn, lambda w: w * 0))
    lm = apply(zeroed, {"ffn_skip": dict(**ALL, warm_up=0, cold_start=1)})
    assert_same(lm.logits(IDS), zeroed.logits(IDS))
    with counting(lm) as counts:
        lm.logits(IDS)
    assert counts.events["FFNs skipped"] == 40 * 3  # of layers 1 to 4, the first is measured


def test_defaults_by_the_number_of_layers():
    def layers_and_skip(layers):
        lm = apply(tiny_lm(layers=layers), {"ffn_skip": True})
        changed = [
            number
            for number, block in enumerate(lm.model.stack.blocks)
            if type(block.ffn) is SkippableFFN
        ]
        ffns = [lm.model.stack.blocks[number].ffn for number in changed]
        measures = [ffn.skip > 0 for ffn in ffns]
        assert measures == [True] * (len(ffns) - 1) + [False], "the last has none after it to skip"
        return changed, ffns[0].skip

    assert layers_and_skip(3) == ([1, 2], 1)
    assert layers_and_skip(4) == ([1, 2], 1)
    assert layers_and_skip(5) == ([2, 3], 1)
    assert layers_and_skip(8) == ([4, 5, 6], 2)
    assert layers_and_skip(12) == ([6, 7, 8, 9, 10], 3)


# Equal to the literal version --------------------------------------------------------------------


@family
@pytest.mark.parametrize("warm_up, cold", [(0, (1, 5)), (5, (0, 6))])
@pytest.mark.parametrize("skip, share", [(1, 0.2), (2, 0.6), (6, 0.2), (6, 0.6)])
def test_equals_the_literal_version(family, warm_up, cold, skip, share):
    """Logits, which FFNs each token ran, and multiply-adds as the card predicts them."""
    dense, ids = tiny_lm(family, np.float64), IDS[:25]
    threshold = float(np.quantile(similarities(dense, [ids])[slice(*cold)], share))
    options = dict(
        threshold=threshold, skip=skip, warm_up=warm_up, cold_start=cold[0], cold_end=cold[1]
    )
    lm = apply(dense, {"ffn_skip": options})
    expected, expected_ran, cosines = literal(dense.model, ids, threshold, skip, warm_up, *cold)
    atol = 1e-10 * abs(expected).max()
    assert_same(lm.logits(ids), expected, "logits", atol=atol)

    found, cost = ran(lm, ids)
    assert_same(found, expected_ran, "FFNs that ran (rows: tokens)")
    assert 0 < (~found).sum() < found.size, "none or all were skipped"

    c = dense.model.config
    ffn = (3 if c.family == "llama" else 2) * c.width * c.hidden
    _, dense_cost = ran(dense, ids)
    measured = (~np.isnan(cosines[:, : cold[1] - 1])).sum(1)  # the last has none after it to skip
    predicted = dense_cost - (~expected_ran).sum(1) * ffn + measured * 3 * c.width
    assert_same(cost, predicted, "multiply-adds of each token")
    with counting(lm) as counts:
        lm.logits(ids)
    with counting(dense) as before:
        dense.logits(ids)
    saved = before.total().multiply_adds - counts.total().multiply_adds
    assert saved == (~expected_ran).sum() * ffn - measured.sum() * 3 * c.width
    assert counts.events["FFNs skipped"] == (~expected_ran).sum()
    assert counts.events["skippable FFNs"] == (25 - warm_up) * (cold[1] - cold[0])


@family
def test_a_higher_threshold_never_skips_earlier(family):
    dense = tiny_lm(family, np.float64)

    def first_skipped(threshold):
        lm = apply(dense, {"ffn_skip": SOME | dict(threshold=float(threshold), cold_start=0)})
        state = dense.model.new_state()  # the earlier tokens are the same for every threshold
        dense.model(IDS[:20], state)
        with counting(lm) as counts:
            lm.model(IDS[20:21], state)
        done = [counts.total(f"model.stack.blocks.{n}.ffn").weight_bytes > 0 for n in range(L)]
        return (*done, False).index(False)

    firsts = [first_skipped(s) for s in np.linspace(-1, 1.05, 30)]
    assert firsts == sorted(firsts) and firsts[0] == 1 and firsts[-1] == L
    assert len(set(firsts)) > 2


# State -------------------------------------------------------------------------------------------


@family
@each_choice
def test_one_pass_chunks_and_single_tokens_agree(family, options):
    """Single tokens take the path without masks, so this also says that both paths agree."""
    dense, lm = models(family, **options)
    whole = lm.logits(IDS)
    assert abs(whole[:4] - dense.logits(IDS)[:4]).max() < 1e-10, "the warm-up should be dense"
    assert (abs(whole[4:] - dense.logits(IDS)[4:]).max(1) > 1e-6).any(), "nothing was skipped"
    for sizes in ((7, 20, 13), (*(1,) * 16, 24), (3, 1, 1, 35)):
        assert_same(in_chunks(lm, IDS, sizes), whole, f"in steps of {sizes}", atol=1e-9)


@family
@each_choice
def test_rewind_and_replay_gives_the_same_logits(family, options):
    _, lm = models(family, **options)
    begun = lm.model.new_state()
    once = in_chunks(lm, IDS, (1,) * 40, begun)
    for back_to in (0, 3, 17, 39):
        state = begun.fork()
        lm.model(OTHER[:5], state)
        state.rewind(40)
        state.rewind(back_to)
        lm.model(OTHER[back_to:], state)  # other decisions at the same positions
        state.rewind(back_to)
        again = in_chunks(lm, IDS[back_to:], (1,) * (40 - back_to), state)
        assert_same(again, once[back_to:], f"replayed from {back_to}")


@each_choice
def test_an_interrupted_pass_is_forgotten_by_rewind(options):
    """Half of the layers have run; what they set run_skip to must not outlast the rewind."""
    _, lm = models(**options)
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    expected = in_chunks(lm, IDS, (20, 1))[20:]
    x = lm.model.embed(OTHER[20:23], slice(20, 23))
    state.take(3)
    lm.model.stack.run(x, state, 0, 3)
    state.position = 23
    state.rewind(20)
    assert_same(lm.model(IDS[20:21], state), expected)


@each_choice
def test_interleaved_sequences_do_not_disturb_each_other(options):
    _, lm = models(**options)
    states = [lm.model.new_state(), lm.model.new_state()]
    found = [[], []]
    for t in range(40):
        for which, ids in enumerate((IDS, OTHER)):
            found[which].append(lm.model(ids[t : t + 1], states[which])[0])
    for which, ids in enumerate((IDS, OTHER)):
        assert_same(found[which], in_chunks(lm, ids, (1,) * 40))


@family
@each_choice
@pytest.mark.parametrize("sizes", [(30,), (1,) * 30, (11, 1, 18)])
def test_a_row_of_a_batch_equals_the_row_alone(family, options, sizes):
    """Padded rows too: their warm-up begins with their first token."""
    _, lm = models(family, **options)
    start = np.array([0, 3, 9])
    ids = np.stack([np.concatenate([np.zeros(s, int), IDS[s : s + 30 - s]]) for s in start])
    for rows, starts in ((ids, start), (np.stack([IDS[:30], OTHER[:30]]), None)):
        state = lm.model.new_state(starts)
        cuts = np.cumsum([0, *sizes])
        found = [lm.model(rows[:, a:b], state) for a, b in zip(cuts, cuts[1:])]
        firsts = [0] * len(rows) if starts is None else starts
        for row, logits, first in zip(rows, np.concatenate(found, 1), firsts):
            assert_same(logits[first:], lm.logits(row[first:]), atol=1e-9)


def test_a_padded_batch_of_one_equals_the_row_alone():
    _, lm = models(**SOME)
    state = lm.model.new_state(np.array([2]))
    ids = np.concatenate([[0, 0], IDS[:20]])
    found = [lm.model(ids[None, t : t + 1], state)[0, 0] for t in range(22)]
    assert_same(found[2:], lm.logits(IDS[:20]), atol=1e-9)
    with counting(lm) as counts:
        lm.model(np.zeros((1, 3), int), lm.model.new_state(np.array([3])))
    assert counts.events["skippable FFNs"] == 0, "padding is never skippable"


@family
@each_choice
def test_every_layer_caches_keys_and_values_of_every_token(family, options):
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
    # up to the first layer that may be skipped they are those of the dense model
    assert_same(states[0].layers[1].keys[:, :40], states[1].layers[1].keys[:, :40])


# Baselines ---------------------------------------------------------------------------------------


def test_static_baseline_skips_the_last_layers_that_are_not_cold():
    _, lm = models(choose="static", rate=2 / L, warm_up=3)
    found, _ = ran(lm, IDS)
    assert_same(found[:3], np.ones((3, L), bool))
    assert_same(found[3:], [[True, True, True, False, False, True]] * 37)
    _, lm = models(choose="static", rate=2.5 / L, warm_up=0)
    found, _ = ran(lm, IDS)
    assert not found[:, 3:5].any() and found[:, [0, 1, 5]].all()
    assert 0.25 < found[:, 2].mean() < 0.75, "half a layer: skipped for about half of the tokens"


def test_random_baseline_skips_at_the_given_rate_and_depends_on_the_seed():
    counted = []
    for seed in range(20):
        _, lm = models(choose="random", rate=0.3, warm_up=5, seed=seed)
        with counting(lm) as counts:
            lm.logits(IDS)
        counted.append(counts.events["FFNs skipped"])
        assert counts.events["skippable FFNs"] == 35 * 4
    # 20 * 35 * 6 FFNs at 0.3: 1260 expected,
    # standard deviation sqrt(20 * 35 * 4 * 0.45 * 0.55) = 26
    assert 1150 < sum(counted) < 1370 and len(set(counted)) > 5
    logits = [models(choose="random", seed=s, warm_up=0)[1].logits(IDS) for s in (1, 1, 2)]
    assert_same(logits[0], logits[1])
    assert (logits[0] != logits[2]).any()
    _, lm = models(choose="random", rate=4 / L, warm_up=0)  # all that are not cold
    assert not ran(lm, IDS)[0][:, 1:5].any()


def test_baselines_do_not_pay_for_cosines():
    dense, lm = models(choose="static", rate=1 / L, warm_up=0)
    c = dense.model.config
    saved = ran(dense, IDS)[1] - ran(lm, IDS)[1]
    assert_same(saved, 3 * c.width * c.hidden)


# Calibration -------------------------------------------------------------------------------------


@family
def test_similarities_equal_those_of_the_literal_version(family):
    lm = tiny_lm(family, np.float64)
    found = similarities(lm, [IDS, OTHER[:10].tolist()], warm_up=4)
    expected = [literal(lm.model, ids, 2, 0, 0, 0, L)[2][4:] for ids in (IDS, OTHER[:10])]
    assert_same(found, np.concatenate(expected).T, atol=1e-12)
    assert similarities(lm, ["Once"]).shape == (L, len(lm.encode("Once")))


@family
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.15])
def test_calibrated_options_skip_about_the_wanted_share(family, rate):
    lm = tiny_lm(family)
    texts = [IDS, OTHER, OTHER[::-1]]
    options = calibrate(lm, texts, rate, skip=1, warm_up=5)
    assert set(options) == {"threshold", "skip", "warm_up", "cold_start", "cold_end"}
    changed = apply(lm, {"ffn_skip": options})
    with counting(changed) as counts:
        for ids in texts:
            changed.logits(ids)
    assert abs(counts.events["FFNs skipped"] / (3 * 35 * L) - rate) < 0.04


@pytest.mark.parametrize(
    ("means", "cold"),
    [
        ((0.2, 0.9, 0.8, 0.99, 0.99, 0.5), (1, 5)),
        ((0.2, 0.9, 0.1, 0.99, 0.99, 0.99), (1, 6)),  # a low one in the middle is not cold
        ((0.9, 0.9, 0.9, 0.9, 0.9, 0.9), (0, 6)),
    ],
)
def test_calibration_makes_the_ends_below_the_mean_cold(monkeypatch, means, cold):
    cosines = np.repeat(np.array(means, np.float32)[:, None], 35, 1)
    monkeypatch.setattr(calibration, "similarities", lambda lm, texts, warm_up: cosines)
    options = calibrate(tiny_lm(), [IDS], 0.0, warm_up=5)
    assert (options["cold_start"], options["cold_end"]) == cold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([IDS[:25]], 0.1), "ffn_skip: expected a text longer than the warm-up of 25 tokens"),
        (([], 0.1), "expected a text longer"),
        (([IDS], 0.9), "ffn_skip: rate must be 0 to 0.* with skip=1 and the layers .*; got 0.9."),
        (([IDS], -0.1), "rate must be 0 to 0.*; got -0.1"),
        (([IDS], float("nan")), "rate must be 0 to 0.*; got nan"),
        (([IDS], 0.1, -1), "ffn_skip: skip must be an integer, at least 0, or None; got -1."),
        (([IDS], 0.1, 1, -1), "ffn_skip: warm_up must be an integer, at least 0; got -1."),
        (([[1, 999]], 0.1), "Token id 999 is outside the vocabulary"),
    ],
)
def test_calibration_refuses_bad_arguments_in_one_sentence(arguments, message):
    with pytest.raises(MinitxError, match=message) as caught:
        calibrate(tiny_lm(), *arguments)
    assert "\n" not in str(caught.value)


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(skip=-1), "ffn_skip: skip must be an integer, at least 0, or None; got -1."),
        (dict(warm_up=-3), "ffn_skip: warm_up must be an integer, at least 0; got -3."),
        (dict(seed=-1), "ffn_skip: seed must be an integer, at least 0; got -1."),
        (dict(cold_start=-1), "cold_start must be an integer, at least 0, or None; got -1."),
        (dict(cold_end=7), "ffn_skip: cold_end must be at most 6, the number of layers; got 7."),
        (dict(cold_start=7), "ffn_skip: cold_start must be at most 6, .*; got 7."),
        (dict(choose="random", rate=0.7), "rate must be at most 0.666667, since 4 of the 6 FFNs"),
        (dict(choose="static", rate=-0.1), "ffn_skip: rate must be a number, 0 to 1; got -0.1."),
        (dict(choose="static", cold_start=6), "at most 0, since 0 of the 6 FFNs are not cold"),
        (dict(choose="rnd"), "choose must be one of similarity, random, static; got 'rnd'"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        models(**options)
    assert "\n" not in str(caught.value)


def test_huge_options_mean_all_layers_and_all_tokens():
    _, lm = models(threshold=-2.0, skip=10**9, warm_up=0)
    assert_same(lm.logits(IDS), models(**ALL, warm_up=0)[1].logits(IDS))
    dense, lm = models(**ALL, warm_up=10**9)
    assert_same(lm.logits(IDS), dense.logits(IDS))


def test_default_never_skips_the_first_half_nor_the_last_layer():
    blocks = apply(tiny_lm(), {"ffn_skip": True}).model.stack.blocks
    assert [type(block.ffn) is FFN for block in blocks] == [True, True, True, False, False, True]
    blocks = apply(tiny_lm(), {"ffn_skip": {"preset": "aggressive"}}).model.stack.blocks
    assert [type(block.ffn) is FFN for block in blocks] == [True, *[False] * 4, True]


def test_printed_model_shows_which_ffns_may_be_skipped():
    _, lm = models(threshold=0.9, skip=2)
    assert "ffn: SkippableFFN(threshold=0.9, skip=2, warm_up=25)" in repr(lm)
    assert type(lm.model.stack.blocks[0].ffn) is type(lm.model.stack.blocks[5].ffn) is FFN
    _, lm = models(choose="static", warm_up=2)
    assert sum(type(node) is PlannedFFN for _, node in walk(lm)) == 4
    assert "PlannedFFN(skipped 48, warm_up=2)" in repr(lm)


@part
class ByPosition(Part):
    """An FFN whose result depends on the positions of its tokens, as one with a memory does."""

    one_sequence = True
    inner: Part

    def __call__(self, x, layer):
        own = layer.tokens.own
        assert x.shape[-2] == own.shape[-1], "the FFN gets other tokens than its layer has"
        return self.inner(x, layer) * (1 + own[..., None] % 3)


def test_ffn_that_remembers_its_tokens_gets_the_positions_of_those_that_run():
    lm = apply(swap(tiny_lm(dtype=np.float64), FFN, ByPosition), {"ffn_skip": SOME})
    both = lm.logits([IDS, OTHER])  # a batch of two sequences
    for b, ids in enumerate((IDS, OTHER)):
        alone = in_chunks(lm, ids, [1] * len(ids))
        assert_same(both[b], alone, f"row {b} of a batch", atol=1e-9)
        assert_same(lm.logits(ids), alone, "in one pass", atol=1e-9)
