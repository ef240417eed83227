"""Where large matrices lie: the same numbers, by columns in one block; and who sees to it."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import KINDS, tiny_folder, tiny_lm, tiny_model

import minitx
from minitx import fast
from minitx import technique as module
from minitx.checkpoints.huggingface import write_model
from minitx.lab import bench
from minitx.lm import LM
from minitx.memory_layout import LARGE_PAGE, LINE, large_matrices, to_column_major, to_row_major
from minitx.technique import apply
from minitx.tree import map_weights, nbytes, weights

SMALL = 16 * 16  # numbers in the matrices of tiny models for queries and outputs


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """In tiny models too, some matrices are large and some are not."""
    monkeypatch.setattr(fast, "LARGE", SMALL)


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", KINDS)
def test_large_matrices_are_column_major_in_one_block(family, dtype):
    model = tiny_model(family, dtype=dtype)
    found = to_column_major(model)
    before, after = large_matrices(model), large_matrices(found)
    assert len(before) == len(after) >= 2 * model.config.layers
    free = None
    for old, new in zip(before.values(), after.values()):
        assert np.array_equal(old, new) and new.dtype == dtype
        assert new.flags.f_contiguous and not new.flags.c_contiguous
        assert address(new) % LINE == 0
        assert free is None or free <= address(new) < free + LINE
        free = address(new) + new.nbytes
    assert address(next(iter(after.values()))) % LARGE_PAGE == 0
    assert nbytes(found) == nbytes(model) and str(found) == str(model)


def test_other_arrays_are_unchanged():
    model = tiny_model()
    old, new = weights(model), weights(to_column_major(model))
    assert list(old) == list(new)
    for path, w in new.items():
        moved = path.endswith("w") and not path.startswith("embed") and w.size > SMALL
        assert (w is old[path]) != moved, path


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("family", KINDS)
def test_layout_does_not_change_logits(family, rows):
    model = tiny_model(family, dtype=np.float64)
    ids = np.random.default_rng(rows).integers(0, 258, (2, rows))
    for batch in (ids, ids[0]):
        expected, found = model(batch), to_column_major(model)(batch)
        assert np.allclose(found, expected, rtol=1e-12, atol=1e-13 * abs(expected).max())


def test_column_major_and_back_to_row_major():
    model = tiny_model()
    found = to_column_major(model)
    assert to_column_major(found) is found and to_row_major(model) is model
    back = to_row_major(found)
    for path, w in weights(back).items():
        assert w.flags.c_contiguous and np.array_equal(w, weights(model)[path])


def test_shared_matrices_stay_shared():
    model = tiny_model()
    first, second = model.stack.blocks
    second = replace(second, ffn=first.ffn, attn=replace(second.attn, out=replace(first.attn.out)))
    twice = replace(model, stack=replace(model.stack, blocks=(first, second)))
    first, second = to_column_major(twice).stack.blocks
    assert first.ffn is second.ffn and first.ffn is not twice.stack.blocks[0].ffn
    assert first.attn.out.w is second.attn.out.w


def test_model_without_large_matrices_is_returned_unchanged(monkeypatch):
    monkeypatch.setattr(fast, "LARGE", 10**6)
    model = tiny_model()
    assert to_column_major(model) is model and to_row_major(model) is model


# Who sees to it ----------------------------------------------------------------------------------


def lies_by_columns(lm) -> bool:
    found = large_matrices(lm)
    assert found
    return all(w.flags.f_contiguous for w in found.values())


def test_loaded_models_are_column_major(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    assert lies_by_columns(minitx.load(folder))
    assert lies_by_columns(minitx.load(folder, fold_norms=True))
    assert not lies_by_columns(tiny_lm())


def test_techniques_get_row_major_and_result_is_column_major(monkeypatch):
    seen = []

    def look(lm):
        seen.append(all(w.flags.c_contiguous for w in large_matrices(lm).values()))
        return map_weights(lm, np.array)  # new arrays in the order of the old ones

    t = module.find("fold_norms")
    monkeypatch.setitem(module.REGISTRY, "fold_norms", replace(t, function=look))
    placed = to_column_major(tiny_lm())
    for lm in (placed, tiny_lm()):
        assert lies_by_columns(apply(lm, {"fold_norms": True}))
    assert seen == [True, True]
    assert lies_by_columns(apply(tiny_lm(), {}))


def test_written_files_do_not_depend_on_layout(tmp_path):
    rows, columns = tmp_path / "rows", tmp_path / "columns"
    write_model(tiny_model(), rows, "F32")
    write_model(to_column_major(tiny_model()), columns, "F32")
    written = [(folder / "model.safetensors").read_bytes() for folder in (rows, columns)]
    assert written[0] == written[1]


def test_bench_uses_the_layout_of_loaded_models(monkeypatch):
    placed = []
    monkeypatch.setattr(
        bench, "LM", lambda model: placed.append(lies_by_columns(model)) or LM(model)
    )
    config = tiny_model().config
    bench.measure(
        config, bench.Repeats(decode=2, prefill=3, rounds=1, least=0.0), None, lambda: None
    )
    assert placed == [True]
