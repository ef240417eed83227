"""Jacobi decoding in plain loops. Independent of minitx's code.

``next_token`` maps a text (a list of tokens) to its greedy next token. One call of it for each
guess of a pass stands for one row of the pass.
"""


def block(next_token, text, guesses):
    """(tokens, passes) of Jacobi's method on one block: replace all guesses at once by what the
    model says after those before them, until nothing changes. The last pass only detects that."""
    y, passes = list(guesses), 0
    while True:
        corrected = [next_token(text + y[:i]) for i in range(len(y))]
        passes += 1
        if corrected == y:
            return y, passes
        y = corrected


def sliding(next_token, text, m, limit, fill):
    """(tokens, guesses of each pass) of the form that moves on as soon as a token is right.
    ``fill`` maps a text to one more guess at its end."""
    new, y, passes = [], [], []
    while len(new) < limit:
        room = limit - len(new) - 1
        while len(y) < min(m, room):
            y.append(fill(text + new + y))
        y = y[: min(m, room)]
        passes.append(list(y))
        # What the model says after the text and the first i guesses, i = 0..m.
        says = [next_token(text + new + y[:i]) for i in range(len(y) + 1)]
        n = 0
        while n < len(y) and y[n] == says[n]:
            n += 1
        new += says[: n + 1]
        y = says[n + 1 :]
    return new, passes
