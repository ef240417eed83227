"""``minitx frontier attention``: attention mass, tuning, costs and timing."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from qkv import random_qkv, run
from test_bench import Ticking
from test_compare import CONFIG, END, story_lm
from tiny import END as TINY_END
from tiny import TOKENIZER, tiny_lm

import minitx
from minitx import ops
from minitx.build import random_model
from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab.compare import log_softmax
from minitx.lab.frontier import attention_report, attention_timing
from minitx.lab.frontier.attention import Grid, chains, checked, compare_attention
from minitx.lab.frontier.attention_baselines import BASELINES, BestKeys, NewestKeys, RandomKeys
from minitx.lab.frontier.attention_mass import KeyTotals, MeasuredSelector
from minitx.lab.frontier.attention_methods import METHODS, first_guess
from minitx.lab.frontier.attention_published import PUBLISHED
from minitx.lab.frontier.knobs import Knob, chosen_methods, tune
from minitx.lm import LM
from minitx.model import Attend, Rope
from minitx.shared.sparse_attention import SparseAttention, Visible
from minitx.state import Layer, Tokens
from minitx.technique import names, swap
from minitx.text import Text
from minitx.tree import Part, part

METHODS_HERE = ("oracle", "predictive_attention", "window", "random")
PLAN = Grid(
    shares=(1 / 2, 1 / 5),
    methods=METHODS_HERE,
    chains=2,
    tokens=60,
    contexts=(16, 400),
    rounds=2,
)


@pytest.fixture(scope="module")
def found():
    return compare_attention(story_lm(), PLAN, bar=False)


def test_methods_are_the_six_techniques_and_the_baselines():
    six = {"a3", "elsa", "dota", "perforate_keys", "predictive_attention", "sparse_memory"}
    assert {m.name for m in METHODS} == six | set(BASELINES)
    assert six <= set(names())


def test_perforate_keys_reaches_its_shares():
    """Its strides are integers, so the shares have steps: it comes close, from either side."""
    grid = replace(PLAN, methods=("perforate_keys",), shares=(0.5, 0.25), tokens=256)
    half, quarter = compare_attention(story_lm(), grid, bar=False).points
    assert abs(half.calibrated - 0.5) < 0.08 and abs(quarter.calibrated - 0.25) < 0.03
    assert 1 < int(half.setting.removeprefix("stride=")) < int(quarter.setting[len("stride=") :])


# Attention mass ----------------------------------------------------------------------------------


def totals_of(selector, sizes=(40,), floor=0.0, seed=1, **options):
    """The totals after all queries were fed in chunks of these sizes."""
    totals = KeyTotals()
    q, k, v = random_qkv(seed, S=40)
    measured = MeasuredSelector(selector, 0.5, floor, totals, **options)
    q, k, v = (x[:, : sum(sizes)] for x in (q, k, v))
    found = run(SparseAttention(measured, 0.5, floor), q, k, v, sizes)
    plain = run(SparseAttention(selector, 0.5, floor), q, k, v, sizes)
    np.testing.assert_array_equal(found, plain, "measuring changes the output")
    return totals


@part
class AllKeys(Part):
    """Keeps all keys, but keeps_all is False, so it is called."""

    def keeps_all(self, S):
        return False

    def remember(self, k, layer):
        return ()

    def __call__(self, q, k, known, visible):
        kept = np.ones((2, 2, visible.T, visible.S), bool)
        return visible.hide(kept, False)


@pytest.mark.parametrize("selector", [AllKeys(), BestKeys(40), BestKeys(17), NewestKeys(39)])
def test_mass_of_all_keys_is_1_for_every_query(selector):
    """Also for queries that see so few keys that the selector is not called."""
    totals = totals_of(selector, (1,) * 17)
    totals.add_dense(17, 4)
    assert totals.kept == totals.seen == 4 * 17 * 18 // 2 and totals.rows == 4 * 17
    assert totals.mass == pytest.approx(totals.rows) and totals.best == pytest.approx(totals.rows)


def test_mass_of_all_keys_in_a_prompt_is_1_for_every_query():
    totals = totals_of(AllKeys())
    assert totals.kept == totals.seen == 4 * 40 * 41 // 2 and totals.rows == 4 * 40
    assert totals.mass == pytest.approx(totals.rows) and totals.best == pytest.approx(totals.rows)


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("selector", [BestKeys(5), NewestKeys(5), RandomKeys(5, 2)])
def test_mass_equals_a_loop_over_queries(selector, floor):
    q, k, _ = random_qkv(1, S=40)
    totals = totals_of(selector, floor=floor)
    mass = best = kept = 0
    for h in range(4):
        for i in range(40):
            row = slice(i, i + 1)
            mine = selector(q[:, row], k[:, : i + 1], (), Visible(1, i + 1))[h // 2, h % 2, 0]
            p = np.exp(0.5 * (q[h, i] @ k[h // 2, : i + 1].T))
            p /= p.sum()
            mine = mine & (p >= floor * p[mine].max())
            mass += p[mine].sum()
            best += sum(sorted(p, reverse=True)[: mine.sum()])
            kept += mine.sum()
    assert totals.kept == kept
    assert totals.mass == pytest.approx(mass) and totals.best == pytest.approx(best)


def test_mass_of_the_oracle_is_the_best_and_others_have_less():
    baselines = BestKeys(5), NewestKeys(5), RandomKeys(5, 2)
    oracle, window, random = (totals_of(selector) for selector in baselines)
    assert oracle.mass == pytest.approx(oracle.best)
    assert oracle.kept == window.kept == random.kept
    assert oracle.best == pytest.approx(window.best)
    assert max(window.mass, random.mass) < 0.8 * oracle.mass


def test_mass_is_the_same_in_a_prompt_chunks_and_single_tokens():
    whole = totals_of(RandomKeys(5, 2))
    for sizes in ((1,) * 40, (30, 1, 9)):
        parts = totals_of(RandomKeys(5, 2), sizes)
        parts.add_dense(40, 4)
        assert (parts.seen, parts.kept, parts.rows) == (whole.seen, whole.kept, whole.rows)
        assert parts.mass == pytest.approx(whole.mass)
    counted = totals_of(RandomKeys(5, 2), mass=False)
    assert (counted.seen, counted.kept, counted.mass) == (whole.seen, whole.kept, 0)


# Tuning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125])
@pytest.mark.parametrize(
    "knob, kept",
    [
        (Knob("M", 1 / 256, 8, start=1.2), lambda x: 0.6 * np.tanh(1.5 * x)),
        (Knob("p", 1 / 64, 64, start=0.25, falling=True), lambda x: 1 / (1 + 2 * x) ** 0.7),
        (Knob("share", 0.001, 1, start=1.0), lambda x: x),
        (Knob("K", 1, 4096, keys=True), lambda x: min(1, x / 300)),
    ],
)
def test_tune_reaches_the_share(knob, kept, share):
    asked = []

    def measure(value):
        asked.append(value)
        return kept(value)

    value, reached = tune(knob, share, first_guess(knob, share, 512), measure, {})
    assert abs(reached - share) <= 0.02 * share and reached == kept(value)
    assert len(asked) <= 7 and knob.low <= min(asked) and max(asked) <= knob.high


def test_tune_of_a_number_of_keys_is_right_at_once():
    """Each query keeps r keys, or all if it sees fewer: the share follows from r."""
    for T, share in ((512, 1 / 8), (300, 1 / 2), (100, 0.9)):
        n = np.arange(1, T + 1)
        knob = Knob("r", 1, 4096, keys=True)
        value, _ = tune(
            knob,
            share,
            first_guess(knob, share, T),
            lambda r, n=n: np.minimum(r, n).sum() / n.sum(),
            known := {},
        )
        assert len(known) == 1 and type(value) is int


def test_tune_gives_the_nearest_value_for_a_share_out_of_reach():
    value, reached = tune(Knob("M", 1 / 256, 8), 1 / 2, 1 / 2, lambda x: min(x, 0.3), known := {})
    assert reached == 0.3 and value >= 0.3 and len(known) <= 10
    value, reached = tune(
        Knob("K", 1, 64, keys=True), 1 / 50, 1, lambda x: 0.015 if x < 5 else 0.03, {}
    )
    assert (value < 5) == (reached == 0.015) and reached in (0.015, 0.03)


def test_tune_measures_no_value_twice():
    knob, known = Knob("x", 0.001, 4), {}
    asked = []

    def measure(x):
        asked.append(x)
        return 0.6 * x**0.4

    for share in (0.5, 0.25, 0.125, 0.25):
        _, reached = tune(knob, share, share, measure, known)
        assert abs(reached - share) <= 0.02 * share
    assert len(asked) == len(set(asked)) == len(known) <= 10


def test_knob_that_is_a_number_of_keys_grows_with_the_context():
    by_name = {method.name: method for method in METHODS}
    assert by_name["oracle"].at(33, 1 / 8, 4096) == 512
    assert by_name["sparse_memory"].at(33, 1 / 4, 2) == 1
    assert by_name["predictive_attention"].at(0.125, 1 / 8, 4096) == 0.125


def test_methods_are_chosen_by_name_in_the_order_of_the_table():
    assert [m.name for m in chosen_methods(METHODS, ["random", "predictive-attention"])] == [
        "predictive_attention",
        "random",
    ]
    with pytest.raises(MinitxError, match="no method 'best'; expected one of oracle, "):
        chosen_methods(METHODS, ["best"])


# Chains ------------------------------------------------------------------------------------------


def test_chains_are_consecutive_stories():
    lm = story_lm()
    plan = checked(lm, Grid(tokens=250))
    told = chains(lm.tokenizer, "evaluation", plan.grade, plan.tokens)
    first, second = next(told), next(told)
    for chain in (first, second):
        assert len(chain.ids) == 251 and len(chain.kinds) == 250 and chain.ids[0] == END
        assert chain.ids.count(END) >= 2  # before each story
        assert max(chain.kinds) > 0 and 0 < chain.nats
    assert first.ids != second.ids
    assert next(chains(lm.tokenizer, "evaluation", plan.grade, plan.tokens)) == first
    other = next(chains(lm.tokenizer, "calibration", plan.grade, plan.tokens))
    assert other.ids != first.ids
    # a chain that ends within its first story has the nats of the pieces until there
    short = next(chains(lm.tokenizer, "evaluation", plan.grade, 20))
    assert short.ids == first.ids[:21] and short.nats < first.nats


# The comparison ----------------------------------------------------------------------------------


def test_comparison_has_every_method_at_every_share(found):
    assert [(p.method, p.share) for p in found.points] == [
        (name, share) for name in METHODS_HERE for share in PLAN.shares
    ]
    for p in found.points:
        q = p.quality
        assert abs(q.kept - p.share) < 0.1 * p.share and abs(p.calibrated - q.kept) < 0.02
        assert 0 < q.mass <= q.best + 1e-6 <= 1 + 1e-6
        assert [speed.context for speed in p.speeds] == [16, 400]
        for speed in p.speeds:
            assert abs(speed.kept - p.share) < 0.07 and speed.seconds > 0
        assert q.report.tokens == found.dense.report.tokens
        assert q.report.floor == found.dense.report.floor
    assert found.dense.kept == found.dense.mass == 1


def test_comparison_ranks_oracle_technique_random(found):
    mass = {(p.method, p.share): p.quality.mass for p in found.points}
    for share in PLAN.shares:
        oracle = next(p for p in found.points if (p.method, p.share) == ("oracle", share))
        assert oracle.quality.mass == pytest.approx(oracle.quality.best)
        assert mass["oracle", share] > mass["predictive_attention", share] - 0.02
        assert mass["predictive_attention", share] > mass["random", share]
    assert mass["oracle", 1 / 2] > mass["oracle", 1 / 5]


def test_comparison_costs_are_attention_alone_for_the_last_token(found):
    L, H, K, d, S = CONFIG.layers, CONFIG.heads, CONFIG.kv_heads, CONFIG.head_width, PLAN.tokens
    assert found.dense.cost.multiply_adds == L * H * 2 * S * d
    assert found.dense.cost.cache_bytes == L * K * 2 * S * d * 4
    assert found.dense.cost.weight_bytes == 0
    for p in found.points:
        name, _, value = p.setting.partition("=")
        predicted = S * d * (p.method in ("oracle", "predictive_attention"))
        r = int(value) if name == "r" else round(float(value) * S + 0.49)
        assert p.quality.cost.multiply_adds == L * H * (predicted + 2 * r * d)


def test_comparison_with_every_key_kept_has_the_figures_of_dense():
    lm = story_lm()
    plan = replace(PLAN, shares=(0.9999,), methods=("oracle",), contexts=(16,))
    found = compare_attention(lm, plan, bar=False)
    (point,) = found.points
    assert point.setting == "r=60" and point.quality.kept == 1
    assert point.quality.mass == pytest.approx(1) and point.quality.cost == found.dense.cost
    assert point.quality.report == found.dense.report


def test_report_prints_every_method_and_share(found):
    text = str(found)
    lines = text.splitlines()
    answers = sum(found.dense.report.answers.values())
    assert f"2 chains of 60 tokens of evaluation stories, grade full, {answers} answers" in text
    for name in METHODS_HERE:
        assert sum(line.strip().startswith(name) for line in lines) >= 4
    assert "1/2" in lines and "1/5" in lines
    assert "never up to 400" in text or "faster from" in text
    assert "BERT-base, SQuAD 1.1" in text and "none about transformers" in text
    assert max(map(len, lines)) < 160 and not any(line != line.rstrip() for line in lines[:20])


def test_json_has_every_figure(found):
    said = json.loads(json.dumps(found.as_dict()))
    assert said["plan"]["tokens"] == 60 and said["shape"]["head_width"] == CONFIG.head_width
    assert said["dense"]["cost"]["multiply_adds"] > 0 and 0 <= said["dense"]["accuracy"] <= 1
    point = said["points"][0]
    assert {"method", "share", "setting", "calibrated", "kept", "mass", "best"} <= set(point)
    assert {"accuracy", "multiply_adds_to_dense", "bytes_to_dense", "crossover"} <= set(point)
    assert point["report"]["by_hops"] and point["report"]["gap"] is not None
    assert [s["context"] for s in point["speeds"]] == [16, 400]
    assert point["speeds"][0]["ratio"] > 0
    assert [row["technique"] for row in said["published"]] == [row.technique for row in PUBLISHED]


def test_published_rows_pair_shares_with_changes():
    known = {method.name for method in METHODS}
    for row in PUBLISHED:
        assert row.technique in known and len(row.kept) == len(row.change)
        assert all(0 < kept < 1 for kept in row.kept) and all(abs(c) < 0.1 for c in row.change)


def test_chart_places_points_by_their_values():
    drawn = attention_report.chart({"one": [(0, 0), (1, 1)], "two": [(1, 1), (0.5, 0)]}, "x")
    lines = drawn.splitlines()
    assert lines[0].startswith("     1 |") and lines[0].rstrip().endswith("a")
    assert lines[14].startswith("     0 |a") and lines[14].endswith("b")
    assert lines[17] == "a one, b two" and lines[16].endswith("1 x")
    assert lines[-1] == "x=1, y=1: a one, b two", "points that coincide are listed"


# Timing ------------------------------------------------------------------------------------------


def speed(context, ratio):
    return attention_timing.Speed(context, 1.0, ratio, 0.5)


def test_crossover_is_where_the_method_is_faster_from_then_on():
    def at(*ratios):
        return attention_timing.crossover([speed(2**i, r) for i, r in enumerate(ratios)])

    assert at(0.5, 0.9, 1.1, 2) == 4 and at(2, 3) == 1 and at(2, 0.5, 3) == 4
    assert at(0.5, 1) is None and at(2, 3, 0.9) is None


@pytest.mark.parametrize("width", [8, 4])
def test_extended_rope_continues_the_tables(width):
    short = Rope(*ops.rope_tables(width, 20, 100.0, np.float32))
    long = attention_timing.extended_rope(short, 300)
    cos, sin = ops.rope_tables(width, 300, 100.0, np.float32)
    np.testing.assert_allclose(long.cos, cos, atol=5e-5)
    np.testing.assert_allclose(long.sin, sin, atol=5e-5)
    assert long.cos.dtype == long.sin.dtype == np.float32
    assert attention_timing.extended_rope(short, 20) is None
    assert attention_timing.extended_rope(Attend(0.5), 300) is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_runner_attends_to_all_earlier_tokens(family):
    """One token after a filled cache, again and again, equals the last row of one pass."""
    lm = tiny_lm(family)
    x = attention_timing.attention_inputs(lm, 1, [np.arange(20), np.arange(25)], 40)
    attn = attention_timing.attention(lm, 1, 40)
    runner = attention_timing.Runner(attn, x, 40)
    for number in (1, 0, 2):
        assert runner.step(number) > 0
        token = runner.token(number)
        whole = attn(np.concatenate([x[:39], token]), Layer(40, remember=False).take(40))
        runner.layer.rewind(39)
        np.testing.assert_allclose(
            attn(token, runner.layer.take(1))[0], whole[-1], rtol=1e-4, atol=1e-4
        )


def test_runner_step_with_a_coarse_clock_takes_more_than_zero(monkeypatch):
    """Two readings per run: 1 to 7 read 0 s, and the 8th, at the end of the fourth run, 0.25 s."""
    lm = tiny_lm()
    x = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)
    runner = attention_timing.Runner(attention_timing.attention(lm, 1, 20), x, 20)
    clock = Ticking(every=8)
    monkeypatch.setattr(attention_timing.time, "perf_counter", clock)
    rewound, rewind = [], runner.layer.rewind
    monkeypatch.setattr(runner.layer, "rewind", lambda to: rewound.append(to) or rewind(to))
    spent = runner.step(0)
    assert clock.looks == 8, f"expected 4 runs of two readings each, got {clock.looks / 2:g}"
    assert spent == 0.25 / 4, f"expected one tick over 4 runs, got {spent} s"
    assert rewound == [19] * 4, f"expected a rewind to 19 before each run, got {rewound}"


def test_speed_within_a_clock_tick_counts_as_a_tick(monkeypatch):
    """Every step takes the same time, so nothing is left for attention: a ratio of 1, not 0 / 0."""
    monkeypatch.setattr(attention_timing, "TICK", 0.5)
    monkeypatch.setattr(attention_timing.Runner, "step", lambda self, number: 2.0)
    texts = [np.arange(20)]
    found = attention_timing.measure_speeds(
        tiny_lm(), lambda *_: tiny_lm(), {("dense", 1): (METHODS[0], 5)}, texts, [16], 2, int
    )
    ((speed,),) = found.values()
    assert (speed.seconds, speed.dense_seconds) == (0.5, 0.5), f"expected one tick, got {speed}"
    assert speed.ratio == 1, f"equal times, but the ratio is {speed.ratio}"


def test_attention_inputs_are_what_the_block_reads():
    lm = tiny_lm()
    texts = [np.arange(20), np.arange(30, 45)]
    x = attention_timing.attention_inputs(lm, 0, texts, 60)
    assert x.shape == (60, 16) and x.dtype == np.float32
    np.testing.assert_array_equal(x[:20], lm.model.embed(texts[0], None))
    np.testing.assert_array_equal(x[20:35], lm.model.embed(texts[1], None))
    np.testing.assert_array_equal(x[35:], x[:25])
    later = attention_timing.attention_inputs(lm, 1, texts, 35)
    assert abs(later - x[:35]).max() > 0.01


def test_no_attention_leaves_norm_projections_and_rotation():
    lm = tiny_lm()
    bare = swap(lm, Attend, attention_timing.NoAttention)
    attn = attention_timing.attention(bare, 0, 20)
    x = np.ones((3, 16), np.float32)
    q = attn.rope(attn.qkv(attn.norm(x))[0].reshape(3, 2, 8).swapaxes(0, 1), Tokens(slice(0, 3)))
    expected = attn.out(q.swapaxes(0, 1).reshape(3, 16))
    np.testing.assert_allclose(attn(x, Layer(3).take(3)), expected, rtol=1e-6)


def test_time_in_turn_gives_medians_without_the_first_round():
    times = {"a": [9.0, 1.0, 5.0, 2.0], "b": [9.0, 3.0, 3.0, 4.0]}
    order = []

    def step(key):
        def run(number):
            order.append((number, key))
            return times[key][number]

        return run

    assert attention_timing.time_in_turn({key: step(key) for key in times}, 3) == {"a": 2, "b": 3}
    assert order == [(n, key) for n in range(4) for key in "ab"]


# Refusals, the command, and the picture ----------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(shares=(0.5, 1.0)), "share of keys must be a number above 0 and below 1; got 1."),
        (dict(shares=(0.0,)), "share of keys must be a number above 0 and below 1; got 0."),
        (dict(tokens=301), "tokens must be 2 to the model's context 300; got 301."),
        (dict(tokens=1), "2 to the model's context 300; got 1."),
        (dict(methods=("oracle", "none")), "There is no method 'none'"),
        (dict(grade="hard"), "rade"),
    ],
)
def test_bad_plan_is_refused(change, message):
    with pytest.raises(MinitxError, match=message):
        compare_attention(story_lm(), replace(PLAN, **change), bar=False)


def test_model_without_a_tokenizer_is_refused():
    with pytest.raises(MinitxError, match="no tokenizer; load it with tokenizer=PATH."):
        compare_attention(LM(random_model(CONFIG, 3)), PLAN, bar=False)


@pytest.fixture
def loads(monkeypatch):
    monkeypatch.setattr(minitx, "load", lambda name, tokenizer=None: story_lm())


FEW = ["--chains", "1", "--tokens", "30", "--rounds", "1", "--methods", "window,random"]


def test_command_prints_a_table_or_json(loads, capsys):
    assert main(["frontier", "attention", *FEW, "--share", "1/3"]) == 0
    out = capsys.readouterr().out
    assert "1 chains of 30 tokens" in out and "\n1/3\n  window " in out
    assert main(["frontier", "attention", *FEW, "--share", "0.5,1/3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [p["share"] for p in said["points"]] == [0.5, 1 / 3] * 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--share", "1/0"], "--share: invalid"),
        (["--share", "half"], "--share: invalid"),
        (["--share", "2"], "share of keys must be a number above 0 and below 1; got 2."),
        (["--methods", "elza"], "There is no method 'elza'"),
        (["--chains", "0"], "expected a number from 1 to 1000000000, got 0"),
        (["--tokens", "9000"], "tokens must be 2 to the model's context 300; got 9000."),
        (["--fold-norms"], "takes no techniques"),
    ],
)
def test_command_refuses_in_one_sentence(loads, capsys, words, message):
    assert main(["frontier", "attention", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and len(said.err.splitlines()) == 1 and not said.out


def test_picture_without_matplotlib_is_refused_before_measuring(
    loads, capsys, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    monkeypatch.setattr("minitx.lab.frontier.attention.measure", None)  # and nothing is measured
    path = tmp_path / "a.png"
    assert main(["frontier", "attention", *FEW, "--png", str(path)]) == 2
    assert capsys.readouterr().err.strip().endswith("install it with: pip install matplotlib")
    assert not list(tmp_path.iterdir())


def test_picture_names_every_method(found, tmp_path):
    attention_report.picture(found, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text("utf-8")
    assert all(f">{p.method}</text>" in picture for p in found.points), (
        "a method is missing in the legend"
    )
    assert len(list(tmp_path.iterdir())) == 1


# Any text ----------------------------------------------------------------------------------------

POND = Text("The balance of once and twice: a fence, a pond, and a stone. " * 20, "pond.txt")


def test_text_is_tuned_on_its_first_window_and_measured_on_the_next():
    plan = replace(PLAN, text=POND, tokens=40, methods=("window",), shares=(1 / 4,))
    lm = tiny_lm()
    found = compare_attention(lm, plan, bar=False)
    ids = TOKENIZER.encode(POND.content, special=False)
    nats = 0.0
    for a in (40, 80):  # window 0 is for tuning; the start token stands before each
        targets = ids[a : a + 40]
        logits = lm.logits([TINY_END, *targets[:-1]])
        nats -= log_softmax(logits)[np.arange(40), targets].sum()
    assert found.dense.report.nats == pytest.approx(nats, rel=1e-6)
    assert found.dense.report.tokens == 80 and found.plan.chains == 2
    text = str(found)
    assert "reads 2 windows of 40 tokens of pond.txt" in text and "perplexity" in text
    assert "entropy" not in text and "hop" not in text
    assert found.as_dict()["plan"]["text"] == "pond.txt"


def test_text_too_short_for_two_windows_is_refused():
    plan = replace(PLAN, text=Text("a pond", "a.txt"), tokens=40)
    with pytest.raises(MinitxError, match="a.txt has 5 tokens; expected at least 81"):
        compare_attention(tiny_lm(), plan, bar=False)
