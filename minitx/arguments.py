"""The arguments of the ``minitx`` command, and how technique flags are parsed.

Bad arguments raise ``MinitxError``. commands.py does the work.
"""

import argparse
import re
import shutil
import sys

import minitx
from minitx import commands
from minitx.commands import SEED, TEMPERATURE
from minitx.errors import MinitxError, abbreviate, did_you_mean, nearest
from minitx.lab.layout import fit
from minitx.learn.command import add_learn, with_check

RENAMED = {"compare-attention": "frontier attention"}


class Parser(argparse.ArgumentParser):
    """Reports errors like all bad input: one sentence, without the usage text."""

    takes_techniques = takes_grade = False
    choice = "command"  # what the words of its subparsers are
    flags: tuple = ()  # the techniques that were given, for the help

    def error(self, message):
        if self.flags and re.search("required: (name|technique)", message):
            name = self.flags[0][0][2:]
            raise MinitxError(
                f"{self.prog} takes the name of a technique, without dashes: {self.prog} {name} ..."
            )
        raise MinitxError(f"{message.rstrip('.')} ({self.prog} --help says more).")

    def _check_value(self, action, value):
        """Called by argparse for a word that must be one of a few: here, a command."""
        if action.choices is not None and value not in action.choices:
            if value in RENAMED:
                new = RENAMED[value]
                raise MinitxError(f"minitx {value} is now minitx {new}, with the same options.")
            options = nearest(value, self.option_names())
            hint = f"did you mean {options}?" if options else did_you_mean(value, action.choices)
            raise MinitxError(f"There is no {self.choice} {abbreviate(value)}; {hint}")

    def format_help(self):
        """The usual help; then the grades; then the options of the techniques that were given, or
        a list of all."""
        text = super().format_help()
        if self.takes_grade:
            text += f"\n{grade_help()}"
        return f"{text}\n{technique_help(self.flags)}" if self.takes_techniques else text

    def option_names(self) -> list[str]:
        """What may follow the command: its options, and the flags of techniques if it takes any."""
        from minitx.technique import names

        own = [name for action in self._actions for name in action.option_strings]
        flags = [f"--{name.replace('_', '-')}" for name in names()] if self.takes_techniques else []
        return own + flags


def grade_help() -> str:
    """The values of --grade, from easy to hard."""
    from minitx.training.stories.grades import GRADES

    return fit(f"Grades, from easy to hard: {', '.join(GRADES)}.", help_width(), 2) + "\n"


def help_width() -> int:
    return shutil.get_terminal_size().columns - 2  # as argparse has it


def technique_help(flags) -> str:
    """The options of the techniques that were given; if none was, a list of all."""
    from minitx.technique import find, techniques

    lines = []
    for flag, *_ in flags:
        technique = find(flag[2:])
        lines += [
            fit(f"{technique.flag}: {technique.card.summary}", help_width(), 2),
            commands.options_text(technique),
            "",
        ]
    if lines:
        return "\n".join(lines)
    known = techniques()
    width = max(len(t.flag) for t in known)
    lines = [
        fit(f"  {t.flag:{width}}  {t.card.summary}", help_width(), hanging=width + 4) for t in known
    ]
    ask = "Techniques, each with its options (--NAME --help or minitx explain NAME lists them):"
    return "\n".join([ask, *lines, ""])


