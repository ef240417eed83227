"""How many of so many."""


def share_of(count: float, share: float) -> int:
    """int(count * share), but for what floating point does to it: 0.29 of 100 is 29, not 28."""
    return int(round(count * share, 6))
