"""What an ensemble of two models predicts, read with teacher forcing: loss, and accuracy by hops.

    python -m minitx.lab.ensemble_loss stories-parallel -m stories --stories 60
    python -m minitx.lab.ensemble_loss stories-draft --weights 0.1,0.25,0.5 --average logit

``minitx compare`` reads ``lm.model`` alone, and an ensemble is a decoding loop. Here both models
read held-out stories, and their logits are combined token by token as the loop does it. At a
weight of 0 that is the model alone, at 1 the member alone.
"""

import argparse

from minitx.errors import MinitxError
from minitx.exit_status import run_module
from minitx.lab.evaluate import (
    Report,
    Tally,
    batches,
    best_guess,
    encode,
    held_out,
    hops_name,
    percent,
    report,
    story_end,
)
from minitx.lab.layout import table
from minitx.ledger import counting
from minitx.lm import LM, load
from minitx.second_model import load_second
from minitx.skip.ensemble import AVERAGES

WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
BATCH = 2048  # tokens


def reports(lm: LM, member: LM, weights, average: str, stories: int) -> dict[float, Report]:
    """The report of the ensemble at each weight of the member. Each model reads the stories
    once."""
    read, end = held_out(lm, stories), story_end(lm)
    rules = {weight: AVERAGES[average](weight) for weight in weights}
    totals = {weight: Tally.empty() for weight in weights}
    encoded = encode(lm.tokenizer, read, end=end)
    for batch in batches(encoded, lm.model.config.context, BATCH):
        ours, theirs = lm.model(batch.ids), member.model(batch.ids)  # (B, T, V)
        for weight, total in totals.items():
            total.floor += batch.floor
            total.add(rules[weight](ours, theirs), batch.targets, batch.kinds)
    guess = best_guess(read)
    return {weight: report(total, guess) for weight, total in totals.items()}


def as_text(lm: LM, member: LM, found: dict[float, Report], average: str, stories: int) -> str:
    """A table with a row for each weight. found: with the weights 0 and 1, which tell what a member
    drawn at random for each token would lose on average."""
    hops = [*found[0.0].by_hops]
    rows = [["weight", "loss", "a random one", "right", *map(hops_name, hops)]]
    for weight, r in found.items():
        drawn = (1 - weight) * found[0.0].loss + weight * found[1.0].loss
        accuracies = [percent(r.by_hops[h]) for h in hops]
        row = [f"{weight:g}", f"{r.loss:.4f}", f"{drawn:.4f}"]
        rows.append([*row, percent(r.accuracy), *accuracies])
    ids = lm.encode(held_out(lm, 1)[0].text)
    work = [counted(one, ids) for one in (lm, member)]
    return "\n".join(
        [
            f"{lm.name} and {member.name}, {average} average, {stories} held-out stories.",
            f"weight: of {member.name}. a random one: the mean loss if, for each token, one of the",
            "two predicted it alone, drawn with the weights.",
            "",
            table(rows),
            "",
            f"Together they take {sum(work) / work[0]:.2f}x the multiply-adds of {lm.name}.",
        ]
    )


def counted(lm: LM, ids: list[int]) -> int:
    with counting(lm) as counts:
        lm.logits(ids)
    return counts.total().multiply_adds


def numbers(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= x <= 1 for x in found):
        raise MinitxError(f"--weights takes numbers between 0 and 1, as 0.1,0.5; got {text!r}.")
    return found


def main(words=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.ensemble_loss",
        description="Loss and accuracy by hops of an ensemble of two models.",
    )
    parser.add_argument("member", help="the other model, by name or path")
    parser.add_argument("-m", "--model", default="stories", help="default: %(default)s")
    parser.add_argument("--average", choices=[*AVERAGES], default="probability")
    parser.add_argument("--weights", default=",".join(f"{w:g}" for w in WEIGHTS))
    parser.add_argument("--stories", type=int, default=60, help="default: %(default)s")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given))


def run(given: argparse.Namespace) -> None:
    weights, lm = numbers(given.weights), load(given.model)
    member = load_second(lm, given.member, "ensemble_loss", "member")
    weights = sorted({0.0, 1.0, *weights})  # each model alone, to compare with
    found = reports(lm, member, weights, given.average, given.stories)
    print(as_text(lm, member, found, given.average, given.stories))


if __name__ == "__main__":
    main()