def read_arguments(arguments: list[str] | None, known: Parser | None = None) -> argparse.Namespace:
    """The arguments, parsed. known: the ``parser()``, to build it once for many command lines."""
    words, flags = split_flags(sys.argv[1:] if arguments is None else arguments)
    args, unknown = (known or parser(flags)).parse_known_args(with_check(words))
    if flags and not hasattr(args, "techniques"):
        raise MinitxError(f"{args.parser.prog} takes no techniques; remove {flags[0][0]}.")
    if flags:
        args.techniques = read_flags(flags)
    if not unknown:
        return args
    usage = " ".join(args.parser.format_usage().split())
    options = args.parser.option_names()
    if unknown[0].startswith("-"):
        name, equals, _ = unknown[0].partition("=")
        if equals and name in options:
            raise MinitxError(
                f"The options of a technique follow its flag, as in {name} option=value; got "
                f"{abbreviate(unknown[0])} (minitx explain {name[2:]} lists them)."
            )
        near = nearest(name, options)
        raise MinitxError(
            f"There is no option {abbreviate(name)[1:-1]}; "
            + (f"did you mean {near}?" if near else usage)
        )
    if f"--{unknown[0]}" in options:
        raise MinitxError(f"Unexpected argument {unknown[0]!r}; did you mean --{unknown[0]}?")
    raise MinitxError(
        f"Unexpected argument {abbreviate(unknown[0])} (put text of several words in quotes); "
        f"{usage}"
    )


def split_flags(arguments: list[str]) -> tuple[list[str], list[list[str]]]:
    """The arguments without techniques, and each technique's flag with its ``option=value`` words.

    argparse cannot do this: it would take a prompt after ``--fold-norms`` for an option.
    """
    from minitx.technique import names

    words, flags = [], []
    for number, word in enumerate(arguments):
        if word == "--":
            return words + arguments[number:], flags
        if word.startswith("--") and word[2:].replace("-", "_") in names():
            flags.append([word])
        elif flags and arguments[number - 1] == flags[-1][-1] and re.match(r"[^\W\d][\w-]*=", word):
            flags[-1].append(word)
        else:
            words.append(word)
    return words, flags


def read_flags(flags: list[list[str]]) -> dict[str, dict]:
    from minitx.technique import find

    found = {}
    for flag, *options in flags:
        technique = find(flag[2:])
        if technique.name in found:
            raise MinitxError(f"{flag} is given twice; give it once, with all of its options.")
        found[technique.name] = technique.read(options)
    return found


