"""The tables, text charts and picture of ``minitx frontier attention`` (attention.py)."""

from collections.abc import Iterable, Sequence
from fractions import Fraction

from minitx.lab.evaluate import hops_name, percent, table
from minitx.lab.frontier.attention import AttentionComparison, Point, Quality, bytes_read
from minitx.lab.frontier.attention_baselines import BASELINES
from minitx.lab.frontier.attention_published import NOTES, PUBLISHED
from minitx.lab.frontier.chart import Series, chart, curves
from minitx.lab.reading import TextReport
from minitx.pictures.output import write_picture
from minitx.pictures.scatter import Panel, draw


def as_text(c: AttentionComparison) -> str:
    plan = c.plan
    heads = "{heads} query heads on {kv_heads} key heads of width {head_width}".format(**c.shape)
    share = fraction(smallest(c))
    return f"""\
{what_is_read(c)}

{qualities(c)}

{answers_by_hops(c)}\
kept: share of the keys that queries see. mass: share of the exact attention that lies on the kept
keys; best: on as many of the best keys. {what_is_lost(c)}
multiply-adds, bytes: of attention for one token at {plan.tokens} keys, without the projections,
relative to dense attention. ~: over a tenth off the wanted share.

Attention mass kept, over the share of keys kept:
{chart(masses(c), "keys kept")}

Speedup of one block's attention for one decoded token over dense attention, at growing contexts
({heads}); kept: share of the keys of the timed queries.
{speeds(c)}

The same at a share of {share}, over the context, which doubles from mark to mark:
{chart(speed_series(c), "doublings")}

The papers' own trade-offs, on other models and tasks, and ours; below each, of what:
{trade_offs(c)}"""


def what_is_read(c: AttentionComparison) -> str:
    plan, name = c.plan, c.model or "The model"
    if c.text_name is not None:
        read = f"{name} reads {plan.chains} windows of {plan.tokens} tokens of {c.text_name}"
        return f"{read};\nmethods are tuned on {plan.calibration} more before them."
    answers = sum(c.dense.report.answers.values())
    return (
        f"{name} reads {plan.chains} chains of {plan.tokens} tokens of evaluation stories, "
        f"grade {plan.grade}, {answers} answers; methods are tuned on calibration stories."
    )


def what_is_lost(c: AttentionComparison) -> str:
    if c.text_name is not None:
        return "right: tokens that are the argmax."
    return "above entropy: loss of ordinary\ntext above the entropy of the stories, nats per token."


# Tables ------------------------------------------------------------------------------------------


def qualities(c: AttentionComparison) -> str:
    losses = loss_columns(c.dense)
    rows = [["method", "setting", "kept", "mass", "best", *losses, "multiply-adds", "bytes"]]
    rows.append(["dense", "", *quality_cells(c.dense, c.dense)])
    for share in c.plan.shares:
        rows.append([fraction(share), *[""] * (len(rows[0]) - 1)])
        for p in points_at(c, share):
            cells = quality_cells(p.quality, c.dense)
            if abs(p.quality.kept - share) > share / 10:
                cells[0] = "~" + cells[0]
            rows.append([f"  {p.method}", p.setting, *cells])
    return stripped(table(rows))


def answers_by_hops(c: AttentionComparison) -> str:
    """A table of its own, so that lines stay short; "" for a text, which has no answers."""
    if isinstance(c.dense.report, TextReport):
        return ""
    hops = list(c.dense.report.by_hops)

    def cells(q: Quality) -> list[str]:
        return [percent(q.accuracy), *(percent(q.report.by_hops[h]) for h in hops)]

    rows = [["method", "all answers", *map(hops_name, hops)], ["dense", *cells(c.dense)]]
    for share in c.plan.shares:
        rows.append([fraction(share), *[""] * (len(rows[0]) - 1)])
        rows += [[f"  {p.method}", *cells(p.quality)] for p in points_at(c, share)]
    table_of_answers = stripped(table(rows))
    return f"""Answers that are right, by the number of facts that they need:
{table_of_answers}

"""


def stripped(text: str) -> str:
    """Without blanks at the ends of lines."""
    return "\n".join(map(str.rstrip, text.splitlines()))


def loss_columns(q: Quality) -> dict[str, str]:
    """What is lost, by heading."""
    r = q.report
    if isinstance(r, TextReport):
        found = {"nats per token": f"{r.loss:.4f}", "perplexity": f"{r.perplexity:,.2f}"}
        return found | {"right": percent(r.accuracy)}
    return {"above entropy": f"{r.gap:+.4f}"}


