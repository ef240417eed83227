"""Exercise 24: Big-little decoding's rollback (25 minutes)

A small model writes as long as it is confident, and so it has drafted m tokens. Now the big model
verifies them in one pass. It accepts tokens that it would not write itself, and rejects only what
it finds very unlikely. Where must the text roll back to, and which token comes next?

P[i] is the big model's distribution at the position of drafted[i], given all drafted tokens before
it. P has one row more than there are drafted tokens: P[m] is its distribution after all of them.

    P          (m + 1, V)   each row sums to 1
    drafted    (m,)         integers from 0 to V - 1; m may be 0
    threshold  a number above 0, in nats

A drafted token is far if it is unlikely, and not what the big model would write itself:

    far(i)  =  -ln P[i, drafted[i]] > threshold   and   drafted[i] != argmax P[i]

ln is the natural logarithm. The second condition avoids useless work: the big model would replace
the token by the same token.

    result (kept, token):
    if some token is far, take the first one, i:    kept = i,  token = argmax P[i]
    if no token is far:                             kept = m,  token = argmax P[m]

So the first ``kept`` tokens of the draft stay, one token of the big model follows, and everything
after it is forgotten: it continues a rejected token. (No two numbers of a row are equal in the
checks, so the argmax has no ties.)

By hand, with threshold 2: the draft is 0, 2, 1.

    P[0] = [0.7  0.2  0.1 ]   token 0: -ln 0.7  = 0.36, not far
    P[1] = [0.9  0.04 0.06]   token 2: -ln 0.06 = 2.81, above 2, and the argmax is 0: far
    P[2] = [0.3  0.5  0.2 ]   does not matter any more
    P[3] = [0.2  0.1  0.7 ]

The text rolls back to the first token and goes on with 0. With threshold 3, no token is far: all 3
stay, and 2 follows, the argmax of P[3].

    >>> P = np.array([[0.7, 0.2, 0.1], [0.9, 0.04, 0.06], [0.3, 0.5, 0.2], [0.2, 0.1, 0.7]])
    >>> kept, token = roll_back(P, np.array([0, 2, 1]), 2.0)
    >>> int(kept), int(token)
    (1, 0)
    >>> kept, token = roll_back(P, np.array([0, 2, 1]), 3.0)
    >>> int(kept), int(token)
    (3, 2)

Source: Kim et al., "Speculative Decoding with Big Little Decoder", NeurIPS 2023.
"""

import numpy as np

import minitx
from minitx.learn.exercise import Exercise, Mistake
from minitx.learn.verdict import Verdict
from minitx.ops import softmax
from minitx.technique import apply


# solution
def roll_back(P, drafted, threshold):
    """P (m + 1, V), drafted (m,), threshold in nats -> (kept, token), two integers"""
    m = len(drafted)
    surprise = -np.log(P[np.arange(m), drafted])  # (m,)
    best = P.argmax(axis=1)  # (m + 1,)
    far = (surprise > threshold) & (drafted != best[:m])
    kept = int(far.argmax()) if far.any() else m  # argmax: the first True
    return kept, int(best[kept])


# end of solution


def in_loops(P, drafted, threshold):
    """The rule, token by token."""
    for i, x in enumerate(drafted):
        best = max(range(P.shape[1]), key=lambda y: P[i, y])
        if P[i, x] < np.exp(-threshold) and x != best:
            return i, best
    m = len(drafted)
    return m, max(range(P.shape[1]), key=lambda y: P[m, y])


def flawed(
    P,
    drafted,
    threshold,
    *,
    measure="nats",
    above=True,
    exempt=True,
    which="first",
    keeps_it=False,
    replacement="here",
    bonus_row=0,
    late=False,
):
    m = len(drafted)
    chances = P[np.arange(m) + late, drafted]
    surprise = {
        "nats": -np.log(chances),
        "bits": -np.log2(chances),
        "digits": -np.log10(chances),
        "sum": np.cumsum(-np.log(chances)),
        "probability": -chances,
        "none": np.full(m, np.inf),
    }[measure]
    limit = -threshold if measure == "probability" else threshold
    unlikely = surprise > limit if above else surprise < limit
    differs = drafted != P[:m].argmax(1)
    far = np.flatnonzero(unlikely & differs if exempt else unlikely)
    if which == "only the first" and unlikely.any() and not differs[unlikely.argmax()]:
        far = far[:0]
    if not len(far):
        return m, int(P[max(m - bonus_row, 0)].argmax())
    worst = far[surprise[far].argmax()]
    i = int({"last": far[-1], "worst": worst}.get(which, far[0]))
    row = {"here": i, "next": i + 1, "end": m}[replacement]
    return i + keeps_it, int(P[row].argmax())


