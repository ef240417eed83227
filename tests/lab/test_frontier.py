"""``minitx frontier``: how knobs are tuned, what is executed, and a row for every method."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_compare import story_lm
from tiny import tiny_lm

import minitx
from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab.frontier import equal_work, families, frontier, structure
from minitx.lab.frontier.equal_work import OVER, Plan, compare_work, dense_work, to_read, work_of
from minitx.lab.frontier.families import FAMILIES
from minitx.lab.frontier.knobs import Knob, Method, chosen_methods, tune
from minitx.ledger import counting
from minitx.technique import apply, find, names
from minitx.text import Text

SHARES = 0.9, 0.7
PLAN = Plan(shares=SHARES, stories=2, tuning=1, prompts=1, rounds=1)
COUNT = Knob("count", 0, lambda c: 2 * c.layers - 1, falling=True, scale="linear", integer=True)
BOTH = {"unit": "both"}
STATIC = Method("static", COUNT, BOTH | {"choose": "last"}, "layer_skip")
EXIT = Method(
    "early_exit", Knob("threshold", 0, 1, scale="linear"), {"first": 1, "measure": "random"}
)
POND = Text("The balance of once and twice: a fence, a pond, and a stone. " * 20, "pond.txt")
ON_TEXT = replace(PLAN, text=POND, tokens=60)


def compared(*methods, lm=None, plan=PLAN):
    family = SimpleNamespace(name="structure", methods=methods)
    return compare_work(model() if lm is None else lm, family, plan, bar=False)


def model():
    """Most of its work is in the FFNs, not in the head."""
    return story_lm(hidden=256)


@pytest.fixture(scope="module")
def found():
    at_random = replace(STATIC, name="random", options=BOTH | {"choose": "random"}, seeds=(0, 1))
    return compared(at_random, STATIC, EXIT)


# The tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_methods_are_registered_techniques_and_their_knobs_and_options_exist(family):
    config = minitx.load("stories").model.config
    methods = [method.within(config) for method in family.methods]
    assert set(family.baselines) <= {method.name for method in methods}
    assert len({method.name for method in methods}) == len(methods), "two methods of one name"
    for method in methods:
        if method.make is not None:
            continue
        assert method.wanted in names(), method.name
        for form in (method, *([method.random_form().within(config)] if method.random else [])):
            technique = find(form.wanted)
            ends = (
                [{}]
                if form.knob is None
                else [form.knob.options(form.knob.value(p)) for p in (0, 1)]
            )
            for end in ends:
                technique.checked(form.options | end)  # refuses unknown options and bad values
            assert not form.seeds or "seed" in technique.options


def test_structure_has_a_random_and_a_static_baseline():
    first, second = structure.METHODS[:2]
    assert (first.name, second.name) == ("random", "static")
    assert first.options["choose"] == "random" and len(first.seeds) > 1


def test_methods_are_chosen_by_their_name_or_that_of_their_technique():
    def names_of(*wanted):
        return [m.name for m in chosen_methods(structure.METHODS, wanted)]

    assert names_of("layer-skip-ffn", "early-exit") == ["layer_skip ffn", "early_exit"]
    assert set(names_of("layer_skip")) > {"random", "static", "layer_skip ffn"}
    with pytest.raises(MinitxError, match="no method 'earl-exit'; .*early_exit"):
        names_of("earl-exit")


# Tuning ------------------------------------------------------------------------------------------

SUBLAYERS = Knob("count", 0, 16, falling=True, scale="linear", integer=True)


@pytest.mark.parametrize("share", [0.97, 0.9, 0.75, 0.5, 0.3])
def test_tune_of_an_integer_knob_finds_the_closest_share_that_is_not_too_large(share):
    left = [
        1,
        0.99,
        0.97,
        0.9,
        0.88,
        0.7,
        0.69,
        0.68,
        0.67,
        0.62,
        0.6,
        0.53,
        0.49,
        0.4,
        0.3,
        0.2,
        0,
    ]
    value, reached = tune(
        SUBLAYERS, share, SUBLAYERS.guess(share), left.__getitem__, {}, 0.005, share + OVER
    )
    assert reached == left[value] <= share + OVER
    assert (
        value == 0 or left[value - 1] > share + OVER or share - reached <= left[value - 1] - share
    )


def test_tune_of_an_integer_knob_tries_what_lies_between_two_neighbours_that_do_not_fit():
    """Interpolation between 14 (0.95) and 16 (0) rounds to 14 again, but 15 is the answer."""
    left = [1.0, *[0.95] * 14, 0.5, 0.0]
    guess = SUBLAYERS.guess(0.6)
    assert tune(SUBLAYERS, 0.6, guess, left.__getitem__, {}, 0.005, 0.62) == (15, 0.5)


@pytest.mark.parametrize("curve", [lambda x: x**40, lambda x: 0.4 + 0.6 * x, lambda x: x**0.2])
def test_tune_of_a_linear_knob_comes_close_on_bent_curves(curve):
    known: dict = {}
    for share in (0.9, 0.75, 0.5):
        _, reached = tune(Knob("x", 0, 1, scale="linear"), share, share, curve, known, 0.005)
        assert abs(reached - share) <= 0.005, f"{reached} instead of {share} after {known}"


def test_tune_passes_over_a_flat_part_of_the_range():
    knob = Knob("tolerance", 1e-5, 10, falling=True)
    known: dict = {}
    value, reached = tune(knob, 0.9, knob.guess(0.9), lambda x: 1.0 if x < 0.5 else 0.88, known)
    assert reached == 0.88 and value >= 0.5 and len(known) <= 10


def test_tune_says_the_least_share_where_the_knob_ends():
    value, reached = tune(SUBLAYERS, 0.5, 8, lambda n: 1 - 0.02 * n, known := {}, 0.005, 0.52)
    assert (value, reached) == (16, pytest.approx(0.68)) and len(known) < 6


# What is executed --------------------------------------------------------------------------------


def counted_by_hand(lm, texts) -> int:
    """Every token by the ledger, in one pass, with its logits."""
    with counting(lm) as counts:
        for text in texts:
            lm.logits(text.ids[:-1])
    return counts.total().multiply_adds


def test_executed_share_is_what_the_ledger_counts(found):
    lm = model()
    material, tuning, _ = to_read(lm, PLAN)
    for row in found.rows:
        if row.method != "static":
            continue
        count = int(row.setting.removeprefix("count="))
        changed = apply(lm, {"layer_skip": {"unit": "both", "choose": "last", "count": count}})
        for texts, said in ((material.texts, row.figures.executed), (tuning, row.figures.tuned)):
            share = counted_by_hand(changed, texts) / counted_by_hand(lm, texts)
            assert said == pytest.approx(share, rel=1e-12), f"{row.setting}: {said} is not {share}"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_dense_work_in_steps_is_what_the_ledger_counts(family):
    lm = tiny_lm(family)
    texts = [SimpleNamespace(ids=list(range(n))) for n in (48, 20, 34)]
    for way in ("token", "sequence", "step"):
        expected = work_of(lm, texts, way)
        assert dense_work(lm, texts, way) == expected, f"read by {way}"
    assert work_of(lm, texts, "step") < work_of(lm, texts, "token"), "no masked pair is computed"


def test_method_that_skips_nothing_executes_all_of_it_however_it_reads():
    whole = Method("lazy_tokens", None, {"keep": 1.0})
    in_one_pass = Method("early_exit", None, {"threshold": 1.1})
    for row in compared(whole, in_one_pass, lm=tiny_lm(), plan=ON_TEXT).rows:
        assert row.figures.executed == row.figures.tuned == 1, row.method
        assert row.figures.added_loss == pytest.approx(0, abs=1e-6) and row.share is None


# Rows --------------------------------------------------------------------------------------------


def test_every_method_has_a_row_at_every_share(found):
    methods = ("random", "static", "early_exit")
    assert [(r.method, r.share) for r in found.rows] == [(m, s) for m in methods for s in SHARES]
    for row in found.rows:
        if row.figures is not None and row.method != "random":
            assert row.figures.tuned <= row.share + OVER, row
        if row.method == "early_exit" and row.share == 0.9:
            assert row.figures.tuned == pytest.approx(0.9, abs=0.02), "its knob is continuous"


def test_random_row_is_the_mean_over_its_seeds(found):
    row = found.rows[0]
    low, high = row.losses
    assert low <= row.figures.added_loss <= high and low < high
    assert row.figures.added_loss == pytest.approx((low + high) / 2)


def test_share_out_of_reach_is_said():
    few = Knob("count", 0, 1, falling=True, scale="linear", integer=True)
    one = Method("layer_skip layer", few, {"unit": "layer", "choose": "last"}, "layer_skip")
    found = compared(one, plan=replace(PLAN, shares=(0.8, 0.3)))
    reached, not_reached = found.rows
    assert reached.figures and not not_reached.figures
    assert 0.3 + OVER < not_reached.lowest < 1
    text = str(found)
    assert f"not below {not_reached.lowest:.2f}" in text
    assert "layer_skip layer at 0.3: not reached: count=1 still executes" in text


def test_trouble_in_one_method_costs_its_own_rows_only():
    def refuses(lm, value):
        raise MinitxError("refuses needs another model.")

    def fails(lm, value):
        raise KeyError("a bug")

    def dies(lm, value):
        os._exit(9)

    troubled = [replace(STATIC, name=f.__name__, make=f) for f in (refuses, fails, dies)]
    plan = replace(ON_TEXT, shares=(0.8,))
    *trouble, last = compared(*troubled, STATIC, lm=tiny_lm(), plan=plan).rows
    said = [row.reason for row in trouble]
    assert said[0] == "refuses needs another model." and said[1].startswith("failed: KeyError")
    assert said[2].startswith("its process ended without a result")
    assert last.figures.executed < 0.9


def test_ctrl_c_keeps_the_rows_so_far(monkeypatch):
    real = equal_work.Measuring.rows_or_reasons

    def interrupted(self, method):
        if method.name == "early_exit":
            raise KeyboardInterrupt
        return real(self, method)

    monkeypatch.setattr(equal_work.Measuring, "rows_or_reasons", interrupted)
    methods = STATIC, EXIT, replace(STATIC, name="later")
    found = compared(*methods, lm=tiny_lm(), plan=ON_TEXT)
    assert found.stopped and all(row.figures for row in found.rows[:2])
    assert [row.reason for row in found.rows[2:]] == [equal_work.STOPPED] * 4


# Reports -----------------------------------------------------------------------------------------


def test_report_fits_100_columns_and_names_every_method(found):
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    for name in ("random", "static", "early_exit"):
        assert any(line.strip().startswith(name) for line in lines), name
    assert "loss from" in str(found) and "Methods are tuned on 1 calibration stories" in str(found)


def test_methods_without_a_knob_have_a_table_of_their_own():
    text = str(
        compared(STATIC, Method("quantize_cache", None, {"bits": 8}), plan=ON_TEXT, lm=tiny_lm())
    )
    assert "saves bytes rather than multiply-adds" in text and "quantize_cache bits=8" in text


def test_notes_that_techniques_share_are_printed_once():
    lm = replace(tiny_lm(), calibration=None)
    by_influence = replace(STATIC, options={"unit": "layer"}, knob=replace(COUNT, high=1))
    pruned = Method("prune", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitx.calibration.knows_stories", lambda *_: False)
        text = str(compared(by_influence, pruned, lm=lm, plan=ON_TEXT))
    assert text.count("is calibrated on stories, which this model does not know") == 1
    assert "layer_skip, prune: is calibrated" in text


def test_json_has_every_figure(found):
    said = json.loads(json.dumps(found.as_dict()))
    row = next(row for row in said["rows"] if row["method"] == "static")
    assert {"executed", "added_loss", "divergence", "agreement", "accuracy", "memory", "cache"} <= {
        *row["figures"]
    }
    assert said["plan"]["shares"] == [0.9, 0.7] and said["family"] == "structure"


def test_picture_names_every_method(found, tmp_path):
    found.picture(tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text("utf-8")
    assert all(f">{row.method}</text>" in picture for row in found.rows), (
        "a method is missing in the legend"
    )


def test_text_is_tuned_on_its_first_tokens_and_measured_on_the_rest():
    lm, plan = tiny_lm(), ON_TEXT
    material, tuning, said = to_read(lm, plan)
    ids = lm.tokenizer.encode(POND.content, special=False)
    tuned = [i for text in tuning for i in text.ids[1:]]
    measured = [i for text in material.texts for i in text.ids[1:]]
    assert tuned == ids[: len(tuned)] and measured == ids[len(tuned) : len(tuned) + 60]
    found = compared(STATIC, lm=lm, plan=plan)
    assert found.accuracy == {} and "hop" not in str(found) and said in str(found)
    assert found.as_dict()["plan"]["text"] == "pond.txt"
    with pytest.raises(MinitxError, match="a.txt has 5 tokens; expected at least 12"):
        to_read(lm, replace(plan, text=Text("a pond", "a.txt")))


def test_python_function_compares_a_family(monkeypatch):
    monkeypatch.setattr(structure, "METHODS", (STATIC,))
    found = frontier(tiny_lm(), "structure", bar=False, **vars(ON_TEXT))
    assert [row.method for row in found.rows] == ["static"] * 2
    with pytest.raises(MinitxError, match="no family 'structur'; .*Did you mean 'structure'"):
        frontier(tiny_lm(), "structur")


# The command -------------------------------------------------------------------------------------


def test_command_without_a_family_lists_them(capsys):
    assert main(["frontier"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{family.name} " in out for family in families.FAMILIES)


def test_command_prints_a_table_or_json(run, workdir, monkeypatch):
    monkeypatch.setattr(structure, "METHODS", (STATIC, EXIT))
    (workdir / "pond.txt").write_text(POND.content)
    words = "frontier", "structure", "-m", "toy", "--text", "pond.txt", "--tokens", "50"
    status, out, err = run(*words, "--share", "0.6", "--methods", "static", "--rounds", "1")
    assert status == 0 and "\n0.6\n  static " in out and "early_exit" not in out and err == ""
    status, out, _ = run(*words, "--share", "3/5", "--json", "--methods", "static")
    assert [row["share"] for row in json.loads(out)["rows"]] == [0.6]


@pytest.mark.parametrize(
    "words, message",
    [
        (["frontier", "structur"], "There is no family 'structur'; did you mean 'structure'?"),
        (["frontier", "structure", "-m", "toy", "--share", "2"], "above 0 and below 1; got 2."),
        (["frontier", "structure", "-m", "toy", "--share", "half"], "--share: invalid"),
        (["frontier", "structure", "-m", "toy", "--methods", "lazy"], "There is no method 'lazy'"),
        (["frontier", "structure", "-m", "toy", "--tokens", "9"], "--tokens has no effect here"),
        (["frontier", "structure", "-m", "bare"], "no tokenizer"),
        (["frontier", "structure", "--fold-norms"], "takes no techniques"),
        (["compare-attention", "--share", "1/4"], "is now minitx frontier attention"),
    ],
)
def test_command_refuses_in_one_sentence(run, words, message):
    status, out, err = run(*words)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
