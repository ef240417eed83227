"""Exercise 5: The KV cache (30 minutes)

A text is generated token by token. Each new token attends to the keys and values of all tokens
before it, and these never change: a token does not see what comes after it. So they are computed
once and kept, in the KV cache. Write the class, for one layer and one text:

    cache = Cache(capacity, heads, d, rotate)
    keys, values = cache.append(k, v)
    cache.rewind(n)

Cache(capacity, heads, d, rotate) makes an empty cache with room for `capacity` tokens: two arrays
(heads, capacity, d) of float64, allocated here and nowhere else. Keep `rotate`, a function that
append needs.

append(k, v) adds T new tokens, T >= 1. Values are cached as they are. Keys come without a position,
so they are rotated first (as in exercise 2, here for all heads at once): rotate(k, positions), with
the positions (T,) of these tokens as an array of integers. The first token of the text has position
0, and each chunk continues where the tokens before it ended. A key is rotated once, when it is
appended, and never again. append returns the keys and values of all S tokens so far, old and new:

    k, v          (heads, T, d)
    keys, values  (heads, S, d)     views of the two arrays (slices), not copies

A copy would cost more with every token: S tokens, one by one, would copy about S^2 / 2 rows.

If the T tokens do not fit, append raises a ValueError and leaves the cache as it was. Do not rely
on NumPy for that: a[:, 8:9] = k raises nothing if a has only 8 rows; the slice is empty, and the
key is lost.

rewind(n) forgets all tokens but the first n, 0 <= n <= S. The next token then has position n.
Speculative decoding needs this: it appends tokens that were only guessed, and takes back the wrong
ones. Nothing has to be erased; the next append writes over the old rows.

By hand, with a stand-in for the rotation that adds 10 times the position: two tokens with the keys
1 and 2 get the positions 0 and 1, so 1 and 12 are cached. We take the second one back, and append
the key 3, again at position 1: it becomes 13.

    >>> def rotate(k, positions):
    ...     return k + 10 * positions[:, None]
    >>> cache = Cache(4, 1, 1, rotate)
    >>> keys, values = cache.append(np.array([[[1.0], [2.0]]]), np.array([[[5.0], [6.0]]]))
    >>> keys.tolist(), values.tolist()
    ([[[1.0], [12.0]]], [[[5.0], [6.0]]])
    >>> cache.rewind(1)
    >>> keys, values = cache.append(np.array([[[3.0]]]), np.array([[[7.0]]]))
    >>> keys.tolist(), values.tolist()
    ([[[1.0], [13.0]]], [[[5.0], [7.0]]])

Source: Pope et al., "Efficiently Scaling Transformer Inference", MLSys 2023, for what the cache
saves and what it costs.
"""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np

from minitx import ops
from minitx.learn.exercise import Exercise, Mistake
from minitx.model import Attention, split_heads
from minitx.technique import apply, swap
from minitx.tree import part


# solution
class Cache:
    """Keys and values of one text in one layer."""

    def __init__(self, capacity, heads, d, rotate):
        """An empty cache with room for `capacity` tokens."""
        self.keys = np.empty((heads, capacity, d))
        self.values = np.empty((heads, capacity, d))
        self.capacity = capacity
        self.rotate = rotate
        self.length = 0  # tokens so far

    def append(self, k, v):
        """k, v (heads, T, d) -> the keys and values (heads, S, d) of all S tokens so far."""
        first, end = self.length, self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit in a cache for {self.capacity}")
        self.keys[:, first:end] = self.rotate(k, np.arange(first, end))
        self.values[:, first:end] = v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]

    def rewind(self, n):
        """Forget all tokens but the first n."""
        self.length = n


# end of solution


class InLoops:
    """One row at a time."""

    def __init__(self, capacity, heads, d, rotate):
        self.capacity, self.rotate, self.length = capacity, rotate, 0
        self.keys, self.values = np.zeros((heads, capacity, d)), np.zeros((heads, capacity, d))

    def append(self, k, v):
        T = k.shape[1]
        if self.length + T > self.capacity:
            raise ValueError("full")
        for t in range(T):
            row = self.length + t
            position = np.array([row])
            self.keys[:, row] = self.rotate(k[:, t : t + 1], position)[:, 0]
            self.values[:, row] = v[:, t]
        self.length += T
        return self.keys[:, : self.length], self.values[:, : self.length]

    def rewind(self, n):
        self.length = n


