"""``minitx report``: results are kept and never mixed, points and fronts are right, the page and
the committed chart are whole."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_frontier import POND
from tiny import tiny_lm

from minitx.errors import MinitxError
from minitx.lab.frontier.equal_work import Figures, Measuring, Row, additions
from minitx.lab.report import Plan, measure, read_results
from minitx.lab.report.page import html
from minitx.lab.report.points import (
    DENSE,
    LEAST,
    Cost,
    Points,
    front,
    labels,
    pareto,
    points_of,
    read_points,
    technique_of,
)
from minitx.lab.report.results import Results
from minitx.lab.report.summary import summary
from minitx.ledger import Entry
from minitx.technique import names

ROOT = Path(__file__).parents[2]
METHODS = "fold_norms", "zero_skip", "layer_skip_both", "majority_vote"
PLAN = Plan.quickly(
    text=POND, tokens=40, shares=(0.8,), methods=METHODS, families=("defaults", "structure")
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Results:
    """A tiny model on a text."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    return measure(tiny_lm(name="tiny"), PLAN, path, bar=False)


def cost(name, operations, loss, **more) -> Cost:
    about = dict(technique=name, method=name, family="defaults", setting="", baseline=False)
    return Cost(**about | dict(operations=operations, bytes=1, time=1, loss=loss) | more)


# Results -----------------------------------------------------------------------------------------


def test_results_in_the_file_are_those_that_were_measured(found):
    again = read_results(found.path)
    assert again.rows() == found.rows() and again.made_of["model"] == "tiny"
    assert [*again.work] == ["defaults", "structure"]
    assert [*again.work["defaults"]] == ["fold_norms", "zero_skip", "majority_vote"]


def test_second_run_measures_only_what_is_missing(found, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_bytes(found.path.read_bytes())
    measured = []
    monkeypatch.setattr(
        Measuring, "rows_or_reasons", lambda self, method: measured.append(method.name) or []
    )
    more = replace(PLAN, methods=(*METHODS, "prune"))
    measure(tiny_lm(name="tiny"), more, path, bar=False)
    assert measured == ["prune"]
    measure(tiny_lm(name="tiny"), PLAN, path, restart=True, bar=False)
    assert measured[1:] == ["fold_norms", "zero_skip", "majority_vote", "layer_skip both"]


@pytest.mark.parametrize(
    "lm, plan, differs",
    [
        (dict(), dict(tokens=39), "another text"),
        (dict(), dict(shares=(0.5,)), "another shares"),
        (dict(family="gpt2"), {}, "another weights"),
        (dict(name="other"), {}, "another model"),
    ],
)
def test_results_of_something_else_are_refused_and_kept(found, lm, plan, differs):
    before = found.path.read_bytes()
    with pytest.raises(MinitxError, match=f"{differs} .*--restart to measure all of it again"):
        measure(tiny_lm(**{"name": "tiny"} | lm), replace(PLAN, **plan), found.path, bar=False)
    assert found.path.read_bytes() == before


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    def interrupted(self, method):
        if method.name == "zero_skip":
            kept = read_results(path).work["defaults"]
            assert "fold_norms" in kept, "a result is kept before the next method begins"
            raise KeyboardInterrupt
        return [Row(method.name, None, reason="it was the first.")]

    path = tmp_path / "report.json"
    monkeypatch.setattr(Measuring, "rows_or_reasons", interrupted)
    stopped = measure(tiny_lm(name="tiny"), PLAN, str(path), bar=False)
    assert stopped.about["stopped"] and "goes on" in summary(points_of(stopped), stopped.about)
    assert [*read_results(path).work["defaults"]] == ["fold_norms"]
    assert "it was the first." in html(stopped)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"format": 1}', '{"format": 1, "work": {"a": 3}}']
)
def test_file_without_results_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(MinitxError, match="a.json"):
        read_results(tmp_path / "a.json")


@pytest.mark.parametrize(
    "place, value",
    [
        (("about", "dense"), "x"),
        (("about", "tokens_per_second"), None),
        (("work", "defaults", "fold_norms", 0, "method"), [1]),
        (("work", "structure", "layer_skip both", 0, "figures", "added_loss"), None),
    ],
)
def test_file_with_a_damaged_value_is_refused_before_anything_is_measured(
    found, tmp_path, place, value
):
    content = json.loads(json.dumps(found.as_dict()))
    inside = content
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = value
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(MinitxError, match="a.json is damaged"):
        read_results(tmp_path / "a.json")


