"""``minitx check``: models broken on purpose are found, at the right place, and not mistaken for
rounding; nor rounding for a bug. Whether sound models agree: test_reference.py."""

import json
from dataclasses import replace

import numpy as np
import pytest

from minitx.build import build
from minitx.lab.check import compare
from minitx.lab.comparison import BUG, ROUNDING
from minitx.lab.reference import (
    FOLDER,
    read_reference,
    seeded_model,
    seeded_weights,
)
from minitx.model import FFN, RMSNorm, Rope
from minitx.tree import Part, part, rebuild

LLAMA = read_reference(FOLDER / "random-llama-gqa.npz")
GPT2 = read_reference(FOLDER / "random-gpt2-gelu-tied.npz")
NEOX = read_reference(FOLDER / "random-neox-parallel.npz")


def with_weights(reference, change):
    """Compare the reference's model after ``change(weights by path)`` has changed them in place."""

    def make(dtype):
        drawn = {p: w.astype(dtype) for p, w in seeded_weights(config, reference.seed).items()}
        change(drawn)
        return build(config, lambda path, shape: drawn[path])

    config = reference.config
    return compare(reference, make)


def with_config(reference, **changes):
    config = replace(reference.config, **changes)
    return compare(reference, lambda dtype: seeded_model(config, reference.seed, dtype))


def with_part(reference, kind, make):
    """Compare the reference's model with ``make(part)`` instead of the second part of its kind."""

    def made(dtype):
        found = []

        def change(node):
            if isinstance(node, kind):
                found.append(node)
                return make(node) if len(found) == 2 else node

        return rebuild(seeded_model(reference.config, reference.seed, dtype), change)

    return compare(reference, made)


def assert_bug(found, where, *words):
    assert found.verdict == BUG and found.bug.name == where
    for word in (f"A bug: it first appears in {where},", *words):
        assert word in found.explanation, found.explanation
    before = found.stages[: found.stages.index(found.bug)]
    assert all(stage.ok["float64"] and stage.relative["float64"] < 1e-13 for stage in before)


# Bugs ---------------------------------------------------------------------------------------------

NOT_ROUNDING = "does not shrink in float64, so it is not rounding"


@pytest.mark.parametrize("reference", [LLAMA, GPT2, NEOX], ids=lambda r: r.name)
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("path", ["attn.qkv.v.w", "attn.out.w", "ffn.expand.up.w", "ffn.down.w"])
def test_check_locates_one_changed_weight(reference, block, path):
    def nudge(w):
        w[f"stack.blocks.{block}.{path}"][0, 0] += 0.05

    assert_bug(with_weights(reference, nudge), f"block {block}", NOT_ROUNDING)


def test_check_sees_a_tiny_change_in_float64():
    def nudge(w):
        w["stack.blocks.1.ffn.down.w"][0, 0] += 1e-7

    found = with_weights(LLAMA, nudge)
    assert all(stage.ok["float32"] for stage in found.stages)
    assert_bug(found, "block 1", "a constant has too few digits")


def test_check_locates_embedding_and_head():
    def token(w):
        w["embed.w"][LLAMA.ids[0], 3] += 0.01

    def position(w):
        w["embed.w"][0, 3] += 0.01  # of GPT-2: position 0

    def head(w):
        w["head.w"][2, 3] += 0.01

    assert_bug(with_weights(LLAMA, token), "embedding", NOT_ROUNDING)
    assert_bug(with_weights(GPT2, position), "embedding", NOT_ROUNDING)
    assert_bug(with_weights(LLAMA, head), "logits", NOT_ROUNDING)


@pytest.mark.parametrize("reference", [LLAMA, NEOX], ids=lambda r: r.name)
def test_check_finds_wrong_rope_base(reference):
    assert_bug(with_config(reference, rope_base=500000.0), "block 0", NOT_ROUNDING)
    found = with_config(reference, rope_base=10001.0)  # very slightly wrong
    assert_bug(found, "block 0")


def test_check_finds_wrong_rope_width():
    assert_bug(with_config(NEOX, rope_width=6), "block 0", NOT_ROUNDING)


