"""Exercises 12 to 15, 19 and 20: in a tiny model, the solution computes in float64 what the library
computes, and skips as much."""

from dataclasses import replace

import numpy as np
from same import assert_same
from tiny import TOKENIZER, tiny_model

from minitx.learn import ex12_early_exit, ex13_ffn_skipping
from minitx.lm import LM
from minitx.technique import apply

IDS = np.array([84, 104, 101, 32, 99, 97, 116, 32, 115, 97, 116, 46])
TINY = LM(tokenizer=TOKENIZER, model=tiny_model("llama", dtype=np.float64, layers=5))


def check_steps(ours, techniques: dict, what: str) -> None:
    """A prompt and single tokens: the same logits from our model as from the library's, and the
    technique did skip something."""
    (name,) = techniques
    theirs = apply(TINY, techniques).model
    dense = logits_of_steps(TINY.model)
    expected = logits_of_steps(theirs)
    assert abs(expected - dense).max() > 1e-6, f"{name} changes nothing at this setting"
    assert_same(logits_of_steps(ours), expected, what, tolerance=1e-10)


def logits_of_steps(model):
    """The logits (9, V) after the first four tokens, and after each later one."""
    state = model.new_state()
    return np.array([model.next_logits(ids, state) for ids in (IDS[:4], *IDS[4:, None])])


def test_early_exit_in_a_model_equals_the_library():
    stack = ex12_early_exit.StudentStack(TINY.model.stack, ex12_early_exit.run, 2, 0.9)
    ours = replace(TINY.model, stack=stack)
    wanted = {"early_exit": {"measure": "saturation", "threshold": 0.9, "first": 2}}
    check_steps(ours, wanted, "logits with early exit")


def test_ffn_skipping_in_a_model_equals_the_library():
    setting = dict(threshold=0.7, skip=1, cold_start=1, cold_end=5)
    stack = ex13_ffn_skipping.StudentStack(TINY.model.stack, ex13_ffn_skipping.skip_ffns, **setting)
    ours = replace(TINY.model, stack=stack)
    check_steps(ours, {"ffn_skip": {**setting, "warm_up": 0}}, "logits with FFN skipping")
