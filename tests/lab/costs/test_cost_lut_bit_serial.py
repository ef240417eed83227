"""``minitx cost lut-bit-serial``: one matrix of 768 x 3072, and a model."""

import json

import pytest
from test_cost_lut_product import BLOCK, CONFIG

from minitx.errors import MinitxError
from minitx.lab.costs.lut_bit_serial import lut_bit_serial


def test_matrix_by_hand():
    """Groups of 4: 192 tables of 16 entries, of which 8 are computed. Each of the 4 bits reads one
    entry a group and output: as many reads as weights."""
    work = lut_bit_serial(768, 3072, 4, 4)
    assert (work.reads, work.computed) == (768 * 3072, 192 * 8)
    assert work.additions == 768 * 3072 + 192 * 8
    assert work.multiplications == 2 * 3072
    assert work.weight_bytes == 768 * 3072 // 2 and work.table_bytes == 0


def test_model_is_the_sum_of_its_matrices(cost_of):
    found = cost_of("lut_bit_serial", CONFIG)
    assert found.work.reads == 12 * BLOCK
    assert found.work.computed == 12 * (6 * 768 + 3072) // 4 * 8
    assert "lut-bit-serial" in str(found) and "are computed for each token" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["options"] == {"bits": 4, "group": 4}
    assert cost_of("lut_bit_serial", CONFIG, "bits=1").work.reads == 3 * BLOCK


def test_bad_options_are_refused(cost_of):
    message = "^cost lut_bit_serial: group must be an integer, 1 to 8; got 9.$"
    with pytest.raises(MinitxError, match=message):
        cost_of("lut_bit_serial", CONFIG, "group=9")
