"""Mixture-of-Depths' training: who is selected, the loss and its gradient, what the trainer writes.

The decision in decoding: tests/skip/test_mixture_of_depths.py.
"""

import math
from functools import partial

import literal_mixture_of_depths as literal
import numpy as np
import pytest
from test_model_gradients import MODELS, example, model_of
from test_training import FIRST, TOKENIZER, Alone, recipe_of, write
from test_training_detector import InThisProcess

from minitx import fast, tree
from minitx.build import random_model
from minitx.checkpoints.huggingface import write_model
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.errors import MinitxError
from minitx.lm import load
from minitx.skip.mixture_of_depths import LearnedRouter, RoutedBlock
from minitx.skip.mixture_of_depths.file import read_routers
from minitx.technique import swap, wrap
from minitx.training.data import end_id
from minitx.training.loss import cross_entropy
from minitx.training.mixture_of_depths import (
    TopKBlock,
    routed_gradients,
    routed_loss,
    router_loss,
    top_k,
)
from minitx.training.recipe import recipe_from
from minitx.training.train import Run
from minitx.training.worker import SharedArrays, Worker, layout_of

KINDS = ("llama", "gpt2", "neox parallel")


def routed(config, seed=0):
    """A model with a router in both of its blocks, and their vectors w."""
    rng = np.random.default_rng(seed)
    vectors = {i: rng.standard_normal(config.width) for i in (0, 1)}

    def change(block, i):
        return RoutedBlock(block, LearnedRouter(vectors[i] / 0.5, scale=0.5))

    return wrap(model_of(config), "block", change), vectors


def as_sum(model, ids, targets, weights):
    return cross_entropy(model(ids), targets, weights)


# Who is selected ---------------------------------------------------------------------------------


def test_top_k_takes_exactly_k_and_ties_go_to_the_lower_index():
    # A strict "above the k-th largest" would take none of the three 0.9, "at least" one more of 0.5
    r = np.array([[0.9, 0.2, 0.9, 0.1, 0.05, 0.9, 0.3, 0.8], [0.5, 0.1, 0.5, 0.5, 0, 0, 0, 0]])
    assert top_k(r, 3).tolist() == [[0, 2, 5], [0, 2, 3]]
    assert top_k(r, 2).tolist() == [[0, 2], [0, 2]]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("capacity", [0.5, 0.01])
def test_selected_tokens_run_as_in_the_literal_version(name, capacity):
    """In each row of a batch others; 0.01 of six tokens is one."""
    config = MODELS[name]
    model, vectors = routed(config)
    ids, *_ = example(config)
    found = []
    trained = swap(model, RoutedBlock, lambda b: TopKBlock(b.inner, b.router, capacity, found))
    logits = trained(ids)
    enters = literal.by_rank(capacity)
    for row in range(len(ids)):
        plain = swap(model, RoutedBlock, lambda b: b.inner)
        expected, who = literal.run(plain, ids[row], vectors, enters)
        np.testing.assert_allclose(logits[row], expected, rtol=1e-9, atol=1e-12)
        assert [sorted(who[i]) for i in (0, 1)] == [s[row].tolist() for _, s in found]


# The loss ----------------------------------------------------------------------------------------


def test_router_loss_by_hand():
    # one row, r = 2, 0, -1, 3 (selected: tokens 0 and 3), the last token is padding:
    # -log sigmoid(2) - log(1 - sigmoid(0)) - log(1 - sigmoid(-1)), over three tokens
    r = np.array([[2.0, 0.0, -1.0, 3.0]])
    rows = np.array([[True, True, True, False]])
    expected = (math.log(1 + math.exp(-2)) + math.log(2) + math.log(1 + math.exp(-1))) / 3
    assert router_loss([(r, np.array([[0, 3]]))], rows) == pytest.approx(expected)
    both = router_loss([(r, np.array([[0, 3]])), (r * 0, np.array([[0, 3]]))], rows)
    assert both == pytest.approx((expected + math.log(2)) / 2), "not the mean over blocks"


