"""Scatter plots: ticks are round, points are where their values are, everything is in the file."""

import math
from xml.dom import minidom

import pytest

from minitx.pictures.labels import Box
from minitx.pictures.scatter import Axis, Curve, Layout, Panel, Point, draw, log_ticks, round_ticks

FRAME = Box(0, 0, 100, 100)


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.93, 1.01, [0.94, 0.96, 0.98, 1]),
        (-3, 47, [0, 10, 20, 30, 40]),
        (1e6, 4e6, [1e6, 1.5e6, 2e6, 2.5e6, 3e6, 3.5e6, 4e6]),
    ],
)
def test_ticks_are_round_and_inside(low, high, ticks):
    assert round_ticks(low, high) == ticks


def test_ticks_of_a_logarithmic_axis_are_powers_of_10_or_1_2_5_of_them():
    assert log_ticks(-3.1, 0.2) == [0.001, 0.01, 0.1, 1]
    assert log_ticks(0, 1.1) == [1, 2, 5, 10]
    assert log_ticks(0.31, 0.33) == [2.06, 2.08, 2.1, 2.12]


def test_equal_values_do_not_divide_by_zero():
    for value in (0.0, 3.0):
        assert Axis([value], 0, 100)(value) == pytest.approx(50)
    assert Axis([1.0, 1.0], 0, 100, log=True).ticks()


def test_points_are_where_their_values_are():
    layout = Layout(Panel([Curve("a", [Point(0, 1), Point(10, 100)])], "x", "y", log_y=True), FRAME)
    (left, bottom), (right, top) = layout.places[0]
    assert left < right and top < bottom, "y grows upwards"
    assert layout.across(5) == pytest.approx((left + right) / 2)
    assert layout.up(10) == pytest.approx((top + bottom) / 2), "y is logarithmic"


def test_values_beyond_least_and_most_are_drawn_at_the_edge():
    curve = Curve("a", [Point(0, -1), Point(1, 0.5), Point(2, 99)])
    layout = Layout(Panel([curve], "x", "y", log_y=True, least=0.01, most=1), FRAME)
    assert [y for _, y in layout.places[0]] == [layout.up(v) for v in (0.01, 0.5, 1)]
    drawn = str(draw([Panel([curve], "x", "y", log_y=True, least=0.01, most=1, most_x=1.5)], "t"))
    for words in ("&lt;= 0.01", "&gt;= 1", "&gt;= 1.5"):
        assert f">{words}</text>" in drawn, "the axis says what the edge means"


def test_curve_on_top_is_labelled_first():
    """Of two points in one place, it is the last one's label that is nearest to it."""
    curves = [Curve(name, [Point(1, 1, name)]) for name in ("below", "on top")]
    first, second = Layout(Panel(curves, "x", "y"), Box(0, 0, 400, 400)).labels
    assert first.text == "on top" and first.box.left == pytest.approx(first.x + 10)
    assert second.box.right < second.x, "the other one stands at the left"


def test_label_of_a_first_point_is_placed_before_others():
    curves = [
        Curve("a", [Point(1, 1, "wanted", first=True)]),
        Curve("b", [Point(1, 1, f"other {i}") for i in range(5)]),
    ]
    labels = Layout(Panel(curves, "x", "y"), Box(0, 0, 400, 400)).labels
    assert labels[0].text == "wanted" and labels[0].leader == []


def test_label_does_not_cover_a_staircase():
    stairs = [Point(0, 2), Point(1, 2), Point(1, 1), Point(2, 1)]
    curves = [Curve("front", stairs, line=True, shape="none"), Curve("a", [Point(1, 1, "name")])]
    layout = Layout(Panel(curves, "x", "y"), Box(0, 0, 400, 400))
    assert len(layout.steps()) == 3 and not layout.labels[0].listed
    assert not any(layout.labels[0].box.meets(step) for step in layout.steps())


def test_picture_has_every_name_label_and_note():
    curves = [
        Curve("one & two", [Point(1, 2, "first", "note <1>")]),
        Curve("three", [Point(2, 3), Point(3, 1)], line=True, dashed=True),
    ]
    root = minidom.parseString(str(draw([Panel(curves, "x", "y")], "title"))).documentElement
    texts = [node.firstChild.data for node in root.getElementsByTagName("text")]
    for name in ("one & two", "three", "first", "x", "y", "title"):
        assert name in texts, f"{name} is missing"
    notes = [node.firstChild.data for node in root.getElementsByTagName("title")]
    assert "note <1>" in notes
    assert len(root.getElementsByTagName("circle")) == 5, "three points, two of the legend"


def test_curves_that_share_a_color_have_another_shape():
    curves = [Curve(str(i), [Point(i, i)]) for i in range(20)]
    root = minidom.parseString(str(draw([Panel(curves, "x", "y")], "t", legend=False)))
    shapes = {name: len(root.getElementsByTagName(name)) for name in ("circle", "polyline")}
    assert shapes == {"circle": 8, "polyline": 4}  # 8 circles, 8 squares, 4 diamonds


def test_text_is_inside_the_picture():
    far = [Curve("a long name in the legend", [Point(i, 1, "label " * 4) for i in range(40)])]
    picture = draw([Panel(far, "x", "y"), Panel(far, "x", "y")], "t" * 200)
    for node in minidom.parseString(str(picture)).getElementsByTagName("text"):
        at, width = float(node.getAttribute("x")), 0.6 * len(node.firstChild.data)
        width *= float(node.getAttribute("font-size"))
        share = {"start": 0, "middle": 0.5, "end": 1}[node.getAttribute("text-anchor")]
        left = at - share * width
        assert 0 <= left and left + width <= picture.width, node.firstChild.data
    assert math.isfinite(picture.height)
