"""A progress bar names what is done, ends at 100 %, and is drawn on a terminal only."""

import io
import os
import re
import select
import sys

import pytest

from minitx import progress


class Screen(io.StringIO):
    """A terminal that remembers what is written to it."""

    def isatty(self):
        return True

    def lines(self):
        """What is left on the screen: of each line, what was written after the last return."""
        return [line.rpartition("\r")[2].rstrip() for line in self.getvalue().split("\n")]


@pytest.fixture
def look(monkeypatch):
    """look(): from now on stderr is a screen. (pytest would undo that before the test begins.)"""

    def begin():
        monkeypatch.setattr(sys, "stderr", Screen())
        return sys.stderr

    return begin


def test_bar_of_a_loop_says_what_is_done_and_ends_at_100_percent(look):
    screen = look()
    assert list(progress.bar("abc", "learn thresholds", unit="text")) == ["a", "b", "c"]
    line, rest = screen.lines()
    assert re.match(r"learn thresholds: 100%\|.*\| 3/3 \[.*text", line) and rest == ""


@pytest.mark.parametrize("done", [2, 5, 7])
def test_bar_of_a_number_of_steps_ends_at_100_percent_however_many_there_were(look, done):
    screen = look()
    with progress.bar(5, "compare") as shown:
        for _ in range(done):
            shown.update()
    assert re.match(rf"compare: 100%\|.*\| {done}/{done} ", screen.lines()[0])


def test_bar_of_interrupted_work_stays_where_it_is_and_what_follows_has_its_own_line(look):
    screen = look()
    with pytest.raises(KeyboardInterrupt):
        with progress.bar(4, "compare") as shown:
            shown.update()
            raise KeyboardInterrupt
    steps = iter(progress.bar(range(4), "sweep"))
    next(steps), next(steps)  # a loop that an error ends
    progress.close_all()
    progress.say("minitx: stopped.")
    compare, sweep, message, end = screen.lines()
    assert compare.startswith("compare:  25%|") and re.match(r"sweep: +\d+%\|", sweep)
    assert (message, end) == ("minitx: stopped.", "")


def test_inner_bar_is_erased_and_the_outer_one_stays(look):
    screen = look()
    for _ in progress.bar(range(2), "outer"):
        list(progress.bar(range(3), "inner"))
    assert "inner: 100%" not in screen.lines()[-1]
    assert screen.lines()[-2].startswith("outer: 100%") or "outer: 100%" in screen.getvalue()


def test_note_stands_above_a_bar(look):
    screen = look()
    with progress.bar(2, "compare") as shown:
        progress.say("minitx: note: slow")
        shown.update(2)
    note, bar, _ = screen.lines()
    assert note == "minitx: note: slow" and bar.startswith("compare: 100%")


def test_quick_work_with_a_delay_shows_no_bar(look):
    screen = look()
    list(progress.bar(range(3), "quick", delay=60))
    assert screen.getvalue() == ""


def test_nothing_is_written_where_nobody_looks(monkeypatch, capfd):
    list(progress.bar(range(3), "into a pipe"))
    monkeypatch.setattr(sys, "stderr", Screen())
    list(progress.bar(range(3), "not wanted", shown=False))
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)  # closed
    list(progress.bar(range(3), "closed"))
    progress.say("to nobody")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_bar_is_drawn_on_a_terminal_without_a_size(monkeypatch):
    master, slave = os.openpty()  # 0 columns, as in a container
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        list(progress.bar(range(3), "learn"))
        found = b""
        while b"100%|" not in found and select.select([master], [], [], 5)[0]:
            found += os.read(master, 10_000)  # a read may end between two writes
    os.close(master)
    assert b"learn: 100%|" in found
