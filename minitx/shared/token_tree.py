"""Tree attention: one pass over tokens that branch (Miao et al., "SpecInfer", ASPLOS 2024, arXiv
2305.09781): several guesses of how a text goes on are checked at once.

A token of the tree sees the text before it, its own ancestors and itself. Its position is that of
the root plus its depth, so tokens on different branches share positions, and the mask cannot be
computed from the positions (``Tokens.unseen`` is the mask). After the pass one path is kept in the
KV cache.

        the root is "once"      0 once        node    0   1   2   3   4
                               / \\            parent  -   0   1   0   3
                        1 upon     3 there    depth   0   1   2   1   2
                          |          |        sees    0   0   0   0   0
                        2 a        4 was                  1   1   3   3
                                                              2       4
"""

from collections.abc import Sequence

import numpy as np

from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.model import (
    Attend,
    AttendUnequalGroups,
    Attention,
    Block,
    ParallelBlock,
    SkiplessBlock,
    SkiplessParallelBlock,
    Stack,
    Transformer,
)
from minitx.state import State, Tokens
from minitx.technique import NoSuchPart, need, owner
from minitx.tree import walk


class TokenTree:
    """Tokens to run in one pass. Node 0 is the root; a parent comes before its children."""

    def __init__(self, root: int):
        self.ids = [root]
        self.parents = [-1]
        self.depths = [0]
        self.children: dict[tuple[int, int], int] = {}  # (node, token) -> node

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, parent: int, token: int) -> int:
        """The child of a node with this token, which is added unless it is there already: guesses
        with a common prefix share its nodes."""
        node = self.children.setdefault((parent, token), len(self.ids))
        if node == len(self.ids):
            self.ids.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
        return node

    def add_path(self, node: int, tokens: Sequence[int]) -> int:
        """Add a chain of tokens below a node; returns the last node."""
        for token in tokens:
            node = self.add(node, token)
        return node

    def unseen(self) -> np.ndarray:
        """(T, T) booleans: True where a node must not see another one, since that is neither an
        ancestor nor the node itself."""
        sees = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents[1:], 1):
            sees[node] |= sees[parent]
        return ~sees


class TreeStep:
    """Takes the place of the ``State`` in one pass over the tokens of a tree. The root is the token
    after those in the state, of which the KV cache must hold one row for each."""

    def __init__(self, state: State, tree: TokenTree):
        self.state, self.tree = state, tree
        self.layers, self.capacity, self.position = state.layers, state.capacity, state.position
        self.first = state.position  # of the root

    def take(self, T: int) -> Tokens:
        positions = self.first + np.array(self.tree.depths)
        if positions.max() >= self.capacity:
            raise MinitxError(
                f"A branch would reach position {positions.max()} but the model's context is "
                f"{self.capacity}; use shorter branches."
            )
        self.tokens = Tokens(positions, unseen=self.tree.unseen())
        self.state.shared.step = self.first
        return self.tokens

    def need_batch(self, shape: tuple) -> None:
        self.state.need_batch(shape)

    def keep(self, path: Sequence[int]) -> None:
        """Keep these nodes, a path from the root; forget the other tokens of the step."""
        first, end = self.first, self.first + len(path)
        rows = first + np.array(path)
        for layer in self.layers:
            for array in (layer.keys, layer.values):
                array[..., first:end, :] = array[..., rows, :]
            layer.count, layer.row_positions = end, None  # row r holds position r again
            layer.rewind(end)
        self.state.position = end
        self.state.shared.rewind(end)


def follow(tree: TokenTree, logits: np.ndarray, choose: Sampler) -> tuple[list[int], list[int]]:
    """(new tokens, path): the tokens that the model generates after the root, as far as they are in
    the tree, and one more; and their nodes, beginning with the root. logits (T, V): row i is that
    of node i.

    Each token is drawn from the model's own distribution, exactly as without a tree: a guess
    decides only whether the next distribution is known already. That is the acceptance rule of
    speculative decoding for a deterministic draft (q is one-hot: accept x with probability p(x),
    else draw from p without x), and the sampler draws the same random numbers as in plain decoding.
    """
    node, path, new = 0, [0], []
    while True:
        token = choose(logits[node])
        new.append(token)
        if (node, token) not in tree.children:
            return new, path
        node = tree.children[node, token]
        path.append(node)


BLOCKS = Block, ParallelBlock, SkiplessBlock, SkiplessParallelBlock


def need_branches(model: Transformer, who: str) -> None:
    """Refuse a model that cannot run tokens on several branches; who: the technique. Attention has
    to be plain (it uses ``Layer.mask``), and what a token computes may depend on nothing but the
    tokens that it sees."""
    need(model.stack, Stack)
    for block in model.stack.blocks:
        need(block, *BLOCKS)
        need(block.attn, Attention)
        need(block.attn.attend, Attend, AttendUnequalGroups)
    for _, node in walk(model):
        if (
            node.decides != "token"
            or node.has_history
            or node.frees_rows
            or node.needs_all_rows
            or node.reads_other_layers
        ):
            raise MinitxError(
                f"{who} runs several guesses of the next tokens in one pass, and {owner(node)} "
                "needs tokens that follow one another; use one of the two."
            )


def check_unchanged(model: Transformer, who: str) -> None:
    """``need_branches`` when a text begins, for a model that was changed after ``who`` was
    applied."""
    try:
        need_branches(model, who)
    except NoSuchPart as error:
        found = type(error.found).__name__
        raise MinitxError(
            f"{who} cannot run {found}, which was put into the model afterwards; apply all "
            "techniques at once to the model without them."
        ) from None
