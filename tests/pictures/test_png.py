"""An SVG picture as PNG: needs matplotlib, which the tests do not; without it, it is refused."""

import importlib.util

import pytest

from minitx.errors import MinitxError
from minitx.pictures.cells import Cells
from minitx.pictures.output import check_output, write_picture
from minitx.pictures.svg import Svg

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.mark.skipif(HAS_MATPLOTLIB, reason="matplotlib is installed")
def test_png_without_matplotlib_is_refused_before_the_work(tmp_path):
    with pytest.raises(MinitxError, match="pip install matplotlib"):
        check_output(tmp_path / "a.png")
    with pytest.raises(MinitxError, match="pip install matplotlib"):
        write_picture(Svg(10, 10, "x"), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_png_has_the_colors_of_the_svg_at_their_places(tmp_path):
    from matplotlib.image import imread

    picture, cells = Svg(40, 20, "x"), Cells()
    cells.add(0, 0, 20, 20, "#ff0000")
    cells.add(20, 10, 20, 10, "#0000ff", 0.5)
    cells.draw(picture)
    picture.text(30, 8, "$x", size=4, transform="rotate(-50 30 8)")
    picture.path([(0, 0), (1, 1)])
    picture.line(0, 0, 1, 1)
    picture.circle(30, 2, 1, fill="#00ff00")
    write_picture(picture, tmp_path / "a.png")
    pixels = imread(tmp_path / "a.png")[..., :3]
    assert pixels.shape == (40, 80, 3)
    assert pixels[20, 10].tolist() == [1, 0, 0], "red on the left"
    assert pixels[30, 60] == pytest.approx([0.5, 0.5, 1], abs=0.01), "half blue, lower right"
    assert pixels[4, 60] == pytest.approx([0, 1, 0], abs=0.01), "y grows downwards"