# Points ------------------------------------------------------------------------------------------


def test_every_technique_has_a_point_or_a_reason(found):
    points = points_of(found)
    shown = {p.technique for p in points.points}
    assert shown == {"fold_norms", "layer_skip"}
    assert shown | {*points.without} == {*names()} and not shown & {*points.without}
    assert "zero_skip needs FFNs with ReLU" in points.without["zero_skip"]
    assert "no loss to compare" in points.without["majority_vote"], "a loss of 0 would be untrue"
    assert points.without["prune"] == "not measured."


def test_costs_of_a_point():
    """A table: half of the multiply-adds, and a quarter as many additions."""
    f = Figures(1, 1, 0.25, 0, 1, {}, 0.5, 0.8, 2.0, 1, 1, 4.0, additions=0.25)
    about = {
        "model": "m",
        "measured": "a text",
        "per_token": dict(weight_bytes=300, cache_bytes=100),
    }
    row = Row("lut_product", None, figures=f)
    (point,) = points_of(Results({}, about, {"defaults": {"lut_product": [row]}})).points
    assert (point.operations, point.time, point.loss) == (0.75, 0.25, 0.25)
    assert point.bytes == pytest.approx((0.8 * 300 + 2.0 * 100) / 400)


def test_additions_are_relative_to_the_dense_multiply_adds():
    work = {"dense": {"ffn": Entry(80), "head": Entry(20)}}
    work["changed"] = {"ffn": Entry(0, additions=30), "head": Entry(20, additions=5)}
    assert additions(SimpleNamespace(generation=SimpleNamespace(**work))) == 0.35


def test_front_has_the_points_that_nothing_beats():
    cheap, best, beaten, noise = (
        cost("cheap", 0.2, 1.0),
        cost("best", 0.5, 0.1),
        cost("beaten", 0.6, 0.2),
        cost("noise", 0.9, LEAST / 2),
    )
    random = cost("random", 0.1, 0.0, baseline=True)
    assert front([noise, beaten, random, best, cheap], "operations") == [cheap, best, noise]
    assert front([beaten], "operations") == [beaten, DENSE]
    assert front([], "operations") == [DENSE]


def test_random_baselines_belong_to_their_technique():
    assert technique_of("structure", "random") == "layer_skip"
    assert technique_of("structure", "head_router random") == "head_router"
    assert technique_of("defaults", "elsa") == "elsa"


def test_chart_names_the_front_once_and_the_well_known():
    points = [cost("cats", 0.5, 0.1), cost("cats", 0.6, 0.05), cost("quantize", 1.0, 0.5)]
    points.append(cost("delta", 1.0, 0.7))
    named = labels(points, front(points, "operations"))
    assert named == {id(points[0]): "cats", id(points[2]): "quantize"}
    drawn = str(pareto(Points("m", "a text", points, {})))
    assert ">cats</text>" in drawn and ">delta</text>" not in drawn
    assert "delta: 1.000x multiply-adds, loss +0.7000" in drawn, "its note"


def test_points_survive_their_file(found, tmp_path):
    points = points_of(found)
    points.write(tmp_path / "points.json")
    again = read_points(tmp_path / "points.json")
    assert again.without == points.without
    assert [p.name for p in again.points] == [p.name for p in points.points]
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "points.json").read_bytes()
    assert read_points(found.path) == points, "of a file of results, its points"
    (tmp_path / "points.json").write_text('{"points": [{"loss": "0"}]}')
    with pytest.raises(MinitxError, match="is damaged"):
        read_points(tmp_path / "points.json")


# The page ----------------------------------------------------------------------------------------


