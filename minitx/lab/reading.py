"""What models are measured on, stories or any text, and how they read it.

Stories come from the grammar, so the entropy of the text is known and its questions show what a
model has understood. Of any other text only its own tokens are known: the negative log-likelihood
per token and per byte, and the perplexity.

A text is encoded once and cut into windows of at most ``WINDOW`` tokens. Nothing carries over from
one to the next; every token is scored once, the first of a window after the model's beginning- or
end-of-text token (minitx/text.py).

A text is read in one pass, unless a technique decides per step or per sequence what to skip: then
it is read as generation would run it, a prompt at once and the rest token by token. Logits are
computed for a few tokens at a time, since a row of them is as long as the vocabulary.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice

import numpy as np

from minitx.calibration import FAR, STORIES
from minitx.errors import MinitxError, MinitxWarning
from minitx.lab.evaluate import (
    Encoded,
    Report,
    Tally,
    best_guess,
    chains,
    encode,
    held_out,
    need_context,
    report,
    story_end,
)
from minitx.technique import decides
from minitx.text import Text, as_text, count_bytes, first_ids, start_of, windows
from minitx.training.data import ORDINARY

WINDOW = 512  # tokens of a window, or the model's context if that is shorter
TOKENS = 2048  # of a text, by default
PROMPT, NEW = 32, 48  # tokens of a prompt, and new tokens generated after it
PIECE = 2**22  # logits that are computed at a time


@dataclass(frozen=True)
class Material:
    """Texts to read, and how their sums become a report."""

    source: str  # "stories", or the name of the text
    size: str  # "100 stories of grade full"
    texts: list[Encoded]
    report: Callable[[Tally], "Report | TextReport"]
    beginning: int = PROMPT  # tokens of each text that serve as a prompt

    @property
    def name(self) -> str:
        return self.size if self.source == STORIES else f"{self.source}, {self.size}"

    def prompts(self, count: int) -> list[list[int]]:
        return [text.ids[: self.beginning] for text in self.texts[:count]]


def stories_to_read(lm, count: int, grade="full", chained: int = 0) -> Material:
    """Held-out stories, or ``chained`` chains of stories, each as long as the context."""
    found = held_out(lm, count, grade)
    guess, context, end = best_guess(found), lm.model.config.context, story_end(lm)
    if chained:
        endless = chains(lm.tokenizer, "evaluation", grade, context, end)
        texts, size = list(islice(endless, chained)), f"{chained} chains of {context} tokens"
    else:
        texts, size = encode(lm.tokenizer, found, end=end), f"{count} stories"
        need_context(texts, context)
    made = partial(report, guess=guess)
    size = f"{size} of grade {getattr(grade, 'name', grade)}"
    return Material(STORIES, size, texts, made, context - NEW if chained else PROMPT)


def text_to_read(lm, text: str | Text, tokens: int = TOKENS, window: int = WINDOW) -> Material:
    """The first ``tokens`` tokens of a text (fewer if it has fewer), in windows. MinitxError
    without a tokenizer, or for a text of fewer than two tokens."""
    if type(tokens) is not int or tokens < 2:
        raise MinitxError(f"tokens must be an integer >= 2, got {tokens!r}.")
    text, start = as_text(text), start_of(lm)
    window = min(window, lm.model.config.context)
    ids = first_ids(lm, text, tokens)
    texts = [
        Encoded(found, [ORDINARY] * (len(found) - 1), 0.0) for found in windows(ids, window, start)
    ]
    scored = ids if start else ids[1:]
    size = f"{len(scored):,} tokens in windows of {window}"
    made = partial(TextReport.of, size=count_bytes(lm, scored))
    return Material(text.name, size, texts, made)


def text_chains(lm, text: str | Text, tokens: int, first: int, more: int):
    """(first windows, further windows) of exactly ``tokens`` tokens from the beginning of a text,
    at most ``first`` and ``more``: for tuning on the former and measuring on the latter.
    MinitxError if the text is too short for one of each."""
    text, start = as_text(text), start_of(lm)
    ids = first_ids(lm, text, (first + more) * tokens + 1)
    found = windows(ids, tokens, start)
    whole = [ids for ids in found if len(ids) == tokens + 1]
    if len(whole) < 2:
        raise MinitxError(
            f"{text.name} has {len(ids):,} tokens; expected at least {2 * tokens + 1:,}, for a "
            f"window of {tokens} to tune on and another to measure on: give a longer text or fewer "
            "--tokens."
        )
    first = min(first, len(whole) - 1)
    encoded = [Encoded(ids, [ORDINARY] * tokens, 0.0) for ids in whole[: first + more]]
    return encoded[:first], encoded[first:]


# Reports -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextReport:
    """A model on a text of which nothing is known but its tokens."""

    tokens: int
    bytes: int
    nats: float  # negative log-likelihood of all tokens
    accuracy: float  # share of tokens that are the argmax

    @classmethod
    def of(cls, tally: Tally, size: int) -> "TextReport":
        tokens = int(tally.count.sum())
        right = int(tally.right.sum()) / tokens
        return cls(tokens, size, float(tally.loss.sum()), right)

    @property
    def loss(self) -> float:
        """Negative log-likelihood in nats per token."""
        return self.nats / self.tokens

    @property
    def nats_per_byte(self) -> float:
        """Comparable between models with different tokenizers."""
        return self.nats / max(self.bytes, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    def columns(self) -> dict[str, str]:
        return {
            "nats per token": f"{self.loss:.4f}",
            "per byte": f"{self.nats_per_byte:.4f}",
            "bits per byte": f"{self.nats_per_byte / math.log(2):.4f}",
            "perplexity": f"{self.perplexity:,.2f}",
            "next token right": f"{100 * self.accuracy:.1f} %",
        }

    def accuracies(self) -> dict[str, str]:
        """The columns that show answers: a text has none."""
        return {}

    def as_dict(self) -> dict:
        return asdict(self) | {
            "loss": self.loss,
            "nats_per_byte": self.nats_per_byte,
            "bits_per_byte": self.nats_per_byte / math.log(2),
            "perplexity": self.perplexity,
        }

    def __str__(self) -> str:
        wide = max(map(len, self.columns()))
        lines = [f"{name:{wide}}  {value}" for name, value in self.columns().items()]
        return "\n".join([f"{self.tokens:,} tokens, {self.bytes:,} bytes", *lines])


# Reading -----------------------------------------------------------------------------------------


def hidden_as_generated(lm, ids) -> np.ndarray:
    """Hidden states (T, D) of a text: in one pass if that makes no difference, otherwise as
    generation runs it, a prompt at once and the rest token by token (or at once too, where only the
    prompt decides)."""
    ids, way = np.array(ids), decides(lm.model)
    if way == "token":
        return lm.model.hidden(lm.check_ids(ids))
    state = lm.model.new_state()
    state.prompt = min(PROMPT, len(ids))
    later = 1 if way == "step" else max(len(ids), 1)
    found = [lm.model.hidden(ids[:PROMPT], state)]
    found += [lm.model.hidden(ids[t : t + later], state) for t in range(PROMPT, len(ids), later)]
    return np.concatenate(found)


def pieces(T: int, vocab_size: int) -> Iterator[slice]:
    """Slices of T rows, few enough for their logits to fit in memory."""
    step = max(PIECE // vocab_size, 1)
    return (slice(a, min(a + step, T)) for a in range(0, T, step))


def logits_of(lm, hidden) -> np.ndarray:
    """Logits (T, V) for hidden states (T, D)."""
    return lm.model.head(lm.model.norm(hidden))


def add_up(tally: Tally, lm, text: Encoded) -> None:
    """Read a text and add its tokens to the tally."""
    targets, kinds = np.array(text.ids[1:]), np.array(text.kinds)
    hidden = hidden_as_generated(lm, text.ids[:-1])
    for some in pieces(len(hidden), lm.model.config.vocab_size):
        tally.add(logits_of(lm, hidden[some]), targets[some], kinds[some])
    tally.floor += text.nats


# What misleads -----------------------------------------------------------------------------------


def warn_if_stories_are_unknown(source: str, found) -> None:
    """A model that does not know stories, measured on stories."""
    if source == STORIES and found.floor and found.loss > FAR * found.floor:
        warnings.warn(
            "measured on stories, which this model does not know (its loss is "
            f"{found.loss / found.floor:.1f} times their entropy); use text of its own kind: "
            "--text FILE (in Python: text=).",
            MinitxWarning,
            stacklevel=3,
        )


def warn_if_calibrated_otherwise(lm, source: str) -> None:
    """A setting calibrated on one kind of text and measured on another, or on the same text."""
    for use in lm.calibrated:
        if use.source == source != STORIES:
            words = "on which it is measured too: on other text it may do worse"
        elif STORIES in (use.source, source) and use.source != source:
            words = f"and is measured on {source}, another kind of text"
        else:
            continue
        warnings.warn(f"{use}, {words}.", MinitxWarning, stacklevel=3)
