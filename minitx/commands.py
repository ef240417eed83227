"""The ``minitx`` commands: each is a few lines around a function that can also be called in Python.

Each takes the parsed arguments and returns an exit status, or None for 0. What only one command
needs is imported when it runs, so that the others start faster.
"""

import json
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby, islice, tee
from pathlib import Path
from shutil import get_terminal_size

import numpy as np

import minitx
from minitx.decode import Autoregressive
from minitx.errors import MinitxError, abbreviate
from minitx.lab.layout import COLUMNS, fit
from minitx.progress import say
from minitx.tree import nbytes, weights

NOT_FINISHED, INTERRUPTED = 3, 130
NEW_TOKENS = 60  # that a picture shows
TEMPERATURE, SEED = 0.8, 0  # of generate: a story that does not repeat itself, every time the same


def load(args):
    """The model that the arguments name, with the requested techniques."""
    return minitx.load(args.model, args.tokenizer, **calibration(args), **args.techniques)


def calibration(args) -> dict:
    """``--calibrate FILE`` as an argument of ``load`` and ``apply``."""
    from minitx.text import read_text

    if args.calibrate is None:
        return {}
    return {"calibrate": read_text(args.calibrate)}


def workload(args, stories: int, tokens: int | None = None, **more):
    """What to measure on: stories (so many by default), or --text FILE."""
    from minitx.lab.compare import Workload
    from minitx.lab.reading import TOKENS
    from minitx.text import read_text

    check_measured(args)
    if args.text is None:
        return Workload(stories=args.stories or stories, chains=args.chains, **more)
    return Workload(text=read_text(args.text), tokens=args.tokens or tokens or TOKENS, **more)


def grade(args) -> str:
    return args.grade or "full"


def check_measured(args, of_stories=("stories", "grade", "chains"), of_text=("tokens",)) -> None:
    """Refuse options that mean nothing with, or without, --text; and stdin for two texts."""
    if args.text == args.calibrate == "-":
        raise MinitxError("Only one of --text and --calibrate can be read from stdin; give a file.")
    for name in of_text if args.text is None else of_stories:
        if getattr(args, name, None):
            other = "it needs --text" if args.text is None else "--text measures a text"
            raise MinitxError(f"--{name} has no effect here: {other}.")


def generate(args) -> None:
    options = sampling(args)
    prompt = read_stdin() if args.prompt == "-" else need_text(args.prompt)
    lm = load(args)
    began = time.perf_counter()
    ids = lm.encode(prompt)
    tokens, new = tee(lm.tokens(ids, args.max_new_tokens, **options))
    pieces = lm.pieces(tokens, ids[-1])
    # An overflow ends in logits that are refused with a clear message: no warning before that.
    with np.errstate(over="ignore", invalid="ignore"):
        if args.json:
            text = "".join(pieces)
        else:
            print_text(prompt, pieces)
    new, took = list(new), time.perf_counter() - began
    if args.json:
        found = {"prompt": prompt, "text": text, "prompt_ids": ids, "ids": new, "seconds": took}
        print(json.dumps(found, indent=1))
    say(f"{len(new)} tokens in {took:.2f} s, {len(new) / took:.0f} tokens/s")


def skip_map(args) -> None:
    from minitx.pictures.skip_map import skip_map as draw
    from minitx.pictures.skip_map_svg import as_svg

    draw_generated(args, draw, as_svg)


def keys(args) -> None:
    from minitx.pictures.keys_kept import keys_kept
    from minitx.pictures.keys_kept_svg import as_svg

    draw_generated(args, keys_kept, as_svg, layer=args.layer, head=args.head)


def draw_weights(args) -> None:
    from minitx.pictures.weights import weights as draw
    from minitx.pictures.weights_svg import as_svg
    from minitx.technique import apply

    check_pictures(args)
    calibrate = calibration(args)
    dense = minitx.load(args.model, args.tokenizer)
    changed = apply(dense, args.techniques, **calibrate) if args.techniques else None
    title = " ".join(["minitx weights", flags_text(args)]).strip()
    print_picture(args, draw(dense, changed, title, args.part), as_svg)


