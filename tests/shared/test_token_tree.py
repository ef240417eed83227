"""One pass over a tree of tokens gives each branch what it would have had alone."""

import numpy as np
import pytest
from tiny import KINDS, check_close, tiny_lm, tiny_model

from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.shared.token_tree import TokenTree, TreeStep, follow, need_branches
from minitx.technique import apply, wrap
from minitx.tree import Part, part

PROMPT = [5, 1, 2, 3, 9, 8]


def random_tree(rng, size, tokens=5):
    tree = TokenTree(int(rng.integers(tokens)))
    while len(tree) < size:
        tree.add(int(rng.integers(len(tree))), int(rng.integers(tokens)))
    return tree


def path_to(tree, node):
    """The nodes from the root to a node."""
    path = []
    while node >= 0:
        path.insert(0, node)
        node = tree.parents[node]
    return path


def test_tree_by_hand():
    """The tree of the module's docstring: 0 once, 1 upon, 2 a, 3 there, 4 was."""
    tree = TokenTree(10)
    assert tree.add_path(0, [11, 12]) == 2 and tree.add_path(0, [13, 14]) == 4
    assert tree.parents == [-1, 0, 1, 0, 3] and tree.depths == [0, 1, 2, 1, 2]
    assert tree.ids == [10, 11, 12, 13, 14]
    sees = [np.flatnonzero(~row).tolist() for row in tree.unseen()]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4]]
    assert tree.add_path(0, [11, 15]) == 5, "the first token is there already"
    assert tree.parents[5] == 1 and len(tree) == 6


@pytest.mark.parametrize("family", KINDS)
def test_each_node_has_the_logits_of_its_branch_alone(family):
    model, rng = tiny_model(family, dtype=np.float64), np.random.default_rng(0)
    for size in (1, 2, 12):
        tree, state = random_tree(rng, size), model.new_state()
        model.hidden(PROMPT, state)
        logits = model(tree.ids, TreeStep(state, tree))
        for node in range(size):
            branch = [tree.ids[i] for i in path_to(tree, node)]
            alone = model(PROMPT + branch)[-1]
            check_close(logits[node], alone, 1e-9, f"node {node} of {size} and its branch alone")


@pytest.mark.parametrize("family", KINDS)
def test_kept_path_leaves_the_cache_of_a_plain_run(family):
    model, rng = tiny_model(family, dtype=np.float64), np.random.default_rng(1)
    state, text = model.new_state(), list(PROMPT)
    model.hidden(PROMPT, state)
    for turn in range(4):
        tree = random_tree(rng, 9)
        step = TreeStep(state, tree)
        model(tree.ids, step)
        path = path_to(tree, int(rng.integers(9)))
        step.keep(path)
        text += [tree.ids[node] for node in path]
        fresh = model.new_state()
        model.hidden(text, fresh)
        assert state.position == len(text)
        for kept, new in zip(state.layers, fresh.layers):
            assert kept.count == new.count and kept.row_positions is None
            for what in ("keys", "values"):
                a, b = (getattr(layer, what)[..., : new.count, :] for layer in (kept, new))
                check_close(a, b, 1e-9, f"cached {what} after pass {turn}")
    more = model([3, 4], state)  # and the sequence goes on as any other
    check_close(more, model([*text, 3, 4])[-2:], 1e-9, "a plain step afterwards")
    state.rewind(len(PROMPT) + 1)
    again = model([*text[: len(PROMPT) + 1], 2])[-1]
    check_close(model([2], state)[-1], again, 1e-9, "after a rewind into the path")


def test_tree_may_have_more_nodes_than_the_context_has_room():
    """Only positions count: 20 guesses of the last token."""
    model = tiny_model(dtype=np.float64)
    state, ids = model.new_state(), [1] * 46
    model.hidden(ids, state)
    tree = TokenTree(7)
    for token in range(20):
        tree.add(0, token)
    step = TreeStep(state, tree)
    logits = model(tree.ids, step)
    check_close(logits[20], model([*ids, 7, 19])[-1], 1e-9, "the last guess")
    step.keep([0, 20])
    assert state.position == 48
    with pytest.raises(MinitxError, match="position 48 but the model's context is 48"):
        model([3], TreeStep(state, TokenTree(3)))


def test_follow_goes_on_while_the_tree_has_the_token():
    tree = TokenTree(0)
    tree.add_path(0, [1, 2]), tree.add_path(0, [3, 1])
    logits = np.zeros((5, 4))
    logits[range(5), [3, 0, 0, 1, 2]] = 1  # after the root 3, then 1, then 2
    assert follow(tree, logits, Sampler()) == ([3, 1, 2], [0, 3, 4])
    logits[0] = [9, 0, 0, 0]
    assert follow(tree, logits, Sampler()) == ([0], [0]), "no guess was right"


@part
class Unfit(Part):
    inner: Part
    has_history: bool = False
    frees_rows: bool = False
    needs_all_rows: bool = False
    reads_other_layers: bool = False
    decides: str = "token"

    def __call__(self, x, layer):
        return self.inner(x, layer)


@pytest.mark.parametrize(
    "options",
    [
        {"has_history": True},
        {"frees_rows": True},
        {"needs_all_rows": True},
        {"reads_other_layers": True},
        {"decides": "step"},
        {"decides": "sequence"},
    ],
    ids=str,
)
def test_parts_that_need_tokens_in_a_row_are_refused(options):
    lm = wrap(tiny_lm(), "ffn", lambda ffn, index: Unfit(ffn, **options))
    with pytest.raises(MinitxError, match="^someone runs several.*test_token_tree needs tokens"):
        need_branches(lm.model, "someone")
    need_branches(wrap(tiny_lm(), "ffn", lambda ffn, index: Unfit(ffn)).model, "someone")


@pytest.mark.parametrize("name, options", [("elsa", {"p": 0.5}), ("early_exit", {})])
def test_other_attention_and_stacks_are_refused(name, options):
    lm = apply(tiny_lm(), {name: options})
    with pytest.raises(MinitxError, match="no part of type"):
        need_branches(lm.model, "someone")
