"""Self-speculative decoding in plain loops, without any KV cache.

The model is given in two halves. ``early(text)`` returns h[E], the hidden state of the text's last
token after the first E layers. ``exit(h)`` is the draft's guess from it: the next token and its
probability. ``late(states)`` runs the other layers on the h[E] of a whole text and returns the
model's next token after each of its tokens.
"""


def greedy(early, exit, late, gamma, stop, text, limit):
    """(new tokens, rounds, draft tokens) of greedy decoding."""
    new, rounds, drafted = [], 0, 0
    while len(new) < limit:
        seen, x = text + new, []
        states = [early(seen[: i + 1]) for i in range(len(seen))]
        while len(x) < min(gamma, limit - len(new) - 1):  # 1. the first layers propose
            token, probability = exit(states[-1])
            x.append(token)
            states.append(early(seen + x))  # saved: the verification goes on from it
            if probability < stop:
                break
        best = late(states)[len(seen) - 1 :]  # 2. the other layers score: one pass
        n = 0
        while n < len(x) and x[n] == best[n]:  # 3. accept until the first rejection
            n += 1
        new += x[:n] + [best[n]]  # 4. one more token from the model
        rounds += 1
        drafted += len(x)
    return new, rounds, drafted
