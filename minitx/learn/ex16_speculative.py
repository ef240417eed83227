"""Exercise 16: Speculative decoding (40 minutes)

A small draft model has proposed g tokens, one after the other. The large target model has read all
of them in one pass. How many may we keep, so that the text is distributed exactly as if the target
had written it alone?

Row i of q is the distribution that drafted[i] was drawn from. Row i of p is the target's
distribution at the same position. p has one row more: p[g] is the target's distribution after all g
tokens.

    p        (g + 1, V)   each row sums to 1
    q        (g, V)       each row sums to 1
    drafted  (g,)         integers from 0 to V - 1; q[i, drafted[i]] > 0; g may be 0
    rng                   a NumPy random generator
    tokens                a list of 1 to g + 1 integers

For i = 0, 1, ..., g - 1, with x = drafted[i]:

    accept x with probability min(1, p[i, x] / q[i, x])         and go on with the next i
    otherwise draw the last token of this round from the residual distribution

        max(0, p[i] - q[i])  divided by its sum

    and stop: the later proposals continue a token that was rejected.

If all g tokens were accepted, draw one more from p[g] (the bonus token). So a round always ends
with a token that the target has drawn.

Use two methods of rng, and no others: rng.random() returns a number between 0 and 1, so that
rng.random() < a is true with probability a; rng.choice(V, p=probabilities) returns one of 0, 1,
..., V - 1. Random answers cannot be compared number by number. The checker computes the exact
probability of each list of tokens instead: it calls your function once for every way in which the
draws can end.

By hand: V = 2, p[0] = [0.6, 0.4], q[0] = [0.9, 0.1], and the draft drew 0. It is accepted with
probability 0.6 / 0.9 = 2/3. The residual is max(0, [-0.3, 0.3]) = [0, 0.3], divided by its sum
[0, 1]: after a rejection the token is always 1. And does the rule keep the target's distribution?
The draft draws 0 with probability 0.9, so the first token is 0 with probability 0.9 * 2/3 = 0.6:
just what p says.

    >>> p = np.array([[0.6, 0.4], [0.0, 1.0]])
    >>> q = np.array([[0.9, 0.1]])
    >>> rng = np.random.default_rng(0)
    >>> rounds = [accept(p, q, np.array([0]), rng) for _ in range(3000)]
    >>> sorted({tuple(tokens) for tokens in rounds})
    [(0, 1), (1,)]
    >>> float(np.mean([tokens[0] == 0 for tokens in rounds]).round(1))    # 2/3
    0.7

Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023.
"""

from itertools import islice

import numpy as np

import minitx
from minitx.decode import Sampler, prefill
from minitx.learn.exact import exact_distribution
from minitx.learn.exercise import Exercise, Mistake
from minitx.learn.verdict import Verdict
from minitx.shared.draft_and_verify import one_hot
from minitx.technique import apply


# solution
def accept(p, q, drafted, rng):
    """p (g + 1, V), q (g, V), drafted (g,), a random generator -> a list of 1 to g + 1 tokens"""
    tokens = []
    for p_i, q_i, x in zip(p, q, drafted):
        if rng.random() < p_i[x] / q_i[x]:
            tokens.append(int(x))
        else:
            residual = np.maximum(p_i - q_i, 0)
            new = rng.choice(len(residual), p=residual / residual.sum())
            return [*tokens, int(new)]
    return [*tokens, int(rng.choice(p.shape[1], p=p[-1]))]


# end of solution


def in_loops(p, q, drafted, rng):
    """The rule, number by number."""
    tokens = []
    g, V = q.shape
    for i in range(g):
        x = int(drafted[i])
        if p[i, x] >= q[i, x] or rng.random() < p[i, x] / q[i, x]:
            tokens.append(x)
            continue
        residual = [max(0.0, p[i, y] - q[i, y]) for y in range(V)]
        total = sum(residual)
        tokens.append(int(rng.choice(V, p=[value / total for value in residual])))
        return tokens
    tokens.append(int(rng.choice(V, p=[p[g, y] for y in range(V)])))
    return tokens


