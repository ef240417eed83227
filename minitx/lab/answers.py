"""Questions answered by generation: accuracy by hops, and what each answer costs.

    python -m minitx.lab.answers -m stories --stories 30
    python -m minitx.lab.answers -m stories --stories 30 --early-exit threshold=0.5

Where ``evaluate`` reads a story once and looks at every prediction, here the decoding loop answers:
so techniques that decide who answers can be graded (a cascade, a router, a vote). A held-out story
is cut before an answer; what is left is the prompt, and the loop generates as many tokens as the
right answer has (one, in the shipped story models). That is right if all of them are. Stopping at
the sentence's full stop instead would need a rule for what else the sentence may say.

All questions of a story are cuts of one text, so the prompt of one contains that of the one before.
By default each is nevertheless answered from an empty state, since a user asks one question, and
the costs counted are those of that question. shared=True answers all questions of a story in one
state, which is faster and gives the same answers where a state can be rewound; its costs are then
those of a question that follows the others.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minitx.arguments import read_flags, split_flags
from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.exit_status import run_module
from minitx.lab.compare import forget
from minitx.lab.evaluate import held_out, hops_name, percent, story_end
from minitx.lab.layout import table
from minitx.ledger import counting
from minitx.lm import LM, load
from minitx.model import Transformer
from minitx.progress import bar
from minitx.shared.same_beginning import state_for
from minitx.technique import apply
from minitx.training.data import StoryEncoder
from minitx.training.stories import HOPS, Story
from minitx.tree import walk

# Questions ---------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A story up to the word before an answer, and the answer."""

    story: int  # its number: questions of one story are not independent of each other
    kind: str  # one of stories.KINDS
    prompt: list[int]
    answer: list[int]

    @property
    def hops(self) -> int:
        """Facts that must be chained; 0: a counting question."""
        return HOPS[self.kind]


def questions_of(lm: LM, stories: Sequence[Story]) -> list[Question]:
    """All answers of these stories as questions, in the order of the text. Those that do not fit
    the context are left out. MinitxError if the tokens of this model reach across answers."""
    encoder, found = StoryEncoder(lm.tokenizer, story_end(lm)), []
    for number, story in enumerate(stories):
        ids, *_ = encoder.story(story)
        if not encoder.splits_at_pieces(story, ids):
            raise MinitxError(
                "This model's tokens reach across the words of a story, so it cannot be cut before "
                "an answer; use a model with the tokenizer of the story models."
            )
        ids = [encoder.end]
        for text, kind, _ in story.pieces:
            new = encoder.piece(text)
            if kind is not None and len(ids) + len(new) <= lm.model.config.context:
                found.append(Question(number, kind, ids.copy(), new))
            ids += new
    return found


def held_out_questions(lm: LM, count: int, grade="full", seed: int = 0) -> list[Question]:
    """The questions of ``count`` evaluation stories."""
    return questions_of(lm, held_out(lm, count, grade, seed))


# Answers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """n questions with the answers that were given; the arrays have one entry per question."""

    questions: list[Question]
    given: list[list[int]]
    multiply_adds: np.ndarray
    weight_bytes: np.ndarray
    cache_bytes: np.ndarray
    calls: dict[str, np.ndarray]  # forward passes of each model, by its path in the tree

    @property
    def right(self) -> np.ndarray:
        """(n,) booleans."""
        return np.array([g == q.answer for g, q in zip(self.given, self.questions)])

    @property
    def hops(self) -> np.ndarray:
        return np.array([q.hops for q in self.questions])

    @property
    def stories(self) -> np.ndarray:
        return np.array([q.story for q in self.questions])

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    def by_hops(self) -> dict[int, float]:
        """Accuracy for each number of hops."""
        found = sorted({q.hops for q in self.questions})
        return {hops: float(self.right[self.hops == hops].mean()) for hops in found}


def answer(lm: LM, questions: Sequence[Question], shared=False, shown=False, **sampling) -> Answers:
    """The answers of lm's decoding loop. shared: one state for all questions of a story (see
    above). shown: a progress bar. sampling: options of ``Sampler`` (default: greedy); with a seed,
    question i is answered with seed + i."""
    forget(lm)  # caches that outlive a sequence begin empty
    given, work, calls = [], [], []
    state, held = None, ()  # one sequence's state, and the prompt that it holds
    for number, question in enumerate(bar(questions, "answer", unit="question", shown=shown)):
        prompt = question.prompt
        state = state_for(lm.model, prompt, held, state if shared else None)
        held = prompt
        sampler = Sampler(**with_seed(sampling, number))
        with counting_calls(lm) as passes, counting(lm) as counts:
            loop = lm.decode(lm.model, state, prompt, sampler, len(question.answer))
            given.append(list(loop))
        work.append(counts.total())
        calls.append(passes)
    return Answers(
        list(questions),
        given,
        np.array([w.multiply_adds for w in work]),
        np.array([w.weight_bytes for w in work]),
        np.array([w.cache_bytes for w in work]),
        {path: np.array([c[path] for c in calls]) for path in models_of(lm).values()},
    )


