"""The quality monitor: every n-th token is checked, and the tokens after it use another version."""

import numpy as np
import pytest
from same import assert_same

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.shared.quality_monitor import (
    Levels,
    Monitored,
    monitored,
    pieces,
    relative_error,
)
from minitx.state import Layer
from minitx.tree import Part, part


@part
class Doubled(Part):
    """2 x, where x is rounded to a multiple of ``step``; exact with step 0."""

    step: float

    def __call__(self, x, layer):
        assert len(x) == len(layer.tokens), "the tokens of the layer are not those of x"
        return 2 * (np.rint(x / self.step) * self.step if self.step else x)


EXACT, FINE, ROUGH = Doubled(0), Doubled(0.5), Doubled(4.0)


def with_monitor(every=2, limit=0.1):
    return Monitored((EXACT, FINE, ROUGH), every, limit)


def column(*numbers):
    return np.array(numbers, float)[:, None]


def test_rough_version_that_fails_a_check_gives_way_to_the_finer_one():
    # every=2 checks positions 1, 3, 5. All tokens are 1.1: rough gives 0 (error 1), fine gives 2.0
    # instead of 2.2 (error 0.09, within the limit of 0.1 but not below half of it).
    x = column(1.1, 1.1, 1.1, 1.1, 1.1)
    with counting(monitor := with_monitor()) as counts:
        y = monitor(x, Layer.once(5))
    # position 0 rough; 1 checked: exact, and one level down; 2 fine; 3 checked; 4 fine
    assert_same(y[:, 0], [0, 2.2, 2.0, 2.2, 2.0], "other versions ran", tolerance=1e-7)
    assert counts.events == {"quality checks": 2, "checks above the limit": 1}


def test_level_rises_again_only_well_below_the_limit():
    levels = Levels(top=2)
    seen = []
    for position, error in enumerate([0.2, 0.2, 0.2, 0.06, 0.05, 0.1, 0.0, 0.0]):
        levels.note(position, error, limit=0.1)
        seen.append(levels.level)
    # above the limit: one down, not below 0; up to half of it: one up, not above the top
    assert seen == [1, 0, 0, 0, 1, 1, 2, 2], "errors between limit / 2 and limit change nothing"


def test_exact_version_is_left_when_the_next_one_is_good_enough():
    # 8.0 is a multiple of both steps, so nothing is lost from the second check on.
    x = column(1.1, 1.1, 1.1, 0.2, 8.0, 8.0, 8.0, 8.0, 3.0)
    layer = Layer.once(9)
    y = with_monitor()(x, layer)
    # checks: 1 rough fails -> fine; 3 fine fails (0 instead of 0.4) -> exact; 5 fine would do ->
    # fine; 7 fine does -> rough; 8 runs rough: 3.0 becomes 4.0
    assert_same(y[:, 0], [0, 2.2, 2.0, 0.4, 16, 16, 16, 16, 8], tolerance=1e-7)


def test_exact_version_stays_while_the_next_one_is_not_good_enough():
    x = column(*[0.2] * 9)  # rough and fine give 0 instead of 0.4
    y = with_monitor()(x, Layer.once(9))
    # checks: 1 rough fails -> fine; 3 fine fails -> exact; 5 and 7: fine would fail again
    assert_same(y[:, 0], [0, 0.4, 0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4], tolerance=1e-7)


def numbers(n):
    return np.random.default_rng(0).uniform(-9, 9, (n, 3))


def run(x, sizes):
    monitor, layer, found, a = with_monitor(3, 0.2), Layer(len(x)), [], 0
    for n in sizes:
        found.append(monitor(x[a : a + n], layer.take(n)))
        a += n
    return np.concatenate(found)


@pytest.mark.parametrize("sizes", [(1,) * 20, (7, 1, 12), (2, 2, 16)])
def test_one_pass_equals_chunks(sizes):
    x = numbers(20)
    assert_same(run(x, sizes), run(x, (20,)), "decisions depend on the chunks")


def test_rewind_takes_decisions_back():
    x, monitor, layer = numbers(20), with_monitor(3, 0.2), Layer(40)
    first = monitor(x, layer.take(20))
    layer.rewind(5)
    again = monitor(x[5:], layer.take(15))
    assert_same(first[5:], again, "a decision after the rewind position survived")


def test_decisions_go_by_position_when_tokens_are_missing():
    # The same tokens at other positions: those that skip the layer do not count as every n-th.
    positions = np.array([0, 2, 3, 7, 8])
    assert list(pieces(positions, 4)) == [
        (slice(0, 2), False),
        (slice(2, 3), True),
        (slice(3, 4), True),
        (slice(4, 5), False),
    ]


def test_batch_without_cache_runs_row_by_row():
    x = numbers(20).reshape(2, 10, 3)
    y = with_monitor(3, 0.2)(x, Layer.once(10))
    for b in range(2):
        alone = with_monitor(3, 0.2)(x[b], Layer.once(10))
        assert_same(y[b], alone, f"row {b} differs from the row alone")
    with pytest.raises(MinitxError, match="quality monitor.*batch"):
        with_monitor()(x, Layer(10).take(10))


def test_relative_error_of_zeros():
    zero, one = np.zeros(2), np.ones(2)
    assert relative_error(zero, zero) == 0
    assert relative_error(one, zero) == np.inf
    assert relative_error(zero, one) == 1


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_result_that_is_not_finite_is_above_any_limit(number):
    found = np.array([1.0, number])
    assert relative_error(found, np.ones(2)) == np.inf, "an approximate version could overflow"
    assert relative_error(found, found) == np.inf


def test_no_monitor_is_the_most_approximate_version():
    assert monitored(EXACT, [FINE, ROUGH], 0, 0.1) is ROUGH
    assert monitored(EXACT, [FINE, ROUGH], 2, 0.1).versions == (EXACT, FINE, ROUGH)