in_loops = SimpleNamespace(Cache=InLoops)


class Flawed:
    def __init__(
        self,
        capacity,
        heads,
        d,
        rotate,
        *,
        positions="go on",
        rotated="new keys",
        result="all",
        views=True,
        rewinds="to n",
        checked=True,
        length_first=False,
        unused=0,
    ):
        self.capacity, self.rotate = capacity, rotate
        self.keys, self.values = np.zeros((heads, capacity, d)), np.zeros((heads, capacity, d))
        self.length = self.seen = 0
        self.positions, self.rotated, self.result, self.views = positions, rotated, result, views
        self.rewinds, self.checked, self.length_first = rewinds, checked, length_first
        self.unused = unused

    def append(self, k, v):
        T = k.shape[1]
        first, end = self.length, self.length + T
        if self.length_first:
            self.length = end
        if self.checked and end > self.capacity - self.unused:
            raise ValueError("full")
        where = {
            "go on": np.arange(first, end),
            "restart": np.arange(T),
            "not rewound": np.arange(self.seen, self.seen + T),
            "chunk": np.full(T, first),
        }[self.positions]
        if self.rotated != "nothing":
            k = self.rotate(k, where)
        if self.rotated == "values too":
            v = self.rotate(v, where)
        if self.views:
            self.keys[:, first:end], self.values[:, first:end] = k, v
        else:
            self.keys = np.concatenate([self.keys[:, :first], k], axis=1)
            self.values = np.concatenate([self.values[:, :first], v], axis=1)
        self.length, self.seen = end, self.seen + T
        if self.rotated == "old keys again":
            self.keys[:, :first] = self.rotate(self.keys[:, :first], np.arange(first))
        keys, values = self.keys[:, :end], self.values[:, :end]
        if self.rotated == "twice":
            keys = self.rotate(keys, np.arange(keys.shape[1]))
        if self.result == "whole":
            return self.keys, self.values
        return (keys, values) if self.result == "all" else (keys[:, first:], values[:, first:])

    def rewind(self, n):
        self.length = {"to n": n, "by n": self.length - n, "not": self.length}[self.rewinds]


MISTAKES = (
    Mistake(
        "The positions start at 0 again with every append; they continue where the tokens before "
        "ended.",
        positions="restart",
    ),
    Mistake(
        "After rewind, positions go on as if nothing had been taken back: the next token has "
        "position n.",
        positions="not rewound",
    ),
    Mistake(
        "All tokens of one append get the same position; each has its own: first, first + 1, ...",
        positions="chunk",
    ),
    Mistake("The keys are not rotated; call rotate before you cache them.", rotated="nothing"),
    Mistake(
        "You rotate the values, too; only keys (and queries) are rotated.", rotated="values too"
    ),
    Mistake(
        "Old keys are rotated again by every append: rotate the new ones alone.",
        rotated="old keys again",
    ),
    Mistake(
        "Your keys are rotated twice: once when they are cached, and again when they are returned.",
        rotated="twice",
    ),
    Mistake(
        "append returns all rows of the arrays, used or not; return the S that are in use.",
        result="whole",
    ),
    Mistake("append returns the new tokens only; return all tokens so far.", result="new"),
    Mistake(
        "Every append makes new arrays for all tokens so far, so S tokens cost about S^2 / 2 "
        "copied rows. Allocate both arrays once, in __init__, and return slices of them.",
        views=False,
    ),
    Mistake("rewind(n) takes back the last n tokens; it must keep the first n.", rewinds="by n"),
    Mistake("rewind does not change how many tokens the cache holds.", rewinds="not"),
    Mistake(
        "A token beyond the capacity is lost without an error, for an assignment to an empty slice "
        "does nothing: compare with the capacity first, and raise a ValueError.",
        checked=False,
    ),
    Mistake(
        "The last row is never used: refuse an append only if it ends beyond the capacity.",
        unused=1,
    ),
    Mistake(
        "After a refused append the cache counts tokens that it does not hold: check first, then "
        "change the length.",
        length_first=True,
    ),
)


# Scripts of calls --------------------------------------------------------------------------------

TABLES = ops.rope_tables(4, 64, 100.0, np.float64)


