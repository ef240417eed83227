"""Big-little decoding: what the small model may keep, and what the big one takes back."""

import math
from dataclasses import replace

import literal_big_little as literal
import numpy as np
import pytest
from markov import after_last, noisy, random_markov
from tiny import FAMILIES, decode, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.decode import Autoregressive, Sampler
from minitx.errors import MinitxError, MinitxWarning
from minitx.skip.big_little import AtRandom, BigLittle, Unsure, first_far, weight_bytes
from minitx.technique import apply

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]


def loop(small, fallback=0.0, rollback=2.0, longest=10):
    return BigLittle(Autoregressive(), small, Unsure(fallback), rollback, longest)


# The worked example ------------------------------------------------------------------------------
#
# Three tokens; the next one depends on the last one. The argmax of each row is in brackets.
#
#     after   big                   small
#       0     0.2  [0.7]  0.1       0.1  [0.8]  0.1     both: 1
#       1     0.3   0.1  [0.6]     [0.9]  0.1   0.0     big: 2, small: 0, which the big model gives
#       2    [0.8]  0.1   0.1       0.3   0.3  [0.4]    0.3: -ln 0.3 = 1.20
#
# Prompt [2], six tokens, fallback 0.5, at most 10 draft tokens in a row.
#   The big model begins: 0.                                                           text 2 0
#   The small one drafts 1 (0.8), 0 (0.9), 1, 0 (5 are left, of which the big model adds one).
# rollback 2:  0 after 1 has a distance of 1.20, so all four are kept; the big model adds 1.
#              0 1 0 1 0 1 in two passes of the big model
# rollback 1:  0 after 1 is too far: the draft is cut to [1] and the big model puts 2. The small
#              model is below 0.5 after 2: handed over, the big model puts 0. Then 1 once more
#              (2 are left, so one is drafted), and the big model adds 2.
#              0 1 2 0 1 2, which is also what it writes alone, in four passes

BIG = [[0.2, 0.7, 0.1], [0.3, 0.1, 0.6], [0.8, 0.1, 0.1]]
SMALL = [[0.1, 0.8, 0.1], [0.9, 0.1, 0.0], [0.3, 0.3, 0.4]]


@pytest.mark.parametrize(
    "rollback, tokens, passes, rollbacks, handed_over",
    [(2.0, [0, 1, 0, 1, 0, 1], 2, 0, 0), (1.0, [0, 1, 2, 0, 1, 2], 4, 1, 1)],
)
def test_worked_example(rollback, tokens, passes, rollbacks, handed_over):
    big, small = after_last(BIG), after_last(SMALL)
    root = loop(small, 0.5, rollback)
    with ledger.counting(root) as counts:
        assert list(decode(root, big, [2], Sampler(), 6)) == tokens
    assert len(big.passes) == counts.events["big model passes"] == passes
    assert counts.events["rollbacks"] == rollbacks, "drafts that were cut"
    assert counts.events["hand-overs"] == handed_over, "steps at which the small model was unsure"


def test_small_model_reads_what_the_big_one_wrote_and_nothing_that_was_dropped():
    """Its passes in the example with rollback 1: prompt and first token, its own drafts, then after
    the rollback the big model's 2, with which it is unsure; then the 0 that this got."""
    small = after_last(SMALL)
    list(decode(loop(small, 0.5, 1.0), after_last(BIG), [2], Sampler(), 6))
    assert small.passes == [[2, 0], [1], [0], [1], [2], [0]]


def test_distances_by_hand():
    for p, expected in ((0.9, 0.105), (0.2, 1.609), (0.01, 4.605), (0.0067, 5.006)):
        logits = np.log([[p, (1 - p) * 0.999, (1 - p) * 0.001]] * 2)
        assert -math.log(p) == pytest.approx(expected, abs=5e-4)
        far = p < 0.5  # else it is the argmax, which is kept at any rollback
        found = [first_far(logits, [0], expected + off) for off in (-1e-2, 1e-2)]
        assert found == [0 if far else 1, 1], f"a probability of {p} around its own distance"


def test_every_draft_token_is_tested_not_only_the_first_far_one():
    """Position 0 is far but the argmax; position 1 is far and must be found all the same."""
    rows = np.log([[0.3, 0.29, 0.29, 0.12], [0.01, 0.9, 0.05, 0.04], [0.25] * 4])
    assert -math.log(0.3) > 1
    assert first_far(rows, [0, 0], 1.0) == 1, "the second draft token is far, and was kept"