def with_seed(sampling: dict, number: int) -> dict:
    seed = sampling.get("seed")
    return sampling if seed is None else sampling | {"seed": seed + number}


def models_of(lm: LM) -> dict[int, str]:
    """The path of each model in the tree, by its id: ``model``, ``decode.small``."""
    return {id(node): path for path, node in walk(lm) if isinstance(node, Transformer)}


@contextmanager
def counting_calls(lm: LM) -> Iterator[dict[str, int]]:
    """Count the forward passes of each model of ``lm`` inside the ``with`` block."""
    paths, hidden = models_of(lm), Transformer.hidden
    calls = dict.fromkeys(paths.values(), 0)

    def counted(self, ids, state=None):
        if id(self) in paths:
            calls[paths[id(self)]] += 1
        return hidden(self, ids, state)

    Transformer.hidden = counted
    try:
        yield calls
    finally:
        Transformer.hidden = hidden


# Intervals ---------------------------------------------------------------------------------------

SAMPLES, LEVEL = 2000, 0.95


def bootstrap(values, stories, per=None, seed: int = 0, samples: int = SAMPLES) -> tuple:
    """The 95 % bootstrap interval (low, high) of sum(values) / sum(per), for numbers (n,) each;
    per: default 1 each, so that it is the mean. Whole stories are drawn with replacement, since
    questions of one story are right or wrong together.

    For a paired comparison, values are differences: ``a.right - b.right`` as integers."""
    values = np.asarray(values, float)
    per = np.ones(len(values)) if per is None else np.asarray(per, float)
    _, story = np.unique(stories, return_inverse=True)
    of_story, sizes = np.bincount(story, values), np.bincount(story, per)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(samples, len(sizes)))
    means = of_story[drawn].sum(1) / sizes[drawn].sum(1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def difference(a: Answers, b: Answers, where=None, seed: int = 0) -> tuple[float, float, float]:
    """The accuracy of a minus that of b on the same questions, with its interval: (difference, low,
    high). where: (n,) booleans, only these questions."""
    where = np.ones(len(a.questions), bool) if where is None else where
    d = a.right[where].astype(int) - b.right[where]
    return float(d.mean()), *bootstrap(d, a.stories[where], seed=seed)


# The report --------------------------------------------------------------------------------------


def rows_of(named: dict[str, Answers]) -> list[list[str]]:
    """A table: accuracy with its interval, by hops, and costs relative to the first."""
    first, *_ = named.values()
    hops = [*first.by_hops()]
    heading = ["", "right", "95 %", *map(hops_name, hops), "multiply-adds", "bytes read", "calls"]
    rows = [heading]
    for name, a in named.items():
        low, high = bootstrap(a.right, a.stories)
        work = a.multiply_adds.sum() / first.multiply_adds.sum()
        read, of_first = ((x.weight_bytes + x.cache_bytes).sum() for x in (a, first))
        calls = ", ".join(f"{n.mean():.2f} {path}" for path, n in a.calls.items())
        row = [name, percent(a.accuracy), f"{100 * low:.1f} to {100 * high:.1f}"]
        row += [percent(a.by_hops()[h]) for h in hops]
        rows.append([*row, f"{work:.3f}x", f"{read / of_first:.3f}x", calls])
    return rows


def report(named: dict[str, Answers]) -> str:
    first, *others = named.items()
    questions = first[1].questions
    stories = len({q.story for q in questions})
    lines = [
        f"{len(questions)} questions of {stories} held-out stories.",
        "",
        table(rows_of(named)),
    ]
    for name, a in others:
        d, low, high = difference(a, first[1])
        lines += ["", f"{name} minus {first[0]}: {100 * d:+.1f} points ({100 * low:+.1f} to "
                  f"{100 * high:+.1f})."]  # fmt: skip
    return "\n".join(lines)


def main(words=None) -> None:
    words, flags = split_flags(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.answers",
        description="Questions answered by generation. Techniques are given as for minitx: "
        "--TECHNIQUE OPTION=VALUE.",
    )
    add_options(parser)
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given, flags))


def add_options(parser: argparse.ArgumentParser, stories: int = 30) -> None:
    parser.add_argument("-m", "--model", default="stories", help="default: %(default)s")
    parser.add_argument(
        "--stories", type=int, default=stories, help="held-out stories; default: %(default)s"
    )


def run(given: argparse.Namespace, flags) -> None:
    lm = load(given.model)
    questions = held_out_questions(lm, given.stories)
    named: dict[str, Callable[[], LM]] = {lm.name: lambda: lm}
    if flags:
        wanted = read_flags(flags)
        named[" ".join(wanted)] = lambda: apply(lm, wanted)
    print(report({name: answer(make(), questions, shown=True) for name, make in named.items()}))


if __name__ == "__main__":
    main()
