"""Big-little decoding as in the paper, on lists of tokens, without a KV cache.

Independent of minitx's code. A model is a function from a text (a list of tokens) to the list of
the probabilities of its next token.
"""

import math


def argmax(p):
    return max(range(len(p)), key=lambda token: (p[token], -token))


def distance(p, token):
    """How far the big model is from a draft token: the negative log-likelihood."""
    return -math.log(p[token]) if p[token] > 0 else math.inf


def draft(small, text, fallback, longest):
    """What the small model writes until it is unsure."""
    drafted = []
    while len(drafted) < longest:
        p = small(text + drafted)
        if max(p) < fallback:
            break
        drafted.append(argmax(p))
    return drafted


def decode(big, small, fallback, rollback, longest, prompt, limit):
    """(new tokens, big model passes, rollbacks)."""
    new, passes, rollbacks = [], 0, 0
    while len(new) < limit:
        drafted = []
        if new:  # the big model writes the first token
            most = min(longest, limit - len(new) - 1)
            drafted = draft(small, prompt + new, fallback, most)
        passes += 1
        good = []
        for token in drafted:
            p = big(prompt + new + good)
            if distance(p, token) > rollback and token != argmax(p):
                rollbacks += 1
                break
            good.append(token)
        new += good
        new.append(argmax(big(prompt + new)))
    return new, passes, rollbacks