def test_page_is_self_contained_and_has_every_technique(found):
    page = html(found)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\(|@import|fetch\(""", page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    for name in names():
        assert f'<h3 id="{name}">' in page, f"{name} has no section"
    assert page.count("<svg") == 3 and "zero_skip needs FFNs with ReLU" in page
    assert "prefers-color-scheme: dark" in page


def test_page_has_the_tables_of_attention_and_decoding(found):
    """As their own --json has them; a baseline belongs to no technique."""
    point = dict(setting="p=1", kept=0.25, mass=0.5, accuracy=0.75, crossover=None)
    point |= dict(multiply_adds_to_dense=0.3, bytes_to_dense=0.4)
    figures = dict(
        tokens_per_call=2.5, multiply_adds=1.1, weight_bytes=0.5, cache_bytes=0.6, same=2
    )
    figures |= dict(first={"median": 0.9}, speed={"median": 1.5})
    row = dict(method="speculative gamma=2", sampling="greedy", seen=False, figures=figures)
    others = {
        "attention": {"points": [dict(point, method=name) for name in ("elsa", "oracle")]},
        "decoding": {"rows": [row, dict(row, seen=True, figures=None)]},
    }
    page = html(replace(found, others=others, refused={"decoding": "the context is too short."}))
    sections = dict(re.findall(r'<h[23] id="(\w+)">(.*?)(?=<h[23] |$)', page, re.S))
    assert "p=1" in sections["elsa"] and "25.0 %" in sections["elsa"]
    assert ">oracle</td>" in sections["baselines"] and ">oracle</td>" not in sections["elsa"]
    assert ">2.50</td>" in sections["speculative"] and ">1.50x</td>" in sections["speculative"]
    assert "frontier decoding: the context is too short." in page


def test_summary_fits_100_columns_and_says_why_techniques_are_missing(found):
    text = summary(points_of(found), found.about)
    assert max(map(len, text.splitlines())) <= 100
    assert "zero_skip: zero_skip needs FFNs with ReLU" in text and "Pareto front, time" in text


# The command -------------------------------------------------------------------------------------


def test_command_writes_the_page_and_draws_it_again(run, workdir):
    (workdir / "pond.txt").write_text(POND.content)
    words = (
        "-m",
        "toy",
        "--text",
        "pond.txt",
        "--tokens",
        "40",
        "--methods",
        "fold-norms",
        "--quick",
    )
    status, out, _ = run("report", *words, "--out", "a.html", "--svg", "a.svg")
    assert status == 0 and "toy on pond.txt" in out and (workdir / "a.html").exists()
    again = run("report", "--from", "a.json", "--svg", "b.svg", "--points", "p.json")
    assert again[0] == 0 and (workdir / "b.svg").read_bytes() == (workdir / "a.svg").read_bytes()
    status, out, _ = run("report", "--from", "p.json", "--json")
    assert status == 0 and json.loads(out)["points"][0]["technique"] == "fold_norms"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out", "a.txt"], "ends in .html, got 'a.txt'"),
        (["--out", "nowhere/a.html"], "there is no folder nowhere"),
        (["--svg", "a.png"], "ends in .svg, got 'a.png'"),
        (["--points", "a.csv"], "ends in .json"),
        (["--from", "none.json"], "none.json"),
        (["--from", "toy/config.json"], "holds no results of minitx report"),
        (["--from", "a.json", "--quick"], "--quick has no effect with --from"),
        (["-m", "toy", "--families", "atention"], "There is no family 'atention'"),
        (["-m", "toy", "--methods", "elza"], "no technique or method 'elza'; did you mean 'elsa'"),
        (["-m", "toy", "--share", "2"], "above 0 and below 1; got 2"),
        (["-m", "bare"], "no tokenizer"),
        (["--fold-norms"], "takes no techniques"),
    ],
)
def test_command_refuses_in_one_sentence(run, workdir, words, message):
    before = sorted(workdir.iterdir())
    status, out, err = run("report", *words)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    assert sorted(workdir.iterdir()) == before


# The picture of the README -----------------------------------------------------------------------

PICTURES = ROOT / "tutorials" / "pictures"
REDRAW = "minitx report --from tutorials/pictures/pareto.json --svg tutorials/pictures/pareto.svg"


def test_committed_chart_is_drawn_from_the_committed_points():
    drawn = str(pareto(read_points(PICTURES / "pareto.json")))
    assert drawn == (PICTURES / "pareto.svg").read_text("utf-8"), f"draw it again: {REDRAW}"


def test_committed_points_have_every_technique_or_say_why_not():
    points = read_points(PICTURES / "pareto.json")
    shown = {p.technique for p in points.points} | {*points.without}
    missing = {*names()} - shown
    assert not missing, f"measure {missing}: minitx report --points tutorials/pictures/pareto.json"
    assert all(why != "not measured." for why in points.without.values())
