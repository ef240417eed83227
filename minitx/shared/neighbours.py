"""What techniques that act on a group of neighbouring layers have in common."""

from minitx.errors import MinitxError


def check_first(name: str, first: int, size: int, L: int) -> None:
    """Refuse a group of ``size`` layers that would begin at layer ``first`` and end after the last
    of L."""
    if first + size > L:
        raise MinitxError(
            f"{name}: first is {first}; expected at most {L - size}, since {size} of the {L} "
            "layers begin there; use a lower first, or a smaller size."
        )
