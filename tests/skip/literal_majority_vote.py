"""Majority votes, counted after the last one.

Independent of minitx's code. Votes are any values that can be compared, in the order in which they
were cast.
"""


def winner(votes):
    """The most frequent vote; of equally frequent ones the first that was cast."""
    best = votes[0]
    for vote in votes:
        if votes.count(vote) > votes.count(best):
            best = vote
    return best


def votes_needed(votes, everything):
    """After how many of these votes the result is certain, whatever the others are: tried with all
    ways to cast them. everything: all possible votes."""

    def certain(cast, left):
        return len({winner(cast + others) for others in ways(left)}) == 1

    def ways(n):
        return [[x, *rest] for x in everything for rest in ways(n - 1)] if n else [[]]

    for n in range(1, len(votes) + 1):
        if certain(votes[:n], len(votes) - n):
            return n
