"""Lookahead decoding: each pass generates n-grams by Jacobi iteration and verifies earlier ones.

From top to bottom: the card and the options; the decoding loop; the window of guesses and the pool
of n-grams; the cost formula; notes.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from minitx import ledger, ops
from minitx.decode import Sampler, TokenLoop, prefill
from minitx.model import Transformer
from minitx.shared.plain_loop import need_plain_loop
from minitx.shared.token_tree import TokenTree, TreeStep, check_unchanged, follow, need_branches
from minitx.state import State
from minitx.technique import SEEDS, at_least, technique
from minitx.tree import part


@technique(
    level="decode",
    exact=True,
    neutral={"window": 0},
    demo={"window": 3, "ngram": 3, "candidates": 2},
    event="n-grams collected",
    presets={"authors": {"window": 7, "ngram": 5, "candidates": 7}},
)
def lookahead(
    lm,
    *,
    window: Annotated[
        int,
        "positions at which n-grams are generated in a pass (paper: W); 0 is plain decoding",
        at_least(0, limit=256),
    ] = 4,
    ngram: Annotated[int, "tokens of an n-gram (paper: N)", at_least(2, limit=32)] = 3,
    candidates: Annotated[
        int,
        "n-grams kept for each first token, and verified in a pass (paper: G)",
        at_least(1, limit=256),
    ] = 4,
    choose: Annotated[
        Literal["first", "random"],
        "n-grams to verify: first: those whose first token is the text's last one; random: as many "
        "of the pool, drawn at random, a baseline",
    ] = "first",
    seed: Annotated[int, "seed of the window's first guesses and of choose=random", SEEDS] = 0,
):
    """Collect n-grams from a window of guesses, and verify those that fit the text in one pass.

    Paper:     Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead
               Decoding", ICML 2024, arXiv 2402.02057.
    Fidelity:  the authors' code, not the paper's text. Ours: guesses with a common prefix share
               rows, so the window's are verified too; the window begins full, of random tokens of
               the prompt.
    Kind:      exact: greedy text is the same, except for ties that rounding decides; samples follow
               the model's distribution.
    Idea:      In Jacobi decoding (see jacobi) few guesses are right at their own position, but the
               model corrects them into n-grams that fit the text elsewhere. Remember those.
    Offline:   nothing.
    Online:    window y[j][c], j < N - 1, c < W: a guess of the token c + j after the last one;
               level j = 0 is the oldest of N - 1 Jacobi iterations; y[0][0] is the last token
               one pass over a tree:   y[0][c] sees the text and y[0][0..c];
                                       y[j][c] sees those and y[1..j][c];
                                       n-grams of the pool that begin with the last token
               emit t ~ p[node], from the root on; go on at its child t while there is one
               keep the emitted tokens' rows in the KV cache, drop the others
               g[c] = argmax after y[0..N-2][c]
               pool[y[0][c]] gets the n-gram y[1..N-2][c], g[c]; above G, drop the oldest
               y = y[1..N-2], g:       each level becomes the one before it
    Saves:     passes, so bytes of weights read: 1 / (tokens per pass), 0.59x on stories.
               Multiply-adds rise, to rows / (tokens per pass) of plain decoding's (4.9x on stories,
               prompt included); rows per pass: at most (W + G) (N - 1).
    In NumPy:  0.5x the throughput on stories (minitx compare --lookahead): a pass over 10 rows
               takes about 3.5 times as long as a plain step, since the weights fit the CPU's cache,
               and gives 1.73 tokens.
    Not for:   parts that need consecutive tokens (sparse attention, eviction, memories); batches,
               whose sequences are decoded one by one.
    Proof:     tests/skip/test_lookahead.py; literal version: tests/skip/literal_lookahead.py
    Tutorial:  tutorials/18_guessing_without_a_draft.py
    """
    if window == 0:
        return lm
    need_plain_loop(lm, "lookahead")
    need_branches(lm.model, "lookahead")
    loop = Lookahead if choose == "first" else LookaheadRandomNGrams
    return replace(lm, decode=loop(window, ngram, candidates, seed))


# Online ------------------------------------------------------------------------------------------


@part
class Lookahead(TokenLoop):
    """The decoding loop: each pass runs a tree of the window's guesses and the pool's n-grams."""

    window: int  # W
    ngram: int  # N
    candidates: int  # G
    seed: int

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        check_unchanged(model, "lookahead")
        text, rng = list(ids), random.Random(self.seed)
        window, pool = Window.of(ids, self.window, self.ngram, rng), Pool(self.candidates)
        end = len(text) + limit
        if limit:
            prefill(model, text, state)
        while len(text) < end:
            # Here the KV cache always holds every token except the last one.
            depth = end - len(text) - 1  # of the tree, at most: a pass adds one token to the path
            tree = TokenTree(text[-1])
            found = self.to_verify(pool, text[-1], rng)
            for ngram in found:
                tree.add_path(0, ngram[:depth])
            columns = window.add_to(tree, depth)
            step = TreeStep(state, tree)
            logits = model(tree.ids, step)  # (T, V)
            new, path = follow(tree, logits, choose)
            step.keep(path)
            text += new
            guesses = [ops.argmax_token(logits[column[-1]]) for column in columns]
            for column, guess in zip(columns, guesses):
                first, *rest = (tree.ids[node] for node in column)
                pool.put(first, (*rest, guess))
            window.move(guesses)
            ledger.event("passes")
            ledger.event("rows run", len(tree))
            ledger.event("n-grams collected", len(columns))
            ledger.event("n-grams verified", len(found))
            ledger.event("guesses accepted", len(new) - 1)
            yield from new

    def to_verify(self, pool: "Pool", last: int, rng: random.Random) -> list[tuple[int, ...]]:
        """The n-grams of the pool that begin with the last token, each without that token."""
        return pool.find(last)


@part
class LookaheadRandomNGrams(Lookahead):
    """The random baseline: verifies as many n-grams, whatever their first token is."""

    def to_verify(self, pool: "Pool", last: int, rng: random.Random) -> list[tuple[int, ...]]:
        everything = [ngram for kept in pool.kept.values() for ngram in kept]
        return rng.sample(everything, len(pool.find(last)))


class Window:
    """levels[j][c]: a guess of the token c + j positions after the text's last one. Level 0 is the
    oldest, made N - 1 passes ago; level N - 2 was made in the last pass. levels[0][0] is at the
    position of the last token itself, which is known, so it is not used."""

    def __init__(self, levels: list[list[int]]):
        self.levels = levels

    @classmethod
    def of(cls, ids: Sequence[int], W: int, N: int, rng: random.Random) -> "Window":
        """The first window: random tokens of the prompt."""
        return cls([[rng.choice(ids) for _ in range(W)] for _ in range(N - 1)])

    def add_to(self, tree: TokenTree, depth: int) -> list[list[int]]:
        """Add the window to a tree of at most this depth; near the end of the context or the limit,
        W shrinks so that it fits. Returns the N - 1 nodes of each column."""
        W = max(depth - len(self.levels) + 2, 0)  # column c ends at depth c + N - 2
        self.levels = [level[:W] for level in self.levels]
        first, *others = self.levels
        columns, node = [], 0
        for c in range(len(first)):
            if c > 0:
                node = tree.add(node, first[c])  # level 0 is a chain from the root
            column = [node]
            for level in others:
                column.append(tree.add(column[-1], level[c]))
            columns.append(column)
        return columns

    def move(self, guesses: list[int]) -> None:
        """By one position: level j + 1 becomes level j, and the new guesses the last level."""
        self.levels = [*self.levels[1:], guesses]


class Pool:
    """n-grams by their first token: at most ``size`` for each, those collected last."""

    def __init__(self, size: int):
        self.size = size
        self.kept: dict[int, dict[tuple, None]] = {}  # first token -> the rest, oldest first

    def put(self, first: int, rest: tuple[int, ...]) -> None:
        kept = self.kept.setdefault(first, {})
        kept.pop(rest, None)  # collected again, it counts as new
        kept[rest] = None
        if len(kept) > self.size:
            del kept[next(iter(kept))]

    def find(self, first: int) -> list[tuple[int, ...]]:
        return list(self.kept.get(first, ()))


# Cost --------------------------------------------------------------------------------------------


def most_rows(W: int, N: int, G: int) -> int:
    """Rows of a pass at most, the last token included: fewer if guesses share a prefix."""
    return (W + G) * (N - 1)


def multiply_adds(rows: float, tokens_per_pass: float) -> float:
    """Those of the matrices, per new token, relative to plain decoding; rows: per pass."""
    return rows / tokens_per_pass


# Notes:
#
# - The authors' window begins with one level of random tokens of the prompt and fills the others in
#   N - 2 passes, during which nothing is verified. Ours begins with N - 1 random levels, so its
#   first n-grams are poor.
# - The window moves by one position a pass even if several tokens are emitted, as in the authors'
#   code: its guesses then stand for later tokens than those they were made for. They are there to
#   become n-grams; few are right at their own position.
# - The authors verify the n-grams in a separate branch. Here the window's guesses and the n-grams
#   are one tree (shared/token_tree.py), in which a common prefix is run once.
# - Near the end of the context or the limit, the window loses columns, and n-grams are truncated.
# - An n-gram that is collected again counts as new. One that was verified does not.
# - Each token is drawn as in plain decoding, with the same random numbers, so the same seed gives
#   the same sample (see ``token_tree.follow``).
# - The pool lives as long as one text, and holds at most V G n-grams.
# - python -m minitx.lab.loops lookahead window=2,4,8 --prompts 8 --new 96
#   on stories (ngram=2,5; candidates=1,8; preset=authors; choose=random; and all with --temperature
#   1): the first 32 tokens of 8 held-out stories, each continued by 96. Relative to plain decoding,
#   prompt included; tokens and rows per pass follow from the events below that table; "accepted":
#   of the tree's rows without the root.
#
#                    tokens per pass   rows per pass    accepted      multiply-adds   weight bytes
#       W   N   G    greedy   T = 1        greedy     greedy  T = 1   greedy   T = 1  greedy  T = 1
#       4   3   4     1.73    1.33         10.3        7.8 %  3.7 %    4.90x   6.07x  0.59x   0.76x
#       2   3   4     1.56    1.27          6.5       10.2 %  5.5 %    3.49x   3.85x  0.65x   0.80x
#       8   3   4     1.91    1.43         18.0        5.4 %  2.7 %    7.69x   9.81x  0.53x   0.71x
#       4   2   4     1.55    1.33          5.2       13.2 %  8.3 %    2.83x   3.16x  0.65x   0.76x
#       4   5   4     1.83    1.36         20.4        4.3 %  2.0 %    9.06x  11.42x  0.56x   0.74x
#       4   3   1     1.60    1.29          8.5        8.0 %  3.9 %    4.39x   5.38x  0.63x   0.79x
#       4   3   8     1.75    1.34         11.4        7.2 %  3.5 %    5.39x   6.47x  0.58x   0.75x
#       7   5   7     1.98    1.55         34.2        2.9 %  1.7 %   14.18x  17.56x  0.52x   0.66x
#       random n-grams (choose=random), else as the first row:
#       4   3   4     1.24    1.13         11.0        2.4 %  1.3 %    7.26x   7.67x  0.82x   0.90x
#
#   Each doubling of W adds about 0.17 tokens a pass. prompt_lookup, measured in the same way, gives
#   1.73 tokens a pass with 3.4 rows in greedy decoding, since stories repeat themselves, and 1.22
#   with 3.1 rows at temperature 1. The baseline is above 1 because it verifies the window too.
#   minitx compare --lookahead counts and times the greedy ones: 0.51x the throughput (one BLAS
#   thread, 48 new tokens, 0.69x the weight bytes: the pool is still empty at first).