# Equal to the literal version --------------------------------------------------------------------


def test_tokens_and_passes_equal_the_literal_version():
    rng = np.random.default_rng(0)
    for number in range(40):
        big = random_markov(6, number)
        small = noisy(big, number + 1000, 1.5)
        prompt = rng.integers(0, 6, rng.integers(1, 6)).tolist()
        fallback, rollback = rng.choice([0, 0.3, 0.6, 1.0]), rng.choice([0, 0.5, 1, 2, 5])
        longest, limit = int(rng.integers(1, 6)), int(rng.integers(0, 25))
        root = loop(small, float(fallback), float(rollback), longest)
        with ledger.counting(root) as counts:
            found = list(decode(root, big, prompt, Sampler(), limit))
        tokens, passes, rollbacks = literal.decode(
            lambda t, m=big: [*m.after(t)], lambda t, m=small: [*m.after(t)],
            fallback, rollback, longest, prompt, limit,
        )  # fmt: skip
        assert found == tokens, f"other tokens, number {number}"
        assert counts.events["big model passes"] == passes
        assert counts.events["rollbacks"] == rollbacks


# When the text is the big model's own ------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fallback", [0.0, 0.1])
def test_rollback_below_ln_2_gives_the_greedy_text_of_the_big_model(family, fallback):
    """A token that is kept then has a probability above 1/2, or it is the argmax anyhow."""
    lm = tiny_lm(family, dtype=np.float64)
    expected = lm.generate(PROMPT, 30)
    for rollback in (0.0, 0.69):
        options = dict(small="self", fallback=fallback, rollback=rollback, longest=4)
        changed = apply(lm, {"big_little": options})
        with ledger.counting(changed) as counts:
            assert changed.generate(PROMPT, 30) == expected, f"rollback {rollback}"
        assert counts.events["draft tokens proposed"] > 0


def test_rollback_0_is_not_the_default():
    """In a published code, 0 counts as "not given"."""
    lm = tiny_lm()
    found = apply(lm, {"big_little": {"small": "self", "rollback": 0.0, "fallback": 0.0}})
    assert found.decode.rollback == 0 and found.decode.hands_over.fallback == 0


def test_rollback_above_ln_2_may_change_the_text():
    big, small = after_last(BIG), after_last(SMALL)
    alone = [0, 1, 2, 0, 1, 2]
    assert list(decode(loop(small, 0.5, 0.69), big, [2], Sampler(), 6)) == alone
    assert list(decode(loop(small, 0.5, 2.0), big, [2], Sampler(), 6)) != alone


def test_fallback_1_hands_over_every_token_and_0_never_does():
    big = random_markov(20, 3)
    small = noisy(big, 4, 1.0)
    alone = list(decode(Autoregressive(), big, [1, 2], Sampler(), 30))
    for fallback, handed_over in ((1.0, 28), (0.0, 0)):
        root = loop(small, fallback, 5.0)
        with ledger.counting(root) as counts:
            found = list(decode(root, big, [1, 2], Sampler(), 30))
        assert counts.events["hand-overs"] == handed_over
        assert (found == alone) == (fallback == 1)


def test_agreement_falls_and_passes_fall_as_rules_are_loosened():
    """An order-2 Markov toy of 50 tokens: the share of tokens that the big model alone has at the
    same position, and its passes per token, of 30 starts and 40 tokens each."""
    big = random_markov(50, 0, 2.0)
    small = noisy(big, 1, 0.9)
    starts = np.random.default_rng(2).integers(0, 50, (30, 2)).tolist()

    def run(fallback, rollback):
        same = passes = 0
        for start in starts:
            alone = list(decode(Autoregressive(), big, start, Sampler(), 40))
            before = len(big.passes)
            found = list(decode(loop(small, fallback, rollback), big, start, Sampler(), 40))
            passes += len(big.passes) - before
            same += sum(a == b for a, b in zip(alone, found))
        return same / 1200, passes / 1200

    exact, careful, loose = run(0.0, 0.693), run(0.6, 5.0), run(0.0, 50.0)
    assert exact[0] == 1 and exact[1] < 0.7, "below ln 2 the text is the big model's"
    assert 0.5 < careful[0] < 1
    assert loose[0] < 0.3, "nothing is rolled back: the small model's text"
    assert loose[1] == pytest.approx(0.125, abs=0.001), "5 passes for 40 tokens"


