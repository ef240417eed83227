"""The token loop against the plain definition without a cache; the choice of a token against a
literal version that sorts everything, by hand, by its frequencies, and at the ends of every
range."""

import math
import random
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, Spy, decode, tiny_model

from minitx import ops
from minitx.decode import Autoregressive, Sampler, nucleus, top_k_mask
from minitx.errors import MinitxError

HALVES = np.log(np.array([0.125, 0.5, 0.125, 0.25]))  # logits of these probabilities


def probabilities(logits=HALVES, **options):
    return Sampler(**dict(temperature=1.0) | options).probabilities(np.asarray(logits))


# The distribution --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),  # the squares, in proportion
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 3}, [1 / 7, 4 / 7, 0, 2 / 7]),  # 0 and 2 are equal: the smaller id is kept
        ({"top_k": 9}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_p": 1e-300}, [0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.74}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7]),
        ({"top_p": 1}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_k": 3, "top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),  # p of what k left: 4/7 < 0.6 <= 6/7
        ({"top_k": 3, "top_p": 0.55}, [0, 1, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),  # the temperature comes first
    ],
)
def test_sampler_worked_examples(options, expected):
    assert_same(probabilities(**options), expected, tolerance=1e-12)


def test_nucleus_ends_exactly_at_mass_p():
    p = np.array([0.25, 0.5, 0.25])
    assert nucleus(p, 0.5).tolist() == [False, True, False]
    assert nucleus(p, 0.5000001).tolist() == [True, True, False]
    assert nucleus(p, 0.75).tolist() == [True, True, False]
    assert nucleus(np.array([1.0]), 0.5).tolist() == [True]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "equal, mass, kept",
    [(10, 0.9, 9), (4, 0.5, 2), (3, 2 / 3, 2), (10, 0.3, 3), (7, 3 / 7, 3), (50_000, 0.9, 45_000)],
)
def test_nucleus_of_equal_logits_keeps_the_smallest_set(equal, mass, kept, dtype):
    """Nine times 0.1 is 0.8999999999999999 in floats, and still reaches 0.9."""
    found = probabilities(np.full(equal, -1.7, dtype), top_p=mass)
    assert (found > 0).tolist() == [True] * kept + [False] * (equal - kept)


@pytest.mark.parametrize("shift", [0, 5, -13, 30])
def test_nucleus_reaches_the_mass_despite_rounded_logits(shift):
    """The logarithms of 1/2, 1/4 and 1/4 are off by up to 1e-6 in float32, and the sum of the first
    two probabilities too. What is short by more than rounding does not reach the mass."""
    logits = (np.log(np.array([0.25, 0.5, 0.25])) + shift).astype(np.float32)
    assert (probabilities(logits, top_p=0.75) > 0).tolist() == [True, True, False]
    assert (probabilities(logits, top_p=0.75001) > 0).all()


