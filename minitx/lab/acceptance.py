"""``python -m minitx.lab.acceptance stories stories-draft``: how often a draft is accepted.

The target writes after the beginnings of held-out stories, and both models read what it wrote.
Speculative decoding emits token y with the target's distribution p, and q is the draft's:

    accepted per token     sum over tokens x of min(p(x), q(x)): both have the same argmax (1) or
                           not (0), if decoding is greedy
    P(accepted | y)        min(p(y), q(y)) / p(y): of the proposal, given what was emitted

A round proposes up to gamma tokens and ends at the first rejection, so the tokens after it are
never proposed. Accepted and proposed tokens are expected values over where the rounds start.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from minitx.decode import Sampler
from minitx.exit_status import run_module
from minitx.lab.evaluate import held_out
from minitx.lab.layout import table
from minitx.lm import LM, load
from minitx.second_model import load_second
from minitx.values import between, need_integer

NEAR = 0.1  # a tie: the target's two best tokens are closer than this in probability


@dataclass(frozen=True)
class Acceptance:
    """At one temperature."""

    temperature: float
    per_token: float
    proposed: float  # draft tokens per target pass
    accepted: float
    near_ties: float | None  # share of the rejections at near ties, if greedy

    @property
    def share(self) -> float:
        """Accepted draft tokens, of those proposed."""
        return self.accepted / self.proposed

    @property
    def tokens_per_pass(self) -> float:
        return self.accepted + 1

    def columns(self) -> list[str]:
        name = "greedy" if self.temperature == 0 else f"{self.temperature:g}"
        shares = [f"{100 * share:.1f} %" for share in (self.per_token, self.share)]
        return [name, *shares, f"{self.tokens_per_pass:.2f}"]


@dataclass(frozen=True)
class Report:
    plan: str
    found: list[Acceptance]

    def __str__(self) -> str:
        heading = ["temperature", "accepted per token", "accepted / proposed", "tokens per pass"]
        lines = [self.plan, "", table([heading, *(a.columns() for a in self.found)]), ""]
        for a in self.found:
            if a.near_ties is not None:
                lines.append(
                    f"Greedy: at {100 * a.near_ties:.0f} % of the tokens that would be rejected, "
                    f"the target's two best tokens differ by less than {NEAR} in probability."
                )
        return "\n".join(lines).rstrip()


def acceptance(
    target: LM,
    draft: LM,
    stories: int = 40,
    prompt: int = 40,
    tokens: int = 100,
    gamma: int = 4,
    temperatures=(0, 1),
) -> Report:
    """Measure a draft on the target's own text: at most ``tokens`` tokens after each prompt."""
    texts = [story.text for story in held_out(target, stories)]
    beginnings = [target.tokenizer.encode(text)[:prompt] for text in texts]
    found = []
    for temperature in temperatures:
        texts = target.generate(beginnings, tokens, temperature=temperature, seed=0)
        rows = [
            read(target, draft, [*begin, *text], len(begin), temperature)
            for begin, text in zip(beginnings, texts)
            if text
        ]
        found.append(summary(rows, temperature, gamma))
    plan = (
        f"{stories} held-out stories, the first {prompt} tokens of each as the prompt, up to "
        f"{tokens} tokens of the target's own text after it; gamma {gamma}:"
    )
    return Report(plan, found)


def read(target: LM, draft: LM, ids: list[int], first: int, temperature: float) -> tuple:
    """For each token from position ``first`` on: sum(min(p, q)), P(accepted | token), and the
    probability by which the target's best token is ahead of its second."""
    sampler = Sampler(temperature)
    logits = [lm.model(np.array(ids[:-1]))[first - 1 :] for lm in (target, draft)]
    p, q = (np.array([sampler.probabilities(row) for row in rows]) for rows in logits)
    at = np.arange(len(p)), ids[first:]
    best = np.sort([Sampler(1).probabilities(row) for row in logits[0]], -1)
    return np.minimum(p, q).sum(-1), np.minimum(1, q[at] / p[at]), best[:, -1] - best[:, -2]


def summary(rows: list[tuple], temperature: float, gamma: int) -> Acceptance:
    overlap, _, ahead = (np.concatenate(each) for each in zip(*rows))
    passes, proposed, accepted = np.sum([rounds(given, gamma) for _, given, _ in rows], 0)
    rejected = overlap < 0.5
    near = None
    if temperature == 0 and rejected.any():
        near = float((ahead[rejected] < NEAR).mean())
    return Acceptance(
        temperature, float(overlap.mean()), proposed / passes, accepted / passes, near
    )


def rounds(accept, gamma: int) -> tuple[float, float, float]:
    """Expected passes of the target, draft tokens proposed and accepted, for a text whose tokens
    are accepted with these probabilities (n,) if they are proposed."""
    n = len(accept)
    starts = np.zeros(n + 1)  # the probability that a round starts at each token
    starts[0] = 1
    proposed = accepted = 0.0
    for i in range(n):
        length = min(gamma, n - i - 1)  # the target adds a token of its own
        reached = starts[i]  # the probability that a round starts here and accepts the next j
        for j in range(length):
            starts[i + j + 1] += reached * (1 - accept[i + j])  # rejected: the target's token
            reached *= accept[i + j]
            accepted += reached
        starts[i + length + 1] += reached
        proposed += starts[i] * length
    return float(starts[:n].sum()), proposed, accepted


def main(words=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.acceptance",
        description="How often the target of speculative decoding accepts a draft's tokens.",
    )
    parser.add_argument("target", help="the model that verifies")
    parser.add_argument("draft", help="the model that proposes")
    parser.add_argument("--stories", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--prompt", type=int, default=40, help="tokens; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=100, help="to write; default: %(default)s")
    parser.add_argument("--gamma", type=int, default=4, help="default: %(default)s")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given))


def run(given: argparse.Namespace) -> None:
    sizes = {"stories": 10**4, "prompt": 10**4, "tokens": 10**4, "gamma": 1024}
    for name, limit in sizes.items():
        need_integer(getattr(given, name), name, between(1, limit))
    target = load(given.target)
    draft = load_second(target, given.draft, "acceptance", "draft")
    print(acceptance(target, draft, given.stories, given.prompt, given.tokens, given.gamma))


if __name__ == "__main__":
    main()
