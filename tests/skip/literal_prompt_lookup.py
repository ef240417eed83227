"""Prompt lookup in plain loops, on lists of token ids."""


def prompt_lookup(text, longest, limit):
    """What followed the latest earlier occurrence of the last n tokens, for the largest n that has
    one."""
    for n in range(longest, 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                return text[start + n : start + n + limit]
    return []


def greedy(target, gamma, longest, text, limit):
    """(new tokens, rounds) of greedy decoding; ``target`` maps a text (list) to its next token. A
    looked-up token is accepted if it is the target's; each round ends with the target's."""
    new, rounds = [], 0
    while len(new) < limit:
        rounds += 1
        so_far = text + new
        x = prompt_lookup(so_far, longest, min(gamma, limit - len(new) - 1))
        n = 0
        while n < len(x) and x[n] == target(so_far + x[:n]):
            n += 1
        new += x[:n] + [target(so_far + x[:n])]
    return new, rounds
