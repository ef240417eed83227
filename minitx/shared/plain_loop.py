"""For techniques that replace the plain decoding loop: one at a time."""

from minitx.decode import Autoregressive
from minitx.errors import MinitxError
from minitx.lm import LM
from minitx.technique import owner


def need_plain_loop(lm: LM, who: str) -> None:
    """Refuse a model whose decoding loop was replaced or wrapped already; who: the technique."""
    if type(lm.decode) is not Autoregressive:
        raise MinitxError(
            f"{who} replaces the decoding loop, and this model already has that of "
            f"{owner(lm.decode)}; apply both at once to the model without it, or use one of the "
            "two."
        )