MISTAKES = (
    Mistake(
        "You roll back at a token that is the big model's own argmax. It would write the same "
        "token again: skip those.",
        exempt=False,
    ),
    Mistake(
        "You look at the first unlikely token only. If that is the argmax, it stays, but the "
        "tokens after it must be tested, too.",
        which="only the first",
    ),
    Mistake("You take the last far token; the text rolls back to the first one.", which="last"),
    Mistake(
        "You take the least likely token; the text rolls back to the first far one.", which="worst"
    ),
    Mistake(
        "The comparison is upside down: a token is far if -ln P is above the threshold.",
        above=False,
    ),
    Mistake(
        "You compare the probability with the threshold. Compare -ln P: the threshold is in nats.",
        measure="probability",
    ),
    Mistake(
        "You replace every token that is not the argmax. It may stay if -ln P is not above the "
        "threshold.",
        measure="none",
    ),
    Mistake("Your logarithm has the base 2; nats need the natural one, np.log.", measure="bits"),
    Mistake("Your logarithm has the base 10; nats need the natural one, np.log.", measure="digits"),
    Mistake(
        "You add up -ln P over the tokens so far. Each token is tested by itself.", measure="sum"
    ),
    Mistake("You keep the far token, too. It must go: kept = i, not i + 1.", keeps_it=True),
    Mistake(
        "The far token is replaced by the argmax of the row after it; its own row is P[i].",
        replacement="next",
    ),
    Mistake(
        "After a rollback the token must come from P[i]. You take it from P[m], which was computed "
        "for the text with all drafted tokens.",
        replacement="end",
    ),
    Mistake(
        "If no token is far, the next token comes from P[m], the last row, not from P[m - 1].",
        bonus_row=1,
    ),
    Mistake(
        "You look up drafted[i] in P[i + 1]. Row i is the distribution at the place of drafted[i].",
        late=True,
    ),
)


# Kinds of rows; whether drafted[1] is drafted[0], so that P[1] finds it likely, too; the threshold.
ORDERS = (
    ("near sure close odd far further furthest sure far", True, 1.2),
    ("close sure odd", False, 1.2),
    ("", False, 1.2),
    ("far sure odd further", True, 1.2),
    ("close sure", False, 0.3),
)
KINDS = {  # the probabilities of the drafted token, and of the likeliest other one
    "sure": (0.6, 0.2),
    "near": (0.46, 0.5),
    "close": (0.35, 0.4),  # the threshold 1.2 is at exp(-1.2) = 0.3
    "odd": (0.26, 0.2),  # unlikely, but the argmax
    "far": (0.1, 0.5),
    "further": (0.02, 0.5),
    "furthest": (0.005, 0.5),
}


def cases(rng):
    for kinds, twice, threshold in ORDERS:
        V, kinds = int(rng.integers(6, 9)), kinds.split()
        drafted = rng.integers(0, V, len(kinds))
        drafted[1:2] = (drafted[:1] + (not twice)) % V
        last = (drafted[-1] + 1) % V if len(drafted) else 0  # not the argmax of the row before
        kinds, tokens = [*kinds, "sure"], [*drafted, last]
        P = np.array([row(rng, V, x, *KINDS[kind]) for x, kind in zip(tokens, kinds)])
        yield P, drafted, threshold * float(rng.uniform(0.97, 1.03))


def row(rng, V: int, x: int, own: float, best: float) -> np.ndarray:
    """A distribution (V,) in which x and the likeliest other token have these probabilities."""
    others = rng.permutation([y for y in range(V) if y != x])
    p = np.empty(V)
    rest = 1 - own - best
    shares = 1 + rng.uniform(-0.1, 0.1, V - 2)
    p[others[1:]] = rest * shares / shares.sum()
    p[x], p[others[0]] = own, best
    return p


