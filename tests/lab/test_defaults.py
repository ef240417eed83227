"""Defaults show the technique at work: what each costs and saves on a shipped model, pinned from
both sides.

At its default options a technique has a small price and a real saving on the model that it is for:
the loss of ordinary text rises by at most 0.02 nats per token, and multiply-adds, bytes of weights
or bytes of the KV cache (read, or held in memory) fall to 0.95 of the dense model's or less, with
all overhead counted. If a technique has no such setting here, the first lines of its card say so
and its row is a ``NoSaving``. Everything is counted, nothing is timed.
"""

from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
import pytest

import minitx
from minitx.lab.compare import Size, continuation, forget
from minitx.lab.evaluate import chains, encode, held_out
from minitx.lab.reading import NEW, PROMPT, hidden_as_generated, logits_of
from minitx.ledger import counting
from minitx.lm import LM
from minitx.technique import apply, find, names
from minitx.training.data import ORDINARY
from minitx.training.loss import token_losses

MOST_LOSS, MOST_LEFT = 0.02, 0.95  # what a default may cost, and leave of what it saves


@dataclass(frozen=True)
class Text:
    """What is read for the loss; the beginnings of the first two stories, or of the first chain,
    are continued for the counts."""

    stories: int = 20
    chains: int = 0  # chains of stories instead, each as long as the context
    again: bool = False  # continue each beginning twice, for what is kept between prompts


@dataclass(frozen=True)
class Default:
    """What a technique's defaults cost and save. Pairs are (at least, at most)."""

    loss: tuple[float, float]  # nats per token of ordinary text above dense
    saves: str  # what: a field of ``Figures``
    left: tuple[float, float]  # of that, relative to dense
    model: str = "stories"
    text: Text = Text()


@dataclass(frozen=True)
class NoSaving(Default):
    """A technique that has no setting on the shipped models with a small price and a real saving.
    ``saves`` is what it is about."""


@dataclass(frozen=True)
class Figures:
    """The price (a sum of losses, in nats) and the costs of a model."""

    loss: float  # nats per token of ordinary text
    multiply_adds: float  # while generating
    weight_bytes: float  # read while generating
    cache_bytes: float  # read while generating
    memory: float  # bytes of all arrays
    kv_cache: float  # bytes of KV cache per token of text


EXACT = (-1e-5, 1e-5)
CHAINS = Text(chains=2)
CHAIN = Text(chains=1)  # for those that run it token by token

SKIP = {
    "a3": NoSaving((0.2, 0.6), "cache_bytes", (0.6, 0.95), text=Text(stories=2)),
    "dota": NoSaving((0.05, 0.2), "cache_bytes", (0.6, 0.7), text=CHAINS),
    "early_exit": Default((0.001, 0.01), "multiply_adds", (0.6, 0.75)),
    "elsa": Default((0.003, 0.02), "cache_bytes", (0.8, 0.95), text=Text(chains=8)),
    "exact_head": Default(EXACT, "weight_bytes", (0.75, 0.85), model="stories-draft"),
    "ffn_skip": Default((0.001, 0.01), "multiply_adds", (0.85, 0.92)),
    "heavy_hitters": Default((-0.005, 0.01), "kv_cache", (0.49, 0.52), text=CHAIN),
    "layer_skip": Default((-0.001, 0.005), "multiply_adds", (0.86, 0.9)),
    "lazy_tokens": NoSaving((0.01, 0.1), "multiply_adds", (0.95, 1.0), text=CHAIN),
    "predictive_attention": Default((0.0, 0.015), "cache_bytes", (0.5, 0.6), text=CHAINS),
    "prefix_cache": Default(EXACT, "multiply_adds", (0.75, 0.9), text=Text(again=True)),
    "sink_window": Default((-0.005, 0.005), "kv_cache", (0.49, 0.51), text=CHAINS),
    "sparse_memory": Default((0.0, 0.015), "cache_bytes", (0.65, 0.75), text=CHAINS),
    "speculative": Default(EXACT, "weight_bytes", (0.4, 0.55)),
}

PRECOMPUTE = {}

ROWS = SKIP | PRECOMPUTE


# What is measured --------------------------------------------------------------------------------


def measured(lm: LM, text: Text) -> Figures:
    """The figures of a model on held-out text."""
    read, context = texts(lm, text), lm.model.config.context
    losses = np.concatenate([ordinary_losses(lm, one) for one in read])
    beginning = context - NEW if text.chains else PROMPT
    forget(lm)
    with counting(lm) as counts:
        for one in read[: 1 if text.chains else 2] * (2 if text.again else 1):
            continuation(lm, one.ids[:beginning])
    work, size = counts.total(), Size.of(lm, read[0].ids[:context])
    read_bytes = work.weight_bytes, work.cache_bytes
    return Figures(losses.mean(), work.multiply_adds, *read_bytes, size.weights, size.cache)


def texts(lm: LM, text: Text) -> list:
    if text.chains:
        endless = chains(lm.tokenizer, "evaluation", "full", lm.model.config.context)
        return list(islice(endless, text.chains))
    return encode(lm.tokenizer, held_out(lm, text.stories))


def ordinary_losses(lm: LM, one) -> np.ndarray:
    """The losses of the tokens of one text that answer no question."""
    logits = logits_of(lm, hidden_as_generated(lm, one.ids[:-1]))  # (T, V)
    losses = token_losses(logits, np.array(one.ids[1:]))
    return losses[np.array(one.kinds) == ORDINARY].astype(np.float64)


@cache
def loaded(model: str) -> LM:
    return minitx.load(model)


@cache
def dense(model: str, text: Text) -> Figures:
    return measured(loaded(model), text)


# The tests ---------------------------------------------------------------------------------------


def test_every_technique_has_a_row():
    assert set(ROWS) == set(names()), "its default's price and saving are pinned nowhere"
    for package, rows in (("minitx.skip", SKIP), ("minitx.precompute", PRECOMPUTE)):
        assert all(names()[name].startswith(package) for name in rows), "in the other table"


@pytest.mark.parametrize("name", ROWS)
def test_default_has_its_price_and_its_saving(name):
    row = ROWS[name]
    before = dense(row.model, row.text)
    after = measured(apply(loaded(row.model), {name: True}), row.text)
    loss, (low, high) = after.loss - before.loss, row.loss
    assert low <= loss <= high, f"the default's price is another: {loss:+.4f} nats per token"
    left, (low, high) = getattr(after, row.saves) / getattr(before, row.saves), row.left
    assert low <= left <= high, f"the default saves more or less {row.saves}: {left:.3f} of dense"


@pytest.mark.parametrize("name", ROWS)
def test_default_pays_or_the_card_says_that_none_does(name):
    row = ROWS[name]
    pays = row.loss[1] <= MOST_LOSS and row.left[1] <= MOST_LEFT
    if isinstance(row, NoSaving):
        assert not pays, "it has a saving: pin it as a Default"
        kind = " ".join(find(name).card.sections["Kind"].split())
        assert "shipped models" in kind, "the card's Kind does not say that nothing is saved here"
    else:
        assert pays, "a default with this price or this saving does not show the technique at work"
