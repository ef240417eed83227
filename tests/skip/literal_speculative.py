"""Speculative decoding as the papers have it, one token and one fraction at a time.

Written from the rule and not from the fast code, with which it shares nothing. Distributions are
lists of Fractions or floats, models are functions of the text so far.
"""

from fractions import Fraction


def accept_probability(p, q, x):
    return min(Fraction(1), Fraction(p[x]) / Fraction(q[x]))


def residual(p, q):
    """norm(max(0, p - q)), or p where nothing is left."""
    rest = [max(Fraction(0), Fraction(a) - Fraction(b)) for a, b in zip(p, q)]
    total = sum(rest)
    return [r / total for r in rest] if total else [Fraction(a) for a in p]


def law_of_round(target, draft, gamma, text):
    """{tokens that one round emits: probability}. target, draft: text (tuple) -> distribution."""
    law = {}

    def emit(tokens, probability):
        if probability:
            law[tokens] = law.get(tokens, Fraction(0)) + probability

    def drafts(x, probability):
        """Every string x_1 .. x_gamma that may be drafted."""
        if len(x) < gamma:
            for token, share in enumerate(draft(text + x)):
                if share:
                    drafts((*x, token), probability * Fraction(share))
            return
        for i in range(gamma):
            p, q = target(text + x[:i]), draft(text + x[:i])
            share = accept_probability(p, q, x[i])
            for token, r in enumerate(residual(p, q)):
                emit((*x[:i], token), probability * (1 - share) * r)
            probability *= share
        for token, share in enumerate(target(text + x)):
            emit((*x, token), probability * Fraction(share))

    drafts((), Fraction(1))
    return law


def greedy(target, draft, gamma, text, limit):
    """(new tokens, rounds): target, draft: text -> the next token. A token that is drafted must be
    the target's; in each round the target gives one itself."""
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


def lookup(text, longest, k):
    """What followed the last earlier place of the last n tokens, for the largest n that has one."""
    for n in range(longest, 0, -1):
        for place in range(len(text) - n - 1, -1, -1):
            if text[place : place + n] == text[-n:]:
                return text[place + n : place + n + k]
    return []
