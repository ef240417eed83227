"""Exercise 4: Sampling (20 minutes)

The model ends with V logits, one for each token of its vocabulary. Which token comes next? The
likeliest one every time (greedy decoding) gives flat texts that repeat themselves. A draw from all
V tokens now and then hits a token that makes no sense. In between, three settings shape the
distribution that the next token is drawn from:

1. Temperature: divide the logits by it, then take the softmax, p = exp(z) / sum of exp(z). Below 1,
   likely tokens become likelier; above 1, all become more equal. Temperature 0 stands for greedy
   decoding: the token with the largest logit has probability 1.
2. top_k: keep the k likeliest tokens. All others get probability 0, and the probabilities of those
   that are left are divided by their sum, so that they add up to 1 again.
3. top_p (nucleus sampling), with these new probabilities: sort the tokens by descending
   probability, and keep the fewest whose probabilities sum to at least top_p. So the token with
   which the sum reaches top_p is kept. Again, the others get 0 and those left are divided by their
   sum.

    logits       (V,)
    temperature  >= 0
    top_k        an integer >= 1; V or more keeps all tokens
    top_p        above 0, at most 1; 1 keeps all tokens
    result       (V,)  probabilities in the order of the logits, which sum to 1

By hand: the logits are log 1, log 4, log 3, log 2, so at temperature 1 the probabilities are 0.1,
0.4, 0.3, 0.2. top_k = 3 drops the first token; the others, divided by 0.9, are 0.444, 0.333, 0.222.
With top_p = 0.5, the likeliest token alone (0.444) does not reach 0.5. With the next one the sum is
0.778, so these two are kept: 0.444 / 0.778 = 0.571 and 0.333 / 0.778 = 0.429.

    >>> logits = np.log([1.0, 4.0, 3.0, 2.0])
    >>> probabilities(logits, 1.0, 3, 0.5).round(3).tolist()
    [0.0, 0.571, 0.429, 0.0]

Two pitfalls: logits can be large, and exp(1000) is infinite in float64; subtracting the
largest logit from all of them changes nothing in the softmax. Sums of floats are rounded: ten
times 0.1 add up to 0.9999999999999999, which does not reach top_p = 1. No two logits are equal.

Sources: Fan, Lewis and Dauphin, "Hierarchical Neural Story Generation", ACL 2018 (top-k); Holtzman
et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (top-p).
"""

from dataclasses import replace

import numpy as np

import minitx
from minitx.decode import Sampler, TokenLoop
from minitx.lab.layout import table
from minitx.learn.exercise import Exercise, Mistake
from minitx.tree import Part, part


# solution
def probabilities(logits, temperature, top_k, top_p):
    """logits (V,), temperature, top_k, top_p -> (V,): what the next token is drawn from."""
    if temperature == 0:
        return np.eye(logits.size)[logits.argmax()]
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p)  # the likeliest token first
    p[order[top_k:]] = 0
    p /= p.sum()
    likelier = np.cumsum(p[order]) - p[order]  # the sum of all that come before it in the order
    p[order[likelier >= top_p]] = 0  # never the first one: nothing comes before it
    return p / p.sum()


# end of solution


def in_loops(logits, temperature, top_k, top_p):
    """Step by step, token by token."""
    V = len(logits)
    p = np.zeros(V)
    ranked = sorted(range(V), key=lambda token: -logits[token])
    if temperature == 0:
        p[ranked[0]] = 1
        return p
    kept = ranked[:top_k]
    for token in kept:
        p[token] = np.exp((logits[token] - logits[ranked[0]]) / temperature)
    p = p / sum(p[token] for token in kept)
    if top_p < 1:
        total, nucleus = 0.0, []
        for token in kept:
            nucleus.append(token)
            total += p[token]
            if total >= top_p:
                break
        for token in kept:
            p[token] = p[token] / total if token in nucleus else 0
    return p


def flawed(
    logits,
    temperature,
    top_k,
    top_p,
    *,
    greedy=True,
    temper="divide",
    dropped="-inf",
    stable=True,
    ranking=-1,
    between=True,
    nucleus="right",
    end=True,
    in_order=True,
    early=False,
):
    if temperature == 0 and greedy:
        return np.eye(logits.size)[logits.argmax()]
    z = {"divide": logits / temperature, "multiply": logits * temperature, "ignore": logits}[temper]
    p = exponentials = softmax(z, stable)
    if early:
        p = softmax(logits, stable)
    order = np.argsort(ranking * p)
    p[order[top_k:]] = 0
    p = p / p.sum() if between else p
    if dropped == "0":
        z[order[top_k:]] = 0
        p = softmax(z, stable)
        order = np.argsort(ranking * p)
    p[order[~in_nucleus(p[order], top_p, nucleus)]] = 0
    p = p / p.sum() if end else p
    if early:
        p = np.where(p > 0, exponentials, 0)
        p = p / p.sum() if end else p
    return p if in_order else p[order]


def softmax(z, stable):
    e = np.exp(z - z.max() if stable else z)
    return e / e.sum()


def in_nucleus(p, top_p, nucleus):
    """Which of the probabilities, given in descending order, are kept."""
    total = np.cumsum(p)
    if nucleus == "right":
        return total - p < top_p
    if nucleus == "one more":
        return np.append([True], (total - p < top_p)[:-1])
    if nucleus == "until found":
        return np.arange(p.size) <= np.argmax(total >= top_p)
    kept = total <= top_p
    kept[0] |= nucleus == "without the last, if there are two"
    return kept


