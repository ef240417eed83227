"""lut_centroid: the whole error is that of replacing inputs by centroids; k-means finds them."""

import literal_lut_centroid as literal
import numpy as np
import pytest
from same import assert_same
from tiny import tiny_lm

from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.lm import LM
from minitx.precompute.lut_centroid import CentroidLinear, Codebook, EveryRow, kmeans
from minitx.technique import apply
from minitx.tree import walk

RNG = np.random.default_rng(3)


def test_worked_example_by_hand():
    """One segment, three centroids of two numbers. x = .8 .3 is nearest to 1 0, whose product with
    W is the first row of W: y = 2 1. The dense product is .8 * (2 1) + .3 * (1 -3) = 1.9 -.1."""
    centroids = np.array([[[1.0, 0], [0, 1], [-1, -1]]])
    codebook = Codebook(centroids, (centroids**2).sum(-1) / 2)
    w, x = np.array([[2.0, 1], [1, -3]]), np.array([[0.8, 0.3]])
    part = CentroidLinear.of(codebook, w, None)
    assert_same(part.tables, [[[2, 1], [1, -3], [-3, 2]]])
    assert_same(codebook(x), [[0]])
    assert_same(part(x), [[2, 1]])
    assert_same(x @ w, [[1.9, -0.1]], tolerance=1e-7)
    assert literal.lut_centroid([0.8, 0.3], w.tolist(), centroids.tolist()) == ([2, 1], [0])
    tie = codebook(np.array([[0.5, 0.5]]))
    assert_same(tie, [[0]], "ties go to the lower index")


def test_lut_centroid_equals_the_literal_version():
    rows, w = RNG.normal(size=(50, 7)), RNG.normal(size=(7, 4))
    part = CentroidLinear.of(Codebook.of(rows, 4, 3, 0), w, None)
    for x in rows[:10]:
        y, codes = literal.lut_centroid(x.tolist(), w.tolist(), part.codebook.centroids.tolist())
        assert_same(part.codebook(x[None])[0], codes, "codes")
        assert_same(part(x), y, "outputs", atol=1e-12)


def test_the_whole_error_is_that_of_the_reconstruction():
    """80 inputs, two segments of 3: smaller errors with more centroids, none with one for each."""
    x, w = RNG.normal(size=(80, 6)), RNG.normal(size=(6, 5))
    errors = []
    for centroids in (2, 8, 32, 80):
        codebook = Codebook.of(x, centroids, 3, 0)
        y = CentroidLinear.of(codebook, w, None)(x)
        assert_same(y, codebook.reconstruct(x) @ w, atol=1e-12)
        errors.append(((y - x @ w) ** 2).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 4 and errors[3] < 1e-20


def test_kmeans_finds_clusters_and_is_deterministic():
    centers = np.array([[[0.0, 0], [9, 0], [0, 9]], [[5, 5], [-5, 5], [5, -5]]])
    points = centers[:, RNG.integers(0, 3, 60)] + RNG.normal(0, 0.1, (2, 60, 2))
    found = kmeans(points, 3, 0)
    assert found.shape == (2, 3, 2)
    assert_same(found, kmeans(points, 3, 0))
    for segment, expected in zip(found, centers):
        distance = abs(segment[:, None] - expected).max(-1)
        assert (distance.min(0) < 0.2).all(), "a cluster has no centroid"


def test_kmeans_of_few_different_points_finds_each_of_them():
    points = np.repeat(RNG.normal(size=(2, 5, 3)), 7, axis=1)
    found = kmeans(points, 8, 1)
    for segment, given in zip(found, points):
        assert abs(segment[None] - given[:, None]).max(-1).min(1).max() < 1e-15


def test_queries_keys_and_values_share_their_centroids():
    lm = apply(tiny_lm(dtype=np.float64), {"lut_centroid": dict(stories=2, layers=None)})
    for block in lm.model.stack.blocks:
        q, k, v, out = block.attn.qkv.q, block.attn.qkv.k, block.attn.qkv.v, block.attn.out
        assert q.codebook is k.codebook is v.codebook is not out.codebook
        assert block.ffn.expand.gate.codebook is block.ffn.expand.up.codebook
    options = dict(stories=2, layers=None)
    fused = apply(tiny_lm(), {"lut_centroid": options, "fuse_projections": True})
    assert len({id(node) for _, node in walk(fused) if type(node) is CentroidLinear}) == 8


def test_logits_error_falls_with_more_centroids():
    dense = tiny_lm(dtype=np.float64)
    ids = dense.tokenizer.encode("The cat saw Once.")

    def error(centroids):
        options = dict(centroids=centroids, length=2, stories=2)
        return abs(apply(dense, {"lut_centroid": options}).logits(ids) - dense.logits(ids)).mean()

    assert error(64) < error(2) / 2


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(length=0), "length must be an integer, 1 to 4096; got 0"),
        (dict(centroids=0), "centroids must be an integer, 1 to 1024; got 0"),
        (dict(stories=0), "stories must be an integer, 1 to 1000; got 0"),
        (dict(layers=3), "layers must be at most 2, the blocks of this model; got 3"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(MinitxError, match=f"^lut_centroid: {words}"):
        apply(tiny_lm(), {"lut_centroid": options})


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(MinitxError, match="^lut_centroid .*no tokenizer"):
        apply(LM(tiny_lm().model), {"lut_centroid": True})


def test_sampled_inputs_are_every_nth_row_across_texts():
    """Texts of 5, 2 and 6 rows, of which only every third is kept: never all of a long text."""
    rows = np.arange(26).reshape(13, 2)
    sample = EveryRow(3)
    for a, b in ((0, 5), (5, 7), (7, 13)):
        sample.add(rows[a:b])
    assert_same(sample.all, rows[::3])


def test_head_learns_from_the_normalized_hidden_states():
    """One story has 48 tokens here: with 64 centroids each of its segments is its own centroid."""
    lm = tiny_lm()
    changed = apply(lm, {"lut_centroid": dict(layers=0, head=True, centroids=64, stories=1)})
    (ids,) = calibration_ids("test", lm, 1)
    assert_same(changed.logits(ids), lm.logits(ids), tolerance=1e-4, atol=1e-4)