def parser(flags=()) -> Parser:
    """The parser of the whole command line. flags: the techniques that were given, for the help."""
    top = Parser(
        prog="minitx",
        description="A transformer in NumPy, with techniques that skip or precompute work.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"minitx {minitx.__version__}")
    names = top.add_subparsers(metavar="COMMAND")
    top.set_defaults(
        parser=top,
        run=lambda _: top.error(f"expected a command, one of {', '.join(names.choices)}"),
    )

    generate = add(
        names, "generate", commands.generate, "generate a completion of a prompt, streamed"
    )
    generate.add_argument("prompt", help="the text to continue; - reads it from stdin")
    add_model(generate)
    add_sampling(generate, "fill the context")
    add_json(generate)

    show = add(names, "show", commands.show, "print the tree of parts that runs")
    add_model(show)
    text = "show what the techniques change in the tree, line by line"
    show.add_argument("--diff", action="store_true", help=text)
    add_json(show)

    models = add(names, "models", commands.models, "list the models that can be loaded")
    add_json(models)

    listed = add(names, "list", commands.list_techniques, "list all techniques")
    add_json(listed)

    explain = add(names, "explain", commands.explain, "print a technique's card")
    explain.add_argument("name", help="name of a technique, such as fold-norms")
    add_json(explain)

    add_drawings(names)

    check = add(
        names, "check", commands.check, "compare models with Hugging Face reference outputs"
    )
    check.add_argument("models", nargs="*", help="names of shipped models (default: all)")
    check.add_argument(
        "--reference",
        metavar="DIR",
        help="folder with the reference outputs (default: tests/reference)",
    )
    add_json(check)

    bench = add(names, "bench", commands.bench, "measure decoding and prefill at three shapes")
    bench.add_argument("--quick", action="store_true", help="fewer repeats, noisier figures")
    add_json(bench)

    evaluate = add(names, "evaluate", commands.evaluate, "accuracy by hops on held-out stories")
    add_model(evaluate)
    add_measured(evaluate, 500, 4096)
    evaluate.add_argument("--depths", action="store_true", help="also exit after every block")
    add_pictures(evaluate, "with --depths: also draw right answers by hops and depth")
    add_json(evaluate)

    compare = add(
        names,
        "compare",
        commands.compare,
        "measure what techniques save and cost, side by side with dense",
    )
    add_model(compare)
    add_measured(compare, 100, 2048)
    add_chains(compare)
    compare.add_argument(
        "--all",
        action="store_true",
        help="every technique that fits the model, each at its defaults, in one table (by default "
        "on 40 stories, or 1,024 tokens)",
    )
    limit = "with --all: give a technique up after S seconds (default 300)"
    compare.add_argument("--time-limit", type=seconds, metavar="S", help=limit)
    text = (
        "also estimate the energy: counts times published constants in pJ, of which some may be "
        "overridden, as in --energy dram=80 on_chip=2 (minitx/lab/energy.py says more)"
    )
    compare.add_argument("--energy", nargs="*", metavar="NAME=VALUE", help=text)
    add_json(compare)

    first = "time to first token for prompts that share a prefix"
    first = add(names, "first-token", commands.first_token, first)
    add_model(first)
    for name, default, meaning in (
        ("shared", 400, "length of the shared prefix in tokens"),
        ("own", 20, "tokens of each prompt after the prefix"),
        ("prompts", 8, "prompts per round"),
        ("rounds", 7, "rounds"),
    ):
        text = f"{meaning} (default {default})"
        first.add_argument(f"--{name}", type=count, default=default, metavar="N", help=text)
    add_json(first)

    batch = "speed and multiply-adds of batches whose prompts differ in length"
    batch = add(names, "batch", commands.batch, batch)
    add_model(batch)
    for name, default, meaning in (
        ("size", 16, "prompts in a batch"),
        ("longest", 256, "length of the longest prompt in tokens"),
        ("new", 64, "new tokens of the longest completion"),
        ("rounds", 3, "rounds"),
    ):
        text = f"{meaning} (default {default})"
        batch.add_argument(f"--{name}", type=count, default=default, metavar="N", help=text)
    add_json(batch)

    sweep = add(names, "sweep", commands.sweep, "measure one technique at several settings")
    sweep.add_argument("name", help="name of a technique, such as ffn-skip")
    sweep.add_argument("settings", nargs="*", help="option=value,value,...")
    add_model(sweep)
    add_measured(sweep, 40, 2048)
    add_chains(sweep)
    add_pictures(sweep, "also draw the curve")
    add_json(sweep)

    text = "what each technique saves when it is added to those before it, part by part"
    waterfall = add(names, "waterfall", commands.waterfall, text)
    add_model(waterfall)
    text = "prompts to continue (default 4)"
    waterfall.add_argument("--prompts", type=count, default=4, metavar="N", help=text)
    add_grade(waterfall)
    add_text(waterfall)
    add_pictures(waterfall, "also draw the bars")
    add_json(waterfall)

    add_frontier(names, flags)
    add_report(names)

    cost = add(
        names,
        "cost",
        commands.cost,
        "predict what a technique saves on a model of any size, from its config",
    )
    cost.add_argument("technique", type=known_cost, help="name of a technique, such as first-layer")
    cost.add_argument("options", nargs="*", help="options of the technique: option=value")
    cost.add_argument("--config", required=True, metavar="FILE", help="a Hugging Face config.json")
    cost.add_argument(
        "--parallel",
        action="store_true",
        help="assume parallel blocks (attention and FFN read the same input)",
    )
    add_json(cost)

    precompute = "do the offline work of techniques once and write the resulting model"
    precompute = add(names, "precompute", commands.precompute, precompute)
    precompute.add_argument("out", metavar="OUT_DIR", help="a new folder, which -m OUT_DIR loads")
    add_model(precompute)

    add_cache(names, flags)

    add_learn(names, add)

    train = add(names, "train", commands.train, "train a model from a recipe")
    train.add_argument("recipe", help="a recipe.json, or the folder that contains one")
    train.add_argument("--out", metavar="DIR", help="folder to write (default: runs/NAME)")
    train.add_argument(
        "--workers", type=int, metavar="N", help="number of processes (default: one per core)"
    )
    train.add_argument(
        "--time-limit", type=seconds, metavar="S", help="stop at a checkpoint after S seconds"
    )
    train.add_argument(
        "--restart", action="store_true", help="start over: ignore an existing checkpoint"
    )

    stories = add(names, "stories", commands.stories, "print stories from the grammar")
    add_grade(stories)
    stories.add_argument(
        "--split", default="train", help="train (default), calibration or evaluation"
    )
    stories.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")
    stories.add_argument(
        "-n", "--count", type=count, default=3, metavar="N", help="number of stories (default 3)"
    )
    add_json(stories)
    for command in names.choices.values():
        command.flags = flags
    return top


def add_drawings(names) -> None:
    """The commands that draw: each prints a picture as text, and writes it to a file if asked."""
    text = "draw what ran for every token in every layer, under the generated text"
    skip_map = add(names, "map", commands.skip_map, text)
    text = "draw which keys a head's queries attend to, and how much attention they miss"
    keys = add(names, "keys", commands.keys, text)
    text = "layer, counted from 0 (default: the middle one)"
    keys.add_argument("--layer", type=int, metavar="N", help=text)
    text = "query head, counted from 0 (default 0)"
    keys.add_argument("--head", type=int, default=0, metavar="N", help=text)
    text = "draw a weight matrix before and after techniques: histogram, zeros, singular values"
    weights = add(names, "weights", commands.draw_weights, text)
    text = "part that holds the matrix, such as stack.blocks.3.ffn.down (default: the first of the "
    text += "middle block that the techniques change)"
    weights.add_argument("--part", metavar="PATH", help=text)
    add_model(weights)
    add_pictures(weights, "also write the picture")
    add_json(weights)
    for command in (skip_map, keys):
        command.add_argument("prompt", help="the text to continue; - reads it from stdin")
        add_model(command)
        add_sampling(command, "60, or as many as fit the context")
        add_pictures(command, "also write the picture")
        add_json(command)


def add_frontier(names, flags) -> None:
    """``minitx frontier FAMILY``: a command for each family, with the options that it needs."""
    from minitx.lab.frontier.families import FAMILIES

    text = "compare all techniques of a family, on equal terms"
    frontier = add(names, "frontier", commands.frontier, text)
    frontier.set_defaults(family=None)
    frontier.choice = "family"
    families = frontier.add_subparsers(metavar="FAMILY")
    for family in FAMILIES:
        command = add(families, family.name, commands.frontier, family.summary)
        command.set_defaults(family=family.name)
        command.flags = flags
        add_model(command, techniques=False)
        text = f"techniques, and the baselines {', '.join(family.baselines)} (default: all)"
        command.add_argument("--methods", type=words, metavar="A,B", help=text)
        if family.equal is None:
            add_decoding(command)
        else:
            add_shares(command, family)
        add_pictures(command, "also draw curves")
        add_json(command)


def add_report(names) -> None:
    text = "every technique on one model, as one HTML page with Pareto charts"
    report = add(names, "report", commands.report, text)
    add_model(report, techniques=False)
    add_measured(report, 40, 2048)
    text = "the page; results are kept beside it, as .json (default report.html)"
    report.add_argument("--out", metavar="FILE", help=text)
    text = "small samples: noisy figures, in minutes on a small model"
    report.add_argument("--quick", action="store_true", help=text)
    text = "shares of the multiply-adds to tune methods to (default 0.9,0.75,0.5)"
    report.add_argument("--share", type=shares, metavar="A,B", help=text)
    text = "defaults, attention, structure, calculation, decoding (default: all)"
    report.add_argument("--families", type=words, metavar="A,B", help=text)
    text = "only these techniques or methods (default: all)"
    report.add_argument("--methods", type=words, metavar="A,B", help=text)
    report.add_argument("--rounds", type=count, metavar="N", help="timing rounds (default 3)")
    text = "the second model of methods that need one: a draft, say (default stories-draft)"
    report.add_argument("--small", metavar="MODEL", help=text)
    text = "give a method up after S seconds (default 300)"
    report.add_argument("--time-limit", type=seconds, metavar="S", help=text)
    text = "measure all of it again, even what is in the .json file"
    report.add_argument("--restart", action="store_true", help=text)
    text = "measure nothing: draw from the results (or the points) in this JSON file"
    report.add_argument("--from", dest="source", metavar="JSON", help=text)
    add_pictures(report, "also draw the chart of loss against multiply-adds")
    text = "also write the points of the chart, as a small JSON file for --from"
    report.add_argument("--points", metavar="FILE", help=text)
    add_json(report)


def add_cache(names, flags) -> None:
    """``minitx cache stats`` and ``minitx cache clear``."""
    text = "statistics of the answers that --answer-cache stored, or remove them"
    cache = add(names, "cache", lambda args: cache.error("expected stats or clear"), text)
    cache.choice = "minitx cache command"
    tasks = cache.add_subparsers(metavar="stats|clear")
    stats = add(tasks, "stats", commands.cache_stats, "what the file holds, by model")
    clear = add(tasks, "clear", commands.cache_clear, "remove all answers, or those of one model")
    for command in (stats, clear):
        text = "file with the answers (default: answers.sqlite in $MINITX_CACHE or ~/.cache/minitx)"
        command.add_argument("--file", metavar="FILE", help=text)
        command.flags = flags
    text = "only answers of the model with this name"
    clear.add_argument("--model", dest="of", metavar="NAME", help=text)
    add_json(stats)


def add_sequences(command: Parser) -> None:
    chains = "token sequences: chains of stories, or windows of the text (default 8; of a text 2)"
    command.add_argument("--chains", type=count, metavar="N", help=chains)
    tokens = "tokens per sequence (default: fill the context; of a text at most 512)"
    command.add_argument("--tokens", type=count, metavar="N", help=tokens)
    add_grade(command)
    add_text(command)
    rounds = "timing rounds (default 15)"
    command.add_argument("--rounds", type=count, default=15, metavar="N", help=rounds)


def add_shares(command: Parser, family) -> None:
    """The options of families that are compared at the same share of something."""
    known = ",".join(f"{share:g}" for share in family.shares)
    command.add_argument(
        "--share",
        type=shares,
        default=family.shares,
        metavar="A,B",
        help=f"shares of the {family.equal} to compare at (default {known})",
    )
    if family.equal == "keys":
        add_sequences(command)
        return
    add_measured(command, 40, 2048)
    add_chains(command)
    text = "also the random baselines that techniques have of their own"
    command.add_argument("--random", action="store_true", help=text)
    text = "timing rounds (default 3)"
    command.add_argument("--rounds", type=count, metavar="N", help=text)
    text = "give a method up after S seconds (default 300)"
    command.add_argument("--time-limit", type=seconds, metavar="S", help=text)


def add_decoding(command: Parser) -> None:
    for name, default, meaning in (
        ("prompts", 8, "prompts, of stories or of the text"),
        ("length", 32, "tokens of each prompt"),
        ("new", 64, "new tokens after each prompt, at most"),
        ("rounds", 5, "timing rounds"),
    ):
        text = f"{meaning} (default {default})"
        command.add_argument(f"--{name}", type=count, default=default, metavar="N", help=text)
    add_grade(command)
    add_text(command)
    text = "the second model of methods that need one: a draft, say (default stories-draft)"
    command.add_argument("--small", default="stories-draft", metavar="MODEL", help=text)


def add(names, name: str, run, text: str) -> Parser:
    added = names.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    added.set_defaults(run=run, parser=added)
    return added


def add_model(command: Parser, techniques: bool = True) -> None:
    command.add_argument(
        "-m",
        "--model",
        default="stories",
        help="a shipped model's name, a folder or a file (default stories)",
    )
    command.add_argument(
        "--tokenizer", help="folder or file of the tokenizer, if it is not beside the model"
    )
    command.add_argument(
        "--no-tokenizer",
        dest="tokenizer",
        action="store_const",
        const=False,
        help="load the model for token ids only, whatever tokenizer files are beside it",
    )
    command.add_argument(
        "--calibrate",
        metavar="FILE",
        help="UTF-8 text for techniques that calibrate, instead of stories; - reads stdin",
    )
    if not techniques:
        return
    command.set_defaults(techniques={})
    command.takes_techniques = True


def add_sampling(command: Parser, all_of_them: str) -> None:
    """How many tokens to generate, and how they are drawn."""
    command.add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"maximum number of new tokens (default: {all_of_them})",
    )
    command.add_argument(
        "-t",
        "--temperature",
        type=float,
        metavar="T",
        help=f"sampling temperature (default {TEMPERATURE}); 0: greedy decoding, the likeliest "
        "token each time",
    )
    command.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely tokens"
    )
    command.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="nucleus sampling: keep the smallest set with probability mass P",
    )
    command.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"random seed (default {SEED}): the same seed gives the same text",
    )


