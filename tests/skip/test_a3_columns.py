"""The sorted columns behind a3: inserted, merged, cut back and sorted anew are all the same."""

import numpy as np
import pytest

from minitx.ledger import counting
from minitx.skip.a3.sorted_columns import SortedColumns, merge, remembered, sort
from minitx.state import Layer
from minitx.tree import Part, part


@part
class Owner(Part):
    """Whose columns they are."""


def drawn(seed, lead=(2,), n=40, d=5, step=None):
    k = np.random.default_rng(seed).standard_normal((*lead, n, d)).astype(np.float32)
    return np.round(k / step) * np.float32(step) if step else k


def same(found, k):
    """Against sorting each column by itself, number by number: of equals the earlier key first."""
    *lead, n, d = k.shape
    assert found.values.shape == found.rows.shape == (*lead, d, n)
    assert found.values.dtype == k.dtype and found.rows.dtype == np.int32
    for head in np.ndindex(*lead):
        for j in range(d):
            expected = sorted((float(x), row) for row, x in enumerate(k[head][:, j]))
            assert list(zip(found.values[head][j].tolist(), found.rows[head][j])) == expected


@pytest.mark.parametrize("lead", [(2,), (3, 1)])
@pytest.mark.parametrize("step", [None, 0.5])  # few, or many equal numbers
def test_inserting_is_sorting_anew_on_every_prefix(lead, step):
    k = drawn(1, lead, step=step)
    columns = SortedColumns(40)
    for n in range(1, 41):
        same(columns.extend(k[..., :n, :]), k[..., :n, :])


@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("sizes", [(40,), (1, 39), (7, 1, 1, 20, 11)])
def test_merging_is_sorting_anew(sizes, step):
    k, columns, n = drawn(2, step=step), SortedColumns(40), 0
    for size in sizes:
        n += size
        same(columns.extend(k[..., :n, :]), k[..., :n, :])
    same(columns.extend(k[..., :n, :]), k)  # nothing new
    same(merge(sort(k[:, :15]), sort(k[:, 15:], 15)), k)


def test_rewinding_takes_keys_out():
    k, columns = drawn(3, step=0.5), SortedColumns(40)
    columns.extend(k)
    for position in (40, 33, 32, 5):
        columns.rewind(position)
        same(columns.now(), k[:, :position])
    same(columns.extend(-k[:, :6]), np.concatenate([k[:, :5], -k[:, 5:6]], 1))
    columns.rewind(0)
    assert columns.now().rows.shape == (2, 5, 0)
    same(columns.extend(k[:, :1]), k[:, :1])
    same(columns.extend(k), k)


def test_those_before_an_end():
    k = drawn(4, step=0.5)
    for end in (1, 17, 39, 40, 50):
        same(sort(k).until(end), k[:, :end])


def test_what_a_layer_remembers():
    k, layer, owner = drawn(5), Layer(40), Owner()
    assert remembered(owner, k[:, :0], layer) is None
    same(remembered(owner, k[:, :9], layer), k[:, :9])
    layer.memory.rewind(4)
    same(remembered(owner, k, layer), k)
    passing = Layer(40, remember=False)
    same(remembered(owner, k, passing), k)
    assert not passing.memory.kept and remembered(owner, k[:, :0], passing) is None


def test_moves_are_counted():
    k = np.array([[[2.0, 1], [4, 3], [6, 5], [3, 0]]])
    columns = SortedColumns(4)
    with counting(Owner()) as counts:
        columns.extend(k[:, :3])
    assert counts.events == {"sorted numbers moved": 6}
    with counting(Owner()) as counts:
        columns.extend(k)  # before 4 and 6; before 1, 3 and 5; and itself
    assert counts.events == {"sorted numbers moved": 5 + 2}
