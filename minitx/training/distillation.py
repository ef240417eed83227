"""Distillation: the model learns the next-token distributions of a larger one, its teacher.

Hinton et al., 2015, arXiv 1503.02531; for the draft model of speculative decoding, on text that the
teacher itself has written: Zhou et al., "DistillSpec", ICLR 2024, arXiv 2310.08461.

    loss = sum over tokens and over temperatures t, with weights w[t], of
           w[t] * KL(softmax(teacher's logits / t) || softmax(model's logits / t))

A draft is accepted in greedy decoding when both models have the same argmax. At t = 1 two tokens of
30 and 29 % weigh the same; at t = 0.1 they are 58 and 42 %, so the loss sees which one is ahead.

A row of text is the beginning of a story and what the teacher writes after it with greedy decoding.
The text is written once, when a stage begins, and read many times. What is kept of the teacher is
its last hidden state (D numbers per token): the head makes the logits (V numbers) out of it.
"""

import ctypes
import multiprocessing
from itertools import pairwise

import numpy as np

from minitx.errors import MinitxError
from minitx.lm import LM, load
from minitx.memory_layout import to_row_major
from minitx.ops import op
from minitx.training.autograd.array import Traced, rule
from minitx.training.data import (
    MAX_BRIDGES,
    NO_BRIDGE,
    ORDINARY,
    PADDING,
    Batch,
    StoryEncoder,
    hash_integers,
    sample_stories,
)

MAX_HIDDEN = 2**29  # numbers in the hidden states of a text: 2 GiB
GROUP = 128  # rows that the teacher writes in one batch
STORIES, ROW = 1, 2  # purposes of random numbers, part of their seeds

# The loss ----------------------------------------------------------------------------------------


def log_softmax(x):
    """log(softmax(x)) over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@op
def distillation_loss(logits, teacher, temperature, weights):
    """The weighted sum over tokens of KL(softmax(teacher / t) || softmax(logits / t)), a scalar:
    logits and teacher (..., V), weights (...)."""
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(logits / temperature)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return (kl * np.asarray(weights, logits.dtype)).sum()


@rule(distillation_loss)
def _distillation_loss(logits, teacher, temperature, weights):
    """d loss / d logits = weight / t * (softmax(logits / t) - softmax(teacher / t))."""
    log_p = log_softmax(teacher / temperature)
    log_q = log_softmax(logits.value / temperature)
    p, weights = np.exp(log_p), np.asarray(weights, logits.value.dtype)
    loss = ((p * (log_p - log_q)).sum(-1) * weights).sum()

    def backward(g):
        yield logits, (np.exp(log_q) - p) * (g * weights / temperature)[..., None]

    return Traced(loss, backward)


# The teacher's text ------------------------------------------------------------------------------


def load_teacher(stage, tokenizer, vocab_size: int) -> LM:
    """The teacher of a stage; MinitxError if it cannot be loaded, if it cannot teach a model of
    this vocabulary, or if its text does not fit into memory."""
    where, teacher = f"Stage {stage.name!r}", stage.teacher
    try:
        lm = load(teacher.model)
    except MinitxError as error:
        raise MinitxError(f"{where}: the teacher cannot be loaded: {error}") from None
    config = lm.model.config
    if config.vocab_size != vocab_size:
        raise MinitxError(
            f"{where}: the teacher {teacher.model!r} must have the vocabulary of the model that it "
            f"teaches, {vocab_size} tokens, got {config.vocab_size}; use a teacher that was "
            "trained on stories (minitx models lists them)."
        )
    if lm.tokenizer is None or lm.encode(PROBE) != tokenizer.encode(PROBE):
        raise MinitxError(
            f"{where}: the teacher {teacher.model!r} must have the tokenizer of the stories, and "
            "has another; use one that was trained on stories (minitx models lists them)."
        )
    if stage.row >= config.context:
        raise MinitxError(
            f"{where}: row must be below the context of the teacher, which is {config.context}, "
            f"since a row has one more token; got {stage.row}."
        )
    numbers = teacher.rows * stage.row * config.width
    if numbers > MAX_HIDDEN:
        raise MinitxError(
            f"{where}: the teacher's rows have {numbers:.3g} hidden numbers, which are kept in "
            f"memory, and must have at most {MAX_HIDDEN:.3g}; use fewer rows or shorter ones."
        )
    return lm


PROBE = "Once upon a time there was a boy named Finn. Where is the bell? The bell is"


class TextArrays:
    """Memory shared by all processes: the teacher's text of one stage at a time."""

    def __init__(self, tokens: int = 0, numbers: int = 0):
        self.ids = multiprocessing.RawArray(ctypes.c_int32, tokens)
        self.hidden = multiprocessing.RawArray(ctypes.c_float, numbers)

    @classmethod
    def for_recipe(cls, recipe) -> "TextArrays":
        """As large as the largest text of a stage."""
        sizes = [(0, 0)]
        for stage in recipe.stages:
            if stage.teacher is not None:
                width = load(stage.teacher.model).model.config.width
                tokens = stage.teacher.rows * (stage.row + 1)
                sizes.append((tokens, stage.teacher.rows * stage.row * width))
        return cls(*map(max, zip(*sizes)))


