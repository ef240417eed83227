"""The ``minitx`` command. Text that a model writes goes to stdout, figures about the run to stderr."""

import argparse
import json
import os
import sys
import time

from minitx.errors import MinitxError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a found difference, 2 for bad input."""
    args = parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except MinitxError as error:
        print(f"minitx: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminitx: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="minitx", description="A transformer in NumPy, to read and to measure."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    generate = command(commands, "generate", run_generate, "continue a text, as it comes")
    generate.add_argument("prompt", help="the text to continue")
    model_options(generate)
    generate.add_argument("-n", "--max-new-tokens", type=int, help="default: what fits")
    generate.add_argument("-t", "--temperature", type=float, default=0.0, help="0: greedy (default)")
    generate.add_argument("--top-k", type=int, help="draw among the k likeliest tokens")
    generate.add_argument("--top-p", type=float, help="draw among the likeliest that reach p")
    generate.add_argument("--seed", type=int, help="the same seed gives the same text")

    show = command(commands, "show", run_show, "draw the tree of parts that runs")
    model_options(show)

    check = command(commands, "check", run_check, "compare models with another framework's outputs")
    check.add_argument("models", nargs="*", help="names of shipped models (default: all)")
    check.add_argument("--json", action="store_true", help="print the figures as JSON")

    bench = command(commands, "bench", run_bench, "measure decoding and prefill at three shapes")
    bench.add_argument("--json", action="store_true", help="print the figures as JSON")
    bench.add_argument("--quick", action="store_true", help="fewer repeats, rougher figures")

    evaluate = command(commands, "evaluate", run_evaluate, "accuracy by hops on held-out stories")
    model_options(evaluate)
    evaluate.add_argument("--stories", type=int, default=500, help="how many (default 500)")
    evaluate.add_argument("--grade", default="full", help="difficulty (default full)")
    evaluate.add_argument("--depths", action="store_true", help="also leave after every block")
    evaluate.add_argument("--json", action="store_true", help="print the figures as JSON")

    train = command(commands, "train", run_train, "train a model by its recipe")
    train.add_argument("recipe", help="a recipe.json")
    train.add_argument("--out", help="folder to write (default: runs/NAME)")
    train.add_argument("--workers", type=int, help="processes (default: one a core)")
    train.add_argument("--time-limit", type=float, help="stop at a checkpoint after so many seconds")
    train.add_argument("--restart", action="store_true", help="ignore an earlier checkpoint")

    stories = command(commands, "stories", run_stories, "print stories from the grammar")
    stories.add_argument("--grade", default="full", help="difficulty (default full)")
    stories.add_argument("--split", default="train", help="train, calibration or evaluation")
    stories.add_argument("--seed", type=int, default=0)
    stories.add_argument("-n", "--count", type=int, default=3)
    return top


def command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    added.set_defaults(run=run)
    return added


def model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-m", "--model", default="stories", help="a shipped name, a folder or a file"
    )
    command.add_argument("--tokenizer", help="folder or file, if it is not beside the model")


def run_generate(args) -> None:
    import minitx

    lm = minitx.load(args.model, args.tokenizer)
    began = time.perf_counter()
    pieces = lm.stream(
        args.prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(args.prompt, end="", flush=True)
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    seconds = time.perf_counter() - began
    count = len(lm.tokenizer.encode(text))
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} a second", file=sys.stderr)


def run_show(args) -> None:
    import minitx

    print(minitx.load(args.model, args.tokenizer).model)


def run_check(args) -> int:
    from minitx.lab.check import check_models

    return check_models(args.models, as_json=args.json)


def run_bench(args) -> None:
    from minitx.lab.bench import bench

    bench(as_json=args.json, quick=args.quick)


def run_evaluate(args) -> None:
    import minitx
    from minitx.lab.evaluate import evaluate_model

    report = evaluate_model(
        minitx.load(args.model, args.tokenizer), args.stories, args.grade, depths=args.depths
    )
    print(json.dumps(report.as_dict(), indent=1) if args.json else report)


def run_train(args) -> None:
    from pathlib import Path

    from minitx.training.train import train

    out = args.out or Path("runs") / Path(args.recipe).resolve().parent.name
    train(
        args.recipe,
        out,
        workers=args.workers,
        resume=not args.restart,
        time_limit=args.time_limit,
    )


def run_stories(args) -> None:
    from itertools import islice

    from minitx.training.stories import stories

    for story in islice(stories(args.split, args.grade, args.seed), args.count):
        print(story.text, end="\n\n")