def rotate(k, positions):
    """The rotation of the cases: k (heads, T, 4)."""
    cos, sin = (table[positions] for table in TABLES)  # (T, 4)
    return ops.rotate(k, cos, sin)


def observe(answer, capacity, heads, calls):
    """Make the calls ("append", k, v) and ("rewind", n), and note what each append returns."""
    cache = answer.Cache(capacity, heads, 4, rotate)
    length, before, seen = 0, None, {}
    for i, (call, *arguments) in enumerate(calls, 1):
        if call == "rewind":
            cache.rewind(*arguments)
            length = arguments[0]
            continue
        name = f"call {i}: append {arguments[0].shape[1]} after {length} of {capacity} tokens"
        if length + arguments[0].shape[1] > capacity:
            seen[name] = {"raises": raised_by(cache, arguments)}
            continue
        length += arguments[0].shape[1]
        found = pair(cache.append(*arguments))
        seen[name] = {}
        for what, rows in zip(("keys", "values"), found):
            seen[name] |= {f"shape of {what}": np.array(rows.shape), what: rows[:, :length].copy()}
        if before is not None:
            seen[name]["views of the same arrays"] = all(map(np.may_share_memory, before, found))
        before = found
    return seen


def raised_by(cache, arguments):
    try:
        cache.append(*arguments)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def pair(found):
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(f"append must return (keys, values), got {type(found).__name__}")
    return [np.asarray(rows) for rows in found]


def cases(rng):
    """Chunks of several lengths; a cache that is full; guesses that are taken back."""
    for capacity, heads, script in (
        (4, 1, "2 1 <1 1"),  # <1: rewind(1)
        (8, 2, "3 1 2 4 2 1 <5 1"),  # the 4, and the 1 before <5, do not fit
        (9, 1, "1 1 1 <1 2 <0 2 1"),
        (8, 3, "4 3 <5 2 1"),
    ):
        yield capacity, heads, [call(word, heads, rng) for word in script.split()]


def call(word, heads, rng):
    if word[0] == "<":
        return "rewind", int(word[1:])
    shape = (heads, int(word), 4)
    return "append", rng.standard_normal(shape), rng.standard_normal(shape)


# In the model ------------------------------------------------------------------------------------


@part
class StudentCacheAttention(Attention):
    """Attention whose keys and values are kept by the student's cache."""

    Cache: object

    def store(self, k, v, layer):
        heads, d = self.kv_heads, k.shape[-1] // self.kv_heads
        cache = layer.memory.recall(self, lambda: self.Cache(layer.capacity, heads, d, self.rotate))
        rows = (split_heads(x, heads).astype(np.float64) for x in (k, v))
        layer.keys, layer.values = (x.astype(k.dtype) for x in cache.append(*rows))
        layer.count = layer.keys.shape[-2]

    def rotate(self, k, positions):
        cos, sin = self.rope.cos[positions], self.rope.sin[positions]
        return ops.rotate(k, cos, sin)


GUESSES = {"prompt_lookup": {"gamma": 4}}  # rewinds the cache after wrong guesses


def into_model(lm, answer):
    def with_cache(attention):
        parts = {field.name: getattr(attention, field.name) for field in fields(attention)}
        return StudentCacheAttention(**parts, Cache=answer.Cache)

    return swap(apply(lm, GUESSES), Attention, with_cache)


EXERCISE = Exercise(
    title="The KV cache",
    minutes=30,
    difficulty="medium",
    names=("Cache",),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed=Flawed,
    mistakes=MISTAKES,
    axes=("head", "token", "column"),
    hints=(
        "Remember one number besides the two arrays: how many tokens the cache holds. It is the "
        "position of the next token, the row where the next key goes, and all that rewind changes.",
        "With first = self.length and end = first + T, the new rows are self.keys[:, first:end], "
        "their positions np.arange(first, end), and the result is self.keys[:, :end]. Compare end "
        "with the capacity before anything else.",
    ),
    library="minitx/state.py: Layer",
    into_model=into_model,
    same_as=GUESSES,
    saves=(
        "Without a cache, each new token would need the keys and values of all tokens before it "
        "again. To put rewind to work, tokens were also guessed here (prompt lookup): wrong "
        "guesses are computed, then taken back, and so there are more multiply-adds. Exercise 16 "
        "says why guessing may pay all the same."
    ),
)
