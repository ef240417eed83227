"""The tables, text chart and picture of ``minitx frontier decoding`` (decoding.py measures)."""

from textwrap import fill

from minitx.lab.frontier.chart import Series, chart, curves
from minitx.lab.frontier.decoding import GREEDY, SAMPLED, SAMPLERS, Decoding, Figures, Row
from minitx.lab.frontier.decoding_methods import PLAIN
from minitx.lab.layout import COLUMNS, table
from minitx.pictures.output import write_picture
from minitx.pictures.scatter import Panel, draw


def as_text(d: Decoding) -> str:
    parts = [fill(about(d), COLUMNS)]
    for sampling in SAMPLERS:
        parts.append(f"{heading(d, sampling)}\n{figures(d, sampling)}")
    parts.append(fill(LEGEND, COLUMNS))
    if any(len(points) for name, points in series(d, GREEDY).items() if name != PLAIN):
        title = "Greedy: speed (x plain) over new tokens per call of the model:"
        parts.append(f"{title}\n{chart(series(d, GREEDY), 'tokens per call')}")
    return "\n\n".join(parts + list(filter(None, (left_out(d), notes(d)))))


LEGEND = (
    "~: approximate, the others are exact. tokens per call: new tokens per pass of the model that "
    "computes logits (-: it did not run). other calls: of second models, and passes of the model's "
    "first layers only, per new token. mult-adds, and bytes of weights and KV cache read: per new "
    "token, relative to plain decoding, prefill and second models included. first token: how many "
    "times sooner; speed: tokens per second relative to plain decoding; after each its lowest and "
    "highest in the rounds. same text: greedy texts that are those of plain decoding (and, if not "
    "all, the share of tokens before the first difference). seen before: the same prompts again, "
    "with what the method has stored (minitx first-token: prompts that share only their beginning)."
)


def about(d: Decoding) -> str:
    plan = d.plan
    stopped = f" Stopped after {d.rounds} of {plan.rounds} rounds." if d.stopped else ""
    return (
        f"{d.model or 'The model'} continues {d.measured}, from {plan.length} tokens each, by up "
        f"to {plan.new} (until end-of-text). Second model: {plan.small}.{stopped}"
    )


def heading(d: Decoding, sampling: str) -> str:
    return (
        f"{sampling[0].upper() + sampling[1:]}; plain decoding: first token after "
        f"{1e3 * d.first[sampling]:.2f} ms, {d.tokens_per_second[sampling]:,.0f} tokens/s."
    )


HEADINGS = (
    "tokens per call", "other calls", "mult-adds", "weights", "cache", "first token", "speed",
)  # fmt: skip


def figures(d: Decoding, sampling: str) -> str:
    greedy = sampling == GREEDY
    rows = [["method", *HEADINGS, *["same text"] * greedy]]
    for row in rows_at(d, sampling):
        name = "  seen before" if row.seen else f"{'~' * (not row.exact)}{row.method}"
        rows.append([name, *cells(row.figures)])
        if greedy:
            rows[-1].append(same(row.figures, d))
    return table(rows)


def rows_at(d: Decoding, sampling: str) -> list[Row]:
    return [row for row in d.rows if row.sampling == sampling and row.figures]


def cells(f: Figures) -> list[str]:
    per_call = "-" if f.tokens_per_call is None else f"{f.tokens_per_call:.2f}"
    costs = (f.other_calls, f.multiply_adds, f.weight_bytes, f.cache_bytes)
    return [per_call, *(f"{x:.2f}" for x in costs), times(f.first), times(f.speed)]


def times(found: dict[str, float]) -> str:
    """1.18 1.10-1.31: median, lowest, highest."""
    middle, low, high = (found[name] for name in ("median", "lowest", "highest"))
    digits = 2 if high < 10 else 1 if high < 100 else 0
    return f"{middle:.{digits}f} {low:.{digits}f}-{high:.{digits}f}"


def same(f: Figures, d: Decoding) -> str:
    """8/8, or 6/8 91%"""
    texts = number_of_prompts(d)
    return f"{f.same}/{texts}" + f" {100 * f.agreement:.0f}%" * (f.same < texts)


def number_of_prompts(d: Decoding) -> int:
    """How many prompts there are: those that plain decoding continues as it does itself."""
    return next(row.figures.same for row in rows_at(d, GREEDY) if row.method == PLAIN)


def left_out(d: Decoding) -> str:
    """Why methods have no figures: once for all that have the same reason."""
    reasons: dict[str, list[str]] = {}
    for row in d.rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.method)
    lines = [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in reasons.items()]
    lines = [fill(line, COLUMNS, subsequent_indent="    ") for line in lines]
    return "\n".join(["Without figures:", *lines]) if lines else ""


def notes(d: Decoding) -> str:
    """What techniques warn of, once each."""
    said = dict.fromkeys(note for row in d.rows for note in row.notes)
    lines = [fill(note, COLUMNS, subsequent_indent="    ") for note in said]
    return "\n".join(["Notes:", *lines]) if lines else ""


# Charts ------------------------------------------------------------------------------------------


def series(d: Decoding, sampling: str) -> Series:
    """(tokens per call, speed) of each method on new prompts."""
    found: Series = {}
    for row in rows_at(d, sampling):
        if not row.seen and row.figures.tokens_per_call is not None:
            point = row.figures.tokens_per_call, row.figures.speed["median"]
            found[row.method] = [point]
    return found


def picture(d: Decoding, path) -> None:
    """Both ways of sampling side by side, as an SVG or PNG file (output.py)."""
    write_picture(draw(panels(d), f"{d.model}: ways to decode"), path)


def panels(d: Decoding) -> list[Panel]:
    speed = "tokens per second, relative to plain decoding"
    return [
        Panel(
            curves(series(d, sampling), line=False),
            "new tokens per call of the model",
            speed,
            level=1.0,
            title=f"{sampling}: {speed}",
        )
        for sampling in (GREEDY, SAMPLED)
    ]
