"""Parts that give some of their outputs: the same numbers as the whole result has there."""

import numpy as np
import pytest
from tiny import KINDS, tiny_lm

from minitx.errors import MinitxError
from minitx.technique import apply, blocks_of, techniques
from minitx.tree import walk

MATRICES = [
    (t.name, options)
    for t in techniques()
    if t.level in ("matrices", "weights", "pruning")
    for options in [
        {},
        *({"quantize": [{"run": run} for run in ("cast", "load", "integers")]}.get(t.name, [])),
    ]
]
MATRICES += [("lut", {"kind": kind}) for kind in ("folded", "centroid", "bit-serial")]
MATRICES += [("order_products", {"accumulator": 16}), ("separate_signs", {"bits": 8})]


def changed(name, options):
    """(kind of model, model) for every kind that the technique accepts."""
    for kind in KINDS:
        try:
            yield kind, apply(tiny_lm(kind), {name: options}).model
        except MinitxError as error:
            assert "has no option" not in str(error) and "must be one of" not in str(error), error


@pytest.mark.parametrize("name, options", MATRICES, ids=str)
def test_outputs_of_some_columns_equal_those_of_all(name, options):
    rng, seen = np.random.default_rng(3), set()
    for kind, model in changed(name, options):
        for path, node in walk(model):
            if not hasattr(node, "outputs") or (kind, type(node)) in seen:
                continue
            seen.add((kind, type(node)))
            inputs = inputs_of(node, model.config)
            x = rng.standard_normal((3, inputs)).astype(np.float32)
            whole = node(x)
            n = whole.shape[-1]
            for columns in (slice(2, 5), slice(n // 2, None), slice(None), np.array([n - 1, 0, 3])):
                found = node.outputs(x, columns)
                np.testing.assert_allclose(
                    found,
                    whole[..., columns],
                    rtol=1e-4,
                    atol=1e-4 * abs(whole).max(),
                    err_msg=f"{path}: {type(node).__name__}.outputs(x, {columns})",
                )
    assert seen, "no part of this technique gives some of its outputs"


def inputs_of(node, config) -> int:
    """How many inputs a part takes: the first size of the model that it does not refuse."""
    for size in (config.width, config.hidden, config.heads * config.head_width):
        try:
            if np.isfinite(node(np.ones((1, size), np.float32))).all():
                return size
        except (ValueError, IndexError):
            continue
    raise AssertionError(f"{type(node).__name__} takes none of the sizes of the model")


QKV_PARTS = ["fold_norms", "fuse_projections", "slim_attention", "absorb_products", "shrink"]


@pytest.mark.parametrize("name", [None, *QKV_PARTS, "q", "k", "v"])
def test_queries_alone_and_keys_and_values_alone_equal_those_of_all_three(name):
    options = {} if name in (None, *QKV_PARTS) else {"matrix": name}
    technique = name if name in (None, *QKV_PARTS) else "remove_weights"
    tried = 0
    for kind in KINDS:
        try:
            lm = apply(tiny_lm(kind, dtype=np.float64), {technique: options} if technique else {})
        except MinitxError:
            continue
        qkv = blocks_of(lm)[1].attn.qkv
        x = np.random.default_rng(1).standard_normal((5, lm.model.config.width))
        q, k, v = qkv(x)
        np.testing.assert_allclose(qkv.q(x), q, atol=1e-12, err_msg="queries alone")
        for found, expected, what in zip(qkv.kv(x), (k, v), ("keys", "values"), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=f"{what} alone")
        tried += 1
    assert tried


def test_a_table_of_the_first_layer_refuses_to_project():
    lm = apply(tiny_lm(), {"first_layer": True})
    qkv = blocks_of(lm)[0].attn.qkv
    for call in (qkv, qkv.q, qkv.kv):
        with pytest.raises(MinitxError, match="first_layer's table"):
            call(np.zeros((1, 16)))
