"""Train the predictors of contextual_sparsity for a model, and measure them.

    python -m minitx.skip.contextual_sparsity.train stories-relu --out FILE
    python -m minitx.skip.contextual_sparsity.train stories-relu --measure

It prints, for each layer and on held-out stories, of the neurons (heads): how many are active and
how many run; recall (of the active ones, how many run); precision (of those that run, how many are
active); and the recall of random ones in the same number. A predictor that runs all has recall 1:
recall says something only beside what is run.
"""

import argparse
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import need_writable_file
from minitx.errors import MinitxError
from minitx.exit_status import run_module
from minitx.lm import load
from minitx.skip.contextual_sparsity import THRESHOLD, check_choice, select
from minitx.skip.contextual_sparsity.file import FILE, read_predictors, write_predictors
from minitx.skip.contextual_sparsity.fit import (
    Hyperparameters,
    Training,
    record,
    train_predictors,
)
from minitx.state import Layer
from minitx.technique import apply, find

STORIES = 200
HELD_OUT = 20  # stories to measure on


def story_ids(lm, split: str, count: int) -> list[list[int]]:
    """Stories of grade full as ids. The trainer reads the "calibration" split, as techniques that
    calibrate do; what is measured comes from the "evaluation" split, which nothing is fitted to."""
    from minitx.training.stories import stories

    context = lm.model.config.context
    return [lm.tokenizer.encode(s.text)[:context] for s in islice(stories(split, "full", 0), count)]


def measure(lm, predictors: dict[str, tuple], texts, shares: dict, threshold: float) -> str:
    """A table of what the predictors find on these texts, layer by layer and on average."""
    lines = ["layer           active     run  recall  precision   random: recall"]
    for slot, name in (("ffn", "neurons"), ("attn", "heads")):
        rows = []
        for index, (p, one) in enumerate(zip(predictors[slot], record(lm, slot, texts))):
            x, active = one.arrays()
            run = select(p, shares[slot], threshold)(x, Layer.once(len(x)))
            rows.append(figures(active, run, np.random.default_rng(index)))
            lines.append(f"{f'{index} {name}':12} " + row(rows[-1]))
        lines.append(f"{f'all {name}':12} " + row(np.mean(rows, 0)))
    return "\n".join(lines)


def figures(active, run, rng) -> tuple:
    """active and run (tokens, units), booleans: the share that is active, and that runs; recall;
    precision; and the recall of as many random units for each token."""
    shuffled = np.take_along_axis(run, rng.random(run.shape).argsort(-1), -1)
    both, random = (run & active).sum(), (shuffled & active).sum()
    return (
        active.mean(),
        run.mean(),
        both / max(active.sum(), 1),
        both / max(run.sum(), 1),
        random / max(active.sum(), 1),
    )


def row(found) -> str:
    return "  {:8.3f}{:8.3f}{:8.3f}{:11.3f}{:17.3f}".format(*found)


def main(words=None) -> None:
    parser = argparse.ArgumentParser(description="Train the predictors of contextual_sparsity.")
    parser.add_argument("model", help="a shipped model, or a folder")
    parser.add_argument("--out", type=Path, help=f"the file; default: {FILE} beside the weights")
    parser.add_argument("--replace", action="store_true", help="the file, if there is one")
    parser.add_argument("--stories", type=int, default=STORIES)
    parser.add_argument(
        "--epochs", type=int, default=Hyperparameters.epochs, help="passes over them"
    )
    parser.add_argument("--rank", type=int, help="of neurons; default: a quarter of the width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="the file as it is: only measure it")
    parser.add_argument("--threshold", type=float, help=f"to measure at; default: {THRESHOLD:g}")
    parser.add_argument("--neurons", type=float, help="to measure at: a share instead")
    parser.add_argument("--heads", type=float, default=0.5, help="to measure at: their share")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given))


def run(given: argparse.Namespace) -> None:
    names = "stories", "epochs", "rank", "seed", "threshold", "neurons", "heads"
    options = {name: getattr(given, name) for name in names}
    options = find("contextual_sparsity").checked(options)  # refuses what is out of range
    check_choice(options["neurons"], options["threshold"], "predictor", monitor=0)
    lm = load(given.model)
    if lm.folder is None or lm.tokenizer is None:
        raise MinitxError(
            f"Predictors are trained on stories for the weights of a folder with a tokenizer, and "
            f"{given.model} is none; contextual_sparsity trains them when it is loaded."
        )
    # Refuses a model whose neurons or heads cannot be selected, and says why.
    apply(lm, {"contextual_sparsity": {"neurons": 0.5, "heads": 0.5, "choose": "random"}})
    path = lm.folder / FILE if given.out is None else given.out
    if given.measure:
        trained = read_predictors(lm, path)
    else:
        need_new_file(path, given.replace)
        texts = story_ids(lm, "calibration", options["stories"])
        training = Training(options["rank"], Hyperparameters(options["epochs"]), options["seed"])
        of_slot = {"ffn": training, "attn": replace(training, rank=None)}
        found = {slot: train_predictors(lm, slot, texts, t) for slot, t in of_slot.items()}
        trained = write_predictors(lm, found, path)
        print(f"wrote {path}")
    shares = {"ffn": options["neurons"], "attn": options["heads"]}
    texts = story_ids(lm, "evaluation", HELD_OUT)
    threshold = THRESHOLD if options["threshold"] is None else options["threshold"]
    print(measure(lm, trained.predictors, texts, shares, threshold))


def need_new_file(path: Path, may_replace: bool) -> None:
    """Refuse to write over a file, or a link, unless that is asked for; before the training."""
    if os.path.lexists(path) and not may_replace:
        raise MinitxError(f"{path} already exists; give another --out, or --replace to replace it.")
    need_writable_file(path)


if __name__ == "__main__":
    main()
