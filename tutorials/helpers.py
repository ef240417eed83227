"""What every tutorial needs and none of them teaches: titles, tables, bar charts, fair timing, the
model ``stories`` and text to judge it by.

A tutorial is run as ``python tutorials/NN_name.py``, so this file is found beside it:

    from helpers import bar_chart, print_table, title
"""

import difflib
import os
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import minitx
from minitx.ledger import Ledger, counting
from minitx.training.data import StoryEncoder
from minitx.training.loss import token_losses
from minitx.training.stories import HOPS, KINDS, first_stories

COLUMNS = 100  # of text on the screen

# A short story that all tutorials know, and a question about it.
STORY = (
    "Once upon a time there was a boy named Tom. Tom was in the garden. Anna was in the kitchen. "
    "Tom went to the park."
)
QUESTION = " Where is Tom? Tom is in the"
ANSWER = " park"  # a word carries the space before it


# Text on the screen ------------------------------------------------------------------------------


def title(text):
    """Print the title of a section, underlined."""
    print(f"\n{text}\n{'-' * len(text)}")


def say(*sentences):
    """Print sentences as one paragraph, wrapped to the width of the screen."""
    print(textwrap.fill(" ".join(sentences), COLUMNS))


def print_table(headings, rows):
    """Print rows in columns, the first to the left and the others to the right.

    Integers are printed with commas, everything else as it is: format floats yourself, f"{x:.2f}".
    """
    lines = [list(headings)]
    for row in rows:
        lines.append([f"{cell:,}" if _is_integer(cell) else str(cell) for cell in row])
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        print("  " + "   ".join(cells).rstrip())


def _is_integer(cell):
    return isinstance(cell, int | np.integer) and not isinstance(cell, bool)


def bar(value, largest, width=40):
    """A bar of "#" whose length is proportional to the value; ``largest`` fills the width. A value
    above 0 has at least one."""
    return "#" * max(int(value > 0), round(width * value / largest))


def bar_chart(labels, values, form="{:,}", width=40):
    """Print a bar for each value; ``form`` says how the values are written, say "{:.1%}"."""
    labels, numbers = [str(label) for label in labels], [form.format(value) for value in values]
    largest = max(values) or 1
    for label, number, value in zip(labels, numbers, values):
        label = label.ljust(max(map(len, labels)))
        print(f"  {label}  {number.rjust(max(map(len, numbers)))} {bar(value, largest, width)}")


SHADES = ".,:-=+*#%@"  # a tenth each: "." is below 10 %, "@" is 90 % and more


def shade(weights):
    """One character for each weight between 0 and 1, darker for larger ones: see ``SHADES``."""
    return "".join(SHADES[min(int(10 * weight), 9)] for weight in weights)


def print_vertically(words, indent):
    """Print words from top to bottom side by side, as headings of columns that are two characters
    wide and begin after ``indent`` spaces."""
    for row in range(max(map(len, words))):
        letters = [word[row] if row < len(word) else " " for word in words]
        print((" " * indent + " ".join(letters)).rstrip())


def tree_changes(before, after):
    """Print two trees of parts as one: "-" marks lines of ``before`` only, "+" of ``after`` only,
    which follow them; unchanged parts are left out, but for those that contain a change."""
    old, new = repr(before).splitlines(), repr(after).splitlines()
    lines = []
    for same, i, i_end, j, j_end in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if same == "equal":
            lines += [f"  {line}" for line in old[i:i_end]]
        else:
            lines += [f"- {line}" for line in old[i:i_end]]
            lines += [f"+ {line}" for line in new[j:j_end]]
    for i, line in enumerate(lines):
        if line[0] != " " or _contains_change(lines[i:]):
            print(line.rstrip())


def _contains_change(lines):
    """Is one of the lines below the first, which are indented deeper, marked as changed?"""
    depth = _indent(lines[0])
    for line in lines[1:]:
        if _indent(line) <= depth:
            return False
        if line[0] != " ":
            return True
    return False


def _indent(line):
    """How deep a line of a tree stands, its mark (2 characters) not counted."""
    return len(line[2:]) - len(line[2:].lstrip())


# Numbers -----------------------------------------------------------------------------------------


def largest_error(found, expected):
    """The largest absolute difference, relative to the largest absolute value expected."""
    return float(abs(found - expected).max() / abs(expected).max())


def time_side_by_side(*tasks, repeats=9, own_time=False):
    """The best time of each task, in seconds. The tasks take turns (A B A B ...), so that a busy
    moment of the machine hits all of them; a first turn warms up and is not counted.

    own_time: do not count the time in which other programs have the processor, which on a busy
    machine matters for tasks of many milliseconds. (Windows counts it: its clock of a thread is too
    coarse.)
    """
    clock = time.thread_time if own_time and os.name != "nt" else time.perf_counter
    best = [float("inf")] * len(tasks)
    for turn in range(repeats + 1):
        for i, task in enumerate(tasks):
            began = clock()
            task()
            seconds = clock() - began
            if turn > 0:
                best[i] = min(best[i], seconds)
    return best


def speedup(before, after, repeats=9):
    """How many times as fast as ``before`` the task ``after`` is, by their best times. Above 1:
    faster."""
    slow, fast = time_side_by_side(before, after, repeats=repeats)
    return slow / fast


