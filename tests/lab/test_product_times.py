"""``python -m minitx.lab.product_times``: that what is timed skips its share, and the report."""

import numpy as np
import pytest

from minitx import ledger
from minitx.lab import product_times as module
from minitx.lab.product_times import PRODUCTS, SHARES, Times, main, numbers


def work(run) -> int:
    with ledger.counting(module.Linear(np.ones((1, 1)))) as counts:
        run()
    return counts.total().multiply_adds


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_skips_its_share_of_the_multiply_adds(name):
    """16 x 40, three quarters skipped. perforate, zero_skip, ...: 4 of 16 rows of 40. FFNs: 10 of
    40 neurons, of which cats still needs all gates. The rest is comparisons and predictors."""
    x = numbers(1, 16)
    extra = {"teal": 16, "zero_skip": 16, "delta": 32, "perforate": 0}
    extra |= {"cats": 40, "contextual_sparsity": 4 * (16 + 40)}
    left = {"cats": 16 * 40 + 2 * 16 * 10, "contextual_sparsity": 2 * 16 * 10}
    skipping, dense = PRODUCTS[name](x, 40, 0.75)
    assert work(skipping) == left.get(name, 4 * 40) + extra[name], "multiply-adds, skipping"
    matrices = {"cats": 3, "contextual_sparsity": 2}.get(name, 1)
    assert work(dense) == matrices * 16 * 40, "multiply-adds, dense"


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_share_and_several_tokens_run(name):
    for share in SHARES:
        for run in PRODUCTS[name](numbers(3, 8), 12, share):
            run()


def test_report_names_the_break_even():
    ten = [1.0] * len(SHARES)
    found = Times("x", [2.0] * 5 + [0.5] * (len(SHARES) - 5), ten)
    assert found.break_even == "Skipping is faster from 75% on."
    assert "0.50x" in str(found) and "2,000,000.0 us" in str(found)
    assert "slower at every" in Times("x", ten, ten).break_even


def test_slow_products_are_repeated_less_often(monkeypatch):
    monkeypatch.setattr(module, "LONGEST", -1.0)
    calls = []
    assert len(module.fastest(lambda: calls.append(1), lambda: calls.append(2))) == 2
    assert calls == [1, 2], "in turn"


def test_command_prints_times_and_refuses_bad_words(capsys, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", -1.0)
    main(["perforate", "32", "8", "--tokens", "2"])
    assert "32 x 8, float32, 2 tokens" in capsys.readouterr().out
    for words in (["cats", "0", "8"], ["x", "8", "8"], ["cats", "8"], ["teal", "8", "99999"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == "" and "error: " in err, words


def test_command_may_be_stopped(capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measure", stopped)
    with pytest.raises(SystemExit) as found:
        main(["cats", "8", "8"])
    assert found.value.code == 130 and capsys.readouterr().err == "stopped.\n"
