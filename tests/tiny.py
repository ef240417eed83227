"""Shared by many tests: tiny random models, and a token loop that yields given tokens.

The tokenizer has 256 bytes, the merges "on" and "ce", and ``<|endoftext|>``, which is prepended.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from same import assert_same

from minitx.checkpoints.added_tokens import AddedToken
from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.huggingface import write_model
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.config import Config
from minitx.decode import TokenLoop, new_state
from minitx.lm import LM
from minitx.state import Layer
from minitx.training.skipless_init import initial_model
from minitx.tree import map_weights, part

END = 258
TOKENIZER = ByteLevelBPE(
    [*(bytes([i]) for i in range(256)), b"on", b"ce"],
    [(111, 110), (99, 101)],
    [AddedToken("<|endoftext|>", END)],
    bos=END,
    eos=END,
    adds_bos=True,
)
SIZES = dict(vocab_size=259, width=16, layers=2, heads=2, head_width=8, hidden=24, context=48)
ENDS = dict(bos=END, eos=(END,))
BIASES = dict(qkv_bias=True, out_bias=True, ffn_bias=True)
FAMILIES = {
    "llama": Config("llama", **SIZES, **ENDS, kv_heads=1, rope_width=8),
    "gpt2": Config("gpt2", **SIZES, **ENDS, **BIASES, kv_heads=2, activation="relu", tied=True),
    "gpt_neox": Config(
        "gpt_neox",
        **SIZES | ENDS | BIASES | dict(kv_heads=2, activation="gelu", rope_width=4, parallel=True),
    ),
}
# Not a family, but a kind of model that few techniques support: for the contract tests.
SKIPLESS = replace(FAMILIES["gpt_neox"], parallel=False, skipless=True)
KINDS = FAMILIES | {"skipless": SKIPLESS}
# Matrices of more than fast.LARGE numbers, which are stored column-major: 192 x 192 and more.
WIDE = dict(width=192, heads=2, kv_heads=2, head_width=96, hidden=192, qkv_bias=True)


@cache
def tiny_model(family="llama", seed=1, dtype=np.float32, **changes):
    """Random weights, large enough that logits differ clearly and depend on the context."""
    model = initial_model(replace(KINDS[family], **changes), seed, dtype)
    rng = np.random.default_rng(seed)

    def change(w):
        if w.ndim > 1 and model.config.skipless:  # no norm limits growing activations
            return w + rng.normal(0, 0.4 * len(w) ** -0.5, w.shape).astype(dtype)
        if w.ndim > 1:
            return w * 3
        return w + rng.normal(0, 0.2, w.shape).astype(
            dtype
        )  # gains other than 1, biases other than 0

    return map_weights(model, change)


def tiny_lm(family="llama", dtype=np.float32, **changes) -> LM:
    return LM(**dict(model=tiny_model(family, dtype=dtype), tokenizer=TOKENIZER) | changes)


def tiny_folder(folder, family="llama", tokenizer=True):
    """Write a tiny model as a Hugging Face folder."""
    write_model(tiny_model(family), folder, "F32")
    if tokenizer:
        write_tokenizer(TOKENIZER, folder)
    return folder


def error(found, expected):
    """The maximum absolute error, relative to the largest expected value."""
    return abs(found - expected).max() / abs(expected).max()


def check_close(found, expected, tolerance, what):
    """Assert that ``error`` is within the tolerance; a failure says where and how ``what``
    differs."""
    assert_same(found, expected, what, tolerance=tolerance)


def in_chunks(lm, ids, sizes, state=None):
    """Logits (..., T, V) of ids (..., T), run through the model in chunks of these sizes."""
    state = lm.model.new_state() if state is None else state
    cuts = np.cumsum([0, *sizes])
    return np.concatenate([lm.model(ids[..., a:b], state) for a, b in zip(cuts, cuts[1:])], -2)


def padded_mask(start, T):
    """The mask of T tokens in a left-padded batch; start (B,): index of the first real token."""
    layer = Layer(T, start, remember=False).take(T)
    layer.count = T
    return layer.mask()


def stored(layer, k, v):
    """All cached keys and values, after storing those of new tokens k, v (..., K, T, d)."""
    layer.take(k.shape[-2]).store(k, v)
    return layer.rows()


@part
class ScriptedLoop(TokenLoop):
    """A token loop that yields given tokens instead of the model's, and records its calls."""

    tokens: tuple  # a list of ids per sequence
    calls: list

    def __call__(self, model, state, prompt, choose, limit):
        self.calls.append((prompt, limit))
        for token in self.tokens[0][:limit]:
            self.calls.append(token)
            yield token

    def batch(self, model, prompts, choosers, limit):
        self.calls.append((prompts, limit))
        for tokens in list(zip(*self.tokens))[:limit]:
            self.calls.append(tokens)
            yield list(tokens)


def decode(loop, model, prompt, choose, limit):
    """The tokens that a token loop generates after the prompt, from an empty state."""
    return loop(model, new_state(model, prompt), prompt, choose, limit)


@dataclass
class Spy:
    """Wraps a model and records the shapes of the ids that it is run on."""

    model: object
    runs: list
    one_sequence = False

    @property
    def config(self):
        return self.model.config

    def new_state(self, *arguments):
        return self.model.new_state(*arguments)

    def next_logits(self, ids, state):
        self.runs.append(np.shape(ids))
        return self.model.next_logits(ids, state)

    def next_argmax(self, ids, state):
        self.runs.append(np.shape(ids))
        return self.model.next_argmax(ids, state)