def add_measured(command: Parser, stories: int, tokens: int) -> None:
    """What to measure on: stories of the grammar, or any text."""
    number = f"number of held-out stories (default {stories})"
    command.add_argument("--stories", type=count, metavar="N", help=number)
    add_grade(command)
    add_text(command)
    number = f"tokens from the beginning of the text (default {tokens:,})"
    command.add_argument("--tokens", type=count, metavar="N", help=number)


def add_grade(command: Parser) -> None:
    command.add_argument("--grade", help="difficulty of the stories (default full); listed below")
    command.takes_grade = True


def add_text(command: Parser) -> None:
    text = "measure on this UTF-8 text instead of stories; - reads stdin"
    command.add_argument("--text", metavar="FILE", help=text)


def add_chains(command: Parser) -> None:
    command.add_argument(
        "--chains",
        type=count,
        default=0,
        metavar="N",
        help="read N chains of stories instead, each as long as the context",
    )


def add_pictures(command: Parser, what: str) -> None:
    command.add_argument("--svg", metavar="FILE", help=f"{what}, as SVG")
    command.add_argument("--png", metavar="FILE", help=f"{what}, as PNG (needs matplotlib)")


def add_json(command: Parser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def known_cost(text: str) -> str:
    """The name of a technique that has cost formulas."""
    from minitx.lab.cost import names

    known = [name.replace("_", "-") for name in names()]
    if text.replace("_", "-") not in known:
        raise argparse.ArgumentTypeError(
            f"{abbreviate(text)} has no cost formulas; {did_you_mean(text, known)}"
        )
    return text


def count(text: str) -> int:
    return in_range(int(text), 1, 10**9)


def seconds(text: str) -> float:
    return in_range(float(text), 0, 10**9)


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def shares(text: str) -> tuple[float, ...]:
    """Numbers like 0.25 or 1/4."""
    return tuple(share(word) for word in words(text))


def share(word: str) -> float:
    """Not by ``Fraction``, for which 1e999999999 is an integer of a billion digits."""
    part, slash, whole = word.partition("/")
    try:
        return float(part) / float(whole) if slash else float(part)
    except ZeroDivisionError:
        raise ValueError from None


def in_range(number, least, most):
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"expected a number from {least} to {most}, got {number}")
    return number