def flawed(
    p,
    q,
    drafted,
    rng,
    *,
    ratio="p/q",
    residual="p-q",
    normalized=True,
    keep_rejected=False,
    stop=True,
    bonus="if all",
):
    tokens, rejected = [], False
    for i, x in enumerate(drafted.tolist()):
        a, b = p[i, x], q[i, x]
        chance = {"p/q": a / b, "q/p": b / a, "p": a, "p>=q": float(a >= b), "1-p/q": 1 - a / b}
        if rng.random() < chance[ratio]:
            tokens.append(x)
            continue
        rejected = True
        r = {"p-q": p[i] - q[i], "p": p[i], "q-p": q[i] - p[i]}[residual]
        r = np.maximum(r, 0)
        new = rng.choice(r.size, p=r / r.sum() if normalized else r)
        tokens += [x, int(new)] if keep_rejected else [int(new)]
        if stop:
            break
    if bonus == "always" or (bonus != "never" and not rejected):
        row = len(drafted) - (bonus == "p[g-1]")
        tokens.append(int(rng.choice(p.shape[1], p=p[row])))
    return tokens


MISTAKES = (
    Mistake(
        "After a rejection you draw from p[i]. Tokens that the draft likes come too often then: "
        "draw from max(0, p[i] - q[i]), divided by its sum.",
        residual="p",
    ),
    Mistake(
        "You accept only if p >= q. A token with p < q must be accepted sometimes, too: with "
        "probability p / q.",
        ratio="p>=q",
    ),
    Mistake("The ratio is upside down: accept with probability p / q, not q / p.", ratio="q/p"),
    Mistake(
        "You accept with probability p. It must be p / q, since q has already decided how often "
        "the token is proposed.",
        ratio="p",
    ),
    Mistake(
        "You go on after a rejection. The later proposals followed a token that is not in the "
        "text: return at once.",
        stop=False,
        bonus="always",
    ),
    Mistake(
        "The bonus token is missing: if all proposals were accepted, draw one more from p[g].",
        bonus="never",
    ),
    Mistake(
        "You add a bonus token after a rejection, too. The round ends with the token that replaces "
        "the rejected one.",
        bonus="always",
    ),
    Mistake(
        "The residual does not sum to 1: divide max(0, p[i] - q[i]) by its sum.", normalized=False
    ),
    Mistake(
        "The rejected token is still in your list; its replacement stands instead of it.",
        keep_rejected=True,
    ),
    Mistake(
        "The residual is the wrong way round: max(0, p[i] - q[i]), the tokens that the draft "
        "proposes too rarely.",
        residual="q-p",
    ),
    Mistake(
        "You reject where you should accept: rng.random() < a is true with probability a.",
        ratio="1-p/q",
    ),
    Mistake(
        "The bonus token is drawn from p[g - 1]; the distribution after all g tokens is p[g], the "
        "last row.",
        bonus="p[g-1]",
    ),
)


def cases(rng):
    """First one with few outcomes: the checker is done with most explanations there. Then larger
    ones, one without proposals, and one in which p equals q."""
    yield np.array([[0.3, 0.7], [0.0, 1.0]]), np.array([[0.6, 0.4]]), np.array([0])
    for g, V in ((2, 3), (3, 3)):
        p, q = rng.dirichlet(np.ones(V), g + 1), np.empty((g, V))
        drafted = rng.integers(0, V, g)
        for i, x in enumerate(drafted):  # the draft prefers tokens 0 and 2, the target token 1
            p[i] = 0.5 * p[i] + 0.5 / V
            q[i] = p[i] * rng.uniform(0.4, 0.8, V)  # so that the residual has several tokens
            q[i, x if i % 2 == 0 else x - 1] += 1 - q[i].sum()
        yield p, q, drafted
    yield rng.dirichlet(np.ones(3), 1), np.empty((0, 3)), np.empty(0, int)
    p = rng.dirichlet(np.ones(3), 2)
    yield p, p[:1].copy(), rng.integers(0, 3, 1)


# The distribution of what it returns -------------------------------------------------------------


def observe(answer, p, q, drafted):
    """{tokens: probability} of every list of tokens, or a sentence about a result that is none."""
    V, g = p.shape[1], len(drafted)
    odd = []

    def run(rng):
        tokens = answer.accept(p, q, drafted, rng)
        trouble = trouble_with(tokens, g, V)
        odd.extend([trouble] * (trouble is not None))
        return () if trouble else tuple(int(x) for x in tokens)

    found = exact_distribution(run)
    return odd[0] if odd else dict(sorted(found.items()))


def trouble_with(tokens, g: int, V: int) -> str | None:
    """What is wrong with the form of a result. (Too few or too many tokens is a mistake, no
    form.)"""
    if tokens is None:
        return "Your function returns None; is there a return missing?"
    expected = f"Expected a list of integers from 0 to {V - 1}, got "
    if not isinstance(tokens, (list, tuple, np.ndarray)):
        return f"{expected}{tokens!r}."[:200]
    for x in tokens:
        if not isinstance(x, (int, np.integer)) or not 0 <= x < V:
            return f"{expected}{x!r} in it."[:200]
    return None


