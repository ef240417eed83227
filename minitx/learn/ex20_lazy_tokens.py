"""Exercise 20: LazyLLM's bookkeeping (35 minutes)

To predict the next token, later layers need only the tokens that it attends to. LazyLLM prunes the
others: they do not run in the later layers, which saves most where the prompt is long. But a pruned
token is not lost. Its state waits in front of the layer that it has not run yet, in the auxiliary
cache. A later step may need it again. Then it goes on from there, and not from the first layer: no
token ever runs twice through a layer.

So each layer has a KV cache of the tokens that have run in it, in this step or an earlier one.
Write ``step``, which runs the new tokens (the prompt, or one token) and those that they revive:

1. The states of the new tokens wait in front of layer 0. Candidates: all tokens of the sequence so
   far, also those that an earlier step has pruned.
2. In each layer l, in this order:
   - run the candidates that are not in layers[l].cache: take their states out of waiting[l], and
     call layers[l];
   - their new states wait in front of layer l + 1, in waiting[l + 1];
   - the candidates of the next layer are select[l](candidates). It returns some of them, always
     with the last token of the sequence. (A real one looks at attention weights, so it has to be
     called after the layer has run.)
3. Return the state of the last token after the last layer.

The arguments:

    new      a dict {position: state (D,)} of the new tokens. Their positions follow those before.
    layers   L layers. layers[l](positions, states, candidates) runs the tokens at these positions
             with these states (n, D), in the same order, stores their keys and values in its cache,
             and returns their new states (n, D). They attend only to candidates. So all candidates
             must be in the cache, or among the tokens that run. Both lists are ascending.
    select   L functions; select[l](candidates) returns a list of positions, ascending.
    waiting  L + 1 dicts {position: state (D,)}. Your function changes them; the next step gets them
             as they are. waiting[L] collects what has run through all layers; only the last token's
             state is needed, and the others may stay there.

layers[l].cache is a dict with an entry for each position that has run in layer l.

A toy to check by hand, in which a state is one number. A layer adds to the state of a token the
mean of the states of all candidates up to it. L = 2, and the tokens 0 and 1 have the states 1 and
3. Layer 0: token 0 becomes 1 + 1 = 2, token 1 becomes 3 + (1 + 3) / 2 = 5. select[0] keeps only
token 1. Layer 1: token 1 becomes 5 + 5 = 10, and token 0 waits with its 2.

Then comes token 2, with the state 0. Layer 0: 0 + (1 + 3 + 0) / 3 = 1.33. This time select[0] keeps
0 and 2. Layer 1 has not run either of them. Token 0 is revived: 2 + 2 = 4. Token 2 becomes
1.33 + (2 + 1.33) / 2 = 3.

    >>> layers, waiting = [Layer(), Layer()], [{}, {}, {}]
    >>> new = {0: np.array([1.0]), 1: np.array([3.0])}
    >>> step(new, layers, [lambda c: [1], lambda c: c], waiting)
    array([10.])
    >>> [sorted(layer.cache) for layer in layers], waiting[1]
    ([[0, 1], [1]], {0: array([2.])})
    >>> step({2: np.array([0.0])}, layers, [lambda c: [0, 2], lambda c: c], waiting).round(2)
    array([3.])
    >>> [sorted(layer.cache) for layer in layers], waiting[1]
    ([[0, 1, 2], [0, 1, 2]], {})

Source: Fu et al., "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference", 2024.
"""

from dataclasses import replace

import numpy as np

from minitx import ledger
from minitx.learn.exercise import Exercise, Mistake
from minitx.model import Attend, Transformer
from minitx.shared.token_subset import consecutive, last_and_best, rounded_up, run_subset
from minitx.skip.lazy_tokens import ScoringAttend, last_row, pruning_layers
from minitx.state import State
from minitx.technique import blocks_of, swap, wrap
from minitx.tree import Part, part


# given
class Layer:
    """A toy layer: it adds the mean of the states of all candidates up to a token to its state."""

    def __init__(self):
        self.cache = {}  # {position: state (D,)}: here the state is the value, and has no key

    def __call__(self, positions, states, candidates):
        """positions (n) of the tokens to run, their states (n, D) -> their new states (n, D)"""
        self.cache.update(zip(positions, states))
        for j in candidates:
            if j <= max(positions) and j not in self.cache:
                raise ValueError(f"token {j} is a candidate, but is not in this layer's cache")
        means = [np.mean([self.cache[j] for j in candidates if j <= i], axis=0) for i in positions]
        return np.array(states) + np.array(means)


# end of given


