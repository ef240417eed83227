"""``minitx compare`` and ``minitx sweep``: their figures against counts and sums by hand, on small
models and on techniques that are made up to be wrong in a known way."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from test_bench import Ticking

import minitx
from minitx import technique as module
from minitx.build import random_model
from minitx.cli import main
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.lab import sweep as sweeps
from minitx.lab.compare import Workload, compare, continuation, log_softmax
from minitx.lm import LM
from minitx.model import FFN, TiedHead
from minitx.technique import swap, technique
from minitx.training.data import end_id, story_tokenizer
from minitx.tree import Part, map_weights, part, weights

TOKENIZER = story_tokenizer()
END = end_id(TOKENIZER)
CONFIG = Config(
    "llama", len(TOKENIZER), 16, 2, 2, 1, 8, 24, 300, rope_width=8, tied=True, eos=(END,), bos=END
)
PLAN = Workload(stories=4, prompts=2, rounds=1)


def story_lm(**changes) -> LM:
    model = random_model(replace(CONFIG, **changes), 3)
    return LM(model, TOKENIZER)


@part
class Left(Part):
    """An FFN that is never called."""

    inner: Part

    def __call__(self, x, layer):
        return np.zeros_like(x)


@part
class Shifted(Part):
    """A head whose scores for one token are raised."""

    inner: Part
    token: int
    by: float

    def __call__(self, x):
        y = self.inner(x)
        y[..., self.token] += np.float32(self.by)
        return y

    def argmax(self, x):
        return int(self(x).argmax())


def test_compare_same_model_is_identical():
    lm = story_lm()
    found = compare(lm, lm, "nothing", PLAN, bar=False)
    assert found.identical and found.multiply_adds == 1
    assert found.reading.divergence == 0 and found.reading.agreement == 1
    assert found.generation.same == found.generation.prompts == 2
    assert "nothing: identical. The argmax agrees at 100.0 %" in str(
        found
    ) and "2 of 2 greedy continuations" in str(found)
    assert found.reading.dense == found.reading.changed


def test_compare_reports_memory_of_both_models():
    lm = story_lm()
    half = replace(lm, model=map_weights(lm.model, lambda w: w.astype(np.float16)))
    found = compare(lm, half, "", PLAN, bar=False)
    numbers = sum(w.size for w in weights(lm).values())
    tables = 2 * CONFIG.context * CONFIG.rope_width
    assert found.dense_size.weights == 4 * (numbers + tables)
    assert found.size.weights == 2 * numbers + 4 * tables
    per_token = CONFIG.layers * 2 * CONFIG.kv_heads * CONFIG.head_width
    assert found.dense_size.cache == 4 * per_token
    assert f"{found.size.weights / 1e6:.2f} MB of arrays ({found.memory:.2f}x)" in str(found)


def test_compare_counts_drop_with_skipped_work():
    lm = story_lm()
    changed = swap(lm, FFN, Left)
    found = compare(lm, changed, "", PLAN, bar=False)
    assert not found.identical
    before, after = found.generation.dense, found.generation.changed
    assert "blocks.ffn" not in after and after["head"] == before["head"]
    assert after["blocks.attn"].multiply_adds == before["blocks.attn"].multiply_adds
    # 32 tokens of the prompt are read for 48 new ones, of which the last is not read again.
    ffn = 2 * 3 * CONFIG.width * CONFIG.hidden
    assert before["blocks.ffn"].multiply_adds == round(ffn * (32 + 47) / 48)
    total = sum(e.multiply_adds for e in before.values())
    assert found.multiply_adds == pytest.approx(1 - before["blocks.ffn"].multiply_adds / total)
    assert "approximate" in str(found) and "blocks.ffn" in str(found)


def test_divergence_and_agreement_by_hand():
    """One token's score is raised by c: KL = log(1 - p + p e^c) - c p, with p its dense chance."""
    lm = story_lm()
    token, c = TOKENIZER.encode(" park")[-1], 3.0
    changed = swap(lm, TiedHead, lambda head: Shifted(head, token, c))
    found = compare(lm, changed, "", PLAN, bar=False)
    from itertools import islice

    from minitx.lab.evaluate import encode
    from minitx.training.stories import stories

    expected, same, count = 0.0, 0, 0
    for story in encode(TOKENIZER, islice(stories("evaluation", "full", 0), PLAN.stories)):
        logits = lm.logits(story.ids[:-1])
        p = np.exp(log_softmax(logits))[:, token]
        expected += (np.log(1 - p + p * np.exp(c)) - c * p).sum()
        raised = logits.copy()
        raised[:, token] += c
        same += (raised.argmax(-1) == logits.argmax(-1)).sum()
        count += len(logits)
    assert found.reading.divergence == pytest.approx(expected / count, rel=1e-4)
    assert found.reading.agreement == same / count < 1
    assert found.reading.tokens == count