def slow_probabilities(logits, temperature, top_k, top_p):
    """Everything sorted, one number at a time, in exact sums."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    top = max(logits)
    weight = {i: Fraction(math.exp((float(logits[i]) - float(top)) / temperature)) for i in ranked}
    if top_p is not None:
        total, reached, kept = sum(weight.values()), Fraction(0), []
        for i in ranked:
            kept.append(i)
            reached += weight[i]
            if reached >= Fraction(top_p) * total:
                break
        weight = {i: weight[i] for i in kept}
    total = sum(weight.values())
    return [float(weight[i] / total) if i in weight else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 30.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 40])
@pytest.mark.parametrize("top_p", [None, 0.013, 0.37, 0.91, 0.9997])
def test_probabilities_equal_the_literal_version(temperature, top_k, top_p):
    rng = np.random.default_rng(3)
    for size in (1, 7, 60):
        # Steps of a quarter: many ties, also at the edge of what is kept.
        logits = (np.rint(rng.standard_normal(size) * 8) / 4).astype(np.float32)
        found = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        expected = slow_probabilities(logits, temperature, top_k, top_p)
        assert found.dtype == np.float64 and found.shape == (size,)
        assert_same(found > 0, np.array(expected) > 0)
        assert_same(found, expected, tolerance=1e-10)


def test_top_k_keeps_exactly_the_k_largest():
    rng = np.random.default_rng(0)
    for size in (1, 2, 30):
        x = rng.integers(0, 4, size)
        for k in range(1, size + 1):
            expected = sorted(range(size), key=lambda i: (-x[i], i))[:k]
            assert np.flatnonzero(top_k_mask(x, k)).tolist() == sorted(expected)


@pytest.mark.parametrize("coldest", [5e-324, 1e-300, 1e-99, 1e-30])
def test_tiny_temperature_is_greedy(coldest):
    logits = np.array(
        [1e38, -3e38, 3e38, np.nextafter(np.float32(3e38), np.float32(0)), 0, 3e38], np.float32
    )
    expected = [0, 0, 0.5, 0, 0, 0.5]  # by chance among equals
    assert probabilities(logits, temperature=coldest).tolist() == expected
    assert probabilities(logits, temperature=coldest, top_k=1).tolist() == [0, 0, 1, 0, 0, 0]


def test_huge_temperature_is_uniform():
    logits = np.array([3e38, -3e38, 0, 7], np.float32)
    assert_same(probabilities(logits, temperature=1e300), [0.25] * 4, tolerance=1e-7)
    # ... but does not change which are the most likely.
    found = probabilities(logits, temperature=1e308, top_k=2)
    assert_same(found, [0.5, 0, 0, 0.5], tolerance=1e-7)


def test_excluded_tokens_are_never_drawn():
    logits = np.array([-np.inf, 0, -np.inf, 0])
    assert probabilities(logits, temperature=1e9).tolist() == [0, 0.5, 0, 0.5]
    assert probabilities(logits, top_k=3).tolist() == [0, 0.5, 0, 0.5]
    sampler = Sampler(1.0, seed=0)
    assert {sampler(logits) for _ in range(100)} == {1, 3}


# Drawing -----------------------------------------------------------------------------------------


def test_greedy_ties_go_to_the_lower_id():
    assert Sampler()(np.array([1, 5, 2, 5, 5], np.float32)) == 1
    assert isinstance(Sampler()(np.ones(3)), int) and isinstance(Sampler(1)(np.ones(3)), int)


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (0.249, 1), (0.25, 3), (1 - 2**-53, 3)])
def test_draw_by_hand(uniform, token):
    sampler = Sampler(1.0)
    sampler.uniform = lambda: uniform
    assert sampler.draw(np.array([0, 0.25, 0, 0.75, 0])) == token
    assert sampler.draw(np.array([0, 1, 0, 3, 0])) == token  # the sum need not be 1


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int64, np.uint64])
def test_options_of_any_number_type_are_converted_once(kind):
    """An unsigned 2 negated is 254, so as an index it would keep nearly everything."""
    expected = probabilities(np.arange(20.0), top_k=2, top_p=0.5, temperature=3)
    half = np.float16(0.5)
    found = Sampler(kind(3), kind(2), half, kind(100))
    assert_same(found.probabilities(np.arange(20.0)), expected)
    assert (type(found.temperature), type(found.top_k)) == (float, int)
    assert (type(found.top_p), type(found.seed)) == (float, int)


@pytest.mark.parametrize("option", [{"seed": 0}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_sampling_option_without_a_temperature_implies_temperature_1(option):
    assert Sampler(**option).temperature == 1 and Sampler().temperature == 0
    assert Sampler(0, **option).temperature == 0, "an explicit 0 stays greedy"


def test_huge_integers_are_options_too():
    assert Sampler(top_k=10**5000, seed=10**5000).probabilities(np.zeros(3)).tolist() == [1 / 3] * 3


def test_draw_frequencies_match_probabilities():
    logits = np.random.default_rng(4).standard_normal(12)
    sampler, draws = Sampler(0.8, top_k=9, top_p=0.95, seed=11), 8_000
    p = sampler.probabilities(logits)
    seen = np.bincount([sampler(logits) for _ in range(draws)], minlength=12)
    kept = p > 0
    assert 4 < kept.sum() < 9 and not seen[~kept].any()
    statistic = ((seen - p * draws)[kept] ** 2 / (p * draws)[kept]).sum()
    freedom = kept.sum() - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_seed_gives_the_same_tokens_on_every_machine():
    """Python's own stream, by the inverse of the running sum 1, 3, 6, 10, ... of 210."""

    def draws(sampler):
        logits = np.log(np.arange(1.0, 21.0))
        return [sampler(logits) for _ in range(50)]

    uniform = random.Random(7).random
    numbers = [uniform() for _ in range(50)]
    expected = [next(i for i in range(20) if (i + 1) * (i + 2) > 420 * u) for u in numbers]
    assert draws(Sampler(1.0, seed=7)) == draws(Sampler(1.0, seed=np.int64(7))) == expected
    assert draws(Sampler(1.0, seed=8)) != expected
    assert len({tuple(draws(Sampler(1.0))) for _ in range(3)}) == 3  # without a seed


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -0.1}, "temperature must be .*, got -0.1"),
        ({"temperature": math.nan}, "temperature must be .*, got nan"),
        ({"temperature": math.inf}, "temperature must be .*, got inf"),
        ({"temperature": "hot"}, "temperature must be .*, got 'hot'"),
        ({"temperature": True}, "temperature must be .*, got True"),
        ({"temperature": 10**400}, "temperature must be .*, got an integer of 1329 bits"),
        ({"top_k": np.True_}, "top_k must be .*, got "),
        ({"top_p": 10**5000}, "top_p must be .*, got an integer of"),
        ({"top_p": np.float32(1.5)}, "top_p must be .*, got "),
        ({"seed": np.int8(-1)}, "seed must be .*, got "),
        ({"seed": True}, "seed must be .*, got True"),
        ({"top_k": 0}, "top_k must be .*, got 0"),
        ({"top_k": 2.5}, "top_k must be .*, got 2.5"),
        ({"top_k": "2"}, "top_k must be .*, got '2'"),
        ({"top_p": 0}, "top_p must be .*, got 0"),
        ({"top_p": 1.01}, "top_p must be .*, got 1.01"),
        ({"top_p": math.nan}, "top_p must be .*, got nan"),
        ({"seed": -1}, "seed must be .*, got -1"),
        ({"seed": 1.5}, "seed must be .*, got 1.5"),
        ({"seed": "x"}, "seed must be .*, got 'x'"),
    ],
)
def test_bad_sampler_options_are_refused(options, words):
    with pytest.raises(MinitxError, match=words) as caught:
        Sampler(**options)
    assert " must be " in str(caught.value) and ", got " in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}])
