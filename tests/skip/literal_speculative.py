"""Speculative decoding as in the paper, one token at a time, on lists and exact fractions.

Independent of minitx's code. A distribution is a list of probabilities, one per token; a model is a
function of the text so far (a tuple of tokens) that returns the distribution of the next token.
"""

from fractions import Fraction


def accept_probability(p, q, x):
    """min(1, p(x) / q(x)): how likely it is that the draft token x is accepted."""
    return min(Fraction(1), Fraction(p[x]) / Fraction(q[x]))


def residual_distribution(p, q):
    """max(0, p - q), normalized; p if nothing is left of it."""
    excess = [max(Fraction(0), Fraction(a) - Fraction(b)) for a, b in zip(p, q)]
    total = sum(excess)
    return [e / total for e in excess] if total else [Fraction(a) for a in p]


def one_round(target, draft, gamma, text, draw):
    """The tokens of one round. ``draw(distribution)`` returns a random index."""
    x = []
    for _ in range(gamma):  # 1. the draft proposes
        x.append(draw(draft((*text, *x))))
    p = [target((*text, *x[:i])) for i in range(gamma + 1)]  # 2. the target scores: one pass
    for i in range(gamma):  # 3. accept until the first rejection
        q = draft((*text, *x[:i]))
        accept = accept_probability(p[i], q, x[i])
        if draw([1 - accept, accept]) == 0:
            return (*x[:i], draw(residual_distribution(p[i], q)))  # 4a. resample
    return (*x, draw(p[gamma]))  # 4b. one more token from the target


def round_distribution(target, draft, gamma, text):
    """{tokens of one round: probability}, the same without chance: follow every branch."""
    found = {}

    def emit(tokens, probability):
        if probability:
            found[tokens] = found.get(tokens, Fraction(0)) + probability

    def propose(x, probability):
        if len(x) < gamma:
            for token, share in enumerate(draft(text + x)):
                if share:
                    propose((*x, token), probability * Fraction(share))
            return
        for i in range(gamma):
            p, q = target(text + x[:i]), draft(text + x[:i])
            accept = accept_probability(p, q, x[i])
            for token, share in enumerate(residual_distribution(p, q)):
                emit((*x[:i], token), probability * (1 - accept) * share)
            probability *= accept
        for token, share in enumerate(target(text + x)):
            emit((*x, token), probability * Fraction(share))

    propose((), Fraction(1))
    return found


def greedy(target, draft, gamma, text, limit):
    """(new tokens, rounds) of greedy decoding. Here target and draft map a text (list) to its next
    token. A draft token is accepted if it is the target's; each round ends with the target's."""
    new, rounds = [], 0
    while len(new) < limit:
        rounds += 1
        x = []
        while len(x) < min(gamma, limit - len(new) - 1):
            x.append(draft(text + new + x))
        n = 0
        while n < len(x) and x[n] == target(text + new + x[:n]):
            n += 1
        new += x[:n] + [target(text + new + x[:n])]
    return new, rounds
