"""Writing a picture to the files that were asked for, and checking their names before the work."""

from pathlib import Path

from minitx.checkpoints.common import need_writable_file
from minitx.errors import MinitxError, abbreviate
from minitx.lab.sweep import check_picture
from minitx.pictures.svg import Svg


def check_files(svg, png) -> None:
    """MinitxError if a picture cannot be written to these files. None: it is not asked for."""
    if svg is not None:
        if Path(svg).suffix.lower() != ".svg":
            raise MinitxError(
                f"--svg takes a file name that ends in .svg, got {abbreviate(str(svg))}."
            )
        need_writable_file(Path(svg))
    if png is not None:
        check_picture(png)


def save(picture: Svg, svg, png) -> None:
    """Write the picture to these files; None: not asked for."""
    if svg is not None:
        picture.write(svg)
    if png is not None:
        from minitx.pictures.png import write_png  # needs matplotlib

        write_png(picture, png)
