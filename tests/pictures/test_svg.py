"""The SVG writer: what it writes is well-formed XML with the text that was given."""

from xml.dom import minidom

import numpy as np

from minitx.pictures.svg import Svg


def test_text_and_notes_are_escaped():
    picture = Svg(100, 50, "a < b")
    picture.circle(np.float32(1.234567), 2, 3, note='"x" & y')
    picture.text(1, 2, " <k> ", anchor="end")
    root = minidom.parseString(str(picture)).documentElement
    assert [t.firstChild.data for t in root.getElementsByTagName("title")] == ["a < b", '"x" & y']
    assert root.getElementsByTagName("text")[0].firstChild.data == " <k> "
    assert root.getElementsByTagName("circle")[0].getAttribute("cx") == "1.23"


def test_written_file_is_the_picture(tmp_path):
    picture = Svg(10, 10, "empty")
    picture.write(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text("utf-8") == str(picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]
