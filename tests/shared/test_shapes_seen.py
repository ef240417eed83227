"""What reaches attention and the cache, whatever has been done to the projections before."""

import pytest
from tiny import tiny_lm

from minitx.shared.shapes_seen import Shape, cached_widths, score_shapes
from minitx.technique import NoSuchPart, apply


@pytest.mark.parametrize(
    "family, options, shape, widths",
    [  # width 16, heads of width 8: 2 for queries; 1 (llama) or 2 for keys
        ("llama", {}, Shape(2, 1, 8), {8}),
        ("gpt2", {"prune_structure": {"heads": 0.5, "score": "weights"}}, Shape(1, 1, 8), {8}),
        ("gpt2", {"absorb_products": {"pairs": "qk"}}, Shape(2, 2, 16), {16}),  # 16 = K d, too
        ("gpt2", {"absorb_products": {"pairs": "both"}}, Shape(2, 1, 16), {16, 0}),
        ("llama", {"absorb_products": {"pairs": "ov"}}, Shape(2, 1, 8), {8, 16}),
    ],
)
def test_shapes_are_those_that_arrive(family, options, shape, widths):
    model = apply(tiny_lm(family), options).model
    assert list(score_shapes(model).values()) == [shape] * 2 and cached_widths(model) == widths


def test_model_without_the_part_is_refused():
    replaced = apply(tiny_lm(), {"quantize_cache": True, "elsa": {"threshold": 0.0}}).model
    for look in (score_shapes, cached_widths):
        with pytest.raises(NoSuchPart):
            look(replaced)
