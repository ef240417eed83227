"""exact.py: each outcome of each draw once, with its exact probability; what cannot be enumerated
is refused in one sentence."""

import numpy as np
import pytest

from minitx.errors import MinitxError
from minitx.learn.exact import (
    ExactGenerator,
    NotEnumerable,
    NotNormalized,
    NotProbabilities,
    exact_distribution,
)


def check(run, expected):
    found = exact_distribution(run)
    assert set(found) == set(expected), f"other outcomes: {found}"
    for outcome, probability in expected.items():
        assert found[outcome] == pytest.approx(probability, abs=1e-12), f"{outcome}: {found}"


@pytest.mark.parametrize(
    "below",
    [
        lambda u: u < 0.3,
        lambda u: u <= 0.3,
        lambda u: 0.3 > u,
        lambda u: not u >= 0.3,
        lambda u: np.float64(0.3) > u,
        lambda u: not np.float64(0.3) < u,
        lambda u: u < np.float32(0.5) * np.float64(0.6),
        lambda u: u * 2 < 0.6,
        lambda u: np.float64(2) * u < 0.6,
        lambda u: u / 2 <= 0.15,
        lambda u: 1 - u > 0.7,
        lambda u: np.float64(1) - u > 0.7,
        lambda u: u + 1 < 1.3,
        lambda u: u - 1 < -0.7,
        lambda u: -0.3 < -1 * u,
    ],
)
def test_comparison_with_a_number_splits_the_probability(below):
    check(lambda rng: bool(below(rng.random())), {True: 0.3, False: 0.7})


def test_comparison_that_is_certain_has_one_outcome():
    assert exact_distribution(lambda rng: rng.random() < 1.5) == {True: 1.0}
    assert exact_distribution(lambda rng: rng.random() < 0) == {False: 1.0}
    assert exact_distribution(lambda rng: rng.random() < np.nan) == {False: 1.0}
    assert exact_distribution(lambda rng: rng.random() > np.nan) == {False: 1.0}
    assert exact_distribution(lambda rng: rng.random() == 0.5) == {False: 1.0}


def test_second_comparison_of_the_same_number_knows_the_first():
    def run(rng):
        u = rng.random()
        return "low" if u < 0.5 else "middle" if u < 0.8 else "high"

    check(run, {"low": 0.5, "middle": 0.3, "high": 0.2})
    check(lambda rng: (lambda u: (u < 0.2, u < 0.5))(rng.random()),
        {(True, True): 0.2, (False, True): 0.3, (False, False): 0.5})  # fmt: skip


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, p: int(rng.choice(3, p=p)),
        lambda rng, p: int(rng.choice([0, 1, 2], p=p)),
        lambda rng, p: int(np.searchsorted(np.cumsum(p), rng.random())),
        lambda rng, p: int((np.cumsum(p) < rng.random()).sum()),
        lambda rng, p: int((rng.random() > np.cumsum(p)).sum()),
    ],
)
def test_ways_to_draw_from_a_distribution_are_the_same(draw):
    check(lambda rng: draw(rng, [0.2, 0.3, 0.5]), {0: 0.2, 1: 0.3, 2: 0.5})


def test_choice_never_takes_what_has_no_probability():
    check(lambda rng: int(rng.choice(3, p=[0.5, 0, 0.5])), {0: 0.5, 2: 0.5})
    check(lambda rng: str(rng.choice(["a", "b"])), {"a": 0.5, "b": 0.5})


def test_array_of_numbers_is_independent():
    check(
        lambda rng: tuple((rng.random(2) < np.array([0.1, 0.5])).tolist()),
        {(True, True): 0.05, (True, False): 0.05, (False, True): 0.45, (False, False): 0.45},
    )


def test_depth_of_the_tree_may_depend_on_the_draws():
    """A geometric distribution, cut off after 3."""

    def run(rng):
        n = 0
        while n < 3 and rng.random() < 0.5:
            n += 1
        return n

    check(run, {0: 0.5, 1: 0.25, 2: 0.125, 3: 0.125})


def test_distribution_agrees_with_numpys_generator():
    def run(rng):
        return int(rng.choice(2, p=[0.3, 0.7])) + int(rng.random() < 0.25)

    rng = np.random.default_rng(0)
    counts = np.bincount([run(rng) for _ in range(4000)], minlength=3) / 4000
    exact = exact_distribution(run)
    assert max(abs(counts[i] - exact[i]) for i in range(3)) < 0.03


@pytest.mark.parametrize(
    "run, words",
    [
        (lambda rng: rng.integers(3), "rng.integers is not available"),
        (lambda rng: float(rng.random()), "was used as a number"),
        (lambda rng: int(3 * rng.random()), "was used as a number"),
        (lambda rng: bool(rng.random()), "was used as a number"),
        (lambda rng: np.log(rng.random()), "np.log cannot be applied"),
        (lambda rng: rng.random() < rng.random(), "two results"),
        (lambda rng: rng.random() < "half", "combined with 'half'"),
        (lambda rng: rng.choice(3, size=2), "leave size out"),
        (lambda rng: [0 for _ in iter(lambda: rng.random() < 0.5, None)], "endless loop"),
        (lambda rng: sum(rng.random() < 0.5 for _ in range(11)), "endless loop"),
    ],
)
def test_what_cannot_be_enumerated_is_refused_in_a_sentence(run, words):
    with pytest.raises(NotEnumerable, match=words) as caught:
        exact_distribution(run)
    assert isinstance(caught.value, MinitxError) and "\n" not in str(caught.value)


def test_other_random_numbers_are_noticed():
    coins = iter([0.1, 0.9] * 100)

    def run(rng):
        return next(coins) < 0.5 and rng.random() < 0.5 and rng.random() < 0.5

    with pytest.raises(NotEnumerable, match="no other random numbers"):
        exact_distribution(run)


@pytest.mark.parametrize(
    "p, error",
    [
        ([0.5, 0.4], NotNormalized),
        ([0.5, 0.5 + 1e-6], NotNormalized),
        ([1.5, -0.5], NotProbabilities),
        ([np.nan, 1], NotProbabilities),
        ([1.0], NotProbabilities),
    ],
)
def test_choice_refuses_what_numpy_refuses(p, error):
    with pytest.raises(ValueError):
        np.random.default_rng(0).choice(2, p=p)
    with pytest.raises(error):
        ExactGenerator().choice(2, p=p)


def test_choice_accepts_probabilities_that_rounding_keeps_from_1():
    p = np.array([0.1] * 10)
    check(lambda rng: int(rng.choice(10, p=p)), dict.fromkeys(range(10), 0.1))
