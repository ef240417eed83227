"""Jacobi decoding: the model guesses several next tokens at once and corrects them pass by pass.

From top to bottom: the card and the options; the decoding loop; what a new guess is; the cost
formula; notes.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from minitx import ledger, ops
from minitx.decode import Sampler, TokenLoop, prefill
from minitx.model import Transformer
from minitx.shared.plain_loop import need_plain_loop
from minitx.state import State
from minitx.technique import SEEDS, at_least, technique
from minitx.tree import Part, part


@technique(
    level="decode",
    exact=True,
    neutral={"guesses": 0},
    demo={"guesses": 3},
    event="guesses checked",
)
def jacobi(
    lm,
    *,
    guesses: Annotated[
        int, "guessed tokens per pass (paper: m); 0 is plain decoding", at_least(0, limit=1024)
    ] = 4,
    fill: Annotated[
        Literal["repeat", "random", "bigram"],
        "new guesses at the end of the window: repeat: the token before; random: any token; "
        "bigram: what followed the token before at its latest occurrence in the text",
    ] = "bigram",
    choose: Annotated[
        Literal["argmax", "random"],
        "the guesses of the next pass: argmax: what this pass predicts at their positions; random: "
        "random tokens, a baseline",
    ] = "argmax",
    seed: Annotated[int, "seed of the random tokens", SEEDS] = 0,
):
    """Guess the next tokens; each forward pass verifies and corrects all guesses at once.

    Paper:     Santilli et al., "Accelerating Transformer Inference for Translation via Parallel
               Decoding", ACL 2023, arXiv 2305.10427.
    Fidelity:  a reconstruction from summaries and from the authors' code of lookahead decoding
               (Fu et al., arXiv 2402.02057), which starts from it. Sampling is our extension.
    Kind:      exact: greedy text is the same, except for ties that rounding decides; samples follow
               the model's distribution. No setting pays on the shipped models: 1.03 tokens a pass
               (published: "barely" any gain).
    Idea:      Greedy decoding solves the equations  y[i] = argmax p(. | text, y[1..i-1]).  Jacobi's
               method guesses all y, evaluates all right-hand sides at once (one forward pass), and
               repeats that until nothing changes. Each pass makes at least one more token right.
    Offline:   nothing.
    Online:    one pass over the text's last token and the guesses y[1..m]; p[i]: the distribution
               after the text and y[1..i-1]
               t[i] ~ p[i]             i = 1, 2, ... up to the first t[i] != y[i] (greedy: argmax)
               emit t[1..n]            n - 1 right guesses and one token that replaces a wrong one
               truncate the KV cache to the right guesses
               y[i] = argmax p[n+i]    the guesses of the next pass: the window has moved by n
               fill up y to m tokens   (option fill)
    Saves:     passes, so bytes of weights read: 1 / (tokens per pass). Multiply-adds rise, to
               (m + 1) / (tokens per pass) of plain decoding's, after the prompt.
    In NumPy:  0.5x the throughput on stories (minitx compare --jacobi): a pass over 5 tokens takes
               about 1.9 times as long as a plain step, and gives 1.03 tokens.
    Not for:   anything but learning: lookahead gains more from the same kind of pass, and
               prompt_lookup guesses better without any pass. Batches, whose sequences are decoded
               one by one.
    Proof:     tests/skip/test_jacobi.py; literal version: tests/skip/literal_jacobi.py
    Tutorial:  tutorials/18_guessing_without_a_draft.py
    """
    if guesses == 0:
        return lm
    need_plain_loop(lm, "jacobi")
    random_token = RandomToken(lm.model.config.vocab_size)
    if choose == "random":
        return replace(lm, decode=RandomGuesses(random_token, guesses, seed))
    new = {"repeat": Repeat(), "random": random_token, "bigram": Bigram()}[fill]
    return replace(lm, decode=Jacobi(new, guesses, seed))


# Online ------------------------------------------------------------------------------------------


@part
class Jacobi(TokenLoop):
    """The decoding loop: verify the guesses, correct them, move the window on."""

    fill: Part  # (the text and the guesses after it, random generator) -> one more guess
    guesses: int  # m
    seed: int

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        text, guesses, rng = list(ids), [], random.Random(self.seed)
        end = len(text) + limit
        if limit:
            prefill(model, text, state)
        while len(text) < end:
            # Here the KV cache always holds every token except the last one.
            m = min(self.guesses, end - len(text) - 1)  # a pass adds one token to those accepted
            guesses = self.filled(text, guesses, m, rng)
            logits = model([text[-1], *guesses], state)  # (m + 1, V)
            new = verified(logits, guesses, choose)
            text += new
            state.rewind(len(text) - 1)  # forget the wrong guesses
            ledger.event("guesses checked", m)
            ledger.event("guesses accepted", len(new) - 1)
            ledger.event("passes")
            yield from new
            guesses = self.corrected(logits[len(new) :])

    def filled(self, text: list[int], guesses: list[int], m: int, rng) -> list[int]:
        """The first m of these guesses, with new ones at the end if there are fewer."""
        both = [*text, *guesses]
        while len(both) < len(text) + m:
            both.append(self.fill(both, rng))
        return both[len(text) : len(text) + m]

    def corrected(self, logits) -> list[int]:
        """The Jacobi step: each guess becomes the argmax of its row of logits."""
        return [ops.argmax_token(row) for row in logits]


@part
class RandomGuesses(Jacobi):
    """The random baseline: as many guesses per pass, none of which is kept for the next one."""

    def corrected(self, logits) -> list[int]:
        return []


def verified(logits, guesses: Sequence[int], choose: Sampler) -> list[int]:
    """The tokens of a pass: right guesses up to the first wrong one, then the token instead of it;
    one more token if all are right. Row i of the logits (m + 1, V) scores the position of guess i.

    Each token is drawn from the model's own distribution, as in plain decoding, and a guess is
    right if it is the token drawn. That is the acceptance rule of speculative decoding for a
    deterministic draft: x is accepted with probability p(x), else a token is drawn from p without
    x.
    """
    new: list[int] = []
    for row, guess in zip(logits, [*guesses, None]):
        new.append(choose(row))
        if new[-1] != guess:
            break
    return new


# New guesses -------------------------------------------------------------------------------------


@part
class Repeat(Part):
    """The last token once more."""

    def __call__(self, text: list[int], rng: random.Random) -> int:
        return text[-1]


@part
class RandomToken(Part):
    """Any token of the vocabulary."""

    vocab_size: int

    def __call__(self, text: list[int], rng: random.Random) -> int:
        return rng.randrange(self.vocab_size)


@part
class Bigram(Part):
    """What followed the last token where it occurred before; itself if it never did."""

    def __call__(self, text: list[int], rng: random.Random) -> int:
        for i in range(len(text) - 2, -1, -1):
            if text[i] == text[-1]:
                return text[i + 1]
        return text[-1]


# Cost --------------------------------------------------------------------------------------------


def multiply_adds(m: int, tokens_per_pass: float) -> float:
    """Those of the matrices, per new token, relative to plain decoding."""
    return (m + 1) / tokens_per_pass


# Notes:
#
# - Why so little is gained: in nearly every pass the first guess is wrong. The token instead of it
#   is emitted, but the later guesses were computed after the wrong token, so the first of them is
#   likely to be wrong in the next pass.
# - The paper solves blocks of m tokens, each until nothing changes. Here the window moves on after
#   each pass: that takes no extra pass to detect the end, and emits a token as soon as it is right.
# - A pass that emits n tokens leaves m + 1 - n corrected guesses: ``fill`` adds n - 1.
# - Each token is drawn as in plain decoding, with the same random numbers, so the same seed gives
#   the same sample. Guesses are deterministic (one-hot q): accepting x with probability p(x), and
#   else drawing from p without x, has the same distribution as drawing from p.
# - python -m minitx.lab.loops jacobi guesses=1,4,16 --prompts 8 --new 96
#   on stories (fill=repeat; choose=random; and all with --temperature 1): the first 32 tokens of 8
#   held-out stories, each continued by 96. Relative to plain decoding, prompt included; "accepted":
#   of the guesses that were checked.
#
#                            tokens per pass    accepted       multiply-adds   weight bytes
#       guesses  fill        greedy   T = 1     greedy  T = 1     greedy       greedy  T = 1
#          1     bigram       1.03    1.04      2.6 %   4.3 %      1.74x       0.98x   0.97x
#          4     bigram       1.03    1.05      0.7 %   1.2 %      3.95x       0.98x   0.97x
#         16     bigram       1.03    1.05      0.2 %   0.4 %     12.22x       0.99x   0.96x
#          4     repeat       1.00    1.04      0.1 %   1.0 %      4.04x       1.01x   0.97x
#          4     (random)     1.00    1.00      0.1 %   0.1 %      4.04x       1.01x   1.01x
#
#   (random): the baseline choose=random. Guesses that are looked up in the text and never corrected
#   do far better: prompt_lookup, measured in the same way, gives 1.7 tokens a pass (greedy).
#   minitx compare --jacobi guesses=4 counts and times the greedy ones: 0.54x the throughput (one
#   BLAS thread, 48 new tokens).