def test_check_finds_wrong_epsilon():
    assert_bug(with_config(LLAMA, norm_eps=1e-6), "block 0", NOT_ROUNDING)
    assert_bug(with_config(GPT2, norm_eps=1e-4), "block 0", NOT_ROUNDING)
    # The second norm is that before the first block's FFN; the last is the model's own.
    assert_bug(with_part(LLAMA, RMSNorm, lambda n: replace(n, eps=1e-4)), "block 0")

    def make(dtype):
        model = seeded_model(LLAMA.config, LLAMA.seed, dtype)
        return replace(model, norm=replace(model.norm, eps=1e-3))

    assert_bug(compare(LLAMA, make), "norm", NOT_ROUNDING)


@pytest.mark.parametrize("name", ["q", "k"])
def test_check_finds_swapped_heads(name):
    d = LLAMA.config.head_width

    def swap(w):
        heads = w[f"stack.blocks.1.attn.qkv.{name}.w"]
        heads[:, : 2 * d] = np.roll(heads[:, : 2 * d], d, axis=1)

    assert_bug(with_weights(LLAMA, swap), "block 1", NOT_ROUNDING)


def test_check_finds_serial_blocks_and_wrong_activation():
    assert_bug(with_config(NEOX, parallel=False), "block 0", NOT_ROUNDING)
    assert_bug(with_config(NEOX, activation="gelu_tanh"), "block 0", NOT_ROUNDING)


@part
class RopeThatForgets(Part):
    """Takes every call for the beginning of the sequence."""

    rope: Part

    def __call__(self, x, layer):
        T = x.shape[-2]
        return self.rope(x, type(layer)(T)) if T == 1 else self.rope(x, layer)


def test_check_finds_a_bug_in_decoding_only():
    def make(dtype):
        model = seeded_model(LLAMA.config, LLAMA.seed, dtype)
        return rebuild(model, lambda n: RopeThatForgets(n) if isinstance(n, Rope) else None)

    found = compare(LLAMA, make)
    assert found.verdict == BUG and found.bug is None
    assert (
        "in the greedy continuation, after" in found.explanation
        and "the KV cache" in found.explanation
    )
    assert 0 < found.greedy["float64"] < 32  # the first comes from the prompt alone
    assert f"[DIFF] greedy in float64: {found.greedy['float64']} of 32" in str(found)


# Rounding -----------------------------------------------------------------------------------------


@part
class InType(Part):
    """``f(result)`` of a part, where the numbers come in that type."""

    inner: Part
    dtype: str
    f: object

    def __call__(self, x, layer):
        y = self.inner(x, layer)
        return self.f(y).astype(y.dtype) if y.dtype == self.dtype else y


def test_lost_digits_are_called_rounding():
    found = with_part(LLAMA, FFN, lambda ffn: InType(ffn, "float32", lambda y: y.astype("float16")))
    assert found.verdict == ROUNDING and found.bug is None
    assert found.explanation.startswith("Rounding, not a bug: float32 is off by up to ")
    assert "(first in block 1)" in found.explanation
    first = found.stages[2]
    assert first.name == "block 1" and not first.ok["float32"] and first.ok["float64"]
    assert "[DIFF]" in str(found) and "[OK]" in found.line()


def test_large_float32_error_is_called_a_bug():
    found = with_part(LLAMA, FFN, lambda ffn: InType(ffn, "float32", lambda y: y * 1.1))
    assert_bug(found, "block 1", "Only float32 is wrong")


def test_float32_step_inside_float64_is_named():
    found = with_part(LLAMA, FFN, lambda ffn: InType(ffn, "float64", lambda y: y.astype("float32")))
    assert_bug(found, "block 1", "perhaps a step always runs in float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_a_bug_and_json_stays_valid(dtype, bad):
    found = with_part(LLAMA, FFN, lambda ffn: InType(ffn, dtype, lambda y: y * 0 + bad))
    assert_bug(found, "block 1", "NaN or Inf")
    json.dumps(found.as_dict(), allow_nan=False)
    assert found.as_dict()["stages"][2][dtype]["ok"] is False
