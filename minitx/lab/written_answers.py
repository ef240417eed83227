"""Questions answered in a sentence of the model's own, graded by its last word.

    python -m minitx.lab.written_answers -m stories-parallel --stories 40
    python -m minitx.lab.written_answers --majority-vote votes=9 same=sentence

``minitx.lab.answers`` cuts a story right before the answer, so one word is left to say. Here it is
cut after the question mark, and the model goes on as it likes ("The sack is still there in the
meadow."): there are many ways to the same answer, and a technique may work on the whole sentence. A
sentence is right if its last word is the answer.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from minitx.arguments import read_flags, split_flags
from minitx.decode import Sampler, new_state
from minitx.exit_status import run_module
from minitx.lab.answers import Question, add_options, bootstrap, questions_of
from minitx.lab.compare import forget
from minitx.lab.evaluate import held_out, hops_name, percent
from minitx.lab.layout import table
from minitx.lm import LM, load
from minitx.progress import bar
from minitx.technique import apply

LONGEST = 12  # tokens of a sentence


def written_questions(lm: LM, count: int) -> list[Question]:
    """The questions of ``count`` evaluation stories, cut after the question mark."""
    mark = lm.tokenizer.encode("Where?", special=False)[-1]
    asked = [q for q in questions_of(lm, held_out(lm, count)) if q.kind != "mention"]
    ends = [len(q.prompt) - q.prompt[::-1].index(mark) for q in asked]
    return [q._replace(prompt=q.prompt[:end]) for q, end in zip(asked, ends)]


def last_word(lm: LM, ids: Sequence[int]) -> str:
    """The last word of the first sentence."""
    words = lm.tokenizer.decode(list(ids)).partition(".")[0].split()
    return words[-1] if words else ""


def right(lm: LM, questions: Sequence[Question], shown=False) -> np.ndarray:
    """(n,) booleans."""
    forget(lm)
    found = []
    for q in bar(questions, "answer", unit="question", shown=shown):
        room = min(LONGEST, lm.model.config.context - len(q.prompt))
        state = new_state(lm.model, q.prompt)
        said = lm.decode(lm.model, state, q.prompt, Sampler(), room)
        found.append(last_word(lm, said) == last_word(lm, q.answer))
    return np.array(found)


def report(named: dict[str, LM], questions: Sequence[Question], shown=False) -> str:
    stories = np.array([q.story for q in questions])
    hops = np.array([q.hops for q in questions])
    kinds = sorted({q.hops for q in questions})
    rows = [["", "right", "95 %", *map(hops_name, kinds)]]
    for name, lm in named.items():
        ok = right(lm, questions, shown)
        low, high = bootstrap(ok, stories)
        row = [name, percent(ok.mean()), f"{100 * low:.1f} to {100 * high:.1f}"]
        rows.append([*row, *(percent(ok[hops == h].mean()) for h in kinds)])
    title = f"{len(questions)} questions of {len(set(stories))} held-out stories."
    return "\n".join([title, "", table(rows)])


def main(words=None) -> None:
    words, flags = split_flags(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.written_answers",
        description="Questions answered in a sentence. Techniques are given as for minitx: "
        "--TECHNIQUE OPTION=VALUE.",
    )
    add_options(parser)
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given, flags))


def run(given: argparse.Namespace, flags) -> None:
    lm = load(given.model)
    named = {lm.name: lm}
    if flags:
        wanted = read_flags(flags)
        named[" ".join(wanted)] = apply(lm, wanted)
    print(report(named, written_questions(lm, given.stories), shown=True))


if __name__ == "__main__":
    main()
