"""Stacked bars: lengths are in proportion, in the terminal and in the SVG."""

from xml.dom import minidom

import pytest

from minitx.pictures.bars import cells, stacked
from minitx.pictures.waterfall import LENGTH, draw, in_short

STEPS = [("dense", {"attn": 60, "ffn": 40}), ("+ exit", {"attn": 30, "ffn": 10, "probe": 10})]


def test_bars_of_characters_are_in_proportion():
    lines = stacked(STEPS, 50).splitlines()
    assert lines[0] == "dense    1.00x  " + "#" * 30 + "=" * 20
    assert lines[1] == "+ exit   0.50x  " + "#" * 15 + "=" * 5 + "-" * 5
    assert lines[2] == "(# attn, = ffn, - probe)"


def test_rounding_never_changes_the_length_of_a_bar():
    assert cells([1.4, 1.4, 1.4]) == [1, 2, 1] and sum(cells([0.5] * 9)) == 4
    assert cells([0.0, 0.0]) == [0, 0]


def test_bars_of_nothing_are_empty():
    assert stacked([("dense", {}), ("+ a", {"x": 0})]).splitlines()[:2] == [
        "dense       -", "+ a         -"
    ]  # fmt: skip


def test_svg_stacks_the_parts_and_outlines_what_was_saved():
    root = minidom.parseString(str(draw([("multiply-adds", STEPS)], "saved"))).documentElement
    rects = [
        (float(r.getAttribute("width")), r.getAttribute("fill"))
        for r in root.getElementsByTagName("rect")[1:]  # the first is the paper
        if r.getAttribute("height") == "20"
    ]
    widths = [width / LENGTH for width, _ in rects]
    assert widths == pytest.approx([0.6, 0.4, 0.3, 0.1, 0.1, 0.5], abs=1e-3)
    assert rects[-1][1] == "none", "what the step took away is an outline"
    texts = [t.firstChild.data for t in root.getElementsByTagName("text")]
    assert {"dense", "+ exit", "attn", "ffn", "probe", "50 (0.50x)"} <= {*texts}


@pytest.mark.parametrize(
    "amount, words",
    [(2713685, "2.71 M"), (1.9e6, "1.90 M"), (227328, "227 k"), (45000, "45.0 k"), (12, "12")],
)
def test_amounts_in_short(amount, words):
    assert in_short(amount) == words
