"""Some tokens through some layers: which rows they see, and which tokens go on."""

import numpy as np
import pytest
from same import assert_same
from tiny import TOKENIZER, in_chunks, tiny_model

from minitx.lm import LM
from minitx.shared.token_subset import consecutive, last_and_best, rounded_up, rows_of
from minitx.state import Layer
from minitx.technique import apply


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [4]), (2, [1, 4]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4])]
)
def test_last_token_stays_and_ties_go_to_the_lower_index(count, expected):
    assert last_and_best(np.array([2.0, 3, 1, 3, 0]), count).tolist() == expected


@pytest.mark.parametrize(("share", "n", "expected"), [(0.7, 10, 7), (0.7, 11, 8), (0.01, 5, 1)])
def test_share_is_rounded_up_safe_from_floating_point_error(share, n, expected):
    assert rounded_up(share, n) == expected  # 0.7 * 10 is 7.000000000000001


def test_rows_of_positions_are_found_in_any_order_of_rows():
    """Rows 0, 1, 2 hold positions 0, 4, 2; tokens 5 and 6 are stored next, in rows 3 and 4."""
    layer = Layer(8)
    layer.count, layer.row_positions = 3, np.array([0, 4, 2])
    tokens = consecutive(np.array([5, 6]))
    assert rows_of(np.array([0, 2, 5, 6]), tokens, layer).tolist() == [0, 2, 3, 4]
    layer.row_positions = np.array([0, 2, 4])
    assert rows_of(np.array([0, 2, 4, 5, 6]), tokens, layer) is None, "all rows, in order"


def test_layer_without_attention_leaves_the_rows_of_the_next_alone():
    """Layer 2, the first of those after a pruning, has no attention, so it stores no rows; layer 3
    has one for each token. With all tokens kept, nothing but layer_skip changes the result."""
    lm = LM(tiny_model("llama", dtype=np.float64, layers=4), TOKENIZER)
    drop = {"layer_skip": {"unit": "attention", "drop": "2"}}
    both = apply(lm, drop | {"lazy_tokens": {"keep": 1.0, "first": 2, "every": 0.5}})
    ids, sizes = np.arange(20) * 7 % 258, (12, *[1] * 8)
    assert_same(
        in_chunks(both, ids, sizes), in_chunks(apply(lm, drop), ids, sizes), tolerance=1e-12
    )
