"""Rotary frequencies and their scaling for longer contexts."""

import math

import numpy as np
import pytest
from same import assert_same

from minitx.build import build, normal_init
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.ops import linear_rope_scaling, llama3_rope_scaling, rope_tables

CONFIG = Config(
    family="llama",
    vocab_size=9,
    width=8,
    layers=1,
    heads=1,
    kv_heads=1,
    head_width=8,
    hidden=8,
    context=20,
    rope_width=8,
    rope_base=625.0,
)


def literal_llama3(frequency, factor, low, high, context):
    """One frequency, by the three cases of the paper's code, in wavelengths."""
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def test_linear_scaling_worked_example():
    """Base 10000, width 4: frequencies 1 and 1/100 radians per position. Divided by 4, position 8
    gets the angles that position 2 had."""
    cos, sin = rope_tables(4, 9, 1e4, np.float64)
    slow_cos, slow_sin = rope_tables(4, 9, 1e4, np.float64, lambda f: linear_rope_scaling(f, 4.0))
    assert_same(slow_cos[8], cos[2], atol=1e-15)
    assert_same(slow_sin[8], sin[2], atol=1e-15)


def test_llama3_scaling_worked_example():
    """In a context of 2 pi * 10 tokens, frequencies 1, 0.3 and 0.05 make 10, 3 and 0.5 turns. With
    low 1 and high 5: the first stays; 3 turns are halfway, so half of it is divided by 8; the last
    is divided by 8."""
    found = llama3_rope_scaling(np.array([1, 0.3, 0.05]), 8.0, 1.0, 5.0, 2 * math.pi * 10)
    assert_same(found, [1, 0.15 + 0.15 / 8, 0.05 / 8], tolerance=1e-14)


@pytest.mark.parametrize("base", [10.0, 625.0, 5e5])
def test_llama3_scaling_equals_literal_version(base):
    frequencies = base ** -(np.arange(0, 64, 2) / 64)
    arguments = (8.0, 1.0, 4.0, 8192)
    expected = [literal_llama3(f, *arguments) for f in frequencies]
    assert_same(llama3_rope_scaling(frequencies, *arguments), expected, tolerance=1e-13)


@pytest.mark.parametrize(
    "scaling",
    [
        dict(rope_factor=4.0),
        dict(rope_factor=4.0, rope_trained_context=16, rope_low_turns=0.2, rope_high_turns=2.0),
    ],
)
def test_model_rotates_by_scaled_frequencies(scaling):
    config = Config(**vars(CONFIG) | scaling)
    init = normal_init(config, np.random.default_rng(0), np.float64)
    found = build(config, init).stack.blocks[0].attn.rope.cos[7, :4]
    frequencies = [625.0 ** (-i / 4) for i in range(4)]  # 1, 1/5, 1/25, 1/125
    if config.rope_trained_context:
        slower = [literal_llama3(f, 4.0, 0.2, 2.0, 16) for f in frequencies]
        assert slower[0] == 1 and slower[3] == frequencies[3] / 4, "a fast and a slow one"
    else:
        slower = [f / 4 for f in frequencies]
    assert_same(found, np.cos(7 * np.array(slower)), atol=1e-14)


def test_scaling_keeps_float32():
    frequency = np.ones(3, np.float32)
    assert linear_rope_scaling(frequency, 2.0).dtype == np.float32
    assert llama3_rope_scaling(frequency, 8.0, 1.0, 4.0, 8192).dtype == np.float32


def test_impossible_scaling_is_rejected():
    with pytest.raises(MinitxError, match="rope_factor must be above 0, got 0.0"):
        Config(**vars(CONFIG) | {"rope_factor": 0.0})
    with pytest.raises(MinitxError, match="0 < rope_low_turns < rope_high_turns, got 4.0 and 1.0"):
        turns = {"rope_low_turns": 4.0, "rope_high_turns": 1.0}
        Config(**vars(CONFIG) | {"rope_trained_context": 16, **turns})
