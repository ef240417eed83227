"""A share of a count."""


def share_of(count: float, share: float) -> int:
    """``count * share`` rounded down, safe from floating-point error: 0.29 of 100 is 29, where
    int(100 * 0.29) is 28."""
    return int(round(count * share, 6))
