"""Lookahead decoding in plain loops, each guess by itself. Independent of minitx's code.

``next_token`` maps a text (a list of tokens) to its greedy next token. levels[j][c] is the window's
guess of the token c + j after the last one; levels[0][0] is not used.
"""


def lookahead(next_token, text, levels, N, G, limit):
    """(new tokens, how many of them each pass gave, the pool of n-grams at the end)."""
    new, gains, pool = [], [], {}
    while len(new) < limit:
        now = text + new
        room = limit - len(new) - 1  # guesses that may be accepted
        fitting = [c for c in range(len(levels[0])) if c + N - 2 <= room]
        # Lookahead branch: each column sees the first level up to it, and then itself.
        paths, guesses = [], []
        for c in fitting:
            path = levels[0][1 : c + 1] + [levels[j][c] for j in range(1, N - 1)]
            paths.append(path)
            guesses.append(next_token(now + path))
        # Verification branch: n-grams that begin with the last token.
        checked = [list(ngram)[:room] for ngram in pool.get(now[-1], [])] + paths
        accepted = []
        while True:
            token = next_token(now + accepted)
            accepted.append(token)
            if not any(path[: len(accepted)] == accepted for path in checked):
                break
        # The pool: the oldest n-gram of a first token leaves if there are more than G.
        for c, guess in zip(fitting, guesses):
            first = levels[0][c] if c else now[-1]
            ngram = tuple([levels[j][c] for j in range(1, N - 1)] + [guess])
            kept = pool.setdefault(first, [])
            if ngram in kept:
                kept.remove(ngram)
            kept.append(ngram)
            if len(kept) > G:
                kept.pop(0)
        # The window moves by one position: every level becomes the one before it.
        levels = [[level[c] for c in fitting] for level in levels[1:]] + [guesses]
        new += accepted
        gains.append(len(accepted))
    return new, gains, pool