def explain(case, found, expected) -> Verdict:
    """The list of tokens whose probability is wrong by most."""
    if isinstance(found, str):
        return Verdict("form", found)
    p, q, drafted = case
    wrong = {k: found.get(k, 0) - expected.get(k, 0) for k in {*found, *expected}}
    tokens = max(sorted(wrong), key=lambda k: abs(wrong[k]))
    return Verdict(
        "wrong",
        f"Your function returns {[*tokens]} with probability {found.get(tokens, 0):.4f}; expected "
        f"{expected.get(tokens, 0):.4f}. The draft proposed {drafted.tolist()}, with the target's "
        f"probabilities {chances(p, drafted)} and the draft's {chances(q, drafted)}. (All draws "
        "must come from rng; np.random is not followed.)",
    )


def chances(p, drafted) -> str:
    return str([round(float(p[i, x]), 4) for i, x in enumerate(drafted)])


# In the model ------------------------------------------------------------------------------------

PROMPT, NEW, PROPOSED = "Once upon a time", 48, 4


def write(lm, answer, temperature: float) -> tuple[list[int], int, int]:
    """(the new tokens, passes of the target, proposals accepted): speculative decoding in which the
    student's function decides, with a real random generator of NumPy."""
    rng, sampler = np.random.default_rng(0), Sampler(temperature)
    text = lm.encode(PROMPT)
    begun, end, passes, accepted = len(text), len(text) + NEW, 0, 0
    state = lm.model.new_state()
    prefill(lm.model, text, state)
    draft = apply(lm, {"speculative": {"gamma": PROPOSED, "stop": 0}}).decode.draft
    drafting = draft.begin(lm.model, state)
    while len(text) < end:
        wanted = min(PROPOSED, end - len(text) - 1)  # the target adds one
        proposals = list(islice(drafting.propose(text, sampler), wanted))
        drafted = [proposal.x for proposal in proposals]
        p = np.array([sampler.probabilities(row) for row in drafting.score([text[-1], *drafted])])
        rows = [one_hot(x, p.shape[1]) if q is None else q for x, q, _ in proposals]
        q = np.array(rows).reshape(len(drafted), p.shape[1])
        new = [int(x) for x in answer.accept(p, q, np.array(drafted, int), rng)]
        text += new
        drafting.rewind(len(text) - 1)  # forget the rejected tokens
        passes, accepted = passes + 1, accepted + len(new) - 1
    return text[begun:], passes, accepted


def show(answer) -> str:
    lm = minitx.load("stories")
    greedy, _, _ = write(lm, answer, 0)
    alike = greedy == list(lm.tokens(PROMPT, NEW))
    sampled, passes, accepted = write(lm, answer, 0.8)
    return "\n".join(
        [
            "With your accept, `stories-draft` proposes, `stories` verifies, and they write (at "
            "temperature 0.8):",
            "",
            PROMPT + lm.tokenizer.decode(sampled),
            "",
            f"{passes} passes of `stories` instead of {NEW}; {accepted} of the {NEW} tokens were "
            "proposed by the draft.",
            "Greedy decoding is a special case: p and q are 1 at one token each. There your text "
            + (
                "is that of `stories` alone, token by token."
                if alike
                else "is another one, though!"
            ),
        ]
    )


EXERCISE = Exercise(
    title="Speculative decoding",
    minutes=40,
    difficulty="hard",
    names=("accept",),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    explain=explain,
    flawed=flawed,
    mistakes=MISTAKES,
    hints=(
        "Go through the proposals with a for loop. Something with probability a happens if "
        "rng.random() < a; a may be above 1, then it always happens. A return inside the loop ends "
        "the round.",
        "Inside the loop: if rng.random() < p[i, x] / q[i, x], append x. Otherwise compute r = "
        "np.maximum(p[i] - q[i], 0), draw from r / r.sum() with rng.choice, and return what was "
        "accepted with that token at the end. After the loop draw from p[g].",
    ),
    library="minitx/shared/draft_and_verify.py: accept_or_resample",
    show=show,
    saves=(
        "It saves passes of the target: one pass per round instead of one per token. Decoding "
        "reads all weights in each pass, so that is what takes the time."
    ),
)
