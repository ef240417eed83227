"""Accuracy against cost when a small model may answer instead of a big one.

    python -m minitx.lab.answer_front
    python -m minitx.lab.answer_front --stories 100 --small stories-draft --budgets 0.3,0.5,0.7,0.9
    python -m minitx.lab.answer_front --stories 12 --cuts 8 --tokens 4

The questions of held-out stories (lab/answers.py) are answered by the small model alone, by the big
one alone, by a cascade and by a router at several budgets, and at random at the same costs. A
budget is the mean number of multiply-adds allowed per question, relative to the big model alone.

Both models answer every question once, from an empty state. What a cascade or a router would have
done follows from that: whose answer, and which costs (a test checks this against the real loops).
Thresholds and classifiers come from questions of the calibration split, and an answer counts as
right there if both models give it (shared/small_answers.py): half of the questions teach, the other
half sets the thresholds. "at 0.3" is a budget; "p >= 0.9" a threshold: answers that are right with
that probability are kept. "by text" is a cascade with this threshold that was calibrated as it is
by default, on prompts cut from stories anywhere: what holds there need not hold for questions.

--cuts N asks for the next tokens of such prompts instead, N of each held-out story (all called "1
hop"). Right is then the answer of the big model, and calibration is that of the techniques by
default: answers of one token, whatever --tokens asks for.

Random routing at the same cost is the mean of all ways to choose: on the line between the two
models alone. Intervals are 95 % bootstrap intervals over stories. z is McNemar's statistic of a
method and the big model: beyond 2, the difference is not chance.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from minitx.arguments import count, in_range
from minitx.decode import Autoregressive, Sampler, new_state, up_to_end
from minitx.exit_status import run_module
from minitx.lab.answers import (
    Answers,
    Question,
    add_options,
    answer,
    bootstrap,
    held_out_questions,
    questions_of,
)
from minitx.lab.evaluate import hops_name, percent
from minitx.lab.frontier.chart import chart
from minitx.lab.layout import fit, table
from minitx.lab.reading import stories_to_read
from minitx.lab.semantic_hits import auc
from minitx.lm import LM, load
from minitx.model import Transformer
from minitx.second_model import small_model
from minitx.shared.same_beginning import state_for
from minitx.shared.small_answers import (
    Example,
    answer_of,
    cut_for_share,
    cuts_of,
    examples_of,
    halves,
)
from minitx.skip.cascade import SCORES, isotonic
from minitx.skip.cascade import share_for as share_of_cascade
from minitx.skip.router import PromptTokens, learned
from minitx.skip.router import share_for as share_of_router
from minitx.training.stories import first_stories
from minitx.tree import float_type
from minitx.values import between, need_integer

BUDGETS = (0.3, 0.5, 0.7, 0.9)
SCORE = "lowest"  # of the cascade: its default
LIKE_THE_TECHNIQUES = 32, 8, 1  # calibration stories, cuts of each, tokens: their defaults
LIKELY = 0.9  # threshold of the last rows


# What both models answer -------------------------------------------------------------------------


@dataclass(frozen=True)
class Both:
    """The answers of both models to the same n questions, and what is decided by."""

    small: Answers
    big: Answers
    confidence: np.ndarray  # (n,) of the small answers
    scoring: np.ndarray  # (n,) multiply-adds of that
    prompts: np.ndarray  # (n, features) of the prompts

    def mixed(self, by_small: np.ndarray, tried: bool, extra) -> Answers:
        """The small model's answers where ``by_small`` (n,), else the big one's. tried: it has
        answered all questions, so that all are paid for. extra: further multiply-adds."""
        pairs = zip(by_small, self.small.given, self.big.given)
        given = [s if small else b for small, s, b in pairs]
        paid = np.ones(len(given), bool) if tried else by_small

        def cost(name: str) -> np.ndarray:
            return paid * getattr(self.small, name) + ~by_small * getattr(self.big, name)

        work = cost("multiply_adds") + extra
        read, cached = cost("weight_bytes"), cost("cache_bytes")
        return Answers(self.big.questions, given, work, read, cached, {})


def both(
    lm: LM, small: Transformer, questions: Sequence[Question], shown=False, score=SCORE
) -> Both:
    alone = replace(lm, model=small, decode=Autoregressive())
    of_small, of_big = answer(alone, questions), answer(lm, questions, shown=shown)
    confidence = [SCORES[score](e.answer) for e in as_examples(small, questions, of_big.given)]
    scoring = np.array([len(given) for given in of_small.given]) * small.config.vocab_size
    prompts = np.array([PromptTokens()(small, None, q.prompt) for q in questions])
    return Both(of_small, of_big, np.array(confidence), scoring, prompts)


def as_examples(small: Transformer, questions: Sequence[Question], given) -> list[Example]:
    """Calibration examples of these questions, which the big model has answered."""
    state, held, found = None, [], []
    for question, big in zip(questions, given):
        state, held = state_for(small, question.prompt, held, state), question.prompt
        small_answer = answer_of(small, state, held, Sampler(), len(question.answer))
        found.append(Example(held, small_answer, small_answer.tokens == big))
    return found


def cut_prompts(lm: LM, stories: int, cuts: int, tokens: int) -> list[Question]:
    """Prompts cut from held-out stories at equal distances, with the model's own answers."""
    found = []
    for number, text in enumerate(stories_to_read(lm, stories).texts):
        for at in cuts_of(len(text.ids), cuts, tokens):
            prompt = text.ids[:at]
            loop = lm.decode(lm.model, new_state(lm.model, prompt), prompt, Sampler(), tokens)
            found.append(Question(number, "mention", prompt, up_to_end(loop, lm.model.config.eos)))
    return found


