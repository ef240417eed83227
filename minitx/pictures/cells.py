"""Many rectangles of an SVG picture, drawn as one path for each color, to keep the file small."""

from minitx.pictures.svg import Svg


class Cells:
    """Collects rectangles; ``draw`` puts them into a picture."""

    def __init__(self):
        self.paths: dict[tuple, list[str]] = {}

    def add(self, x, y, wide, high, fill: str, opacity: float = 1.0) -> None:
        shape = f"M{x:.4g} {y:.4g}h{wide:.4g}v{high:.4g}h-{wide:.4g}z"
        self.paths.setdefault((fill, round(opacity, 1)), []).append(shape)

    def draw(self, picture: Svg) -> None:
        for (fill, opacity), shapes in self.paths.items():
            more = {"fill_opacity": opacity} if opacity < 1 else {}
            picture.element("path", d="".join(shapes), fill=fill, **more)
