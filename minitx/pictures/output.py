"""Where a picture goes: an SVG file, or a PNG file drawn with matplotlib from the same shapes.

    check_output("a.png")           # before the measurements, which may take minutes
    write_picture(picture, "a.png")

A picture is laid out once, as SVG (svg.py). For a PNG its shapes are drawn one by one.
"""

import re
from pathlib import Path
from xml.etree import ElementTree

from minitx.checkpoints.common import atomic_write, need_writable_file
from minitx.errors import MinitxError, abbreviate
from minitx.pictures.svg import FONT_SIZE, Svg

ENDINGS = (".svg", ".png")
DPI = 72  # so that a point, in which matplotlib measures lines and letters, is a pixel
SHARPER = 2.0  # pixels of the PNG for each pixel of the SVG


def check_output(path, ending: str | None = None) -> None:
    """MinitxError if a picture cannot be drawn and written to ``path``, whose ending (or the one
    that is expected) says how: .svg, or .png, which needs matplotlib."""
    path = Path(path)
    expected = ENDINGS if ending is None else (ending,)
    if path.suffix.lower() not in expected:
        kind = "" if ending is None else f" as {ending[1:].upper()}"
        raise MinitxError(
            f"A picture is written{kind or ' as SVG or PNG'}; expected a file name that ends in "
            f"{' or '.join(expected)}, got {abbreviate(str(path))}."
        )
    if path.suffix.lower() == ".png":
        need_pyplot()
    need_writable_file(path)


def write_picture(picture: Svg, path) -> None:
    """Write the file, whole or not at all; a name that ends in .png needs matplotlib."""
    check_output(path)
    if Path(path).suffix.lower() == ".svg":
        picture.write(path)
        return
    figure = as_figure(picture)
    with atomic_write(Path(path)) as file:
        figure.savefig(file, format="png", dpi=SHARPER * DPI)
    need_pyplot().close(figure)


def need_pyplot():
    """matplotlib's pyplot (the ``plot`` extra), set up to write files."""
    try:
        import matplotlib
    except ImportError:
        raise MinitxError(
            "A PNG picture (not one that ends in .svg) needs matplotlib; install it with: pip "
            "install matplotlib"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# PNG ----------------------------------------------------------------------------------------------


def as_figure(picture: Svg):
    """The picture as a matplotlib figure. Shapes that Svg has no method for are left out."""
    pyplot = need_pyplot()
    figure = pyplot.figure(figsize=(picture.width / DPI, picture.height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))  # y grows downwards
    axes.axis("off")
    drawn = {"rect": rect, "circle": circle, "line": line, "polyline": polyline, "path": path}
    drawn["text"] = text
    for order, element in enumerate(ElementTree.fromstring(str(picture))):
        name = element.tag.rpartition("}")[2]
        if name in drawn:
            drawn[name](axes, element.attrib, element.text or "", order)
    return figure


def rect(axes, a: dict, _, order: int) -> None:
    from matplotlib.patches import Rectangle

    corner = number(a, "x"), number(a, "y")
    size = number(a, "width"), number(a, "height")
    axes.add_patch(Rectangle(corner, *size, **filled(a), zorder=order))


def circle(axes, a: dict, _, order: int) -> None:
    from matplotlib.patches import Circle

    center = number(a, "cx"), number(a, "cy")
    axes.add_patch(Circle(center, number(a, "r"), **filled(a), zorder=order))


def line(axes, a: dict, _, order: int) -> None:
    ends = [[number(a, f"{axis}{end}") for end in (1, 2)] for axis in "xy"]
    axes.plot(*ends, **stroked(a), zorder=order)


def polyline(axes, a: dict, _, order: int) -> None:
    pairs = [pair.split(",") for pair in a["points"].split()]
    xs, ys = zip(*[(float(x), float(y)) for x, y in pairs])
    if a.get("fill", "none") != "none":
        axes.fill(xs, ys, a["fill"], zorder=order)
    axes.plot(xs, ys, **stroked(a), zorder=order)


def path(axes, a: dict, _, order: int) -> None:
    """Closed shapes of the steps M (to a point), h and v (so far to the right, or down)."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Shape

    points, codes = [], []
    for step, numbers in re.findall("([Mhvz])([^Mhvz]*)", a["d"]):
        by = [float(n) for n in numbers.split()]
        if step == "M":
            points.append((by[0], by[1]))
        elif step == "z":
            points.append(points[-1])
        else:
            x, y = points[-1]
            points.append((x + by[0], y) if step == "h" else (x, y + by[0]))
        codes.append({"M": Shape.MOVETO, "z": Shape.CLOSEPOLY}.get(step, Shape.LINETO))
    axes.add_patch(PathPatch(Shape(points, codes), **filled(a), zorder=order))


def text(axes, a: dict, words: str, order: int) -> None:
    from matplotlib.patheffects import Normal, Stroke

    look = dict(
        fontsize=number(a, "font-size", FONT_SIZE),
        ha={"middle": "center", "end": "right"}.get(a.get("text-anchor"), "left"),
        va="baseline",
        color=a.get("fill"),
        fontweight=a.get("font-weight", "normal"),
        family="monospace",
        parse_math=False,  # a $ is a $
        rotation=rotation(a),
    )
    drawn = axes.text(number(a, "x"), number(a, "y"), words, **look, zorder=order)
    if "stroke" in a:
        halo = Stroke(linewidth=number(a, "stroke-width"), foreground=a["stroke"])
        drawn.set_path_effects([halo, Normal()])


def filled(a: dict) -> dict:
    edge = {"edgecolor": a.get("stroke", "none"), "linewidth": number(a, "stroke-width", 1)}
    edge["linewidth"] *= "stroke" in a
    alpha = number(a, "opacity", 1) * number(a, "fill-opacity", 1)
    return {"facecolor": a.get("fill", "none"), "alpha": alpha} | edge


def rotation(a: dict) -> float:
    """Degrees, counterclockwise: SVG turns the other way."""
    found = re.match(r"rotate\((-?[\d.]+)", a.get("transform", ""))
    return -float(found[1]) if found else 0.0


def stroked(a: dict) -> dict:
    look = {"color": a.get("stroke", "none"), "linewidth": number(a, "stroke-width", 1)}
    dashes = [float(length) for length in a.get("stroke-dasharray", "").split()]
    if dashes:  # matplotlib measures them in widths of the line
        dashes = [length / look["linewidth"] for length in dashes]
        look["linestyle"] = (0, tuple(dashes))
    return look


def number(a: dict, name: str, default: float = 0.0) -> float:
    return float(a.get(name, default))