def verdict(ratio):
    """A speedup in words. 5 % is about what repeating the measurement changes."""
    if 0.95 <= ratio <= 1.05:
        return "no clear difference"
    return "faster" if ratio > 1 else "slower"


# The model and its cost --------------------------------------------------------------------------


def load_stories(**options):
    """The language model ``stories``, and a line about its shape. Options are those of
    ``minitx.load``: a dtype, or techniques by name."""
    lm = minitx.load("stories", **options)
    c = lm.model.config
    print(
        f"{lm.name}: D={c.width} H={c.heads} K={c.kv_heads} d={c.head_width} F={c.hidden} "
        f"V={c.vocab_size} L={c.layers}, context {c.context}"
    )
    return lm


def decode_last(lm, ids):
    """A function that decodes the last of the ids, the others being in the KV cache, and can be
    called (and timed) again and again. It returns the most likely next token."""
    state = lm.model.new_state()
    if len(ids) > 1:
        lm.model.next_argmax(ids[:-1], state)

    def step():
        token = lm.model.next_argmax(ids[-1:], state)
        state.rewind(len(ids) - 1)
        return token

    return step


def count_last(lm, ids) -> Ledger:
    """What decoding the last of the ids costs, the others being in the KV cache, as the ledger
    counts it: ``count_last(lm, ids).total().multiply_adds``."""
    step = decode_last(lm, ids)
    with counting(lm) as counts:
        step()
    return counts


# Text to judge a model by ------------------------------------------------------------------------


def held_out_stories(count, grade="full"):
    """Stories that no model was trained on and no technique is calibrated on. ``story.text`` is the
    text of one."""
    return first_stories("evaluation", grade, 0, count)


def calibration_stories(count, grade="full"):
    """Stories to calibrate on (choose thresholds, say), which are not held out for judging."""
    return first_stories("calibration", grade, 0, count)


@dataclass
class Scores:
    """How well a model predicts the tokens of stories, by how many facts a token depends on.

    The keys are "other text", "1 hop", "2 hops", "3 hops" and "counts" (how many apples?).
    """

    loss: dict[str, float]  # mean negative log-likelihood, nats per token
    accuracy: dict[str, float]  # share of tokens that are the model's most likely one
    mean_loss: float  # over all tokens


def evaluate_stories(lm, read):
    """The ``Scores`` of a language model on stories, each read in one forward pass."""
    encoder, losses, right = StoryEncoder(lm.tokenizer), {}, {}
    for story in read:
        ids, kinds, _ = encoder.story(story)
        logits, targets = lm.logits([encoder.end, *ids[:-1]]), np.array(ids)
        each, hit = token_losses(logits, targets), logits.argmax(-1) == targets
        for group, loss, ok in zip(map(_group_of, kinds), each, hit):
            losses.setdefault(group, []).append(float(loss))
            right.setdefault(group, []).append(bool(ok))
    groups = [group for group in GROUPS if group in losses]
    everything = [loss for group in groups for loss in losses[group]]
    return Scores(
        {group: float(np.mean(losses[group])) for group in groups},
        {group: float(np.mean(right[group])) for group in groups},
        float(np.mean(everything)),
    )


def answers_in(lm, read):
    """The answers in stories that take 1 to 3 hops, as (ids of the text before the answer, id of
    the answer, "1 hop", "2 hops" or "3 hops")."""
    encoder, found = StoryEncoder(lm.tokenizer), []
    for story in read:
        ids, kinds, _ = encoder.story(story)
        for t, kind in enumerate(kinds):
            if _group_of(kind).endswith(("hop", "hops")):
                found.append(([encoder.end, *ids[:t]], ids[t], _group_of(kind)))
    return found


GROUPS = ("other text", "1 hop", "2 hops", "3 hops", "counts")


def _group_of(kind):
    """The group of a target: kind 0 is ordinary text, kind k + 1 an answer of the kind KINDS[k]."""
    if kind == 0:
        return GROUPS[0]
    return GROUPS[HOPS[KINDS[kind - 1]] or -1]  # an answer with 0 hops is a count


# Pictures ----------------------------------------------------------------------------------------


def save_picture(name, draw):
    """Save what ``draw(axes)`` draws as a PNG and say where; without matplotlib, say what it needs.

    No tutorial needs the picture: the same numbers are printed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(
            "(With matplotlib installed, this is also saved as a picture: pip install matplotlib)"
        )
        return
    folder = Path(tempfile.gettempdir()) / "minitx-tutorials"
    folder.mkdir(exist_ok=True)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw(figure.subplots())
    figure.savefig(folder / f"{name}.png", dpi=120)
    print(f"(Picture: {folder / name}.png)")


def save_lines(name, x, lines, x_label, y_label, log=False):
    """Save a picture with one line for each entry of ``lines``, {"what it is": values at x}. log:
    both axes on a logarithmic scale."""

    def draw(axes):
        for label, values in lines.items():
            axes.plot(x, values, marker="o", label=label)
        axes.set(xlabel=x_label, ylabel=y_label)
        if log:
            axes.loglog()
        axes.legend()

    save_picture(name, draw)