@pytest.mark.parametrize("bad", [[0, math.nan, 9], [math.inf, 0, 0], [-math.inf] * 3])
def test_logits_that_are_not_finite_are_refused(options, bad):
    logits = np.array(bad, np.float32)
    for use in (Sampler(**options), Sampler(**options).probabilities, ops.argmax_token):
        with pytest.raises(MinitxError, match="The model's logit for token .* is (nan|inf|-inf)"):
            use(logits)


# The loop ----------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param, dtype=np.float64)


def without_cache(model, prompt, choose, limit):
    ids = list(prompt)
    for _ in range(limit):
        ids.append(choose(model(ids)[-1]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 50, "seed": 3}])
def test_autoregressive_loop_equals_decoding_without_cache(model, options):
    for prompt in ([5], [7, 250, 3, 3, 9]):
        found = list(decode(Autoregressive(), model, prompt, Sampler(**options), 30))
        assert found == without_cache(model, prompt, Sampler(**options), 30)
        assert len(set(found)) > 3, "a text that says something about the cache"


@pytest.mark.parametrize("lengths", [(4, 4, 4), (1, 7, 3)])
def test_batch_rows_equal_single_prompts(model, lengths):
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, 259, n).tolist() for n in lengths]
    options = [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 0.5, "top_p": 0.9, "seed": 5}]
    alone = [
        list(decode(Autoregressive(), model, p, Sampler(**o), 20)) for p, o in zip(prompts, options)
    ]
    steps = Autoregressive().batch(model, prompts, [Sampler(**o) for o in options], 20)
    assert [list(row) for row in zip(*steps)] == alone


def test_loop_runs_no_token_before_it_is_requested():
    spy = Spy(tiny_model(), [])
    tokens = decode(Autoregressive(), spy, [1, 2, 3], Sampler(), 10)
    assert spy.runs == []
    assert len(list(islice(tokens, 4))) == 4
    assert spy.runs == [(3,), (1,), (1,), (1,)]  # the prompt in one go; the last token not at all
    assert list(decode(Autoregressive(), spy, [1], Sampler(), 0)) == [] and len(spy.runs) == 4
    steps = Autoregressive().batch(spy, [[1, 2], [3]], [Sampler(), Sampler()], 10)
    assert len(list(islice(steps, 3))) == 3
    assert spy.runs[4:] == [(2, 2), (2, 1), (2, 1)]