# solution
def step(new, layers, select, waiting):
    """Run the new tokens {position: state (D,)} and those that they revive -> (D,)"""
    waiting[0].update(new)
    last = max(new)
    candidates = list(range(last + 1))
    for layer, selected, here, after in zip(layers, select, waiting, waiting[1:]):
        todo = [i for i in candidates if i not in layer.cache]
        states = np.array([here.pop(i) for i in todo])  # (n, D)
        after.update(zip(todo, layer(todo, states, candidates)))
        candidates = selected(candidates)
    return waiting[-1][last]


# end of solution


def in_loops(new, layers, select, waiting):
    """One token at a time."""
    for i in new:
        waiting[0][i] = new[i]
    candidates = list(range(max(new) + 1))
    for number, layer in enumerate(layers):
        for i in candidates:
            if i not in layer.cache:
                (state,) = layer([i], [waiting[number][i]], candidates)
                del waiting[number][i]
                waiting[number + 1][i] = state
        candidates = select[number](candidates)
    return waiting[len(layers)][max(new)]


def flawed(
    new,
    layers,
    select,
    waiting,
    *,
    start="all",
    run="missing",
    take=True,
    store="all",
    see="candidates",
    prune="after",
    of="candidates",
):
    waiting[0].update(new)
    last = max(new)
    candidates = list(new) if start == "new" else list(range(last + 1))
    for number, layer in enumerate(layers):
        here, after = waiting[number], waiting[number + 1]
        if prune == "before":
            candidates = select[number](candidates)
        todo = [i for i in candidates if i not in layer.cache]
        if run == "new":
            todo = [i for i in todo if i in new]
        if run == "all":
            todo = candidates
        visible = set(layer.cache) | set(todo)  # those that have a key and a value here
        seen = [i for i in range(last + 1) if i in visible] if see == "cache" else candidates
        seen = [i for i in seen if i in visible]
        keep = take is False or run == "all"
        states = np.array([here[i] if keep else here.pop(i) for i in todo])
        done = dict(zip(todo, layer(todo, states, seen)))
        if prune == "after":
            candidates = select[number](todo if of == "todo" else candidates)
        if store == "candidates" and number + 1 < len(layers):
            done = {i: state for i, state in done.items() if i in candidates}
        after.update(done)
    return waiting[-1][last]


MISTAKES = (
    Mistake(
        "Each step begins with the new tokens alone. All tokens so far are candidates, the pruned "
        "ones too.",
        start="new",
    ),
    Mistake(
        "Pruned tokens are never revived: run every candidate that is not in the layer's cache, "
        "not only new tokens.",
        run="new",
    ),
    Mistake(
        "Tokens run again in layers that they have run before; run only candidates that are not in "
        "the layer's cache.",
        run="all",
    ),
    Mistake(
        "A token that has run still waits in front of the layer: take its state out of waiting[l].",
        take=False,
    ),
    Mistake(
        "The states of pruned tokens are lost, so they cannot be revived: all new states wait in "
        "waiting[l + 1].",
        store="candidates",
    ),
    Mistake(
        "Tokens attend to everything in the layer's cache, pruned tokens too; pass on only the "
        "candidates.",
        see="cache",
    ),
    Mistake(
        "You select before the layer runs. It runs all its candidates; select[l] chooses those of "
        "layer l + 1.",
        prune="before",
    ),
    Mistake(
        "No token is pruned: select[l](candidates) gives the candidates of the next layer.",
        prune="never",
    ),
    Mistake(
        "You select among the tokens that have just run. Select among all candidates: those in the "
        "cache go on, too.",
        of="todo",
    ),
)


def cases(rng):
    """A prompt alone; a prompt and later tokens, with revivals; chunks."""
    for lengths, L in (((4,), 3), ((5, 1, 1, 1, 1), 3), ((3, 3, 1), 4)):
        yield [rng.standard_normal((n, 2)) for n in lengths], L, int(rng.integers(100))


def observe(answer, steps, L, salt):
    """For each step: its result, what ran in each layer and what was seen there, what waits."""
    layers, waiting = [Watched() for _ in range(L)], [{} for _ in range(L + 1)]
    found, n = {}, 0
    for number, states in enumerate(steps):
        new = {n + t: state for t, state in enumerate(states)}
        n += len(states)
        result = answer.step(new, layers, selections(L, n - 1, salt), waiting)
        where = {f"layer {i}": layer.report() for i, layer in enumerate(layers)}
        for i in range(L):
            where[f"layer {i}"]["waiting"] = dict(sorted(waiting[i].items()))
        found[f"step {number}"] = {"result": result, **where}
    return found


class Watched(Layer):
    """The toy layer, which remembers what it was asked to run."""

    def __init__(self):
        super().__init__()
        self.ran, self.seen = [], set()

    def __call__(self, positions, states, candidates):
        self.ran += map(int, positions)
        self.seen.update(map(int, candidates))
        return super().__call__(positions, states, candidates)

    def report(self) -> dict:
        told = {"ran": tuple(sorted(self.ran)), "seen": tuple(sorted(self.seen))}
        self.ran, self.seen = [], set()
        return told


