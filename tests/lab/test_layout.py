"""Tables and paragraphs that fit a terminal."""

import textwrap

from minitx.lab.layout import COLUMNS, fit, table


def test_table_columns_are_aligned_names_left_and_figures_right():
    assert table([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"


def test_table_that_is_too_wide_breaks_its_headings_between_words_and_at_hyphens():
    rows = [["name", "multiply-adds", "loss above dense"], ["dense", "1.00x", "0.00"]]
    expected = """\
                    loss
       multiply-   above
name        adds   dense
dense      1.00x    0.00"""
    found = table(rows, 25)
    assert found.split() == expected.split() and max(map(len, found.splitlines())) <= 25
    assert found.splitlines()[-1] == "dense      1.00x   0.00"


def test_table_with_long_names_has_them_above_their_figures():
    found = table(
        [["setting", "loss"], ["dense", "0.0000"], ["threshold=0.9 skip=2", "+0.0021"]], 18
    )
    assert found.splitlines() == [
        "setting       loss",
        "dense       0.0000",
        "threshold=0.9",
        "skip=2",
        "           +0.0021",
    ]


def test_paragraph_is_broken_between_words_and_keeps_its_indentation():
    text = "  " + "word " * 40
    lines = fit(text).splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= COLUMNS
    assert all(line.startswith("  word") for line in lines)
    assert " ".join(textwrap.dedent(fit(text)).split()) == text.strip()
    assert fit("a b\nc", 1, hanging=0) == "a\nb\nc"


def test_lines_that_fit_are_left_alone():
    chart = "  |    a   b |\n  +----------+"
    assert fit(chart) == chart
