"""The HTML page of a report: the three Pareto charts, then each technique's tables."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from minitx.checkpoints.common import atomic_write
from minitx.lab.evaluate import percent
from minitx.lab.frontier.equal_work import Row
from minitx.lab.frontier.families import family_of
from minitx.lab.report.measure import DEFAULTS
from minitx.lab.report.points import (
    ANSWERS,
    COSTS,
    Points,
    by_technique,
    has_no_loss,
    is_baseline,
    pareto,
    points_of,
    technique_of,
)
from minitx.lab.report.results import Results
from minitx.lab.report.summary import front_rows, opening
from minitx.pictures.html import chart, heading, html_table, links, page, paragraph
from minitx.technique import LEVELS, Technique

SAME_KEYS = "At the same share of keys"
READ = (
    "Reading and generating. executed: share of the dense model's multiply-adds while reading. "
    "loss: nats per token above dense. KL: KL(dense || changed), nats per token. agrees: the "
    "argmax. hops: answers that are right. Relative to dense, per new token when generating: "
    "multiply-adds, bytes of weights and of KV cache read, speed; memory is of all arrays."
)
KEYS = (
    "At the same share of keys (minitx frontier attention). kept: share of the keys that queries "
    "see; mass: share of the exact attention on them. multiply-adds and bytes: of attention alone, "
    "without its projections, relative to dense."
)
DECODED = (
    "Ways to decode, on the same prompts (minitx frontier decoding). tokens per call: new tokens "
    "per pass of the model. Relative to plain decoding, per new token: multiply-adds, bytes of "
    "weights and KV cache, time to the first token, speed. same: greedy texts that are those of "
    "plain decoding."
)


def write_page(results: Results, path) -> None:
    """Write the page, whole or not at all."""
    with atomic_write(Path(path)) as file:
        file.write(html(results).encode())


def html(results: Results) -> str:
    found, title = points_of(results), f"minitx report: {results.about['model']}"
    return page(title, pieces(results, found, title))


def pieces(results: Results, found: Points, title: str) -> Iterator[str]:
    about = results.about
    yield heading(1, title)
    yield paragraph(opening(found, about))
    yield paragraph(f"The model: {about['shape']}. Methods are tuned on {about['tuning']}.", "soft")
    yield links([("charts", "charts"), ("tables", "tables"), *((level, level) for level in LEVELS),
                 ("baselines", "baselines")])  # fmt: skip
    yield heading(2, "All techniques", "charts")
    yield paragraph(
        "Lower left is better. A point is a technique at one setting: at its defaults, or tuned to "
        "a share of the work. The line is the Pareto front: nothing else costs less and loses "
        "less. The mouse over a point says what it is.",
    )
    for cost, name in COSTS.items():
        yield chart(pareto(found, cost))
        yield html_table(front_rows(found, cost), f"The Pareto front of loss and {name}", 2)
    yield heading(2, "How to read the tables", "tables")
    yield from map(paragraph, (READ, KEYS, DECODED))
    found_of = list(by_technique(results))
    for level in LEVELS:
        own = [(technique, rows) for technique, rows in found_of if technique.level == level]
        yield heading(2, f"Level: {level}", level)
        yield links((technique.name, technique.flag) for technique, _ in own)
        for technique, rows in own:
            yield from section(results, technique, rows)
    yield heading(2, "Baselines", "baselines")
    rows = [(family, row) for family, row in results.rows() if is_baseline(family, row.method)]
    if rows:
        yield html_table(work_table(results, rows), words=3)
    keys = keys_table(results, *family_of("attention").baselines)
    if len(keys) > 1:
        yield html_table(keys, SAME_KEYS, 2)
    for family, why in results.refused.items():
        yield paragraph(f"minitx frontier {family}: {why}")


def section(results: Results, technique: Technique, rows: Sequence) -> Iterator[str]:
    """One technique."""
    kind = "exact" if technique.exact else "approximate"
    yield heading(3, technique.flag, technique.name)
    yield paragraph(f"{technique.card.summary} ({kind})")
    measured = [(family, row) for family, row in rows if row.figures]
    if measured and has_no_loss(technique.name):
        yield paragraph(ANSWERS[0].upper() + ANSWERS[1:], "soft")
    elif measured:
        yield html_table(work_table(results, measured), words=3)
    keys = keys_table(results, technique.name)
    if len(keys) > 1:
        yield html_table(keys, SAME_KEYS, 2)
    decoded = decoded_table(results, technique.name)
    if len(decoded) > 1:
        yield html_table(decoded, "Ways to decode, on the same prompts", 2)
    if len(measured) + len(keys) + len(decoded) == 2 and not rows:
        yield paragraph("Not measured.", "soft")
    said = [f"{where(family, row)}: {row.reason}" for family, row in rows if row.reason]
    said += [note for _, row in rows for note in row.notes]
    for text in dict.fromkeys(said):
        yield paragraph(text, "soft")


# Tables -------------------------------------------------------------------------------------------


def where(family: str, row: Row) -> str:
    """defaults; or structure at 0.75, if it is tuned to a share."""
    return family if row.share is None else f"{family} at {row.share:g}"


def work_table(results: Results, rows: Sequence[tuple[str, Row]]) -> list[list[str]]:
    hops = [name for name in results.about["accuracy"] if "hop" in name]
    found = [["method", "setting", "family", "executed", "loss", "KL", "agrees", *hops,
              "mult-adds", "weights", "cache", "memory", "speed"]]  # fmt: skip
    dense = [percent(results.about["accuracy"][name]) for name in hops]
    found.append(["dense", "", "", "1.00", "0", "0", percent(1), *dense, *["1.00x"] * 5])
    for family, row in rows:
        if row.figures is None:
            continue
        f = row.figures
        sizes = f.multiply_adds, f.weight_bytes, f.cache_bytes, f.memory, f.speed
        setting = row.setting or ("defaults" if family == DEFAULTS else "")
        found.append(
            [
                row.method,
                setting,
                where(family, row),
                f"{f.executed:.2f}",
                f"{f.added_loss:+.4f}",
                f"{f.divergence:.2g}",
                percent(f.agreement),
                *(percent(f.accuracy[name]) for name in hops),
                *(f"{x:.2f}x" for x in sizes),
            ]
        )
    return found


def keys_table(results: Results, *names: str) -> list[list[str]]:
    """At the same share of keys (minitx frontier attention): of these techniques or baselines."""
    found = [["method", "setting", "kept", "mass", "right", "mult-adds", "bytes", "faster from"]]
    for p in results.others.get("attention", {}).get("points", []):
        if technique_of("attention", p["method"]) in names:
            faster = f"{p['crossover']:,} keys" if p["crossover"] else "never"
            shares = [percent(p[name]) for name in ("kept", "mass", "accuracy")]
            costs = [f"{p[f'{name}_to_dense']:.2f}x" for name in ("multiply_adds", "bytes")]
            found.append([p["method"], p["setting"], *shares, *costs, faster])
    return found


def decoded_table(results: Results, technique: str) -> list[list[str]]:
    """On the same prompts (minitx frontier decoding)."""
    found = [["method", "sampling", "tokens per call", "mult-adds", "weights", "cache",
              "first token", "speed", "same"]]  # fmt: skip
    for row in results.others.get("decoding", {}).get("rows", []):
        f = row["figures"]
        if f is None or technique_of("decoding", row["method"]) != technique:
            continue
        calls, same = f["tokens_per_call"], f["same"]
        name = row["method"] + ", seen before" * row["seen"]
        costs = [f"{f[name]:.2f}x" for name in ("multiply_adds", "weight_bytes", "cache_bytes")]
        times = [f"{f[name]['median']:.2f}x" for name in ("first", "speed")]
        per_call = "-" if calls is None else f"{calls:.2f}"
        found.append(
            [name, row["sampling"], per_call, *costs, *times, "-" if same is None else f"{same}"]
        )
    return found
