"""What ``minitx bench`` prints: its measured figures (bench.py) as three small tables."""


def as_text(result: dict) -> str:
    """The tables of ``bench.measure_all``'s result, with what one has to know to read them."""
    plan, machine, shapes = result["plan"], result["machine"], result["shapes"]
    lines = [
        f"{machine['cpu']}, one thread; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "",
        f"Decode: {plan['decode']} greedy tokens after a prompt of 1, with the cache.",
        *_speeds(shapes, "decode"),
        "",
        f"Prefill: {plan['prefill']} tokens in one call, to the logits of the next token.",
        *_speeds(shapes, "prefill"),
        "",
        "Limit: weights read by decoding in GB/s, and how much of the speed that is with which a",
        "matrix-vector product reads as many weights, or 256 MB of them. Products alone: the share",
        "of the time that those of a token take one after the other, with nothing between them.",
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
    return columns(rows)


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
    return columns(rows)


def _notes(result: dict) -> list[str]:
    notes = []
    if result["not_compared"]:
        notes.append(f"Not compared with transformers: {result['not_compared']}.")
    else:
        worst = max(s["agreement"]["logits_relative_difference"] for s in result["shapes"])
        same = min(s["agreement"]["same_greedy_tokens"] for s in result["shapes"])
        notes.append(
            f"Both compute the same: logits differ by at most {worst:.0e} of the largest, and at "
            f"least {same} of {result['plan']['decode']} greedy tokens are equal."
        )
    notes.append("In brackets: the lowest and the highest of the rounds.")
    load, share = result["machine"]["load"] or 0, result["machine"]["processor_share"]
    if load > 0.5 or share < 0.95:
        notes.append(
            f"Other programs were running (load {load:.1f} at the start, {share:.0%} of a "
            "processor for this one). They share its caches and memory, which slows decoding most."
        )
    return notes


def _name(shape: dict) -> str:
    c = shape["config"]
    return f"{c['width']} x {c['layers']}, {c['vocab_size']:,}"


def _with_spread(s: dict, unit: str = "") -> str:
    return f"{s['median']:.2f}{unit} ({s['lowest']:.2f} to {s['highest']:.2f})"


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of words as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(f"{row[i]:{'<' if i == 0 else '>'}{width}}" for i, width in enumerate(widths))
        for row in rows
    ]