@pytest.mark.parametrize("name", KINDS)
def test_routed_gradients_equal_central_differences(monkeypatch, name):
    """Of the model and the routers: along one direction per weight, and one through all."""
    monkeypatch.setattr(fast, "ROWS", 4)
    model, _ = routed(MODELS[name])
    ids, targets, rows = example(MODELS[name])
    rows[1, 5:] = 0
    loss = partial(as_sum, ids=ids, targets=targets, weights=rows)
    found, value, error = routed_gradients(model, loss, 0.5, 0.3, rows)
    weights = tree.weights(model)
    assert found.keys() == weights.keys() and "stack.blocks.1.router.vector" in found
    rng = np.random.default_rng(1)
    direction = {path: rng.standard_normal(w.shape) for path, w in weights.items()}
    paths = {id(w): path for path, w in weights.items()}

    def at(chosen, step):
        def moved(w):
            path = paths[id(w)]
            return w + step * direction[path] * (path in chosen)

        return float(routed_loss(tree.map_weights(model, moved), loss, 0.5, 0.3, rows)[0])

    assert at((), 0) == pytest.approx(value + 0.3 * error, rel=1e-12)
    for chosen in [set(weights), *({path} for path in weights)]:
        expected = (at(chosen, 1e-6) - at(chosen, -1e-6)) / 2e-6
        got = sum((found[path] * direction[path]).sum() for path in chosen)
        size = np.sqrt(sum((found[path] ** 2).sum() for path in chosen))
        assert abs(got - expected) < 1e-6 * max(size, abs(expected)) + 2e-9, chosen


# The trainer -------------------------------------------------------------------------------------

ROUTED = {"mixture_of_depths": {"router": "fitted", "every": 2, "stories": 2}}
STAGE = FIRST | {"steps": 4, "every": 2, "chain": True, "router": {"capacity": 0.25, "weight": 0.5}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model in a folder, to start from: three blocks, of which block 1 is routed."""
    folder = tmp_path_factory.mktemp("start")
    config = recipe_from(recipe_of(FIRST)).config(len(TOKENIZER), end_id(TOKENIZER))
    write_model(random_model(config, 3), folder, "F32")
    write_tokenizer(TOKENIZER, folder)
    return folder


def tuned(start, *stages, **changes):
    recipe = recipe_of(*stages, start=str(start), techniques=ROUTED, shards=2) | changes
    del recipe["model"]
    return recipe


def test_trained_folder_holds_the_plain_model_and_its_routers(start, tmp_path):
    recipe = recipe_from(tuned(start, STAGE))
    layout = layout_of(recipe, TOKENIZER)
    memory = SharedArrays(layout.size, recipe.shards)
    run = Run(recipe, layout, memory, tmp_path, False)
    run.initialize()
    assert run.train(InThisProcess(recipe, layout, memory), lambda: False)
    run.write_folder(TOKENIZER, write(tmp_path, tuned(start, STAGE)))
    found = run.log()
    assert all(entry["router_loss"] > 0 for entry in found["log"])
    dense, lm = load(tmp_path), load(tmp_path, mixture_of_depths=True)
    assert repr(dense.model) == repr(load(start).model), "the folder's model is not a plain one"
    routers = read_routers(tmp_path, dense.model.config)
    assert list(routers.vectors) == [1] and routers.capacity == 0.25
    fitted = load(start, **ROUTED).model.stack.blocks[1].router
    moved = routers.vectors[1] / (fitted.vector * fitted.scale) - 1
    assert 1e-4 < np.median(abs(moved)) < 1, "the router was not trained, or not from the start"
    assert type(lm.model.stack.blocks[1]) is RoutedBlock and lm.generate("Once", 5)


def test_router_weight_lowers_the_routers_loss(start):
    """Four steps with and without the loss of the routers."""

    def after(weight):
        recipe = recipe_from(tuned(start, STAGE | {"router": {"capacity": 0.25, "weight": weight}}))
        layout, alone = layout_of(recipe, TOKENIZER), Alone()
        worker = Worker(
            0, 1, recipe, SharedArrays(layout.size, recipe.shards), alone, alone.next_shard
        )
        layout.flatten(tree.weights(layout.tree), worker.shared["weights"])
        alone.wait()
        losses = []
        for step in range(4):
            losses.append(worker.step(0, step, step)[2])
            alone.wait()
        return losses

    without, heavy = after(0), after(5.0)
    assert heavy[0] == without[0] and heavy[-1] < without[-1]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"stages": [FIRST]}, "Stage 'first' has no router; give a router in every stage"),
        ({"techniques": {}}, "Stage 'first' has a router"),
        (
            {"techniques": {"mixture_of_depths": {"router": "random"}}},
            "router 'fitted', got 'random'",
        ),
        ({"stages": [STAGE | {"router": 0.5}]}, "an object with capacity and weight"),
        ({"stages": [STAGE | {"router": {}}]}, "must have the field 'capacity'"),
        ({"stages": [STAGE | {"router": {"capacity": 0}}]}, "a number above 0, at most 1"),
        ({"stages": [STAGE | {"router": {"capacity": 0.5, "wait": 1}}]}, "Unknown field 'wait'"),
    ],
)
def test_bad_recipe_is_refused(start, change, words):
    with pytest.raises(MinitxError, match="^[^\n]*" + words):
        recipe_from(tuned(start, STAGE) | change)