class TeacherText:
    """The data of a stage with a teacher: N rows of at most T + 1 tokens, and the teacher's
    distributions."""

    def __init__(self, stage, lm: LM, shared: TextArrays, seed: int):
        self.stage, self.lm, self.seed = stage, lm, seed
        self.model = to_row_major(lm.model)
        N, T, D = stage.teacher.rows, stage.row, lm.model.config.width
        self.ids = np.frombuffer(shared.ids, np.int32)[: N * (T + 1)].reshape(N, T + 1)
        self.hidden = np.frombuffer(shared.hidden, np.float32)[: N * T * D].reshape(N, T, D)

    def groups(self) -> list[range]:
        """The rows that are written together, whatever the number of processes."""
        edges = [*range(0, len(self.ids), GROUP), len(self.ids)]
        return [range(first, last) for first, last in pairwise(edges)]

    def write(self, number: int, encoder: StoryEncoder, shares) -> None:
        """Write a group of rows: the prompts are the beginnings of training stories, all of one
        length, which differs from group to group."""
        rows, T = self.groups()[number], self.stage.row
        low, high = self.stage.teacher.prompt
        length = low + (high - low) * number // max(len(self.groups()) - 1, 1)
        stories = sample_stories(shares, "train", hash_integers(self.seed, STORIES), rows)
        prompts = [[encoder.end, *encoder.story(story)[0]][:length] for story in stories]
        texts = self.lm.generate(prompts, T + 1 - max(map(len, prompts)))
        ids = self.ids[rows.start : rows.stop]
        ids[:] = encoder.end
        for row, prompt, text in zip(ids, prompts, texts):
            text = [*prompt, *text][: T + 1]
            row[: len(text)] = text
        hidden = self.model.norm(self.model.hidden(ids[:, :-1]))
        self.hidden[rows.start : rows.stop] = hidden

    def batch(self, step: int, rows: range) -> tuple[Batch, np.ndarray]:
        """Some rows of a step, drawn at random, and the teacher's logits (B, T, V) for them."""
        # With replacement, so that a row depends on its number alone.
        drawn = [hash_integers(self.seed, ROW, step, row) % len(self.ids) for row in rows]
        ids = self.ids[drawn].astype(np.int64)
        end = ids[:, :1]  # the first token of every row
        # A target is padding if the token before it already ended the text.
        ended = np.logical_or.accumulate(ids[:, 1:] == end, axis=1)
        kinds = np.full(ended.shape, ORDINARY, np.int8)
        kinds[:, 1:][ended[:, :-1]] = PADDING
        bridges = np.full((*kinds.shape, MAX_BRIDGES), NO_BRIDGE)
        batch = Batch(ids, (kinds != PADDING).astype(np.float32), kinds, bridges).trimmed()
        T = batch.kinds.shape[1]
        return batch, self.model.head(self.hidden[drawn, :T])


def teacher_loss(model, batch: Batch, logits: np.ndarray, teacher):
    """The loss of a model on some rows, for the teacher's logits."""
    found = model(batch.ids[:, :-1])
    total = 0.0
    for temperature, weight in zip(teacher.temperatures, teacher.weights):
        total = total + distillation_loss(found, logits, temperature, batch.weights) * weight
    return total