def quality_cells(q: Quality, dense: Quality) -> list[str]:
    shares = [percent(x) for x in (q.kept, q.mass, q.best)]
    return [
        *shares,
        *loss_columns(q).values(),
        f"{q.cost.multiply_adds / dense.cost.multiply_adds:.2f}x",
        f"{bytes_read(q.cost) / bytes_read(dense.cost):.2f}x",
    ]


def speeds(c: AttentionComparison) -> str:
    contexts = c.plan.contexts
    rows = [["method", "share", *(f"{S:,}" for S in contexts), "faster from", "kept"]]
    dense = [f"{1e6 * s.dense_seconds:,.0f} us" for s in c.points[0].speeds]
    rows.append(["dense", "1", *dense, "", ""])
    for p in c.points:
        ratios = [f"{speed.ratio:.2f}x" for speed in p.speeds]
        kept = [100 * speed.kept for speed in p.speeds]
        kept = f"{min(kept):.0f} to {max(kept):.0f} %"  # of the keys of the timed queries
        rows.append([p.method, fraction(p.share), *ratios, faster_from(p, contexts), kept])
    return table(rows)


def faster_from(p: Point, contexts: Sequence[int]) -> str:
    return f"{p.crossover:,}" if p.crossover else f"never up to {max(contexts):,}"


def fraction(share: float) -> str:
    """0.25 as 1/4"""
    return str(Fraction(share).limit_denominator(1000))


def trade_offs(c: AttentionComparison) -> str:
    """For each technique, what its paper reports and what was measured here."""
    rows = [["technique", "whose", "keys kept", "change of the metric", ""]]
    for name in dict.fromkeys(row.technique for row in PUBLISHED):
        for row in (row for row in PUBLISHED if row.technique == name):
            what = ", ".join(filter(None, (row.what, row.source)))
            rows.append([name, "theirs", numbers(row.kept, ".3g"), numbers(row.change), what])
        ours = [p.quality for p in c.points if p.method == name]
        if ours:
            kept = numbers([q.kept for q in ours], ".2g")
            change = numbers([q.accuracy - c.dense.accuracy for q in ours])
            of = "answers in stories" if c.text_name is None else "next tokens of the text"
            what = f"{of} (dense {c.dense.accuracy:.3f})"
            rows.append([name, "ours", kept, change, what])
    widths = [max(map(len, column)) for column in zip(*rows)][:-1]
    lines = []
    for *figures, what in rows:
        lines.append("  ".join(w.ljust(n) for w, n in zip(figures, widths)).rstrip())
        lines += [f"  {what}"] if what else []
    return "\n".join([*lines, *NOTES])


def numbers(found: Iterable[float], form: str = "+.3f") -> str:
    return " ".join(f"{x:{form}}" for x in found) or "-"


# Charts ------------------------------------------------------------------------------------------


def points_at(c: AttentionComparison, share: float) -> list[Point]:
    return [p for p in c.points if p.share == share]


def smallest(c: AttentionComparison) -> float:
    return min(c.plan.shares)


def by_method(c: AttentionComparison, measured) -> Series:
    """(share of keys kept, measured(point)) of each point, by its method."""
    found: Series = {}
    for p in c.points:
        found.setdefault(p.method, []).append((p.quality.kept, measured(p)))
    return found


def masses(c: AttentionComparison) -> Series:
    return by_method(c, lambda p: p.quality.mass)


def accuracies(c: AttentionComparison) -> Series:
    return by_method(c, lambda p: p.quality.accuracy)


def speed_series(c: AttentionComparison) -> Series:
    """At the smallest share: (number of the context, speedup over dense), by method."""
    at = points_at(c, smallest(c))
    return {p.method: [(i, s.ratio) for i, s in enumerate(p.speeds)] for p in at}


def picture(c: AttentionComparison, path) -> None:
    """The curves as an SVG or PNG file (output.py)."""
    write_picture(draw(panels(c), f"{c.model}: keys selected by each method"), path)


def panels(c: AttentionComparison) -> list[Panel]:
    kept = "share of keys kept"
    contexts = c.plan.contexts
    speeds = {
        method: [(contexts[i], ratio) for i, ratio in points]
        for method, points in speed_series(c).items()
    }
    return [
        Panel(curves(masses(c), BASELINES), kept, "share of the attention mass kept"),
        Panel(
            curves(accuracies(c), BASELINES), kept, "accuracy of answers", level=c.dense.accuracy
        ),
        Panel(
            curves(speeds, BASELINES),
            "context (keys that the query sees)",
            f"speedup over dense attention, share {fraction(smallest(c))}",
            log_x=True,
            log_y=True,
            level=1.0,
            ticks=[(S, f"{S:,}") for S in contexts],
        ),
    ]