MISTAKES = (
    Mistake("At temperature 0 you divide by 0: return 1 for the largest logit.", greedy=False),
    Mistake("You multiply the logits by the temperature; divide them by it.", temper="multiply"),
    Mistake("The temperature is ignored: divide the logits by it.", temper="ignore"),
    Mistake(
        "exp overflows when logits are large: subtract the largest logit from all of them first.",
        stable=False,
    ),
    Mistake(
        "A logit of 0 does not drop a token, for exp(0) is 1: give it the logit -inf, or the "
        "probability 0.",
        dropped="0",
    ),
    Mistake(
        "You keep the least likely tokens: np.argsort sorts in ascending order, so sort -p, or "
        "reverse the result.",
        ranking=1,
    ),
    Mistake(
        "For top_p you add up the probabilities from before top_k. First drop what top_k drops and "
        "divide the others by their sum; then add these up.",
        between=False,
    ),
    Mistake(
        "You drop the token with which the sum reaches top_p. It must be kept, otherwise those "
        "left have less than top_p, and there may be none left.",
        nucleus="without the last",
    ),
    Mistake(
        "Unless there is only one, you drop the token with which the sum reaches top_p; it must be "
        "kept.",
        nucleus="without the last, if there are two",
    ),
    Mistake(
        "You keep one token too many: stop as soon as the sum reaches top_p.", nucleus="one more"
    ),
    Mistake(
        "With top_p = 1 you keep only the first token if the rounded sum of all never reaches 1: "
        "np.argmax of an array without any True is 0.",
        nucleus="until found",
    ),
    Mistake("The result does not sum to 1: divide by the sum after top_p, too.", end=False),
    Mistake(
        "The probabilities are in sorted order: put each one back at the index of its token.",
        in_order=False,
    ),
    Mistake(
        "You choose tokens by the probabilities at temperature 1: divide by the temperature before "
        "top_k and top_p.",
        early=True,
    ),
)


def cases(rng):
    """Cuts by top_k, by top_p and by both; large logits; greedy; and a sum that is rounded."""
    for V, temperature, top_k, top_p in (
        (6, 0.5, 6, 0.8),
        (8, 5.0, 4, 0.7),
        (5, 0.7, 2, 0.99),
        (9, 1.5, 20, 0.3),
    ):
        steps = rng.uniform(0.5, 1, V).cumsum()  # no two are nearly equal
        yield rng.permutation(steps) - 2, temperature, top_k, top_p
    yield 1000 + rng.standard_normal(4), 1.0, 4, 0.9
    yield np.array([0.0, 9.0, 1.0]), 1.0, 3, 0.5  # the first one is enough
    yield rng.standard_normal(5), 0.0, 5, 1.0
    for step in (0.42, 0.66, 0.97):  # the rounded sum of the probabilities is below 1
        yield step * np.arange(10), 1.0, 10, 1.0


# In the model ------------------------------------------------------------------------------------


class StudentSampler(Sampler):
    """A sampler whose distribution is computed by the student's function."""

    def __init__(self, choose: Sampler, probabilities):
        super().__init__(choose.temperature, choose.top_k, choose.top_p, choose.seed)
        self.function = probabilities

    def probabilities(self, logits):
        top_k = self.top_k or logits.size
        wide = logits.astype(np.float64)
        return np.asarray(self.function(wide, self.temperature, top_k, self.top_p or 1.0))


@part
class StudentLoop(TokenLoop):
    """A decoding loop with the student's sampler."""

    inner: Part
    probabilities: object

    def __call__(self, model, state, ids, choose, limit):
        choose = StudentSampler(choose, self.probabilities)
        return self.inner(model, state, ids, choose, limit)


def into_model(lm, answer):
    return replace(lm, decode=StudentLoop(lm.decode, answer.probabilities))


# What it shows -----------------------------------------------------------------------------------

PROMPT = "Once upon a time, there was a little"
SETTINGS = ((1.0, None, 1.0), (0.5, None, 1.0), (1.0, 3, 1.0), (1.0, None, 0.6))


def show(answer):
    """The likeliest next tokens, and how likely they are in each setting."""
    lm = minitx.load("stories")
    ids = lm.encode(PROMPT)
    logits = lm.logits(ids)[-1].astype(np.float64)
    columns = [
        np.asarray(answer.probabilities(logits.copy(), temperature, top_k or logits.size, top_p))
        for temperature, top_k, top_p in SETTINGS
    ]
    rows = [[f"after: {PROMPT}", "temp. 1", "temp. 0.5", "top_k 3", "top_p 0.6"]]
    for token in np.argsort(-logits)[:6]:
        word = repr("".join(lm.pieces([int(token)], ids[-1])))
        rows.append([word, *(f"{p[token]:.3f}" for p in columns)])
    rows.append(["tokens that are left", *(str(np.count_nonzero(p)) for p in columns)])
    return table(rows)


EXERCISE = Exercise(
    title="Sampling",
    minutes=20,
    difficulty="medium",
    names=("probabilities",),
    cases=lambda rng: list(cases(rng)),
    flawed=flawed,
    mistakes=MISTAKES,
    axes=("token",),
    hints=(
        "order = np.argsort(-p) lists the tokens from the likeliest on. p[order] are their "
        "probabilities in descending order, and p[order[k:]] = 0 drops all but the first k.",
        "For top_p, look at what the tokens before each one add up to: np.cumsum(p[order]) - "
        "p[order], which is 0 for the first. A token is kept as long as that is below top_p; this "
        "keeps the one with which the sum reaches top_p, and needs no care about rounding.",
    ),
    library="minitx/decode.py: Sampler",
    into_model=into_model,
    show=show,
    saves=(
        "Speculative decoding (exercise 16) must sample from exactly this distribution, whatever "
        "the draft model proposes."
    ),
)