def selections(L: int, last: int, salt: int) -> list:
    """Functions that keep the last token and about half of the others; which, changes from step to
    step and from layer to layer."""

    def keeps(layer: int, i: int) -> bool:
        return i == last or (i * 7 + layer * 5 + last * (i + 3) + salt) % 11 < 6

    return [lambda c, layer=layer: [i for i in c if keeps(layer, i)] for layer in range(L)]


# In the model ------------------------------------------------------------------------------------

KEEP, EVERY, FIRST = 0.7, 0.3, 1


@part
class StudentStack(Part):
    """The layers of the model; which tokens run where is decided by the student's function."""

    inner: Part  # Stack, whose attention records the last token's weights in pruning layers
    step: object
    keep: float
    cuts: tuple  # tokens are pruned after these numbers of layers

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    def __call__(self, x, state: State):
        """x (T, D) -> (T, D), of which only the last row is the model's output."""
        L = len(self.blocks)
        sequence = state.shared.recall(self, lambda: Sequence(L))
        layers = [RealLayer(*all) for all in zip(self.blocks, state.layers, sequence.ran)]
        for before, layer in zip(layers, layers[1:]):
            layer.before = before
        select = [self.selection(layer.state, i + 1) for i, layer in enumerate(layers)]
        new = dict(enumerate(x, state.position))
        out = x.copy()
        out[-1] = self.step(new, layers, select, sequence.waiting)
        return out

    def selection(self, layer, depth: int):
        def best(candidates):
            weights = last_row(layer).weights
            kept = last_and_best(weights, rounded_up(self.keep, len(candidates)))
            return [candidates[i] for i in kept]

        return best if depth in self.cuts else list


class Sequence:
    """ran: for each layer, the tokens that have run in it; waiting: as in ``step``."""

    def __init__(self, L: int):
        self.ran: list = [{} for _ in range(L)]
        self.waiting: list = [{} for _ in range(L + 1)]

    def rewind(self, position: int) -> None:
        """Forget the tokens from ``position`` on. (Which earlier ones they have revived is not
        known any more; the library can undo that, too.)"""
        for tokens in (*self.ran, *self.waiting):
            for i in [i for i in tokens if i >= position]:
                del tokens[i]


class RealLayer:
    """A block of the model, called like the toy."""

    before = None  # the layer before this one

    def __init__(self, block: Part, state, cache: dict):
        self.block, self.state, self.cache = block, state, cache
        self.ran: set = set()  # in this step

    def __call__(self, positions, states, candidates):
        x = np.asarray(states)
        self.ran.update(positions)
        if self.before is not None:  # states of revived tokens are read from the auxiliary cache
            ledger.count(cache_bytes=len(set(positions) - self.before.ran) * x[0].nbytes)
        tokens = consecutive(np.array(positions))
        y = run_subset([self.block], [self.state], x, tokens, np.array(candidates))
        self.cache.update(dict.fromkeys(positions, True))
        return y


def into_model(lm, answer):
    cuts = pruning_layers(len(blocks_of(lm)), EVERY, FIRST)
    return lazy(lm, answer.step, KEEP, cuts)


def lazy(lm, step, keep: float, cuts: tuple):
    def score(attn: Part, index: int) -> Part:
        return swap(attn, Attend, ScoringAttend) if index + 1 in cuts else attn

    def change(model: Transformer) -> Transformer:
        return replace(model, stack=StudentStack(model.stack, step, keep, cuts))

    return swap(wrap(lm, "attn", score), Transformer, change)


EXERCISE = Exercise(
    title="LazyLLM's bookkeeping",
    minutes=35,
    difficulty="hard",
    names=("step",),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed=flawed,
    mistakes=MISTAKES,
    hints=(
        "Write down for the example which tokens are in layers[0].cache, layers[1].cache and "
        "waiting[1] after each step. A candidate of layer l is in its cache or waits in front of "
        "it: why never neither?",
        "Put the new tokens into waiting[0] and begin with list(range(max(new) + 1)). In layer l, "
        "todo is every candidate that is not in layers[l].cache; waiting[l].pop(i) takes a state "
        "out. All results go to waiting[l + 1], before select[l] makes the list shorter.",
    ),
    library="minitx/skip/lazy_tokens.py: LazyStack",
    into_model=into_model,
    same_as={"lazy_tokens": {"keep": KEEP, "every": EVERY, "first": FIRST}},
    saves=(
        "After 2, 4 and 7 of 8 layers, 0.7 of the tokens go on. A prompt of 320 tokens takes 0.62 "
        "of the multiply-adds. But later tokens revive most of what was pruned, so a long answer "
        "saves nearly nothing."
    ),
)