def explain(case, found, expected) -> Verdict:
    P, drafted, threshold = case
    try:
        kept, token = (int(value) for value in found)
    except (TypeError, ValueError):
        return Verdict("form", f"Expected two integers (kept, token), got {found!r}."[:200])
    nats = [round(float(-np.log(P[i, x])), 2) for i, x in enumerate(drafted)]
    return Verdict(
        "wrong",
        f"With threshold {threshold:.2f}, drafted = {drafted.tolist()}, their -ln P = {nats}, and "
        f"the argmax of each row of P = {P.argmax(1).tolist()}, expected (kept, token) = "
        f"{(int(expected[0]), int(expected[1]))}, got {(kept, token)}.",
    )


# In the model ------------------------------------------------------------------------------------

PROMPT, NEW = "Once upon a time", 48


def write(lm, answer, threshold: float) -> tuple[list[int], int, int]:
    """(the new tokens, passes of the big model, rollbacks): the small model drafts 10 tokens at a
    time however unsure it is, and the student's function decides what stays."""
    little = apply(lm, {"big_little": {"fallback": 0.0, "rollback": threshold}}).decode
    text = lm.encode(PROMPT)
    begun, end = len(text), len(text) + NEW
    state, small_state = lm.model.new_state(), little.small.new_state()
    text.append(lm.model.next_argmax(text, state))
    passes, rollbacks = 1, 0
    while len(text) < end:
        longest = min(little.longest, end - len(text) - 1)  # the big model adds a token
        drafted = little.draft(text, longest, small_state)
        logits = lm.model([text[-1], *drafted], state)
        P = softmax(logits.astype(np.float64))  # (m + 1, V)
        kept, token = answer.roll_back(P, np.array(drafted, int), threshold)
        text += [*drafted[: int(kept)], int(token)]
        state.rewind(len(text) - 1)
        small_state.rewind(min(small_state.position, len(text) - 1))
        passes, rollbacks = passes + 1, rollbacks + (kept < len(drafted))
    return text[begun:], passes, rollbacks


def show(answer) -> str:
    lm = minitx.load("stories")
    alone = list(lm.tokens(PROMPT, NEW))
    lines = [
        "With your roll_back, `stories-draft` drafts 10 tokens at a time, and `stories` checks "
        f"them. {NEW} tokens after {PROMPT!r}:",
        "",
        "threshold   passes of stories   rollbacks   tokens as stories alone",
    ]
    for threshold in (0.69, 5.0):
        tokens, passes, rollbacks = write(lm, answer, threshold)
        same = sum(a == b for a, b in zip(tokens, alone))
        lines.append(f"{threshold:9}   {passes:17}   {rollbacks:9}   {same:17} of {NEW}")
    lines += ["", PROMPT + lm.tokenizer.decode(tokens)]
    lines += [
        "",
        "Below ln 2 = 0.693 the text is always that of the big model: a token that stays has P > "
        "1/2 then, so it is the argmax.",
    ]
    return "\n".join(lines)


EXERCISE = Exercise(
    title="Big-little decoding's rollback",
    minutes=25,
    difficulty="medium",
    names=("roll_back",),
    cases=lambda rng: list(cases(rng)),
    explain=explain,
    flawed=flawed,
    mistakes=MISTAKES,
    hints=(
        "Go through the drafted tokens from the first to the last. Two questions for each: how "
        "surprising is it to the big model, and would the big model have written it, too? The "
        "first far one ends the search.",
        "P[i, drafted[i]] is the probability to test; -np.log of it is in nats. In a loop, return "
        "(i, P[i].argmax()) at the first i with -np.log(P[i, x]) > threshold and x != "
        "P[i].argmax(); after the loop return (m, P[m].argmax()).",
    ),
    library="minitx/skip/big_little.py: first_far",
    show=show,
    saves=(
        "It saves passes of the big model, and so bytes of weights. Unlike the rule of exercise 16 "
        "it is not exact: the threshold says how far the text may stray."
    ),
)
