"""Exercises 16, 17, 18, 22 and 24 do what the library does, in float64."""

from configparser import ConfigParser
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
import pytest

import minitx
from minitx.learn import ex16_speculative, ex22_delta, ex24_rollback
from minitx.learn.check import judge
from minitx.learn.exact import exact_distribution
from minitx.learn.exercise import exercises, find_exercise
from minitx.learn.workbook import SETTINGS
from minitx.shared.draft_and_verify import accept_or_resample
from minitx.skip.big_little import first_far
from minitx.skip.delta import DeltaLinear
from minitx.technique import apply


class AsSampler:
    """A library's sampler that draws with an enumerating generator."""

    def __init__(self, rng):
        self.rng = rng

    def draw(self, p):
        return int(self.rng.choice(len(p), p=p))


@pytest.mark.parametrize("x", range(4))
def test_accept_has_the_distribution_of_the_librarys_rule(x):
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), 2), rng.dirichlet(np.ones(4), 1)
    ours = exact_distribution(lambda rng: ex16_speculative.accept(p, q, [x], rng)[0])
    theirs = exact_distribution(lambda rng: accept_or_resample(p[0], q[0], x, AsSampler(rng)))
    assert set(ours) == set(theirs)
    assert all(ours[token] == pytest.approx(theirs[token], abs=1e-12) for token in ours)


def test_accept_keeps_the_targets_distribution():
    """Averaged over what the draft proposes, the first token is distributed as p[0]."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(5), 3), rng.dirichlet(np.ones(5), 2)

    def run(rng):
        drafted = [int(rng.choice(5, p=row)) for row in q]
        return ex16_speculative.accept(p, q, drafted, rng)[0]

    found = exact_distribution(run)
    np.testing.assert_allclose([found[x] for x in range(5)], p[0], atol=1e-12)


def test_roll_back_keeps_what_the_library_keeps():
    rng = np.random.default_rng(2)
    for _ in range(50):
        logits, drafted = 3 * rng.standard_normal((6, 5)), rng.integers(0, 5, 5)
        drafted[:3] = logits[:3].argmax(1)
        P = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        kept, token = ex24_rollback.roll_back(P, drafted, 2.0)
        assert kept == first_far(logits, drafted, 2.0)
        assert token == logits[kept].argmax()


def test_roll_back_in_the_model_writes_the_librarys_text():
    lm, answer = minitx.load("stories"), find_exercise(24).solution
    library = apply(lm, {"big_little": {"fallback": 0.0, "rollback": 5.0}})
    found, _, _ = ex24_rollback.write(lm, answer, 5.0)
    assert found == list(library.tokens(ex24_rollback.PROMPT, ex24_rollback.NEW))


def test_accept_with_a_real_generator_writes_greedy_text_of_the_target():
    lm, answer = minitx.load("stories"), find_exercise(16).solution
    found, passes, _ = ex16_speculative.write(lm, answer, 0)
    assert found == list(lm.tokens(ex16_speculative.PROMPT, ex16_speculative.NEW))
    assert passes < len(found) / 2


def test_delta_product_equals_the_librarys():
    """Whose threshold is relative to the rms of the input: here 1."""
    rng = np.random.default_rng(3)
    x = 0.9 ** np.arange(20)[:, None] * rng.standard_normal((20, 8))
    x = np.cumsum(x, 0)
    x /= np.sqrt((x**2).mean(1, keepdims=True))
    W, states = rng.standard_normal((8, 5)), []
    product = DeltaLinear(W, None, 0.3, 512)
    for t, row in enumerate(x):
        states.append(product.token(row, states, t))
    y, sent = ex22_delta.delta_product(x, W, 0.3)
    np.testing.assert_allclose(y, [state.y for state in states], atol=1e-12)
    assert 0.1 < sent[1:].mean() < 0.9


def test_delta_product_does_not_drift():
    """Each column that was sent is within the threshold of the truth, at every token."""
    x = np.cumsum(np.full((500, 3), 0.01), 0)
    y, _ = ex22_delta.delta_product(x, np.eye(3), 0.1)
    assert abs(y - x).max() <= 0.1 + 1e-12


# Exercise 17 -------------------------------------------------------------------------------------


def verdict_on(test):
    exercise = find_exercise(17)
    return judge(exercise, SimpleNamespace(test_attention=test))


def test_test_with_one_example_is_told_which_broken_ones_escape():
    def one_query(attention):
        q, k = np.array([[[2.0, 0, 0, 0]]]), np.eye(4)[None, :2]
        assert abs(attention(q, k, np.array([[[10.0], [0.0]]])) - 7.31).max() < 0.01

    verdict = verdict_on(one_query)
    assert verdict.kind == "mistake" and len(verdict.mistakes) == 3
    assert any("key heads in turn" in sentence for sentence in verdict.mistakes)
    assert "(H, K, T, S) = (1, 1, 1, 2)" in verdict.message


def test_test_that_compares_every_digit_is_called_too_strict():
    def exact(attention):
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal(shape) for shape in ((2, 3, 4), (2, 5, 4), (2, 5, 4)))
        assert (attention(q, k, v) == find_exercise(3).module.attention(q, k, v)).all()

    assert "too strict" in verdict_on(exact).message


def test_test_that_returns_its_result_is_told_to_assert():
    def returns(attention):
        return bool(attention(*np.ones((3, 1, 2, 4))).shape == (1, 2, 4))

    verdict = verdict_on(returns)
    assert len(verdict.mistakes) == 8 and "returns True" in verdict.message


GROUPS = "K divides H"  # not in the line of the call, which messages quote


@pytest.mark.parametrize(
    "test, words",
    [
        (lambda attention: None, "never calls"),
        (lambda attention: attention(*np.ones((3, 2, 4))), "no array of floats with 3 axes"),
        (lambda attention: attention(*np.ones((3, 1, 2, 4), int)), "no array of floats"),
        (lambda attention: attention(np.ones((3, 2, 4)), *np.ones((2, 2, 2, 4))), GROUPS),
        (lambda attention: 1 / 0, "refuses a right attention"),
    ],
)
def test_test_that_cannot_be_used_is_told_why(test, words):
    verdict = verdict_on(test)
    assert not verdict.passed and words in verdict.message


def test_pytest_takes_no_exercise_for_a_file_of_tests():
    """ex17_test_the_test.py would match pytest's default pattern *_test.py."""
    settings = ConfigParser()
    settings.read_string(SETTINGS)
    patterns = settings["pytest"]["python_files"].split()
    assert not [e.stem for e in exercises() for p in patterns if fnmatch(f"{e.stem}.py", p)]
