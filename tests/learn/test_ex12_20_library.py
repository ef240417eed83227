"""Exercises 12 to 15, 19 and 20: in a tiny model, the solution computes in float64 what the library
computes, and skips as much."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from same import assert_same
from tiny import TOKENIZER, tiny_model

from minitx.learn import (
    ex12_early_exit,
    ex13_ffn_skipping,
    ex14_sign_hashes,
    ex15_greedy_search,
    ex19_head_importance,
    ex20_lazy_tokens,
)
from minitx.lm import LM
from minitx.model import Attend
from minitx.precompute.head_prune import importance
from minitx.shared.sparse_attention import SparseAttention
from minitx.skip.a3 import greedy_search
from minitx.skip.a3.sorted_columns import Columns
from minitx.skip.lazy_tokens import pruning_layers
from minitx.technique import apply, swap

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


def test_sign_hashes_in_a_model_equal_the_library():
    A, bias = ex14_sign_hashes.library_projection(TINY.model.config.head_width, bits=6)
    selector = ex14_sign_hashes.StudentSelector(ex14_sign_hashes.select, bias, 0.3, A)
    ours = swap(TINY.model, Attend, lambda dense: SparseAttention(selector, dense.scale))
    check_steps(ours, {"elsa": {"threshold": 0.3, "bits": 6}}, "logits with sign hashes")


def test_greedy_search_in_a_model_equals_the_library():
    selector = ex15_greedy_search.StudentSelector(ex15_greedy_search.greedy, 0.75)
    ours = swap(TINY.model, Attend, lambda dense: SparseAttention(selector, dense.scale))
    wanted = {"a3": {"iterations": 0.75, "threshold": 0.0}}
    check_steps(ours, wanted, "logits with the greedy search")


def test_greedy_sums_equal_the_library():
    rng = np.random.default_rng(0)
    for M in (1, 4, 9):
        q, keys = rng.standard_normal(4), rng.standard_normal((7, 4))
        order = keys.argsort(0)
        columns = Columns(np.take_along_axis(keys, order, 0).T, order.T)
        expected = greedy_search(q.tolist(), columns, M, len(keys))
        assert_same(ex15_greedy_search.greedy(q, keys, M)[0], expected, "sums", tolerance=1e-12)


def test_head_importance_equals_the_library():
    texts = [IDS.tolist(), IDS[5:].tolist()]
    answer = SimpleNamespace(importance=ex19_head_importance.importance)
    found = ex19_head_importance.scores_of(TINY, answer, texts)
    expected = importance(TINY, [np.ones(2, bool)] * 5, texts)
    assert_same(found, expected, "importances", axes=("layer", "head"), tolerance=1e-10)


def test_lazy_tokens_in_a_model_equal_the_library():
    setting = dict(keep=0.6, every=0.4, first=1)
    ours = ex20_lazy_tokens.lazy(TINY, ex20_lazy_tokens.step, 0.6, pruning_layers(5, 0.4, 1)).model
    check_steps(ours, {"lazy_tokens": setting}, "logits with pruned and revived tokens")
