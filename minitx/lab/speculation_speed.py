"""What speculative decoding gains at a given acceptance rate: the price of a few rows, made use of.

    python -m minitx.lab.speculation_speed 128x8                     the shape of stories
    python -m minitx.lab.speculation_speed 288x6 576x30 --draft 64x2

Real drafts have an acceptance rate of their own. Here it is set: the draft knows the text that the
target will write, and each of its tokens is right with probability alpha, so that on average a
share ``acceptance`` of the ``gamma`` proposals of a round is accepted. A draft model of a given
shape runs all its steps for that, and takes the time that they take; without one, proposals are
free, as in prompt lookup. The weights are random, in the shapes of ``minitx.lab.rows``.

Plain and speculative decoding take turns, on one BLAS thread. The speedup is the median over the
rounds, with minimum and maximum. Time is CPU time, which on an idle machine equals wall time.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from minitx import progress
from minitx.build import random_model
from minitx.config import Config
from minitx.decode import Autoregressive, Sampler, new_state
from minitx.errors import MinitxError, abbreviate
from minitx.exit_status import run_module
from minitx.lab.bench import SEED, llama, one_thread, run_again, spread
from minitx.lab.layout import fit, table
from minitx.lab.rows import BY_DEFAULT, KNOWN, config_of
from minitx.ledger import counting
from minitx.lm import LM
from minitx.memory_layout import to_column_major
from minitx.model import Transformer
from minitx.shared.draft_and_verify import Draft, Drafting, Proposal, Speculative
from minitx.shared.draft_length import FixedLength
from minitx.state import State
from minitx.tree import part
from minitx.values import between, need_integer


@dataclass(frozen=True)
class Plan:
    """acceptance: share of the proposals that is accepted. draft: (width, layers), or None for free
    proposals. prompt, new: tokens."""

    acceptance: float = 0.75
    gamma: int = 4
    draft: tuple[int, int] | None = None
    prompt: int = 20
    new: int = 100
    rounds: int = 5


@dataclass(frozen=True)
class Gain:
    """One shape: seconds of plain and of speculative decoding in each round."""

    config: Config
    plain: list[float]
    speculative: list[float]
    accepted: float  # share of the proposals
    tokens_per_pass: float

    @property
    def speedup(self) -> dict[str, float]:
        return spread([a / b for a, b in zip(self.plain, self.speculative)])


# A draft with a given acceptance rate -------------------------------------------------------------


@part
class Scripted(Draft):
    """Proposes the next tokens of ``text``, each of which is right with probability alpha. model:
    runs beside, for the time that it takes, or None."""

    text: tuple[int, ...]
    alpha: float
    model: Transformer | None

    def begin(self, model: Transformer, state: State) -> Drafting:
        return ReadsScript(model, state, self)


class ReadsScript(Drafting):
    """A ``Scripted`` at work on one sequence."""

    def __init__(self, model: Transformer, state: State, script: Scripted):
        super().__init__(model, state)
        self.script, self.random = script, np.random.default_rng(SEED)
        self.own = None if script.model is None else script.model.new_state()

    def propose(self, text: list[int], sampler: Sampler) -> Iterator[Proposal]:
        known = self.script.text
        ids = [] if self.own is None else text[self.own.position :]
        for right in known[len(text) :]:
            if self.own is not None:
                self.script.model.next_argmax(ids, self.own)
            wrong = self.random.random() >= self.script.alpha
            x = (right + 1) % self.model.config.vocab_size if wrong else right
            yield Proposal(x)
            ids = [x]

    def rewind(self, position: int) -> None:
        super().rewind(position)
        if self.own is not None:
            self.own.rewind(min(self.own.position, position))


def alpha_for(acceptance: float, gamma: int) -> float:
    """The probability that a token is right at which, on average, this share of gamma proposals is
    accepted: alpha + alpha^2 + ... + alpha^gamma = acceptance * gamma, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        share = sum(middle**i for i in range(1, gamma + 1)) / gamma
        low, high = (middle, high) if share < acceptance else (low, middle)
    return high


# Measurement -------------------------------------------------------------------------------------


def gains(configs: Sequence[Config], plan: Plan = Plan(), bar: bool = True) -> list[Gain]:
    """Measure each shape. MinitxError if prompt and text do not fit the context."""
    for config in configs:
        if plan.prompt + plan.new > config.context:
            raise MinitxError(
                f"speculation_speed: prompt and new tokens together must be at most the context of "
                f"{config.context}; got {plan.prompt} and {plan.new}."
            )
    with progress.bar(len(configs) * plan.rounds, "speculation", "round", shown=bar) as shown:
        return [measure(config, plan, shown.update) for config in configs]


