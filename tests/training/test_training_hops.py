"""Hops: the links of the facts behind an answer, as ids, and the loss that teaches them."""

from itertools import islice

import numpy as np
import pytest
from test_training import FIRST, MODEL, recipe_of

from minitx.build import random_model
from minitx.training.data import LINKS, NONE, Encoder, Rows, story_tokenizer
from minitx.training.grad import gradients
from minitx.training.layerskip import shallow
from minitx.training.loss import cross_entropy
from minitx.training.recipe import recipe_from
from minitx.training.stories import stories
from minitx.training.worker import batch_loss

TOKENIZER = story_tokenizer()


def test_the_links_stand_where_the_answer_does():
    encoder, seen = Encoder(TOKENIZER), set()
    for story in islice(stories("train", "full", 1), 60):
        ids, kinds, via = encoder.story(story)
        found = [
            (TOKENIZER.decode([i]).strip(), [TOKENIZER.decode([j]).strip() for j in v if j != NONE])
            for i, kind, v in zip(ids, kinds, via)
            if kind
        ]
        assert found == [(a.value, list(a.via)) for a in story.answers]
        assert all(v == [NONE] * LINKS for v, kind in zip(via, kinds) if not kind)
        seen |= {len(links) for _, links in found}
    assert seen == {0, 1, 2}


def test_rows_have_them_too():
    rows = Rows(TOKENIZER, {"three_hops": 1}, 150, seed=2)
    batch = rows.batch(0, 0, 16)
    ids, kinds, via = rows.row(0, 2)
    np.testing.assert_array_equal(batch.via[2], via)
    assert batch.via.shape == (16, 150, LINKS) and (batch.via != NONE).any(-1).sum() > 4
    assert ((batch.via != NONE).any(-1) <= (batch.kinds > 0)).all()


@pytest.mark.parametrize("early", [None, {"scale": 0.2, "rotation": 1}])
def test_the_loss_of_hops(early):
    """The loss without them, and that of the links at the logits after so many blocks."""
    plain = FIRST | {"grades": {"three_hops": 1}, "row": 150, "answer_weight": 3}
    stages = [plain | {"early_exit": early}, plain | {"early_exit": early, "hops": [1, 2]}]
    recipe = recipe_from(recipe_of(*stages, model=MODEL | {"context": 160}))
    config = recipe.config(len(TOKENIZER), TOKENIZER.eos)
    model = random_model(config, 3, np.float64)
    batch = Rows(TOKENIZER, recipe.shares(recipe.stages[1]), 150, 1, answer_weight=3).batch(0, 0, 9)

    def loss(stage):
        return gradients(model, lambda m: batch_loss(m, batch, stage, 0, range(9), 0))[0]

    ids, more = batch.ids[:, :-1], 0
    for link, layers in enumerate((1, 2)):
        logits, via = shallow(model, layers)(ids), batch.via[..., link]
        more += cross_entropy(
            logits[via != NONE], via[via != NONE], np.full((via != NONE).sum(), 3)
        )
    without, with_hops = map(loss, recipe.stages)
    assert more > 0 and with_hops - without == pytest.approx(more, rel=1e-9)