def test_log_softmax_is_a_distribution():
    z = np.float32([[1e4, 0, -1e4], [1, 2, 3]])
    found = log_softmax(z)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1)
    np.testing.assert_allclose(found[1], [1, 2, 3] - np.log(np.exp([1, 2, 3]).sum()))


def test_compare_without_tokenizer_is_refused():
    lm = LM(random_model(CONFIG, 3))
    with pytest.raises(MinitxError, match="no tokenizer, so it cannot read stories"):
        compare(lm, lm, "", PLAN, bar=False)


def test_compare_times_every_continuation_of_both_models(monkeypatch):
    """Each continuation of 48 tokens takes the dense model 1 s and the changed one 2 s."""
    dense, changed, seconds = story_lm(), story_lm(), [0]

    def slow(lm, prompt):
        seconds[0] += 1 if lm is dense else 2
        return continuation(lm, prompt)

    monkeypatch.setattr("minitx.lab.compare.continuation", slow)
    monkeypatch.setattr("time.process_time", lambda: seconds[0])
    generation = compare(dense, changed, "", replace(PLAN, rounds=3), bar=False).generation
    assert generation.speed == (0.5, 0.5, 0.5), f"expected half the speed, got {generation.speed}"
    speed = generation.dense_tokens_per_second
    assert speed == pytest.approx(48), f"expected 2 x 48 tokens in 2 x 1 s, got {speed} a second"


@pytest.mark.parametrize("every", [1, 5])
def test_compare_clock_in_ticks_gives_finite_speeds(monkeypatch, every):
    """The clock moves at every look, or at every fifth one only; each run of both models takes
    equally many looks, so that the ratio of their speeds is near 1 and never 1 over 0."""
    monkeypatch.setattr("time.process_time", Ticking(every))
    lm = story_lm()
    generation = compare(lm, lm, "", replace(PLAN, rounds=4), bar=False).generation
    assert np.isfinite([*generation.speed, generation.dense_tokens_per_second]).all(), (
        f"a speed is not finite: {generation.speed}, {generation.dense_tokens_per_second}"
    )
    if every == 1:  # a run takes one tick of 0.25 s, in which both beginnings get 48 new tokens
        assert generation.speed == (1, 1, 1), f"equal times, but the ratios are {generation.speed}"
        speed = generation.dense_tokens_per_second
        assert speed == pytest.approx(2 * 48 / 0.25), f"expected 384 tokens a second, got {speed}"


# Sweeps ------------------------------------------------------------------------------------------


@pytest.fixture
def leave_out(monkeypatch):
    """A technique that leaves out the FFN of the first n blocks."""
    module.techniques()  # all are imported: one that is later would be forgotten with the copy
    monkeypatch.setattr(module, "REGISTRY", dict(module.REGISTRY))

    def leave_out(lm, *, n: int = 1):
        return module.wrap(lm, "ffn", lambda ffn, i: Left(ffn) if i < n else ffn)

    technique(level="ffn", exact=False, neutral={"n": 0})(leave_out)
    known = module.names() | {"leave_out": "minitx.technique"}
    monkeypatch.setattr(module, "names", lambda: known)
    return module.find("leave_out")


