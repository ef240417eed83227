"""``minitx batch``: how unequal its prompts are, what is counted, that each way does the same."""

import json

import numpy as np
import pytest
from tiny import tiny_lm

import minitx
from minitx import technique as module
from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab import batch as lab
from minitx.lab.batch import LEVELS, BatchPlan, batches, unequal
from minitx.skip.padding_skip import multiply_adds
from minitx.technique import apply

BARE = dict(tokenizer=None)  # random ids, which are made faster than stories
PLAN = BatchPlan(size=4, longest=20, new=8, rounds=2)


def test_lengths_have_the_mean_that_is_asked_for():
    """u = 1/8, 3/8, 5/8, 7/8. At mean 1/2 lengths are 16 u, the last one 16: 2, 6, 10, 16; at 1/3
    they are 16 u^2 = 0.25, 2.25, 6.25: 1, 2, 6, 16."""
    assert unequal(4, 16, 0.5) == [2, 6, 10, 16]
    assert unequal(4, 16, 1 / 3) == [1, 2, 6, 16]
    assert unequal(3, 9, 1.0) == [9, 9, 9] and unequal(1, 9, 0.25) == [9]
    for level in LEVELS:
        assert np.mean(unequal(64, 512, level)) / 512 == pytest.approx(level, abs=0.01)


def test_multiply_adds_are_those_of_the_formula():
    """A batch of 4 prompts of up to 20 tokens, and completions of up to 8, the longest first."""
    dense = tiny_lm(**BARE)
    found = batches(dense, apply(dense, {"padding_skip": True}), "", PLAN, bar=False)
    for level, share in zip(found.levels, LEVELS):
        lengths, ends = unequal(4, 20, share), unequal(4, 8, share)[::-1]
        steps = [[(n, n) for n in lengths]]
        padded = [[(20, 20)] * 4, *([(1, 20 + t)] * 4 for t in range(1, 8))]
        for t in range(1, 8):
            steps.append([(1, n + t) for n, end in zip(lengths, ends) if t < end])
        packed, padded = ([multiply_adds(dense.model, s) for s in work] for work in (steps, padded))
        assert level.mean == sum(lengths) / 80
        assert level.prefill.multiply_adds == packed[0] / padded[0]
        assert level.decoding.multiply_adds == sum(packed[1:]) / sum(padded[1:])
    assert found.levels[-1].prefill.multiply_adds == found.levels[-1].decoding.multiply_adds == 1


def test_all_ways_run_the_same_prompts_in_turns(monkeypatch):
    """One clock for all: a way takes as many seconds as it runs steps."""
    dense, seen = tiny_lm(**BARE), []

    def counted(steps):
        n = sum(1 for _ in steps)
        seen.append(n)
        return 1.0, float(n - 1)

    monkeypatch.setattr(lab, "timed", counted)
    found = batches(dense, apply(dense, {"padding_skip": True}), "", PLAN, bar=False)
    alone = unequal(4, 8, LEVELS[0])[::-1]
    assert seen[:12] == [8, 8, *alone] * 2, "padded, packed, then one prompt after another"
    first = found.levels[0]
    assert first.prefill.one_by_one == dict(median=0.25, lowest=0.25, highest=0.25)
    assert first.decoding.one_by_one["median"] == 7 / (sum(alone) - 4)
    assert first.prefill.speed["median"] == first.decoding.speed["median"] == 1


def test_text_ends_after_the_planned_tokens_and_not_before():
    choose = lab.EndsAfter(3, (2,))
    logits = np.array([0.0, 1.0, 9.0])
    assert [choose(logits) for _ in range(4)] == [1, 1, 2, 2] and logits[2] == 9
    assert [lab.EndsAfter(1, ())(logits) for _ in range(2)] == [2, 2], "a model without end of text"


@pytest.mark.parametrize("longest, new", [(40, 9), (20, 1)])
def test_plan_that_does_not_fit_is_refused(longest, new):
    plan = BatchPlan(size=2, longest=longest, new=new, rounds=1)
    with pytest.raises(MinitxError, match=f"the context of 48; got {longest} and {new}"):
        batches(tiny_lm(), tiny_lm(), "", plan, bar=False)


def test_batch_prints_a_table_or_json(monkeypatch, capsys):
    def load(name, tokenizer=None, dtype=np.float32, **wanted):
        return module.apply(tiny_lm(**BARE), wanted)

    monkeypatch.setattr(minitx, "load", load)
    few = ["--size", "2", "--longest", "20", "--new", "4", "--rounds", "1"]
    assert main(["batch", "--padding-skip", *few]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--padding-skip: batches of 2 prompts") and "longest of 20 tokens" in out
    assert main(["batch", "--padding-skip", *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == {"size": 2, "longest": 20, "new": 4, "rounds": 1}
    assert len(found["levels"]) == len(LEVELS)
