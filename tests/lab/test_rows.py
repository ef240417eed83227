"""``python -m minitx.lab.rows``: what is timed, the ratios by hand, and what is refused."""

import json

import pytest
from tiny import FAMILIES

from minitx import ledger
from minitx.build import random_model
from minitx.errors import MinitxError
from minitx.fast import THREAD_VARIABLES
from minitx.lab import rows as module
from minitx.lab.rows import KNOWN, Pass, Plan, Price, as_text, main, prices

TINY = FAMILIES["llama"]


@pytest.fixture(autouse=True)
def in_one_thread(monkeypatch):
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")


@pytest.mark.parametrize("batch", [False, True])
def test_a_pass_computes_the_logits_of_its_rows_after_the_same_cache(batch):
    model = random_model(TINY)
    one = Pass(model, 3, Plan(cached=5, batch=batch))
    with ledger.counting(model) as counts:
        one.seconds(0)
    assert counts.total("head").multiply_adds == 3 * TINY.width * TINY.vocab_size, "three rows"
    assert one.state.position == 5, "rewound, so that the next pass sees the same cache"
    assert one.state.batch == ((3,) if batch else ()), "rows are tokens, or sequences"
    assert one.seconds(0) > 0


def test_ratios_are_those_within_a_round():
    """Five rows over one row: 6 / 2, 4 / 4 and 2 / 1."""
    price = Price(TINY, {1: [2.0, 4.0, 1.0], 5: [6.0, 4.0, 2.0]})
    assert price.ratio(5) == {"median": 2, "lowest": 1, "highest": 3}
    text = as_text([price], Plan(rows=(1, 5), rounds=3))
    assert "2e+03 ms" in text and "2.00x" in text and "1.00-3.00" in text
    assert "5 rows" in text


def test_every_number_of_rows_is_timed_in_every_round():
    found = prices([TINY], Plan(rows=(1, 2), cached=3, rounds=2, least=0.0), bar=False)
    assert [len(seconds) for seconds in found[0].seconds.values()] == [2, 2]
    assert list(found[0].seconds) == [1, 2]


def test_shapes_are_those_of_bench_and_of_models_that_are_shipped():
    import minitx

    stories = minitx.load("stories").model.config
    same = ("width", "layers", "heads", "kv_heads", "head_width", "hidden", "vocab_size")
    for name in same:
        assert getattr(KNOWN["128x8"], name) == getattr(stories, name), name
    assert list(KNOWN) == ["64x5", "128x8", "192x8", "288x6", "576x30"]


def test_command_prints_a_table_or_json_and_refuses_bad_words(monkeypatch, capsys):
    monkeypatch.setattr(module, "KNOWN", {"tiny": TINY})
    words = ["tiny", "--rows", "1,2", "--cached", "3", "--rounds", "1"]
    main(words)
    assert "2 rows" in capsys.readouterr().out
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["rows"] == [1, 2] and found["shapes"][0]["ratio"]["1"]["median"] == 1
    for wrong, said in (
        (["other"], "There is no shape 'other'; expected one of tiny."),
        (["tiny", "--rows", "1,x"], "rows must be an integer, 1 to 512; got 'x'."),
        (["tiny", "--rows", "0"], "rows must be an integer, 1 to 512; got '0'."),
        (["tiny", "--cached", "0"], "cached must be an integer"),
        (["tiny", "--rounds", "0"], "rounds must be an integer"),
        (["tiny", "--cached", "60"], "together must be at most the context"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == "" and said in err, (wrong, err)


def test_command_runs_again_where_blas_may_use_several_threads(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "run_again", calls.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    main(["64x5", "--rows", "1,2"])
    assert calls == [["minitx.lab.rows", "64x5", "--rows", "1,2"]]


def test_plan_that_does_not_fit_is_refused():
    with pytest.raises(MinitxError, match="together must be at most the context of"):
        prices([TINY], Plan(rows=(1,), cached=TINY.context), bar=False)
