"""Decoding loops beside plain decoding: what a technique that replaces the loop costs and changes.

    python -m minitx.lab.loops big_little fallback=0,0.6 rollback=0.69,2,5
    python -m minitx.lab.loops speculative gamma=2,4,8 --temperature 1

The beginnings of held-out stories are continued, greedily if no temperature is given; prompt i is
sampled with seed i. Per row of the table, one setting:

    same tokens    tokens that plain decoding has at the same position
    same texts     continuations that are the same from beginning to end; with a temperature, exact
                   techniques too may draw other samples (of the same distribution)
    loss           nats per token of the continuation under the model itself, above those of plain
                   decoding: text may differ and be as likely
    accepted       of the tokens that were proposed, or of the guesses that were checked
    calls          forward passes of each model per token; of a second model, by its role (a loop
                   that runs the layers itself, self_speculative, has its passes among the events)
    multiply-adds, weight bytes, bytes (of weights and of the KV cache): relative to plain decoding
    speed          relative to plain decoding, one after the other on each prompt

Prefill is included, so that no row reaches 0 calls. Below the table: the events of each setting.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minitx.arguments import count
from minitx.decode import Sampler, new_state
from minitx.errors import MinitxError
from minitx.exit_status import run_module
from minitx.lab.answers import counting_calls
from minitx.lab.bench import elapsed
from minitx.lab.compare import forget
from minitx.lab.evaluate import percent
from minitx.lab.layout import fit, table
from minitx.lab.reading import NEW, stories_to_read
from minitx.lab.sweep import settings
from minitx.ledger import Entry, counting
from minitx.lm import LM, load
from minitx.progress import bar
from minitx.shared.log_softmax import log_softmax
from minitx.technique import apply, as_words, find
from minitx.values import at_least, between, need_integer

# Events of the loops that propose tokens: accepted ones, and all.
PROPOSALS = (
    ("draft tokens accepted", "draft tokens proposed"),
    ("draft tokens kept", "draft tokens proposed"),
    ("guesses accepted", "guesses checked"),
)


@dataclass(frozen=True)
class Run:
    """The continuations of some prompts, and what they cost together."""

    texts: list[list[int]]
    nats: float  # negative log-likelihood of the continuations under the dense model
    calls: dict[str, int]  # of each model, by its path
    work: Entry
    events: dict[str, int]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def bytes_read(self) -> int:
        return self.work.weight_bytes + self.work.cache_bytes

    @property
    def accepted(self) -> float | None:
        """Of the proposed tokens; None if there were none."""
        for some, every in PROPOSALS:
            if some in self.events and self.events.get(every):
                return self.events[some] / self.events[every]
        return None

    def same_tokens(self, plain: "Run") -> float:
        pairs = ((a, b) for one, other in zip(self.texts, plain.texts) for a, b in zip(one, other))
        return sum(a == b for a, b in pairs) / plain.tokens

    def same_texts(self, plain: "Run") -> int:
        return sum(a == b for a, b in zip(self.texts, plain.texts))


def continue_all(
    lm: LM, dense: LM, prompts: Sequence[list[int]], temperature: float = 0.0, new: int = NEW
) -> Run:
    """Each prompt is continued twice: counted, then timed."""
    texts, nats, calls, seconds = [], 0.0, Counter(), 0.0
    work, events = Entry(), Counter()
    for number, prompt in enumerate(prompts):
        sampling = temperature, number, new
        forget(lm)
        with counting_calls(lm) as own, counting(lm) as counts:
            texts.append(continuation(lm, prompt, *sampling))
        calls.update(own)
        work += counts.total()
        events.update(counts.events)
        forget(lm)
        began = time.process_time()
        continuation(lm, prompt, *sampling)
        seconds += elapsed(time.process_time, began)
        nats += likelihood(dense, prompt, texts[-1])
    return Run(texts, nats, dict(calls), work, dict(events), seconds)


def continuation(lm: LM, prompt: list[int], temperature: float, seed: int, new: int) -> list[int]:
    """It goes on past end-of-text, so that all settings generate as much."""
    state, sampler = new_state(lm.model, prompt), Sampler(temperature, seed=seed)
    limit = min(new, lm.model.config.context - len(prompt))
    return list(lm.decode(lm.model, state, prompt, sampler, limit))


def likelihood(lm: LM, prompt: list[int], new: list[int]) -> float:
    """The negative log-likelihood of the new ids, in nats."""
    logits = lm.logits([*prompt, *new[:-1]])[len(prompt) - 1 :]
    return -float(log_softmax(logits)[np.arange(len(new)), new].sum())


def row_of(name: str, run: Run, plain: Run) -> list[str]:
    paths = {path: path.removeprefix("decode.").removesuffix(".model") for path in run.calls}
    calls = ", ".join(f"{n / run.tokens:.2f} {paths[path]}" for path, n in run.calls.items())
    return [
        name,
        percent(run.same_tokens(plain)),
        f"{run.same_texts(plain)}/{len(plain.texts)}",
        f"{run.loss - plain.loss:+.3f}",
        "-" if run.accepted is None else percent(run.accepted),
        calls,
        f"{run.work.multiply_adds / plain.work.multiply_adds:.3f}x",
        f"{run.work.weight_bytes / plain.work.weight_bytes:.3f}x",
        f"{run.bytes_read / plain.bytes_read:.3f}x",
        f"{plain.seconds / run.seconds:.2f}x",
    ]


HEADING = (
    "setting", "same tokens", "same texts", "loss", "accepted", "calls", "multiply-adds",
    "weight bytes", "bytes", "speed",
)  # fmt: skip


def report(
    dense: LM, technique: str, chosen: Sequence[dict], prompts: int, temperature: float = 0.0,
    new: int = NEW, shown: bool = False,
) -> str:  # fmt: skip
    """The table of one technique at several settings."""
    beginnings = stories_to_read(dense, prompts).prompts(prompts)
    how = temperature, new
    plain = continue_all(dense, dense, beginnings, *how)
    rows, events = [HEADING, row_of("plain", plain, plain)], []
    for options in bar(chosen, "loops", unit="setting", shown=shown):
        run = continue_all(apply(dense, {technique: options}), dense, beginnings, *how)
        name = as_words(options) or "default"
        rows.append(row_of(name, run, plain))
        counted = ", ".join(f"{n:,} {event}" for event, n in run.events.items())
        events.append(fit(f"{name}: {counted or 'no events'}."))
    title = (
        f"{technique} on {dense.name}: {prompts} prompts of {len(beginnings[0])} tokens, "
        f"{plain.tokens // prompts} new tokens each, "
        f"{f'temperature {temperature:g}' if temperature else 'greedy'}."
    )
    return "\n".join([title, "", table(rows), "", *events])


def main(words=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m minitx.lab.loops", description="Decoding loops beside plain decoding."
    )
    parser.add_argument("technique", help="its name, as minitx list has it")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE,...", help="settings to try")
    parser.add_argument("-m", "--model", default="stories", help="default: %(default)s")
    parser.add_argument("--prompts", type=count, default=20, help="default: %(default)s")
    parser.add_argument("--new", type=count, default=NEW, help="tokens; default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given))


def run(given: argparse.Namespace) -> None:
    technique = find(given.technique)
    need_integer(given.prompts, "prompts", between(1, 1000))
    need_integer(given.new, "new", between(1, 1000))
    if given.temperature not in at_least(0):
        raise MinitxError(f"temperature must be 0 or more, got {given.temperature:g}.")
    chosen, lm = settings(technique, given.options), load(given.model)
    how = given.prompts, given.temperature, given.new
    print(report(lm, technique.name, chosen, *how, shown=True))


if __name__ == "__main__":
    main()
