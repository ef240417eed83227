"""What techniques with the option ``prompts`` share: see minitx/shared/gathered_rows.py."""

import numpy as np
from tiny import tiny_lm

from minitx.ledger import Entry, counting
from minitx.technique import apply

IDS = np.random.default_rng(7).integers(0, 258, 40)


def check_own_rows(name: str, options: dict) -> None:
    """prompts=skip gives the same results as prompts=union, and a prompt costs what its tokens cost
    one by one, which is less."""
    together, each = (
        apply(tiny_lm("llama"), {name: options | {"prompts": prompts}})
        for prompts in ("union", "skip")
    )
    with counting(each) as at_once:
        logits = each.logits(IDS)
    np.testing.assert_allclose(logits, together.logits(IDS), atol=1e-4, err_msg="other results")
    state, one_by_one = each.model.new_state(), Entry()
    for token in IDS:
        with counting(each) as counts:
            each.model([token], state)
        one_by_one += sum_of_ffns(counts)
    assert sum_of_ffns(at_once) == one_by_one, "tokens that run at once share rows"
    with counting(together) as union:
        together.logits(IDS)
    assert sum_of_ffns(union).multiply_adds > 1.3 * one_by_one.multiply_adds


def sum_of_ffns(counts) -> Entry:
    return counts.by_group()["blocks.ffn"]
