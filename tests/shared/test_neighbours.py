"""A group of neighbouring layers that would begin too late is refused."""

import pytest

from minitx.errors import MinitxError
from minitx.shared.neighbours import check_first


def test_group_that_ends_with_the_last_layer_is_accepted():
    check_first("x", 5, 3, 8)  # layers 5, 6, 7 of 0 .. 7


def test_group_that_ends_after_the_last_layer_is_refused():
    with pytest.raises(MinitxError, match="^x: first is 6; expected at most 5, since 3 of the 8"):
        check_first("x", 6, 3, 8)
