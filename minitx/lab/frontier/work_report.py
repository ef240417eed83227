"""The tables, text chart and picture of the families that equal_work.py measures."""

from collections.abc import Sequence
from textwrap import fill

from minitx.lab.evaluate import table
from minitx.lab.frontier.chart import Series, chart, curves
from minitx.lab.frontier.equal_work import Frontier, Row
from minitx.lab.frontier.families import family_of
from minitx.lab.layout import COLUMNS
from minitx.pictures.output import write_picture
from minitx.pictures.scatter import Panel, draw

OWN = "What saves bytes rather than multiply-adds, or hardly any of these, at settings of its own"
FAR = 0.05  # from the wanted share: too far to be compared without a word
LEAST = 0.001  # nats per token: where the logarithmic scale of losses begins


def as_text(f: Frontier) -> str:
    measured = [row for row in f.rows if row.figures]
    parts = [fill(about(f), COLUMNS), quality(f), fill(legend(f), COLUMNS)]
    if measured:
        parts += [f"What it saves (1.00x is dense):\n{costs(f)}", fill(COSTS, COLUMNS)]
    if any(row.share is None for row in measured):
        parts.append(f"{OWN}:\n{own(f)}")
    if series(f):
        parts.append(
            "Loss above dense (nats per token, logarithmic; at the bottom "
            f"{LEAST:g} or less) over the executed share:\n"
            + chart(series(f), "executed", least=LEAST)
        )
    return "\n\n".join(parts + list(filter(None, (left_out(f), notes(f)))))


def about(f: Frontier) -> str:
    dense = ", ".join(f"{name} {value}" for name, value in f.dense.items())
    return (
        f"{f.model or 'The model'} on {f.measured}. Dense: {dense}; {f.tokens_per_second:,.0f} "
        f"tokens/s. Methods are tuned on {f.tuning}. {f.calibrated}"
    )


def legend(f: Frontier) -> str:
    hops = " hops: answers that are right, in per cent." if f.accuracy else ""
    seeds = [(*row.losses, row.share) for row in f.rows if row.losses]
    spread = ", ".join(f"{low:+.3f} to {high:+.3f} at {share:g}" for low, high, share in seeds)
    spread = f" random: means over random plans; loss from {spread}."
    return (
        "executed: share of the dense model's multiply-adds while reading, head included (~: over "
        f"{FAR} off the wanted share, for want of a closer setting or on other texts). loss: "
        "nats per token above dense. KL: KL(dense || changed), nats per token. agrees: the argmax, "
        f"in per cent.{hops}{spread if seeds else ''}"
    )


COSTS = (
    "mult-adds, and bytes of weights and KV cache read: per new token when generating (prefill "
    "included). cache held: bytes of KV cache per token. memory: of all arrays. speed: of "
    "generating, timed in turns with dense."
)


def quality(f: Frontier) -> str:
    hops = hops_of(f)
    rows = [["method", "setting", "executed", "loss", "KL", "agrees", *hops]]
    dense = [f"{100 * f.accuracy[name]:.0f}" for name in hops]
    rows.append(["dense", "", "1.00", "0", "0", "100", *dense])
    for share in f.plan.shares:
        rows.append([f"{share:g}", *[""] * (len(rows[0]) - 1)])
        for row in rows_at(f, share):
            if row.figures:
                rows.append([f"  {row.method}", row.setting, *quality_cells(row, hops)])
            elif row.lowest is not None:
                rows.append([f"  {row.method}", f"not below {row.lowest:.2f}"])
                rows[-1] += [""] * (len(rows[0]) - 2)
    return table(rows)


def hops_of(f: Frontier) -> list[str]:
    """The columns of answers: those by hops, without counting questions, which are few."""
    return [name for name in f.accuracy if "hop" in name]


def quality_cells(row: Row, hops: Sequence[str]) -> list[str]:
    g = row.figures
    answers = [f"{100 * g.accuracy[name]:.0f}" for name in hops]
    far = row.share is not None and abs(g.executed - row.share) > FAR
    executed = f"{'~' * far}{g.executed:.2f}"
    loss = f"{g.added_loss:+.{4 if abs(g.added_loss) < 1 else 2}f}"
    return [executed, loss, f"{g.divergence:.2g}", f"{100 * g.agreement:.1f}", *answers]


