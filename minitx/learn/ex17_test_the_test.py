"""Exercise 17: Test the test (30 minutes)

Somebody hands you a function attention(q, k, v), and says that it computes the causal attention
with grouped heads of exercise 3. Is that so? Write the test that finds out.

    test_attention(attention)      returns nothing if it is right, raises an exception if it is not

The checker calls your test with two right attentions and with eight broken ones. It must let both
right ones pass, and fail each broken one. Each broken one has one of the typical mistakes: it is a
little wrong, or wrong for some shapes or numbers only. As in pytest, a test fails by raising;
``assert`` does that:

    assert np.allclose(found, expected), "what is wrong"

A right attention computes, for each query head h and each query t,

    scores[s]   = q[h, t] . k[j, s] / sqrt(d)      for the keys s = 0, 1, ..., S - T + t
    weights     = softmax(scores)
    out[h, t]   = sum over s of weights[s] v[j, s]

    q (H, T, d),  k (K, S, d),  v (K, S, n)  ->  out (H, T, n)

where K divides H, query head h uses key head j = h // (H / K), T <= S, and n may differ from d.
Call it with such arrays of floats, and nothing else. Large scores, such as 1000 or -1000, are
allowed: the result is finite as long as the inputs are.

The two right ones do not add up in the same order, so that their results differ in the last digits,
by about 1e-16: a test with == is too strict. Your test should give the same answer each time, so
seed the random numbers that it uses: rng = np.random.default_rng(0).

What can a test look at? Values that were computed by hand. A slow version in loops, on random
inputs. Or properties, which need no expected values at all: if all keys are equal, the result is
the mean of the values that may be seen; if the last key and value change, only the last query may
notice.

    >>> def zeros(q, k, v):                   # broken: it does not even look at the values
    ...     return np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    >>> try:
    ...     test_attention(zeros)
    ... except AssertionError:
    ...     print("caught")
    caught

Source: tests by properties are those of Claessen and Hughes, "QuickCheck", ICFP 2000; to test a
test with broken programs is mutation testing, DeMillo et al., "Hints on Test Data Selection", 1978.
"""

from functools import partial

import numpy as np

from minitx import ops
from minitx.errors import MinitxError, abbreviate
from minitx.learn import ex03_attention
from minitx.learn.check import NOT_WRITTEN, verdict_on_error
from minitx.learn.exercise import Exercise
from minitx.learn.verdict import Verdict


# solution
def test_attention(attention):
    """attention(q, k, v): a function to test. Raises an exception (assert) if it is wrong."""
    rng = np.random.default_rng(0)
    H, K, T, S, d, n = 4, 2, 3, 5, 4, 6  # a cache, groups of heads, values of another width
    q, k, v = (rng.standard_normal(shape) for shape in ((H, T, d), (K, S, d), (K, S, n)))
    out = attention(q, k, v)
    assert out.shape == (H, T, n)
    for h in range(H):
        for t in range(T):
            j, seen = h // (H // K), S - T + t + 1
            exponentials = np.exp(k[j, :seen] @ q[h, t] / np.sqrt(d))
            expected = exponentials @ v[j, :seen] / exponentials.sum()
            assert np.allclose(out[h, t], expected), f"query {t} of head {h} is wrong"
    assert np.isfinite(attention(1000 * q, k, v)).all(), "large scores overflow"


# end of solution


def right(q, k, v):
    return ex03_attention.attention(q, k, v)


def right_in_another_order(q, k, v):
    """minitx's own."""
    return ops.attention(q, k, v, q.shape[-1] ** -0.5)


# What each broken one does, and when it shows. The flags are those of exercise 3's flawed version.
BROKEN = (
    (
        "It does not scale the scores.",
        "That shows if scores differ from each other.",
        dict(scale=0),
    ),
    (
        "It divides the scores by d, not by sqrt(d).",
        "That shows if scores differ from each other and d > 1.",
        dict(scale=1),
    ),
    (
        "Each query sees the key after its own, too.",
        "That shows only where there is a key after it: T > 1.",
        dict(shift=1),
    ),
    ("Each query is blind to its own key.", "That shows if its own value matters.", dict(shift=-1)),
    (
        "The queries are aligned with the first keys, not with the last ones.",
        "That shows only with a cache: T < S.",
        dict(first=True),
    ),
    (
        "Query heads use the key heads in turn (0 1 0 1), not in groups (0 0 1 1).",
        "That shows only with H > K > 1.",
        dict(heads="tile"),
    ),
    (
        "The softmax sums over the queries, not over the keys.",
        "That shows if the weights of a query are compared with what they should be.",
        dict(axis=-2),
    ),
    (
        "It does not subtract the largest score: exp overflows.",
        "That shows only with scores above 700.",
        dict(stable=False),
    ),
)


def careless(q, k, v):
    out = right(q, k, v)
    q /= q.shape[-1] ** 0.5
    return out


RARER = {  # no part of the exercise
    "sees the last 4 keys only": lambda q, k, v: right(q, k[:, -4:], v[:, -4:]),
    "returns as many columns as keys have": lambda q, k, v: right(q, k, v)[..., : k.shape[-1]],
    "changes q in place": careless,
}


