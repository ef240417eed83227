"""Defaults show the technique at work: what each costs and saves on a shipped model, pinned from
both sides.

At its default options a technique has a small price and a real saving on the model that it is for:
the loss of ordinary text rises by at most 0.02 nats per token, and multiply-adds, bytes of weights
or bytes of the KV cache (read, or held in memory) fall to 0.95 of the dense model's or less, with
all overhead counted. An exact technique has no price, so any saving will do. If a technique has no
such setting here, the first lines of its card say so and its row is a ``NoSaving``. Everything is
counted, nothing is timed.
"""

from dataclasses import dataclass
from functools import cache

import pytest

import minitx
from minitx.lab.answers import Question, answer
from minitx.lab.compare import NEW, Size, continuation, forget
from minitx.lab.evaluate import Tally
from minitx.lab.reading import add_up, stories_to_read
from minitx.ledger import counting
from minitx.lm import LM
from minitx.shared.small_answers import cuts_of
from minitx.technique import apply, find, names

MOST_LOSS, MOST_LEFT = 0.02, 0.95  # what a default may cost, and leave of what it saves


@dataclass(frozen=True)
class Text:
    """What is read for the loss; the beginning of the first story or chain is continued for the
    counts."""

    stories: int = 6
    chains: int = 0  # chains of stories instead, each as long as the context
    again: bool = False  # continue the beginning twice, for what is kept between prompts
    batch: bool = False  # continue beginnings of different lengths in one batch, to their ends


@dataclass(frozen=True)
class Default:
    """What a technique's defaults cost and save. Pairs are (at least, at most)."""

    loss: tuple[float, float]  # nats per token of ordinary text above dense
    saves: str  # what: a field of ``Figures``
    left: tuple[float, float]  # of that, relative to dense
    model: str = "stories"
    text: Text = Text()
    beside: str | None = None  # a technique that the dense model has too, at its defaults
    dense: str | None = None  # the dense model, if the weights were trained for the technique


@dataclass(frozen=True)
class NoSaving(Default):
    """A technique that has no setting on the shipped models with a small price and a real saving.
    ``saves`` is what it is about."""


@dataclass(frozen=True)
class OneToken:
    """A technique that decides who gives a whole answer. Answers of one token to prompts cut from
    held-out stories at equal distances; pairs are (at least, at most)."""

    agreement: tuple[float, float]  # share of the answers that are the dense model's
    left: tuple[float, float]  # of its multiply-adds
    stories: int = 8
    cuts: int = 6


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
CHAINS = Text(chains=1)
CHAIN = Text(chains=1)  # for those that run it token by token
MORE, SOME, FEW, ONE = map(Text, (8, 4, 2, 1))  # more where it is close, fewer where it is slow