def calibration_examples(lm: LM, small: Transformer, stories: int, shown=False) -> list[Example]:
    """Examples of the questions of the calibration split."""
    questions = questions_of(lm, first_stories("calibration", "full", 0, stories))
    given = answer(lm, questions, shared=True, shown=shown).given
    return as_examples(small, questions, given)


# Methods -----------------------------------------------------------------------------------------


def methods(lm: LM, small: Transformer, found: Both, examples, budgets, anywhere=None, score=SCORE):
    """{(method, setting): Answers}, from the cheapest to the dearest. anywhere: other examples, for
    a last row."""
    learn, tune = halves(examples)
    c_b = found.big.multiply_adds.sum()
    c_s = (found.small.multiply_adds.sum() + found.scoring.sum()) / c_b
    w, b = learned(PromptTokens(), small, learn, float_type(lm.model))
    routing = len(w)  # multiply-adds
    easy = [PromptTokens()(small, None, e.prompt) @ w + b for e in tune]
    sure = [SCORES[score](e.answer) for e in tune]
    rows = {("small alone", ""): found.mixed(np.ones(len(found.confidence), bool), True, 0)}
    for budget in budgets:
        cut = cut_for_share(sure, share_of_cascade(budget, c_s))
        kept = found.confidence >= cut
        rows["cascade", f"at {budget:g}"] = found.mixed(kept, True, found.scoring)
    for budget in budgets:
        c_r = len(found.confidence) * routing / c_b
        cut = cut_for_share(easy, share_of_router(budget, c_s + c_r, c_r))
        routed = found.prompts @ w + b >= cut
        rows["router", f"at {budget:g}"] = found.mixed(routed, False, routing)
    for name, some in (("cascade", learn), ("by text", anywhere or [])):
        if not some:
            continue
        g = isotonic([SCORES[score](e.answer) for e in some], [e.agrees for e in some])
        kept = found.confidence >= g.cut(LIKELY)
        rows[name, f"p >= {LIKELY:g}"] = found.mixed(kept, True, found.scoring)
    rows["big alone", ""] = found.big
    return rows


# Comparisons -------------------------------------------------------------------------------------


def at_random(found: Both, cost: float) -> np.ndarray:
    """(n,) probability of a right answer if the small model answers a random share of the
    questions, such that this is the mean cost."""
    c_s, c_b = found.small.multiply_adds.mean(), found.big.multiply_adds.mean()
    share = min(max((c_b - cost) / (c_b - c_s), 0.0), 1.0)
    return share * found.small.right + (1 - share) * found.big.right


