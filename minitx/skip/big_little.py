"""Big-little decoding: a small model writes, and hands over to the big one where it is unsure.

From top to bottom: the card and the options; the loop and its two rules (fallback, rollback); the
cost formula; notes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.decode import Sampler, TokenLoop, new_state
from minitx.model import Transformer
from minitx.ops import argmax_token
from minitx.second_model import SMALL_NAMES, need_rewind, small_model
from minitx.shared.break_even import warn
from minitx.shared.log_softmax import log_softmax
from minitx.shared.plain_loop import need_plain_loop
from minitx.shared.random_baseline import random_scores
from minitx.state import State
from minitx.technique import SEEDS, at_least, between, technique
from minitx.tree import Part, nbytes, part, table


@technique(
    level="decode",
    exact=False,
    neutral={"longest": 0},
    demo={"small": "self", "fallback": 0.0, "rollback": 5.0, "longest": 3},
    event="draft tokens proposed",
    presets={"paper": {"fallback": 0.6, "rollback": 5.0}, "exact": {"rollback": 0.69}},
)
def big_little(
    lm,
    *,
    small: Annotated[str, f"the small model: {SMALL_NAMES}"] = "auto",
    fallback: Annotated[
        float,
        "hand over to the big model where the small model's largest probability is below this; 0: "
        "never",
        between(0, 1),
    ] = 0.6,
    rollback: Annotated[
        float,
        "replace a draft token whose negative log-likelihood under the big model is above this, "
        "in nats; 0: every one that is not its argmax",
        at_least(0),
    ] = 2.0,
    longest: Annotated[
        int, "draft tokens in a row, at most; 0: the big model alone", at_least(0, limit=1024)
    ] = 10,
    choose: Annotated[
        Literal["confidence", "random"],
        "where the small model hands over: confidence: see fallback; random: a baseline, see rate",
    ] = "confidence",
    rate: Annotated[
        float, "probability of handing over at a token, with choose=random", between(0, 1)
    ] = 0.38,
    seed: Annotated[int, "seed of choose=random", SEEDS] = 0,
):
    """A small model drafts while it is confident; the big one checks, and corrects what is far off.

    Paper:     Kim et al., "Speculative Decoding with Big Little Decoder" (BiLD), NeurIPS 2023,
               arXiv 2302.07863.
    Fidelity:  a reconstruction from notes on the paper and the authors' code. A token above
               rollback that is the argmax is kept, as in their code; ours: the tokens after it are
               tested too (theirs looks at the first one above rollback only); choose=random.
    Kind:      approximate. With rollback below ln 2 = 0.693 greedy text is the big model's, except
               for ties that rounding decides: a token within rollback then has P > 1/2, so it is
               the argmax.
    Idea:      Most tokens are easy, and the small model knows which: its largest probability is
               high. It writes those. The big model reads them in one pass, which takes little more
               time than a pass over one token, and replaces the first that it finds unlikely.
    Offline:   nothing. (The paper may also fine-tune the small model on the big one's output.)
    Online:    the big model writes the first token; then, in rounds
               the small model drafts x[1], x[2], ..., greedily, until
                   max p < fallback       fallback: it hands over, and this prediction is dropped
                   or there are ``longest`` of them
               one big pass over the text's last token and x[1..m] gives P[1], ..., P[m+1]
               for the first i with -ln P[i](x[i]) > rollback and argmax P[i] != x[i]
                   rollback: emit x[1..i-1], then argmax P[i]
               if there is none: emit x[1..m], then argmax P[m+1]
               drop the other tokens from both KV caches; next, the small model reads first what the
               big one has added
    Saves:     passes of the big model, so bytes: n_b big passes and n_s small ones read
               n_b w_b + n_s w_s bytes of weights, where plain decoding reads w_b for each token.
               Multiply-adds rise, since both models run what is kept. On stories 0.42 big and 0.95
               small passes a token: 0.50x the bytes (weights and KV cache) and 1.07x the
               multiply-adds, with all tokens the same (speculative, exact: 0.37x and 1.17x).
    In NumPy:  1.1x to 1.2x the throughput on stories, whose weights fit the CPU's cache (Notes).
    Not for:   sampling: the rule would change the distribution, so requests with a temperature are
               left to the big model (speculative samples exactly); a small model with another
               vocabulary.
    Proof:     tests/skip/test_big_little.py; literal version: tests/skip/literal_big_little.py
    """
    if longest == 0:
        return lm
    need_plain_loop(lm, "big_little")
    found = small_model(lm, small, "big_little", "small")
    need_rewind(found, "big_little", "small", "give another small model")
    if nbytes(found) >= nbytes(lm.model):
        warn(
            f"big_little: the small model has {nbytes(found):,} bytes of weights and the big one "
            f"{nbytes(lm.model):,}, so drafting costs more than it saves; give a smaller one."
        )
    if choose == "random":
        scores = random_scores(1, lm.model.config.context, seed)[0]
        hands_over: Part = AtRandom(rate, scores)
    else:
        hands_over = Unsure(fallback)
    return replace(lm, decode=BigLittle(lm.decode, found, hands_over, rollback, longest))


# Online ------------------------------------------------------------------------------------------


@part
class BigLittle(TokenLoop):
    """The decoding loop: the small model drafts until it hands over, the big one checks."""

    inner: Part  # the plain loop, for requests that sample
    small: Part
    hands_over: Part
    rollback: float
    longest: int

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        if choose.temperature > 0:
            ledger.event("requests left to the big model")
            yield from self.inner(model, state, ids, choose, limit)
            return
        text, end = list(ids), len(ids) + limit
        small_state = new_state(self.small, ids)
        if limit:  # the big model begins
            text.append(model.next_argmax(text[state.position :], state))
            ledger.event("big model passes")
            yield text[-1]
        while len(text) < end:
            # Here the big model's KV cache holds every token except the last one.
            longest = min(self.longest, end - len(text) - 1)  # the big model adds one of its own
            drafted = self.draft(text, longest, small_state)
            logits = model([text[-1], *drafted], state)  # (m + 1, V)
            kept = first_far(logits, drafted, self.rollback)
            new = [*drafted[:kept], argmax_token(logits[kept])]
            text += new
            state.rewind(len(text) - 1)  # forget what was rolled back
            small_state.rewind(min(small_state.position, len(text) - 1))
            ledger.event("big model passes")
            ledger.event("draft tokens proposed", len(drafted))
            ledger.event("draft tokens kept", kept)
            ledger.event("rollbacks", kept < len(drafted))
            yield from new

    def draft(self, text: list[int], longest: int, state: State) -> list[int]:
        """Greedy tokens of the small model after ``text``, until it hands over. Its state holds a
        prefix of the text; what it reads first is the rest, which the big model has added."""
        drafted: list[int] = []
        ids = text[state.position :]
        room = self.small.config.context - len(text) + 1
        for _ in range(min(longest, room)):
            logits = self.small.next_logits(ids, state)
            ledger.event("small model passes")
            if self.hands_over(logits, len(text) + len(drafted)):
                ledger.event("hand-overs")
                break  # this prediction is neither kept nor fed back
            drafted.append(argmax_token(logits))
            ids = drafted[-1:]
        return drafted


@part
class Unsure(Part):
    """Fallback: is the largest probability below the threshold?"""

    fallback: float

    def __call__(self, logits: np.ndarray, position: int) -> bool:
        return float(np.exp(log_softmax(logits).max())) < self.fallback


@part
class AtRandom(Part):
    """The random baseline: hands over at random positions, the same ones in every text."""

    rate: float
    scores: np.ndarray = table()  # (context,), uniform in [0, 1)

    def __call__(self, logits: np.ndarray, position: int) -> bool:
        return bool(self.scores[position] < self.rate)


def first_far(logits: np.ndarray, drafted: Sequence[int], rollback: float) -> int:
    """The index of the first draft token that the big model replaces, or their number if it keeps
    all. logits (m + 1, V): row i scores the position of draft token i.

    A token is far if -ln P(token) > rollback. The argmax is kept even if it is far, since the big
    model would replace it by itself."""
    for i, (row, x) in enumerate(zip(logits, drafted)):
        if argmax_token(row) != x and -log_softmax(row)[x] > rollback:
            return i
    return len(drafted)


# Cost --------------------------------------------------------------------------------------------


def weight_bytes(big_passes: int, small_passes: int, big: int, small: int) -> int:
    """Bytes of weights read. big, small: the bytes that one pass of each model reads."""
    return big_passes * big + small_passes * small


# Notes:
#
# - python -m minitx.lab.loops big_little fallback=0,0.3,0.6 rollback=0.69,2,5
#   python -m minitx.lab.loops big_little choose=random rate=0.38 rollback=0.69,2
#   python -m minitx.lab.loops speculative gamma=2,4 stop=0
#   on stories with stories-draft, 20 prompts of 32 tokens, 48 new ones each. loss: nats per token
#   of the text under the big model, above those of its own text. The last two columns are relative
#   to plain decoding; bytes are those of weights and of the KV cache.
#
#                                same      passes a token                      bytes
#       fallback   rollback    tokens      big     small     loss   mult.-adds    read
#         0          0.69       100 %     0.19      1.54        0         1.57    0.32
#         0          2           74 %     0.15      1.19   -0.005         1.30    0.25
#         0          5           54 %     0.12      0.92   +0.023         1.10    0.20
#         0.3        0.69       100 %     0.37      1.01        0         1.12    0.45
#         0.3        2           98 %     0.36      0.98   +0.002         1.09    0.44
#         0.3        5           98 %     0.36      0.98   +0.002         1.09    0.44
#         0.6        any        100 %     0.42      0.95        0         1.07    0.50
#       choose=random: rate=0.38, as often as fallback=0.6 hands over
#                    0.69       100 %     0.39      1.21        0         1.25    0.49
#                    2           72 %     0.37      1.13   -0.013         1.19    0.46
#       speculative gamma=2 stop=0
#                               100 %     0.40      0.73        0         1.14    0.46
#       speculative gamma=4 stop=0
#                               100 %     0.29      1.01        0         1.25    0.37
#       speculative             100 %     0.30      0.88        0         1.17    0.37
#
#   Where the small model is as confident as fallback=0.6 demands, its token is always the big
#   model's: no token was rolled back, so rollback decides nothing and the text is exact. Handing
#   over at random needs as many bytes for more multiply-adds, since drafts run on into tokens that
#   are rejected; and at rollback=2 the text changes. Without a fallback there are fewer big passes
#   and more multiply-adds; a loose rollback saves most there. Then the text diverges, but is as
#   likely: many words of a story have equally likely alternatives.
# - minitx frontier decoding, CPU time, medians of three runs on a busy machine: 1.17x to 1.20x the
#   throughput by default (speculative 1.27x to 1.30x). In the table above, fallback=0 rollback=5
#   was fastest (1.7x to 1.9x).
# - An answer of one token is always the big model's, since that writes the first token: graded
#   questions whose answer is the next token cannot show what this loop costs.
# - The thresholds compare probabilities, so a small model that is overconfident (not calibrated)
#   hardly ever hands over.
# - Every token that is yielded has been checked: no text is taken back after it was shown.
