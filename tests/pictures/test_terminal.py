"""The scatter plot of characters: marks are placed by value, and those in one place are listed."""

from minitx.pictures.terminal import HEIGHT, WIDTH, marks_of, plot


def test_marks_are_placed_by_their_values():
    lines = plot(marks_of({"one": [(0, 0)], "two": [(1, 10)]}), "x").splitlines()
    assert lines[0] == f"    10 |{'b':>{WIDTH}}" and lines[HEIGHT - 1] == "     0 |a"
    assert lines[-1] == "a one, b two", "nothing to list"


def test_points_of_several_methods_in_one_place_are_listed():
    series = {"one": [(0, 0), (1, 1)], "two": [(1, 1.001), (0.5, 0)], "three": [(0.501, 0)]}
    chart = plot(marks_of(series), "x")
    assert chart.splitlines()[-3:] == [
        "Overlapping points:",
        "x=0.5, y=0: b two, c three",
        "x=1, y=1: a one, b two",
    ]
    assert chart.splitlines()[HEIGHT - 1].endswith("b"), "the first method's letter is shown"


def test_points_of_one_method_in_one_place_are_not_listed():
    assert "in one place" not in plot(marks_of({"one": [(0, 0), (0, 0), (1, 1)]}), "x")


def test_labels_of_the_axis_never_touch():
    long = plot(marks_of({"one": [(123456789, 0), (987654321, 1)]}), "x" * 60)
    assert "1.23e+08 9.88e+08 xxx" in long


def test_logarithmic_axis_begins_at_its_least_value():
    lines = plot(marks_of({"one": [(0, -5), (1, 0.01), (2, 1)]}), "x", least=1e-4).splitlines()
    assert lines[HEIGHT - 1].startswith("0.0001 |a"), "smaller values are drawn there"
    assert lines[HEIGHT // 2][8 + WIDTH // 2 - 1 : 8 + WIDTH // 2 + 1].strip() == "a", (
        "0.01 is half way between 0.0001 and 1"
    )


def test_names_are_broken_between_names_only():
    series = {f"method number {i}": [(i, i)] for i in range(20)}
    names = plot(marks_of(series), "x").splitlines()[HEIGHT + 2 :]
    assert len(names) > 1 and all(len(line) <= 100 for line in names)
    assert all(line[1:].startswith(" method number ") for line in names), names
