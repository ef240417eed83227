"""What parts of a model cost for one token, from its shapes alone, to tell whether a check can pay.

A check that decides what to skip costs multiply-adds itself: in a model with a large vocabulary,
few layers or a short context it may cost more than it could ever save. Such a setting runs as asked
(a student may want to see it), and warns.
"""

import warnings

from minitx.config import Config
from minitx.errors import MinitxWarning


def skipped_layer(c: Config) -> int:
    """Multiply-adds of one token in the matrices of a layer, except those that make its keys and
    values: W_q, W_o and the FFN."""
    return 2 * c.width * c.heads * c.head_width + ffn(c)


def ffn(c: Config) -> int:
    matrices = 3 if c.family == "llama" else 2  # with a gate, or without
    return matrices * c.width * c.hidden


def head(c: Config) -> int:
    return c.vocab_size * c.width


def warn(message: str) -> None:
    """Say in one line that a setting costs more than it can save."""
    warnings.warn(message, MinitxWarning, stacklevel=2)


def check_selection(name: str, S: int, d: int, fixed: float, per_key: float, instead: str) -> None:
    """Warn if selecting keys takes as many multiply-adds as scoring all of them, at every length of
    text: even at the whole context of S keys, with no key kept.

    d: the width of the keys that arrive, of which dense attention takes 2 d multiply-adds each.
    fixed: multiply-adds of selecting, per query head and decoded token, at any length; per_key:
    those for each cached key.
    """
    if fixed + per_key * S >= 2 * d * S:
        warn(
            f"{name}: selecting keys takes {fixed + per_key * S:,.0f} multiply-adds per query head "
            f"at the longest text ({S:,} keys), dense attention {2 * d * S:,}, so it saves none at "
            f"any length; {instead}."
        )
