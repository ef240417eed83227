"""Where pictures go: the ending of the file's name decides, and bad names are refused in time."""

import sys

import pytest

from minitx.errors import MinitxError
from minitx.pictures.output import as_figure, check_output, need_pyplot, write_picture
from minitx.pictures.svg import Svg


def picture() -> Svg:
    found = Svg(80, 60, "all shapes")
    found.rect(1, 2, 30, 20, "#0072b2", opacity=0.5)
    found.circle(40, 30, 5, "#d55e00", stroke="#ffffff", stroke_width=1)
    found.line(0, 0, 80, 60, stroke_dasharray="5 3")
    found.path([(0, 0), (10, 5), (0, 10), (0, 0)], fill="#009e73")
    found.text(10, 50, "$a < b$", anchor="middle", halo=True)
    return found


@pytest.mark.parametrize(
    "name, message",
    [
        ("a.pdf", "ends in .svg or .png, got 'a.pdf'"),
        ("a", "ends in .svg or .png"),
        ("nowhere/a.svg", "there is no folder nowhere; create it first"),
        ("folder.svg", "folder.svg is a folder"),
    ],
)
def test_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(MinitxError, match=message):
        check_output(name)


def test_option_for_svg_refuses_other_endings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_output("a.SVG", ".svg")
    with pytest.raises(MinitxError, match="ends in .svg, got 'a.png'"):
        check_output("a.png", ".svg")


def test_svg_needs_no_matplotlib_and_png_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    write_picture(picture(), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text("utf-8") == str(picture())
    with pytest.raises(MinitxError, match="needs matplotlib; install it with: pip install"):
        write_picture(picture(), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_png_has_every_shape(tmp_path):
    try:
        need_pyplot()
    except MinitxError:
        pytest.skip("matplotlib is not installed")
    axes = as_figure(picture()).axes[0]
    kinds = [type(patch).__name__ for patch in axes.patches]
    assert kinds == ["Rectangle", "Rectangle", "Circle", "Polygon"]  # the first is the paper
    assert len(axes.lines) == 2 and [t.get_text() for t in axes.texts] == 2 * ["$a < b$"]
    write_picture(picture(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