SKIP = {
    "a3": NoSaving((0.2, 0.6), "cache_bytes", (0.6, 0.75), text=Text(stories=1)),
    "answer_cache": Default(EXACT, "multiply_adds", (0.499, 0.501), text=Text(again=True)),
    "big_little": Default(EXACT, "weight_bytes", (0.35, 0.65)),
    "cats": Default((-0.004, 0.006), "multiply_adds", (0.84, 0.9), text=Text(stories=6)),
    "contextual_sparsity": Default((0.0, 0.012), "multiply_adds", (0.65, 0.69), "stories-relu"),
    "delta": Default((-0.004, 0.015), "multiply_adds", (0.72, 0.78), text=Text(stories=2)),
    "dot_product_reuse": Default(
        EXACT, "multiply_adds", (0.88, 0.93), "stories-parallel", Text(stories=2)
    ),
    "dota": NoSaving((0.05, 0.2), "cache_bytes", (0.6, 0.7), text=CHAIN),
    "early_exit": Default((0.001, 0.01), "multiply_adds", (0.6, 0.75)),
    "elsa": Default((0.003, 0.02), "cache_bytes", (0.8, 0.95), text=Text(chains=2)),
    "ensemble": NoSaving(EXACT, "multiply_adds", (1.05, 1.25), text=FEW),
    "exact_head": Default(EXACT, "weight_bytes", (0.93, 0.95), model="stories-draft"),
    "ffn_skip": Default((0.001, 0.01), "multiply_adds", (0.85, 0.92)),
    "head_cascade": Default((0.0, 0.015), "multiply_adds", (0.93, 0.95), text=Text(stories=4)),
    "head_router": Default((-0.003, 0.005), "multiply_adds", (0.9, 0.94), text=CHAINS),
    "heavy_hitters": Default((-0.005, 0.01), "kv_cache", (0.49, 0.52), text=CHAIN),
    "jacobi": NoSaving(EXACT, "weight_bytes", (0.9, 1.0)),
    "kv_share": Default((-0.001, 0.01), "kv_cache", (0.74, 0.76)),
    "layer_fusion": Default((0.002, 0.02), "memory", (0.65, 0.68)),
    "layer_merge": NoSaving((0.05, 0.2), "multiply_adds", (0.76, 0.79)),
    "layer_reorder": NoSaving((0.001, 0.015), "multiply_adds", (1.0, 1.0)),
    "layer_router": Default((0.0, 0.005), "multiply_adds", (0.7, 0.9), text=Text(stories=3)),
    "layer_skip": Default((-0.001, 0.005), "multiply_adds", (0.86, 0.9)),
    "lazy_tokens": NoSaving((0.01, 0.1), "multiply_adds", (0.95, 1.0), text=CHAIN),
    "lookahead": Default(EXACT, "weight_bytes", (0.5, 0.8)),
    "majority_vote": NoSaving(EXACT, "multiply_adds", (1.5, 5.0), text=FEW),
    "memoize_attention": NoSaving(
        (-0.005, 0.015), "multiply_adds", (0.96, 0.99), text=Text(stories=2)
    ),
    "memoize_ffn": Default((-0.005, 0.01), "multiply_adds", (0.6, 0.68), text=Text(stories=3)),
    "mixture_of_depths": Default(
        (0.001, 0.008), "multiply_adds", (0.55, 0.6), "stories-mod", dense="stories"
    ),
    "negative_predict": Default(
        (-0.001, 0.003), "multiply_adds", (0.88, 0.92), "stories-relu", ONE
    ),
    "negative_skip": Default(EXACT, "multiply_adds", (0.985, 0.996), "stories-relu", ONE),
    "padding_skip": Default(EXACT, "multiply_adds", (0.67, 0.73), text=Text(stories=4, batch=True)),
    "perforate": Default((0.0, 0.008), "multiply_adds", (0.81, 0.84), text=MORE),
    "perforate_keys": Default((0.0, 0.008), "cache_bytes", (0.48, 0.52), text=CHAINS),
    "perforate_positions": Default((0.001, 0.009), "multiply_adds", (0.82, 0.85)),
    "predictive_attention": Default((0.0, 0.015), "cache_bytes", (0.5, 0.6), text=CHAINS),
    "prefix_cache": Default(EXACT, "multiply_adds", (0.75, 0.9), text=Text(again=True)),
    "progressive_precision": Default((-0.003, 0.004), "cache_bytes", (0.61, 0.65), text=CHAIN),
    "prompt_lookup": Default(EXACT, "weight_bytes", (0.77, 0.85), text=FEW),
    "self_speculative": Default(EXACT, "weight_bytes", (0.68, 0.75), text=FEW),
    "semantic_cache": Default(EXACT, "multiply_adds", (0.45, 0.55), text=Text(again=True)),
    "sink_window": Default((-0.005, 0.005), "kv_cache", (0.49, 0.51), text=CHAINS),
    "sparse_memory": Default((0.0, 0.015), "cache_bytes", (0.65, 0.75), text=CHAINS),
    "speculative": Default(EXACT, "weight_bytes", (0.32, 0.42)),
    "switchable": Default((0.002, 0.015), "multiply_adds", (0.55, 0.65), text=Text(stories=4)),
    "teal": Default((-0.003, 0.015), "multiply_adds", (0.76, 0.82), text=Text(stories=4)),
    "token_prune": Default((0.004, 0.018), "multiply_adds", (0.79, 0.82), text=CHAIN),
    "value_prune": Default((-0.003, 0.008), "multiply_adds", (0.89, 0.92), text=CHAIN),
    "zero_skip": Default(EXACT, "multiply_adds", (0.76, 0.81), "stories-relu", FEW),
}