def measure(config: Config, plan: Plan, tick) -> Gain:
    model = to_column_major(random_model(config, SEED))
    prompt = np.random.default_rng(SEED).integers(0, config.vocab_size, plan.prompt).tolist()
    plain = LM(model, decode=Autoregressive())
    text = (*prompt, *written(plain, prompt, plan.new))
    alpha = alpha_for(plan.acceptance, plan.gamma)
    draft = Scripted(text, alpha, draft_model(config, plan.draft))
    guessing = replace(plain, decode=Speculative(draft, FixedLength(plan.gamma)))
    with counting(guessing) as counts:
        written(guessing, prompt, plan.new)
    events = counts.events
    seconds: list[list[float]] = [[], []]
    for _ in range(plan.rounds):
        for lm, found in zip((plain, guessing), seconds):
            began = time.process_time()
            written(lm, prompt, plan.new)
            found.append(max(time.process_time() - began, 1e-9))
        tick()
    accepted = events["draft tokens accepted"] / events["draft tokens proposed"]
    return Gain(config, *seconds, accepted, plan.new / events["target passes"])


def written(lm: LM, prompt: list[int], new: int) -> list[int]:
    """The greedy text after the prompt, past the end-of-text token."""
    return list(lm.decode(lm.model, new_state(lm.model, prompt), prompt, Sampler(), new))


def draft_model(config: Config, shape: tuple[int, int] | None) -> Transformer | None:
    if shape is None:
        return None
    width, layers = shape
    heads = max(1, width // 32)
    small = llama(width, layers, heads, heads, 8 * width // 3, config.vocab_size)
    return to_column_major(random_model(replace(small, context=config.context), SEED))


# The command -------------------------------------------------------------------------------------


def as_text(found: list[Gain], plan: Plan) -> str:
    rows = [["shape", "accepted", "tokens per pass", "speedup", ""]]
    for gain in found:
        c, speedup = gain.config, gain.speedup
        rows.append(
            [
                f"{c.width} x {c.layers}, {c.vocab_size:,}",
                f"{100 * gain.accepted:.0f} %",
                f"{gain.tokens_per_pass:.2f}",
                f"{speedup['median']:.2f}x",
                f"({speedup['lowest']:.2f}x to {speedup['highest']:.2f}x)",
            ]
        )
    draft = "free proposals"
    if plan.draft is not None:
        draft = f"a draft model of {plan.draft[0]} x {plan.draft[1]}"
    title = (
        f"Speculative decoding of {plan.new} tokens with {draft}, gamma={plan.gamma}, of which "
        f"{100 * plan.acceptance:.0f} % should be accepted; plain decoding = 1; median of "
        f"{plan.rounds} rounds; one thread, CPU time."
    )
    return f"{fit(title)}\n\n{table(rows)}"


def main(words=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.speculation_speed",
        description="What speculative decoding gains at a given acceptance rate.",
    )
    shapes = f"width x layers: {', '.join(KNOWN)} (default: {' '.join(BY_DEFAULT)})"
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=shapes)
    text = "share of the proposals that is accepted (default: %(default)s)"
    parser.add_argument("--acceptance", type=float, default=Plan.acceptance, help=text)
    text = "draft tokens per round (default: %(default)s)"
    parser.add_argument("--gamma", type=int, default=Plan.gamma, metavar="N", help=text)
    text = "width x layers of a draft model (default: proposals are free)"
    parser.add_argument("--draft", metavar="SHAPE", help=text)
    text = "tokens to generate (default: %(default)s)"
    parser.add_argument("--new", type=int, default=Plan.new, metavar="N", help=text)
    text = "default: %(default)s"
    parser.add_argument("--rounds", type=int, default=Plan.rounds, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given, words))


def run(given: argparse.Namespace, words: list[str] | None) -> None:
    configs = [config_of(name) for name in given.shapes or BY_DEFAULT]
    if given.acceptance not in between(0, 1):
        raise MinitxError(f"acceptance must be from 0 to 1, got {given.acceptance:g}.")
    need_integer(given.gamma, "gamma", between(1, 64))
    need_integer(given.new, "new", between(2, 1000))
    need_integer(given.rounds, "rounds", between(1, 1000))
    plan = Plan(given.acceptance, given.gamma, shape_of(given.draft), 20, given.new, given.rounds)
    if not one_thread():
        name = "minitx.lab.speculation_speed"
        return run_again([name, *(sys.argv[1:] if words is None else words)])
    found = gains(configs, plan)
    if given.json:
        shapes = [asdict(gain) | {"speedup": gain.speedup} for gain in found]
        print(json.dumps({"plan": asdict(plan), "shapes": shapes}, indent=1))
    else:
        print(as_text(found, plan))


def shape_of(text: str | None) -> tuple[int, int] | None:
    """``64x2`` as (64, 2)."""
    if text is None:
        return None
    words = text.split("x")
    numbers = [int(w) for w in words if w.isascii() and w.isdecimal() and len(w) < 6]
    if len(words) != 2 or len(numbers) != 2 or numbers[0] % 32 or not all(numbers):
        raise MinitxError(
            f"draft must be width x layers with a multiple of 32 as width, such as 64x2, got "
            f"{abbreviate(text)}."
        )
    return numbers[0], numbers[1]


if __name__ == "__main__":
    main()
