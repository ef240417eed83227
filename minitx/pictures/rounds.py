"""The rounds of speculative decoding: which tokens were accepted guesses, and which were sampled.

A round is what a decoding loop does between two bursts of tokens (``token_work.Round``). A token
that a model had run before the loop yielded it was a guess, and was accepted; the last one of a
round is sampled from the logits. A guess that was run and is not in the text was rejected.
"""

from collections.abc import Sequence

from minitx.pictures.token_work import Round

MOST_REJECTED = 6  # that are written out for a round

ACCEPTED, SAMPLED = "=", "+"


def was_speculative(rounds: Sequence[Round]) -> bool:
    """Were there guesses, round after round? A single round is no speculation: there, several texts
    were written and one was taken. Nor are tokens that were rejected once: another model began."""
    accepted = any(r.proposed for r in rounds)
    return len(rounds) > 1 and (accepted or sum(bool(r.rejected) for r in rounds) > 1)


def marks(rounds: Sequence[Round]) -> dict[int, str]:
    """By position: ``ACCEPTED`` or ``SAMPLED``."""
    found = {}
    for r in rounds:
        for i in range(len(r.ids)):
            found[r.first + i] = ACCEPTED if i < r.proposed else SAMPLED
    return found


def rounds_text(rounds: Sequence[Round], texts: dict[int, str]) -> str:
    """A line for each round, with the sampled token in brackets, and the totals. texts: of the ids
    of all tokens."""
    wide = len(str(len(rounds)))
    lines = []
    for number, r in enumerate(rounds, 1):
        words = [texts[id] for id in r.ids]
        line = f"round {number:{wide}}  {''.join(words[: r.proposed])}"
        if sampled := "".join(words[r.proposed :]):
            line += f"[{sampled}]"
        if r.rejected:
            wrong = [texts[id] for _, id in r.rejected[:MOST_REJECTED]]
            more = f" and {len(r.rejected) - len(wrong)} more" * (len(r.rejected) > len(wrong))
            line += f"   rejected: {'|'.join(wrong)}{more}"
        lines.append(line)
    return "\n".join([*lines, rounds_sentence(rounds)])


def rounds_sentence(rounds: Sequence[Round]) -> str:
    accepted, rejected = sum(r.proposed for r in rounds), sum(len(r.rejected) for r in rounds)
    tokens = sum(len(r.ids) for r in rounds)
    return (
        f"{len(rounds)} rounds, {tokens / len(rounds):.2f} tokens each: {accepted} guesses "
        f"accepted, {rejected} rejected, {tokens - accepted} tokens sampled from the logits."
    )
