"""perforate_positions: where the FFN runs, what the others get, what it saves and costs."""

import literal_perforate_positions as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, in_chunks, tiny_lm

import minitx
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.shared.random_baseline import random_scores
from minitx.skip.perforate_positions import (
    CopiedPositions,
    SkippedPositions,
    as_many_at_random,
)
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses
from minitx.tree import Part, part

RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 258, 40)
KINDS = {"none": SkippedPositions, "copy": CopiedPositions}


@part
class Tenfold(Part):
    """Stands for an FFN."""

    def __call__(self, x, layer):
        assert len(x) == len(layer.tokens), "the FFN gets other tokens than it is told"
        return 10 * x


def run(x, stride, fill, steps=None):
    """The outputs (T, D), in one step or several."""
    perforated = KINDS[fill](Tenfold(), np.arange(len(x)) % stride == 0)
    layer, out, at = Layer(len(x)), [], 0
    for size in steps or (len(x),):
        out.append(perforated(x[at : at + size], layer.take(size)))
        at += size
    return np.concatenate(out)


def test_worked_example_by_hand():
    """Five tokens 1 2 3 4 5, FFN(x) = 10 x, stride=2: it runs for 1, 3 and 5."""
    x = np.array([[1.0], [2], [3], [4], [5]])
    for fill, expected in (("none", [10, 0, 30, 0, 50]), ("copy", [10, 10, 30, 30, 50])):
        assert run(x, 2, fill)[:, 0].tolist() == expected, fill
        by_hand = literal.ffn_outputs(x.tolist(), lambda x: [10 * x[0]], 2, fill)
        assert [row[0] for row in by_hand] == expected, fill


@pytest.mark.parametrize("fill", KINDS)
@pytest.mark.parametrize("steps", [(14,), (6, 1, 1, 6), (1,) * 14])
def test_equals_the_literal_version(fill, steps):
    x = RNG.standard_normal((14, 3))
    for stride in (2, 3, 20):
        expected = literal.ffn_outputs(
            x.tolist(), lambda x: [10 * value for value in x], stride, fill
        )
        found = run(x, stride, fill, steps)
        assert_same(found, expected, f"stride={stride}", tolerance=1e-7)


def test_rewind_copies_what_came_before():
    """stride=4: position 6 gets the output of 4; after rewind(4), that of a new token there."""
    perforated = CopiedPositions(Tenfold(), np.arange(9) % 4 == 0)
    layer = Layer(9)
    perforated(np.arange(9.0)[:, None], layer.take(9))
    layer.count = 9
    layer.rewind(7)
    assert perforated(np.array([[70.0]]), layer.take(1)).item() == 40
    layer.rewind(4)
    assert perforated(np.array([[5.0], [6.0]]), layer.take(2)).ravel().tolist() == [50, 50]
    layer.rewind(3)
    assert perforated(np.array([[70.0]]), layer.take(1)).item() == 0, "the output of position 0"


def test_first_token_runs_with_copy_and_again_after_a_rewind():
    perforated, layer = CopiedPositions(Tenfold(), np.zeros(4, bool)), Layer(4)
    assert perforated(np.array([[1.0], [2.0]]), layer.take(2)).ravel().tolist() == [10, 10]
    layer.rewind(0)
    assert perforated(np.array([[3.0], [4.0]]), layer.take(2)).ravel().tolist() == [30, 30]


def test_random_positions_are_as_many():
    drawn = as_many_at_random(random_scores(3, 41, 0), 4)
    assert drawn.shape == (3, 41) and (drawn[:, :40].reshape(3, 10, 4).sum(-1) == 1).all()
    assert len({row.tobytes() for row in drawn}) == 3, "each layer has its own"


@pytest.mark.parametrize("options", [{}, {"fill": "copy"}, {"choose": "random", "fill": "copy"}])
def test_batches_equal_their_rows(options):
    options = {"stride": 3, "first": 0} | options
    lm = apply(tiny_lm(dtype=np.float64), {"perforate_positions": options})
    rows = np.stack([IDS[:20], IDS[20:]])
    check_close(lm.logits(rows), np.stack([lm.logits(row) for row in rows]), 1e-12, "a batch")
    check_close(in_chunks(lm, IDS, (20, 1, 1, 18)), lm.logits(IDS), 1e-12, "in chunks")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fill", KINDS)
def test_counted_work_equals_the_formula_on_the_card(family, fill):
    """40 tokens at stride=4, in the second of two layers: 30 FFNs do not run."""
    dense = tiny_lm(family)
    lm = apply(dense, {"perforate_positions": {"stride": 4, "fill": fill}})
    work = []
    for model in (dense, lm):
        with counting(model) as counts:
            in_chunks(model, IDS, (12, *[1] * 28))
        work.append(counts.total().multiply_adds)
    c = dense.model.config
    matrices = 3 if family == "llama" else 2
    assert work[0] - work[1] == 30 * matrices * c.width * c.hidden
    assert counts.events == {"FFN positions": 40, "FFN positions run": 10}


def test_neutral_setting_is_the_dense_model_and_bad_ones_are_refused():
    lm = tiny_lm()
    assert repr(apply(lm, {"perforate_positions": {"stride": 1}}).model) == repr(lm.model)
    with pytest.raises(MinitxError, match="first must be at most 2, the number of layers; got 3"):
        apply(lm, {"perforate_positions": {"first": 3}})
    with pytest.raises(MinitxError, match="perforate_positions needs residual connections"):
        apply(tiny_lm("skipless"), {"perforate_positions": {}})


def test_on_stories_copies_are_worse_than_nothing():
    dense = minitx.load("stories")
    texts = [text.ids for text in encode(dense.tokenizer, held_out(dense, 2))]

    def loss(options):
        lm = apply(dense, {"perforate_positions": options}) if options else dense
        losses = [token_losses(lm.logits(ids[:-1]), np.array(ids[1:])) for ids in texts]
        return float(np.concatenate(losses).mean())

    dense_loss = loss(None)
    none, copy = loss({"stride": 2}) - dense_loss, loss({"fill": "copy"}) - dense_loss
    assert -0.02 < none < 0.02 and copy > none + 0.02, f"none {none:+.3f}, copy {copy:+.3f}"


def test_step_without_tokens_changes_nothing():
    lm = apply(tiny_lm(), {"perforate_positions": {"fill": "copy", "first": 0}})
    state = lm.model.new_state()
    assert lm.model(IDS[:0], state).shape[0] == 0
    assert_same(lm.model(IDS, state), lm.logits(IDS))