def test_sweep_settings_are_all_combinations(leave_out):
    assert sweeps.settings(leave_out, ["n=0,2"]) == [{"n": 0}, {"n": 2}]
    assert sweeps.settings(leave_out, []) == [{}]
    for words, message in (
        (["n"], "Expected option=value .*, got 'n'"),
        (["n="], "Expected option=value .*, got 'n='"),
        (["n=x"], "leave_out: n must be an integer; got 'x'"),
        (["m=1"], "no option 'm'"),
        (["n=1", "n=2"], "given twice"),
    ):
        with pytest.raises(MinitxError, match=message):
            sweeps.settings(leave_out, words)


def test_sweep_compares_each_setting(leave_out):
    lm = story_lm()
    points = sweeps.sweep(lm, leave_out, [{"n": 0}, {"n": 1}, {"n": 2}], PLAN, bar=False)
    costs = [p.cost for p in points]
    assert costs[0] == 1 and costs[0] - costs[1] == pytest.approx(costs[1] - costs[2])
    assert points[0].added_loss == 0 and points[1].added_loss != 0
    text = sweeps.as_text(points)
    rows = text.partition("\n\n")[0].splitlines()[-4:]
    assert [line.split()[0] for line in rows] == ["dense", "n=0", "n=1", "n=2"]
    drawn = text.split("\n\n")[1]
    assert "a n=0, b n=1, c n=2" in drawn
    columns = {
        mark: next(line.index(mark, 10) for line in drawn.splitlines()[:-2] if mark in line[10:])
        for mark in "abc"
    }
    assert columns["c"] < columns["b"] < columns["a"]
    found = sweeps.as_dict(points)
    assert [entry["options"] for entry in found] == [{"n": 0}, {"n": 1}, {"n": 2}]
    json.dumps(found)


def test_sweep_picture_labels_each_setting(leave_out, tmp_path):
    points = sweeps.sweep(story_lm(), leave_out, [{"n": 0}, {"n": 1}], PLAN, bar=False)
    sweeps.picture(points, "x", tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text("utf-8")
    assert all(f">{name}</text>" in picture for name in ("dense", "n=0", "n=1"))


def test_sweep_chart_lists_settings_in_one_place(leave_out):
    points = sweeps.sweep(story_lm(), leave_out, [{"n": 0}, {"n": 1}], PLAN, bar=False)
    assert sweeps.chart(points).endswith("x=1.000x, y=+0.0000: a n=0, D dense")


def test_sweep_maps_right_answers_by_setting_and_hops(leave_out, tmp_path):
    points = sweeps.sweep(story_lm(), leave_out, [{"n": 0}, {"n": 1}], PLAN, bar=False)
    heat = sweeps.heat(points)
    assert [*heat.rows] == ["dense", "n=0", "n=1"] and "2 hops" in heat.columns
    changed = points[1].comparison.reading.changed
    assert heat.values[2] == [*changed.by_hops.values()]
    assert str(heat) in sweeps.as_text(points)


# The commands ------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    def load(name, tokenizer=None, dtype=np.float32, **wanted):
        return module.apply(story_lm(), wanted)

    monkeypatch.setattr(minitx, "load", load)


def test_compare_prints_a_table_or_json(loads, capsys):
    assert main(["compare", "--fold-norms", "--stories", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--fold-norms: identical.") and "multiply-adds" in out
    assert main(["compare", "--fold-norms", "--fuse-projections", "--stories", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] is True and found["multiply_adds"] == 1
    assert found["techniques"] == "--fold-norms --fuse-projections"


def test_sweep_prints_a_table_or_json(loads, leave_out, capsys):
    assert main(["sweep", "leave-out", "n=0,1", "--stories", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^setting +adds .*agrees", out, re.M), "the last line of the heading"
    assert main(["sweep", "leave-out", "n=1", "--stories", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["multiply_adds"] < 1
    assert main(["sweep", "leave-out", "n=x"]) == 2
    assert "must be an integer" in capsys.readouterr().err
