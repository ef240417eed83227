"""The heat map: shades, numbers and colors grow with the shares; of a text there is none."""

from types import SimpleNamespace
from xml.dom import minidom

import pytest

from minitx.errors import MinitxError
from minitx.lab.evaluate import heat_of, need_heat
from minitx.pictures.heatmap import Heat, cell, color

HEAT = Heat("right answers", ["1 of 2", "2 of 2"], ["1 hop", "2 hops"], [[0.4, 0.0], [1, 0.75]])


def test_terminal_has_a_shade_and_a_number_in_each_cell():
    assert str(HEAT).splitlines() == [
        "right answers:",
        "         1 hop  2 hops",
        "1 of 2  ▒▒  40       0",
        "2 of 2  ██ 100  ▓▓  75",
    ]


@pytest.mark.parametrize(
    "value, words", [(0, "     0"), (0.13, "░░  13"), (0.874, "▓▓  87"), (1, "██ 100")]
)
def test_shade_grows_with_the_share(value, words):
    assert cell(value) == words


def test_color_goes_from_white_to_dark_blue():
    assert color(0) == "#ffffff" and color(1) == "#005aa0"
    assert [color(-1), color(2)] == [color(0), color(1)]


def test_svg_has_a_cell_for_each_value():
    root = minidom.parseString(str(HEAT.draw())).documentElement
    cells = root.getElementsByTagName("rect")[1:]  # the first is the paper
    assert [r.getAttribute("fill") for r in cells] == [color(v) for v in (0.4, 0, 1, 0.75)]
    notes = [t.firstChild.data for t in root.getElementsByTagName("title")[1:]]
    assert notes[1] == "1 of 2, 2 hops: 0.000"
    width, height = (float(root.getAttribute(name)) for name in ("width", "height"))
    for r in cells:
        x, y, w, h = (float(r.getAttribute(name)) for name in ("x", "y", "width", "height"))
        assert x + w < width and y + h < height, "a cell leaves the picture"


def test_map_of_reports_is_by_hops():
    reports = [
        SimpleNamespace(by_hops={1: 0.5, 2: 0.25}),
        SimpleNamespace(by_hops={1: 1.0, 2: 0.5}),
    ]
    heat = heat_of("exit after", ["1 of 2", "2 of 2"], reports)
    assert heat.columns == ["1 hop", "2 hops"] and heat.values == [[0.5, 0.25], [1.0, 0.5]]


def test_text_has_no_map_and_a_picture_of_it_is_refused():
    assert heat_of("exit after", ["1 of 1"], [SimpleNamespace(loss=1.0)]) is None
    with pytest.raises(MinitxError, match="needs stories with questions"):
        need_heat(None)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--svg", "a.svg"], "they need --depths"),
        (["--svg", "a.svg", "--depths", "--text", "pond.txt"], "a text has no answers"),
        (["--svg", "a.png", "--depths"], "ends in .svg"),
    ],
)
def test_evaluate_refuses_a_picture_of_nothing(run, words, message):
    status, out, err = run("evaluate", "-m", "toy", *words)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
