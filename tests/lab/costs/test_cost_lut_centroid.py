"""``minitx cost lut-centroid``: one matrix of 768 x 3072, and a model."""

import json

import pytest
from test_cost_lut_product import BLOCK, CONFIG

from minitx.errors import MinitxError
from minitx.lab.costs.lut_centroid import lut_centroid


def test_matrix_by_hand():
    """24 segments of 32. 768 * 16 multiplications for the distances; 24 * 3,072 reads; a table
    of 24 * 16 * 3,072 bytes beside 768 * 16 centroid numbers of 4 bytes."""
    work = lut_centroid(768, 3072, 16, 32, 1)
    assert (work.multiplications, work.additions, work.reads) == (12_288, 73_728, 73_728)
    assert work.table_bytes - 4 * 768 * 16 == 1.125 * 2**20
    assert work.weight_bytes == 0, "the weights are in the tables"


def test_model_is_the_sum_of_its_matrices(cost_of):
    found = cost_of("lut_centroid", CONFIG)
    inputs = 6 * 768 + 3072  # of the seven matrices of a block
    assert found.work.multiplications == 12 * inputs * 16
    assert found.work.reads == 12 * BLOCK // 32
    assert "lut-centroid" in str(found) and "share their centroids" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["technique"] == "lut_centroid"


def test_bad_options_are_refused(cost_of):
    message = "^cost lut_centroid: centroids must be an integer, 1 to 65536; got 0.$"
    with pytest.raises(MinitxError, match=message):
        cost_of("lut_centroid", CONFIG, "centroids=0")