def draw_generated(args, draw, as_svg, **more) -> None:
    """A picture of a generated text, compared with the model without techniques."""
    from minitx.technique import apply

    options = sampling(args)
    check_pictures(args)
    prompt = read_stdin() if args.prompt == "-" else need_text(args.prompt)
    calibrate = calibration(args)
    dense = minitx.load(args.model, args.tokenizer)
    changed = apply(dense, args.techniques, **calibrate)
    new = args.max_new_tokens
    if new is None:
        new = min(NEW_TOKENS, changed.model.config.new_tokens(len(changed.encode(prompt))))
    command = args.parser.prog.removeprefix("minitx ")
    title = " ".join(["minitx", command, repr(prompt), flags_text(args)]).strip()
    with np.errstate(over="ignore", invalid="ignore"):  # as for generate
        found = draw(dense, changed, title, prompt, new, **more, **options)
    print_picture(args, found, as_svg)


def print_picture(args, found, as_svg) -> None:
    """As text or JSON, and into the files that were asked for."""
    from minitx.pictures.output import write_picture

    print(json.dumps(found.as_dict(), indent=1) if args.json else found.text(terminal_columns()))
    for path in pictures(args):
        write_picture(as_svg(found), path)


def terminal_columns() -> int:
    """The width of the terminal; of a pipe or a file, that of tables."""
    return get_terminal_size((COLUMNS, 0)).columns if sys.stdout.isatty() else COLUMNS