# Of loops that may write another text, of which the loss says nothing: the share of greedy tokens
# that the plain loop has at the same position.
SAME_TOKENS = {"big_little": (0.8, 1.0)}

PRECOMPUTE = {
    "absorb_products": Default(EXACT, "kv_cache", (0.5, 0.5), "stories-relu", FEW),
    "first_layer": Default(EXACT, "multiply_adds", (0.79, 0.82), "stories-parallel", FEW),
    "fold_norms": Default(EXACT, "memory", (0.998, 0.9995), text=FEW),
    "function_tables": NoSaving((-1e-4, 1e-4), "memory", (1.03, 1.05), text=FEW),
    "fuse_projections": NoSaving(EXACT, "weight_bytes", (1.0, 1.0), text=FEW),
    "head_prune": Default((-0.001, 0.006), "multiply_adds", (0.91, 0.94), text=SOME),
    "low_rank": Default((0.002, 0.012), "multiply_adds", (0.92, 0.95), "stories-relu", SOME),
    "lut_bit_serial": Default((-0.003, 0.003), "weight_bytes", (0.29, 0.33), text=ONE),
    "lut_centroid": Default((-0.008, 0.008), "multiply_adds", (0.77, 0.82), text=ONE),
    "lut_product": Default((-0.003, 0.003), "memory", (0.34, 0.36), text=ONE),
    "merge_embeddings": NoSaving((0, 0), "memory", (40, 50), "stories-relu", FEW),
    "norm_skip": NoSaving((-0.002, 0.005), "memory", (0.998, 0.9999), "stories-relu", FEW),
    "order_products": NoSaving(EXACT, "weight_bytes", (1.25, 1.3), text=FEW),
    "pack_zeros": Default((0, 0), "memory", (0.8, 0.88), text=FEW, beside="prune"),
    "prune": Default((0.0, 0.004), "memory", (0.8, 0.88), text=MORE, beside="pack_zeros"),
    "prune_structure": Default((-0.001, 0.003), "multiply_adds", (0.92, 0.95), text=SOME),
    "quantize": Default((-5e-4, 5e-4), "memory", (0.33, 0.35), text=SOME),
    "quantize_cache": Default((-5e-4, 5e-4), "kv_cache", (0.27, 0.29), text=SOME),
    "remove_weights": Default(EXACT, "multiply_adds", (0.85, 0.88), "stories-skipless", FEW),
    "separate_magnitudes": Default((0.0, 0.003), "memory", (0.25, 0.265), text=MORE),
    "separate_signs": NoSaving(EXACT, "multiply_adds", (1.85, 1.95), text=FEW),
    "shrink": Default(EXACT, "multiply_adds", (0.95, 0.98), "stories-relu", FEW),
    "slim_attention": Default(EXACT, "kv_cache", (0.5, 0.5), "stories-parallel", FEW),
    "vocab_prune": Default((-0.01, 0.015), "multiply_adds", (0.7, 0.9), "stories-draft", FEW),
}

# stories-draft is the small model; the bounds leave room for a better one.
ANSWER = {
    "cascade": OneToken((0.9, 1.0), (0.1, 0.6)),
    "router": OneToken((0.8, 1.0), (0.5, 0.9)),
}

ROWS = SKIP | PRECOMPUTE


# What is measured --------------------------------------------------------------------------------