# Running a test ----------------------------------------------------------------------------------


class Watched:
    """An attention under test: refuses calls that are not allowed, and notes their shapes."""

    def __init__(self, attention):
        self.attention, self.shapes = attention, []

    def __call__(self, q, k, v):
        trouble = trouble_with(q, k, v)
        if trouble is not None:
            raise NotAllowed(f"Your test calls attention with {trouble}")
        self.shapes.append((len(q), len(k), q.shape[1], k.shape[1]))
        return self.attention(q, k, v)


class NotAllowed(MinitxError):
    """A call outside of what attention has to support."""


def trouble_with(q, k, v) -> str | None:
    """What is wrong with the arguments of a call."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, np.ndarray) or x.ndim != 3 or x.dtype.kind != "f" or 0 in x.shape:
            got = (
                f"the shape {x.shape} and dtype {x.dtype}" if isinstance(x, np.ndarray) else type(x)
            )
            return f"a {name} that is no array of floats with 3 axes (it has {got})."
    (H, T, d), (K, S, e) = q.shape, k.shape
    if v.shape[:2] != (K, S) or d != e or H % K or T > S:
        return (
            f"q {q.shape}, k {k.shape} and v {v.shape}; expected (H, T, d), (K, S, d) and "
            "(K, S, n), where K divides H, and T <= S."
        )
    return None


def run(test, attention) -> tuple[Exception | None, object, list]:
    """(what the test raises, what it returns, the shapes of its calls)."""
    watched = Watched(attention)
    # A function of its own, so that its name does not tell which one it is.
    try:
        returned = test(lambda q, k, v: watched(q, k, v))
    except NotAllowed:
        raise
    except NotImplementedError as error:
        if NOT_WRITTEN in str(error):
            raise
        return error, None, watched.shapes
    except Exception as error:
        return error, None, watched.shapes
    return None, returned, watched.shapes


def judge(answer, seed) -> Verdict:
    test = answer.test_attention
    error, returned, shapes = run(test, right)
    if error is not None:
        return refused(error, "Your test refuses a right attention.")
    if not shapes:
        return Verdict("wrong", "Your test never calls the attention that it is given.")
    error, _, _ = run(test, right_in_another_order)
    if error is not None:
        return refused(
            error,
            "Your test is too strict: it refuses a right attention that adds up in another order, "
            "so that its results differ by about 1e-16. Compare with np.allclose.",
        )
    escaped = [entry for entry in BROKEN if run(test, broken(entry))[0] is None]
    if not escaped:
        return Verdict("passed", "Right.")
    return Verdict("mistake", message(escaped, returned, shapes), tuple(e[0] for e in escaped))


def broken(entry):
    return partial(ex03_attention.flawed, **entry[2])


def refused(error: Exception, what: str) -> Verdict:
    """A test that fails what is right: how it fails."""
    return Verdict("wrong", f"{what} {verdict_on_error(error).message}")


def message(escaped, returned, shapes) -> str:
    lines = [f"{len(escaped)} of the {len(BROKEN)} broken attentions pass your test:"]
    lines += [f"- {what} {shows}" for what, shows, _ in escaped]
    if returned is not None:
        lines.append(
            f"Your test returns {abbreviate(returned)}, and nobody looks at that: a test fails by "
            "raising an exception, so write assert."
        )
    different = sorted(set(shapes))
    shown = ", ".join(map(str, different[:4])) + (", ..." if len(different) > 4 else "")
    times = "once" if len(shapes) == 1 else f"{len(shapes)} times"
    lines.append(f"It calls attention {times}, with (H, K, T, S) = {shown}.")
    return "\n".join(lines)


def show(answer) -> str:
    lines = [
        f"Your test passes both right attentions (one is minitx's own) and fails all {len(BROKEN)} "
        "broken ones.",
        "",
        "Three that were no part of the exercise. Does it notice one that ...",
    ]
    for what, attention in RARER.items():
        noticed = run(answer.test_attention, attention)[0] is not None
        lines.append(f"    {what:45} {'yes' if noticed else 'no'}")
    return "\n".join(lines)


EXERCISE = Exercise(
    title="Test the test",
    minutes=30,
    difficulty="medium",
    names=("test_attention",),
    judge=judge,
    hints=(
        "A mistake shows only where it makes a difference: with one head, one query or one key, "
        "most of them make none. Take T > 1, T < S, H > K > 1, and random numbers.",
        "With q, k and v from rng.standard_normal, H = 4, K = 2, T = 3, S = 5: compute the "
        "expected row for each h and t in two loops, as the equations say, and assert np.allclose. "
        "Then call attention once more with 1000 * q and assert np.isfinite(...).all().",
    ),
    library="tests/core/ (and minitx/learn/check.py: judge tells a student's mistakes apart so)",
    show=show,
    saves=(
        "It saves debugging: every technique of minitx has a literal version in loops, and a test "
        "that both agree. The tests are tested, too, by breaking lines of the code."
    ),
)