def sampling(args) -> dict:
    """The options of the sampler: those given, and a temperature and a seed if they are not."""
    names = ("top_k", "top_p", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.temperature != 0:
        t = TEMPERATURE if args.temperature is None else args.temperature
        return {"temperature": t, "seed": SEED} | given
    if given:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise MinitxError(
            f"-t 0 is greedy decoding, which draws nothing, so {flags} would have no effect; leave "
            "out one or the other."
        )
    return {"temperature": 0.0}


def print_report(found, as_json: bool) -> None:
    print(json.dumps(found.as_dict(), indent=1) if as_json else fit(str(found)))


def print_text(prompt: str, pieces: Iterable[str]) -> None:
    try:
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print()  # so that an error message starts on its own line


def need_text(argument: str) -> str:
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError as error:  # Python maps undecodable bytes to surrogates
        raise MinitxError(
            f"Character {error.start} of the prompt is not valid UTF-8; give UTF-8 text."
        ) from None
    return argument


def read_stdin() -> str:
    """The text on stdin, without its final line break."""
    from minitx.checkpoints.common import MAX_TEXT_BYTES

    if not sys.stdin:
        raise MinitxError("There is no stdin to read the prompt from.")
    try:
        content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)  # bounded: it may have no end
        if len(content) > MAX_TEXT_BYTES:
            raise MinitxError(f"Expected at most {MAX_TEXT_BYTES:,} bytes on stdin, got more.")
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MinitxError(
            f"Byte {error.start} on stdin is not valid UTF-8; give UTF-8 text."
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def show(args) -> None:
    if args.diff:
        return show_diff(args)
    from minitx.checkpoints.precomputed import is_precomputed, read_origin

    lm = load(args)
    calibrated = list(map(str, lm.calibrated))
    total = sum(w.size for w in weights(lm.model).values())
    if args.json:
        found = {"name": lm.name, "weights": total, "bytes": nbytes(lm)}
        found |= {"config": asdict(lm.model.config), "calibrated": calibrated}
        print(json.dumps(found, indent=1))
    else:
        print(lm.model)
        if type(lm.decode) is not Autoregressive:  # a technique has replaced the decoding loop
            print(lm.decode)
        say(f"{total:,} weights, {nbytes(lm) / 1e6:.2f} MB in memory")
        if lm.folder and is_precomputed(lm.folder):
            say(str(read_origin(lm.folder)))
        for use in calibrated:
            say(use)


def show_diff(args) -> None:
    from minitx.pictures.tree_diff import tree_diff
    from minitx.technique import apply

    if not args.techniques:
        raise MinitxError(
            "--diff compares the model before and after techniques; give at least one, such as "
            "--fold-norms."
        )
    calibrate = calibration(args)
    dense = minitx.load(args.model, args.tokenizer)
    found = tree_diff(dense, apply(dense, args.techniques, **calibrate), flags_text(args))
    print(json.dumps(found.as_dict(), indent=1) if args.json else found)


OTHER_MODELS = """
Also: a Hugging Face folder (config.json, model.safetensors or its shards, tokenizer.json) of the
llama, gpt2 or gpt_neox family; a llama2.c .bin file; a folder that minitx precompute wrote:
minitx generate "Once" -m PATH"""


def models(args) -> None:
    from minitx.checkpoints.catalog import catalog
    from minitx.lab.layout import table

    found = catalog()
    if args.json:
        print(json.dumps([asdict(entry) for entry in found], indent=1))
        return
    rows = [["name", "family", "width x layers", "heads", "vocabulary", "context", "weights", "MB"]]
    for entry in found:
        c = entry.config
        sizes = [f"{c.width} x {c.layers}", str(c.heads), f"{c.vocab_size:,}", str(c.context)]
        amount = [f"{entry.weights:,}", f"{entry.file_bytes / 1e6:.1f}"]
        rows.append([entry.name, c.family + " (skipless)" * c.skipless, *sizes, *amount])
    heading, *lines = table(rows).splitlines()
    print(heading)
    for line, entry in zip(lines, found):
        print(line)
        print(textwrap.indent(textwrap.fill(entry.purpose, COLUMNS - 4), "    "))
    print(OTHER_MODELS)


def list_techniques(args) -> None:
    from minitx.technique import techniques

    rows = [
        {"flag": t.flag, "level": t.level, "exact": t.exact, "summary": t.card.summary}
        for t in techniques()
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    wide = max(len(row["flag"]) for row in rows)
    print("In the order in which they are applied, by level. = exact, ~ approximate.")
    for level, chosen in groupby(rows, key=lambda row: row["level"]):
        print(f"\n{level}")
        for row in chosen:
            line = f"  {row['flag']:{wide}}  {'=' if row['exact'] else '~'}  {row['summary']}"
            print(fit(line, hanging=wide + 7))


HANGING = 11  # characters that the text of a card is indented by
LEGEND = """B batch, T new tokens, S cached tokens, D width, H query heads, K key/value heads,
           G = H/K, d head width, F hidden width, V vocabulary, L layers"""


def explain(args) -> None:
    from minitx.technique import find

    technique = find(args.name)
    card = technique.card
    if args.json:
        options = {o.name: o.default for o in technique.options.values()}
        found = {"name": technique.name, "level": technique.level, "exact": technique.exact}
        print(
            json.dumps(
                found
                | {"options": options, "presets": technique.presets, "summary": card.summary}
                | card.sections,
                indent=1,
            )
        )
        return
    kind = "exact" if technique.exact else "approximate"
    print(f"{technique.flag} ({technique.level}, {kind})\n{card.summary}\n")
    for heading, text in card.sections.items():
        first, *more = text.splitlines()
        print(fit(f"{heading + ':':{HANGING}}{first}", hanging=HANGING))
        for line in more:
            print(fit(textwrap.indent(line, HANGING * " ")))
    print(f"{'File:':{HANGING}}{technique.path}")
    print(f"{'Letters:':{HANGING}}{LEGEND}\n")
    print(options_text(technique))


def options_text(technique) -> str:
    """One entry per option: its default, its meaning and its range; then the presets."""
    from minitx.technique import as_words

    lines = []
    for option in technique.options.values():
        lines.append(f"  {option.name}={option.default}")
        lines.append(
            textwrap.indent(textwrap.fill(f"{option.meaning} ({option.expected()})", 90), 6 * " ")
        )
    if technique.presets:
        width = max(map(len, technique.presets))
        lines.append("Presets (preset=NAME; further options override those of the preset):")
        lines += [f"  {name:{width}}  {as_words(o)}" for name, o in technique.presets.items()]
    return "\n".join(lines) or "No options."


def check(args) -> int:
    from minitx.lab.check import check_models

    return check_models(args.models, as_json=args.json, folder=args.reference)


def bench(args) -> None:
    from minitx.lab.bench import bench as measure

    measure(as_json=args.json, quick=args.quick)


def evaluate(args) -> None:
    from minitx.lab.evaluate import evaluate_model, evaluate_text
    from minitx.text import read_text

    check_measured(args)
    check_pictures(args)
    if pictures(args) and (not args.depths or args.text is not None):
        why = "they need --depths" if args.text is None else "a text has no answers"
        raise MinitxError(f"--svg and --png draw right answers by hops and depth: {why}.")
    options = dict(depths=args.depths, shown=True)
    if args.text is None:
        report = evaluate_model(load(args), args.stories or 500, grade(args), **options)
    else:
        report = evaluate_text(load(args), read_text(args.text), args.tokens or 4096, **options)
    print_report(report, args.json)
    for path in pictures(args):
        report.picture(path)


def compare(args) -> int | None:
    from minitx.lab.compare import compare as measure
    from minitx.lab.energy import read_constants
    from minitx.technique import apply

    if args.all:
        return compare_all(args)
    energy = None if args.energy is None else read_constants(args.energy)
    work = workload(args, 100)
    calibrate = calibration(args)
    dense = minitx.load(args.model, args.tokenizer)
    changed = apply(dense, args.techniques, **calibrate)
    found = measure(dense, changed, flags_text(args), work, grade(args), energy=energy)
    print_report(found, args.json)


def compare_all(args) -> int:
    from minitx.lab.compare_all import TIME_LIMIT
    from minitx.lab.compare_all import compare_all as measure

    if args.techniques:
        raise MinitxError("--all compares every technique at its defaults; give no other flags.")
    if args.energy is not None:
        raise MinitxError("--energy has no effect with --all: its table has no room for it.")
    work = workload(args, 40, 1024, prompts=2, rounds=2)
    calibrate = calibration(args)
    dense = minitx.load(args.model, args.tokenizer, **calibrate)
    limit = TIME_LIMIT if args.time_limit is None else args.time_limit
    found = measure(dense, work, grade(args), time_limit=limit)
    print_report(found, args.json)
    return INTERRUPTED if found.stopped else 0


def first_token(args) -> None:
    from minitx.lab.first_token import PromptSet
    from minitx.lab.first_token import first_token as measure
    from minitx.technique import apply

    calibrate = calibration(args)
    dense = minitx.load(args.model, args.tokenizer)
    changed = apply(dense, args.techniques, **calibrate)
    plan = PromptSet(
        **{name: getattr(args, name) for name in ("shared", "own", "prompts", "rounds")}
    )
    found = measure(dense, changed, flags_text(args), plan)
    print_report(found, args.json)


def batch(args) -> None:
    from minitx.lab.batch import BatchPlan, batches
    from minitx.technique import apply

    calibrate = calibration(args)
    dense = minitx.load(args.model, args.tokenizer)
    changed = apply(dense, args.techniques, **calibrate)
    plan = BatchPlan(**{name: getattr(args, name) for name in ("size", "longest", "new", "rounds")})
    print_report(batches(dense, changed, flags_text(args), plan), args.json)


def sweep(args) -> None:
    from minitx.lab import sweep as lab
    from minitx.technique import find

    check_pictures(args)
    technique = find(args.name)
    chosen = lab.settings(technique, args.settings)
    work = workload(args, 40)
    points = lab.sweep(load(args), technique, chosen, work, grade(args))
    print(json.dumps(lab.as_dict(points), indent=1) if args.json else fit(lab.as_text(points)))
    for path in pictures(args):
        lab.picture(points, f"{technique.name} on {args.model}", path)


def pictures(args) -> list[str]:
    """The files that --svg and --png name."""
    return [path for path in (args.svg, args.png) if path is not None]


def check_pictures(args) -> None:
    """Refuse them, before the work, if they cannot be drawn or written."""
    from minitx.pictures.output import check_output

    for path, ending in ((args.svg, ".svg"), (args.png, ".png")):
        if path is not None:
            check_output(path, ending)


def waterfall(args) -> None:
    from minitx.lab.compare import Workload
    from minitx.lab.waterfall import waterfall as measure
    from minitx.text import read_text

    check_pictures(args)
    check_measured(args, of_stories=("grade",), of_text=())
    work = Workload(stories=args.prompts, prompts=args.prompts)
    if args.text is not None:
        work = Workload(text=read_text(args.text), prompts=args.prompts)
    dense = minitx.load(args.model, args.tokenizer, **calibration(args))
    found = measure(dense, args.techniques, work, grade(args))
    print_report(found, args.json)
    for path in pictures(args):
        found.picture(path)


def frontier(args) -> int | None:
    from minitx.lab.frontier.families import FAMILIES, family_of
    from minitx.text import read_text

    if args.family is None:
        rows = [["family", "the same share of", "what is compared"]]
        rows += [[f.name, f.equal or "-", f.summary] for f in FAMILIES]
        wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
        for name, equal, summary in rows:
            print(fit(f"{name:{wide[0]}}  {equal:{wide[1]}}  {summary}", hanging=sum(wide) + 4))
        return
    family = family_of(args.family)
    check_pictures(args)
    plans = {"keys": attention_plan, "multiply-adds": work_plan, None: decoding_plan}
    plan = plans[family.equal](args)
    plan["text"] = None if args.text is None else read_text(args.text)
    dense = minitx.load(args.model, args.tokenizer, **calibration(args))
    plan |= dict(methods=args.methods, grade=grade(args))
    found = family.compare(dense, **plan)
    print_report(found, args.json)
    for path in pictures(args):
        found.picture(path)
    return INTERRUPTED if getattr(found, "stopped", False) else None


def report(args) -> int | None:
    from minitx.lab.report.points import pareto, points_of, read_points
    from minitx.lab.report.results import read_results
    from minitx.lab.report.summary import summary
    from minitx.pictures.output import write_picture

    page = report_page(args)
    results = None
    if args.source is None:
        results = measured_report(args, page)
    elif page is not None:
        results = read_results(args.source)
    found = read_points(args.source) if results is None else points_of(results)
    if page is not None:
        from minitx.lab.report.page import write_page

        write_page(results, page)
    for path in pictures(args):
        write_picture(pareto(found), path)
    if args.points is not None:
        found.write(args.points)
    about = None if results is None else results.about
    if args.json:
        print(json.dumps(found.as_dict() if results is None else results.as_dict(), indent=1))
    else:
        print(fit(summary(found, about)))
    if page is not None:
        say(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    return INTERRUPTED if about and args.source is None and about["stopped"] else None


def report_page(args) -> Path | None:
    """The page to write; all that is refused before the work."""
    from minitx.checkpoints.common import need_writable_file

    check_pictures(args)
    if args.source is not None:
        for name in REPORT_MEASURED:
            if getattr(args, name):
                flag = f"--{name.replace('_', '-')}"
                raise MinitxError(f"{flag} has no effect with --from, which measures nothing.")
    for path, ending in ((args.out, ".html"), (args.points, ".json")):
        if path is not None and Path(path).suffix.lower() != ending:
            raise MinitxError(
                f"Expected a file name that ends in {ending}, got {abbreviate(str(path))}."
            )
        if path is not None:
            need_writable_file(Path(path))
    if args.out is None:
        return Path("report.html") if args.source is None else None
    return Path(args.out)


# Options of report that say what is measured.
REPORT_MEASURED = (
    "stories", "grade", "text", "tokens", "quick", "share", "families", "methods", "rounds",
    "small", "time_limit", "restart", "calibrate", "tokenizer",
)  # fmt: skip


def measured_report(args, page: Path):
    from minitx.lab.report import Plan, measure
    from minitx.text import read_text

    check_measured(args)
    names = ("stories", "tokens", "families", "methods", "rounds", "small", "time_limit")
    given = {name: getattr(args, name) for name in names}
    given |= {"shares": args.share, "grade": grade(args)}
    if args.text is not None:
        given["text"] = read_text(args.text)
    given = {name: value for name, value in given.items() if value is not None}
    plan = Plan.quickly(**given) if args.quick else Plan(**given)
    kept = page.with_suffix(".json")
    dense = minitx.load(args.model, args.tokenizer, **calibration(args))
    return measure(dense, plan, kept, args.restart)


def attention_plan(args) -> dict:
    check_measured(args, of_stories=("grade",), of_text=())
    chains = args.chains or (8 if args.text is None else 2)
    return dict(shares=args.share, tokens=args.tokens, rounds=args.rounds, chains=chains)


def work_plan(args) -> dict:
    check_measured(args)
    given = {name: getattr(args, name) for name in ("stories", "tokens", "rounds", "time_limit")}
    given = {name: value for name, value in given.items() if value is not None}
    return given | dict(shares=args.share, chains=args.chains, random=args.random)


def decoding_plan(args) -> dict:
    check_measured(args, of_stories=("grade",), of_text=())
    return {name: getattr(args, name) for name in ("prompts", "length", "new", "rounds", "small")}


def cost(args) -> None:
    from minitx.lab.cost import cost as measure

    found = measure(args.technique, args.config, args.options, args.parallel)
    print_report(found, args.json)


def precompute(args) -> None:
    from minitx.checkpoints.common import need_new_folder
    from minitx.checkpoints.find import locate, tokenizer_path
    from minitx.checkpoints.precomputed import Origin, write_precomputed

    if not args.techniques:
        raise MinitxError(
            "Expected at least one technique to precompute, such as --fold-norms (minitx list "
            "shows them all)."
        )
    need_new_folder(Path(args.out))
    path = locate(args.model)
    began = time.perf_counter()
    lm = load(args)
    took = time.perf_counter() - began
    origin = Origin(args.model, flags_text(args), lm.calibrated)
    write_precomputed(lm, args.out, origin, tokenizer_path(path, args.tokenizer))
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    say(f"{args.out}: {size / 1e6:.2f} MB; offline work took {took:.2f} s")
    for use in lm.calibrated:
        say(str(use))


def flags_text(args) -> str:
    """The techniques as given: ``--fold-norms --ffn-skip threshold=0.9``."""
    from minitx.technique import as_words, find

    flags = [f"{find(name).flag} {as_words(options)}" for name, options in args.techniques.items()]
    return " ".join(map(str.strip, flags))


def cache_stats(args) -> None:
    from minitx.lab.layout import table
    from minitx.shared.answer_store import statistics

    found = statistics(cache_file(args))
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return
    limit = f" of at most {found.most:,}" if found.most else ""
    print(f"{found.file}: {in_words(found.answers)}, {found.bytes:,}{limit} bytes")
    if not found.answers:
        return
    print(f"{found.hits:,} hits so far; stored {at(found.oldest)} to {at(found.newest)}\n")
    rows = [["model", "answers", "bytes", "hits"]]
    for m in found.models:
        name = m.model or "(no name)"
        rows.append([name, f"{m.answers:,}", f"{m.bytes:,}", f"{m.hits:,}"])
    print(table(rows))


def cache_clear(args) -> None:
    from minitx.shared.answer_store import clear

    path = cache_file(args)
    print(f"{path}: {in_words(clear(path, args.of))} removed")


def cache_file(args) -> Path:
    from minitx.shared.answer_store import default_file

    return default_file() if args.file is None else Path(args.file)


def in_words(answers: int) -> str:
    return f"{answers:,} answer{'s' * (answers != 1)}"


def at(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def train(args) -> int:
    from minitx.training.train import RECIPE
    from minitx.training.train import train as train_by

    recipe = Path(args.recipe)
    folder = recipe if recipe.is_dir() else recipe.parent
    name = folder.resolve().name if recipe.name == RECIPE or recipe.is_dir() else recipe.stem
    # Never the recipe's own folder by default: for a shipped model it holds the shipped weights.
    out = args.out or Path("runs") / name
    result = train_by(
        recipe, out, workers=args.workers, resume=not args.restart, time_limit=args.time_limit
    )
    return 0 if result["finished"] else NOT_FINISHED


def stories(args) -> None:
    from minitx.training.stories import stories as endless

    found = islice(endless(args.split, grade(args), args.seed), args.count)
    if args.json:
        texts = [{"text": s.text, "answers": [[a.kind, a.value] for a in s.answers]} for s in found]
        print(json.dumps(texts, indent=1))
    else:
        for story in found:
            print(story.text, end="\n\n")