def measured(lm: LM, text: Text) -> Figures:
    """The figures of a model on held-out text."""
    read, tally = to_read(Reader(lm), text), Tally.empty()
    for one in read.texts:
        add_up(tally, lm, one)
    forget(lm)
    with counting(lm) as counts:
        if text.batch:
            fifths = enumerate(read.texts[:4], 1)  # of four stories 1, 2, 3 and 4
            lm.generate([text.ids[: len(text.ids) * n // 5] for n, text in fifths], NEW)
        else:
            for prompt in read.prompts(1) * (2 if text.again else 1):
                continuation(lm, prompt)
    work, size = counts.total(), Size.of(lm, read.texts[0].ids[: lm.model.config.context])
    loss, read_bytes = read.report(tally).loss, (work.weight_bytes, work.cache_bytes)
    return Figures(loss, work.multiply_adds, *read_bytes, size.weights, size.cache)


class Reader:
    """A language model, as far as what it is given to read depends on it."""

    def __init__(self, lm: LM):
        self.lm = lm
        self.key = lm.tokenizer, lm.model.config.context

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other) -> bool:
        return self.key == other.key


@cache
def to_read(reader: Reader, text: Text):
    """The text, encoded: the same for all models with a tokenizer."""
    return stories_to_read(reader.lm, text.stories, chained=text.chains)


@cache
def loaded(model: str) -> LM:
    return minitx.load(model)


@cache
def dense(model: str, text: Text, beside: str | None) -> Figures:
    return measured(apply(loaded(model), {beside: True} if beside else {}), text)


# The tests ---------------------------------------------------------------------------------------


def test_every_technique_has_a_row():
    all_rows = set(ROWS) | set(ANSWER)
    assert all_rows == set(names()), "its default's price and saving are pinned nowhere"
    for package, rows in (("minitx.skip", SKIP), ("minitx.precompute", PRECOMPUTE)):
        assert all(names()[name].startswith(package) for name in rows), "in the other table"


@pytest.mark.parametrize("name", ROWS)
def test_default_has_its_price_and_its_saving(name):
    row = ROWS[name]
    before = dense(row.dense or row.model, row.text, row.beside)
    others = {row.beside: True} if row.beside else {}
    after = measured(apply(loaded(row.model), {name: True} | others), row.text)
    loss, (low, high) = after.loss - before.loss, row.loss
    assert low <= loss <= high, f"the default's price is another: {loss:+.4f} nats per token"
    left, (low, high) = getattr(after, row.saves) / getattr(before, row.saves), row.left
    assert low <= left <= high, f"the default saves more or less {row.saves}: {left:.3f} of dense"


@pytest.mark.parametrize("name", SAME_TOKENS)
def test_default_of_an_approximate_loop_keeps_most_of_the_text(name):
    row, same = ROWS[name], []
    lm, changed = loaded(row.model), apply(loaded(row.model), {name: True})
    for prompt in to_read(Reader(lm), row.text).prompts(3):
        pairs = zip(continuation(lm, prompt), continuation(changed, prompt), strict=True)
        same += [a == b for a, b in pairs]
    share, (low, high) = sum(same) / len(same), SAME_TOKENS[name]
    assert low <= share <= high, f"of the greedy text, {share:.3f} is that of the plain loop"


@pytest.mark.parametrize("name", ROWS)
def test_default_pays_or_the_card_says_that_none_does(name):
    row = ROWS[name]
    if find(name).exact:
        pays = row.left[1] < 1
    else:
        pays = row.loss[1] <= MOST_LOSS and row.left[1] <= MOST_LEFT
    if isinstance(row, NoSaving):
        assert not pays, "it has a saving: pin it as a Default"
        kind = " ".join(find(name).card.sections["Kind"].split())
        assert "shipped models" in kind, "the card's Kind does not say that nothing is saved here"
    else:
        assert pays, "a default with this price or this saving does not show the technique at work"


@pytest.mark.parametrize("name", ANSWER)
def test_default_agrees_with_the_dense_model_and_saves(name):
    row, lm = ANSWER[name], loaded("stories")
    questions = []
    for number, text in enumerate(to_read(Reader(lm), Text(stories=row.stories)).texts):
        for at in cuts_of(len(text.ids), row.cuts, tokens=1):
            questions.append(Question(number, "mention", text.ids[:at], text.ids[at : at + 1]))
    dense, found = answer(lm, questions), answer(apply(lm, {name: True}), questions)
    agreement = sum(a == b for a, b in zip(found.given, dense.given)) / len(questions)
    low, high = row.agreement
    assert low <= agreement <= high, f"{agreement:.3f} of the answers are the dense model's"
    left, (low, high) = found.multiply_adds.sum() / dense.multiply_adds.sum(), row.left
    assert low <= left <= high, f"the default leaves {left:.3f} of the multiply-adds"
