"""Hops: the bridge entities of answers as ids, and the loss that supervises them."""

from itertools import islice

import numpy as np
import pytest
from test_training import FIRST, MODEL, recipe_of

from minitx.build import random_model
from minitx.training.autograd import gradients
from minitx.training.data import MAX_BRIDGES, NO_BRIDGE, StoryDataset, StoryEncoder, story_tokenizer
from minitx.training.layerskip import shallow
from minitx.training.loss import cross_entropy
from minitx.training.recipe import recipe_from
from minitx.training.stories import stories
from minitx.training.worker import batch_loss

TOKENIZER = story_tokenizer()


def test_bridges_are_at_the_position_of_the_answer():
    encoder, seen = StoryEncoder(TOKENIZER), set()
    for story in islice(stories("train", "full", 1), 60):
        ids, kinds, bridges = encoder.story(story)
        found = [
            (
                TOKENIZER.decode([i]).strip(),
                [TOKENIZER.decode([j]).strip() for j in v if j != NO_BRIDGE],
            )
            for i, kind, v in zip(ids, kinds, bridges)
            if kind
        ]
        assert found == [(a.value, list(a.bridges)) for a in story.answers]
        assert all(v == [NO_BRIDGE] * MAX_BRIDGES for v, kind in zip(bridges, kinds) if not kind)
        seen |= {len(bridges) for _, bridges in found}
    assert seen == {0, 1, 2}


def test_bridges_are_in_training_batches():
    rows = StoryDataset(TOKENIZER, {"three_hops": 1}, 150, seed=2)
    batch = rows.batch(0, 0, 16)
    ids, kinds, bridges = rows.row(0, 2)
    np.testing.assert_array_equal(batch.bridges[2], bridges)
    assert (
        batch.bridges.shape == (16, 150, MAX_BRIDGES)
        and (batch.bridges != NO_BRIDGE).any(-1).sum() > 4
    )
    assert ((batch.bridges != NO_BRIDGE).any(-1) <= (batch.kinds > 0)).all()


@pytest.mark.parametrize("early", [None, {"scale": 0.2, "rotation": 1}])
def test_hops_loss_is_added(early):
    """The loss without hops, plus that of the bridge entities at the logits after so many
    blocks."""
    plain = FIRST | {"grades": {"three_hops": 1}, "row": 150, "answer_weight": 3}
    stages = [plain | {"early_exit": early}, plain | {"early_exit": early, "hops": [1, 2]}]
    recipe = recipe_from(recipe_of(*stages, model=MODEL | {"context": 160}))
    config = recipe.config(len(TOKENIZER), TOKENIZER.eos)
    model = random_model(config, 3, np.float64)
    batch = StoryDataset(TOKENIZER, recipe.shares(recipe.stages[1]), 150, 1, answer_weight=3).batch(
        0, 0, 9
    )

    def loss(stage):
        return gradients(model, lambda m: batch_loss(m, batch, stage, 0, range(9), 0))[0]

    ids, more = batch.ids[:, :-1], 0
    for i, layers in enumerate((1, 2)):
        logits, bridges = shallow(model, layers)(ids), batch.bridges[..., i]
        more += cross_entropy(
            logits[bridges != NO_BRIDGE],
            bridges[bridges != NO_BRIDGE],
            np.full((bridges != NO_BRIDGE).sum(), 3),
        )
    without, with_hops = map(loss, recipe.stages)
    assert more > 0 and with_hops - without == pytest.approx(more, rel=1e-9)