def mcnemar(a, b) -> float:
    """z of the discordant pairs: questions that only one of two methods gets right, with the
    continuity correction; 0 if there is none. Negative where a is worse."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a == only_b:
        return 0.0
    z = (abs(only_a - only_b) - 1) / math.sqrt(only_a + only_b)
    return math.copysign(z, only_a - only_b)


@dataclass(frozen=True)
class Front:
    title: str
    found: Both
    rows: dict  # (method, setting) -> Answers
    seed: int = 0

    def __str__(self) -> str:
        hops = [*self.found.big.by_hops()]
        heading = ["", "% right", *map(hops_name, hops), "cost", "minus big", "z",
                   "minus random"]  # fmt: skip
        body = [self.row(name, setting, a, hops) for (name, setting), a in self.rows.items()]
        return "\n".join([self.title, "", table([heading, *body]), "", self.chart(), *self.said()])

    def row(self, name: str, setting: str, a: Answers, hops) -> list[str]:
        by_hops = a.by_hops()
        title = f"{name} {setting}".strip()
        found = [title, *(f"{100 * x:.1f}" for x in (a.accuracy, *(by_hops[h] for h in hops)))]
        found.append(f"{self.cost(a):.3f}")
        if "alone" in name and a is self.found.big:
            return [*found, "", "", ""]
        big = self.found.big.right
        versus_random = self.versus_random(a) if "alone" not in name else ""
        worse = self.points(a.right.astype(int) - big)
        return [*found, worse, f"{mcnemar(a.right, big):+.1f}", versus_random]

    def versus_random(self, a: Answers) -> str:
        return self.points(a.right - at_random(self.found, a.multiply_adds.mean()))

    def points(self, d) -> str:
        low, high = bootstrap(d, self.found.big.stories, seed=self.seed)
        return f"{100 * np.mean(d):+.1f} ({100 * low:+.0f}, {100 * high:+.0f})"

    def cost(self, a: Answers) -> float:
        return a.multiply_adds.sum() / self.found.big.multiply_adds.sum()

    def chart(self) -> str:
        series: dict[str, list] = {}
        for (name, _), a in self.rows.items():
            series.setdefault(name, []).append((self.cost(a), 100 * a.accuracy))
        low, high = self.cost(self.rows["small alone", ""]), 1.0
        line = [self.found.small.accuracy, self.found.big.accuracy]
        series["random"] = [
            (low + t * (high - low), 100 * (line[0] + t * (line[1] - line[0])))
            for t in np.linspace(0, 1, 9)[1:-1]
        ]
        return "% right\n" + chart(series, "multiply-adds, relative to the big model alone")

    def said(self) -> list[str]:
        """How well the score tells right from wrong; which methods are no better than random
        routing, for each number of hops."""
        right, confidence = self.found.small.right, self.found.confidence
        lines = [""]
        if right.any() and not right.all():
            share = percent(auc(confidence[right], confidence[~right]))
            lines.append(f"A right small answer scores above a wrong one in {share} of all pairs.")
        for name in dict.fromkeys(name for name, _ in self.rows if "alone" not in name):
            those = [a for (other, _), a in self.rows.items() if other == name]
            no_better = [hops_name(h) for h in self.found.big.by_hops() if not self.wins(those, h)]
            if no_better:
                lines.append(
                    f"{name}: no better than random at the same cost (the interval of the mean "
                    f"over settings reaches 0) on {', '.join(no_better)}."
                )
            else:
                lines.append(f"{name}: better than random at the same cost on every kind.")
        return [fit(line) for line in lines]

    def wins(self, those: Sequence[Answers], hops: int) -> bool:
        where = self.found.big.hops == hops
        random = [at_random(self.found, a.multiply_adds.mean()) for a in those]
        d = np.mean([a.right - r for a, r in zip(those, random)], axis=0)[where]
        return bootstrap(d, self.found.big.stories[where], seed=self.seed)[0] > 0


# The command -------------------------------------------------------------------------------------


def answer_front(
    lm: LM, small: str = "auto", stories: int = 60, budgets=BUDGETS, calibration: int = 60,
    seed: int = 0, shown: bool = False, cuts: int = 0, tokens: int = 1, score: str = SCORE,
) -> Front:  # fmt: skip
    """The ``Front`` on the questions of held-out stories; calibration: stories of that split. cuts:
    prompts cut from each story instead, answered with so many tokens."""
    model = small_model(lm, small, "answer_front", "small")
    examples = examples_of("cascade", lm, model, *LIKE_THE_TECHNIQUES, "give a tokenizer")
    if cuts:
        asked, anywhere, kind = cut_prompts(lm, stories, cuts, tokens), None, "prompts"
    else:
        asked, (anywhere, _), kind = held_out_questions(lm, stories), halves(examples), "questions"
        examples = calibration_examples(lm, model, calibration, shown)
    found = both(lm, model, asked, shown, score)
    rows = methods(lm, model, found, examples, budgets, anywhere, score)
    agree = np.mean([e.agrees for e in examples])
    title = (
        f"{lm.name}, and a small model of {percent(model_cost(found))} of its multiply-adds: "
        f"{len(found.confidence)} {kind} of {stories} held-out stories; {len(examples)} "
        f"{kind} to calibrate on, of which both answer {percent(agree)} alike. Score: {score}."
    )
    return Front(fit(title), found, rows, seed)


def model_cost(found: Both) -> float:
    return found.small.multiply_adds.sum() / found.big.multiply_adds.sum()


def at_least_0(text: str) -> int:
    return in_range(int(text), 0, 10**9)


def main(words=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.answer_front",
        description="Accuracy by hops against cost: cascades and routers of two models.",
    )
    add_options(parser, stories=60)
    parser.add_argument("--small", default="auto", help="the small model; default: %(default)s")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="%(default)s")
    parser.add_argument(
        "--calibration", type=count, default=60, help="stories; default: %(default)s"
    )
    parser.add_argument("--score", choices=[*SCORES], default=SCORE, help="default: %(default)s")
    text = "prompts of each story, no questions"
    parser.add_argument("--cuts", type=at_least_0, default=0, metavar="N", help=text)
    parser.add_argument("--tokens", type=count, default=1, help="with --cuts; default: %(default)s")
    parser.add_argument("--seed", type=at_least_0, default=0, metavar="N", help="of the bootstrap")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given, parser))


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    try:
        budgets = [in_range(float(word), 0, 1e9) for word in given.budgets.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        parser.error(f"--budgets takes numbers >= 0 separated by commas, got {given.budgets!r}.")
    need_integer(given.cuts, "cuts", between(0, 1000))
    need_integer(given.tokens, "tokens", between(1, 100))
    found = answer_front(
        load(given.model), given.small, given.stories, budgets, given.calibration, given.seed,
        True, given.cuts, given.tokens, given.score,
    )  # fmt: skip
    print(found)


if __name__ == "__main__":
    main()
