"""What checks cost and could save, by hand from the shapes, and the warnings of techniques whose
check can never pay."""

import warnings

import pytest
from tiny import FAMILIES, tiny_lm, tiny_model

from minitx.config import Config
from minitx.errors import MinitxWarning
from minitx.ledger import counting
from minitx.lm import LM
from minitx.shared.break_even import ffn, head, skipped_layer
from minitx.technique import apply


def test_costs_of_smollm2_135m_by_hand():
    c = Config("llama", 49152, 576, 30, 9, 3, 64, 1536, 2048, rope_width=64, tied=True)
    assert ffn(c) == 3 * 576 * 1536 == 2_654_208
    assert skipped_layer(c) == 2_654_208 + 2 * 576 * 9 * 64 == 3_317_760
    assert head(c) == 49152 * 576 == 28_311_552, "8.5 layers"


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_what_the_ledger_counts(family):
    lm = tiny_lm(family)
    with counting(lm) as counts:
        lm.logits([1])
    total = counts.total
    assert total("model.head").multiply_adds == head(lm.model.config)
    block = total("model.stack.blocks.1.ffn").multiply_adds
    assert block == ffn(lm.model.config)
    for matrix in ("qkv.q", "out"):
        block += total(f"model.stack.blocks.1.attn.{matrix}").multiply_adds
    assert block == skipped_layer(lm.model.config)


@pytest.mark.parametrize(
    "never, message, pays",
    [
        # A hash: 128 / 8 = 16 projections of 8 * (2 + 2 + 2) multiply-adds, in all 768. The query's
        # own hash 768, half of its key's hash and norm (768 + 8) / 2 = 388, and 1 for each of 48
        # keys: 1,204.
        (
            {"elsa": {"bits": 128, "threshold": 0.3}},
            "takes 1,204 multiply-adds .* use bits=8 or fewer",
            {"bits": 8},
        ),
        (
            {"sparse_memory": {"index": "lsh", "tables": 8, "bits": 8}},
            "fewer tables",
            {"tables": 3},
        ),
        ({"lazy_tokens": {"keep": 0.99}}, "prunes none, but scores them", {"keep": 0.9}),
        ({"prefix_cache": {"block": 48}}, "no block is ever reused", {"block": 47}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_selection_that_can_never_pay_is_said_in_one_line(never, message, pays):
    """On a model of width 16 with 2 query heads of width 8 and a context of 48 tokens, where dense
    attention takes at most 2 * 8 * 48 = 768 multiply-adds per query head."""
    ((name, options),) = never.items()
    with pytest.warns(MinitxWarning, match=message) as said:
        apply(tiny_lm(), never)
    assert str(said[0].message).startswith(f"{name}: ") and "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(tiny_lm(), {name: options | pays})


def test_draft_as_large_as_the_target_is_said(tmp_path):
    from tiny import tiny_folder

    folder = str(tiny_folder(tmp_path / "same"))
    with pytest.warns(MinitxWarning, match="speculative: .* use a smaller draft"):
        apply(tiny_lm(), {"speculative": {"draft": folder}})
    larger = LM(tiny_model(layers=3), tiny_lm().tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(larger, {"speculative": {"draft": folder}})
        apply(tiny_lm(), {"speculative": {"draft": "self"}})
