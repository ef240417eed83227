"""``minitx bench``: its arithmetic by hand, its output, what it refuses; the import time; and that
what ops.py does for speed alone changes no result."""

import json
import subprocess
import sys

import numpy as np
import pytest
from differences import check, draw

from minitx import fast, ledger, ops
from minitx.build import random_model
from minitx.cli import main
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.fast import THREAD_VARIABLES
from minitx.lab import bench
from minitx.lab.bench_report import as_text
from minitx.lm import LM
from minitx.model import Linear

TINY = dict(family="llama", vocab_size=20, width=8, layers=2, heads=2, kv_heads=1, head_width=4)
TINY |= dict(hidden=12, context=40, rope_width=4, tied=True)
PLAN = bench.Repeats(decode=6, prefill=10, rounds=3, least=0.0)


class OtherFramework:
    """Stands in for transformers: minitx itself, with one way to decode that is twice the work."""

    versions = {"other": "1"}
    off = 0.0

    def __init__(self, model):
        self.model, self.lm = model, LM(model)

    def ways_to_decode(self):
        def once(first, count):
            return list(self.lm.tokens([first], count))

        return {"twice": lambda *a: once(*a) and once(*a), "once": once}

    def prefill(self, ids):
        return self.model.next_logits(ids)

    def logits(self, ids):
        return self.model(ids) + self.off


# The figures ---------------------------------------------------------------------------------


def test_bytes_per_token_by_hand():
    block = 8 + 64 + 32 + 32 + 64 + 8 + 96 + 96 + 96  # norm, q, k, v, out, norm, gate, up, down
    tied = 2 * block + 8 + 160 + 8  # blocks, last norm, head, one row of the embedding
    assert bench.bytes_per_token(random_model(Config(**TINY))) == 4 * tied
    untied = random_model(Config(**TINY | dict(tied=False)))
    assert bench.bytes_per_token(untied) == 4 * tied  # the whole embedding is never read
    assert bench.bytes_per_token(random_model(Config(**TINY), dtype=np.float64)) == 8 * tied

    gpt2 = TINY | dict(family="gpt2", rope_width=0, kv_heads=2, activation="relu")
    block = 16 + 3 * 64 + 64 + 16 + 96 + 96  # norms have a bias
    row = 8  # of the embedding, and another of the positions
    assert bench.bytes_per_token(random_model(Config(**gpt2))) == 4 * (
        2 * block + 16 + 160 + 2 * row
    )


def test_bench_shapes_match_the_documentation():
    sizes = [(c.width, c.layers, c.heads, c.kv_heads, c.hidden, c.vocab_size) for c in bench.SHAPES]
    assert sizes == [
        (64, 5, 8, 4, 172, 512),
        (192, 8, 6, 6, 512, 1024),
        (288, 6, 6, 6, 768, 32000),
    ]
    for plan in (bench.FULL, bench.QUICK):
        assert max(1 + plan.decode, plan.prefill) <= min(c.context for c in bench.SHAPES)


def test_speeds_and_ratios_by_hand():
    seconds = {"a": [1.0, 2.0, 4.0], "x": [4.0, 4.0, 4.0], "y": [3.0, 3.0, 8.0]}
    found = bench.compared(100, seconds, "a", ["x", "y"])
    assert found["minitx_tokens_per_second"] == 50
    assert found["transformers_way"] == "y"  # median 3 against 4
    assert found["transformers_tokens_per_second"] == pytest.approx(100 / 3)
    assert found["ratio"] == {"median": 2.0, "lowest": 1.5, "highest": 3.0}
    assert bench.compared(100, seconds, "a", []) == {"minitx_tokens_per_second": 50}


def test_bandwidth_fraction_by_hand():
    found = bench.limit(read=600, size=100, decode=[2.0, 3.0, 6.0], product=[0.25, 0.25, 0.5])
    assert found["minitx_bytes_per_second"] == 200
    assert found["product_bytes_per_second"] == 400
    assert found["fraction"] == {"median": 0.5, "lowest": 0.5, "highest": 0.75}


def test_share_of_products_by_hand():
    found = bench.share(tokens=10, decode=[2.0, 4.0, 5.0], products=[0.1, 0.3, 0.25])
    assert found == {"median": 0.5, "lowest": 0.5, "highest": 0.75}


@pytest.mark.parametrize("tied", [True, False])
def test_products_alone_are_those_of_one_token(tied):
    model = random_model(Config(**TINY | dict(tied=tied)))
    products = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 96) + 160  # as above, without norms and embedding
    with ledger.counting(model) as counts:
        bench.products_alone(model)()
    assert counts.total() == ledger.Entry(products, 4 * products)


def test_bandwidth_matrix_has_the_requested_bytes():
    for size in (1_000_000, 15_000_000):
        x, w = bench.factors(size)
        assert abs(w.nbytes / size - 1) < 0.01 and (x @ w).shape == (1, 4096)
        assert w.dtype == x.dtype == np.float32
    assert bench.factors(10)[1].shape == (1, 4096)


