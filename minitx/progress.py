"""Progress bars: one way for everything that takes longer than a moment.

    for ids in bar(texts, "elsa: learn thresholds", unit="text"): ...

    with bar(12, "compare", unit="step") as progress:
        progress.update()

A bar says what is done, ends at 100 % and is drawn only where somebody sees it: on stderr, if that
is a terminal. Nothing is written into a file, a pipe or a notebook.
"""

import os
import sys
from collections.abc import Iterable


def bar(
    work: int | Iterable,
    label: str,
    unit: str = "step",
    delay: float = 0.0,
    shown=True,
    total: int | None = None,
):
    """A progress bar over ``work``: a number of steps, or an iterable to loop over.

    label: what is being done. unit: of what one step is. delay: seconds before the bar appears, for
    work that is usually over by then. shown: False for no bar at all. total: the number of items of
    an iterable that does not know its length. Returns a tqdm bar: iterate over it, or use ``with``
    and call ``update()``, ``set_description(label)``.
    """
    many = {"total": work} if isinstance(work, int) else {"iterable": work, "total": total}
    shown = shown and _is_terminal()
    return _bar_type()(
        **many,
        desc=label,
        unit=unit,
        delay=delay,
        disable=not shown,
        leave=None,  # the outermost bar stays on the screen; one inside another is erased
        ncols=_columns() if shown else None,
        nrows=20,  # without it tqdm draws nothing where a terminal says that it has no rows
        miniters=1,  # draw whenever 0.1 s have passed, however unequal the steps are
    )


def say(text: str) -> None:
    """Print a line on stderr, above the bars that are being shown."""
    if not sys.stderr:  # None if it is closed, and print would then take stdout
        return
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr)


def close_all() -> None:
    """Close the bars that an error has left open, so that what follows starts on its own line."""
    if "tqdm" in sys.modules:
        for left_open in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            left_open.close()


def _is_terminal() -> bool:
    return bool(sys.stderr) and sys.stderr.isatty()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0: it has no size
    except OSError:
        return 80


def _bar_type() -> type:
    from tqdm import tqdm  # imported late: most commands never draw a bar

    class Bar(tqdm):
        monitor_interval = 0  # no thread beside the work that is being timed

        def __exit__(self, kind, value, traceback):
            """At the end of a ``with`` without an error, the work is done: that is 100 %."""
            if kind is None:
                self.total = self.n
            self.close()

    return Bar