def test_requests_that_sample_are_left_to_the_big_model():
    lm = tiny_lm()
    changed = apply(lm, {"big_little": {"small": "self", "fallback": 0.0}})
    options = dict(temperature=1.0, top_k=9, seed=4)
    with ledger.counting(changed) as counts:
        assert changed.generate(PROMPT, 20, **options) == lm.generate(PROMPT, 20, **options)
    assert counts.events == {"requests left to the big model": 1}


# The random baseline -----------------------------------------------------------------------------


def test_random_baseline_hands_over_at_the_rate_and_without_looking():
    lm = apply(tiny_lm(), {"big_little": {"small": "self", "choose": "random", "rate": 0.3}})
    rule = lm.decode.hands_over
    assert type(rule) is AtRandom and rule.scores.shape == (48,)
    logits = np.zeros(4)
    found = [rule(logits, t) for t in range(48)]
    assert found == [rule(logits + [9, 0, 0, 0], t) for t in range(48)]
    assert 0.15 < np.mean(found) < 0.45
    assert repr(lm.decode).count("scores 48") == 1


# Limits ------------------------------------------------------------------------------------------


def test_small_model_with_a_shorter_context_drafts_while_it_can():
    lm = tiny_lm(dtype=np.float64)
    small = tiny_model(seed=1, context=20)
    root = loop(small, 0.0, 0.0, 4)
    with ledger.counting(root) as counts:
        assert list(decode(root, lm.model, PROMPT, Sampler(), 30)) == [
            *decode(Autoregressive(), lm.model, PROMPT, Sampler(), 30)
        ]
    assert counts.events["draft tokens proposed"] > 0
    assert counts.events["big model passes"] >= 30 - (20 - len(PROMPT)) - 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"fallback": 1.5}, "fallback must be a number, 0 to 1; got 1.5"),
        ({"rollback": -1.0}, "rollback must be a number, at least 0; got -1.0"),
        ({"longest": -1}, "longest must be an integer, at least 0; got -1"),
        ({"small": "./nowhere"}, "cannot load its small model: There is no model './nowhere'"),
        ({"small": "stories-draft"}, "it has 1022 tokens and this model 259"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(MinitxError) as caught:
        apply(tiny_lm(), {"big_little": options})
    assert words in str(caught.value) and str(caught.value).startswith("big_little")


def test_small_model_that_frees_rows_is_refused():
    lm = apply(tiny_lm(), {"sink_window": {"sinks": 1, "window": 6}})
    with pytest.raises(MinitxError, match="cannot use this small model: sink_window frees"):
        apply(lm, {"big_little": {"small": "self"}})


def test_small_model_as_large_as_the_big_one_warns():
    draft = minitx.load("stories-draft")
    with pytest.warns(MinitxWarning, match="drafting costs more than it saves"):
        apply(draft, {"big_little": {"small": "stories-draft"}})


# Cost, and stories -------------------------------------------------------------------------------


def test_bytes_of_weights_follow_from_the_passes():
    lm = tiny_lm()
    small = tiny_model("llama", seed=9, layers=1, width=8, hidden=8)
    changed = replace(lm, decode=loop(small, 0.0, 1.0, 3))
    with ledger.counting(changed) as counts:
        changed.generate(PROMPT, 25)
    big, little = counts.events["big model passes"], counts.events["small model passes"]
    heads = counts.total("model.head").weight_bytes, counts.total("decode.small.head").weight_bytes
    assert sum(heads) == weight_bytes(big, little, 4 * 259 * 16, 4 * 259 * 8)
    rows = counts.events["draft tokens proposed"] + big
    assert counts.total("model.head").multiply_adds == 259 * 16 * rows


def test_stories_default_keeps_the_text_and_halves_the_passes():
    """Two beginnings continued by 60 tokens."""
    lm = minitx.load("stories")
    prompts = ["Once there was a kind girl named Eva.", "Leo was in the kitchen. Tom had a ball."]
    for setting, least_same in (({}, 0.85), ({"rollback": 0.69}, 1.0)):
        changed = apply(lm, {"big_little": setting})
        same = tokens = 0
        with ledger.counting(changed) as counts:
            for prompt in prompts:
                ids = lm.encode(prompt)
                found = list(decode(changed.decode, changed.model, ids, Sampler(), 60))
                alone = list(decode(lm.decode, lm.model, ids, Sampler(), 60))
                same += sum(a == b for a, b in zip(found, alone))
                tokens += 60
        assert same / tokens >= least_same, f"other text at {setting}"
        assert 0.15 < counts.events["big model passes"] / tokens < 0.6