def costs(f: Frontier) -> str:
    rows = [["method", "executed", *COST_HEADINGS]]
    for share in f.plan.shares:
        rows.append([f"{share:g}", *[""] * (len(rows[0]) - 1)])
        for row in rows_at(f, share):
            if row.figures:
                cells = f"{row.figures.executed:.2f}", *cost_cells(row)
                rows.append([f"  {row.method}", *cells])
    return table(rows)


COST_HEADINGS = ("mult-adds", "weights", "cache", "cache held", "memory", "speed")


def cost_cells(row: Row) -> list[str]:
    g = row.figures
    sizes = g.multiply_adds, g.weight_bytes, g.cache_bytes, g.cache, g.memory, g.speed
    return [f"{x:.2f}x" for x in sizes]


def own(f: Frontier) -> str:
    """The methods without a knob."""
    hops = hops_of(f)
    rows = [["method", "cache held", "memory", "speed", "executed", "loss", "KL", "agrees", *hops]]
    for row in rows_at(f, None):
        if row.figures:
            *_, cache, memory, speed = cost_cells(row)
            name = f"{row.method} {row.setting}".strip()
            rows.append([name, cache, memory, speed, *quality_cells(row, hops)])
    return table(rows)


def left_out(f: Frontier) -> str:
    """Why methods have no figures: once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in f.rows:
        if row.reason:
            at = [] if row.share is None else [f"{row.share:g}"]
            reasons.setdefault((row.method, row.reason), []).extend(at)
    lines = []
    for (method, reason), shares in reasons.items():
        whole = len(shares) in (0, len(f.plan.shares))
        name = method if whole else f"{method} at {', '.join(shares)}"
        lines.append(fill(f"{name}: {reason}", COLUMNS, subsequent_indent="    "))
    return "\n".join(["Without figures:", *lines]) if lines else ""


def notes(f: Frontier) -> str:
    """What techniques warn of: once, for all that say the same of themselves."""
    said: dict[str, list[str]] = {}
    for row in f.rows:
        for note in row.notes:
            name, _, words = note.partition(" ")
            said.setdefault(words, []).append(name.rstrip(":"))
    lines = [f"{', '.join(dict.fromkeys(names))}: {words}" for words, names in said.items()]
    lines = [fill(line, COLUMNS, subsequent_indent="    ") for line in lines]
    return "\n".join(["Notes:", *lines]) if lines else ""


# Charts ------------------------------------------------------------------------------------------


def rows_at(f: Frontier, share: float | None) -> list[Row]:
    return [row for row in f.rows if row.share == share]


def series(f: Frontier, value=lambda g: g.added_loss) -> Series:
    """(executed share, value) of each row, by its method."""
    found: Series = {}
    for row in f.rows:
        if row.figures and row.share is not None:
            found.setdefault(row.method, []).append((row.figures.executed, value(row.figures)))
    return found


def answers_right(accuracy: dict[str, float], hops: Sequence[str]) -> float:
    """The mean over the numbers of hops."""
    return sum(accuracy[name] for name in hops) / len(hops)


def picture(f: Frontier, path) -> None:
    """The curves as an SVG or PNG file (output.py)."""
    write_picture(draw(panels(f), f"{f.model}: {f.family}"), path)


def panels(f: Frontier) -> list[Panel]:
    """Loss, and right answers (on a text: how often the argmax agrees), over the executed share."""
    share, baselines = "executed share of multiply-adds", family_of(f.family).baselines
    loss = Panel(
        curves(series(f), baselines),
        share,
        "loss above dense (nats per token)",
        log_y=True,
        least=LEAST,
    )
    if hops := hops_of(f):
        found = series(f, lambda g: answers_right(g.accuracy, hops))
        level, what = answers_right(f.accuracy, hops), "answers right, mean over hops"
    else:
        found = series(f, lambda g: g.agreement)
        level, what = 1.0, "share of tokens with the same argmax"
    return [loss, Panel(curves(found, baselines), share, what, level=level)]
