"""For techniques that replace the plain decoding loop: one at a time."""

from minitx.decode import Autoregressive
from minitx.errors import MinitxError
from minitx.lm import LM
from minitx.technique import REGISTRY, owner
from minitx.tree import Part, walk


def need_plain_loop(lm: LM, who: str) -> None:
    """Refuse a model whose decoding loop was replaced or wrapped already; who: the technique."""
    if type(lm.decode) is not Autoregressive:
        there = loop_owner(lm.decode)
        found = REGISTRY.get(there)
        # Of two loops that replace the plain one, neither can be around the other.
        around = found is not None and (who in found.after or found.level == "answer")
        both = "apply both at once to the model without it, or " if around else ""
        raise MinitxError(
            f"{who} replaces the decoding loop, and this model already has that of {there}; {both}"
            "use one of the two."
        )


def loop_owner(loop: Part) -> str:
    """The technique of a decoding loop. A loop that several techniques share is defined in none of
    their files, but a part of it is, such as its draft."""
    owners = [owner(node) for _, node in walk(loop)]
    return next((name for name in owners if name in REGISTRY), owners[0])