class Ticking:
    """A clock that moves on by one tick at every ``every``-th look at it, so that what is measured
    between two looks mostly takes no time at all."""

    def __init__(self, every, tick=0.25):
        self.every, self.tick, self.looks = every, tick, 0

    def __call__(self):
        self.looks += 1
        return self.looks // self.every * self.tick


def test_timed_divides_by_the_number_of_runs():
    runs = []
    spent = bench.timed(lambda: runs.append(sum(range(20_000))), least=0.05)
    assert len(runs) > 1 and 0.05 <= spent * len(runs) < 0.5


def test_timed_least_zero_on_a_clock_that_moves_runs_once(monkeypatch):
    monkeypatch.setattr(bench.time, "process_time", Ticking(every=1))
    runs = []
    spent = bench.timed(lambda: runs.append(1), least=0.0)
    assert runs == [1], f"one run is enough, but the job ran {len(runs)} times"
    assert spent == 0.25, f"expected one tick of 0.25 s, got {spent}"


def test_timed_clock_in_ticks_repeats_until_it_has_moved(monkeypatch):
    """Looks 1 to 7 read 0, look 8 reads 0.25 s: the first before the first run, one after each of
    7 runs, so a run takes 0.25 / 7 s."""
    monkeypatch.setattr(bench.time, "process_time", Ticking(every=8))
    runs = []
    spent = bench.timed(lambda: runs.append(1), least=0.0)
    assert len(runs) == 7, f"the clock moved after 7 runs, but the job ran {len(runs)} times"
    assert spent == 0.25 / 7, f"expected one tick over 7 runs, {0.25 / 7:.4f} s, got {spent}"


def test_elapsed_clock_in_ticks_waits_for_the_first():
    spent = bench.elapsed(Ticking(every=5), began=0.0)
    assert spent == 0.25, f"expected the first tick after 0, at 0.25 s, got {spent}"


def test_bench_clock_in_ticks_gives_finite_speeds(monkeypatch):
    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(bench.time, name, Ticking(every=4))
    monkeypatch.setattr(bench, "BEYOND_CACHES", 1_000_000)
    found = bench.measure_all((Config(**TINY),), PLAN, OtherFramework, bar=False)
    (shape,) = found["shapes"]
    for name, seconds in shape["seconds"].items():
        assert min(seconds) > 0, f"{name} took no time at all: {seconds}"
    figures = [found["machine"]["processor_share"], *shape["products_alone"].values()]
    for side in ("decode", "prefill"):
        figures += [shape[side]["minitx_tokens_per_second"], *shape[side]["ratio"].values()]
    for limit in shape["limit"].values():
        figures += [limit["minitx_bytes_per_second"], *limit["fraction"].values()]
    assert np.isfinite(figures).all() and min(figures) > 0, f"a figure is not finite: {figures}"


# The run -------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """One tiny shape, in a process that seems to have one thread, without transformers."""
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(bench, "SHAPES", (Config(**TINY),))
    monkeypatch.setattr(bench, "QUICK", PLAN)
    monkeypatch.setattr(bench, "BEYOND_CACHES", 1_000_000)
    monkeypatch.setattr(bench, "find_rival", lambda: (None, "no torch here"))


