"""What ``minitx report`` prints: the Pareto fronts, a chart, and what could not be measured."""

from textwrap import fill

from minitx.lab.layout import COLUMNS, table
from minitx.lab.report.points import (
    COSTS,
    GROUPS,
    LEAST,
    MOST,
    MOST_COST,
    NOT_MEASURED,
    Cost,
    Points,
    front,
)
from minitx.pictures.terminal import marks_of, plot
from minitx.technique import find


def summary(found: Points, about: dict | None = None) -> str:
    """About 60 lines. about: of the results, if they are at hand."""
    parts = [fill(opening(found, about), COLUMNS)]
    for cost, name in COSTS.items():
        heading = f"Pareto front, {name} (nothing else costs less and loses less):"
        parts.append(f"{heading}\n{front_table(found, cost)}")
    parts.append(
        f"Loss above dense (nats per token, logarithmic from {LEAST:g}) over multiply-adds:\n"
        + text_chart(found)
    )
    if found.without:
        parts.append(left_out(found))
    return "\n\n".join(parts)


def left_out(found: Points) -> str:
    """Techniques without a point, each with the reason."""
    why = {name: reason for name, reason in found.without.items() if reason != NOT_MEASURED}
    lines = [fill(f"{name}: {reason}", COLUMNS, subsequent_indent="    ")
             for name, reason in why.items()]  # fmt: skip
    if others := [name for name in found.without if name not in why]:
        lines.append(
            fill(f"{', '.join(others)}: {NOT_MEASURED}", COLUMNS, subsequent_indent="    ")
        )
    return "\n".join(["Without a point:", *lines])


def opening(found: Points, about: dict | None) -> str:
    measured = {p.technique for p in found.points if not p.baseline}
    text = f"{found.model} on {found.measured}: {len(measured)} techniques at "
    text += f"{len(found.points)} settings."
    if about:
        dense = ", ".join(f"{name} {value}" for name, value in about["dense"].items())
        text += (
            f" Dense: {dense}; {about['tokens_per_second']:,.0f} tokens/s. {about['calibrated']}"
        )
        text += " Stopped early; the same command goes on." * about.get("stopped", False)
    return text


def front_rows(found: Points, cost: str) -> list[list[str]]:
    rows = [["method", "setting", *COSTS.values(), "loss"]]
    for p in front(found.points, cost):
        costs = [f"{getattr(p, name):.3f}x" for name in COSTS]
        rows.append([p.method, p.setting, *costs, f"{p.loss:+.4f}"])
    return rows


def front_table(found: Points, cost: str) -> str:
    rows = [[f"{name} {setting}".strip(), *cells] for name, setting, *cells in
            front_rows(found, cost)]  # fmt: skip
    rows[0][0] = "method"
    return table(rows)


def text_chart(found: Points) -> str:
    """Letters by group; points beyond the edge are drawn at it."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name in (*GROUPS, "baselines"):
        own = [p for p in found.points if group_of(p) == name]
        if own:
            series[name] = [(min(p.operations, MOST_COST), min(p.loss, MOST)) for p in own]
    series["dense"] = [(1.0, 0.0)]
    return plot(marks_of(series), "multiply-adds, relative to dense", least=LEAST, shared=False)


def group_of(p: Cost) -> str:
    if p.baseline:
        return "baselines"
    level = find(p.technique).level
    return next(name for name, levels in GROUPS.items() if level in levels)
