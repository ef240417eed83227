"""An SVG picture as a PNG file, drawn by matplotlib (the ``plot`` extra).

Only what svg.py and its pictures write is understood: rect, circle, line, polyline, text, and paths
of straight lines. Notes, which show when the mouse is over a shape, have no place in a PNG.
"""

import re
from pathlib import Path
from xml.etree import ElementTree

from minitx.checkpoints.common import atomic_write
from minitx.lab.sweep import need_pyplot
from minitx.pictures.svg import INK, Svg

PIXELS = 100  # of the SVG picture, per inch
DENSITY = 2  # pixels of the PNG for each of these
POINT = 72 / PIXELS  # of a font, per pixel


def write_png(picture: Svg, path) -> None:
    """Write the file, whole or not at all. MinitxError without matplotlib."""
    pyplot = need_pyplot()
    size = picture.width / PIXELS, picture.height / PIXELS
    figure = pyplot.figure(figsize=size, dpi=PIXELS * DENSITY)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.set_axis_off()
    for element in ElementTree.fromstring(str(picture)).iter():
        draw = DRAW.get(element.tag.partition("}")[2])
        if draw:
            draw(axes, element)
    with atomic_write(Path(path)) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def number(element, name: str, default: float = 0.0) -> float:
    return float(element.get(name, default))


def colors(element) -> dict:
    """Fill and outline, for a matplotlib patch."""
    fill = element.get("fill", INK)
    alpha = number(element, "fill-opacity", 1.0) * number(element, "opacity", 1.0)
    stroke = element.get("stroke", "none")
    return {
        "facecolor": fill,
        "edgecolor": stroke,
        "linewidth": number(element, "stroke-width", 1.0) * POINT if stroke != "none" else 0,
        "alpha": alpha if fill != "none" else None,
    }


def rect(axes, element) -> None:
    from matplotlib.patches import Rectangle

    place = number(element, "x"), number(element, "y")
    size = number(element, "width"), number(element, "height")
    axes.add_patch(Rectangle(place, *size, **colors(element)))


def circle(axes, element) -> None:
    from matplotlib.patches import Circle

    place = number(element, "cx"), number(element, "cy")
    axes.add_patch(Circle(place, number(element, "r"), **colors(element)))


def line(axes, element) -> None:
    ends = [[number(element, f"{axis}{end}") for end in (1, 2)] for axis in "xy"]
    axes.plot(*ends, **stroke(element))


def polyline(axes, element) -> None:
    points = [point.split(",") for point in element.get("points").split()]
    axes.plot(*zip(*((float(x), float(y)) for x, y in points)), **stroke(element))


def stroke(element) -> dict:
    width = number(element, "stroke-width", 1.0) * POINT
    return {"color": element.get("stroke", INK), "linewidth": width}


def path(axes, element) -> None:
    """Closed shapes of the steps M (to a point), h and v (so far to the right, or down)."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Shape

    points, codes = [], []
    for step, numbers in re.findall("([Mhvz])([^Mhvz]*)", element.get("d")):
        by = [float(n) for n in numbers.split()]
        if step == "M":
            points.append((by[0], by[1]))
        elif step == "z":
            points.append(points[-1])
        else:
            x, y = points[-1]
            points.append((x + by[0], y) if step == "h" else (x, y + by[0]))
        codes.append({"M": Shape.MOVETO, "z": Shape.CLOSEPOLY}.get(step, Shape.LINETO))
    axes.add_patch(PathPatch(Shape(points, codes), **colors(element)))


def text(axes, element) -> None:
    anchor = {"middle": "center", "end": "right"}.get(element.get("text-anchor"), "left")
    axes.text(
        number(element, "x"),
        number(element, "y"),
        (element.text or "").replace("$", r"\$"),  # no formulas
        fontsize=number(element, "font-size", 12) * POINT,
        family="monospace",
        weight=element.get("font-weight", "normal"),
        color=element.get("fill", INK),
        ha=anchor,
        va="baseline",
        rotation=rotation(element),
    )


def rotation(element) -> float:
    """Degrees, counterclockwise: SVG turns the other way."""
    found = re.match(r"rotate\((-?[\d.]+)", element.get("transform", ""))
    return -float(found[1]) if found else 0.0


DRAW = {
    "rect": rect,
    "circle": circle,
    "line": line,
    "polyline": polyline,
    "path": path,
    "text": text,
}