def test_bench_command_prints_json(tiny, capsys):
    assert main(["bench", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == {"decode": 6, "prefill": 10, "rounds": 3, "least": 0.0}
    assert set(found["machine"]["threads"].values()) == {"1"} and found["machine"]["cpu"]
    assert found["versions"]["numpy"] == np.__version__ and found["versions"]["blas"]
    assert found["not_compared"] == "no torch here"
    (shape,) = found["shapes"]
    assert shape["config"]["width"] == 8 and shape["agreement"] is None
    assert shape["decode"]["minitx_tokens_per_second"] > 0 and "ratio" not in shape["decode"]
    assert all(len(times) == 3 for times in shape["seconds"].values())


def test_bench_command_prints_tables(tiny, capsys):
    assert main(["bench", "--quick"]) == 0
    text = capsys.readouterr().out
    assert "8 x 2, 20" in text and "6 greedy tokens" in text and "10 tokens in one call" in text
    assert "Not compared with transformers: no torch here." in text


def test_bench_compares_with_another_framework():
    found = bench.measure_all((Config(**TINY),), PLAN, OtherFramework, bar=False) | {
        "not_compared": None
    }
    assert found["versions"]["other"] == "1"
    (shape,) = found["shapes"]
    assert shape["agreement"] == {"logits_relative_difference": 0.0, "same_greedy_tokens": 6}
    assert shape["decode"]["transformers_way"].startswith("transformers decode, ")
    assert shape["decode"]["ratio"]["median"] > 0
    text = as_text(found)
    assert "at least 6 of 6 greedy tokens match" in text and "other 1" in text


def test_ratio_is_to_the_faster_way_per_round():
    seconds = {"ours": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [3.0, 4.0, 4.0]}
    found = bench.compared(100, seconds, "ours", ["slow", "fast"])
    assert found["transformers_way"] == "fast"
    assert found["minitx_tokens_per_second"] == 50 and found["transformers_tokens_per_second"] == 25
    assert found["ratio"]["median"] == 2  # of 3/1, 4/2, 4/4


def test_bench_refuses_different_logits():
    class Wrong(OtherFramework):
        off = 0.01

    with pytest.raises(MinitxError, match="At 8 x 2 the logits .* differ by .*cannot be compared"):
        bench.measure_all((Config(**TINY),), PLAN, Wrong, bar=False)
    with pytest.raises(MinitxError, match="differ by nan"):
        bench.agree(np.array([1.0, np.nan]), np.ones(2), Config(**TINY))


def test_bench_reruns_itself_with_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    calls = []

    def run(command, env):
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as status:
        bench.bench(as_json=True, quick=True)
    ((command, env),) = calls
    assert status.value.code == 7  # what went wrong there is not hidden here
    assert command == [sys.executable, "-m", "minitx", "bench", "--json", "--quick"]
    assert [env[name] for name in THREAD_VARIABLES] == ["1"] * 5


def test_report_notes_busy_machine_and_missing_package(tiny):
    found = bench.measure_all(bench.SHAPES, PLAN, None, bar=False) | {"not_compared": "none"}
    quiet = {"load": 0.1, "processor_share": 1.0}
    for change, told in (({}, False), ({"load": None}, False), ({"load": 2.0}, True)):
        found["machine"] |= quiet | change
        assert ("Other programs were running" in as_text(found)) == told
    found["machine"] |= quiet | {"processor_share": 0.5}
    assert "(load 0.1 at the start, 50% of a CPU for this one" in as_text(found)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # what an import of it then finds
    monkeypatch.delitem(sys.modules, "minitx.lab.bench_transformers", raising=False)
    rival, reason = bench.find_rival()
    assert rival is None and "torch" in reason and "minitx[reference]" in reason


# Importing -----------------------------------------------------------------------------------

IMPORT = """
import sys, time
import numpy
before = set(sys.modules)
began = time.process_time()
import minitx
print(time.process_time() - began)
print(*set(sys.modules) - before)
"""


def test_importing_minitx_adds_little_to_numpy():
    runs = []
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True)
        seconds, modules = out.stdout.decode().splitlines()
        runs.append(float(seconds))
    assert min(runs) < 0.1
    late = {"tqdm", "unicodedata", "json", "minitx.cli", "minitx.checkpoints", "minitx.training"}
    assert not late & set(modules.split())


# Fast and the same ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (6,), (3, 6), (2, 1, 6)])
@pytest.mark.parametrize("large", [0, 10**9])
def test_logits_equal_products_with_every_row(monkeypatch, shape, large):
    monkeypatch.setattr(fast, "LARGE", large)
    x, table = draw(*shape), draw(9, 6, seed=1)
    found = ops.logits(x, table)
    assert found.shape == (*shape[:-1], 9) and np.allclose(found, x @ table.T, rtol=1e-13)
    single = ops.logits(x.astype(np.float32), table.astype(np.float32))
    assert single.dtype == np.float32 and np.allclose(single, found, rtol=1e-4, atol=1e-5)
    check(ops.logits, x, table)


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (6,), (2, 1, 6), (3, 6), (2, 2, 6), (5, 6)])
@pytest.mark.parametrize("large", [0, 10**9])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_product_in_every_case(monkeypatch, shape, large, order, bias):
    for name, value in dict(LARGE=large, FEW=2, MANY=4).items():
        monkeypatch.setattr(fast, name, value)
    x, w = draw(*shape), np.asarray(draw(6, 9, seed=1), order=order)
    b = draw(9, seed=2) if bias else None
    expected = x @ w + (b if bias else 0)
    linear = Linear(w, b)
    with ledger.counting(linear) as counts:
        found = linear(x)
    assert counts.total() == ledger.Entry(x.size * 9, w.nbytes)
    assert found.shape == (*shape[:-1], 9) and np.allclose(found, expected, rtol=1e-13)
    single = ops.linear(*(None if a is None else a.astype(np.float32) for a in (x, w, b)))
    assert single.dtype == np.float32 and np.allclose(single, expected, rtol=1e-4, atol=1e-5)
    check(ops.linear, x, w, *([b] if bias else []))


def test_masks_are_cached_for_short_blocks_only():
    fast.block_mask.cache_clear()
    k = v = draw(1, 200, 4)
    for T in range(1, 200):
        q = draw(1, T, 4)
        ops.attention(q, k, v, 0.5)
        ops.attention(q, k[:, :T], v[:, :T], 0.5)
    assert fast.block_mask.cache_info().currsize <= fast.ROWS
