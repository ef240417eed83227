"""The report of ``minitx bench``: the measurements of bench.py as three small tables."""

from minitx.lab.layout import table


def as_text(result: dict) -> str:
    """The tables for a result of ``bench.measure_all``, with notes."""
    plan, machine, shapes = result["plan"], result["machine"], result["shapes"]
    lines = [
        f"{machine['cpu']}, one thread; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "",
        f"Decode: {plan['decode']} greedy tokens after a prompt of 1, with the KV cache.",
        *_speeds(shapes, "decode"),
        "",
        f"Prefill: {plan['prefill']} tokens in one call, to the logits of the next token.",
        *_speeds(shapes, "prefill"),
        "",
        "Limit: weights read by decoding in GB/s, as a fraction of the bandwidth of a",
        "matrix-vector product with as many weights, or with 256 MB of them. Products alone: the",
        "share of the time that the products of a token take back to back, without overhead.",
        *_limits(shapes),
        "",
        *_notes(result),
    ]
    return "\n".join(lines).rstrip()


def _speeds(shapes: list[dict], what: str) -> list[str]:
    rows = [["width x layers, vocabulary", "minitx tok/s", "transformers tok/s", "ratio"]]
    for shape in shapes:
        figures = shape[what]
        theirs = figures.get("transformers_tokens_per_second")
        rows.append(
            [
                _name(shape),
                f"{figures['minitx_tokens_per_second']:,.0f}",
                f"{theirs:,.0f}" if theirs else "-",
                _with_spread(figures["ratio"], "x") if theirs else "-",
            ]
        )
    return table(rows).splitlines()


def _limits(shapes: list[dict]) -> list[str]:
    names = "width x layers, vocabulary", "MB/token", "GB/s"
    rows = [[*names, "of the same size", "of 256 MB", "products alone"]]
    for shape in shapes:
        same, far = shape["limit"].values()
        rows.append(
            [
                _name(shape),
                f"{shape['bytes_per_token'] / 1e6:.1f}",
                f"{same['minitx_bytes_per_second'] / 1e9:.1f}",
                _with_spread(same["fraction"]),
                _with_spread(far["fraction"]),
                _with_spread(shape["products_alone"]),
            ]
        )
    return table(rows).splitlines()


def _notes(result: dict) -> list[str]:
    notes = []
    if result["not_compared"]:
        notes.append(f"Not compared with transformers: {result['not_compared']}.")
    else:
        worst = max(s["agreement"]["logits_relative_difference"] for s in result["shapes"])
        same = min(s["agreement"]["same_greedy_tokens"] for s in result["shapes"])
        notes.append(
            f"Both compute the same: logits differ by at most {worst:.0e} of the "
            f"largest, and at least {same} of {result['plan']['decode']} greedy tokens match."
        )
    notes.append("In brackets: minimum and maximum over the rounds.")
    load, share = result["machine"]["load"] or 0, result["machine"]["processor_share"]
    if load > 0.5 or share < 0.95:
        notes.append(
            f"Other programs were running (load {load:.1f} at the start, {share:.0%} of a CPU for "
            "this one). They share caches and memory bandwidth, which slows decoding most."
        )
    return notes


def _name(shape: dict) -> str:
    c = shape["config"]
    return f"{c['width']} x {c['layers']}, {c['vocab_size']:,}"


def _with_spread(s: dict, unit: str = "") -> str:
    return f"{s['median']:.2f}{unit} ({s['lowest']:.2f} to {s['highest']:.2f})"
